"""Memory of the compiled CPU operators: results that torch can free, exhausted memory, forks."""

import os
import platform
import re
import shutil
import subprocess
import sys

import operator_calls as calls
import pytest
import torch

import fastseq
from fastseq import _native, ops

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
operators = torch.ops.fastseq

# Sizes for which every result but a vector has at least 64 KiB, from which on the pool serves. Second: the results that
# reach no user.
LARGE = {
    "lstm_forward": (calls.lstm_forward(2, 128, 128, 128), {"activations", "cell_states"}),
    "lstm_backward": (calls.lstm_backward(2, 128, 128, 128), set()),
    "lstm_cell_forward": (calls.lstm_cell_forward(128, 128), {"activations"}),
    "lstm_cell_backward": (calls.lstm_cell_backward(128, 128), set()),
    "lstm_step": (calls.lstm_step(128, 128, 128), set()),
    "attention_forward": (calls.attention_forward(2, 128, 128, 128, 128), set()),
    "attention_backward": (calls.attention_backward(2, 128, 128, 128, 128), set()),
    "decoder_step": (calls.decoder_step(128, 64, 128, 128, 128, 128, 128), set()),
    "decoder_forward": (calls.decoder_forward(2, 128, 64, 128, 128, 128), set()),
    "decoder_backward": (calls.decoder_backward(2, 128, 64, 128, 128, 128), set()),
    "decoder_pack": (calls.decoder_pack(128, 128), set()),
    "attention_prepare": (calls.attention_prepare(2, 128, 128), set()),
    "candidates": ((*calls.candidates(128, 2, 100)[:4], 100), set()),
}


def operator(name):
    return getattr(operators, name).default


def results_of(name, arguments):
    """Run the operator -> its tensors by name."""
    returned = operator(name)(*arguments)
    named = {}
    for i, result in enumerate(returned if isinstance(returned, tuple) else (returned,)):
        label = operator(name)._schema.returns[i].name or "result"
        named |= {f"{label}[{k}]": t for k, t in enumerate(result)} if isinstance(result, list) else {label: result}
    return named


@pytest.mark.parametrize("name", LARGE)
def test_results_can_be_resized_and_freed(name):
    arguments, saved = LARGE[name]
    results = results_of(name, arguments)
    assert len(results) > len(saved)
    assert sum(t.nbytes >= 1 << 16 for t in results.values()) >= min(2, len(results))
    for label in results.keys() - saved:
        for change in (
            lambda t: t.resize_(t.numel() + 1000),
            lambda t: torch.cat([torch.ones(t.numel() + 9, dtype=t.dtype)], out=t.resize_(0)),
            lambda t: t.untyped_storage().resize_(0),
        ):
            change(results_of(name, arguments)[label])  # raises if torch does not own the memory


def test_results_of_modules_can_be_freed():
    lstm = fastseq.LSTM(128, 128, num_layers=2, bidirectional=True, batch_first=True, backend="native")
    cell = fastseq.LSTMCell(128, 128, backend="native")
    x = torch.randn(128, 2, 128, requires_grad=True)
    output, states, cells = lstm(x, return_cell_states=True)
    step = cell(x[:, 0])
    context, weights = ops.attention(x, x, x, backend="native", need_weights=True)
    results = [output, *states, cells, *step, context]
    leaves = [x, *lstm.parameters(), *cell.parameters()]
    grads = torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])
    for t in (*results, weights, *grads):
        t.detach().untyped_storage().resize_(0)


def run(program: str, *arguments: str, **variables: str) -> str:
    """Run Python lines in a fresh process -> its output; fails if it does not end well within a minute."""
    environment = os.environ | {"FASTSEQ_POISON": "0"} | variables  # filling untouched memory would take seconds
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}{result.stderr}"
    return result.stdout


LIMITED = """
import resource, torch, fastseq
from fastseq import ops
from fastseq.ops.attention.api import prepare_keys
torch.set_num_threads(1)

def limit(mib):
    "Allow the process so much memory beyond its present size."
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (mib << 20), resource.getrlimit(resource.RLIMIT_AS)[1]))
"""


def test_exhausted_memory_empties_the_pool():
    program = """
layer = fastseq.LSTM(8, 256, backend="native")
layer(torch.zeros(256, 64, 8, requires_grad=True))  # leaves 64 MiB of activations and 16 of cell states in the pool
limit(24)
print(len(layer(torch.zeros(192, 64, 8, requires_grad=True))[0]))  # blocks of 48 and 12 MiB, and 12 for the output
"""
    assert run(LIMITED + program) == "192\n"


LINEAR = "prepare_keys(torch.zeros(1, 60000, 8), score='additive')"  # 8 MB; steps x positions would take 29 GB
EXHAUSTED = {
    "scratch memory in a parallel region": "ops.attention(*[torch.zeros(2, 20000, 1)] * 3, backend='native')",
    "a result": "torch.ops.fastseq.attention_prepare(torch.zeros(1, 1, 1).expand(1, 2**26, 1), None)",
    "saved tensors": "fastseq.LSTM(1, 1024, backend='native')(torch.zeros(2**15, 1, 1, requires_grad=True))",
}


@pytest.fixture(scope="module")
def outcomes():
    """Run LINEAR and EXHAUSTED in one process with 256 MiB to spare -> the outcome of each call."""
    calls = (LINEAR, *EXHAUSTED.values())
    tries = [f"try:\n    {call}\n    print('served')\nexcept MemoryError as error:\n    print(error)" for call in calls]
    lines = run("\n".join([LIMITED, "limit(256)", *tries])).splitlines()
    return dict(zip(calls, lines, strict=True))


def test_prepared_keys_take_linear_memory(outcomes):
    assert outcomes[LINEAR] == "served"


@pytest.mark.parametrize("call", EXHAUSTED.values(), ids=EXHAUSTED)
def test_exhausted_memory_is_a_memory_error(call, outcomes):
    message = r"fastseq: out of memory: \d+ bytes could not be allocated; use a smaller batch"
    assert re.match(message, outcomes[call])


SLOW_FREE = """
#include <malloc.h>
#include <unistd.h>
extern "C" void __libc_free(void*);
extern "C" volatile int state = 0;  // 1: the next free() of a large block takes 0.3 s; 2: it does now
extern "C" void free(void* block) noexcept {
  if (state == 1 && malloc_usable_size(block) >= 1 << 20) {
    state = 2;
    usleep(300000);
  }
  __libc_free(block);
}
"""
FORK = """
import ctypes, os, signal, sys, threading, time, torch, fastseq
torch.set_num_threads(1)
call = torch.zeros(64, 32, 8), *torch.zeros(2, 1, 32, 64).unbind(), [torch.zeros(256, 8), torch.zeros(256, 64)]

def forward():
    return torch.ops.fastseq.lstm_forward(*call, None, None, False, True, True)

forward()  # leaves 2 MiB of activations in the pool
state = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "state")
state.value = 1
other = threading.Thread(target=torch.ops.fastseq.cpu_empty_cache)  # frees with the lock held
other.start()
while state.value != 2:
    time.sleep(0.001)
child = os.fork()
if child == 0:
    signal.alarm(3)  # ends a child that waits for the lock
    forward()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child was blocked"
other.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces free() of glibc")
def test_fork_while_another_thread_holds_the_lock(tmp_path):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "slow_free.cpp", tmp_path / "slow_free.so"
    source.write_text(SLOW_FREE)
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    run(FORK, str(library), LD_PRELOAD=str(library))
