"""fastseq models in transformers: one folder, the same tokens from both searches, the Trainer, and bad calls."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
    pipeline,
)

import fastseq
from fastseq.errors import UserError
from fastseq.hf import FastseqConfig, FastseqForSeq2SeqLM, load_tokenizers
from fastseq.seq2seq.config import Seq2SeqConfig
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.trained import TrainedModel

LETTERS = "abcdefghij"
MODELS = {
    "input_feeding": {},
    "two_layers": {"attention": "dot", "input_feeding": False, "decoder_layers": 2, "encoder_layers": 2},
    "plain": {"attention": "none", "input_feeding": False},
    "tied": {"share_all_embeddings": True, "embedding_dim": 32},
}
BEAMS = {
    "beam": {"num_beams": 5},
    "n_best": {"num_beams": 4, "num_return_sequences": 3},
    "at_once": {"num_beams": 4, "early_stopping": True},
    "never": {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.6},
    "ngrams": {"num_beams": 4, "no_repeat_ngram_size": 2},
}


def make_model(**options) -> TrainedModel:
    torch.manual_seed(1)
    tokenizer = TextTokenizer.train("char", [LETTERS], 20)
    size = len(tokenizer)
    config = {"src_vocab_size": size, "tgt_vocab_size": size, "embedding_dim": 16, "hidden_size": 32} | options
    model = fastseq.Seq2Seq(Seq2SeqConfig(**config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return TrainedModel(model, tokenizer, tokenizer, generation_config={"max_length_ratio": 3.0})


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "saved"
    make_model(**MODELS[request.param]).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "saved"
    make_model().save_pretrained(path)
    return path


def sources(folder, number=200):
    """Sources of 1 to 12 letters, as tensors that transformers and fastseq take."""
    draw = torch.Generator().manual_seed(5)
    words = [
        "".join(LETTERS[i] for i in torch.randint(10, (int(n),), generator=draw).tolist())
        for n in torch.randint(1, 13, (number,), generator=draw)
    ]
    return words, load_tokenizers(folder)[0](words, padding=True, return_tensors="pt")


def by_both(folder, options, ours=None, number=200):
    """The sequences of transformers and of fastseq, without bos, padded alike."""
    model, trained = AutoModelForSeq2SeqLM.from_pretrained(folder), TrainedModel.from_pretrained(folder)
    _, batch = sources(folder, number)
    found = []
    torch.manual_seed(7)
    found.append(model.generate(**batch, max_new_tokens=25, **options)[:, 1:])
    torch.manual_seed(7)
    lengths = batch["attention_mask"].sum(1)
    options = options if ours is None else ours
    found.append(trained.model.generate(batch["input_ids"], lengths, max_new_tokens=25, **options).sequences)
    width = max(sequences.shape[1] for sequences in found)
    return [padded(sequences, width) for sequences in found]


def padded(sequences, width):
    """Pad after eos: transformers fills beams up with eos where pad has the id 0."""
    ended = (sequences == 2).cumsum(1) - (sequences == 2).long() > 0
    return nn.functional.pad(sequences.masked_fill(ended, 0), (0, width - sequences.shape[1]))


def test_the_folder_is_read_as_it_is(folder):
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model) is FastseqForSeq2SeqLM and not model.training
    expected = TrainedModel.from_pretrained(folder).model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.config.to_seq2seq() == TrainedModel.from_pretrained(folder).model.config
    if model.config.share_all_embeddings:
        assert model.encoder.embedding.weight is model.decoder.embedding.weight is model.decoder.output.weight


def test_what_transformers_saves_fastseq_reads(folder, tmp_path):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    for name in ("source_tokenizer.json", "target_tokenizer.json"):
        shutil.copy(folder / name, tmp_path)
    trained = TrainedModel.from_pretrained(tmp_path)
    assert trained.generation_config["num_beams"] == 3 and trained.generation_config["max_length_ratio"] == 3.0
    expected = TrainedModel.from_pretrained(folder)
    words, _ = sources(folder, 20)
    assert trained(words, num_beams=2) == expected(words, num_beams=2)
    assert json.loads((tmp_path / "config.json").read_text())["card"] == expected.card.to_dict()
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_greedy_decoding_gives_the_same_tokens(folder):
    theirs, ours = by_both(folder, {})
    assert torch.equal(theirs, ours)
    assert len({tuple(row) for row in ours.tolist()}) > 25


@pytest.mark.parametrize("options", BEAMS.values(), ids=BEAMS)
def test_beam_search_gives_the_same_tokens(plain_folder, options):
    theirs, ours = by_both(plain_folder, options)
    assert torch.equal(theirs, ours)


def test_beam_search_of_each_model(folder):
    theirs, ours = by_both(folder, {"num_beams": 3})
    assert torch.equal(theirs, ours)


def test_sampling_gives_the_same_tokens_with_the_same_seed(plain_folder):
    """Both draw from all tokens of all rows where fastseq gets transformers' processors in place of its options."""
    sampled = {"do_sample": True, "top_k": 0}
    theirs, ours = by_both(plain_folder, sampled, {"do_sample": True, "logits_processor": LogitsProcessorList()})
    assert torch.equal(theirs, ours)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7), TopKLogitsWarper(4), TopPLogitsWarper(0.9)])
    options = {"do_sample": True, "temperature": 0.7, "top_k": 4, "top_p": 0.9, "num_return_sequences": 2}
    processed = {"do_sample": True, "num_return_sequences": 2, "logits_processor": warpers}
    assert torch.equal(*by_both(plain_folder, options, processed))
    assert torch.equal(*by_both(plain_folder, sampled, {"do_sample": True}, number=1))  # a single sentence


@pytest.mark.parametrize("num_beams", [1, 4])
def test_processors_give_the_same_tokens(plain_folder, num_beams):
    options = {"num_beams": num_beams, "no_repeat_ngram_size": 2}
    ours = options | {"logits_processor": RepetitionPenaltyLogitsProcessor(1.5)}
    assert torch.equal(*by_both(plain_folder, options | {"repetition_penalty": 1.5}, ours))


def test_prefixes_and_generation_without_cache(plain_folder):
    model, trained = AutoModelForSeq2SeqLM.from_pretrained(plain_folder), TrainedModel.from_pretrained(plain_folder)
    _, batch = sources(plain_folder, 20)
    start = torch.tensor([[1, 5, 6]]).expand(20, 3)
    theirs = model.generate(**batch, decoder_input_ids=start, max_new_tokens=9)[:, 1:]
    lengths = batch["attention_mask"].sum(1)
    ours = trained.model.generate(batch["input_ids"], lengths, prefix_tokens=start[:, 1:], max_new_tokens=9).sequences
    assert torch.equal(padded(theirs, 11), padded(ours, 11))
    for options in ({}, {"num_beams": 3}):
        cached, plain = (model.generate(**batch, max_new_tokens=9, use_cache=use, **options) for use in (True, False))
        assert torch.equal(cached, plain)


def test_attentions_are_returned(plain_folder):
    model, trained = AutoModelForSeq2SeqLM.from_pretrained(plain_folder), TrainedModel.from_pretrained(plain_folder)
    _, batch = sources(plain_folder, 5)
    theirs = model.generate(**batch, max_new_tokens=6, output_attentions=True, return_dict_in_generate=True)
    options = {"max_new_tokens": 6, "output_attentions": True}
    ours = trained.model.generate(batch["input_ids"], batch["attention_mask"].sum(1), **options)
    for step, (weights,) in enumerate(theirs.cross_attentions):
        alive = ours.lengths > step
        torch.testing.assert_close(weights[alive, 0, 0], ours.cross_attentions[alive, step])


@pytest.mark.parametrize("masked", [-100, 0])
def test_loss_and_logits_are_those_of_the_model(folder, masked):
    model, trained = AutoModelForSeq2SeqLM.from_pretrained(folder), TrainedModel.from_pretrained(folder)
    _, batch = sources(folder, 20)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, masked)
    shifted = torch.cat([torch.ones(20, 1, dtype=torch.int64), batch["input_ids"][:, :-1]], 1)
    lengths = batch["attention_mask"].sum(1)
    expected = trained.model(batch["input_ids"], lengths, shifted).logits
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.logits, expected)
    loss = trained.model.loss(batch["input_ids"], lengths, shifted, batch["input_ids"])
    torch.testing.assert_close(output.loss, loss)
    assert model(**batch, labels=labels, return_dict=False)[0] == output.loss
    for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        dropout.p = 0.0
    training = model.train()(**batch, labels=labels)
    assert training.logits is None and model.seq2seq.training
    training.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    if not model.config.dropout:
        torch.testing.assert_close(training.loss, loss)


def test_features_in_place_of_tokens(tmp_path):
    torch.manual_seed(1)
    model = FastseqForSeq2SeqLM(FastseqConfig(source_features=5, tgt_vocab_size=14, embedding_dim=16, hidden_size=32))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    features, lengths = torch.randn(30, 9, 5), torch.randint(1, 10, (30,))
    mask = (torch.arange(9) < lengths[:, None]).long()
    for options in ({}, {"num_beams": 3}):
        theirs = model.generate(input_features=features, attention_mask=mask, max_new_tokens=12, **options)[:, 1:]
        ours = model.seq2seq.generate(features, lengths, max_new_tokens=12, **options).sequences
        width = max(theirs.shape[1], ours.shape[1])
        assert torch.equal(padded(theirs, width), padded(ours, width))
    labels = torch.randint(4, 14, (30, 6))
    batch = {"input_features": features, "attention_mask": mask, "labels": labels}
    expected = model.seq2seq.loss(features, lengths, nn.functional.pad(labels[:, :-1], (1, 0), value=1), labels)
    torch.testing.assert_close(model(**batch).loss, expected)
    model.train()(**batch).loss.backward()
    assert model.encoder.lstm.weight_ih_l0.grad is not None


def test_the_tokenizers(plain_folder):
    source, target = load_tokenizers(plain_folder)
    batch = source(["abc", "a"], padding=True, return_tensors="pt")
    trained = TrainedModel.from_pretrained(plain_folder)
    ids = trained.source_tokenizer.encode(["abc", "a"])
    assert batch["input_ids"].tolist() == [[*ids[0], 2], [*ids[1], 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert target.decode([1, *ids[0], 2, 0, 0], skip_special_tokens=True) == "abc"
    assert (target.pad_token_id, target.bos_token_id, target.eos_token_id, target.unk_token_id) == (0, 1, 2, 3)


def test_tokenizers_of_ports(plain_folder, tmp_path):
    """A port may have been trained without eos after a source, or on sources padded to one length."""
    plain = TextTokenizer.load(plain_folder / "target_tokenizer.json")
    for options, expected in ((dict(closed=False), [4, 5]), (dict(padding=(3, "b")), None)):
        source = TextTokenizer.of_words("char", ["a", "b"], **options)
        source.save(tmp_path / "source_tokenizer.json")
        plain.save(tmp_path / "target_tokenizer.json")
        if expected is None:
            with pytest.raises(UserError, match="reads sources padded to one length"):
                load_tokenizers(tmp_path)
        else:
            assert load_tokenizers(tmp_path)[0]("ab")["input_ids"] == expected


def test_the_trainer_trains_for_an_epoch(plain_folder, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it; it comes with the extra hf")
    options = {"src_vocab_size": 14, "tgt_vocab_size": 14, "embedding_dim": 16, "hidden_size": 32, "dropout": 0.0}
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(FastseqConfig(**options))
    source, _ = load_tokenizers(plain_folder)
    words, _ = sources(plain_folder, 300)
    examples = [{"input_ids": source(w)["input_ids"], "labels": source(w[::-1])["input_ids"]} for w in words]
    arguments = TrainingArguments(
        tmp_path / "out",
        num_train_epochs=1,
        per_device_train_batch_size=20,
        learning_rate=0.02,
        logging_steps=1,
        eval_strategy="epoch",
        report_to="none",
        use_cpu=True,
    )
    collator = DataCollatorForSeq2Seq(source, model)
    trainer = Trainer(model, arguments, collator, train_dataset=examples, eval_dataset=examples[:40])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    history = trainer.state.log_history
    assert history[-2]["eval_loss"] < 0.9 * before
    trainer.save_model(tmp_path / "saved")
    for name in ("source_tokenizer.json", "target_tokenizer.json"):
        shutil.copy(plain_folder / name, tmp_path / "saved")
    trained = TrainedModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(t, trained.model.state_dict()[n]) for n, t in model.state_dict().items())


def test_transformers_has_no_pipeline_for_text_to_text(plain_folder):
    """docs/transformers.md says so, and what to call in its place; once there is one, serve it."""
    for task in ("text2text-generation", "translation", "summarization"):
        with pytest.raises(KeyError, match="has been removed"):
            pipeline(task, str(plain_folder))
    assert len(TrainedModel.from_pretrained(plain_folder)(["abc", "fed"], num_beams=2, max_new_tokens=5)) == 2


def test_configurations(tmp_path):
    config = FastseqConfig(src_vocab_size=9, tgt_vocab_size=11, hidden_size=8, pad_token_id=3, unk_id=0)
    assert (config.pad_id, config.vocab_size, config.decoder_start_token_id) == (3, 11, 1)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is FastseqConfig and again.to_seq2seq() == config.to_seq2seq()
    assert FastseqConfig().to_seq2seq().tgt_vocab_size == 8000
    with pytest.raises(ValueError, match="hidden_size must be even"):
        FastseqConfig(src_vocab_size=9, tgt_vocab_size=11, hidden_size=7)


def test_bad_calls_get_a_sentence(plain_folder):
    model = AutoModelForSeq2SeqLM.from_pretrained(plain_folder)
    _, batch = sources(plain_folder, 3)
    with pytest.raises(ValueError, match="attention_mask has 0 before 1; pad the sources on the right"):
        model.generate(batch["input_ids"].flip(1), attention_mask=batch["attention_mask"].flip(1), max_new_tokens=3)
    with pytest.raises(ValueError, match="give labels or decoder_input_ids"):
        model(**batch)
    with pytest.raises(ValueError, match="has no hidden states"):
        model(**batch, labels=batch["input_ids"], output_hidden_states=True)
    with pytest.raises(NotImplementedError, match="cannot resize"):
        model.resize_token_embeddings(99)


def test_without_transformers_there_is_a_sentence():
    code = "import sys, fastseq; assert 'transformers' not in sys.modules; sys.modules['transformers'] = None"
    result = subprocess.run([sys.executable, "-c", f"{code}; import fastseq.hf"], capture_output=True, text=True)
    assert 'fastseq.hf needs the package transformers; bring it with: pip install "fastseq[hf]"' in result.stderr
