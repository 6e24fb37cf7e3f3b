"""Pairs from files of every kind, and what is said about bad ones."""

import gzip
import json

import pytest

from fastseq.errors import UserError
from fastseq.training.data import read_pairs
from fastseq.training.reading import PairFile

PAIRS = (["tomato", 'a "b", c', "é x"], ["T AH", "x", "y z"])
TSV = "".join(f"{source}\t{target}\n" for source, target in zip(*PAIRS, strict=True)).encode()
ROWS = [{"source": source, "target": target, "n": 1} for source, target in zip(*PAIRS, strict=True)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b'n,source,target\n1,tomato,T AH\n1,"a ""b"", c",x\n1,\xc3\xa9 x,y z\n'


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2  # two frames behind each other are one file
    return zstandard.compress(content[:half]) + zstandard.compress(content[half:])


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(("name", "content"), [("a.tsv", TSV), ("a.txt", TSV), ("a.jsonl", JSONL), ("a.CSV", CSV)])
def test_text_files(tmp_path, name, content, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(compressed(content, suffix) if suffix else content)
    assert read_pairs(path) == PAIRS


def test_parallel_files(tmp_path):
    for name, lines in zip(("a.de", "a.en"), PAIRS, strict=True):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    file = PairFile(str(tmp_path / "a.de"), str(tmp_path / "a.en"))
    assert read_pairs(file) == PAIRS
    assert file.size() == sum((tmp_path / name).stat().st_size for name in ("a.de", "a.en"))
    with (tmp_path / "a.en").open("a") as longer:
        longer.write("more\n")
    with pytest.raises(UserError, match=r"a\.de has fewer lines than .*a\.en; line i of one belongs to line i"):
        read_pairs(file)


def test_columns_have_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"de": "x", "en": "y"}\n')
    assert read_pairs(PairFile(str(tmp_path / "a.jsonl"), None, "de", "en")) == (["x"], ["y"])


def test_a_cell_of_csv_may_hold_lines(tmp_path):
    (tmp_path / "a.csv").write_text('source,target\n"two\nlines",x\n')
    assert read_pairs(tmp_path / "a.csv").sources == ["two\nlines"]


def test_parquet_and_folders_of_datasets(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_pairs(tmp_path / "a.parquet") == PAIRS
    with pytest.raises(UserError, match=r"no column of text de, it has source \(string\)"):
        read_pairs(PairFile(str(tmp_path / "a.parquet"), None, "de", "target"))
    with pytest.raises(UserError, match=r"no column of text n, it has source"):
        read_pairs(PairFile(str(tmp_path / "a.parquet"), None, "source", "n"))
    (tmp_path / "folder").mkdir()  # as datasets.Dataset.save_to_disk writes it
    for number in (0, 1):
        with pa.ipc.new_stream(str(tmp_path / "folder" / f"data-0000{number}-of-00002.arrow"), table.schema) as out:
            out.write_table(table.slice(2 * number, 2))
    assert read_pairs(tmp_path / "folder") == PAIRS
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none holds no data-\*\.arrow"):
        read_pairs(tmp_path / "none")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"bad\.parquet cannot be read"):
        read_pairs(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [  # mtime: bytes are part of a test's name, which must be the same in every worker of xdist
        ("a.tsv.gz", gzip.compress(TSV, mtime=0)[:-9], "a.tsv.gz is no complete gzip file"),
        ("a.tsv.gz", TSV, "a.tsv.gz is no complete gzip file"),
        ("a.tsv.zst", TSV, "a.tsv.zst is no complete zstandard file"),
        ("a.jsonl", b'{"source": "a"}\n', "a.jsonl, line 1: target is missing; name columns with --data.source_column"),
        ("a.jsonl", b'{"source": "a", "target": 5}\n', "a.jsonl, line 1: target is no text but int"),
        ("a.jsonl", JSONL + b"{\n", "a.jsonl, line 4 is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1 holds no object {...} with source and target"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"source,target\n", "a.csv is empty"),
        ("a.csv", b"source,answer\na,b\n", "a.csv has no column target, its first line names source, answer"),
        ("a.csv", CSV + b"1,2\n", "a.csv, line 5: 2 fields, the header has 3"),
        ("a.csv", CSV + b'1,"2', "a.csv, line 5 is not CSV"),
        ("a.csv", b"source,target\na,\n", "a.csv, line 1: the target is empty"),
        ("a.tsv.gz", gzip.compress(b"a\tb\nc\n", mtime=0), "a.tsv.gz, line 2: expected source<TAB>target with one tab"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path, name, content, sentence):
    if name.endswith(".zst"):
        pytest.importorskip("zstandard")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(tmp_path / name)
    assert sentence in str(error.value)


def test_a_cut_zstandard_file_is_refused(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    content = zstandard.compress(TSV * 5000)
    (tmp_path / "a.tsv.zst").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.tsv\.zst"):
        read_pairs(tmp_path / "a.tsv.zst")
