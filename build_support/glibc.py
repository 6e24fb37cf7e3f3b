"""Writes stubs of libc and libm that offer no symbol newer than a given glibc: a library linked to them loads there.

    python build_support/glibc.py 2.28 build/glibc      # prints the LDFLAGS

Symbols of this machine's glibc keep their older versions: exp@GLIBC_2.2.5 beside exp@@GLIBC_2.29. A stub has the newest
version of each symbol up to the given one, and no code. Linux, GCC; $CC may be a cross compiler.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

COMPILER = os.environ.get("CC", "gcc")
LIBRARIES = ("libc.so.6", "libm.so.6")
LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
SYMBOL = re.compile(r"D([FO ]) (\S+)\s+[0-9a-f]+\s+\(?GLIBC_([\d.]+)\)?\s+(\w+)$", re.MULTILINE)  # in objdump -T
# GCC's headers read this variable, of glibc 2.32. Zero selects the atomic operations of programs with threads.
SINGLE_THREADED = """
.data
.globl __libc_single_threaded
.hidden __libc_single_threaded
__libc_single_threaded: .byte 0
.section .note.GNU-stack,"",%progbits
"""


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def run(*command: str | Path) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout.strip()


def system_file(name: str) -> str:
    return run(COMPILER, f"-print-file-name={name}")


def newest_versions(library: str, limit: str) -> dict[str, list[tuple[str, str]]]:
    """Version -> [(symbol, "function" or "object")], each symbol under its newest version up to limit."""
    newest = {}
    for kind, section, version, name in SYMBOL.findall(
        run(run(COMPILER, "-print-prog-name=objdump"), "-T", system_file(library))
    ):
        thread_local = section.startswith((".tbss", ".tdata"))
        if thread_local or section == "*ABS*" or number(version) > number(limit):
            continue
        if name not in newest or number(version) > number(newest[name][0]):
            newest[name] = version, "object" if kind == "O" else "function"
    versions = defaultdict(list)
    for name, (version, kind) in sorted(newest.items()):
        versions[version].append((name, kind))
    return versions


def write_stub(library: str, limit: str, folder: Path) -> None:
    lines, nodes = [".text"], []
    for version, symbols in sorted(newest_versions(library, limit).items(), key=lambda item: number(item[0])):
        lines += [f".globl {name}\n.type {name},%{kind}\n{name}: .quad 0\n.size {name},8" for name, kind in symbols]
        nodes.append(f"GLIBC_{version} {{ global: {' '.join(f'{name};' for name, _ in symbols)} }};")
    source, script = folder / f"{library}.s", folder / f"{library}.map"
    source.write_text("\n".join(lines) + "\n")
    script.write_text("\n".join(nodes) + "\n")
    flags = [f"-Wl,-soname,{library}", f"-Wl,--version-script,{script}"]
    run(COMPILER, "-shared", "-nostdlib", *flags, source, "-o", folder / library)


def main(limit: str, target: str) -> None:
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        write_stub(library, limit, folder)
    static, loader = (
        system_file("libc_nonshared.a"),
        system_file(LOADERS[run(COMPILER, "-dumpmachine").partition("-")[0]]),
    )
    (folder / "libc.so").write_text(f"GROUP ( libc.so.6 {static} AS_NEEDED ( {loader} ) )\n")
    (folder / "libm.so").write_text("GROUP ( libm.so.6 )\n")
    source, out = folder / "single_threaded.s", folder / "single_threaded.o"
    source.write_text(SINGLE_THREADED)
    run(COMPILER, "-c", source, "-o", out)
    print(f"-L{folder} {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
