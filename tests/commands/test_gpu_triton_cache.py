"""``benchmarks/triton_cache.py``: the cache of Triton that ``gpu_check.py`` brings to a GPU."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import triton_cache

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def brought(folder: Path, **others) -> Path:
    """A cache of the Triton and the Python in use, or of others, that was made in another place."""
    facts = {"triton": "9.9.9", "python": triton_cache.python_version(), "chip": "sm_90"}
    (folder / "KEY").mkdir(parents=True)
    group = json.dumps({"child_paths": {"k.cubin": "/elsewhere/KEY/k.cubin"}})
    (folder / "KEY" / "__grp__k.json").write_text(group)
    (folder / "cache.json").write_text(json.dumps(facts | others))
    return folder


@pytest.fixture
def no_cache(monkeypatch):
    """Triton 9.9.9, and no TRITON_CACHE_DIR, before and after the test."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "restored at the end")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(triton_cache.importlib.metadata, "version", lambda name: "9.9.9")
    return monkeypatch


def test_a_brought_triton_cache_is_used_where_it_fits(tmp_path, no_cache):
    folder = brought(tmp_path / "cache")
    assert re.fullmatch(r"Triton cache brought for Triton 9\.9\.9 and Python 3\.\d+, sm_90", triton_cache.bring(folder))
    assert os.environ["TRITON_CACHE_DIR"] == str(folder)
    paths = json.loads((folder / "KEY" / "__grp__k.json").read_text())["child_paths"]
    assert paths == {"k.cubin": str(folder / "KEY" / "k.cubin")}


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"triton": "3.6.0"}, r"not used: it is for Triton 3\.6\.0 and Python .*, this is Triton 9\.9\.9 and Python"),
        ({"python": "2.7"}, r"not used: it is for Triton 9\.9\.9 and Python 2\.7, this is"),
    ],
    ids=["Triton", "Python"],
)
def test_a_brought_triton_cache_that_does_not_fit_is_left_alone(others, sentence, tmp_path, no_cache):
    assert re.search(sentence, triton_cache.bring(brought(tmp_path / "cache", **others)))
    assert "TRITON_CACHE_DIR" not in os.environ
    assert triton_cache.bring(tmp_path) == "no Triton cache was brought"
    no_cache.setenv("TRITON_CACHE_DIR", "/mine")
    assert triton_cache.bring(tmp_path / "cache").endswith("not used: TRITON_CACHE_DIR is set")


@needs_triton
def test_the_keys_of_another_python_have_its_library_and_no_other_change(tmp_path):
    import triton
    from triton.runtime.cache import triton_key

    own, other = Path(triton.__file__).parent, tmp_path / "triton"
    (other / "_C").mkdir(parents=True)
    for path in own.iterdir():
        if path.name not in ("_C", "compiler"):
            (other / path.name).symlink_to(path)
    (other / "_C/libtriton.so").write_bytes(b"of another Python")
    shutil.copytree(own / "compiler", other / "compiler")
    library, key = (hashlib.sha256(b"of another Python").hexdigest(), triton_cache.key_with(tmp_path))
    assert key.count(library) == 1
    ours = triton_key()
    assert [a for a, b in zip(key.split("-"), ours.split("-"), strict=True) if a != b] == [library]
    with (other / "compiler/compiler.py").open("a") as file:
        file.write("# another Triton")
    with pytest.raises(SystemExit, match=r"is not Triton .*: compiler/compiler\.py differs"):
        triton_cache.key_with(tmp_path)
