"""The makers of demonstration data: strings of handwritten digits, spoken digits, numbers and dates, inflection."""

import datetime
import stat
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import refused

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training import digits, inflection, numbers, spoken
from fastseq.training.data import read_pairs
from fastseq.training.features import Features
from fastseq.training.options import built_in_config, parsed, train_parser
from fastseq.training.reading import PairFile


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """Twenty images, each of one shade."""
    return torch.arange(1, 21)[:, None, None].expand(20, 8, 8) / 20, torch.arange(20) % 10


def test_digit_strings_are_a_manifest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "read_digits", images)
    monkeypatch.setattr(digits, "SIZES", {"train": 30, "valid": 5, "test": 7})
    main(["data", "digits", str(tmp_path / "new")])
    assert f"{tmp_path / 'new' / 'test'}.tsv: 7 strings" in capsys.readouterr().out
    pairs = read_pairs(tmp_path / "new" / "train.tsv")
    frames = Features(digits.HEIGHT, 8000.0).read(pairs.sources, tmp_path / "new" / "train.tsv")
    assert len(frames) == 30
    shown = torch.tensor([len(target.split()) for target in pairs.targets])
    assert shown.min() >= 1 and shown.max() == digits.LONGEST
    assert ((frames.lengths >= 8 * shown + 1) & (frames.lengths <= 10 * shown + 1)).all()
    assert frames.flat.min() >= 0 and 0.5 < frames.flat.max() <= 1
    again = tmp_path / "again"
    main(["data", "digits", str(again)])
    assert (again / "train.npy").read_bytes() == (tmp_path / "new" / "train.npy").read_bytes()


def test_no_image_is_in_two_files():
    parts = [digits.part_of(number) for number in range(1797)]
    assert {name: parts.count(name) for name in digits.SIZES} == {"train": 1437, "valid": 180, "test": 180}


def test_a_string_shows_its_digits_in_order():
    ink, labels = images()
    columns, texts = digits.strings(ink, labels, 50, bend=False, seed=3)
    for column, text in zip(columns, texts, strict=True):
        assert column.shape[1] == digits.HEIGHT
        cells = (column.amax(1) > 0).sum()
        assert cells == 8 * len(text.split())


def test_the_real_digits(monkeypatch):
    try:
        metadata.distribution("scikit-learn")
    except metadata.PackageNotFoundError:
        pytest.skip("needs scikit-learn")
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it would raise; another test may have imported it
    found, labels = digits.read_digits()
    assert found.shape == (1797, 8, 8) and found.max() == 1 and labels.bincount().min() > 170


def test_without_scikit_learn(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    sentence = refused(capsys, "data", "digits", tmp_path / "x")
    assert "scikit-learn, which holds the digits, is missing; bring it with: pip install scikit-learn" in sentence
    assert not (tmp_path / "x").exists()


SPEAKER = """#!{python}
import io, math, struct, sys, wave
words = sys.argv[-1].split()
if "--stdout" not in sys.argv or "-v" not in sys.argv or "fail" in sys.argv[2]:
    sys.exit("no such voice")
file = io.BytesIO()
with wave.open(file, "wb") as out:
    out.setnchannels(1), out.setsampwidth(2), out.setframerate(22050)
    out.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 9))) for i in range(2205 * len(words))))
sys.stdout.buffer.write(file.getvalue())
"""


@pytest.fixture
def speaker(tmp_path, monkeypatch) -> None:
    """A program of the name espeak-ng that says each word as a tone of 0.1 s."""
    pytest.importorskip("soundfile")
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    program.write_text(SPEAKER.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))


@pytest.mark.usefixtures("speaker")
def test_spoken_digits_are_a_manifest(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spoken, "SIZES", {"train": 6, "valid": 2, "test": 2})
    main(["data", "spoken", str(tmp_path / "new")])
    assert "train.tsv: 6 recordings by 8 speakers in 3 accents" in capsys.readouterr().out
    pairs = read_pairs(tmp_path / "new" / "train.tsv")
    frames = Features(20, 8000.0).read(pairs.sources, tmp_path / "new" / "train.tsv")
    assert frames.lengths.tolist() == [
        10 * len(target.split()) + (1 if len(target.split()) else 0) for target in pairs.targets
    ]
    assert frames.flat.isfinite().all()


@pytest.mark.usefixtures("speaker")
def test_a_voice_that_espeak_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(spoken, "ACCENTS", ("fail",))
    with pytest.raises(UserError, match=r"espeak-ng cannot speak as fail\+\w+: no such voice"):
        spoken.write_recordings(tmp_path / "x", {"train": 1})


def test_without_espeak(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    sentence = refused(capsys, "data", "spoken", tmp_path / "x")
    assert (
        "the program espeak-ng, which speaks the digits, is missing; on Debian: apt-get install espeak-ng" in sentence
    )


def test_speakers_of_the_parts_differ():
    every = [speaker for speakers in spoken.SPEAKERS.values() for speaker in speakers]
    assert len(every) == len(set(every))
    random = np.random.default_rng(0)
    one = spoken.Recording.drawn(random, ("m3",))
    assert one.voice.endswith("+m3") and 1 <= len(one.words) <= spoken.LONGEST


@pytest.mark.parametrize("name", ["digits", "spoken"])
def test_the_configuration_names_existing_options(name):
    config = parsed(train_parser(), ["--config", built_in_config(name)])
    assert config.model.source_features and Path(built_in_config(name)).is_file()


def spelled(number, *, lang):
    return f"{lang} {'-'.join(str(number))}"


def written(day, form, *, locale):
    return f"{locale} {form} {day:%d %m %Y}"


def test_numbers_and_dates_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(numbers, "writers", lambda: (spelled, written))
    monkeypatch.setattr(numbers, "SIZES", {"train": 400, "valid": 20, "test": 30})
    main(["data", "numbers", str(tmp_path / "new")])
    assert f"{tmp_path / 'new' / 'test.tsv'}: 30 lines" in capsys.readouterr().out
    files = [read_pairs(tmp_path / "new" / f"{name}.tsv") for name in numbers.SIZES]
    assert [len(pairs.sources) for pairs in files] == [400, 20, 30]
    sources = [source for pairs in files for source in pairs.sources]
    assert len(set(sources)) == 450
    dates = 0
    for source, target in zip(sources, (target for pairs in files for target in pairs.targets), strict=True):
        if "-" in target:
            dates += 1
            day = datetime.date.fromisoformat(target)
            assert 1900 <= day.year < 2100 and source.endswith(f"{day:%d %m %Y}")
        else:
            assert spelled(int(target), lang=source[:2]) == source and int(target) < 10**numbers.LONGEST
    assert dates == 225
    main(["data", "numbers", str(tmp_path / "again")])
    assert (tmp_path / "again" / "train.tsv").read_bytes() == (tmp_path / "new" / "train.tsv").read_bytes()


def test_the_real_numbers_and_dates():
    pytest.importorskip("num2words")
    pytest.importorskip("babel")
    pairs = dict(numbers.distinct_pairs(300, seed=1))
    assert len(pairs) == 300 and all(source.strip() == source and "\t" not in source for source in pairs)
    spell, write = numbers.writers()
    assert spell(21, lang="de") == "einundzwanzig"
    assert write(datetime.date(2015, 3, 3), "full", locale="fr") == "mardi 3 mars 2015"


@pytest.mark.parametrize("package", ["num2words", "babel.dates"])
def test_without_the_writers_of_numbers(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert "is missing; bring both with: pip install num2words babel" in refused(
        capsys, "data", "numbers", tmp_path / "x"
    )
    assert not (tmp_path / "x").exists()


NOUNS = {  # real nouns, whose forms are in any grammar
    ("ev", "LOC", "PL", "PSS1S"): "evlerimde",
    ("kitap", "ACC", "SG", ""): "kitabı",
    ("kitap", "LOC", "SG", "PSS1P"): "kitabımızda",
    ("köpek", "DAT", "SG", ""): "köpeğe",
    ("araba", "ACC", "SG", ""): "arabayı",
    ("araba", "GEN", "SG", ""): "arabanın",
    ("araba", "DAT", "SG", "PSS3S"): "arabasına",
    ("araba", "NOM", "SG", "PSS2P"): "arabanız",
    ("ev", "ABL", "SG", "PSS3S"): "evinden",
    ("göz", "LOC", "PL", ""): "gözlerde",
    ("top", "ACC", "SG", ""): "topu",
    ("okul", "INS", "SG", "PSS3S"): "okuluyla",
    ("okul", "INS", "SG", ""): "okulla",
    ("çocuk", "ACC", "SG", "PSS2S"): "çocuğunu",
}


@pytest.mark.parametrize("form", NOUNS)
def test_inflection_of_real_nouns(form):
    assert inflection.inflected(*form) == NOUNS[form]


def test_inflections_have_tags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inflection, "SIZES", {"train": 40, "valid": 5, "test": 6})
    main(["data", "inflection", str(tmp_path / "new")])
    assert f"{tmp_path / 'new' / 'test.tsv'}: 30 lines" in capsys.readouterr().out
    stems = []
    for name, n in inflection.SIZES.items():
        pairs = read_pairs(PairFile(str(tmp_path / "new" / f"{name}.tsv"), tag_column="tags"))
        assert len(pairs.sources) == n * inflection.FORMS_OF_STEM == len(set(pairs.sources))
        for source, target in zip(*pairs, strict=True):
            noun, tags = source.split("\t")
            _, case, number, *possessor = tags.split(";")
            assert inflection.inflected(noun, case, number, *(possessor or [""])) == target
        stems += {source.split("\t")[0] for source in pairs.sources}
    assert len(stems) == len(set(stems)) == 51
    main(["data", "inflection", str(tmp_path / "again")])
    assert (tmp_path / "again" / "train.tsv").read_bytes() == (tmp_path / "new" / "train.tsv").read_bytes()


@pytest.mark.parametrize("name", ["numbers", "inflection", "cmudict_best"])
def test_the_configurations_of_text_name_existing_options(name):
    config = parsed(train_parser(), ["--config", built_in_config(name)])
    assert config.model.source_features is None and Path(built_in_config(name)).is_file()
