"""Load a run of `fastseq train` and decode lines from Python, with scores: `python examples/decode.py RUN < lines`."""

import argparse
import sys
from collections.abc import Iterator

import torch

from fastseq.training.data import encode
from fastseq.training.decode import Hypothesis, decode
from fastseq.training.folder import RunFolder


class Translator:
    """The model and the tokenizers of a run folder.

    Args:
        run: the folder that `fastseq train --run_dir` wrote.
        device: "cpu", "cuda" or "auto".
    """

    def __init__(self, run: str, device: str = "auto") -> None:
        folder = RunFolder(run)
        self.model = folder.load_model("best", device)  # in eval mode
        self.source_tokenizer, self.target_tokenizer = folder.load_tokenizers()

    @torch.inference_mode()
    def __call__(self, lines: list[str], num_beams: int = 5, n_best: int = 1) -> list[list[Hypothesis]]:
        """The best hypotheses of each line, best first; all lines are decoded in batches of similar length."""
        sources, note = encode(self.source_tokenizer, lines, "the input")
        if note:
            print(note, file=sys.stderr)  # characters outside the vocabulary become <unk>
        return decode(self.model, sources, self.target_tokenizer, num_beams=num_beams, n_best=n_best)


def numbered(results: list[list[Hypothesis]]) -> Iterator[str]:
    """A line of output for each hypothesis: number of the input line, log-probability per token, text."""
    for number, hypotheses in enumerate(results, start=1):
        for hypothesis in hypotheses:
            yield f"{number}\t{hypothesis.score:.3f}\t{hypothesis.text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder, for example runs/cmudict after `make demo`")
    parser.add_argument("--num-beams", type=int, default=5, help="beam size (default: %(default)s)")
    parser.add_argument("--n-best", type=int, default=1, help="hypotheses for each line (default: %(default)s)")
    args = parser.parse_args()
    lines = [line for line in sys.stdin.read().splitlines() if line.strip()]
    print(*numbered(Translator(args.run)(lines, args.num_beams, args.n_best)), sep="\n")


if __name__ == "__main__":
    main()
