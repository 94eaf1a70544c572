"""What the machine can do at most: memory read bandwidth and arithmetic, measured with all usable cores.

The arithmetic is that of a register tile which keeps multiplying the same few operands, so that hardly
anything but the multiply-adds takes time. It is built from the operations of kernels.simd and run by
kernels.threads, and knows nothing of the engine's layouts, tilings and products, which are held against it.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from pagellm.engine.config import usable_cores
from pagellm.kernels.jit import entry_point
from pagellm.kernels.packing import aligned_zeros
from pagellm.kernels.simd import (
    LANES,
    add_scaled,
    dot_bfloat16,
    dot_int4,
    dot_int8,
    host_has,
    outer_product,
    start_int_tile,
    start_tile,
    write_tile,
)
from pagellm.kernels.threads import ThreadTeam, barrier, new_counters, share_call

READ_BYTES = 1 << 30  # far beyond every cache
PASSES = 11  # over that: enough for the operating system to have spread the threads over the cores
STEPS = 1_000_000  # of a tile in one measurement: some milliseconds
MEASUREMENTS = 25

# All operands stay in registers beside the accumulators, of which there are enough to hide a multiply-add's
# latency. Twelve rows, as the engine's own tiles have, would leave no registers for their factors.
if host_has("avx512f"):
    ROWS, VECTORS = 8, 2
elif host_has("avx") or host_has("neon"):
    ROWS, VECTORS = 4, 1
else:
    ROWS, VECTORS = 2, 1


def bandwidth_gb_s() -> float:
    """Memory read bandwidth in GB/s: the best of several passes over a large array, a part for each core.

    On a shared machine it may change within seconds: measure it beside whatever is held against it.
    """
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), usable_cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        return READ_BYTES / 1e9 / _best(PASSES, lambda: list(pool.map(_read, parts)))


def peak_gops(format: str) -> float:
    """Arithmetic in 1e9 operations a second, a multiply-add counted as two.

    format: "float32", "bf16", "int8" or "int4"; four bits are multiplied as eight. The sums of products are
    float32 for the first two and int32 for the others: whatever a format's scales cost comes on top.
    """
    loop, products = _PEAK_LOOPS[format]
    operands = aligned_zeros((ROWS + VECTORS) * LANES)
    out = aligned_zeros(usable_cores() * ROWS * VECTORS * LANES)
    team = ThreadTeam(usable_cores())
    counters = new_counters()
    seconds = _best(MEASUREMENTS, lambda: team.run(loop, STEPS, operands, out, counters))
    team.close()
    operations = 2 * products * ROWS * VECTORS * LANES * STEPS * usable_cores()
    return operations / 1e9 / seconds


def _best(repeats: int, call: Callable[[], object]) -> float:
    """The seconds of the quickest of several calls after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@numba.njit("int64(int64[::1])", nogil=True)
def _read(words):  # type: ignore[no-untyped-def]
    """Every word once, in four streams at a time: what the prefetchers serve best."""
    quarter = len(words) // 4
    a = b = c = d = 0
    for i in range(quarter):
        a ^= words[i]
        b ^= words[i + quarter]
        c ^= words[i + 2 * quarter]
        d ^= words[i + 3 * quarter]
    return a ^ b ^ c ^ d


# The rows' factors are the first words of `x`, one a row; the columns' vectors lie behind.
_W_AT = ROWS * LANES


@entry_point
def _float32_loop(thread, mailbox, steps, x, out, counters):  # type: ignore[no-untyped-def]
    num_threads = share_call(thread, mailbox)
    tile = start_tile(ROWS, VECTORS, x, 0)
    for _ in range(steps):
        tile = outer_product(tile, ROWS, x, 0, 1, x, _W_AT)
    write_tile(tile, ROWS, out, thread * ROWS * VECTORS * LANES, VECTORS * LANES, False)
    barrier(counters, num_threads)


@entry_point
def _bfloat16_loop(thread, mailbox, steps, x, out, counters):  # type: ignore[no-untyped-def]
    num_threads = share_call(thread, mailbox)
    tile = start_tile(ROWS, VECTORS, x, 0)
    for _ in range(steps):
        tile = dot_bfloat16(tile, ROWS, x, 0, 1, x, _W_AT)
    write_tile(tile, ROWS, out, thread * ROWS * VECTORS * LANES, VECTORS * LANES, False)
    barrier(counters, num_threads)


def _int_loop(product):  # type: ignore[no-untyped-def]
    """With other factors in every step: sums of the same integers would be multiplied out by the compiler."""

    @entry_point
    def loop(thread, mailbox, steps, x, out, counters):  # type: ignore[no-untyped-def]
        num_threads = share_call(thread, mailbox)
        ints = start_int_tile(ROWS, VECTORS, x, 0, 1)
        for step in range(steps):
            ints = product(ints, ROWS, x, step % ROWS, 1, x, _W_AT)
        tile = add_scaled(start_tile(ROWS, VECTORS, x, 0), ints, ROWS, x, 0, 1, x, _W_AT)
        write_tile(tile, ROWS, out, thread * ROWS * VECTORS * LANES, VECTORS * LANES, False)
        barrier(counters, num_threads)

    return loop


# What runs a format's loop, and the products of one lane in one step.
_PEAK_LOOPS = {
    "float32": (_float32_loop, 1),
    "bf16": (_bfloat16_loop, 2),
    "int8": (_int_loop(dot_int8), 4),
    "int4": (_int_loop(dot_int4), 8),
}
