"""Plant each bug of tests/mutations in a copy of the tree and require that the named tests fail: ``make mutate``.

A mutation is a unified diff in tests/mutations/<area>/<name>.patch below a header of ``key: text`` lines:

    breaks: gates i and f swapped in the reference LSTM
    tests: tests/ops/test_lstm.py -k matches_torch
    --- a/fastseq/ops/lstm/reference.py
    ...

``breaks`` describes the bug. Each ``tests`` line holds pytest arguments, after optional NAME=VALUE pairs for the
environment, and must fail. ``ends: hang`` or ``ends: crash`` is for bugs that end the process before it can report a
failure. Bugs of C++ are compiled for AVX2; ``needs: avx512_vnni`` compiles one for AVX-512, and leaves it out, by name,
on a processor without that flag of /proc/cpuinfo. One line of context per hunk is enough; line numbers may drift, and
hunk sizes are recounted.

tests/mutations/test_patches.py checks in every run of the suite that all patches apply.

Results: killed (the tests failed), SURVIVED (they passed), broken (the patch does not apply, the copy does not
compile, no test ran, or the tests fail without the bug as well). Exit code 1 unless all were killed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import queue
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from slot import LIMIT, Broken, Slot

HANG = 60  # seconds after which a test run counts as hung, for patches with ``ends: hang``


class Mutation(NamedTuple):
    """One planted bug. name: area/name; compiled: the instruction set that ``fastseq._C`` is built for, "" for none."""

    name: str
    patch: Path
    breaks: str
    tests: tuple[str, ...]
    ends: str
    needs: str  # a flag of the processor, or ""
    files: tuple[str, ...]
    compiled: str


def read(patch: Path, root: Path) -> Mutation:
    header, _, diff = patch.read_text().partition("--- a/")
    fields: dict[str, list[str]] = {"breaks": [], "tests": [], "ends": [], "needs": []}
    for line in filter(None, header.splitlines()):
        key, _, text = line.partition(": ")
        if key not in fields or not text:
            expected = ", ".join(f"'{name}: ...'" for name in fields)
            raise SystemExit(f"{patch}: expected {expected}, got {line!r}")
        fields[key].append(text)
    files = tuple(re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE))
    ends = fields["ends"] or ["fail"]
    if len(fields["breaks"]) != 1 or not fields["tests"] or not files or ends not in (["fail"], ["hang"], ["crash"]):
        raise SystemExit(f"{patch}: needs one 'breaks', some 'tests', at most one 'ends' (hang or crash), and a diff")
    if len(fields["needs"]) > 1:
        raise SystemExit(f"{patch}: needs at most one 'needs', a flag of the processor")
    needs = "".join(fields["needs"])
    compiled = any(name.startswith("csrc/") and not name.startswith("csrc/cuda/") for name in files)
    isa = ("avx512" if needs else "avx2") if compiled else ""
    name = str(patch.relative_to(root / "tests/mutations").with_suffix(""))
    return Mutation(name, patch, fields["breaks"][0], tuple(fields["tests"]), ends[0], needs, files, isa)


class Runner:
    """Executes mutations in slots, each after its tests have passed once without the bug."""

    def __init__(self, root: Path, jobs: int):
        self.root, self.jobs = root, jobs
        self.files = tracked(root)
        self.hash = digest(root, self.files)
        self.cache = root / "build/mutate/passed.json"  # pytest arguments -> hash of the last tree they passed in
        self.passed = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        self.reasons: dict[str, str] = {}  # pytest arguments -> why they prove nothing, or ""
        self.locks: dict[str, threading.Lock] = {}
        self.printing = threading.Lock()
        self.plain: queue.SimpleQueue[Slot] = queue.SimpleQueue()

    def run(self, mutations: list[Mutation]) -> dict[str, list[str]]:
        """-> names by result. Mutations that compile share one slot; the others run beside them."""
        self.results: dict[str, list[str]] = {"killed": [], "SURVIVED": [], "broken": []}
        self.total = len(mutations)
        plain = [m for m in mutations if not m.compiled]
        compiled = [m for m in mutations if m.compiled]
        for number in range(min(self.jobs, len(plain))):
            self.plain.put(self.prepared(f"plain-{number}"))
        with ThreadPoolExecutor(self.jobs) as pool:
            jobs = [pool.submit(self.compile_and_run, compiled)] if compiled else []
            jobs += [pool.submit(self.run_plain, m) for m in plain]
            for job in jobs:
                job.result()
        return self.results

    def prepared(self, name: str, compiled: str = "") -> Slot:
        slot = Slot(self.root, name, compiled)
        slot.prepare(self.files)
        return slot

    def compile_and_run(self, mutations: list[Mutation]) -> None:
        for isa in sorted({m.compiled for m in mutations}):
            self.run_compiled(isa, [m for m in mutations if m.compiled == isa])

    def run_compiled(self, isa: str, mutations: list[Mutation]) -> None:
        try:
            slot = self.prepared(f"compiled-{isa}", isa)
        except Broken as error:
            for mutation in mutations:
                self.report(mutation, "broken", f"without the bug: {error}", 0.0)
            return
        for selection in sorted({selection for m in mutations for selection in m.tests}):
            with contextlib.suppress(Broken):  # kept in self.reasons, and counted per mutation
                self.check_baseline(selection, slot)
        for mutation in mutations:
            self.execute(mutation, slot)

    def run_plain(self, mutation: Mutation) -> None:
        slot = self.plain.get()
        try:
            self.execute(mutation, slot)
        finally:
            self.plain.put(slot)

    def execute(self, mutation: Mutation, slot: Slot) -> None:
        start = time.monotonic()
        try:
            result, reason = self.judge(mutation, slot)
        except Broken as error:
            result, reason = "broken", str(error)
        finally:
            for name in mutation.files:
                slot.restore(name)
        self.report(mutation, result, reason, time.monotonic() - start)

    def report(self, mutation: Mutation, result: str, reason: str, seconds: float) -> None:
        with self.printing:
            self.results[result].append(mutation.name)
            count = sum(map(len, self.results.values()))
            print(f"[{count:3}/{self.total}] {result:8} {mutation.name:44} {seconds:6.1f} s", flush=True)
            if reason:
                print("    " + reason.replace("\n", "\n    "), flush=True)

    def judge(self, mutation: Mutation, slot: Slot) -> tuple[str, str]:
        for selection in mutation.tests:
            self.check_baseline(selection, slot)
        slot.plant(mutation.patch, mutation.files)
        if slot.compiled:
            slot.build()
        for selection in mutation.tests:
            ending = slot.test(selection, HANG if mutation.ends == "hang" else LIMIT)
            if ending == "pass":
                return "SURVIVED", f"pytest {selection} passes. Planted: {mutation.breaks}"
            if ending != mutation.ends:
                raise Broken(f"pytest {selection} ends in a {ending}, expected a {mutation.ends}")
        return "killed", ""

    def check_baseline(self, selection: str, slot: Slot) -> None:
        """Raise Broken unless these tests pass in a slot without a bug. They run once per state of the tree."""
        key = f"{slot.compiled} {selection}" if slot.compiled else selection
        with self.locks.setdefault(key, threading.Lock()):
            if key not in self.reasons:
                self.reasons[key] = "" if self.passed.get(key) == self.hash else self.run_baseline(selection, slot)
            if self.reasons[key]:
                raise Broken(self.reasons[key])
            with self.printing:
                self.passed[key] = self.hash
                self.cache.write_text(json.dumps(self.passed, indent=1))

    def run_baseline(self, selection: str, slot: Slot) -> str:
        try:
            ending = slot.test(selection)
        except Broken as error:
            return f"without the bug: {error}"
        return "" if ending == "pass" else f"without the bug, pytest {selection} ends in a {ending}, too"


def tracked(root: Path) -> list[str]:
    """Files of the working tree that git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in names if name and (root / name).is_file()})


def digest(root: Path, files: list[str]) -> str:
    """A hash of all files but the patches."""
    total = hashlib.sha256()
    for name in files:
        if not name.endswith(".patch"):
            total.update(f"{name}\0".encode() + (root / name).read_bytes() + b"\0")
    return total.hexdigest()


@contextlib.contextmanager
def alone(folder: Path):
    """Hold the lock of the folder; a second run at the same time would plant into the same copies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another run uses {folder}; wait for its end") from None
        yield


def served(mutations: list[Mutation]) -> list[Mutation]:
    """The mutations whose tests this processor can run; prints the names of the others."""
    processor = Path("/proc/cpuinfo")
    flags = set(processor.read_text().split()) if processor.exists() else set()
    for mutation in mutations:
        if mutation.needs and mutation.needs not in flags:
            print(f"left out: {mutation.name} needs a processor with {mutation.needs}", flush=True)
    return [m for m in mutations if not m.needs or m.needs in flags]


def choose(mutations: list[Mutation], options: argparse.Namespace, root: Path) -> list[Mutation]:
    chosen = [m for m in mutations if fnmatch(m.name, options.only)]
    if options.sample is None or options.sample >= len(chosen):
        return chosen
    seed = options.seed or subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()
    print(f"{options.sample} of {len(chosen)} mutations, drawn by {seed}", flush=True)
    return sorted(random.Random(seed).sample(chosen, options.sample))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n  run.py --list\n  run.py --only 'triton/*'\n  run.py --sample 10 --jobs 2",
    )
    parser.add_argument("--only", default="*", metavar="GLOB", help="mutations whose area/name matches (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="run N of them, drawn by --seed")
    parser.add_argument("--seed", metavar="HASH", help="any text (default: the commit, git rev-parse HEAD)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="mutations at once (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the mutations and their tests, run nothing")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the tree (default: this one)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    root = options.root.resolve()
    mutations = sorted(read(patch, root) for patch in (root / "tests/mutations").glob("*/*.patch"))
    chosen = choose(mutations, options, root)
    if not chosen:
        raise SystemExit(f"no mutation in {root / 'tests/mutations'} matches {options.only!r}; see --list")
    if options.list:
        for mutation in chosen:
            print(f"{mutation.name}: {mutation.breaks}", *mutation.tests, sep="\n    ")
        return 0
    chosen = served(chosen)
    with alone(root / "build/mutate"):
        results = Runner(root, options.jobs).run(chosen)
    print(", ".join(f"{len(names)} {result}" for result, names in results.items()))
    for result in ("SURVIVED", "broken"):
        for name in sorted(results[result]):
            print(f"{result}: {name}")
    return int(len(results["killed"]) < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
