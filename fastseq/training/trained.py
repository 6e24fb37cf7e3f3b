"""A trained model as one object: weights, tokenizers, and the options of its search."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastseq.errors import UserError
from fastseq.seq2seq.ensemble import Ensemble
from fastseq.seq2seq.model import Seq2Seq
from fastseq.training.copying import CopyTokenizer
from fastseq.training.data import Sequences, encode_prefixes, encode_targets
from fastseq.training.decode import Hypothesis, decode
from fastseq.training.explanation import STEPS, Explanation, explain
from fastseq.training.features import Source, encode_sources, sizes
from fastseq.training.generation_config import check_search
from fastseq.training.model_card import Card, measured
from fastseq.training.noise import KINDS
from fastseq.training.robustness import FLIPS, RATES, Robustness, measure
from fastseq.training.saved import Loaded, SavedFolder, load_folder
from fastseq.training.scoring import PairScore, log_probabilities
from fastseq.training.tokenizer import TextTokenizer
from fastseq.training.unknown import check_replacement, replace_unknown


class TrainedModel:
    """A :class:`fastseq.Seq2Seq` with its tokenizers: text or features in, text out.

    Calling it gives the best prediction of each source. Needs the extra ``train``.

    Args:
        model: the weights, put into eval mode.
        source_tokenizer: for the sources; its size is the model's ``src_vocab_size``. For a model on features, the
            reader of these.
        target_tokenizer: for the targets; its size is the model's ``tgt_vocab_size``.
        generation_config: options of :meth:`fastseq.Seq2Seq.generate` that hold where a call does not say otherwise.
        card: training data, metrics and licence, for the model card.

    Raises:
        UserError: tokenizers of other sizes than the model's vocabularies, or an unknown search option.
    """

    def __init__(
        self,
        model: Seq2Seq | Ensemble,
        source_tokenizer: Source,
        target_tokenizer: TextTokenizer,
        *,
        generation_config: dict[str, Any] | None = None,
        card: Card | None = None,
    ) -> None:
        config, found = model.config, sizes((source_tokenizer, target_tokenizer))
        expected = config.src_vocab_size or config.source_features, config.tgt_vocab_size, config.tag_vocab_size
        if found != expected:
            raise UserError(
                f"the tokenizers have {found[0]} and {found[1]} tokens and {found[2] or 'no'} tags, the model "
                f"{expected[0]}, {expected[1]} and {expected[2] or 'no'}; give the ones that it was trained with"
            )
        if config.copy:
            source_tokenizer = CopyTokenizer.of(source_tokenizer, target_tokenizer)
        self.model = model.eval()
        self.source_tokenizer, self.target_tokenizer = source_tokenizer, target_tokenizer
        self.generation_config = check_search(dict(generation_config or {}), "generation_config")
        self.card = card or Card()
        self._evaluation: Path | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | Path | Sequence[str | Path], *, checkpoint: str | None = None, device: str = "cpu"
    ) -> TrainedModel:
        """Read a run folder of `fastseq train`, or a folder of :meth:`save_pretrained`; nothing is downloaded.

        Several folders make an ensemble: each token is chosen by the mean of the log-probabilities of all models.
        Search options and card are the ones of the first.

        No code in the folder runs, and sizes are checked before memory is allocated. Where a safetensors file lies in
        the folder, no checkpoint is read.

        Args:
            path: the folder, or several.
            checkpoint: "best" or "last" of a run folder; None for best.
            device: "cpu", "cuda", or "auto": cuda where there is one.

        Raises:
            UserError: no such folder, a damaged or hostile file, files that do not fit each other, or an ensemble of
                other vocabularies.
        """
        paths = [path] if isinstance(path, str | Path) else list(path)
        loaded = load_folder(paths[0], checkpoint, device)
        if len(paths) > 1:
            loaded = loaded._replace(model=_ensemble(paths, loaded, checkpoint, device))
        trained = cls(loaded.model, *loaded.tokenizers, generation_config=loaded.search, card=loaded.card)
        trained._evaluation = loaded.evaluation
        return trained

    def save_pretrained(
        self,
        path: str | Path,
        *,
        license: str | None = None,
        data: str | None = None,
        metrics: dict | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write a folder to share: safetensors and JSON, nothing that runs.

        model.safetensors, config.json, source_tokenizer.json, target_tokenizer.json, generation_config.json, and
        README.md as the model card.

        Args:
            path: the folder, made if missing; files of those names in it are replaced.
            license: licence of the weights, best as an SPDX identifier; default: the card's.
            data: the training data; default: the card's, which names the training file of a run.
            metrics: measured values by name; default: the card's; of a run, the ones of its last `fastseq evaluate`.
            dtype: of the weights in the file, such as torch.bfloat16, which halves it; default: the model's own.
                Reading gives float32 whatever the file holds, so that only the rounding stays.

        Raises:
            UserError: the folder holds a run, or is a link; this is an ensemble; a dtype that is not floating-point.
        """
        if isinstance(self.model, Ensemble):
            raise UserError("an ensemble is several models; save each of them, or average the weights of one run")
        facts = {"license": license, "data": data, "metrics": metrics}
        if metrics is None and self._evaluation is not None:
            facts["metrics"] = measured(self._evaluation)
        card = self.card.to_dict() | {name: value for name, value in facts.items() if value is not None}
        tokenizers = self.source_tokenizer, self.target_tokenizer
        SavedFolder(path).save(
            self.model, tokenizers, self.generation_config, Card.from_dict(card, "the model card"), dtype
        )

    def __call__(self, sources: Sequence[str], **options: Any) -> list[str]:
        """The best prediction of each source; ``options`` as in :meth:`predict`."""
        return [best.text for best, *_ in self.predict(sources, **options)]

    def predict(
        self,
        sources: Sequence[str],
        *,
        n_best: int | None = None,
        attention: bool = False,
        token_scores: bool = False,
        prefixes: Sequence[str] | None = None,
        replace_unk: bool | Mapping[str, str] = False,
        max_tokens: int = 4096,
        progress: bool = False,
        **search: Any,
    ) -> list[list[Hypothesis]]:
        """The ``n_best`` predictions of each source, best first (in sampling: as drawn).

        Args:
            sources: texts, any number; they are sorted and batched here. A tokenizer's unknown token is read as unk. A
                model on features takes arrays (S, F), or names of files as in a manifest; one with tags takes texts
                "source<TAB>tags".
            n_best: predictions of each source; default: ``num_return_sequences`` of ``generation_config``, or 1. A
                beam search is widened to it.
            attention: attention weights (T, S) of each prediction, and with them ``alignment``.
            token_scores: log-probability of each token.
            prefixes: a text with which the predictions of each source begin; "" for none.
            replace_unk: put the source token with the most attention in place of each predicted unknown token, or its
                value in this mapping, if it is there. Needs a model with attention that reads text.
            max_tokens: source tokens of a batch, padding included, times beams.
            progress: show a bar.
            search: options of :meth:`fastseq.Seq2Seq.generate`, over the ones of ``generation_config``.

        Raises:
            UserError: search options out of range or that exclude each other.
            TypeError: one text in place of a list; an unknown option.
        """
        options = self.search(search, n_best=n_best) | {"max_tokens": max_tokens, "progress": progress}
        if token_scores:
            options["output_scores"] = True
        replace = replace_unk is not False
        if replace:
            check_replacement(self.model.config.attention, self.source_tokenizer)
        tokens = self._encode(sources)
        if prefixes is not None:
            given = _one_for_each(prefixes, sources)
            options["prefix_tokens"] = encode_prefixes(self._tokenizers, tokens, given)
        found = decode(self.model, tokens, self.target_tokenizer, attention=attention or replace, **options)
        if not replace:
            return found
        found = replace_unknown(found, sources, self._tokenizers, {} if replace_unk is True else replace_unk)
        return found if attention else [[best._replace(attention=None) for best in several] for several in found]

    def search(self, given: dict[str, Any], *, n_best: int | None) -> dict[str, Any]:
        """The options of :func:`fastseq.training.decode.decode`: ``given`` over ``generation_config``."""
        options = self.generation_config | given
        default = options.pop("num_return_sequences", 1)
        options["n_best"] = default if n_best is None else n_best
        if "num_beams" not in given and not options.get("do_sample"):
            beams = options.get("num_beams", 1)
            options["num_beams"] = max(beams, options["n_best"]) if beams >= 1 else beams  # generate refuses 0
        return options

    def score(self, pairs: Sequence[tuple[str, str]], *, max_tokens: int = 4096, warn: bool = False) -> list[PairScore]:
        """Log-probability and perplexity of each (source, target) pair under the model, eos included.

        Args:
            pairs: texts. Target tokens outside the vocabulary are scored as unk. A source of a model on features is an
                array (S, F), or the name of a file.
            max_tokens: tokens of a batch, padding included, counted on the longer side.
            warn: print to standard error how many tokens are unknown.
        """
        sources, note = encode_sources(
            self.source_tokenizer, list(enumerate((s for s, _ in pairs), start=1)), "sources"
        )
        targets, other = encode_targets(self._tokenizers, sources, [target for _, target in pairs], "targets")
        for sentence in filter(None, (note, other)):
            if warn:
                print(sentence, file=sys.stderr)
        return [PairScore(row) for row in log_probabilities(self.model, sources, targets, max_tokens)]

    def explain(
        self,
        sources: Sequence[str],
        targets: Sequence[str] | None = None,
        *,
        steps: int = STEPS,
        max_tokens: int = 4096,
        **search: Any,
    ) -> list[Explanation]:
        """The source positions that each target token rests on: attention, gradient x input, integrated gradients.

        Args:
            sources: texts; arrays (S, F) or names of files for a model on features.
            targets: a text for each source; default: the best prediction.
            steps: points of the integral of integrated gradients (Sundararajan et al. 2017).
            max_tokens: tokens of a batch, padding included, counted on the longer side, times ``steps``.
            search: options of the prediction, as in :meth:`predict`.

        Raises:
            UserError: an ensemble; ``steps`` below 1; another number of targets than sources; search options beside
                ``targets``.
            TypeError: one text in place of a list.
        """
        tokens = self._encode(sources)
        if targets is None:
            found = decode(self.model, tokens, self.target_tokenizer, **self.search(search, n_best=1))
            labels = Sequences(best.ids for (best,) in found)
        elif search:
            raise UserError(f"{', '.join(search)} decide a prediction; with targets there is none, leave them out")
        else:
            texts = _one_for_each(targets, sources, "targets")
            labels, _ = encode_targets(self._tokenizers, tokens, texts, "targets")
        return explain(self.model, tokens, labels, self._tokenizers, steps=steps, max_tokens=max_tokens)

    def robustness(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        kinds: Sequence[str] = KINDS,
        rates: Sequence[float] = RATES,
        flips: int = FLIPS,
        seed: int = 0,
        max_tokens: int = 4096,
        **search: Any,
    ) -> Robustness:
        """The error rates under noise on the characters, and under swaps of source tokens.

        Targets stay the ones of the clean sources, also where the noise makes another word.

        Args:
            pairs: (source, target) texts; equal sources have several right targets.
            kinds: of noise: see :func:`fastseq.training.noise.noisy` (Belinkov and Bisk 2018).
            rates: probabilities of a change, each above 0, up to 1.
            flips: most tokens of a source that are replaced: by the gradient of the loss of its first target (HotFlip,
                Ebrahimi et al. 2018), and at random for comparison; 0 for none.
            seed: of the random numbers.
            max_tokens: source tokens of a batch, padding included.
            search: options of the prediction, as in :meth:`predict`.

        Raises:
            UserError: a model on features; no pair; an unknown kind; a rate or number out of range; flips of an
                ensemble, or of a model that copies.
        """
        options = {"kinds": kinds, "rates": rates, "flips": flips, "seed": seed, "max_tokens": max_tokens}
        return measure(self, pairs, **options, **search)

    @property
    def _tokenizers(self) -> tuple[Source, TextTokenizer]:
        return self.source_tokenizer, self.target_tokenizer

    def _encode(self, sources: Sequence[str]) -> Sequences:
        if isinstance(sources, str):
            raise TypeError(f"expected a list of texts, got one text; write [{sources[:40]!r}]")
        return encode_sources(self.source_tokenizer, list(enumerate(sources, start=1)), "sources")[0]


def _ensemble(paths: Sequence[str | Path], first: Loaded, checkpoint: str | None, device: str) -> Ensemble:
    """The models of all folders; raises UserError for one whose vocabularies are not the ones of the first."""
    models = [first.model]
    for path in paths[1:]:
        loaded = load_folder(path, checkpoint, device)
        for side, one, other in zip(("source", "target"), first.tokenizers, loaded.tokenizers, strict=True):
            if one != other:
                raise UserError(
                    f"{path} and {paths[0]} have different {side} vocabularies, so that their predictions cannot be "
                    "averaged; give runs on the same data, or train the second with --init_from"
                )
        models.append(loaded.model)
    try:
        return Ensemble(models)
    except ValueError as error:
        raise UserError(str(error)) from error


def _one_for_each(texts: Sequence[str], sources: Sequence[Any], name: str = "prefixes") -> list[str]:
    if isinstance(texts, str) or len(texts) != len(sources):
        given = "one text" if isinstance(texts, str) else f"{len(texts)}"
        raise UserError(f"expected a list of {len(sources)} {name}, one for each source, got {given}")
    return list(texts)
