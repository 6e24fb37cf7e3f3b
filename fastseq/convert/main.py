"""`fastseq convert`: a model of another library becomes a folder that `TrainedModel.from_pretrained` reads."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from fastseq.convert.port import Given, Port
from fastseq.convert.tables import SOURCES
from fastseq.errors import SuggestingParser, UserError
from fastseq.training.saved import is_saved

ROLES = ("pad", "bos", "eos", "unk")


def read(source: str, path: str | Path, given: Given | None = None) -> Port:
    """Read a model of the library ``source``; ``port.trained()`` is the :class:`fastseq.TrainedModel`.

    Args:
        source: "keras", "opennmt", "fairseq" or "joeynmt".
        path: the checkpoint.
        given: files and names that the checkpoint lacks.

    Raises:
        UserError: an unknown key, shape or option, or a part that fastseq lacks; each is named.
    """
    if source not in SOURCES:
        raise UserError(f"unknown source {source!r}; choose one of {', '.join(SOURCES)}")
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a checkpoint of {source}")
    return importlib.import_module(f"fastseq.convert.{source}").read(path, given or Given())


def main(argv: list[str]) -> None:
    """Command line of `fastseq convert`."""
    options = _parser().parse_args(argv)
    if is_saved(options.out) or (options.out / "config.yaml").exists():
        raise UserError(f"{options.out} holds a model already; choose another folder")
    reserved = {role: value for role in ROLES if (value := getattr(options, role)) is not None}
    pad_with = options.pad if options.pad_with is None else options.pad_with
    if options.pad_to is None and options.pad_with is not None:
        raise UserError("--pad-with has no effect without --pad-to")
    if options.pad_to is not None and pad_with is None:
        raise UserError("--pad-to needs the token that filled the sources up: --pad-with")
    padding = None if options.pad_to is None else (options.pad_to, pad_with)
    given = Given(options.source_vocab, options.target_vocab, options.config, reserved, options.tokenizer, padding)
    port = read(options.source, options.file, given)
    trained = port.trained()
    trained.save_pretrained(options.out, data=f"not stated; weights ported from {options.source}, {options.file.name}")
    config = trained.model.config
    print(
        f"wrote {options.out}: {config.parameter_count:,} parameters, {config.encoder_layers} encoder and "
        f"{config.decoder_layers} decoder layers of {config.hidden_size} units, attention {config.attention}, "
        f"vocabularies of {config.src_vocab_size} and {config.tgt_vocab_size}"
    )
    for note in port.parts.notes:
        print(f"note: {note}")


def _parser() -> argparse.ArgumentParser:
    parser = SuggestingParser(
        prog="fastseq convert",
        description="Make a model of another library a folder that fastseq reads. No code of the checkpoint runs.",
        epilog="example: fastseq convert --from keras s2s.keras models/s2s --source-vocab en.json "
        "--target-vocab fr.json --bos $'\\t' --eos $'\\n'",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    parser.add_argument("--from", dest="source", required=True, choices=SOURCES, help="the library that wrote FILE")
    parser.add_argument("--source-vocab", type=Path, help="source tokens by id: a token a line, or JSON (see the docs)")
    parser.add_argument("--target-vocab", type=Path, help="the same for the target")
    parser.add_argument("--config", type=Path, help="the model's options, where FILE does not hold them")
    parser.add_argument(
        "--tokenizer", choices=("char", "whitespace"), help="how text is cut into tokens; default: as the library does"
    )
    parser.add_argument(
        "--pad-to",
        type=int,
        metavar="N",
        help="the tokens to which sources were padded, for a model that reads padding",
    )
    parser.add_argument("--pad-with", metavar="TOKEN", help="the token that filled them up; default: --pad")
    for role in ROLES:
        parser.add_argument(f"--{role}", metavar="TOKEN", help=f"the token of the vocabularies that serves as {role}")
    return parser
