"""Rotary position embeddings (Su et al. 2021) in the half-split form: dimension i turns with i + D/2."""

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import LANES, load, store


@kernel
def rotate(x, start, cos, sin, half):
    """Rotates the first `2 * half` dimensions of one head's vector that begins at `x[start]`, in place.

    x: flat; cos, sin: [half or more], of the angles position * frequency; the other dimensions stay as they
    are.
    """
    whole = half - half % LANES
    for i in range(0, whole, LANES):
        first, second = load(x, start + i), load(x, start + half + i)
        c, s = load(cos, i), load(sin, i)
        store(x, start + i, first * c - second * s)
        store(x, start + half + i, second * c + first * s)
    for i in range(whole, half):
        first, second = x[start + i], x[start + half + i]
        x[start + i] = first * cos[i] - second * sin[i]
        x[start + half + i] = second * cos[i] + first * sin[i]
