"""`fastseq data spoken DIR`: recordings of spoken digits, synthesised by espeak-ng.

espeak-ng (GPL-3.0) is called as a program; nothing of it is part of fastseq. Each recording holds 1 to 8 digits in one
of three accents, at 120 to 220 words a minute, with a pitch of 30 to 70 of 100, at a random loudness, in white noise 15
to 40 dB below it. The speakers of the three parts differ: the test's were never trained on.

train/, valid/ and test/ hold FLAC files; the manifests train.tsv, valid.tsv and test.tsv name them and the words:
`train/0007.flac<TAB>three zero nine`. The program's version decides the sound; with another one results differ.
"""

from __future__ import annotations

import io
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastseq.errors import SuggestingParser, UserError
from fastseq.training.reading import missing_package

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LONGEST = 8  # digits of a recording
ACCENTS = ("en-us", "en-gb", "en-gb-scotland")
SPEAKERS = {  # espeak-ng's variants of a voice
    "train": ("m1", "m2", "m4", "m5", "m7", "f1", "f3", "f4"),
    "valid": ("m6", "f5"),
    "test": ("m3", "f2"),
}
SIZES = {"train": 3000, "valid": 200, "test": 400}  # recordings


class Recording(NamedTuple):
    """The text and the voice of one recording."""

    words: list[str]
    voice: str  # of espeak-ng
    speed: int  # words a minute
    pitch: int  # 0 to 99
    loudness: float  # of the loudest sample
    noise: float  # standard deviation, relative to the speech's
    seed: int  # of the noise

    @classmethod
    def drawn(cls, random: np.random.Generator, speakers: tuple[str, ...]) -> Recording:
        """A random one by one of these speakers."""
        words = [WORDS[i] for i in random.integers(len(WORDS), size=random.integers(1, LONGEST + 1))]
        voice = f"{random.choice(ACCENTS)}+{random.choice(speakers)}"
        speed, pitch = int(random.integers(120, 221)), int(random.integers(30, 71))
        decibels = random.uniform(15, 40)
        return cls(
            words, voice, speed, pitch, random.uniform(0.1, 0.9), 10 ** (-decibels / 20), int(random.integers(1 << 31))
        )

    def write(self, program: str, path: Path) -> None:
        """Synthesise it into a FLAC file; raises UserError if the program fails."""
        import soundfile

        command = [
            program,
            "-v",
            self.voice,
            "-s",
            str(self.speed),
            "-p",
            str(self.pitch),
            "--stdout",
            " ".join(self.words),
        ]
        run = subprocess.run(command, capture_output=True)
        if run.returncode or not run.stdout:
            reason = run.stderr.decode(errors="replace").strip()[:200] or f"exit code {run.returncode}"
            raise UserError(f"espeak-ng cannot speak as {self.voice}: {reason}")
        samples, rate = soundfile.read(io.BytesIO(run.stdout), dtype="float32")
        noise = np.random.default_rng(self.seed).normal(scale=self.noise * samples.std(), size=len(samples))
        noisy = samples + noise
        soundfile.write(path, noisy * (self.loudness / np.abs(noisy).max()), rate)


def write_recordings(directory: Path, sizes: dict[str, int]) -> None:
    """Write recordings and manifests into `directory`, made if missing; raises UserError without espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise UserError(
            "the program espeak-ng, which speaks the digits, is missing; on Debian: apt-get install espeak-ng"
        )
    try:
        import soundfile  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_package("soundfile", directory) from error
    for seed, (name, size) in enumerate(sizes.items()):
        random = np.random.default_rng(seed)
        (directory / name).mkdir(parents=True, exist_ok=True)
        recordings = [Recording.drawn(random, SPEAKERS[name]) for _ in range(size)]
        files = [f"{name}/{number:04d}.flac" for number in range(size)]
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(
                lambda pair: pair[0].write(program, directory / pair[1]), zip(recordings, files, strict=True)
            ):
                pass
        lines = [f"{file}\t{' '.join(one.words)}\n" for file, one in zip(files, recordings, strict=True)]
        (directory / f"{name}.tsv").write_text("".join(lines))
        print(
            f"{directory / name}.tsv: {size:,} recordings by {len(SPEAKERS[name])} speakers in {len(ACCENTS)} accents"
        )


def main(argv: list[str] | None = None) -> None:
    """Command line of `fastseq data spoken`; `argv` without the command's own name."""
    parser = SuggestingParser(
        prog="fastseq data spoken",
        description="Write recordings (FLAC) of spoken digits and their manifests: train.tsv, valid.tsv, test.tsv.",
        epilog="The program espeak-ng speaks them (apt-get install espeak-ng); nothing is downloaded.",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="folder to write to; made if missing")
    write_recordings(parser.parse_args(argv).directory, SIZES)
