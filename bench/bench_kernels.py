"""Kernels against the machine: float32 matmul beside NumPy's BLAS on the same shapes in the same run.

Run: python -m pytest bench/bench_kernels.py --benchmark-group-by=param:shape --benchmark-columns=median,ops
"""

import numpy as np
import pytest

from engine.config import usable_cores
from kernels.jit import entry_point
from kernels.matmul import matmul
from kernels.packing import pack_columns, pack_row, padded, padded_rows, panels_size
from kernels.threads import ThreadTeam, barrier, new_counters

# (M, N, K) of SmolLM2-135M's layers: tokens, outputs, inputs.
SHAPES = [(1, 3072, 576), (16, 3072, 576), (512, 960, 576), (512, 3072, 576), (512, 576, 1536)]


@entry_point
def multiply(thread, num_threads, counters, x, M, K, weights, bias, N, out):
    matmul(counters, x, M, K, weights, 0, bias, N, out, False)
    barrier(counters, num_threads)


@entry_point
def pack(x, packed):
    for row in range(x.shape[0]):
        pack_row(x[row], 0, x.shape[1], row, x.shape[0], packed)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_pagellm(benchmark, shape):
    M, N, K = shape
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((N, K), np.float32)
    weights = np.zeros(panels_size(N, K) + padded(N), np.float32)
    pack_columns(w, 0, weights, 0)
    packed = np.zeros(padded_rows(M) * K, np.float32)
    pack(x, packed)
    out = np.zeros(padded_rows(M) * padded(N), np.float32)
    team = ThreadTeam(usable_cores())
    arguments = (new_counters(), packed, M, K, weights, panels_size(N, K), N, out)
    benchmark(team.run, multiply, *arguments)
    team.close()
    np.testing.assert_allclose(out.reshape(-1, padded(N))[:M, :N], x @ w.T, atol=1e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_blas(benchmark, shape):
    M, N, K = shape
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
    out = np.zeros((M, N), np.float32)
    benchmark(np.matmul, x, w, out=out)
