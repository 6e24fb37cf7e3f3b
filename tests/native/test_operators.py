"""Rules of torch.library for each compiled CPU operator: schema, fake kernel, autograd, compiled graph."""

import operator_calls as calls
import pytest
import torch

from fastseq import _native

pytestmark = pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}")
operators = torch.ops.fastseq


def takes_tensors(name: str) -> bool:
    schema = getattr(operators, name).default._schema
    return any("Tensor" in str(argument.type) for argument in schema.arguments)


def test_every_operator_is_in_the_list_of_calls():
    names = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("fastseq::")
    }
    called = {call.__name__ for call in (*calls.CPU, *calls.CUDA)}
    assert {name for name in names if takes_tensors(name)} - called == {"cpu_fma_chain"}  # of the roofline


@pytest.mark.parametrize("call", calls.CPU, ids=lambda call: call.__name__)
@torch.no_grad()
def test_opcheck(call):
    for arguments in calls.variants(call, torch.zeros(2, 5, 32)):
        torch.library.opcheck(getattr(operators, call.__name__).default, arguments)
