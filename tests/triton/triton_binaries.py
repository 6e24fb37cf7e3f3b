"""What the compiler made of a Triton kernel, read from its binary: no GPU, no driver."""

import re
import tempfile

import nvidia_binaries


def facts(kernel, chip) -> dict[str, int]:
    """Of a CompiledKernel: registers of a thread, spilled (memory accesses or bytes), shared memory in bytes, threads,
    tensor-core instructions, loads of 16 bytes a thread."""
    found = _nvidia(kernel.asm["cubin"]) if chip.is_nvidia else _amd(kernel.asm["amdgcn"])
    return found | {"shared": kernel.metadata.shared, "threads": kernel.metadata.num_warps * chip.lanes}


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (found,) = nvidia_binaries.kernels(file.name).values()
    spilled = sum(found[where] for where in ("stack", "local", "local_loads", "local_stores"))
    kept = ("mma", "wgmma", "tcgen05", "wide_loads")
    return {"registers": found["registers"], "spilled": spilled} | {what: found[what] for what in kept}


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


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
