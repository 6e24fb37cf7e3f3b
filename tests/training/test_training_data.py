"""Reading, tokenising and batching."""

import random
from pathlib import Path

import pytest
import torch

from fastseq.errors import UserError
from fastseq.training.batching import TokenBatches, cut_by_tokens
from fastseq.training.data import Sequences, encode, group_references, read_pairs
from fastseq.training.tokenizer import BOS, EOS, PAD, RESERVED, UNK, TextTokenizer

TOY = Path(__file__).parents[1] / "cases/toy"


def reversal_lines() -> list[str]:
    """Make the toy corpus: 200 different words over five letters, each with its letters in reverse order."""
    rng = random.Random(0)
    words: list[str] = []
    while len(words) < 200:
        word = "".join(rng.choice("abcde") for _ in range(rng.randint(2, 6)))
        if word not in words:
            words.append(word)
    return [f"{word}\t{' '.join(reversed(word))}\n" for word in words]


def test_toy_corpus_follows_the_rule():
    files = [(TOY / f"{name}.tsv").read_text() for name in ("train", "valid", "test")]
    assert "".join(files) == "".join(reversal_lines())
    assert [len(text.splitlines()) for text in files] == [160, 20, 20]


def test_read_pairs_and_references(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufefftomato\tT AH\r\nbé\tB\ntomato\tT EY\n".encode())
    pairs = read_pairs(path)
    assert pairs == (["tomato", "bé", "tomato"], ["T AH", "B", "T EY"])
    assert group_references(pairs) == {"tomato": ["T AH", "T EY"], "bé": ["B"]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "a.tsv is empty; expected at least one source<TAB>target line"),
        (b"a\tb\nc d\n", "a.tsv, line 2: expected source<TAB>target with one tab, found 0 tabs"),
        (b"a\tb\tc\n", "a.tsv, line 1: expected source<TAB>target with one tab, found 2 tabs"),
        (b"a\tb\n\nc\td\n", "a.tsv, line 2: expected source<TAB>target with one tab, found 0 tabs"),
        (b"a\tb\n \tc\n", "a.tsv, line 2: the source is empty"),
        (b"a\tb\nc\t\n", "a.tsv, line 2: the target is empty"),
        (b"a\tb\nab\xff\tc\n", "a.tsv, line 2: byte 3 is not UTF-8"),
        (None, "a.tsv cannot be read (No such file or directory)"),
    ],
    ids=["empty file", "no tab", "two tabs", "blank line", "empty source", "empty target", "not UTF-8", "missing"],
)
def test_bad_files_get_a_sentence(tmp_path, content, sentence):
    path = tmp_path / "a.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_pairs(path)
    assert sentence in str(error.value)


KINDS = pytest.mark.parametrize("kind", ["char", "whitespace", "bpe"])
LINES = ["the cat sat", "the dog sat on the cat", "日本 é", "a <pad> b"]


@KINDS
def test_tokenizer_round_trip(tmp_path, kind):
    tokenizer = TextTokenizer.train(kind, LINES[:3], 80)
    rows = tokenizer.encode(LINES[:3])
    assert all(token > UNK for row in rows for token in row)
    assert tokenizer.decode([[BOS, *row, EOS, 5, PAD] for row in rows]) == LINES[:3]
    tokenizer.save(tmp_path / "t.json")
    loaded = TextTokenizer.load(tmp_path / "t.json")
    assert (loaded.kind, len(loaded), loaded.encode(LINES)) == (kind, len(tokenizer), tokenizer.encode(LINES))
    again = TextTokenizer.train(kind, LINES[:3], 80)
    assert again.encode(LINES) == tokenizer.encode(LINES)


@KINDS
@pytest.mark.parametrize("extra", ["", " <pad> x<unk>y", " a\x1cb\x1f", "\x85 \xa0\u2003\u3000\u200b\ufeff\U0001f600"])
def test_flat_encoding_is_the_same(kind, extra):
    rng = random.Random(2)
    letters = "abc  \t\u00e9\u65e5\u2028\U0001f600"
    lines = ["".join(rng.choices(letters, k=rng.randint(0, 20))) for _ in range(50)] + ["the cat" + extra, ""]
    tokenizer = TextTokenizer.train(kind, ["the cat a b c \u65e5 ab bc"], 80)
    flat, lengths = tokenizer.encode_flat(lines)
    rows = tokenizer.encode(lines)
    assert flat.dtype.name == "int32"
    assert lengths.tolist() == [len(row) for row in rows]
    assert flat.tolist() == [token for row in rows for token in row]


@KINDS
def test_text_never_yields_a_reserved_id_but_unk(kind):
    tokenizer = TextTokenizer.train(kind, LINES, 80)
    (ids,) = tokenizer.encode(["a <pad> <bos> <eos> ζ"])
    assert UNK in ids
    assert not {PAD, BOS, EOS} & set(ids)


def test_vocabulary_size_is_a_limit_and_bpe_merges():
    assert len(TextTokenizer.train("char", LINES, 10)) == 10
    small, large = (TextTokenizer.train("bpe", LINES[:2] * 5, size) for size in (20, 60))
    assert len(large.encode(LINES[:1])[0]) < len(small.encode(LINES[:1])[0])


@pytest.mark.parametrize("size", [5, 20, 500])
def test_bpe_keeps_its_limit_whatever_the_alphabet(size):
    lines = ["".join(map(chr, range(200, 1250))), "the quick brown fox jumps over the lazy dog 0123456789"]
    assert len(TextTokenizer.train("bpe", lines, size)) <= size


@KINDS
@pytest.mark.parametrize("word", [*RESERVED, "<s>", "</s>"])
def test_reserved_words_in_the_data_get_no_second_id(kind, word):
    tokenizer = TextTokenizer.train(kind, [f"the {word} cat", f"{word} {word} x{word}y"] * 3, 60)
    vocabulary = tokenizer._tokenizer.get_vocab()
    assert [vocabulary[reserved] for reserved in RESERVED] == [PAD, BOS, EOS, UNK]
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    (ids,) = tokenizer.encode([f"the {word} cat"])
    assert not {PAD, BOS, EOS} & set(ids)
    assert (UNK in ids) == (word in RESERVED)


def test_unknown_tokens_are_counted():
    tokenizer = TextTokenizer.train("char", ["abc"], 80)
    sequences, note = encode(tokenizer, ["abz", "yc"], "x.tsv")
    assert note == "x.tsv: 2 of 5 tokens are not in the vocabulary and are read as <unk>"
    assert sequences.lengths.tolist() == [4, 3]
    assert encode(tokenizer, ["abc"], "x.tsv")[1] is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "is missing"), ("{}", "is not a tokenizer"), ("no json", "is not a tokenizer")],
    ids=["missing", "other JSON", "no JSON"],
)
def test_bad_tokenizer_files(tmp_path, content, sentence):
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=sentence):
        TextTokenizer.load(path)


def test_padded_batch():
    sequences = Sequences([[5, 6, EOS], [7, EOS], [8, 9, 4, EOS]])
    tokens, lengths = sequences.padded(torch.tensor([1, 2]))
    assert tokens.tolist() == [[7, EOS, PAD, PAD], [8, 9, 4, EOS]]
    assert lengths.tolist() == [2, 4]
    assert sequences.select(torch.tensor([2, 0])).padded(torch.tensor([1]))[0].tolist() == [[5, 6, EOS]]


def test_cut_by_tokens():
    assert cut_by_tokens([2, 3, 2, 5, 9, 1], 9) == [(0, 3), (3, 4), (4, 5), (5, 6)]
    assert cut_by_tokens([], 9) == []


def random_sides(n: int = 97) -> tuple[Sequences, Sequences]:
    """Draw sources whose first token is their number, and targets."""
    rng = random.Random(1)
    sources = Sequences([[100 + i] + [9] * rng.randint(0, 11) + [EOS] for i in range(n)])
    return sources, Sequences([[8] * rng.randint(1, 14) + [EOS] for _ in range(n)])


def ids(batch) -> list[int]:
    """Return the numbers of the examples in a batch."""
    return [int(first) - 100 for first in batch.source[:, 0] if first >= 100]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_an_epoch_within_the_budget(shuffle):
    source, target = random_sides()
    batches = TokenBatches(source, target, max_tokens=60, shuffle=shuffle)
    for epoch in range(3):
        batches.set_epoch(epoch)
        found = list(batches)
        assert len(found) == len(batches)
        assert sorted(i for batch in found for i in ids(batch)) == list(range(97))
        assert all(max(batch.source.shape[1], batch.labels.shape[1]) * len(batch.source) <= 60 for batch in found)
        assert all(batch.update_tokens == int((batch.labels != PAD).sum()) for batch in found)


def test_batch_contents():
    source, target = random_sides()
    for batch in TokenBatches(source, target, max_tokens=60):
        rows = torch.tensor(ids(batch))
        lengths = source.lengths[rows]
        if batch.source_lengths is None:
            assert (lengths == batch.source.shape[1]).all()
        else:
            assert torch.equal(batch.source_lengths, lengths)
        assert torch.equal((batch.labels != PAD).sum(1), target.lengths[rows])
        assert (batch.target_in[:, 0] == BOS).all()
        assert torch.equal(batch.target_in[:, 1:], batch.labels[:, :-1])


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = TokenBatches(*random_sides(), max_tokens=60, seed=seed)
        batches.set_epoch(epoch)
        return [ids(batch) for batch in batches]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize(("world_size", "accumulate"), [(2, 1), (1, 2), (3, 2)])
def test_processes_share_what_one_would_take(world_size, accumulate):
    """Includes an update with fewer examples than shares: one source is longer than the whole budget."""
    source, target = random_sides()
    source = Sequences(
        [*(row[:n].tolist() for row, n in zip(*source.padded(torch.arange(96)), strict=True)), [196] * 99]
    )
    together = TokenBatches(source, target, max_tokens=20 * world_size * accumulate, seed=3)
    shares = [
        list(
            TokenBatches(source, target, max_tokens=20, world_size=world_size, rank=rank, accumulate=accumulate, seed=3)
        )
        for rank in range(world_size)
    ]
    assert {len(share) for share in shares} == {len(together) * accumulate}
    for number, batch in enumerate(together):
        parts = [share[number * accumulate + a] for share in shares for a in range(accumulate)]
        assert sorted(i for part in parts for i in ids(part)) == sorted(ids(batch))
        assert {part.update_tokens for part in parts} == {batch.update_tokens}
        assert sum(int((part.labels != PAD).sum()) for part in parts) == batch.update_tokens


def test_an_epoch_continues_where_its_state_was_taken():
    batches = TokenBatches(*random_sides(), max_tokens=60, seed=5)
    batches.set_epoch(4)
    iterator = iter(batches)
    used = [ids(next(iterator)) for _ in range(3)]
    other = TokenBatches(*random_sides(), max_tokens=60, seed=5)
    other.load_state_dict(batches.state_dict())
    rest = [ids(batch) for batch in other]
    batches.set_epoch(4)
    assert used + rest == [ids(batch) for batch in batches]
    assert len(list(other)) == len(other)
