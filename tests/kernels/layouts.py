"""Plain matrices to the kernels' packed layouts and back, slowly: what the kernels' tests share."""

import numpy as np
from numpy.typing import NDArray

from kernels.packing import GROUP, PANEL, TILE_HEIGHTS, pack_columns, padded, padded_rows, panels_size

Matrix = NDArray[np.float32]


def random_matrix(rng: np.random.Generator, *shape: int) -> Matrix:
    return rng.standard_normal(shape).astype(np.float32)


def heights_of_groups(num_rows: int) -> list[int]:
    """The heights of the groups that so many rows of activations are packed into."""
    whole, rest = divmod(num_rows, GROUP)
    return [GROUP] * whole + [min(h for h in TILE_HEIGHTS if h >= rest)] * (rest > 0)


def packed_rows(rows: Matrix, unused: float = np.nan) -> Matrix:
    """Rows [M, K] as packed activations; what belongs to no row is filled with `unused`."""
    num_rows, size = rows.shape
    packed = np.full(padded_rows(num_rows) * size, unused, np.float32)
    for group, height in enumerate(heights_of_groups(num_rows)):
        first = group * GROUP
        tile = packed[first * size : (first + height) * size].reshape(size, height)
        members = rows[first : first + height]
        tile[:, : len(members)] = members.T
    return packed


def unpacked_rows(packed: Matrix, num_rows: int, size: int) -> Matrix:
    """The rows [M, K] of packed activations."""
    rows = []
    for group, height in enumerate(heights_of_groups(num_rows)):
        first = group * GROUP
        rows.append(packed[first * size : (first + height) * size].reshape(size, height).T)
    return np.concatenate(rows)[:num_rows]


def packed_weights(weights: Matrix, bias: Matrix) -> tuple[Matrix, int, int]:
    """One buffer with the panels of [N, K] and a bias [N] somewhere inside, and where the two begin."""
    num_outputs, size = weights.shape
    start, bias_start = 16, 16 + panels_size(num_outputs, size) + 16
    values = np.full(bias_start + padded(num_outputs), np.nan, np.float32)
    values[start : start + panels_size(num_outputs, size)] = 0.0
    values[bias_start:] = 0.0
    pack_columns(weights, 0, values, start)
    values[bias_start : bias_start + num_outputs] = bias
    return values, start, bias_start


def whole_panels(num_columns: int) -> int:
    return -(-num_columns // PANEL) * PANEL


def as_matrix(panels: Matrix, N: int, K: int) -> Matrix:
    """The packed panels of a weight matrix as the plain matrix [N, K]."""
    by_panel = panels.reshape(-1, K, PANEL).transpose(0, 2, 1)
    return np.ascontiguousarray(by_panel.reshape(-1, K)[:N])
