"""Work of one call on several CUDA streams."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Task(NamedTuple):
    """Launches for one stream, which runs its tasks in the order of the list."""

    stream: int  # 0: the caller's
    work: Callable[[], None]
    waits: tuple[int, ...] = ()  # indices of earlier tasks, of other streams, that must have ended


def run(tasks: Sequence[Task], device: torch.device, tensors: Callable[[], Iterable[Tensor]]) -> None:
    """Launch the tasks; the caller's stream waits for all of them. Nothing waits on the host.

    Only events order the streams, and all of them begin after and end before the caller's stream, so a call can be
    captured in a CUDA graph.

    Args:
        tensors: called after the launches: all tensors that one stream made and another one uses. Their memory is kept
            until all streams have passed this call.
    """
    caller = torch.cuda.current_stream(device)
    streams = [caller, *(_side_stream(device.index, k) for k in range(1, 1 + max(task.stream for task in tasks)))]
    begin = caller.record_event()
    for stream in streams[1:]:
        stream.wait_event(begin)
    events, waited = {}, {k for task in tasks for k in task.waits}
    for k, task in enumerate(tasks):
        stream = streams[task.stream]
        for earlier in task.waits:
            stream.wait_event(events[earlier])
        with torch.cuda.stream(stream):
            task.work()
        if k in waited:
            events[k] = stream.record_event()
    for stream in streams[1:]:
        caller.wait_stream(stream)
    for tensor in tensors():
        for stream in streams:
            tensor.record_stream(stream)


@functools.cache
def _side_stream(device: int | None, k: int) -> torch.cuda.Stream:
    """The k-th stream beside the caller's; always the same, because each has its own part of the allocator's memory."""
    return torch.cuda.Stream(device)
