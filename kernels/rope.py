"""Rotary position embeddings (Su et al. 2021) in the half-split form: dimension i turns with i + D/2."""

from kernels.jit import kernel


@kernel
def rotate(x, start, cos, sin, position):
    """Rotates one head's vector that begins at `x[start]`, in place.

    cos, sin: [max_model_len, rotary_dim / 2], the tables of the angles position * frequency; dimensions from
    rotary_dim on stay as they are.
    """
    half = cos.shape[1]
    for i in range(half):
        first, second = x[start + i], x[start + half + i]
        c, s = cos[position, i], sin[position, i]
        x[start + i] = first * c - second * s
        x[start + half + i] = second * c + first * s
