"""The activation functions of feed-forward layers, one row at a time."""

import math

import numpy as np

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES, broadcast, exp, fma, load, store

SILU, GELU_TANH, GELU, RELU = range(4)
KINDS = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU, "relu": RELU}

_SQRT_2_OVER_PI = 0.7978845608028654


@kernel
def activate(kind, gated, x, start, size, up_offset, out):
    """`out[i] = f(x[start + i])` for i < size; if gated, times `x[start + up_offset + i]` (Shazeer 2020).

    x and out: flat, readable and writable up to a whole vector.
    """
    one = broadcast(np.float32(1.0))
    zero = broadcast(np.float32(0.0))
    if kind == SILU:  # x / (1 + exp(-x)) (Hendrycks and Gimpel 2016)
        for i in range(0, size, LANES):
            value = load(x, start + i)
            store(out, i, value / (one + exp(zero - value)))
    elif kind == GELU_TANH:  # 0.5 x (1 + tanh(y)) = x / (1 + exp(-2 y)) (the same)
        cubic = broadcast(np.float32(0.044715))
        factor = broadcast(np.float32(-2.0 * _SQRT_2_OVER_PI))
        for i in range(0, size, LANES):
            value = load(x, start + i)
            inner = fma(cubic * value * value, value, value)
            store(out, i, value / (one + exp(factor * inner)))
    elif kind == GELU:
        for i in range(size):
            value = x[start + i]
            out[i] = np.float32(0.5) * value * np.float32(1.0 + math.erf(value / math.sqrt(2.0)))
    else:
        for i in range(size):
            out[i] = max(x[start + i], np.float32(0.0))
    if gated:
        for i in range(0, size, LANES):
            store(out, i, load(out, i) * load(x, start + up_offset + i))
