"""LSTM gate maths for Triton kernels. Arguments and results are float32 tiles."""

import re

import triton
import triton.language as tl


def triton_version() -> tuple[int, ...]:
    """Return the version of the installed Triton, for example (3, 7, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3])


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    large = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))  # no NaN on overflow: 2 / inf = 0
    # Near 0 the difference cancels. There p fits (tanh(x) - x) / x^3: Chebyshev in x^2.
    z = x * x
    p = -0.0539365636 + z * (0.021618826 + z * (-0.00794089044 + z * 0.0019145154))
    small = x + x * (z * (-0.333333322 + z * (0.133331847 + z * p)))
    return tl.where(tl.abs(x) < 0.75, small, tl.where(x < 0, -large, large))


@triton.jit
def cell_forward(i, f, g, o, c):
    """Pre-activations and c_{t-1} -> activations i, f, g, o; c_t; h_t."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c = f * c + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def cell_backward(i, f, g, o, c_prev, c, dh, dc):
    """Activations, c_{t-1}, c_t, dL/dh_t, dL/dc_t -> gradients of the four pre-activations and of c_{t-1}."""
    tanh_c = tanh(c)
    dc += dh * o * (1.0 - tanh_c * tanh_c)
    di = dc * g * i * (1.0 - i)
    df = dc * c_prev * f * (1.0 - f)
    dg = dc * i * (1.0 - g * g)
    do = dh * tanh_c * o * (1.0 - o)
    return di, df, dg, do, dc * f
