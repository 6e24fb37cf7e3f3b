"""The types of the public names, as a user's ``mypy --strict`` reads them."""

import runpy
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import fastseq

USER = Path(__file__).parent / "cases" / "typed_user.py"
ROOT = Path(fastseq.__file__).parents[1]
# torch is skipped, not followed: its 2,000 files take mypy 20 s, and here its types are Any.
CONFIG = "[mypy]\nstrict = true\n[mypy-fastseq.*]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
KEYWORDS = (
    "num_layers",
    "batch_first",
    "lengths",
    "return_cell_states",
    "score",
    "need_weights",
    "backend",
    "num_beams",
)


def mypy(folder: Path, *scripts: Path) -> list[str]:
    """Run mypy in an empty folder -> the lines of its output, one for each error or note."""
    (folder / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *map(str, scripts)]
    environment = {"MYPYPATH": str(ROOT), "PATH": "", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.splitlines()


def test_the_package_is_marked_as_typed():
    assert files("fastseq").joinpath("py.typed").is_file()


def test_the_script_of_a_user_runs(capsys):
    runpy.run_path(str(USER))
    assert "torch: requested by name" in capsys.readouterr().out


def test_strict_mypy_accepts_the_script_and_refuses_each_wrong_keyword(tmp_path):
    text = USER.read_text()
    wrong = {keyword: tmp_path / f"wrong_{keyword}.py" for keyword in KEYWORDS}
    for keyword, path in wrong.items():
        assert f"{keyword}=" in text
        path.write_text(text.replace(f"{keyword}=", f"{keyword}_=", 1))
    lines = mypy(tmp_path, USER, *wrong.values())
    assert not [line for line in lines if not line.startswith(("wrong_", "Found "))]
    for keyword, path in wrong.items():
        sentence = f'Unexpected keyword argument "{keyword}_"'
        assert any(line.startswith(path.name) and sentence in line for line in lines), f"{keyword}: {lines}"
