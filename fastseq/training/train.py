"""`fastseq train`: reads the options, then trains."""

from __future__ import annotations

import sys

from fastseq.training.options import parse_train


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq train`; `argv` without the command's own name."""
    argv = sys.argv[1:] if argv is None else argv
    config = parse_train(argv)
    if config.init_from is not None and config.resume is None:
        from fastseq.training.init_from import inherited

        config = inherited(config, argv)
    from fastseq.training.fit import fit  # Lightning takes seconds to import

    fit(config, resume=config.resume is not None)
