"""`fastseq data digits DIR`: pictures of strings of handwritten digits, to be read from left to right.

The digits are the 1,797 images of 8 x 8 pixels that scikit-learn ships (BSD 3-clause licence), from the test set of
"Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998, UCI Machine Learning Repository, CC BY 4.0). Only
the file `sklearn/datasets/data/digits.csv.gz` is opened; the package is not imported.

Each image belongs to one of the three files, so that a test string shows no image that training saw: of each ten
successive images eight are for training, one for validation, one for the test. A string has 1 to 8 digits. Each is
drawn on a canvas of 12 rows, moved up or down by at most 2 rows, behind a gap of 0 to 2 columns, its ink scaled by 0.8
to 1.2. In training strings it is also slanted, turned, stretched and moved a little.

train.npy, valid.npy, test.npy hold all columns (columns, 12) in float16, feature 0 being the bottom row; the manifests
train.tsv, valid.tsv, test.tsv name the columns of each string: `train.npy#0:37<TAB>4 0 9`.
"""

from __future__ import annotations

import gzip
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.errors import SuggestingParser, UserError

HEIGHT = 12  # rows of the canvas
LONGEST = 8  # digits of a string
SIZES = {"train": 30_000, "valid": 1_000, "test": 2_000}  # strings


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 8, 8) with ink from 0 to 1, and the digit (1797,) of each; raises UserError without the package."""
    try:
        package = metadata.distribution("scikit-learn")
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "the package scikit-learn, which holds the digits, is missing; bring it with: pip install scikit-learn"
        ) from error
    path = Path(str(package.locate_file("sklearn/datasets/data/digits.csv.gz")))
    if not path.is_file():
        raise UserError(f"scikit-learn {package.version} has no data file {path}; another release may have it")
    with gzip.open(path) as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :-1].unflatten(1, (8, 8)) / 16, table[:, -1].long()


def part_of(number: int) -> str:
    """The file for which the image with this number is used."""
    return {0: "test", 1: "valid"}.get(number % 10, "train")


def strings(images: Tensor, digits: Tensor, n: int, *, bend: bool, seed: int) -> tuple[list[Tensor], list[str]]:
    """`n` strings of these images (M, 8, 8): the columns (S, HEIGHT) of each, and its digits between spaces."""
    random = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, LONGEST + 1, (n,), generator=random)
    chosen = torch.randint(len(images), (int(sizes.sum()),), generator=random)
    cells = drawn(images[chosen], bend, random)  # (sum of sizes, HEIGHT, 8)
    gaps = torch.randint(0, 3, (len(chosen),), generator=random).tolist()
    columns, texts, start = [], [], 0
    for size in sizes.tolist():
        parts = [F.pad(cells[i], (gaps[i], 0)) for i in range(start, start + size)]
        columns.append(F.pad(torch.cat(parts, 1), (0, 1)).flip(0).T)
        texts.append(" ".join(str(d) for d in digits[chosen[start : start + size]].tolist()))
        start += size
    return columns, texts


def drawn(images: Tensor, bend: bool, random: torch.Generator) -> Tensor:
    """Images (M, 8, 8) on canvases (M, HEIGHT, 8), moved up or down and inked anew; with `bend` also deformed."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=random)

    height = HEIGHT / 8
    theta = torch.zeros(len(images), 2, 3)  # output position to input position, both from -1 to 1
    theta[:, 0, 0], theta[:, 1, 1] = 1.0, height
    theta[:, 1, 2] = uniform(-0.5, 0.5)  # 2 of 8 rows
    if bend:
        theta[:, 0, 0] *= uniform(0.85, 1.15)
        theta[:, 1, 1] *= uniform(0.85, 1.15)
        theta[:, 0, 1] = uniform(-0.3, 0.3) * height
        theta[:, 1, 0] = uniform(-0.15, 0.15)
        theta[:, 0, 2] = uniform(-0.15, 0.15)
    grid = F.affine_grid(theta, [len(images), 1, HEIGHT, 8], align_corners=False)
    cells = F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]
    if bend:  # thinner and thicker strokes, and noise
        cells = cells.clamp(min=0) ** uniform(0.6, 1.6)[:, None, None]
        cells += 0.05 * torch.randn(cells.shape, generator=random)
    return (cells * uniform(0.8, 1.2)[:, None, None]).clamp(0, 1)


def write_strings(directory: Path) -> dict[str, tuple[int, int]]:
    """Write the three files into `directory`, made if missing; return strings and columns of each."""
    images, digits = read_digits()
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for seed, (name, n) in enumerate(SIZES.items()):
        mine = torch.tensor([i for i in range(len(images)) if part_of(i) == name])
        columns, texts = strings(images[mine], digits[mine], n, bend=name == "train", seed=seed)
        np.save(directory / f"{name}.npy", torch.cat(columns).half().numpy())
        stops = torch.tensor([len(part) for part in columns]).cumsum(0).tolist()
        rows = zip([0, *stops], stops, texts, strict=False)
        lines = [f"{name}.npy#{start}:{stop}\t{text}\n" for start, stop, text in rows]
        (directory / f"{name}.tsv").write_text("".join(lines))
        sizes[name] = (n, stops[-1])
    return sizes


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data digits`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data digits",
        description="Write manifests (train.tsv, valid.tsv, test.tsv) and arrays (npy) of strings of handwritten "
        "digits: the columns of a picture, a tab, its digits.",
        epilog="The digits are read from the package scikit-learn (pip install scikit-learn); nothing is downloaded.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    directory = parser.parse_args(argv).directory
    for name, (n, columns) in write_strings(directory).items():
        print(f"{directory / name}.tsv: {n:,} strings, {columns:,} columns")
