"""The layouts that the kernels read: weights in panels, activations in row groups, for every format.

Everything is counted in words of 4 bytes in float32 arrays, and inputs (the K of a product) in blocks of
`BLOCK`; a last block is filled up with zeros. A block of `BLOCK` inputs of one output column is so many words
in a row, and what scales them: signed bytes of its own, and float16 "halves" that it shares with the other
blocks of its span. A quantized weight is a level q, unsigned, of so many bits:

                words  bytes  halves  span   the value of a weight
    FLOAT32       32                         a word each
    BFLOAT16      16                         a pair in a word
    INT8           8            d       1    d * (q - 128)                          (GGUF's Q8_0)
    INT4           4            d       1    d * (q - 8)                            (Q4_0)
    INT4_MIN       4            d m     1    d * q + m                              (Q4_1)
    INT5           5            d       1    d * (q - 16)                           (Q5_0)
    INT5_MIN       5            d m     1    d * q + m                              (Q5_1)
    INT4_K         4    s t     d m     8    d * s * q - m * t                      (Q4_K)
    INT5_K         5    s t     d m     8    d * s * q - m * t                      (Q5_K)
    INT6_K         6    s s'    d       8    d * s * (q - 32), s' for the last 16   (Q6_K)
    INT3_K         3    s s'    d       8    d * s * (q - 4), s' for the last 16    (Q3_K)
    INT2_K         2    s s'    d m     8    d * (s & 15) * q - m * (s >> 4), ...   (Q2_K)
    INT2           2            d       8    d * (q - 1)                            (TQ1_0, TQ2_0)
    TABLE4         4            d       1    d * TABLE[q]                           (IQ4_NL)
    TABLE4_K       4    s       d       8    d * s * TABLE[q]                       (IQ4_XS)
    INT4_ZERO      4    z       d d     4    d * (q - z)
    INT4_ZERO_32   4    z       d d     1    d * (q - z)
    INT8_ROW       8            d d     8    d * (q - 128)
    FLOAT8         8            d d     4    d * q, q an E4M3
    INT8_127       8            d d     8    d * q / 127, q signed
    NF4, FP4       4            d d     2    d * a table of floats[q]
    FLOAT4         4    e               1    2^(e - 128) * FLOAT4_TABLE[q]          (MXFP4)

Two halves d are one float32 a column, a word each. INT8_ROW multiplies activations of which each row has one
scale: its products are integers to the end. FLOAT8 to FP4 become floats in the nearest cache and
meet activations as FLOAT32 does, with its bits.

The bits of the levels lie in one or two planes, of 8, 4, 2 or 1 bits: with b bits, byte j of word i % b holds
those of input 4 * i + j from bit i // b * b on. INT8's levels are the bytes that the host multiplies best, as
`INT8_OFFSET` says.

A weight matrix [N, K] is stored as panels of `PANEL` output columns, a panel span by span, and in a span the
blocks one after the other: each word for all columns, then the bytes; after the span's last block the halves,
two to a word. So a product reads its weights from the first word to the last. Activations [M, K] are stored
in groups of `GROUP` rows, and a group chunk by chunk: 16 words of each row, which are 16 floats or, for
BFLOAT16 where the machine multiplies these, 32 bfloat16; or, for the integer formats, `INT_CHUNK` words: a
block as int8, its scale, and what undoes the offsets of the weights.

The sizes follow the number of vector registers of the host.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.jit import entry_point, kernel, plain, shared
from pagellm.kernels.simd import (
    INT4_PAIRS,
    INT8_OFFSET,
    LANES,
    PAIR_WORDS,
    absolute,
    broadcast,
    host_has,
    load,
    load_int32,
    maximum,
    nearest,
    reduce_add,
    reduce_max,
    store,
    store_bfloat16,
    store_int8,
    store_int32,
)

(
    FLOAT32, BFLOAT16, INT8, INT4, INT4_MIN, INT5, INT5_MIN, INT4_K, INT5_K, INT6_K, INT3_K, INT2_K, INT2,
    TABLE4, TABLE4_K, INT4_ZERO, INT4_ZERO_32, INT8_ROW, FLOAT8, INT8_127, NF4, FP4, FLOAT4,
) = range(23)  # fmt: skip
BLOCK = 32
K_SPAN = 8  # blocks that share halves in the formats that have bytes, too


class Layout(NamedTuple):
    """How a format stores the blocks of a column; for the float formats its bits are those of a weight."""

    name: str
    low_bits: int  # of the first plane
    high_bits: int = 0  # of the second plane, the upper bits of a level
    num_bytes: int = 0  # of a block
    num_halves: int = 0  # of a span
    span: int = 1  # blocks
    zero: int = 0  # the level of a weight of zero
    float_scale: bool = False  # two halves are one float32
    inputs: int = INT8  # the format whose activations it multiplies


LAYOUTS = (
    Layout("float32", 32, inputs=FLOAT32),
    Layout("bfloat16", 16, inputs=BFLOAT16),
    Layout("int8", 8, num_halves=1, zero=128),
    Layout("int4", 4, num_halves=1, zero=8),
    Layout("int4 with minimum", 4, num_halves=2),
    Layout("int5", 4, 1, num_halves=1, zero=16),
    Layout("int5 with minimum", 4, 1, num_halves=2),
    Layout("int4_k", 4, num_bytes=2, num_halves=2, span=K_SPAN),
    Layout("int5_k", 4, 1, num_bytes=2, num_halves=2, span=K_SPAN),
    Layout("int6_k", 4, 2, num_bytes=2, num_halves=1, span=K_SPAN, zero=32),
    Layout("int3_k", 2, 1, num_bytes=2, num_halves=1, span=K_SPAN, zero=4),
    Layout("int2_k", 2, num_bytes=2, num_halves=2, span=K_SPAN),
    Layout("int2", 2, num_halves=1, span=K_SPAN, zero=1),
    Layout("table4", 4, num_halves=1),
    Layout("table4_k", 4, num_bytes=1, num_halves=1, span=K_SPAN),
    Layout("int4 with zero point", 4, num_bytes=1, num_halves=2, span=4, float_scale=True),
    Layout("int4 with zero point, 32", 4, num_bytes=1, num_halves=2, float_scale=True),
    Layout("int8 by row", 8, num_halves=2, span=8, zero=128, float_scale=True, inputs=INT8_ROW),
    Layout("float8", 8, num_halves=2, span=4, float_scale=True, inputs=FLOAT32),
    Layout("int8 / 127", 8, num_halves=2, span=8, float_scale=True, inputs=FLOAT32),
    Layout("nf4", 4, num_halves=2, span=2, float_scale=True, inputs=FLOAT32),
    Layout("fp4", 4, num_halves=2, span=2, float_scale=True, inputs=FLOAT32),
    Layout("float4", 4, num_bytes=1),
)
# The values of the levels of IQ4_NL and IQ4_XS.
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The doubled values of the floats of 4 bits, E2M1 (Rouhani et al. 2023).
FLOAT4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Those of bitsandbytes' levels: NF4 (Dettmers et al. 2023, appendix E), and its own float of 4 bits.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4_TABLE = tuple(
    float(np.float32(twelfths) / np.float32(12))
    for sign in (1, -1)
    for twelfths in (0.0, *(sign * value for value in (0.0625, 8, 12, 4, 6, 2, 3)))
)
# A level of INT8_127 is one of 127 steps; bitsandbytes multiplies by this.
INT8_STEP = float(np.float32(7.874015718698502e-3))

# What kernels read of the table.
_LOW_BITS = tuple(layout.low_bits for layout in LAYOUTS)
_HIGH_BITS = tuple(layout.high_bits for layout in LAYOUTS)
_NUM_BYTES = tuple(layout.num_bytes for layout in LAYOUTS)
_NUM_HALVES = tuple(layout.num_halves for layout in LAYOUTS)
_SPANS = tuple(layout.span for layout in LAYOUTS)
_SHIFTS = tuple(layout.span.bit_length() - 1 for layout in LAYOUTS)
_ZEROS = tuple(layout.zero for layout in LAYOUTS)
_FLOAT_SCALES = tuple(layout.float_scale for layout in LAYOUTS)
_INPUTS = tuple(layout.inputs for layout in LAYOUTS)

if host_has("avx512f"):  # 32 registers of 16 floats: 24 accumulators
    GROUP, PANEL = 12, 2 * LANES
elif host_has("avx") or host_has("neon"):  # 16 registers of 8 floats, or 32 of 4: 12 or 24 accumulators
    GROUP, PANEL = 6, LANES
else:  # 16 registers of 4 floats: 12 accumulators
    GROUP, PANEL = 3, LANES

CHUNK = 16
INT_CHUNK = 16
# Words of an integer chunk after its 8 words of int8: the scale, and scale * sum of the block and of its
# halves, as floats; and what the sum of the products starts from in each format, as int32.
SCALE, SCALED_SUM, SCALED_FIRST, SCALED_SECOND, START_INT8, START_FIRST, START_SECOND, START_INT4 = range(
    8, 16
)


@shared
def padded(size: int) -> int:
    """`size` output columns rounded up to whole panels."""
    return -(-size // PANEL) * PANEL


@shared
def padded_rows(num_rows: int) -> int:
    """`num_rows` rounded up to whole groups: what a buffer needs, because tiles write whole groups."""
    return -(-num_rows // GROUP) * GROUP


@shared
def num_blocks(K: int) -> int:
    """Blocks of `K` inputs."""
    return -(-K // BLOCK)


@shared
def block_words(format: int) -> int:
    """Words of one block of one output column."""
    return _LOW_BITS[format] + _HIGH_BITS[format]


@shared
def panel_block_words(format: int) -> int:
    """Words of one block of a whole panel, without the halves of its span."""
    return block_words(format) * PANEL + _NUM_BYTES[format] * (PANEL // 4)


@shared
def span_halves(format: int) -> int:
    """Words of the halves of a span of a whole panel."""
    return _NUM_HALVES[format] * (PANEL // 2)


@shared
def has_minima(format: int) -> bool:
    """Whether a weight is its level times a scale, plus a minimum."""
    return _NUM_HALVES[format] == 2 and not _FLOAT_SCALES[format]


@shared
def has_float_scales(format: int) -> bool:
    """Whether a span has a float32, in a word for each column, in the place of halves."""
    return _FLOAT_SCALES[format]


@shared
def inputs_of(format: int) -> int:
    """The format whose packed activations this one multiplies: FLOAT32, BFLOAT16, INT8 or INT8_ROW."""
    return _INPUTS[format]


@shared
def level_of_zero(format: int) -> int:
    """The level of a weight of zero, if the format has no minima."""
    return _ZEROS[format]


@shared
def has_scale_bytes(format: int) -> bool:
    """Whether scales are bytes times a half."""
    return _NUM_BYTES[format] > 0 and not _FLOAT_SCALES[format]


@shared
def span_shift(format: int) -> int:
    """The number of a block's span is the block's, shifted to the right by this."""
    return _SHIFTS[format]


@shared
def block_place(format: int, block: int) -> int:
    """Where in a panel a block begins."""
    return block * panel_block_words(format) + (block >> span_shift(format)) * span_halves(format)


@shared
def halves_place(format: int, block: int) -> int:
    """Where in a panel the halves of a block's span begin."""
    span = block >> span_shift(format)
    return (span + 1) * _SPANS[format] * panel_block_words(format) + span * span_halves(format)


@shared
def panel_words(format: int, K: int) -> int:
    """Words of a panel of `K` inputs; those of a format with spans fill whole spans."""
    spans = -(-num_blocks(K) // _SPANS[format])
    return spans * (_SPANS[format] * panel_block_words(format) + span_halves(format))


@shared
def panels_size(format: int, N: int, K: int) -> int:
    """Words of a packed [N, K] weight matrix."""
    return padded(N) // PANEL * panel_words(format, K)


@shared
def activation_words(format: int, K: int) -> int:
    """Words of one row of `K` packed activations that a matrix of this format multiplies."""
    inputs = inputs_of(format)
    if inputs > BFLOAT16:
        return num_blocks(K) * INT_CHUNK
    return num_blocks(K) * (BLOCK if inputs == FLOAT32 else BLOCK // 2 * PAIR_WORDS)


@shared
def activation_place(word: int) -> int:
    """Where a row's word is, from its first on: the rows of a group take turns, chunk by chunk."""
    return word // CHUNK * (GROUP * CHUNK) + word % CHUNK


def aligned_zeros(num_words: int) -> NDArray[np.float32]:
    """A zeroed float32 buffer that begins on a cache line: a vector that straddles two costs two reads."""
    buffer = np.zeros(num_words + LANES, np.float32)
    skipped = -buffer.ctypes.data % 64 // 4
    return buffer[skipped : skipped + num_words]


class Blocks(NamedTuple):
    """Blocks of weight rows on their way into panels."""

    words: NDArray[np.uint32]  # [N, blocks, block_words]
    bytes: NDArray[np.uint8]  # [N, blocks, bytes of a block]
    halves: NDArray[np.uint16]  # [N, spans, halves of a span]


@entry_point
def pack_blocks(format, words, bytes, halves, first_column, first_block, K, panels, start):
    """Puts blocks of weight rows in their places in panels.

    words, bytes, halves: see `Blocks`; they become output columns from `first_column` on and blocks from
    `first_block` on, whole spans; panels: the buffer as uint32, the matrix [N, K] from word `start` on.
    """
    size = panel_words(format, K)
    for n in range(words.shape[0]):
        base, column = start + (first_column + n) // PANEL * size, (first_column + n) % PANEL
        for block in range(words.shape[1]):
            at = base + block_place(format, first_block + block)
            for i in range(words.shape[2]):
                panels[at + i * PANEL + column] = words[n, block, i]
            at += words.shape[2] * PANEL
            for i in range(bytes.shape[2]):
                word, shift = at + i * (PANEL // 4) + column // 4, np.uint32(8 * (column % 4))
                kept = panels[word] & ~(np.uint32(0xFF) << shift)
                panels[word] = kept | (np.uint32(bytes[n, block, i]) << shift)
        for span in range(halves.shape[1]):
            at = base + halves_place(format, first_block + (span << span_shift(format)))
            if has_float_scales(format):
                panels[at + column] = np.uint32(halves[n, span, 0]) | (np.uint32(halves[n, span, 1]) << 16)
                continue
            for i in range(halves.shape[2]):
                word, shift = at + i * (PANEL // 2) + column // 2, np.uint32(16 * (column % 2))
                kept = panels[word] & ~(np.uint32(0xFFFF) << shift)
                panels[word] = kept | (np.uint32(halves[n, span, i]) << shift)


@kernel
def _float16_at(panels, at, column):
    """The float16 of an output column in a row [PANEL] of them that begins at word `at`."""
    bits = (load_int32(panels, at + column // 2) >> (16 * (column % 2))) & 0xFFFF
    exponent, mantissa = (bits >> 10) & 31, bits & 1023
    magnitude = np.float32(mantissa) * np.float32(2.0**-24)
    if exponent > 0:
        magnitude = np.float32(mantissa + 1024) * np.float32(2.0 ** (exponent - 25))
    return -magnitude if bits & 0x8000 else magnitude


@kernel
def _byte_at(panels, at, column):
    """The signed byte of an output column in a row [PANEL] of them that begins at word `at`."""
    byte = (load_int32(panels, at + column // 4) >> (8 * (column % 4))) & 0xFF
    return (byte ^ 0x80) - 0x80


@kernel
def _bits_at(num_bits, panels, at, i):
    """What a plane of `num_bits` bits, of the output column at word `at`, has for input `i` of a block."""
    word = load_int32(panels, at + i // 4 % num_bits * PANEL)
    return (word >> (8 * (i % 4) + i // 4 // num_bits * num_bits)) & ((1 << num_bits) - 1)


@kernel
def _scale_at(format, panels, panel, block, half, column):
    """The (scale, minimum) of half a block of an output column, of the panel at word `panel`."""
    halves = panel + halves_place(format, block)
    if has_float_scales(format):
        return panels[halves + column], np.float32(0.0)
    if format == FLOAT4:
        exponent = _byte_at(panels, panel + block_place(format, block) + block_words(format) * PANEL, column)
        return np.float32(2.0 ** ((exponent & 0xFF) - 128)), np.float32(0.0)
    scale, minimum = _float16_at(panels, halves, column), np.float32(0.0)
    if has_minima(format):
        minimum = _float16_at(panels, halves + PANEL // 2, column)
    if has_scale_bytes(format):
        bytes = panel + block_place(format, block) + block_words(format) * PANEL
        first = _byte_at(panels, bytes, column)
        if format in (INT4_K, INT5_K):
            second = _byte_at(panels, bytes + PANEL // 4, column)
            return scale * np.float32(first), -(minimum * np.float32(second))
        if half == 1 and format != TABLE4_K:
            first = _byte_at(panels, bytes + PANEL // 4, column)
        if format == INT2_K:
            return scale * np.float32(first & 15), -(minimum * np.float32((first >> 4) & 15))
        scale *= np.float32(first)
    return scale, minimum


@kernel
def _float_of(format, level):
    """What a level of a format stands for that becomes floats before it is multiplied."""
    if format == NF4:
        return np.float32(NF4_TABLE[level])
    if format == FP4:
        return np.float32(FP4_TABLE[level])
    if format == INT8_127:
        return np.float32((level ^ 0x80) - 0x80)
    exponent, mantissa = (level >> 3) & 15, level & 7
    magnitude = np.float32(mantissa) * np.float32(2.0**-9)
    if exponent > 0:
        magnitude = np.float32(mantissa + 8) * np.float32(2.0 ** (exponent - 10))
    return -magnitude if level & 0x80 else magnitude


@kernel
def unpack_column(format, panels, start, K, column, out, out_start):
    """Writes one output column (a row of the weight matrix) as floats to `out[out_start : + K]`."""
    position, low, high = column % PANEL, _LOW_BITS[format], _HIGH_BITS[format]
    panel = start + column // PANEL * panel_words(format, K)
    scale = minimum = np.float32(0.0)
    for k in range(K):
        block, i = k // BLOCK, k % BLOCK
        at = panel + block_place(format, block) + position
        if format == FLOAT32:
            out[out_start + k] = panels[at + i * PANEL]
            continue
        if format == BFLOAT16:
            store_int32(out, out_start + k, (load_int32(panels, at + i // 2 * PANEL) >> (16 * (i % 2))) << 16)
            continue
        if i % 16 == 0:
            scale, minimum = _scale_at(format, panels, panel, block, i // 16, position)
        level = _bits_at(low, panels, at, i)
        if high > 0:
            level |= _bits_at(high, panels, at + low * PANEL, i) << low
        if inputs_of(format) == FLOAT32:
            out[out_start + k] = _float_of(format, level) * scale
            if format == INT8_127:
                out[out_start + k] *= np.float32(INT8_STEP)
            continue
        if format in (INT8, INT8_ROW):
            level ^= 128 ^ INT8_OFFSET
        elif format in (INT4_ZERO, INT4_ZERO_32):
            level -= _byte_at(panels, at - position + block_words(format) * PANEL, position)
        elif format in (TABLE4, TABLE4_K):
            level = TABLE[level]
        elif format == FLOAT4:
            level = FLOAT4_TABLE[level]
        value = np.float32(level - _ZEROS[format]) * scale
        out[out_start + k] = value + minimum if has_minima(format) else value


@shared
def start_int4(total: int) -> np.int32:
    """What `dot_int4` starts from to take 8 from each weight: -8 * `total`, the sum of a block's inputs.

    As two halves it never leaves an int16: of 32 inputs x of at most 127, half a lane adds up (w - 4) * x of
    its own and -4 * x of the others, at most 16 * 127 * (11 + 4).
    """
    if INT4_PAIRS:
        return np.int32((-4 * total << 16) | (-4 * total & 0xFFFF))
    return np.int32(-8 * total)


@kernel
def _pack_int8(source, i, packed, at):
    """A block `source[i : i + BLOCK]` as int8, q = round(x * 127 / max |x|), and a scale: INT_CHUNK words."""
    first, second = load(source, i), load(source, i + LANES)
    greatest = reduce_max(maximum(absolute(first), absolute(second)))
    # Comparisons pass over a NaN, and an infinity has no scale: both must reach the result.
    zero = broadcast(np.float32(0.0))
    broken = reduce_add(first * zero + second * zero)
    inverse = np.float32(127.0) / greatest if greatest > np.float32(1e-30) else np.float32(0.0)
    scale = greatest * np.float32(1.0 / 127.0) + broken
    first, second = nearest(first * broadcast(inverse)), nearest(second * broadcast(inverse))
    store_int8(packed, at, first)
    store_int8(packed, at + LANES // 4, second)
    sum_first, sum_second = reduce_add(first), reduce_add(second)
    packed[at + SCALE] = scale
    packed[at + SCALED_SUM] = scale * (sum_first + sum_second)
    packed[at + SCALED_FIRST] = scale * sum_first
    packed[at + SCALED_SECOND] = scale * sum_second
    int_first, int_second = np.int32(sum_first), np.int32(sum_second)
    store_int32(packed, at + START_INT8, np.int32(-INT8_OFFSET * (int_first + int_second)))
    store_int32(packed, at + START_FIRST, np.int32(-INT8_OFFSET * int_first))
    store_int32(packed, at + START_SECOND, np.int32(-INT8_OFFSET * int_second))
    store_int32(packed, at + START_INT4, start_int4(int_first + int_second))


@kernel
def _pack_int8_row(source, start, blocks, packed, at):
    """Whole blocks from `start` on as int8 of one scale; that, and where the sums start, are in the first."""
    zero = broadcast(np.float32(0.0))
    magnitudes, broken = zero, zero
    for i in range(start, start + blocks * BLOCK, LANES):
        magnitudes = maximum(magnitudes, absolute(load(source, i)))
        broken = broken + load(source, i) * zero  # as in `_pack_int8`
    greatest = reduce_max(magnitudes)
    inverse = np.float32(127.0) / greatest if greatest > np.float32(1e-30) else np.float32(0.0)
    packed[at + SCALE] = greatest * np.float32(1.0 / 127.0) + reduce_add(broken)
    total, place = np.int32(0), at
    for i in range(start, start + blocks * BLOCK, BLOCK):
        first = nearest(load(source, i) * broadcast(inverse))
        second = nearest(load(source, i + LANES) * broadcast(inverse))
        store_int8(packed, place, first)
        store_int8(packed, place + LANES // 4, second)
        total += np.int32(reduce_add(first) + reduce_add(second))
        place += GROUP * INT_CHUNK
    store_int32(packed, at + START_INT8, np.int32(-INT8_OFFSET * total))


@kernel
def pack_row(format, source, source_start, K, row, packed, packed_start):
    """Puts `source[source_start : + K]` in its place as row `row` of the activations at `packed_start`.

    The source is overwritten with zeros behind its K floats, up to a whole block.
    """
    for k in range(K, num_blocks(K) * BLOCK):
        source[source_start + k] = 0.0
    at = packed_start + row // GROUP * GROUP * activation_words(format, K)
    inputs = inputs_of(format)
    if inputs == FLOAT32 or (inputs == BFLOAT16 and PAIR_WORDS == 2):
        at += row % GROUP * CHUNK
        for k in range(0, num_blocks(K) * BLOCK, CHUNK):
            store(packed, at, load(source, source_start + k))
            at += GROUP * CHUNK
    elif inputs == BFLOAT16:
        at += row % GROUP * CHUNK
        for k in range(0, num_blocks(K) * BLOCK, BLOCK):
            store_bfloat16(packed, at, load(source, source_start + k))
            store_bfloat16(packed, at + LANES // 2, load(source, source_start + k + LANES))
            at += GROUP * CHUNK
    elif inputs == INT8_ROW:
        _pack_int8_row(source, source_start, num_blocks(K), packed, at + row % GROUP * INT_CHUNK)
    else:
        at += row % GROUP * INT_CHUNK
        for k in range(0, num_blocks(K) * BLOCK, BLOCK):
            _pack_int8(source, source_start + k, packed, at)
            at += GROUP * INT_CHUNK


@kernel
def pack_inputs(part, values, source, K, row, packed):
    """Packs `source[:K]` for a matrix, whose inputs may have an order of their own: see `pack_row`.

    part: the matrix's place in the weights' buffer `values`, as kernels.architecture has it. Behind the K
    floats, up to a whole block, the source needs room for as many again.
    """
    start = plain(0)
    if part.order >= 0:
        start = num_blocks(K) * BLOCK
        for k in range(K):
            source[start + k] = source[load_int32(values, part.order + k)]
    pack_row(part.format, source, start, K, row, packed, plain(0))
