"""What the compiler made of a Triton kernel, read from its binary: no GPU, no driver."""

import re
import subprocess
import tempfile
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def facts(kernel, chip) -> dict[str, int]:
    """Of a CompiledKernel: registers of a thread, spilled (memory accesses or bytes), shared memory in bytes, threads,
    tensor-core instructions, loads of 16 bytes a thread."""
    found = _nvidia(kernel.asm["cubin"]) if chip.is_nvidia else _amd(kernel.asm["amdgcn"])
    return found | {"shared": kernel.metadata.shared, "threads": kernel.metadata.num_warps * chip.lanes}


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups())
    return {
        "registers": registers,
        "spilled": stack + local + _count(r"\b(LDL|STL)\b", code),
        "mma": _count(r"\bHMMA\b", code),
        "wgmma": _count(r"\bHGMMA\b", code),
        "tcgen05": _count(r"\bUTC\w*MMA\b", code),
        "wide_loads": _count(r"\b(LDG|LDGSTS)\.E\S*\.128\b", code),
    }


def _amd(code: str) -> dict[str, int]:
    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    return {
        "registers": field("vgpr_count"),
        # Scalar registers may be parked in vector registers (sgpr_spill_count): that is no memory.
        "spilled": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "mfma": _count(r"\bv_mfma", code),
        "wide_loads": _count(r"\b(global|buffer)_load_dwordx4\b", code),
    }


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
