"""Sizes that fill no whole vector: the kernels read and write nothing past the last element of a tensor."""

import subprocess
import sys

import pytest

from fastseq import _native

pytestmark = pytest.mark.skipif(
    not _native.available() or not sys.platform.startswith("linux"), reason="native kernels and mprotect"
)

# Every tensor of a call ends where a page begins that must not be touched. Runs in a process of its own, which such an
# access ends by SIGSEGV.
SCRIPT = """
import ctypes, mmap
import torch
import fastseq
from fastseq.nn.linear import Linear

PAGE, held = mmap.PAGESIZE, []
mprotect = ctypes.CDLL(None, use_errno=True).mprotect

def guarded(t):
    pages = -(-t.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert mprotect(ctypes.c_void_p(start + pages * PAGE), PAGE, 0) == 0
    held.append(memory)
    out = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages * PAGE - t.nbytes).view(t.shape)
    return out.copy_(t.detach())

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for size, batch in ((1, 1), (3, 5), (15, 33), (17, 1), (17, 3), (33, 5), (100, 2), (100, 33)):
        module = fastseq.LSTM(size, size, dtype=dtype, backend="native")
        for parameter in module.parameters():
            parameter.data = guarded(parameter)
        x = guarded(torch.randn(2, batch, size, dtype=dtype)).requires_grad_()
        hx = tuple(guarded(torch.randn(1, batch, size, dtype=dtype)) for _ in range(2))
        with torch.no_grad():
            module(x, hx)
        module(x, hx)[0].sum().backward()
        gates, weight_hh = (guarded(torch.randn(*s, 4 * size, dtype=dtype)) for s in ((2, batch), (size,)))
        masks = [guarded(torch.rand(2, batch, size) < 0.5) for _ in range(2)]
        norms = tuple(guarded(torch.ones(n * size, dtype=dtype)) for n in (4, 1, 1))
        hidden_mask = guarded(torch.ones(batch, size, dtype=torch.promote_types(dtype, torch.float32)))
        for options in ({}, {"norms": norms}):
            options |= {"hidden_mask": hidden_mask, "zoneout_hidden": masks[0], "zoneout_cell": masks[1]}
            states = tuple(state[0] for state in hx)
            call = gates.requires_grad_(), states, weight_hh.view(4 * size, size)
            fastseq.ops.lstm_variant(*call, **options, backend="native")[0].sum().backward()
        with torch.no_grad():
            fastseq.ops.attention(x.detach().transpose(0, 1), x.detach().transpose(0, 1), backend="native")
        given = [guarded(torch.randn(shape, dtype=dtype)).requires_grad_() for shape in (
            (2, size), (2, 3, size), (2, 3, size), (size,), (2, 3), (size,)
        )]
        options = dict(zip(("weight", "coverage", "coverage_weight"), given[3:]), score="additive", backend="native")
        fastseq.ops.attention(*given[:3], **options)[0].sum().backward()
        with torch.no_grad():
            if dtype == torch.float32:
                narrow = Linear(size, size)
                narrow.weight.data, narrow.bias.data = guarded(narrow.weight), guarded(narrow.bias)
                narrow.weight_dtype = torch.int8
                narrow(hx[0][0])
"""


def test_nothing_past_the_last_element_is_touched():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-2000:] or f"ended by signal {-run.returncode}"
