"""Read registers, memory and instruction counts of kernels from NVIDIA machine code, without GPU and driver."""

import collections
import re
import subprocess
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {  # kind: pattern of its mnemonics
    "mma": r"HMMA\b",
    "wgmma": r"HGMMA\b",
    "tcgen05": r"UTC\w*MMA\b",
    "wide_loads": r"(LDG|LDGSTS)\.E\S*\.128\b",
    "wide_stores": r"STG\.E\S*\.128\b",
    "async_copies": r"LDGSTS\b",
    "local_loads": r"LDL\b",
    "local_stores": r"STL\b",
}
_MNEMONIC = re.compile(r"^ +/\*[0-9a-f]+\*/ +(?:@\S+ +)?([A-Z][\w.]*)", re.MULTILINE)


def tool(name: str, *arguments) -> str:
    """Run a tool that Triton bundles; return its output."""
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def kernels(path: Path | str, architecture: int | None = None) -> dict[str, dict[str, int]]:
    """Read each kernel of a cubin or object, by mangled name: registers per thread, bytes of stack, local and static
    shared memory, and the number of INSTRUCTIONS of each kind.

    architecture: selects one of a file with several.
    """
    only = ["-arch", f"sm_{architecture}"] if architecture else []
    usage = tool("cuobjdump", "--dump-resource-usage", *only, path)
    facts = {}
    for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        facts[name] = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True))
    _, *listings = tool("cuobjdump", "-sass", *only, path).split("Function : ")
    for listing in listings:
        name, _, code = listing.partition("\n")
        counts = collections.Counter(_MNEMONIC.findall(code))
        for kind, pattern in INSTRUCTIONS.items():
            facts[name][kind] = sum(n for mnemonic, n in counts.items() if re.match(pattern, mnemonic))
    return facts
