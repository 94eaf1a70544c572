"""The activation functions of feed-forward layers and the soft cap of scores and logits, a row at a time."""

import numpy as np

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES, absolute, broadcast, exp, fma, load, maximum, store, where_at_least

SILU, GELU_TANH, GELU, RELU, RELU_SQUARED, CLAMPED_SWIGLU = range(6)
KINDS = {
    "silu": SILU,
    "gelu_tanh": GELU_TANH,
    "gelu": GELU,
    "relu": RELU,
    "relu_squared": RELU_SQUARED,
    "clamped_swiglu": CLAMPED_SWIGLU,
}

_SQRT_2_OVER_PI = 0.7978845608028654


@kernel
def _upper_tail(t):
    """The part of the standard normal distribution above each lane t >= 0; t times it is within 1.5e-7 t.

    It is exp(-t^2 / 2) times a smooth function: here a polynomial in u = 1 / (1 + 0.35 t), fitted to the
    least greatest relative error (3.2e-8) on 0 <= t <= 14, behind which the exponential is 0.
    """
    one = broadcast(np.float32(1.0))
    u = one / fma(broadcast(np.float32(0.35)), t, one)
    p = fma(broadcast(np.float32(-0.029146135)), u, broadcast(np.float32(0.14397268)))
    p = fma(p, u, broadcast(np.float32(-0.25571626)))
    p = fma(p, u, broadcast(np.float32(0.15917644)))
    p = fma(p, u, broadcast(np.float32(-0.023111377)))
    p = fma(p, u, broadcast(np.float32(0.10550865)))
    p = fma(p, u, broadcast(np.float32(0.11983271)))
    p = fma(p, u, broadcast(np.float32(0.1398619)))
    p = fma(p, u, broadcast(np.float32(0.13962141)))
    return p * u * exp(broadcast(np.float32(-0.5)) * t * t)


@kernel
def activate(kind, gated, x, start, size, up_offset, out):
    """`out[i] = f(x[start + i])` for i < size; if gated, times `x[start + up_offset + i]` (Shazeer 2020).

    CLAMPED_SWIGLU is GPT-OSS's (OpenAI 2025): min(x, 7) sigmoid(1.702 min(x, 7)), and the other half stays
    within +- 7 and is added to 1. x and out: flat, readable and writable up to a whole vector.
    """
    one = broadcast(np.float32(1.0))
    zero = broadcast(np.float32(0.0))
    if kind == CLAMPED_SWIGLU:
        least, factor = broadcast(np.float32(-7.0)), broadcast(np.float32(-1.702))
        for i in range(0, size, LANES):  # of a NaN and a number the second is the greater
            value = zero - maximum(least, zero - load(x, start + i))
            linear = zero - maximum(least, zero - load(x, start + up_offset + i))
            linear = maximum(least, linear)
            store(out, i, (linear + one) * (value / (one + exp(factor * value))))
        return
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
        for i in range(0, size, LANES):
            value = load(x, start + i)
            magnitude = absolute(value)
            store(out, i, maximum(value, zero) - magnitude * _upper_tail(magnitude))
    else:
        for i in range(size):
            out[i] = max(x[start + i], np.float32(0.0))
            if kind == RELU_SQUARED:  # So et al. 2021
                out[i] *= out[i]
    if gated:
        for i in range(0, size, LANES):
            store(out, i, load(out, i) * load(x, start + up_offset + i))


@kernel
def softcap(x, start, size, cap):
    """`x[start + i] = cap * tanh(x[start + i] / cap)` for i < size, in place (Bello et al. 2017).

    x: flat, readable and writable up to a whole vector; cap: float32, more than 0. tanh is that of Cephes'
    `tanhf` (S. L. Moshier, 1989): a polynomial near 0, where 1 - 2 / (exp(2 y) + 1) would lose digits.
    """
    one, two = broadcast(np.float32(1.0)), broadcast(np.float32(2.0))
    near = broadcast(np.float32(0.625))
    for i in range(start, start + size, LANES):
        y = load(x, i) / broadcast(cap)
        square = y * y
        p = fma(broadcast(np.float32(-5.70498872745e-3)), square, broadcast(np.float32(2.06390887954e-2)))
        p = fma(p, square, broadcast(np.float32(-5.37397155531e-2)))
        p = fma(p, square, broadcast(np.float32(1.33314422036e-1)))
        p = fma(p, square, broadcast(np.float32(-3.33332819422e-1)))
        far = one - two / (exp(y + y) + one)
        tanh = where_at_least(absolute(y), near, far, fma(p * square, y, y))
        store(x, i, broadcast(cap) * tanh)
