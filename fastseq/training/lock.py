"""The lock of a run folder: one process at a time trains in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from fastseq.errors import UserError

NAME = "train.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without flock()


class Owner(NamedTuple):
    """The process that a lock file names."""

    pid: int
    host: str
    boot: str  # id of the running kernel, equal in all containers of a machine

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
        return cls(os.getpid(), host, boot.read_text().strip() if boot.exists() else host)

    def elsewhere(self) -> bool:
        """True for a process of another machine."""
        here = Owner.current()
        return self.host != here.host and self.boot != here.boot

    def alive(self) -> bool:
        """True if a process with this pid runs on this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # of another user
        return True


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, made if missing. Raises UserError, naming the owner, while another process does.

    The kernel drops a process's lock however the process ends, so a lock file that is left behind on this machine is
    taken over. A lock from another machine is refused, because this machine cannot see whether its owner lives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with _acquired(path) as file:
        file.seek(0)
        file.truncate()
        file.write(json.dumps(Owner.current()._asdict()) + "\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # before the unlock: a process that has opened it finds it gone and retries


@contextlib.contextmanager
def _acquired(path: Path) -> Iterator[IO[str]]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        with os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace") as file:
            free = _flock(file)
            owner = _owner(file.read(4096))
            if free is None:
                free = owner is None or owner.elsewhere() or not owner.alive()
            if not free:
                who = f"process {owner.pid} on host {owner.host}" if owner else "another process"
                raise UserError(
                    f"{path.parent} is being trained by {who}; wait until it ends, stop it, or choose another --run_dir"
                )
            if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
                continue  # its owner removed it between open() and flock()
            if owner is not None and owner.elsewhere():
                raise UserError(
                    f"{path.parent} is locked by process {owner.pid} on host {owner.host}, which cannot be checked "
                    f"from this host; if that process has ended, remove the lock: rm {path}"
                )
            yield file
            return


def _flock(file: IO[str]) -> bool | None:
    """True with the lock, False while another process has it, None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def _owner(text: str) -> Owner | None:
    """The owner that a lock file names; None for an empty or damaged one."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    valid = type(owner.pid) is int and 0 < owner.pid < 1 << 31 and isinstance(owner.host, str)
    return owner if valid else None
