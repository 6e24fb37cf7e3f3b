"""Read registers, memory and instruction counts of a compiled Triton kernel, without GPU and driver."""

import re
import tempfile

import nvidia_binaries


def facts(kernel, chip) -> dict[str, int]:
    """Read a CompiledKernel: registers per thread, spilled (memory accesses or bytes), shared memory in bytes, threads,
    tensor-core instructions, loads of 16 bytes per thread."""
    counts = _nvidia(kernel.asm["cubin"]) if chip.is_nvidia else _amd(kernel.asm["amdgcn"])
    return counts | {"shared": kernel.metadata.shared, "threads": kernel.metadata.num_warps * chip.lanes}


def _nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (counts,) = nvidia_binaries.kernels(file.name).values()
    spilled = sum(counts[where] for where in ("stack", "local", "local_loads", "local_stores"))
    kept = ("mma", "wgmma", "tcgen05", "wide_loads")
    return {"registers": counts["registers"], "spilled": spilled} | {what: counts[what] for what in kept}


def _amd(code: str) -> dict[str, int]:
    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    return {
        "registers": field("vgpr_count"),
        # Scalar registers spilled to vector registers (sgpr_spill_count) cost no memory access.
        "spilled": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "mfma": _count(r"\bv_mfma", code),
        "wide_loads": _count(r"\b(global|buffer)_load_dwordx4\b", code),
    }


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
