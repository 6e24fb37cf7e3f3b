"""One process at a time trains in a run folder; the lock of a dead process is taken over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import SMALL, refused, train

from fastseq.cli import main
from fastseq.errors import UserError
from fastseq.training import lock
from fastseq.training.lock import NAME, Owner, locked

HOLD = """
import sys, time
sys.argv[0] = "fastseq"  # imports fastseq without torch
from pathlib import Path
from fastseq.training.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_training_is_refused_until_the_first_is_killed(holder, tmp_path, capsys):
    run = tmp_path / "run"
    before = sorted(run.iterdir())
    for options in ((), ("--overwrite",)):
        sentence = refused(capsys, "train", *SMALL, "--run_dir", run, *options)
        assert f"is being trained by process {holder.pid} on host {os.uname().nodename}; wait" in sentence
    assert sorted(run.iterdir()) == before
    holder.kill()
    holder.wait()
    assert (run / NAME).exists()
    train(run, "--trainer.max_epochs", "1")
    assert not (run / NAME).exists()


def test_resume_is_refused_before_it_reads_anything(holder, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "config.yaml").write_text("train: a.tsv\nvalid: b.tsv\n")
    assert f"process {holder.pid}" in refused(capsys, "train", "--resume", run)


def test_the_lock_goes_with_a_failed_training(tmp_path, monkeypatch):
    def crash(*arguments, **options):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("fastseq.training.fit.train", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            main(["train", *SMALL, "--run_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / NAME).exists()


def write_lock(folder: Path, **owner) -> None:
    (folder / NAME).write_text(json.dumps(Owner.current()._asdict() | owner))


def test_a_lock_of_another_host_is_not_taken_over(tmp_path):
    write_lock(tmp_path, pid=4, host="elsewhere", boot="other")
    with (
        pytest.raises(UserError, match=r"process 4 on host elsewhere, which cannot be checked .* remove the lock: rm "),
        locked(tmp_path),
    ):
        pass
    assert json.loads((tmp_path / NAME).read_text())["pid"] == 4


@pytest.mark.parametrize("owner", [{"boot": "before the reboot"}, {"host": "another-container"}], ids=lambda o: str(*o))
def test_a_lock_from_before_a_reboot_or_of_a_container_is_taken_over(tmp_path, owner):
    write_lock(tmp_path, pid=4, **owner)
    with locked(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 4096, '{"pid": "x", "host": 1, "boot": null}', "\udcff", '{"pid": 1}'])
def test_a_damaged_lock_is_taken_over(tmp_path, text):
    (tmp_path / NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with locked(tmp_path):
        pass


def test_a_lock_removed_between_open_and_flock_is_made_again(tmp_path, monkeypatch):
    flock, calls = lock._flock, []

    def removed_first(file):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()
        return flock(file)

    monkeypatch.setattr(lock, "_flock", removed_first)
    with locked(tmp_path):
        assert (tmp_path / NAME).exists()
    assert len(calls) == 2


@pytest.mark.parametrize("alive", [True, False])
def test_a_file_system_without_locks(tmp_path, monkeypatch, alive):
    """There the number of the process decides."""
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    write_lock(tmp_path, pid=os.getpid() if alive else finished.pid)
    monkeypatch.setattr(lock, "_flock", lambda file: None)
    if alive:
        with pytest.raises(UserError, match=f"process {os.getpid()}"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            pass
