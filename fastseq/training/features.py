"""Sources of continuous features: arrays, audio and pictures, as a manifest names them."""

from __future__ import annotations

import json
import math
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from fastseq.errors import UserError
from fastseq.training.data import Sequences, encode
from fastseq.training.files import read_text, write_text
from fastseq.training.mel import log_mel
from fastseq.training.reading import missing_package
from fastseq.training.tagged import Tagged, text_side
from fastseq.training.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from fastseq.training.folder import RunFolder
    from fastseq.training.saved import SavedFolder

ARRAYS = (".npy", ".npz", ".safetensors")
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".aiff")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".tif", ".tiff", ".webp")
OPEN_FILES = 64  # arrays and archives kept open while a manifest is read
LARGEST_SIZE = 1_000_000  # features of a frame
MAX_BYTES = 128 << 20  # of source_features.json


class Frames(Sequences):
    """Sequences of frames, each of F numbers, in one flat tensor."""

    def __init__(self, rows: Sequence[Tensor], size: int) -> None:
        """`rows`: tensors (S, F) float32, where F is `size`."""
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)  # (N,)
        self._starts = self.lengths.cumsum(0) - self.lengths  # (N,)
        self._flat = torch.cat([torch.zeros(0, size), *rows])  # (sum of lengths, F)

    @property
    def flat(self) -> Tensor:
        """All frames (sum of lengths, F) of the file that was read."""
        return self._flat

    def padded(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The sequences `rows` (B,) as frames (B, longest, F) filled up with zeros, and their lengths (B,)."""
        index, outside, lengths = self._gather(rows)
        return self._flat[index].masked_fill_(outside[..., None], 0.0), lengths

    def filler(self) -> Tensor:
        """One frame (1, 1, F) of zeros, for a process that has no example in an update."""
        return self._flat.new_zeros(1, 1, self._flat.size(1))


class Features:
    """Reads the source column of a manifest, and normalises each feature by mean and deviation of the training data.

    A source names a file, relative to the folder of the manifest:

    array.npy            (S, F), one sequence
    array.npy#7          (N, S, F), the sequence with that index
    array.npy#100:160    (S, F), the frames from 100 up to 160
    archive.npz#name, archive.safetensors#name    an array (S, F) of the archive
    speech.wav           a log-mel spectrogram with F bands, a frame every 10 ms; also flac, ogg, mp3, aiff
    line.png             a picture in grey, scaled to height F: its columns from left to right, white is 1, feature 0 is
                         the bottom row of pixels; also jpg, bmp, gif, pgm, tif, webp
    """

    kind = "features"

    def __init__(self, size: int, highest_frequency: float, mean: Tensor | None = None, std: Tensor | None = None):
        """`size` is F. `mean` and `std` (F,) float32 normalise; None leaves the features as they are in the files."""
        self.size, self.highest_frequency, self.mean, self.std = size, highest_frequency, mean, std

    def __len__(self) -> int:
        return self.size

    def __eq__(self, other: object) -> bool:
        """True if both read every file as the same numbers."""
        if not isinstance(other, Features) or (self.mean is None) != (other.mean is None):
            return False
        alike = (self.size, self.highest_frequency) == (other.size, other.highest_frequency)
        return alike and (self.mean is None or (self.mean.equal(other.mean) and self.std.equal(other.std)))

    def __hash__(self) -> int:
        return hash((self.size, self.highest_frequency))

    def fit(self, parts: Sequence[Frames]) -> Self:
        """Take mean and deviation from frames that are not normalised yet. A constant feature keeps its scale."""
        flats = [chunk for part in parts for chunk in part.flat.split(1 << 16)]
        count = sum(len(flat) for flat in flats)
        mean = sum(flat.double().sum(0) for flat in flats) / count
        std = (sum((flat - mean).square().sum(0) for flat in flats) / count).sqrt()
        self.mean, self.std = mean.float(), torch.where(std > 1e-6 * mean.abs(), std, 1.0).float()
        return self

    def normalise(self, frames: Frames) -> Frames:
        """The frames, normalised in place."""
        frames.flat.sub_(self.mean).div_(self.std)
        return frames

    def read(
        self, sources: Sequence[str | Tensor | np.ndarray], manifest: str | Path, numbers: Iterable[int] | None = None
    ) -> Frames:
        """The sequences that `sources` name, normalised if mean and deviation are known.

        Args:
            sources: source column of the manifest; an array (S, F) in its place is a sequence itself.
            manifest: the manifest, for the folder of relative paths and for messages; "-" for standard input.
            numbers: line number of each source, default 1, 2, ...

        Raises:
            UserError: naming the line, for a file that is missing or damaged, an array of another shape or type, or a
                value that is not finite.
        """
        folder, files = Path(manifest).parent, _Files(self)
        rows = []
        for number, source in zip(numbers or range(1, len(sources) + 1), sources, strict=True):
            try:
                named = isinstance(source, str)
                rows.append(files.frames(folder, source) if named else checked(source, self.size, "the array"))
            except UserError as error:
                raise UserError(f"{manifest}, line {number}: {error}") from error
        frames = Frames(rows, self.size)
        return frames if self.mean is None else self.normalise(frames)

    def save(self, path: Path) -> None:
        """Write size, highest frequency, mean and deviation as JSON."""
        stored = {"size": self.size, "highest_frequency": self.highest_frequency}
        write_text(path, json.dumps(stored | {"mean": self.mean.tolist(), "std": self.std.tolist()}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file written by `save`; raises UserError for a missing or damaged one."""
        try:
            stored = json.loads(read_text(path, MAX_BYTES))
            size, highest = stored["size"], stored["highest_frequency"]
            mean, std = (torch.tensor(stored[name], dtype=torch.float32) for name in ("mean", "std"))
            if type(size) is not int or not mean.shape == std.shape == (size,):
                raise ValueError("mean and std do not have the length that size says")
            if not bool(mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
                raise ValueError("a mean is not finite, or a deviation not positive")
            if type(highest) not in (int, float) or not 0 < highest < math.inf:
                raise ValueError("highest_frequency is not positive")
        except (OSError, UserError):
            raise
        except (ValueError, TypeError, KeyError, RecursionError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{path} was not written by `fastseq train`: {reason}") from error
        return cls(size, float(highest), mean, std)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Frames have no names."""
        raise UserError("features are no tokens; read the source with Features.read")


Source = TextTokenizer | Tagged | Features  # what turns the source side into numbers


def load_source(folder: RunFolder | SavedFolder) -> Source:
    """The source side of a folder: its features, or its tokenizers; raises UserError for a missing or damaged file."""
    if folder.source_features.exists():
        return Features.load(folder.source_features)
    text = TextTokenizer.load(folder.source_tokenizer)
    return Tagged(text, TextTokenizer.load(folder.source_tags)) if folder.source_tags.exists() else text


def save_source(source: Source, folder: RunFolder | SavedFolder) -> None:
    """Write the source side into a folder, in place of one of another kind."""
    files = {folder.source_features: source} if isinstance(source, Features) else {}
    if not files:
        files[folder.source_tokenizer] = text_side(source)
    if isinstance(source, Tagged):
        files[folder.source_tags] = source.tags
    for file, content in files.items():
        content.save(file)
    for file in {folder.source_tokenizer, folder.source_tags, folder.source_features} - files.keys():
        file.unlink(missing_ok=True)


def sizes(tokenizers: tuple[Source, TextTokenizer]) -> tuple[int, int, int | None]:
    """Source tokens or features, target tokens, and tags, None without any: what a model is built for."""
    source, target = tokenizers
    return len(source), len(target), len(source.tags) if isinstance(source, Tagged) else None


def encode_sources(
    source: Source, lines: Sequence[tuple[int, str]], file: str, name: str | None = None
) -> tuple[Sequences, str | None]:
    """The numbered lines of `file` as sequences, and a sentence about unknown tokens (None if there are none).

    Of a line of a manifest, all after a tab is ignored. The sentence begins with `name`, default `file`.
    """
    if isinstance(source, Features):
        names = [line.partition("\t")[0] if isinstance(line, str) else line for _, line in lines]
        return source.read(names, file, [number for number, _ in lines]), None
    if isinstance(source, Tagged):
        return source.encode([line for _, line in lines], file, [number for number, _ in lines])
    return encode(source, [line for _, line in lines], name or file)


class _Files:
    """Reads sources for `features`; keeps arrays and archives open from one source to the next."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def frames(self, folder: Path, source: str) -> Tensor:
        """The sequence (S, F) float32 of one source; raises UserError without its line."""
        file, part = split_part(source)
        path, suffix = folder / file, Path(file).suffix.lower()
        if suffix in ARRAYS:
            array = self._array(path, suffix, part, source)
        elif suffix in AUDIO:
            array = read_audio(path, self.features.size, self.features.highest_frequency)
        elif suffix in PICTURES:
            array = read_picture(path, self.features.size)
        else:
            known = " ".join((*ARRAYS, *AUDIO, *PICTURES))
            raise UserError(f"{source} has no ending of an array, recording or picture; known are {known}")
        return checked(array, self.features.size, source)

    def _array(self, path: Path, suffix: str, part: str | None, source: str) -> np.ndarray:
        opened = self._opened(path, suffix)
        if suffix == ".npy":
            return numpy_part(opened, part, source)
        names = list(opened.keys())
        if part not in names:
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise UserError(f"{source} names no array of the archive; it holds {listed}; write {path.name}#NAME")
        try:
            return opened[part] if suffix == ".npz" else opened.get_tensor(part)
        except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
            raise UserError(f"{source} is damaged ({str(error)[:100]})") from error

    def _opened(self, path: Path, suffix: str) -> Any:
        if path not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            self._open[path] = open_array(path, suffix)
        return self._open[path]


def split_part(source: str) -> tuple[str, str | None]:
    """The file and the part that `file#part` names; None for a source without one. A # in another name is no mark."""
    file, mark, part = source.rpartition("#")
    return (file, part) if mark and Path(file).suffix.lower() in ARRAYS else (source, None)


def open_array(path: Path, suffix: str) -> Any:
    """A memory-mapped array, or an archive whose arrays are read by name; raises UserError."""
    try:
        if suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                return safe_open(path, "pt")
            except SafetensorError as error:
                raise UserError(f"{path} is no safetensors archive ({str(error)[:100]})") from error
        opened = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(opened, np.ndarray) != (suffix == ".npy"):
            raise ValueError(f"it is of the kind {'.npy' if suffix == '.npz' else '.npz'}")
        return opened
    except ModuleNotFoundError as error:
        raise missing_package("safetensors", path) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no {suffix[1:]} file of numbers ({str(error)[:100]})") from error


def numpy_part(array: np.ndarray, part: str | None, source: str) -> np.ndarray:
    """The array, its row `part`, or its frames `start:stop`."""
    if part is None:
        return array
    start, colon, stop = part.partition(":")
    if not start.isdecimal() or (colon and not stop.isdecimal()):
        raise UserError(f"{source}: after # comes a row, such as #7, or frames, such as #100:160")
    rows = 2 if colon else 3
    if array.ndim != rows:
        shape = "(frames, features)" if colon else "(rows, frames, features)"
        raise UserError(f"{source} needs an array {shape}, the file holds one of shape {array.shape}")
    first, last = int(start), int(stop) if colon else int(start) + 1
    if not first < last <= len(array):
        raise UserError(f"{source} lies outside the array, which has {len(array):,} {'frames' if colon else 'rows'}")
    return array[first:last] if colon else array[first]


def read_audio(path: Path, bands: int, highest: float) -> Tensor:
    """The log-mel spectrogram (S, bands) of a recording, its channels averaged; raises UserError."""
    try:
        import soundfile
    except ModuleNotFoundError as error:
        raise missing_package("soundfile", path) from error
    if not path.is_file():
        raise UserError(f"{path} cannot be read (No such file or directory)")
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
    except (soundfile.SoundFileError, OSError) as error:
        raise UserError(f"{path} is no recording that libsndfile reads ({str(error)[-100:]})") from error
    if 2 * highest > rate:
        raise UserError(
            f"{path} has {rate:,} samples a second, so no frequency above {rate / 2:g} Hz; "
            f"lower --data.highest_frequency {highest:g}"
        )
    if len(samples) == 0:
        raise UserError(f"{path} holds no sound")
    if not np.isfinite(samples).all():
        raise UserError(f"{path} holds a sample that is not finite")
    return log_mel(torch.from_numpy(samples.mean(1)), rate, bands, highest)


def read_picture(path: Path, height: int) -> np.ndarray:
    """The columns (S, height) of a picture in grey, scaled to `height`; raises UserError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as error:
        raise missing_package("pillow", path) from error
    try:
        with Image.open(path) as picture:
            grey = picture.convert("L")
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is no picture") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or str(error)[:100]})") from error
    if grey.height != height:
        grey = grey.resize((max(1, round(grey.width * height / grey.height)), height))
    return np.asarray(grey, dtype=np.float32)[::-1].T / 255.0


def checked(array: np.ndarray | Tensor, size: int, source: str) -> Tensor:
    """The array as (S, size) float32 on new memory; raises UserError for another shape or type, or a NaN."""
    shape = tuple(array.shape)
    if len(shape) != 2 or shape[1] != size or shape[0] == 0:
        raise UserError(
            f"{source} has the shape {shape}, expected (frames, {size}) with at least one frame, as "
            f"--model.source_features {size} says"
        )
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise UserError(f"{source} holds {array.dtype}, expected numbers")
        with np.errstate(over="ignore"):  # infinity is refused below
            array = torch.from_numpy(array.astype(np.float32))
    elif array.is_complex():
        raise UserError(f"{source} holds {array.dtype}, expected numbers")
    frames = array.to(torch.float32, copy=True)
    if not bool(frames.isfinite().all()):
        step, feature = (int(i) for i in (~frames.isfinite()).nonzero()[0])
        value = f"{frames[step, feature]:g} at frame {step}, feature {feature}"
        raise UserError(f"{source} holds {value}; expected finite numbers")
    return frames
