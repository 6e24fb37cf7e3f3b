"""Peak memory of one training step of whole models: plain PyTorch, fastseq with logits, fastseq with the fused loss.

    python benchmarks/peak_memory.py

Prints the growth of the resident memory during a step, in MiB, each in a fresh process on one thread. Weights, Adam's
moments and the libraries' own memory are there before: a step of two sentences comes first. Needs Linux.
"""

import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from fastseq.bench import models
from fastseq.seq2seq.model import Seq2Seq
from fastseq.testing.problems.plain_seq2seq import PlainSeq2Seq

CANDIDATES = ("plain", "logits", "fused loss")
NAMES = ("translation, additive, input feeding", "translation, dot")
CASES = {case.name: case for case in models.CASES if case.name in NAMES}


def memory(key: str) -> float:
    """A value of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def step(model, batch: models.Sentences, optimizer, with_logits: bool) -> None:
    if with_logits:
        logits = models.logits_of(model, batch)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=0)
        del logits
    else:
        loss = models.loss_of(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def peak(name: str, candidate: str) -> float:
    """Growth of the resident memory from before a step to its peak, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[name]
    model = PlainSeq2Seq(case.config) if candidate == "plain" else Seq2Seq(case.config)
    batch = models.Sentences(case.size, case.size.train)
    optimizer = torch.optim.Adam(model.train().parameters(), lr=0.0, fused=True)
    step(model, batch.part(slice(2)), optimizer, candidate == "logits")
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at the present size
    before = memory("VmRSS")
    step(model, batch, optimizer, candidate == "logits")
    return memory("VmHWM") - before


def main() -> None:
    if len(sys.argv) == 3:
        print(peak(*sys.argv[1:]))
        return
    for name in CASES:
        for candidate in CANDIDATES:
            command = [sys.executable, __file__, name, candidate]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{name} | {candidate} | {float(result.stdout):.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
