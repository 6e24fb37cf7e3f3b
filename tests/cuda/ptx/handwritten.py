"""Hand-written kernels for the tests of the interpreter."""

import numpy as np

from . import Memory, find, launch, parse

REGISTERS = """
.reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %r<128>; .reg .f32 %f<64>; .reg .b64 %d<64>; .reg .f64 %fd<16>;
.reg .b64 %a<8>; .reg .b64 %ptr<8>; .reg .u32 %tid; .reg .u32 %index;
"""


def kernel(body: str, arrays=(), module: str = "", header: str = "") -> str:
    """Return an entry with the address of each array in %a0, %a1, ... and of the thread's element in %ptr0, ..."""
    params = ", ".join(f".param .u64 a{n}" for n in range(len(arrays)))
    lines = ["mov.u32 %tid, %tid.x;", "mov.u32 %r0, %ctaid.x;", "mov.u32 %r1, %ntid.x;"]
    lines += ["mad.lo.u32 %index, %r0, %r1, %tid;"]
    for n, array in enumerate(arrays):
        lines.append(f"ld.param.u64 %a{n}, [a{n}];")
        lines.append(f"mad.wide.u32 %ptr{n}, %index, {np.asarray(array).itemsize}, %a{n};")
    top = f".version 9.0\n.target sm_90\n.address_size 64\n{module}\n.visible .entry k({params})\n{header}"
    return "\n".join((top, "{", REGISTERS, *lines, body, "ret;", "}"))


def execute(body: str, *arrays, grid=1, block=32, module: str = "", header: str = "", **options) -> list[np.ndarray]:
    """Run a kernel on copies of the arrays and return the copies."""
    memory = Memory()
    arrays = [np.asarray(a) for a in arrays]
    addresses = [memory.put(a) for a in arrays]
    entry = find(parse(kernel(body, arrays, module, header)), "k")
    launch(entry, memory, (grid,), (block,), addresses, **options)
    return [memory.get(address) for address in addresses]


def apply(instruction: str, result, *inputs) -> np.ndarray:
    """Run ``instruction`` on arrays of 32. $0 is the result, $1, $2, ... are the inputs; bool inputs are predicates.

    result: a dtype of 2, 4 or 8 bytes, or bool.
    """
    prefix = {2: "h", 4: "r", 8: "d"}
    lines, dtype = [], np.dtype(result)
    arrays = [np.zeros(32, np.uint32 if dtype.kind == "b" else dtype)]
    for n, values in enumerate(inputs, 1):
        predicate = values.dtype.kind == "b"
        arrays.append(values.astype(np.uint32) if predicate else values)
        size = arrays[-1].itemsize
        lines.append(f"ld.global.b{8 * size} %{prefix[size]}{9 + n}, [%ptr{n}];")
        if predicate:
            lines.append(f"setp.ne.u32 %p{n}, %r{9 + n}, 0;")
        instruction = instruction.replace(f"${n}", f"%p{n}" if predicate else f"%{prefix[size]}{9 + n}")
    size = arrays[0].itemsize
    target = "%p9" if dtype.kind == "b" else f"%{prefix[size]}9"
    lines.append(instruction.replace("$0", target) + ";")
    if dtype.kind == "b":
        lines.append("selp.u32 %r9, 1, 0, %p9;")
    lines.append(f"st.global.b{8 * size} [%ptr0], %{prefix[size]}9;")
    return execute("\n".join(lines), *arrays)[0].astype(dtype)
