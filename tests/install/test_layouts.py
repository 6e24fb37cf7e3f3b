"""Finds nvcc in the layouts of Debian, conda-forge, the HPC SDK and pip, each rebuilt by links around the real one."""

import functools
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINE = os.uname().machine


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """build_support.cuda on a machine without nvcc."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("build_support.cuda")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "USUAL_HOME", tmp_path / "no-cuda")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not list(Path(folder).glob("nvidia/cu*/bin"))])
    module.find_toolkit.cache_clear()
    yield module
    module.find_toolkit.cache_clear()


@pytest.fixture
def real(monkeypatch):
    """The toolkit of this machine."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("build_support.cuda")
    module.find_toolkit.cache_clear()
    try:
        return module.find_toolkit()
    except module.Unusable as reason:
        pytest.skip(str(reason))


def programs(real, home):
    """bin/ and nvvm/ of a toolkit, nvcc.profile included."""
    (home / "bin").mkdir(parents=True)
    folder = next(parent for parent in real.library.resolve().parents if (parent / "nvvm").exists())
    for path in (folder / "bin").iterdir():
        (home / "bin" / path.name).symlink_to(path)
    (home / "nvvm").symlink_to(folder / "nvvm")


def link(target, source):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def script(path, nvcc):
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec "{nvcc}" "$@"\n')
    path.chmod(0o755)
    return path


def debian(real, root):
    """A script /usr/bin/nvcc; headers and libraries in the system's folders."""
    programs(real, root / "usr/lib/nvidia-cuda-toolkit")
    for path in real.include.iterdir():
        link(root / "usr/include" / path.name, path)
    link(root / f"usr/lib/{MACHINE}-linux-gnu/libcudart_static.a", real.library / "libcudart_static.a")
    return script(root / "usr/bin/nvcc", root / "usr/lib/nvidia-cuda-toolkit/bin/nvcc")


def conda(real, root):
    """Everything below targets/, no lib64."""
    programs(real, root)
    link(root / f"targets/{MACHINE}-linux/include", real.include)
    link(root / f"targets/{MACHINE}-linux/lib", real.library)
    return root / "bin/nvcc"


def hpc_sdk(real, root):
    """compilers/bin/nvcc starts the one of cuda/13.0; cuda/lib64 is a link into it."""
    home = root / "Linux_x86_64/25.9/cuda/13.0"
    programs(real, home)
    link(home / "include", real.include)
    link(home / "lib64", real.library)
    return script(root / "Linux_x86_64/25.9/compilers/bin/nvcc", home / "bin/nvcc")


def pip(real, root):
    """nvidia/cu13 of site-packages, not on the PATH; lib instead of lib64."""
    home = root / "nvidia/cu13"
    programs(real, home)
    link(home / "include", real.include)
    link(home / "lib", real.library)
    return home / "bin/nvcc"


@pytest.mark.parametrize("layout", [debian, conda, hpc_sdk, pip], ids=lambda layout: layout.__name__)
def test_a_layout_compiles_and_links(layout, real, cuda, tmp_path, monkeypatch):
    nvcc = layout(real, tmp_path)
    if layout is pip:
        monkeypatch.syspath_prepend(str(tmp_path))
    else:
        monkeypatch.setattr(cuda.shutil, "which", lambda name: str(nvcc))
    toolkit = cuda.find_toolkit()
    assert toolkit.nvcc == nvcc and toolkit.release == real.release
    assert toolkit.include.is_relative_to(tmp_path) and toolkit.library.is_relative_to(tmp_path)
    cuda.check(toolkit, ("8.0",), "c++")


@pytest.mark.parametrize("missing", ["include/cuda_runtime.h", "lib/libcudart_static.a"])
def test_half_a_toolkit_is_refused_with_the_missing_file(missing, real, cuda, tmp_path, monkeypatch):
    programs(real, tmp_path)
    nvcc = (tmp_path / "bin/nvcc").resolve()
    (tmp_path / "bin/nvcc").unlink()
    shutil.copy(nvcc, tmp_path / "bin/nvcc")  # a link leads to the whole toolkit
    for name in {"include/cuda_runtime.h", "lib/libcudart_static.a"} - {missing}:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda.Unusable, match=rf"{tmp_path}/bin/nvcc has no {Path(missing).name} beside it"):
        cuda.find_toolkit()


def test_no_nvcc(cuda):
    with pytest.raises(cuda.Unusable, match="no nvcc was found"):
        cuda.find_toolkit()


def fake_nvcc(path, release):
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.89'\n")
    path.chmod(0o755)


def test_an_old_nvcc_is_refused(cuda, tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "bin/nvcc", "11.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(cuda.Unusable, match=r"bin/nvcc is release 11\.8; the CUDA kernels need 12\.1 or later"):
        cuda.find_toolkit()


def test_the_next_nvcc_serves_where_the_first_cannot(real, cuda, tmp_path, monkeypatch):
    fake_nvcc(tmp_path / "old/nvcc", "11.8")
    nvcc = conda(real, tmp_path / "conda")
    monkeypatch.setattr(cuda.shutil, "which", lambda name: str(tmp_path / "old/nvcc"))
    monkeypatch.setattr(cuda, "USUAL_HOME", tmp_path / "conda")
    assert cuda.find_toolkit().nvcc == nvcc


@pytest.mark.parametrize(
    ("names", "compiler", "reason"),
    [(("8.0", "99.0"), "c++", "Unsupported gpu architecture"), (("9.0",), "false", "false fails")],
    ids=["architecture", "host compiler"],
)
def test_an_nvcc_that_cannot_compile_is_refused(names, compiler, reason, real, cuda):
    with pytest.raises(cuda.Unusable, match=f"nvcc {real.version} was tried on {' '.join(names)}: .*{reason}"):
        cuda.check(real, names, compiler)


@pytest.mark.parametrize(("release", "compressed"), [((12, 9), False), ((13, 0), True), ((14, 1), True)], ids=str)
def test_machine_code_is_compressed_where_every_driver_of_the_release_reads_it(
    release, compressed, real, cuda, monkeypatch
):
    monkeypatch.setattr(cuda, "find_toolkit", functools.cache(lambda: real._replace(release=release)))
    jobs = cuda.jobs(ROOT, ["9.0"])
    assert len(jobs) == len(list(ROOT.glob("csrc/cuda/**/*.cu")))
    assert all(("--compress-mode=size" in job.command) is compressed for job in jobs)
    assert all(("-compress-all" in job.command) is not compressed for job in jobs)  # which any driver reads


# `nvcc --list-gpu-code` of 13.0; the same from `ptxas --help` of 12.4, 12.6 and 12.8 (pip's nvidia-cuda-nvcc-cu12).
OLD = "sm_50 sm_52 sm_53 sm_60 sm_61 sm_62 sm_70 sm_72 sm_75 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a"
LISTED = {
    "12.4": OLD,
    "12.6": OLD,
    "12.8": f"{OLD} sm_100 sm_100a sm_101 sm_101a sm_120 sm_120a",
    "13.0": "sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_100 sm_110 sm_103 sm_120 sm_121",
}


@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (LISTED["12.4"], ["8.0", "9.0+PTX"]),
        (LISTED["12.6"], ["8.0", "9.0+PTX"]),
        (LISTED["12.8"], ["8.0", "9.0+PTX", "10.0", "12.0"]),
        (LISTED["13.0"], ["8.0", "9.0+PTX", "10.0", "12.0"]),
        ("sm_100 sm_120 sm_150", ["10.0", "12.0+PTX"]),
    ],
    ids=[*LISTED, "a later one"],
)
def test_the_default_architectures_are_those_of_nvcc(listed, names, cuda):
    assert cuda.default_architectures(listed.replace(" ", "\n") + "\n") == names


def test_an_nvcc_for_other_gpus_is_refused(cuda):
    with pytest.raises(cuda.Unusable, match=r"compiles for none of 8\.0, 9\.0, 10\.0, 12\.0"):
        cuda.default_architectures("sm_52\nsm_150\n")


def test_an_unset_list_means_the_default(real, cuda, monkeypatch):
    monkeypatch.setattr(cuda, "find_toolkit", functools.cache(lambda: real))
    names, old = cuda.architectures()
    assert names[:2] == ["8.0", "9.0+PTX"] and old == []


def test_the_front_end_runs_once_for_ampere_and_once_for_all_newer(cuda):
    """ptxas makes the code of each GPU; the kernels use no instruction of 10.0 and later."""
    assert cuda.generate_code(["8.0", "8.6", "9.0+PTX", "10.0", "12.0"]) == [
        "-gencode=arch=compute_80,code=[sm_80,sm_86]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90,sm_100,sm_120]",
    ]
    assert cuda.generate_code(["9.0a", "10.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_90,code=[sm_100,compute_90]",
    ]


def test_architectures_by_name(cuda, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;9.0a")  # NVIDIA's containers set such a list
    assert cuda.architectures() == (["8.6", "9.0a"], ["7.5"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(
        cuda.Unusable, match=r"need compute capability 8\.0 \(TORCH_CUDA_ARCH_LIST has 7\.0 7\.5\+PTX\)"
    ):
        cuda.architectures()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"expected versions such as 8\.0;9\.0"):
        cuda.architectures()
