"""Compile the Triton kernels that gpu_check.py times for a machine with another Python, into a folder to bring there.

    python benchmarks/triton_cache.py build/triton-cache --chip sm_90 --python 3.12 --packages build/triton-other

Triton files a kernel under a hash of its own sources, of libtriton.so, which differs for each Python, of the kernel,
its arguments and options, of the version of its ptxas and of some environment variables. `make gpu-bundle` therefore
brings the other Python's Triton, of the same version; compilation runs with this Python's.
"""

import argparse
import filecmp
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's fastseq, installed or not

from build_support.compile import jobs_at_once
from fastseq import warmup
from fastseq.bench.cases import HIDDEN_SIZES
from fastseq.ops.common.triton.runtime import CHIPS

SIZES = tuple(itertools.product(HIDDEN_SIZES, ("bf16", "fp32", "fp16")))
FACTS = "cache.json"


def key_with(packages: Path) -> str:
    """The part of Triton's keys that identifies Triton, for the copy in ``packages``, of another Python.

    Raises:
        SystemExit: the copies differ in more than their compiled libraries.
    """
    import triton
    from triton.runtime.cache import triton_key

    own, other = Path(triton.__file__).parent, packages / "triton"
    ours, theirs = ({p.relative_to(folder) for p in _identifying(folder)} for folder in (own, other))
    _, differing, missing = filecmp.cmpfiles(own, other, ours | theirs, shallow=False)
    if differing or missing:
        raise SystemExit(
            f"triton_cache: {other} is not Triton {triton.__version__}: {(differing + missing)[0]} differs"
        )
    library, other_library = (
        hashlib.sha256((folder / "_C/libtriton.so").read_bytes()).hexdigest() for folder in (own, other)
    )
    key = triton_key()
    if key.count(library) != 1:
        raise SystemExit(f"triton_cache: Triton {triton.__version__} does not identify itself by libtriton.so")
    return key.replace(library, other_library)


def _identifying(triton: Path) -> list[Path]:
    """Python sources and programs (ptxas) of a copy of Triton."""
    return [*triton.rglob("*.py"), *(p for p in triton.glob("backends/*/bin/*") if p.is_file())]


def make(folder: Path, chip: str, python: str, packages: Path | None, sizes: tuple[tuple[int, str], ...]) -> None:
    """Compile all sizes into ``folder``, a process for each core. packages: with the Triton of another Python."""
    key = None if packages is None else key_with(packages)
    os.environ |= {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs_at_once(), mp_context=context, initializer=_identify_as, initargs=(key,)) as pool:
        for future in [pool.submit(warmup.main, _options(*size, chip)) for size in sizes]:
            future.result()
    facts = {"triton": importlib.metadata.version("triton"), "python": python, "chip": chip}
    (folder / FACTS).write_text(json.dumps(facts) + "\n")


def _identify_as(key: str | None) -> None:
    """Let this process file kernels under the keys of another copy of Triton."""
    from triton.runtime import cache

    if key is not None:
        cache.triton_key = lambda: key


def _options(H: int, dtype: str, chip: str) -> list[str]:
    return ["--hidden-size", str(H), "--dtype", dtype, "--chip", chip]


def bring(folder: Path) -> str:
    """Let this process and its children use a brought cache if it fits -> a sentence."""
    if not (folder / FACTS).exists():
        return "no Triton cache was brought"
    if "TRITON_CACHE_DIR" in os.environ:
        return "the brought Triton cache is not used: TRITON_CACHE_DIR is set"
    facts = json.loads((folder / FACTS).read_text())
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the brought Triton cache is not used: triton is not installed"
    made = f"Triton {facts['triton']} and Python {facts['python']}"
    here = f"Triton {version} and Python {python_version()}"
    if made != here:
        return f"the brought Triton cache is not used: it is for {made}, this is {here}"
    relocate(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    return f"Triton cache brought for {made}, {facts['chip']}"


def relocate(folder: Path) -> None:
    """Write the new place of a moved cache into it: Triton keeps absolute paths, and compiles anew where they fail."""
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.parent.resolve() / name) for name in names}}))


def python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--chip", choices=CHIPS, default="sm_90")
    parser.add_argument("--python", default=python_version(), help="of the other machine (default: %(default)s)")
    parser.add_argument("--packages", type=Path, help="folder with its Triton; needed if its Python differs from this")
    args = parser.parse_args(argv)
    if args.packages is None and args.python != python_version():
        parser.error(f"Python {args.python} is not this one ({python_version()}): name its Triton with --packages")
    make(args.folder, args.chip, args.python, args.packages, SIZES)


if __name__ == "__main__":
    main()
