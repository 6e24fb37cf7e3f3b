"""A PTX interpreter: runs compiled kernels, inline assembly included, without a GPU.

It implements the instructions that occur in fastseq's kernels; any other raises an error that names it. It checks
bounds, alignment, barriers and the read-only cache. It does not model speed, weak memory order or bank conflicts.

    entry = find(parse(text), "lstm_cell_forward")
    memory = Memory()
    x = memory.put(numpy_array)
    launch(entry, memory, grid=(2,), block=(64,), args=[x, 3])
    memory.get(x)

    with running(capability=90) as log:     # operators of torch.ops.fastseq_ptx, launchers included (device.py)
        ...
"""

from .device import running
from .parse import Entry, PtxError, find, parse
from .run import Memory, launch

__all__ = ["Entry", "Memory", "PtxError", "find", "launch", "parse", "running"]
