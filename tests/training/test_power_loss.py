"""Renamed files: their folder is written to the disk after it, or a power loss may undo the new name."""

import errno
import os
import stat
from pathlib import Path

import pytest

from fastseq.training import files
from fastseq.training.callbacks import AtomicCheckpointIO


@pytest.fixture
def events(monkeypatch) -> list[tuple[str, str]]:
    """("rename", name), ("file", "") and ("folder", its name), in order."""
    happened: list[tuple[str, str]] = []
    replace, fsync = Path.replace, os.fsync

    def renamed(self, target):
        happened.append(("rename", Path(target).name))
        return replace(self, target)

    def synced(number):
        folder = stat.S_ISDIR(os.fstat(number).st_mode)
        happened.append(("folder", Path(os.readlink(f"/proc/self/fd/{number}")).name) if folder else ("file", ""))
        fsync(number)

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(os, "fsync", synced)
    return happened


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the name of a folder from /proc")
def test_a_renamed_file_is_followed_by_its_folder(events, tmp_path):
    files.write_text(tmp_path / "config.yaml", "seed: 1")
    expected = [("file", ""), ("rename", "config.yaml"), ("folder", tmp_path.name)]
    assert events == expected
    events.clear()
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert events == [("file", ""), ("rename", "last.ckpt"), ("folder", tmp_path.name)]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_write_folders(code, monkeypatch, tmp_path):
    """EINVAL, the refusal of some network mounts, is no failure; an error of the disk is one."""
    fsync = os.fsync

    def refused(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(number)

    monkeypatch.setattr(os, "fsync", refused)
    if code == errno.EINVAL:
        files.write_text(tmp_path / "config.yaml", "seed: 1")
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            files.write_text(tmp_path / "config.yaml", "seed: 1")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1"
