"""Builds the wheel for aarch64 on an x86-64 Debian and runs its tests under qemu: ``make arm64``.

Python and its headers come from Debian's arm64 packages, unpacked below build/arm64 without root; torch from PyPI.
qemu translates a program's own code only, so the compiler and pip run natively. Needs g++-aarch64-linux-gnu and
qemu-user-static.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HOME = Path("build/arm64").resolve()
ROOT, SITE, APP = HOME / "root", HOME / "site", HOME / "app"  # Debian; torch and pytest; the installed wheel
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
TOOLS = {COMPILER: "g++-aarch64-linux-gnu", EMULATOR: "qemu-user-static", "apt-get": "apt", "dpkg-deb": "dpkg"}
PACKAGES = ("python3.11", "libpython3.11-dev", "libgomp1", "libstdc++6")  # for arm64
TORCH = "torch==2.13.0"
PLATFORMS = [*(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1)), "manylinux2014_aarch64"]
# torch reads these files of the processor at import; x86 has others. Neoverse N1, as in Graviton 2 and Ampere Altra.
PROCESSOR = "neoverse-n1"
MIDR = "0x00000000413fd0c1\n"
CPUINFO = """processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1

"""
LOADED = "from fastseq import _native; assert _native.available(), _native.why_not(); print(_native.build_info())"
SUITES = {  # about five minutes: an emulated processor is some ten times slower
    "the wheel loads": ["-c", LOADED],
    "accuracy, lstm": ["-m", "fastseq", "parity", "--op", "lstm", "--backend", "native"],
    "accuracy, lstm_cell": ["-m", "fastseq", "parity", "--op", "lstm_cell", "--backend", "native"],
    "accuracy, attention": ["-m", "fastseq", "parity", "--op", "attention", "--backend", "native"],
    "fuzz": ["tests/native/fuzz_native.py", "--cases", "200", "--seed", "17"],
    "drop-in": ["-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "tests/nn/test_dropin.py"],
}


def run(*command: str | Path, **environment: str | Path) -> None:
    """Raises CalledProcessError."""
    subprocess.run([*map(str, command)], check=True, env=os.environ | {k: str(v) for k, v in environment.items()})


def unpack_debian() -> None:
    """Download the packages with their dependencies, and unpack them. apt's state lies below HOME."""
    state, cache, sources = HOME / "apt/state", HOME / "apt/cache", HOME / "apt/sources"
    for folder in (state / "lists/partial", cache / "archives/partial", sources):
        folder.mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    shutil.copy("/etc/apt/sources.list.d/debian.sources", sources)  # Debian 12 and later
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "1",
        "Dir::State": state,
        "Dir::State::status": state / "status",
        "Dir::Cache": cache,
        "Dir::Etc::sourceparts": sources,
        "Dir::Etc::sourcelist": "/dev/null",
    }
    apt = ["apt-get", "--quiet", *(f"--option={name}={value}" for name, value in options.items())]
    run(*apt, "update")
    run(*apt, "--yes", "--download-only", "install", *PACKAGES)
    for package in sorted((cache / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", package, ROOT)


def describe_processor() -> None:
    """Write the files that qemu shows to the program in place of this machine's."""
    (ROOT / "proc").mkdir(exist_ok=True)
    processors = range(os.cpu_count() or 1)
    (ROOT / "proc/cpuinfo").write_text("".join(map(CPUINFO.format, processors)))
    for number in processors:
        folder = ROOT / f"sys/devices/system/cpu/cpu{number}/regs/identification"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "midr_el1").write_text(MIDR)


def pip(*arguments: str | Path) -> None:
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)


def install(target: Path, *requirements: str | Path) -> None:
    """Install packages of the other architecture into a folder."""
    platforms = (option for name in PLATFORMS for option in ("--platform", name))
    options = ("--python-version", "3.11", "--only-binary", ":all:", "--upgrade")
    pip("install", "--quiet", "--target", target, *platforms, *options, *requirements)


def build_wheel() -> Path:
    """Cross-compile against the headers of this machine's torch and the libraries of SITE's, and audit the result.

    auditwheel names the platform: it knows the names of its own architecture only.
    """
    shutil.rmtree(HOME / "wheel", ignore_errors=True)
    stubs = subprocess.run(
        [sys.executable, "build_support/glibc.py", "2.28", str(HOME / "glibc")],
        env=os.environ | {"CC": COMPILER.replace("g++", "gcc")},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    environment = {
        "CXX": COMPILER,
        "LDSHARED": f"{COMPILER} -shared",
        "CPPFLAGS": f"-I{ROOT}/usr/include/python3.11 -idirafter {ROOT}/usr/include",
        "LDFLAGS": f"-L{SITE}/torch/lib {stubs}",
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "FASTSEQ_NATIVE": "1",
        "FASTSEQ_CUDA": "0",
    }
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*command, "--wheel-dir", HOME / "wheel", ".", **environment)
    bin_folder = Path(sys.executable).parent
    libraries = os.pathsep.join(f"{ROOT}/{folder}/aarch64-linux-gnu" for folder in ("lib", "usr/lib"))
    run(
        bin_folder / "auditwheel",
        *("repair", "--plat", "auto", "--ldpaths", libraries, "--exclude", "libtorch*", "--exclude", "libc10.so"),
        *("--wheel-dir", HOME / "dist", *(HOME / "wheel").glob("*.whl")),
        PATH=f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
    )
    run(bin_folder / "abi3audit", "--strict", *(HOME / "dist").glob("*.whl"))
    return next((HOME / "dist").glob("*.whl"))


def emulate(*arguments: str) -> None:
    """Run Debian's Python for arm64, with the installed wheel."""
    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, (APP, SITE))),
        "PYTHONHOME": ROOT / "usr",
        "OMP_NUM_THREADS": "1",
        "QEMU_LD_PREFIX": ROOT,
        "QEMU_CPU": PROCESSOR,
    }
    run(EMULATOR, ROOT / "usr/bin/python3.11", "-P", *arguments, **environment)  # -P: not the checkout's fastseq


def main() -> None:
    if missing := [package for tool, package in TOOLS.items() if shutil.which(tool) is None]:
        raise SystemExit(f"make arm64 needs more tools. Install them first: apt-get install {' '.join(missing)}")
    if not (ROOT / "usr/bin/python3.11").exists():
        unpack_debian()
    describe_processor()
    if not (SITE / "torch").exists():
        install(SITE, TORCH, "numpy", "pytest")
    shutil.rmtree(HOME / "dist", ignore_errors=True)
    wheel = build_wheel()
    shutil.rmtree(APP, ignore_errors=True)
    install(APP, "--no-deps", wheel)
    disassembly = subprocess.run(
        [COMPILER.replace("g++", "objdump"), "-d", str(APP / "fastseq/_C.abi3.so")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not (count := disassembly.count("\tfmla\t")):
        raise SystemExit(f"{wheel.name} has no vector multiply-adds (fmla).")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {count} vector multiply-adds", flush=True)
    for name, arguments in SUITES.items():
        begin = time.perf_counter()
        print(f"== {name}, {PROCESSOR} under qemu", flush=True)
        emulate(*arguments)
        print(f"== {name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
