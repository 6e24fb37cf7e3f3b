"""`fastseq export --format torch`: packages of AOTInductor that call the compiled operators of fastseq."""

import shutil

import pytest
import torch
import torch._inductor.config
from exported_models import trained

from fastseq import _native
from fastseq.export import package
from fastseq.export.graphs import Encode, Step, encoder_inputs, examples, step_inputs

pytestmark = [
    pytest.mark.skipif(not _native.available(), reason=f"{_native.why_not()}"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++"),
]


@pytest.mark.parametrize("variant", [{}, {"attention": "none", "input_feeding": False}, {"attention": "dot"}])
def test_the_graphs_hold_our_operators_for_every_batch_and_length(variant):
    model = trained(**variant).model.eval()
    operators = set()
    encoder, step = examples(model, 3, 7)
    for graph, example, inputs in ((Encode(model), encoder, encoder_inputs), (Step(model), step, step_inputs)):
        program = package.program(graph.eval(), example, inputs(model.config))
        operators |= {str(node.target) for node in program.graph.nodes if "fastseq" in str(node.target)}
        other = examples(model, 5, 11, seed=1)[isinstance(graph, Step)]
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*other), graph(*other))
    assert "fastseq.lstm_forward.default" in operators


def test_packages_are_made_for_contiguous_inputs(tmp_path, monkeypatch):
    """A package reads its inputs with the strides of the example, whatever they have; `load` makes them contiguous."""
    model = trained(attention="dot").model.eval()
    example = examples(model, 3, 7)[1]
    assert not all(tensor.is_contiguous() for tensor in example), "the memory of an encoder is a transposed view"
    programs = []
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: programs.append(program))
    package.write(Step(model), example, step_inputs(model.config), [], tmp_path / "step.pt2")
    assert all(tensor.is_contiguous() for tensor in torch.utils._pytree.tree_leaves(programs[0].example_inputs))


@pytest.mark.slow
def test_a_package_runs_our_operators(tmp_path):
    """The encoder alone: each graph takes g++ as long as this one."""
    model = trained(attention="none", input_feeding=False, bidirectional=False).model.eval()
    inputs = encoder_inputs(model.config)
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp_cache_precompile_headers": False}
    with torch._inductor.config.patch(quick):
        package.write(Encode(model), examples(model, 3, 7)[0], inputs, [], tmp_path / "encoder.pt2")
    run = package.load(tmp_path / "encoder.pt2", inputs)
    for batch, positions in ((1, 4), (5, 11)):
        given = examples(model, batch, positions, seed=batch)[0]
        with torch.no_grad():
            torch.testing.assert_close(tuple(run(*given)), Encode(model)(*given))
