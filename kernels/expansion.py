"""Blocks of a panel on their way into a product: levels as bytes, scales and minima as floats; or all floats.

A prepared block is rows of `PANEL` words: eight rows of bytes as INT8 has them, from `SCALES` on the scales
of the block, or of its halves, and from `MINIMA` on their minima. So few kernels multiply all formats, and
what is expanded serves all rows that meet the panel. Of formats whose levels stand for floats a block becomes
32 rows of these, as FLOAT32 has them.
"""

import numpy as np

from pagellm.kernels.jit import kernel, shared
from pagellm.kernels.packing import (
    BLOCK,
    FLOAT4,
    FLOAT4_TABLE,
    FLOAT8,
    FLOAT32,
    FP4,
    FP4_TABLE,
    GROUP,
    INT2,
    INT2_K,
    INT3_K,
    INT4_K,
    INT4_MIN,
    INT4_ZERO,
    INT4_ZERO_32,
    INT5,
    INT5_K,
    INT5_MIN,
    INT6_K,
    INT8,
    INT8_127,
    INT8_STEP,
    NF4_TABLE,
    PANEL,
    TABLE,
    TABLE4,
    TABLE4_K,
    block_place,
    block_words,
    halves_place,
    has_float_scales,
    has_minima,
    has_scale_bytes,
    inputs_of,
    panel_block_words,
    span_halves,
    span_shift,
)
from pagellm.kernels.simd import (
    LANES,
    broadcast,
    e4m3_intrinsics,
    expand_levels,
    expand_nibbles,
    float_table_intrinsics,
    int8_intrinsics,
    load,
    load_float16,
    load_high_nibbles,
    load_int8,
    load_low_nibbles,
    load_powers,
    prefetch,
    store,
    table_intrinsics,
)

SCALES, MINIMA = 8 * PANEL, 10 * PANEL
PREPARED_WORDS = 12 * PANEL
_VECTORS = PANEL // LANES
_expand_table, dot_table = table_intrinsics(TABLE)
_expand_float4, dot_float4 = table_intrinsics(FLOAT4_TABLE)
_expand_e4m3, dot_e4m3 = e4m3_intrinsics()
_expand_int8, dot_int8_127 = int8_intrinsics(INT8_STEP)
_expand_nf4, dot_nf4 = float_table_intrinsics(NF4_TABLE)
_expand_fp4, dot_fp4 = float_table_intrinsics(FP4_TABLE)


@shared
def is_expanded(format: int, rows: int) -> bool:
    """Whether so many rows of activations meet prepared blocks, not the panel as it is."""
    return inputs_of(format) == INT8 and format > INT4_MIN and (format != INT4_K or rows > GROUP)


@shared
def is_decoded(format: int) -> bool:
    """Whether its levels become floats that are multiplied as FLOAT32 is."""
    return format != FLOAT32 and inputs_of(format) == FLOAT32


@shared
def has_halves_apart(format: int) -> bool:
    """Whether each half of a block has a scale of its own."""
    return format in (INT2_K, INT3_K, INT6_K)


@kernel
def prepare_blocks(format, w, panel, first, count, ahead, out, at):
    """Writes blocks `first : first + count` of the panel at word `panel` to `out[at:]`, one after the other.

    ahead: how far from each block the words begin that are asked for, or 0.
    """
    size, span_size, shift = panel_block_words(format), span_halves(format), span_shift(format)
    for block in range(first, first + count):
        span = block >> shift
        place = panel + block * size + span * span_size
        if ahead > 0:
            for i in range(0, size, LANES):
                prefetch(w, place + ahead + i)
        _expand_block(format, w, place, out, at)
        prepare_scales(format, w, place, panel + ((span + 1) << shift) * size + span * span_size, out, at)
        at += PREPARED_WORDS


@kernel
def _expand_block(format, w, place, out, at):
    if format in (INT5, INT5_MIN, INT5_K):
        expand_levels(4, 1, _VECTORS, w, place, 16 if format == INT5 else 0, out, at)
    elif format == INT6_K:
        expand_levels(4, 2, _VECTORS, w, place, 32, out, at)
    elif format == INT3_K:
        expand_levels(2, 1, _VECTORS, w, place, 4, out, at)
    elif format in (INT2_K, INT2):
        expand_levels(2, 0, _VECTORS, w, place, 1 if format == INT2 else 0, out, at)
    elif format in (TABLE4, TABLE4_K):
        _expand_table(_VECTORS, w, place, out, at)
    elif format == FLOAT4:
        _expand_float4(_VECTORS, w, place, out, at)
    elif format in (INT4_ZERO, INT4_ZERO_32):
        expand_nibbles(_VECTORS, w, place, place + block_words(format) * PANEL, out, at)
    else:
        expand_levels(4, 0, _VECTORS, w, place, 0, out, at)


@kernel
def decode_blocks(format, w, panel, first, count, ahead, out, at):
    """Writes blocks `first : first + count` of the panel at word `panel` to `out[at:]` as rows of floats.

    ahead: as in `prepare_blocks`.
    """
    for block in range(first, first + count):
        place, scales = panel + block_place(format, block), panel + halves_place(format, block)
        if ahead > 0:
            for i in range(0, panel_block_words(format), LANES):
                prefetch(w, place + ahead + i)
        if format == FLOAT8:
            _expand_e4m3(_VECTORS, w, place, scales, out, at)
        elif format == INT8_127:
            _expand_int8(_VECTORS, w, place, scales, out, at)
        elif format == FP4:
            _expand_fp4(_VECTORS, w, place, scales, out, at)
        else:
            _expand_nf4(_VECTORS, w, place, scales, out, at)
        at += BLOCK * PANEL


@kernel
def prepare_scales(format, w, place, halves, out, at):
    """Writes the scales and minima of the block at word `place`, whose halves begin at another."""
    bytes, minima = place + block_words(format) * PANEL, has_minima(format)
    for v in range(0, PANEL, LANES):
        if has_float_scales(format):
            store(out, at + v + SCALES, load(w, halves + v))
        elif format == FLOAT4:
            store(out, at + v + SCALES, load_powers(w, bytes + v // 4))
        elif has_scale_bytes(format):
            _multiply_scales(format, w, bytes + v // 4, halves + v // 2, out, at + v)
        else:
            store(out, at + v + SCALES, load_float16(w, halves + v // 2))
            if minima:
                store(out, at + v + MINIMA, load_float16(w, halves + PANEL // 2 + v // 2))


@kernel
def _multiply_scales(format, w, bytes, halves, out, at):
    """The products of bytes and halves, which begin at these words, of `LANES` columns of a block."""
    scale, next_bytes = load_float16(w, halves), bytes + PANEL // 4
    if format in (INT4_K, INT5_K):
        minimum = load_float16(w, halves + PANEL // 2) * broadcast(np.float32(-1.0))
        store(out, at + SCALES, scale * load_int8(w, bytes))
        store(out, at + MINIMA, minimum * load_int8(w, next_bytes))
    elif format == INT2_K:
        minimum = load_float16(w, halves + PANEL // 2) * broadcast(np.float32(-1.0))
        store(out, at + SCALES, scale * load_low_nibbles(w, bytes))
        store(out, at + MINIMA, minimum * load_high_nibbles(w, bytes))
        store(out, at + SCALES + PANEL, scale * load_low_nibbles(w, next_bytes))
        store(out, at + MINIMA + PANEL, minimum * load_high_nibbles(w, next_bytes))
    else:
        store(out, at + SCALES, scale * load_int8(w, bytes))
        if has_halves_apart(format):
            store(out, at + SCALES + PANEL, scale * load_int8(w, next_bytes))
