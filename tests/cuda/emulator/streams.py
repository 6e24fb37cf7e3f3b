"""Streams of the host-side device: the tasks of ``ops.common.streams`` in any order that their events allow."""

import random

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Uses(TorchDispatchMode):
    """Notes on which stream each storage was made, and which storages another stream used."""

    def __init__(self):
        super().__init__()
        self.stream, self.owner, self.crossed, self.kept = 0, {}, {}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for t in tree_iter((args, kwargs or {})):
            if isinstance(t, torch.Tensor) and self.owner.get(_address(t), 0) != self.stream:
                self.crossed[_address(t)] = f"{tuple(t.shape)} in {func}"
        result = func(*args, **kwargs or {})
        for t in tree_iter(result):
            if isinstance(t, torch.Tensor):
                self.owner.setdefault(_address(t), self.stream)
                self.kept.append(t)  # so that no address comes again
        return result


def _address(t):
    return t.untyped_storage().data_ptr()


def shuffled(seed):
    """Return a ``streams.run`` that draws the next stream; a task that its events do not hold back may come early."""

    def run(tasks, device, tensors):
        draw, done, uses = random.Random(seed), set(), Uses()
        queues = {}
        for k, task in enumerate(tasks):
            queues.setdefault(task.stream, []).append(k)
        with uses:
            while any(queues.values()):
                ready = [s for s, queue in queues.items() if queue and done.issuperset(tasks[queue[0]].waits)]
                assert ready, "every stream waits for another"
                uses.stream = draw.choice(ready)
                k = queues[uses.stream].pop(0)
                tasks[k].work()
                done.add(k)
        lent = {_address(t) for t in tensors()}
        missing = {name for address, name in uses.crossed.items() if address not in lent}
        assert not missing, f"memory that another stream uses may be given away: {missing}"

    return run
