"""A valid call of every operator, and the tensors among its arguments."""

import pytest
import torch
from torch import Tensor


def lstm_arguments(T, B, I, H, P=0) -> tuple:  # noqa: E741
    """input, h0, c0 and weights of one direction with biases and, if P > 0, a projection."""
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, P or H), torch.randn(4 * H), torch.randn(4 * H)]
    weights += [torch.randn(P, H)] if P else []
    return torch.randn(T, B, I), torch.randn(1, B, P or H), torch.randn(1, B, H), weights


def lstm_forward(T=4, B=3, I=5, H=7, packed=False, P=0) -> tuple:  # noqa: E741
    input, *rest = lstm_arguments(T, B, I, H, P)
    lengths, batch_sizes = (None, torch.full((T,), B)) if packed else (torch.full((B,), T), None)
    return input.flatten(0, 1) if packed else input, *rest, lengths, batch_sizes, False, True, True


def lstm_backward(T=4, B=3, I=5, H=7, packed=False, P=0) -> tuple:  # noqa: E741
    input, h0, c0, weights, lengths, batch_sizes, reverse, *needs = lstm_forward(T, B, I, H, packed, P)
    rows = input.shape[:-1]
    grads = torch.randn(*rows, P or H), torch.randn_like(h0), torch.randn_like(c0), torch.randn(*rows, H)
    saved = torch.randn(*rows, 4 * H + P), torch.randn(*rows, H)
    return *grads, input, h0, c0, weights, *saved, lengths, batch_sizes, reverse, *needs


def lstm_cell_forward(B=3, H=7) -> tuple:
    return torch.randn(B, 4 * H), torch.randn(B, H)


def lstm_cell_backward(B=3, H=7) -> tuple:
    return torch.randn(B, 4 * H), *torch.randn(4, B, H).unbind()


def lstm_step(B=3, I=5, H=7) -> tuple:  # noqa: E741
    input, h, c, weights = lstm_arguments(1, B, I, H)
    return input[0], h[0], c[0], *weights


def int8_weights(*shapes) -> list[Tensor]:
    return [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in shapes]


def lstm_forward_narrow(T=4, B=3, I=5, H=7, packed=False) -> tuple:  # noqa: E741
    input, h0, c0, (_, _, *biases), *sizes, reverse, _, need_cell_states = lstm_forward(T, B, I, H, packed)
    weights = [*int8_weights((4 * H, I), (4 * H, H)), *biases]
    return input, h0, c0, weights, [torch.rand(4 * H), torch.rand(4 * H)], *sizes, reverse, need_cell_states


def lstm_step_int8(B=3, I=5, H=7) -> tuple:  # noqa: E741
    input, h, c, _, _, *biases = lstm_step(B, I, H)
    return input, h, c, *int8_weights((4 * H, I), (4 * H, H)), torch.rand(4 * H), torch.rand(4 * H), *biases


def linear_narrow(B=3, K=5, N=7) -> tuple:
    return torch.randn(B, K), *int8_weights((N, K)), torch.rand(N), torch.randn(N)


def lstm_recurrence_forward(T=4, B=3, H=8) -> tuple:
    gates, states = torch.randn(T, B, 4 * H), torch.randn(2, 1, B, H).unbind()
    return gates, *states, torch.randn(1, 4 * H, H), torch.full((B,), T), False, False, True, True, False


def lstm_recurrence_backward(T=4, B=3, H=8) -> tuple:
    per_step, states = torch.randn(3, T, B, H).unbind(), torch.randn(3, 1, B, H).unbind()
    activations, weight_hh, lengths = torch.randn(T, B, 4 * H), torch.randn(1, 4 * H, H), torch.full((B,), T)
    grads = per_step[0], states[0], states[1], per_step[1]
    return *grads, activations, per_step[2], states[2], weight_hh, lengths, False, False, False


def lstm_variant_forward(T=4, B=3, H=7, norms=True, masks=True) -> tuple:
    states, weight = torch.randn(2, 1, B, H).unbind(), torch.randn(4 * H, H)
    gains = (torch.randn(4 * H), torch.randn(H), torch.randn(H)) if norms else (None,) * 3
    keeps = (torch.rand(2, T, B, H) < 0.5).unbind() if masks else (None, None)
    mask, rates = torch.rand(B, H) if masks else None, (0.0, 0.0) if masks else (0.2, 0.3)
    options = torch.full((B,), T) if masks else None, False
    return torch.randn(T, B, 4 * H), *states, weight, *gains, mask, *keeps, *rates, *options, True, True


def lstm_variant_backward(T=4, B=3, H=7, norms=True, masks=True) -> tuple:
    _, _, c0, *variant, _, _ = lstm_variant_forward(T, B, H, norms, masks)
    grads = torch.randn(T, B, H), torch.randn(1, B, H), torch.randn(1, B, H), torch.randn(T, B, H)
    saved = torch.randn(T, B, H), torch.rand(T, B, 4 * H)
    of_norms = (torch.randn(T, B, 4 * H), torch.rand(T, B, 3)) if norms else (None, None)
    return *grads, c0, *variant, *saved, *of_norms


def tf32_product(M=3, K=4, N=5) -> tuple:
    return torch.randn(M, K), torch.randn(K, N), torch.randn(N), False, False


def attention_forward(B=2, T=3, S=5, A=4, D=6, masked=False, prepared=None) -> tuple:
    padding = (None, torch.ones(B, T, S, dtype=torch.bool)) if masked else (torch.full((B,), S), None)
    vectors = torch.randn(A), torch.randn(A)
    return torch.randn(B, T, A), torch.randn(B, S, A), torch.randn(B, S, D), *vectors, *padding, prepared, 1.0, True


def attention_backward(B=2, T=3, S=5, A=4, D=6, masked=False, prepared=None) -> tuple:
    *inputs, scale, _ = attention_forward(B, T, S, A, D, masked, prepared)
    return torch.randn(B, T, D), torch.randn(B, T, S), *inputs, torch.rand(B, T, S), scale, True, True


def attention_coverage_forward(B=2, T=3, S=5, A=4, D=6, masked=False) -> tuple:
    *inputs, _, scale, need_weights = attention_forward(B, T, S, A, D, masked)
    return *inputs, torch.rand(B, T, S), torch.randn(A), scale, need_weights


def attention_coverage_backward(B=2, T=3, S=5, A=4, D=6, masked=False) -> tuple:
    *inputs, scale, _ = attention_coverage_forward(B, T, S, A, D, masked)
    return torch.randn(B, T, D), torch.randn(B, T, S), *inputs, torch.rand(B, T, S), scale, True, True


def attention_prepare(B=2, S=5, A=4) -> tuple:
    return torch.randn(B, S, A), torch.full((B,), S)


def linear_cross_entropy_forward(N=5, V=7, H=4) -> tuple:
    tensors = torch.randn(N, H), torch.randn(V, H), torch.randn(V), torch.randint(V, (N,))
    return *tensors, -100, 0.1, True, True, True


def linear_cross_entropy_backward(N=5, V=7, H=4) -> tuple:
    return torch.randn(N), torch.rand(2, N), *linear_cross_entropy_forward(N, V, H)


def candidates(B=2, K=3, V=5) -> tuple:
    return torch.randn(B * K, V), torch.randn(B, K), torch.zeros(B * K, 2, dtype=torch.int64), 0, 4


def decoder_step(N=6, B=3, P=4, H=8, E=5, A=7, V=9, dot=False) -> tuple:
    """Two layers with input feeding; the additive score, or the dot score with A = H."""
    draw, A = torch.randn, H if dot else A
    matrices = [draw(4 * H, E + H), draw(4 * H, H), draw(4 * H, H), draw(4 * H, H)]
    state = draw(2, N, H), draw(2, N, H), draw(N, H)
    score = (None,) * 4 if dot else (draw(A, H), draw(A), draw(A), draw(()))
    keys = draw(B, P, A)
    prepared = None if dot else torch.zeros(B, P, (A + 15) // 16 * 16 + 16)
    source = keys, draw(B, P, H), torch.full((B,), P), prepared
    first = torch.arange(N), draw(V, E), draw(V, 4 * H), *state, matrices, [draw(4 * H) for _ in range(4)]
    return *first, draw(H, 2 * H), *score, *source, draw(V, H), draw(V), 0.5, True


def decoder_greedy(N=6, V=9) -> tuple:
    """Three steps of the arguments of decoder_step; tokens 0 and 1 are forbidden, 2 ends a row."""
    *arguments, _ = decoder_step(N, V=V)
    search = torch.full((N,), 3), torch.zeros(N, dtype=torch.bool), torch.arange(3)
    return *arguments, V, *search, 1, 2, N, 3


def decoder_sequence(T, N, B, P, H, A, masked, dot) -> dict:
    """The inputs of T steps of two layers by name, as both operators take them."""
    draw, A = torch.randn, H if dot else A
    keys = draw(B, P, A)
    score = dict(query_weight=draw(A, H), query_bias=draw(A), score_weight=draw(A))
    return {
        "states": (draw(2, N, H), draw(2, N, H), draw(N, H)),
        "matrices": [draw(4 * H, H) for _ in range(4)],
        "biases": [draw(4 * H), draw(4 * H)],
        "masks": torch.rand(1, T, N, H) if masked else None,
        "combine": draw(H, 2 * H),
        **(dict.fromkeys(score) if dot else score),
        "source": (keys, draw(B, P, H), torch.full((B,), P)),
        "prepared": None if dot else torch.zeros(B, P, (A + 15) // 16 * 16 + 16),
    }


def decoder_forward(T=3, N=6, B=3, P=4, H=8, A=7, masked=True, dot=False) -> tuple:
    given = decoder_sequence(T, N, B, P, H, A, masked, dot)
    gates = torch.randn(T, N, 4 * H)
    states, matrices, biases, masks, combine, query, bias, score, source, prepared = given.values()
    return gates, *states, matrices, biases, masks, combine, query, bias, score, *source, prepared, 0.5


def decoder_backward(T=3, N=6, B=3, P=4, H=8, A=7, masked=True, dot=False) -> tuple:
    given = decoder_sequence(T, N, B, P, H, A, masked, dot)
    states, matrices, _, masks, combine, query, _, score, source, prepared = given.values()
    draw, A = torch.randn, H if dot else A
    grads = draw(T, N, H), draw(T, N, P), draw(2, N, H), draw(2, N, H)
    saved = draw(T, N, H), torch.rand(T, N, P), draw(2, T, N, H), torch.rand(2, T, N, 4 * H), draw(T, N, A)
    return *grads, *states, matrices, masks, combine, query, score, *source, prepared, *saved, 0.5


def decoder_pack(M=12, K=5) -> tuple:
    return torch.randn(M, K), True


BOTH = (lstm_cell_forward, lstm_cell_backward, lstm_step, attention_forward, attention_backward, attention_prepare)
DECODER = (decoder_step, decoder_greedy, decoder_pack, decoder_forward, decoder_backward)
VARIANT = (lstm_variant_forward, lstm_variant_backward)
LOSS = (linear_cross_entropy_forward, linear_cross_entropy_backward)
COVERAGE = (attention_coverage_forward, attention_coverage_backward)
NARROW = (lstm_forward_narrow, lstm_step_int8, linear_narrow)
CPU = (lstm_forward, lstm_backward, *VARIANT, *DECODER, *LOSS, *BOTH, *COVERAGE, candidates, *NARROW)
CUDA = (lstm_recurrence_forward, lstm_recurrence_backward, tf32_product, *BOTH)


def variants(call, prepared) -> list[tuple]:
    """List arguments of ``call`` so that each optional tensor is present in one of them.

    prepared: of the keys (2, 5, 4) of attention.
    """
    if call in (lstm_forward, lstm_backward):
        return [call(), call(packed=True), call(P=6)]
    if call is lstm_forward_narrow:
        return [call(), call(packed=True)]
    if call in VARIANT:
        return [call(), call(norms=False), call(masks=False)]
    if call in (attention_forward, attention_backward):
        return [call(prepared=prepared), call(masked=True)]
    if call in COVERAGE:
        return [call(), call(masked=True)]
    return [call()]


LISTS = {  # names of the tensors of a list argument, in messages
    ("lstm_forward", "weights"): ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"),
    ("lstm_backward", "weights"): ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"),
    ("lstm_forward_narrow", "weights"): ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    ("lstm_forward_narrow", "scales"): ("scale", "scale"),
    ("decoder_step", "weights"): ("weight_ih", "weight_hh") * 2,
    ("decoder_step", "biases"): ("bias_ih", "bias_hh") * 2,
    ("decoder_greedy", "weights"): ("weight_ih", "weight_hh") * 2,
    ("decoder_greedy", "biases"): ("bias_ih", "bias_hh") * 2,
    ("decoder_forward", "weights"): ("weight_ih", "weight_hh") * 2,
    ("decoder_forward", "biases"): ("bias_ih", "bias_hh"),
    ("decoder_backward", "weights"): ("weight_ih", "weight_hh") * 2,
}


def tensors_of(operator, arguments: tuple) -> dict[str, Tensor]:
    """Name the tensors that are present, by the operator's schema: "input", "weights[1]", ..."""
    named = {}
    for argument, value in zip(operator._schema.arguments, arguments, strict=True):
        if isinstance(value, Tensor):
            named[argument.name] = value
        elif isinstance(value, list):
            named |= {f"{argument.name}[{i}]": t for i, t in enumerate(value)}
    return named


def tensor_names(operator) -> set[str]:
    """Return the names of all tensor arguments in the schema; a list counts as one."""
    return {argument.name for argument in operator._schema.arguments if "Tensor" in str(argument.type)}


def check_damaged(operator, call, damage, prepared=None) -> set[str]:
    """Replace every tensor of every variant by ``damage(tensor)``, one at a time: the operator must refuse it by name.

    -> the arguments that were tried.
    """
    tried = set()
    for arguments in variants(call, prepared):
        operator(*arguments)
        for label in tensors_of(operator, arguments):
            changed = [list(value) if isinstance(value, list) else value for value in arguments]
            name, _, rest = label.partition("[")
            i = [argument.name for argument in operator._schema.arguments].index(name)
            if rest:
                k = int(rest.rstrip("]"))
                changed[i][k] = damage(changed[i][k])
                name = LISTS[call.__name__, name][k]
            else:
                changed[i] = damage(changed[i])
            with pytest.raises(RuntimeError, match=f"{call.__name__}: {name} .*storage of"):
                operator(*changed)
            tried.add(label.partition("[")[0])
    return tried
