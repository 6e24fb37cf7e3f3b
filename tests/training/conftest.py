"""A run that several files of tests read."""

from pathlib import Path

import pytest
from toy_runs import train


@pytest.fixture(scope="session")
def barely_trained(tmp_path_factory) -> Path:
    """A run of one epoch. Tests write into copies of it, or elsewhere."""
    run = tmp_path_factory.mktemp("barely") / "run"
    train(run, "--trainer.max_epochs", "1")
    return run
