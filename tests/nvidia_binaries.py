"""What the compiler made of kernels, read from machine code for NVIDIA GPUs: no GPU, no driver."""

import re
import subprocess
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {
    "mma": r"\bHMMA\b",
    "wgmma": r"\bHGMMA\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "wide_loads": r"\b(?:LDG|LDGSTS)\.E\S*\.128\b",
    "wide_stores": r"\bSTG\.E\S*\.128\b",
    "async_copies": r"\bLDGSTS\b",
    "local_loads": r"\bLDL\b",
    "local_stores": r"\bSTL\b",
}


def tool(name: str, *arguments) -> str:
    """Output of one of the tools that come with Triton."""
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def kernels(path: Path | str, architecture: int | None = None) -> dict[str, dict[str, int]]:
    """Of each kernel in a cubin or object, by its mangled name: registers of a thread, bytes of stack, local and static
    shared memory, and how many INSTRUCTIONS of each kind it has.

    ``architecture``: the one to read of a file that has several.
    """
    only = ["-arch", f"sm_{architecture}"] if architecture else []
    usage = tool("cuobjdump", "--dump-resource-usage", *only, path)
    found = {}
    for name, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        found[name] = dict(zip(("registers", "stack", "shared", "local"), map(int, numbers), strict=True))
    listing = tool("cuobjdump", "-sass", *only, path)
    for name, code in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", listing, re.DOTALL):
        found[name] |= {kind: len(re.findall(pattern, code)) for kind, pattern in INSTRUCTIONS.items()}
    return found
