"""The layouts that the kernels read: weights in panels, activations in row groups.

A weight matrix [N, K] is stored as panels of `PANEL` output columns, [ceil(N / PANEL), K, PANEL], so that one
step along K is one contiguous read; the last panel is filled up with zeros. Activations [M, K] are stored as
groups of `GROUP` rows, [K, GROUP] each; a last group of fewer rows has the height of the smallest tile that
holds them. The sizes follow the number of vector registers of the host.
"""

from kernels.jit import entry_point, kernel, shared
from kernels.simd import LANES, host_has

if host_has("avx512f"):  # 32 registers of 16 floats: 24 accumulators
    GROUP, PANEL = 12, 2 * LANES
elif host_has("avx") or host_has("neon"):  # 16 registers of 8 floats, or 32 of 4: 12 or 24 accumulators
    GROUP, PANEL = 6, LANES
else:  # 16 registers of 4 floats: 12 accumulators
    GROUP, PANEL = 3, LANES

TILE_HEIGHTS = (*(height for height in (1, 2, 3, 4, 6, 8) if height < GROUP), GROUP)


@shared
def padded(size: int) -> int:
    """`size` rounded up to whole panels."""
    return -(-size // PANEL) * PANEL


@shared
def padded_rows(num_rows: int) -> int:
    """`num_rows` rounded up to whole groups: what a buffer needs, because tiles write whole groups."""
    return -(-num_rows // GROUP) * GROUP


@kernel
def tile_height(num_rows):
    """The height of the smallest tile that holds `num_rows` (1 to GROUP) rows."""
    for height in TILE_HEIGHTS:
        if num_rows <= height:
            return height
    return GROUP


@kernel
def group_height(num_rows, group):
    """The height of row group number `group` of `num_rows` rows."""
    return tile_height(min(GROUP, num_rows - group * GROUP))


@entry_point
def pack_columns(rows, first_column, panels, start):
    """Writes weight rows [n, K] as output columns from `first_column` on of the panels at `panels[start]`."""
    num_columns, K = rows.shape
    for n in range(num_columns):
        column = first_column + n
        base = start + (column // PANEL) * K * PANEL + column % PANEL
        for k in range(K):
            panels[base + k * PANEL] = rows[n, k]


@entry_point
def pack_inputs(rows, first_input, K, panels, start):
    """Like `pack_columns` for a matrix stored as [K, N]: `rows` are its inputs from `first_input` on."""
    num_inputs, N = rows.shape
    for i in range(num_inputs):
        base = start + (first_input + i) * PANEL
        for n in range(N):
            panels[base + (n // PANEL) * K * PANEL + n % PANEL] = rows[i, n]


@kernel
def unpack_column(panels, start, K, column, out, out_start):
    """Copies one output column (a row of the weight matrix) of the panels to `out[out_start : + K]`."""
    base = start + (column // PANEL) * K * PANEL + column % PANEL
    for k in range(K):
        out[out_start + k] = panels[base + k * PANEL]


@kernel
def pack_row(source, source_start, K, row, num_rows, packed):
    """Copies `source[source_start : + K]` to its place as activation row `row` of `num_rows`."""
    group = row // GROUP
    height = group_height(num_rows, group)
    base = group * GROUP * K + row % GROUP
    for k in range(K):
        packed[base + k * height] = source[source_start + k]


def panels_size(N: int, K: int) -> int:
    """The number of floats of a packed [N, K] weight matrix."""
    return padded(N) * K
