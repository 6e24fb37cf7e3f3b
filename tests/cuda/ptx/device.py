"""The CUDA operators on the PTX interpreter: ``torch.ops.fastseq_ptx`` on CPU tensors.

The launchers that nvcc compiled call a substitute CUDA runtime (runtime.cpp), which calls this file to run the kernel.
An allocator (allocator.cpp) records addresses and sizes of tensors.

    with running(capability=90) as log:
        x = tensor.clone()                  # allocated inside: accessible to the kernels
        torch.ops.fastseq_ptx.lstm_cell_forward(x, ...)
    log                                     # names of the launched kernels
"""

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_build
import numpy as np
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from .memory import Buffer
from .parse import Entry, PtxError, parse
from .run import Memory, launch

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-w"]
STABLE = ["-DFASTSEQ_HOST_DEVICE", "-Dfastseq_sim=fastseq_ptx", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
ERROR_SIZE = 4096
_LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p,
)  # fmt: skip


@functools.cache
def load() -> ctypes.CDLL:
    """Build and load the library; return its C functions. Operators are in ``torch.ops.fastseq_ptx``."""
    library = build()
    torch.ops.load_library(str(library))
    return ctypes.CDLL(str(library))


def build() -> Path:
    """Compile operators, runtime and allocator, link them with nvcc's objects and return the library."""
    operators = sorted((cuda_build.ROOT / "csrc/cuda").glob("**/*.cpp"))
    sources = [*operators, HERE / "runtime.cpp", HERE / "allocator.cpp"]
    objects = cuda_build.objects()
    key = hashlib.sha256("".join([*map(str, objects), torch.__version__, *FLAGS, *STABLE]).encode())
    for path in sorted({path for source in sources for path in cuda_build.files_of(source, cuda_build.INCLUDES)}):
        key.update(path.read_bytes())
    out = cuda_build.FOLDER / f"ptx-{key.hexdigest()[:16]}.so"
    folders = (*cuda_build.INCLUDES, *include_paths(), cuda_build.cuda.find_toolkit().include)
    includes = [f"-I{folder}" for folder in folders]
    with cuda_build.building():
        if not out.exists():

            def compiled(source: Path) -> Path:
                part = out.with_suffix(f".{source.parent.name}-{source.stem}.o")
                flags = FLAGS + (STABLE if source.name != "allocator.cpp" else [])
                cuda_build.run("c++", *flags, *includes, "-c", source, "-o", part)
                return part

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                parts = list(pool.map(compiled, sources))
            libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
            partial = out.with_suffix(".partial")
            cuda_build.run("c++", "-shared", "-Wl,-Bsymbolic", *parts, *objects, *libraries, "-o", partial)
            partial.rename(out)
    return out


@functools.cache
def kernel(architecture: int, name: str, edit: Callable[[str], str] | None = None) -> Entry:
    """Parse the kernel of a mangled name. edit: changes its PTX, to plant bugs."""
    text = next(text for text in cuda_build.ptx(architecture) if f".entry {name}(" in text)
    return parse(edit(text) if edit else text, only=name)[name]


@contextlib.contextmanager
def running(
    capability: int = 90,
    multiprocessors: int = 4,
    seed: int = 0,
    edit: Callable[[str], str] | None = None,
) -> Iterator[list[str]]:
    """Set up a device and an allocator of its memory; yield the list of launched kernels.

    An error in a kernel becomes a RuntimeError of the operator, with the interpreter's message.
    """
    library, log = load(), []
    architecture = cuda_build.nearest_ptx(capability)

    def run(name, sizes, shared, cooperative, arguments, error) -> int:
        try:
            entry = kernel(architecture, name.decode(), edit)
            values = [ctypes.string_at(arguments[n], p.size) for n, p in enumerate(entry.params)]
            grid, block, cluster = (tuple(sizes[3 * n : 3 * n + 3]) for n in range(3))
            launch(
                entry, _tensors(library), grid, block, values,
                shared=shared, cooperative=bool(cooperative), cluster=cluster, seed=seed,
            )  # fmt: skip
            log.append(name.decode())
            return 0
        except Exception as failure:  # a callback from C++ cannot raise; the operator raises
            what = str(failure) if isinstance(failure, PtxError) else repr(failure)
            ctypes.memmove(error, what.encode()[: ERROR_SIZE - 1] + b"\0", min(len(what.encode()) + 1, ERROR_SIZE))
            return 1

    callback = _LAUNCHER(run)
    library.fastseq_ptx_device(callback, capability, multiprocessors)
    library.fastseq_ptx_watch(1)
    try:
        yield log
    finally:
        library.fastseq_ptx_watch(0)


def _tensors(library) -> Memory:
    """Return a Memory whose buffers are the allocated tensors."""
    count = library.fastseq_ptx_buffers(None, 0)
    pairs = (ctypes.c_size_t * (2 * count))()
    library.fastseq_ptx_buffers(pairs, count)
    memory = Memory()
    for address, size in zip(pairs[::2], pairs[1::2], strict=True):
        room = -(-size // 16) * 16
        if size:
            data = np.ctypeslib.as_array((ctypes.c_uint8 * room).from_address(address))
            memory.add(Buffer(address, data, size))
    return memory
