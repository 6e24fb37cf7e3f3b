"""`fastseq train`: reads the options, then trains."""

from __future__ import annotations

import sys

from fastseq.training.options import parse_train


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq train`; `argv` without the command's own name."""
    config = parse_train(sys.argv[1:] if argv is None else argv)
    from fastseq.training.fit import fit  # Lightning takes seconds to import

    fit(config, resume=config.resume is not None)
