"""The layouts that the kernels read: weights in panels, activations in row groups, for every format.

Everything is counted in words of 4 bytes in float32 arrays, and inputs (the K of a product) in blocks of
`BLOCK`; a last block is filled up with zeros. A block of `BLOCK` inputs of one output column is so many words
in a row, and in the formats that have them a float16 scale and a float16 minimum:

    FLOAT32   32 words, one input each
    BFLOAT16  16 words, a pair of inputs each
    INT8       8 words, four inputs as q + INT8_OFFSET              w = scale * q          (GGUF's Q8_0)
    INT4       4 words, byte i holds inputs i and i + 16            w = scale * (q - 8)    (GGUF's Q4_0)
    INT4_MIN   4 words, likewise                                    w = scale * q + min    (GGUF's Q4_1)

A weight matrix [N, K] is stored as panels of `PANEL` output columns, and a panel block by block: each word of
the block for all columns, then the scales and then the minima, two to a word. So a product reads its weights
from the first word to the last. Activations [M, K] are stored in groups of `GROUP` rows, and a group chunk by
chunk: 16 words of each row, which are 16 floats or, for BFLOAT16 where the machine multiplies these,
32 bfloat16; or, for the integer formats, `INT_CHUNK` words: a block as int8, its scale, and what undoes the
offsets of the weights.

The sizes follow the number of vector registers of the host.
"""

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.jit import entry_point, kernel, shared
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

FLOAT32, BFLOAT16, INT8, INT4, INT4_MIN = range(5)
BLOCK = 32

if host_has("avx512f"):  # 32 registers of 16 floats: 24 accumulators
    GROUP, PANEL = 12, 2 * LANES
elif host_has("avx") or host_has("neon"):  # 16 registers of 8 floats, or 32 of 4: 12 or 24 accumulators
    GROUP, PANEL = 6, LANES
else:  # 16 registers of 4 floats: 12 accumulators
    GROUP, PANEL = 3, LANES

CHUNK = 16
INT_CHUNK = 13
# Words of an integer chunk after its 8 words of int8: the scale and scale * sum as floats, and what the sum
# of the products starts from in each format, as int32.
SCALE, SCALED_SUM, START_INT8, START_INT4, START_ZERO = range(8, 13)


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
    """Words of one block of one output column, scales and minima apart."""
    if format == FLOAT32:
        return BLOCK
    if format == BFLOAT16:
        return BLOCK // 2
    return BLOCK // 4 if format == INT8 else BLOCK // 8


@shared
def block_halves(format: int) -> int:
    """Scales and minima of one block of one output column, float16 each."""
    if format <= BFLOAT16:
        return 0
    return 2 if format == INT4_MIN else 1


@shared
def panel_block_words(format: int) -> int:
    """Words of one block of a whole panel."""
    return block_words(format) * PANEL + block_halves(format) * (PANEL // 2)


@shared
def panels_size(format: int, N: int, K: int) -> int:
    """Words of a packed [N, K] weight matrix."""
    return padded(N) // PANEL * num_blocks(K) * panel_block_words(format)


@shared
def activation_words(format: int, K: int) -> int:
    """Words of one row of `K` packed activations that a matrix of this format multiplies."""
    if format > BFLOAT16:
        return num_blocks(K) * INT_CHUNK
    return num_blocks(K) * (BLOCK if format == FLOAT32 else BLOCK // 2 * PAIR_WORDS)


@shared
def activation_place(word: int) -> int:
    """Where a row's word is, from its first on: the rows of a group take turns, chunk by chunk."""
    return word // CHUNK * (GROUP * CHUNK) + word % CHUNK


def aligned_zeros(num_words: int) -> NDArray[np.float32]:
    """A zeroed float32 buffer that begins on a cache line: a vector that straddles two costs two reads."""
    buffer = np.zeros(num_words + LANES, np.float32)
    skipped = -buffer.ctypes.data % 64 // 4
    return buffer[skipped : skipped + num_words]


Blocks = tuple[NDArray[np.uint32], NDArray[np.uint16]]  # words [N, blocks, ...] and halves [N, blocks, ...]


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def encode(format: int, weights: NDArray[np.float32]) -> Blocks:
    """Weight rows [N, K] as blocks of a format, each value rounded to the nearest that the format has.

    INT8 and INT4 scale a block by its greatest magnitude, INT4_MIN spreads it from its least to its greatest
    value, as GGUF's Q8_0, Q4_0 and Q4_1 do. A block that float16 cannot scale gets an infinite scale.
    """
    N, K = weights.shape
    if K % BLOCK:
        weights = np.pad(weights, ((0, 0), (0, -K % BLOCK)))
    blocks = np.ascontiguousarray(weights, np.float32).reshape(N, -1, BLOCK)
    no_halves = np.zeros((*blocks.shape[:2], 0), np.uint16)
    if format == FLOAT32:
        return blocks.view(np.uint32), no_halves
    if format == BFLOAT16:
        bits = blocks.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        shorts = np.where(np.isnan(blocks), 0x7FC0, rounded).astype(np.uint16)
        return shorts.view(np.uint32), no_halves
    if format == INT4_MIN:
        least = blocks.min(axis=2).astype(np.float16)
        scale = ((blocks.max(axis=2) - least) / 15).astype(np.float16)
        halves = np.stack([scale, least], axis=2).view(np.uint16)
        shifted, offset, highest = blocks - least[..., None].astype(np.float32), 0, 15
    elif format == INT4:
        # The value of greatest magnitude becomes -8 exactly, whatever its sign.
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
        scale = (extreme[..., 0] / -8).astype(np.float16)
        halves = scale[..., None].view(np.uint16)
        shifted, offset, highest = blocks, 8, 15
    else:
        scale = (np.abs(blocks).max(axis=2) / 127).astype(np.float16)
        halves = scale[..., None].view(np.uint16)
        shifted, offset, highest = blocks, 128, 255
    inverse = np.where(scale == 0, np.float32(0), 1 / scale.astype(np.float32))
    levels = np.rint(shifted * inverse[..., None]) + np.float32(offset)
    quants = levels.clip(0, highest).astype(np.uint8)
    if format == INT8:
        quants ^= np.uint8(128 ^ INT8_OFFSET)
    else:
        quants = quants[..., : BLOCK // 2] | (quants[..., BLOCK // 2 :] << 4)
    return np.ascontiguousarray(quants).view(np.uint32), halves


def from_gguf(dtype: str, format: int, raw: NDArray[np.uint8]) -> Blocks:
    """Blocks of a GGUF tensor, [N, blocks, bytes] of type Q8_0, Q4_0 or Q4_1, in ours: not a value changes.

    INT4_MIN also takes Q4_0, whose minimum is -8 * scale.
    """
    num_halves = 2 if dtype == "Q4_1" else 1
    halves = np.ascontiguousarray(raw[..., : 2 * num_halves]).view(np.uint16)
    words = np.ascontiguousarray(raw[..., 2 * num_halves :]).view(np.uint32)
    if dtype == "Q8_0":
        words = words ^ np.uint32(INT8_OFFSET * 0x01010101)
    elif dtype == "Q4_0" and format == INT4_MIN:
        least = halves.view(np.float16) * np.float16(-8)
        halves = np.concatenate([halves, least.view(np.uint16)], axis=2)
    return words, halves


@entry_point
def pack_blocks(words, halves, first_column, first_block, K_blocks, panels, start):
    """Puts blocks of weight rows in their places in panels.

    words: uint32 [columns, blocks, block_words]; halves: uint16 [columns, blocks, block_halves]; they become
    output columns from `first_column` on and blocks from `first_block` on, of `K_blocks`; panels: the buffer
    as uint32, the matrix from word `start` on.
    """
    num_words, num_halves = words.shape[2], halves.shape[2]
    block_size = num_words * PANEL + num_halves * (PANEL // 2)
    for n in range(words.shape[0]):
        panel, column = (first_column + n) // PANEL, (first_column + n) % PANEL
        for block in range(words.shape[1]):
            base = start + (panel * K_blocks + first_block + block) * block_size
            for i in range(num_words):
                panels[base + i * PANEL + column] = words[n, block, i]
            for i in range(num_halves):
                at = base + num_words * PANEL + i * (PANEL // 2) + column // 2
                shift = np.uint32(16 * (column % 2))
                kept = panels[at] & ~(np.uint32(0xFFFF) << shift)
                panels[at] = kept | (np.uint32(halves[n, block, i]) << shift)


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
def unpack_column(format, panels, start, K, column, out, out_start):
    """Writes one output column (a row of the weight matrix) as floats to `out[out_start : + K]`."""
    words = block_words(format)
    position = column % PANEL
    base = start + column // PANEL * num_blocks(K) * panel_block_words(format) + position
    for k in range(K):
        block, i = k // BLOCK, k % BLOCK
        at = base + block * panel_block_words(format)
        halves = at - position + words * PANEL
        if format == FLOAT32:
            value = panels[at + i * PANEL]
        elif format == BFLOAT16:
            store_int32(out, out_start + k, (load_int32(panels, at + i // 2 * PANEL) >> (16 * (i % 2))) << 16)
            continue
        elif format == INT8:
            byte = (load_int32(panels, at + i // 4 * PANEL) >> (8 * (i % 4))) & 0xFF
            value = np.float32((byte ^ 128 ^ INT8_OFFSET) - 128) * _float16_at(panels, halves, position)
        else:
            byte = (load_int32(panels, at + i % 16 // 4 * PANEL) >> (8 * (i % 4) + 4 * (i // 16))) & 0x0F
            if format == INT4:
                value = np.float32(byte - 8) * _float16_at(panels, halves, position)
            else:
                least = _float16_at(panels, halves + PANEL // 2, position)
                value = np.float32(byte) * _float16_at(panels, halves, position) + least
        out[out_start + k] = value


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
    total = reduce_add(first + second)
    packed[at + SCALE] = scale
    packed[at + SCALED_SUM] = scale * total
    store_int32(packed, at + START_INT8, np.int32(total * np.float32(-128.0)))
    store_int32(packed, at + START_INT4, start_int4(np.int32(total)))
    store_int32(packed, at + START_ZERO, np.int32(0))


@kernel
def pack_row(format, source, source_start, K, row, packed, packed_start):
    """Puts `source[source_start : + K]` in its place as row `row` of the activations at `packed_start`.

    The source is overwritten with zeros behind its K floats, up to a whole block.
    """
    for k in range(K, num_blocks(K) * BLOCK):
        source[source_start + k] = 0.0
    at = packed_start + row // GROUP * GROUP * activation_words(format, K)
    if format == FLOAT32 or (format == BFLOAT16 and PAIR_WORDS == 2):
        at += row % GROUP * CHUNK
        for k in range(0, num_blocks(K) * BLOCK, CHUNK):
            store(packed, at, load(source, source_start + k))
            at += GROUP * CHUNK
    elif format == BFLOAT16:
        at += row % GROUP * CHUNK
        for k in range(0, num_blocks(K) * BLOCK, BLOCK):
            store_bfloat16(packed, at, load(source, source_start + k))
            store_bfloat16(packed, at + LANES // 2, load(source, source_start + k + LANES))
            at += GROUP * CHUNK
    else:
        at += row % GROUP * INT_CHUNK
        for k in range(0, num_blocks(K) * BLOCK, BLOCK):
            _pack_int8(source, source_start + k, packed, at)
            at += GROUP * INT_CHUNK
