"""A worker process and how to ask it: a task in, rows out, or the exception that says how it was lost."""

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
    """The worker hung or died. ``doing``: what it had announced last; ``reason``: a sentence."""

    def __init__(self, doing: str, reason: str):
        super().__init__(reason)
        self.doing, self.reason = doing, reason


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads a session, and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Worker:
    """A child process in a session of its own, so that its children end with it. What it prints goes to ``log``."""

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

    def ask(self, task: dict, silence: float, start: float = 0.0) -> Iterator[dict]:
        """Yield what it tells until it is done. start: seconds that its first sign of life may take, if more.

        Raises:
            Lost: nothing came for ``silence`` seconds, and it was killed; or it ended by itself.
        """
        doing, patience = "starting", max(silence, start)
        with contextlib.suppress(BrokenPipeError):  # it is dead, as the missing answer will tell
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        while True:
            try:
                line = self._lines.get(timeout=patience)
            except queue.Empty:
                self.kill()
                raise Lost(doing, f"hung: nothing for {patience:.0f} s while doing {doing}; killed") from None
            patience = silence
            if line is None:
                raise Lost(doing, f"died with exit code {self._process.wait()} while doing {doing}")
            try:
                message = json.loads(line)
            except ValueError:  # a tool around it speaks, too
                self._log.write(line)
                continue
            if "done" in message:
                return
            doing = message.get("doing", doing)
            yield message

    def close(self, seconds: float) -> int | None:
        """Let it end -> its exit code; None where it had to be killed after ``seconds``."""
        self._process.stdin.close()
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def kill(self) -> None:
        """End it and its children."""
        end_group(self._process)
