"""Compiles many files at once, names each as it starts, and skips those whose command and headers did not change."""

import itertools
import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple


class Job(NamedTuple):
    source: str
    out: str  # object file
    command: list[str]  # without -o, -MMD, -MF, which gcc, clang and nvcc have in common
    keyed: bool = False  # the name of the object identifies its contents: it is never out of date


class Failed(Exception):
    def __init__(self, job: Job, output: str):
        super().__init__(f"{job.source} does not compile")
        self.job, self.output = job, output


def jobs_at_once() -> int:
    """MAX_JOBS, else one for each processor that this process may use."""
    value = os.environ.get("MAX_JOBS", "").strip()
    if value and not (value.isdigit() and int(value)):
        raise SystemExit(f"fastseq: MAX_JOBS must be a positive integer, got {value!r}.")
    if value:
        return int(value)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def compile_all(jobs: list[Job], report: Callable[[str], None], folder: Path) -> None:
    """Run the jobs that are out of date, in the given order, in ``folder``. report: called with lines of progress."""
    stale = [job for job in jobs if not is_current(job, folder)]
    begin, at_once, number, lock = time.perf_counter(), jobs_at_once(), itertools.count(1), threading.Lock()

    def say(text: str) -> None:
        with lock:  # warnings have many lines
            report(text)

    def work(job: Job) -> None:
        say(f"[{next(number)}/{len(stale)}] {job.source}")
        run(job, say, folder)

    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(work, job) for job in stale]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
        for future in done:
            future.result()
    if stale:
        report(f"compiled {len(stale)} files in {time.perf_counter() - begin:.0f} s, {at_once} at once")


def run(job: Job, report: Callable[[str], None], folder: Path) -> None:
    """Compile to a temporary name: an object that exists is whole."""
    out = folder / job.out
    out.parent.mkdir(parents=True, exist_ok=True)
    beside(out, ".command").unlink(missing_ok=True)
    partial = f"{job.out}.{os.getpid()}.o"
    command = [*job.command, "-o", partial, "-MMD", "-MF", f"{job.out}.d"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    if done.returncode:
        raise Failed(job, f"{shlex.join(command)}\n{done.stdout}")
    if done.stdout.strip():  # warnings
        report(f"{job.source}:\n{done.stdout.strip()}")
    (folder / partial).rename(out)
    beside(out, ".command").write_text(shlex.join(job.command))


def is_current(job: Job, folder: Path) -> bool:
    """True if the object was made by this command and is newer than every file it was made of."""
    out = folder / job.out
    if job.keyed:
        return out.exists()
    made, command = beside(out, ".d"), beside(out, ".command")
    if not (out.exists() and made.exists() and command.exists()) or command.read_text() != shlex.join(job.command):
        return False
    files = [folder / name for name in dependencies(made.read_text())]
    return all(path.exists() and path.stat().st_mtime < out.stat().st_mtime for path in files)


def beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def dependencies(text: str) -> list[str]:
    r"""The files after the colon of a make rule: "a.o: a.cpp \\\n my\ dir/a.h" -> ["a.cpp", "my dir/a.h"]."""
    _, _, names = text.replace("\\\n", " ").partition(": ")
    return [name.replace("\0", " ") for name in names.replace("\\ ", "\0").split()]


def files_of(source: Path, folders: Iterable[Path]) -> set[Path]:
    """Return ``source`` and the files that it includes, transitively.

    Resolves ``#include "name"`` beside the including file and below ``folders``, in both branches of an #if.
    """
    folders, known, new = tuple(folders), set(), [source.resolve()]
    while new:
        path = new.pop()
        if path in known:
            continue
        known.add(path)
        for name in re.findall(r'^\s*#include "(.*)"', path.read_text(), re.MULTILINE):
            candidates = ((folder / name).resolve() for folder in (path.parent, *folders))
            new += [p for p in candidates if p.exists()][:1]
    return known
