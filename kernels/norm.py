"""Normalisation of a hidden state: LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019)."""

import numpy as np

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES, broadcast, fma, load, reduce_add, store


@kernel
def _sum_of_squares(x, start, size, mean):
    """The sum over i of (x[start + i] - mean)^2: whole vectors first, then the rest one by one."""
    whole = size - size % LANES
    center = broadcast(mean)
    total = broadcast(np.float32(0.0))
    for i in range(0, whole, LANES):
        deviation = load(x, start + i) - center
        total = fma(deviation, deviation, total)
    rest = reduce_add(total)
    for i in range(whole, size):
        rest += (x[start + i] - mean) * (x[start + i] - mean)
    return rest


@kernel
def _mean(x, start, size):
    """The mean of `x[start : start + size]`, x flat."""
    whole = size - size % LANES
    total = broadcast(np.float32(0.0))
    for i in range(0, whole, LANES):
        total = total + load(x, start + i)
    rest = reduce_add(total)
    for i in range(whole, size):
        rest += x[start + i]
    return rest / np.float32(size)


@kernel
def divide_by_rms(x, start, size, epsilon):
    """RMSNorm without weights of `x[start : start + size]`, x flat, in place."""
    variance = _sum_of_squares(x, start, size, np.float32(0.0)) / np.float32(size)
    scale = np.float32(1.0) / np.sqrt(variance + np.float32(epsilon))
    for i in range(start, start + size):
        x[i] *= scale


@kernel
def normalize(x, start, size, center, epsilon, weights, w_start, b_start, out):
    """`out[i] = (x[i] - mean) / sqrt(variance + epsilon) * w[i] + b[i]` for one row [size].

    center: LayerNorm; otherwise RMSNorm, whose mean counts as 0. `weights` holds scale and bias at `w_start`
    and `b_start`; x, scale, bias and out must be readable and writable up to a whole vector.
    """
    mean = _mean(x, start, size) if center else np.float32(0.0)
    variance = _sum_of_squares(x, start, size, mean) / np.float32(size)
    scale = broadcast(np.float32(1.0) / np.sqrt(variance + np.float32(epsilon)))
    for i in range(0, size, LANES):
        deviation = load(x, start + i) - broadcast(mean)
        store(out, i, fma(deviation * scale, load(weights, w_start + i), load(weights, b_start + i)))
