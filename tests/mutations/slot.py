"""A copy of the tree in build/mutate, in which a bug is planted, built and tested."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

LIMIT = 900  # seconds that a test run may take
COMPILE_ERROR = re.compile(r"\.(cpp|h|cu|cuh):\d+:\d+: (fatal )?error: |SyntaxError: ")
BUILD = {
    "FASTSEQ_NATIVE": "1",
    "FASTSEQ_CUDA": "0",
    "FASTSEQ_CXXFLAGS": "-O1",
}


class Broken(Exception):
    """A mutation that proves nothing, with the reason."""


class Slot:
    """One copy. ``compiled``: build its operator library for this instruction set; "": copy the library of the tree."""

    def __init__(self, root: Path, name: str, compiled: str = ""):
        self.root, self.tree, self.compiled = root, root / "build/mutate" / name, compiled

    def prepare(self, files: list[str]) -> None:
        """Make the copy equal to the tree. Unchanged files keep their times, so that builds stay incremental."""
        self.tree.mkdir(parents=True, exist_ok=True)
        for path in [p for p in self.tree.rglob("*") if p.is_file()]:
            name = path.relative_to(self.tree)
            if str(name) not in files and name.parts[0] != "build" and path.suffix != ".so":
                path.unlink()
        for name in files:
            if not same(self.root / name, self.tree / name):
                self.restore(name)
        if self.compiled:
            return self.build()
        for library in self.root.glob("fastseq/_C*.so"):
            shutil.copy2(library, self.tree / "fastseq" / library.name)
        shared = self.root / "build/emulator"  # objects, named by the hash of their sources
        if shared.exists():
            shutil.copytree(shared, self.tree / "build/emulator", copy_function=link, dirs_exist_ok=True)

    def restore(self, name: str) -> None:
        """Copy one file from the tree, with a new time stamp, so that an incremental build sees it."""
        (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / name, self.tree / name)

    def plant(self, patch: Path, files: tuple[str, ...]) -> None:
        command = ["git", "apply", "--recount", "--whitespace=nowarn", str(patch)]
        environment = os.environ | {
            "GIT_CEILING_DIRECTORIES": str(self.tree.parent)
        }  # else paths start at the outer tree
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Broken(f"{patch.relative_to(self.root)} does not apply:\n{done.stderr.strip()}")
        if all(same(self.root / name, self.tree / name) for name in files):
            raise Broken(f"{patch.relative_to(self.root)} changes nothing")

    def build(self) -> None:
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        environment = os.environ | BUILD | {"FASTSEQ_CPU_KERNELS": self.compiled}  # one set instead of four
        done = subprocess.run(command, cwd=self.tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Broken(f"the copy does not compile:\n{(done.stdout + done.stderr)[-3000:]}")

    def test(self, selection: str, limit: float = LIMIT) -> str:
        """Run pytest -> "pass", "fail", "hang" or "crash". selection: its arguments, after any NAME=VALUE."""
        report = self.tree / "build/report.xml"
        report.parent.mkdir(exist_ok=True)
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider"]
        words = shlex.split(selection)
        count = next(k for k, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
        command += [f"--junitxml={report}", *words[count:]]
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTSEQ_", "PYTEST", "TRITON_INTERPRET"))}
        environment = (
            kept
            | dict(word.split("=", 1) for word in words[:count])
            | {
                "PYTHONPATH": str(self.tree),
                "PYTHONDONTWRITEBYTECODE": "1",  # Python compares a .pyc by seconds and size: too coarse here
                "OMP_NUM_THREADS": "1",
            }
        )
        with (self.tree / "build/output.txt").open("w+") as file:
            process = subprocess.Popen(
                command, cwd=self.tree, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                return "hang"
            finally:
                with_children_killed(process)
            file.seek(0)
            output = file.read()[-3000:]
        if process.returncode < 0:
            return "crash"
        if process.returncode not in (0, 1) or not report.exists():
            raise Broken(f"pytest {selection} ended with {process.returncode}:\n{output}")
        return verdict(report, selection, output)


def with_children_killed(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # all have ended
    process.wait()


def verdict(report: Path, selection: str, output: str) -> str:
    """Read pytest's JUnit file: a failed test counts, an error of a fixture or of a compiler does not."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [f"{f.get('message')}\n{f.text}" for case in cases for f in case.iter("failure")]
    if any(COMPILE_ERROR.search(text) for text in failures) or any(case.find("error") is not None for case in cases):
        raise Broken(f"pytest {selection} stopped before the test itself:\n{output}")
    if not failures and all(case.find("skipped") is not None for case in cases):
        raise Broken(f"pytest {selection} ran no test:\n{output}")
    return "fail" if failures else "pass"


def same(a: Path, b: Path) -> bool:
    return a.exists() == b.exists() and (not a.exists() or a.read_bytes() == b.read_bytes())


def link(source: str, target: str) -> None:
    locks = Path(source).parent.name == "locks"  # of the builds in one copy
    if not locks and not Path(target).exists():
        os.link(source, target)
