"""A worker process: a task in, rows out; if the worker is lost, an exception with the reason."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


class Lost(Exception):
    """The worker hung or died. ``doing``: its last announcement; ``reason``: a sentence."""

    def __init__(self, doing: str, reason: str):
        super().__init__(reason)
        self.doing, self.reason = doing, reason


def end_group(process: subprocess.Popen) -> None:
    """Kill a session leader and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A child process in its own session, so that its children are killed with it. Its stderr goes to ``log``."""

    def __init__(self, command: list[str], log: Path, **environment: str):
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | environment,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def request(
        self, task: dict, silence: float, start: float = 0.0, silences: dict[str, float] | None = None
    ) -> Iterator[dict]:
        """Send a task and yield the worker's messages until it reports the task done.

        Args:
            silence: seconds between two messages after which the worker counts as hung.
            start: the same for the first message, if longer.
            silences: the same after the announcement of certain steps, by their names.

        Raises:
            Lost: no message within the timeout, and the worker was killed; or it ended by itself.
        """
        doing, timeout = "starting", max(silence, start)
        with contextlib.suppress(BrokenPipeError):  # a dead worker: reading its answer raises Lost
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                self.kill()
                raise Lost(doing, f"hung: nothing for {timeout:.0f} s while doing {doing}; killed") from None
            if line is None:
                raise Lost(doing, f"died with exit code {self._process.wait()} while doing {doing}")
            try:
                message = json.loads(line)
            except ValueError:  # output of a tool that wraps the worker
                self._log.write(line)
                continue
            if "done" in message:
                return
            doing = message.get("doing", doing)
            timeout = (silences or {}).get(doing, silence)
            yield message

    def close(self, seconds: float) -> int | None:
        """Close its input and wait -> its exit code; None if it was killed after ``seconds``."""
        self._process.stdin.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """Kill it and its children."""
        end_group(self._process)
