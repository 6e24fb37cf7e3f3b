"""The assembly of parts, the tables of the documentation, and vocabularies."""

from pathlib import Path

import pytest
import torch

from fastseq.convert.parts import Affine, Layer, Parts, Weights, assemble
from fastseq.convert.tables import CONVENTIONS, SOURCES, TABLES, Row, markdown
from fastseq.convert.vocabulary import Vocabulary, read_tokens
from fastseq.errors import UserError
from fastseq.seq2seq.model import Seq2Seq, Seq2SeqConfig
from fastseq.training.data import encode
from fastseq.training.tokenizer import EOS, TextTokenizer

PAGE = Path(__file__).parents[2] / "docs/port-models.md"
WORDS = Vocabulary(["<pad>", "<bos>", "<eos>", "<unk>", *"abc"], "<pad>", "<bos>", "<eos>", "<unk>")


def test_the_page_prints_the_tables_of_the_code():
    begin, end = "<!-- tables: fastseq/convert/tables.py -->\n\n", "\n<!-- end of tables -->"
    assert PAGE.read_text().partition(begin)[2].partition(end)[0] == markdown()


def test_each_row_names_a_parameter_of_the_model():
    options = dict(bidirectional=True, encoder_layers=2, decoder_layers=2)
    every = set()
    for attention in ("general", "additive"):
        config = Seq2SeqConfig(
            src_vocab_size=9, tgt_vocab_size=9, hidden_size=4, attention=attention, combine_bias=True, **options
        )
        every |= set(Seq2Seq(config).state_dict())
    assert set(TABLES) == set(SOURCES) == set(CONVENTIONS) - {"fastseq"}
    for source, rows in TABLES.items():
        for row in rows:
            names = {row.ours.format(k=k, d=d) for k in (0, 1) for d in ("", "_reverse")}
            assert names <= every, (source, row)


def layer(inputs, units, bias_hh=True):
    return Layer(
        torch.randn(4 * units, inputs),
        torch.randn(4 * units, units),
        torch.randn(4 * units),
        torch.randn(4 * units) if bias_hh else None,
    )


def parts(narrow=3, units=4, **options):
    """A bidirectional encoder of ``narrow`` units for each direction, and a decoder of ``units``."""
    width = 2 * narrow
    encoder = [[layer(5, narrow), layer(5, narrow)], [layer(width, narrow), layer(width, narrow)]]
    bridge = tuple(Affine(torch.randn(2 * units, 2 * width), torch.randn(2 * units)) for _ in range(2))
    return Parts(
        torch.randn(7, 5),
        torch.randn(7, 2),
        encoder,
        [layer(2 + units, units), layer(units, units)],
        Affine(torch.randn(7, units), torch.randn(7)),
        attention="general",
        key=torch.randn(units, width),
        combine=Affine(torch.randn(units, width + units)),
        bridge=bridge,
        options={"bridge_activation": "none", **options},
    )


@pytest.mark.parametrize(("narrow", "units"), [(3, 4), (2, 7), (2, 4)], ids=["wide encoder", "wide decoder", "equal"])
def test_added_units_stay_zero_and_get_no_gradient(narrow, units):
    """The units that fill up a narrower side are inert, in the forward pass and in training."""
    torch.manual_seed(0)
    given = parts(narrow, units)
    model = assemble(given, WORDS, WORDS).train()
    model.decoder.output_dropout.p = model.decoder.embed_dropout.p = model.encoder.embed_dropout.p = 0.0
    hidden = model.config.hidden_size
    assert hidden == max(2 * narrow, units + units % 2)
    tokens = torch.tensor([[4, 5, 6]])
    out = model(tokens, None, tokens)
    assert not out.state.h[..., units:].any()
    out.logits.square().sum().backward()
    for name, p in model.named_parameters():
        if p.dim() == 2 and "embedding" not in name:
            assert not p.grad[(p == 0).all(-1)].any(), name
    sizes = {n: int((p != 0).sum()) for n, p in model.named_parameters()}
    assert sizes["decoder.combine.weight"] == units * (2 * narrow + units)
    assert sizes["bridge.h_proj.weight"] == 2 * units * 4 * narrow
    assert sizes["decoder.lstm.weight_ih_l0"] == 4 * units * (2 + units)


def test_ties_that_fastseq_can_hold_are_kept():
    torch.manual_seed(0)
    given = parts(2, 4)
    given.source_embedding, given.target_embedding = torch.randn(7, 3), torch.randn(7, 4)
    given.encoder[0] = [layer(3, 2), layer(3, 2)]
    given.decoder[0] = layer(8, 4)
    given.output = Affine(given.target_embedding)
    tokens = torch.tensor([[4, 5, 6]])
    expected = assemble(given, WORDS, WORDS)(tokens, None, tokens).logits
    given.options["share_decoder_input_output_embed"] = True
    model = assemble(given, WORDS, WORDS)
    assert model.decoder.output.weight is model.decoder.embedding.weight
    torch.testing.assert_close(model(tokens, None, tokens).logits, expected)
    given.options["share_all_embeddings"] = True
    with pytest.raises(UserError, match="share a matrix, but their tensors differ"):
        assemble(given, WORDS, WORDS)
    del given.options["share_all_embeddings"]
    given.source_embedding, given.encoder[0] = torch.randn(7, 5), [layer(5, 2), layer(5, 2)]
    assert not assemble(given, WORDS, WORDS).config.tied  # no matrix of 5 columns reads vectors of 4


def test_states_of_another_width_need_a_bridge():
    given = parts(3, 4)
    given.bridge = None
    with pytest.raises(UserError, match="states of 6 units, but the decoder has 4"):
        assemble(given, WORDS, WORDS)


ROWS = (Row("decoder.output.weight", "out.{k}", ""), Row("decoder.output.bias", "b"))


def test_tensors_are_taken_once_and_all():
    weights = Weights("lib", {"out.1": torch.ones(2, 3, dtype=torch.float16), "z": torch.ones(1)}, ROWS)
    assert weights.take("decoder.output.weight", None, 3, k=1).dtype == torch.float32
    with pytest.raises(UserError, match=r"has no tensor out\.1"):
        weights.take("decoder.output.weight", None, 3, k=1)
    with pytest.raises(UserError, match="tensors with no place in a fastseq model: z; it has a part"):
        weights.finish()
    with pytest.raises(UserError, match=r"out\.0 has shape \(2,\), expected \(any, 3\)"):
        Weights("lib", {"out.0": torch.ones(2)}, ROWS).take("decoder.output.weight", None, 3, k=0)
    with pytest.raises(UserError, match="b is no tensor of floating-point"):
        Weights("lib", {"b": torch.ones(2, dtype=torch.int64)}, ROWS)


def test_vocabulary_order_and_files(tmp_path):
    vocabulary = Vocabulary(["b", "<s>", "a", "</s>"], bos="<s>", eos="</s>")
    assert vocabulary.words == ["b", "a"]
    assert vocabulary.rows().tolist() == [-1, 1, 3, -1, 0, 2]
    with pytest.raises(UserError, match="no token '<x>'"):
        Vocabulary(["a"], pad="<x>")
    with pytest.raises(UserError, match="reserved tokens must differ"):
        Vocabulary(["a"], pad="a", bos="a")
    with pytest.raises(UserError, match="reserved in fastseq; name it with --unk"):
        Vocabulary(["a", "<unk>"])
    (tmp_path / "v.txt").write_text("a\n \nb\n")
    assert read_tokens(tmp_path / "v.txt") == ["a", " ", "b"]
    (tmp_path / "v.json").write_text("[")
    with pytest.raises(UserError, match="is not JSON"):
        read_tokens(tmp_path / "v.json")


def test_a_tokenizer_of_a_port_is_saved_with_its_marks(tmp_path):
    forms = [
        (WORDS.tokenizer("whitespace"), [4, 3, 6], [4, 3, 6, EOS]),
        (WORDS.tokenizer("whitespace", closed=False), [4, 3, 6], [4, 3, 6]),
        (WORDS.tokenizer("whitespace", closed=False, padding=(5, "b")), [4, 3, 6, 5, 5], [4, 3, 6, 5, 5]),
        (WORDS.tokenizer("whitespace", padding=(5, "<pad>")), [4, 3, 6, 0, 0], [4, 3, 6, 0, 0, EOS]),
        (WORDS.tokenizer("whitespace", padding=(2, "b")), [4, 3, 6], [4, 3, 6, EOS]),
    ]
    for tokenizer, ids, source in forms:
        tokenizer.save(tmp_path / "t.json")
        for each in (tokenizer, TextTokenizer.load(tmp_path / "t.json")):
            assert each.encode(["a <eos> c"]) == [ids]
            tokens, lengths = encode(each, ["a <eos> c"], "sources")[0].padded(torch.tensor([0]))
            assert tokens.tolist() == [source]
            assert lengths.tolist() == [len(source)]
    with pytest.raises(UserError, match="sources: line 2 is empty; this model"):
        encode(forms[1][0], ["a", ""], "sources")
    with pytest.raises(UserError, match="no token 'x' to pad with"):
        WORDS.tokenizer("whitespace", padding=(5, "x"))


HOSTILE = {
    "post-processor": ('"post_processor": null', '"post_processor": {"type": "ByteLevel"}'),
    "pad length": ('"Fixed": 5', '"Fixed": 5000000000'),
    "pad length of a text": ('"Fixed": 5', '"Fixed": "5"'),
    "pad id": ('"pad_id": 5', '"pad_id": 4'),
    "pad token": ('"pad_token": "b"', '"pad_token": "x"'),
    "pad direction": ('"Right"', '"Left"'),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_other_marks_are_refused(what, tmp_path):
    path = tmp_path / "t.json"
    WORDS.tokenizer("whitespace", padding=(5, "b")).save(path)
    text, replaced = path.read_text(), path.read_text().replace(*HOSTILE[what])
    assert text != replaced
    path.write_text(replaced)
    with pytest.raises(UserError, match="is not a tokenizer"):
        TextTokenizer.load(path)
