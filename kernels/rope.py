"""Rotary position embeddings (Su et al. 2021) in the half-split form: dimension i turns with i + D/2."""

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES, load, store


@kernel
def rotate(x, start, cos, sin, position):
    """Rotates one head's vector that begins at `x[start]`, in place.

    cos, sin: [max_model_len, rotary_dim / 2], the tables of the angles position * frequency; dimensions from
    rotary_dim on stay as they are.
    """
    half = cos.shape[1]
    cos_row, sin_row = cos[position], sin[position]
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        first, second = load(x, start + i), load(x, start + half + i)
        c, s = load(cos_row, i), load(sin_row, i)
        store(x, start + i, first * c - second * s)
        store(x, start + half + i, second * c + first * s)
    for i in range(whole, half):
        first, second = x[start + i], x[start + half + i]
        x[start + i] = first * cos_row[i] - second * sin_row[i]
        x[start + half + i] = second * cos_row[i] + first * sin_row[i]
