"""Kernels by themselves, beside what the machine and NumPy's BLAS do in the same run.

Products: every format at transformer shapes; float32 and OpenBLAS take turns on the same matrices, and the
ratio is of medians over the rounds. Both multiply what is at hand: weights and activations in the order that
each wants (ours are packed, in the engine by whoever wrote them).

Attention: a decode over a long context as a share of the time that memory needs for its keys and values, and
what a token of a prompt costs from 512 tokens to 8,192, chunk by chunk as the engine does it.

Run: python bench/bench_kernels.py [--json].
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from numpy.typing import NDArray

from bench.machine import bandwidth_gb_s, peak_gops
from pagellm.engine.config import usable_cores
from pagellm.kernels.activation import SILU
from pagellm.kernels.architecture import Architecture, layer_rows
from pagellm.kernels.attention import KEY_CHUNK
from pagellm.kernels.buffers import Batch, new_cache, new_plan, new_workspace
from pagellm.kernels.encoding import encode
from pagellm.kernels.jit import entry_point
from pagellm.kernels.kv_cache import token_words
from pagellm.kernels.matmul import matmul, scratch_size
from pagellm.kernels.packing import (
    BFLOAT16,
    BLOCK,
    FLOAT32,
    INT4,
    INT4_MIN,
    INT8,
    PANEL,
    activation_words,
    aligned_zeros,
    num_blocks,
    pack_blocks,
    pack_row,
    padded,
    padded_rows,
    panel_words,
    panels_size,
)
from pagellm.kernels.phases import Member, attend, plan_batch
from pagellm.kernels.threads import ThreadTeam, barrier, new_counters, share_call

FORMATS = {"float32": FLOAT32, "bf16": BFLOAT16, "int8": INT8, "int4": INT4_MIN, "int4, Q4_0": INT4}
CACHE_FORMATS = {"float32": FLOAT32, "bf16": BFLOAT16}

# M tokens by (N outputs, K inputs).
TOKENS = (16, 64, 256, 512, 2048)
MATRICES = ((576, 576), (960, 576), (3072, 576), (576, 1536), (1536, 1536), (3072, 3072))
PEAKS = ("float32", "bf16", "int8", "int4")  # those that the machine is measured in
CONTEXT, BATCH = 4096, 8
BLOCK_SIZE = 16
CHUNK = 512  # tokens of a prompt in one step
LONGEST_PROMPT = 8192
# Layers whose KV a decode reads in turn, so that no cache holds any of it the next time.
LAYERS = 8

# A turn is not timed at first: until the threads of whoever had the turn before have stopped spinning, and
# the operating system has spread ours over the cores.
WARM_UP_SECONDS = 0.1
TURN_SECONDS = 0.04

# SmolLM2-135M with as few layers, and next to no vocabulary.
FEATURES = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "attention_scale": 0.125, "rope_table": 0}
FEATURES |= {"intermediate_size": 1536, "activation": SILU, "gated": True}
ARCHITECTURE = Architecture(
    hidden_size=576,
    vocab_size=16,
    num_positions=0,
    tied=True,
    layer_norm=False,
    norm_epsilon=1e-5,
    layers=layer_rows(LAYERS, **FEATURES),
)


@entry_point
def _pack(format, x, packed):  # type: ignore[no-untyped-def]
    for row in range(x.shape[0]):
        pack_row(format, x[row], 0, x.shape[1], row, packed, 0)


@entry_point
def _multiply(thread, mailbox, counters, panels, x, M, N, K, weights, copies, bias_at, out, scratch):  # type: ignore[no-untyped-def]
    num_threads = share_call(thread, mailbox)
    for copy in range(copies):
        matmul(counters, num_threads, panels[copy], x, M, K, weights, bias_at, N, out, False, scratch[thread])
        barrier(counters, num_threads)


@entry_point
def _plan(cache, batch, plan, work):  # type: ignore[no-untyped-def]
    plan_batch(cache, batch, plan, work)


@entry_point
def _attend(thread, mailbox, arch, cache, batch, plan, work, layers):  # type: ignore[no-untyped-def]
    num_threads = share_call(thread, mailbox)
    member = Member(thread, num_threads, work.counters, work.scratch[thread])
    for layer in range(layers):
        attend(member, layer, arch, cache, batch, plan, work)


class Product:
    """A product [M, K] x [K, N] in one format, with as many copies of the weights as are to be read in turn.

    operations: a multiply-add counted as two; num_bytes: of one copy of the weights, of the activations that
    it reads and the outputs that it writes.
    """

    def __init__(self, format: int, M: int, N: int, K: int, copies: int = 1) -> None:
        rng = np.random.default_rng(0)
        size = panels_size(format, N, K)
        weights = aligned_zeros(copies * size + padded(N))
        blocks = encode(format, rng.standard_normal((N, K), np.float32))
        pack_blocks(format, *blocks, 0, 0, K, weights.view(np.uint32), 0)
        weights[size : copies * size].reshape(copies - 1, size)[:] = weights[:size]
        packed = aligned_zeros(padded_rows(M) * activation_words(format, K))
        _pack(format, rng.standard_normal((M, num_blocks(K) * BLOCK), np.float32)[:, :K].copy(), packed)
        self.copies = copies
        self.operations = 2 * M * N * K
        self.num_bytes = 4 * (size + M * activation_words(format, K) + M * N)
        starts = np.arange(copies)[:, None] * size + np.arange(padded(N) // PANEL) * panel_words(format, K)
        panels = np.stack([starts, np.full_like(starts, format)], axis=2)
        self._arguments = (
            new_counters(), panels, packed, M, N, K, weights, copies, copies * size,
            aligned_zeros(padded_rows(M) * padded(N)),
            np.zeros((usable_cores(), scratch_size()), np.float32),
        )  # fmt: skip

    def run(self, team: ThreadTeam) -> None:
        """Multiplies by each copy."""
        team.run(_multiply, *self._arguments)


class Attention:
    """The attention of one batch on scattered blocks, in as many layers as are to be read in turn.

    runs: of each sequence its tokens in the cache and its new tokens. Counted for one layer are the
    `operations` of both products, the `kv_bytes` of keys and values, and `num_bytes`: those and what is read
    and written for the new tokens.
    """

    def __init__(self, format: int, runs: list[tuple[int, int]], layers: int = LAYERS) -> None:
        arch, rng = ARCHITECTURE, np.random.default_rng(0)
        self.layers = layers
        starts, counts = (np.array(column, np.int32) for column in zip(*runs, strict=True))
        lengths, new_tokens = starts + counts, int(counts.sum())
        blocks_of = -(-lengths // BLOCK_SIZE)
        tables = np.zeros((len(runs), blocks_of.max()), np.int32)
        tables[np.arange(blocks_of.max()) < blocks_of[:, None]] = rng.permutation(blocks_of.sum())
        cache = new_cache(arch, format, int(blocks_of.sum()), BLOCK_SIZE)
        work = new_workspace(arch, new_tokens, usable_cores())
        for words in (cache.keys, cache.values):
            words[:] = np.resize(_random_words(format, rng), words.size)
        work.wide[:] = np.resize(_random_words(FLOAT32, rng), work.wide.size)
        batch = Batch(
            token_ids=np.zeros(new_tokens, np.int32),
            num_computed=starts,
            query_start_loc=np.cumsum([0, *counts], dtype=np.int32),
            block_tables=tables,
        )
        plan = new_plan(arch, new_tokens, len(runs), -(-int(lengths.max()) // KEY_CHUNK))
        _plan(cache, batch, plan, work)
        self._arguments = (arch, cache, batch, plan, work, layers)
        heads_size = FEATURES["num_heads"] * FEATURES["head_dim"]
        seen_keys = sum(count * start + count * (count + 1) // 2 for start, count in runs)
        self.operations = 4 * heads_size * seen_keys
        token_bytes = 4 * FEATURES["num_kv_heads"] * token_words(format, *[FEATURES["head_dim"]] * 2)
        self.kv_bytes = token_bytes * int(lengths.sum())
        self.num_bytes = self.kv_bytes + 2 * 4 * new_tokens * heads_size

    def run(self, team: ThreadTeam) -> None:
        """Attends in each layer."""
        team.run(_attend, *self._arguments)


def seconds_in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median over the rounds of what a call takes, when all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()  # may have to be compiled
            _call_for(WARM_UP_SECONDS, call)
            times[name].append(median(_call_for(TURN_SECONDS, call)))
    return {name: median(values) for name, values in times.items()}


def _call_for(seconds: float, call: Callable[[], object]) -> list[float]:
    """Calls until so much time has passed, at least once; what each call took."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def blas_cores() -> float:
    """How many cores NumPy's BLAS keeps busy on a large product."""
    a, b = np.ones((2, 2048, 2048), np.float32)
    np.matmul(a, b)
    wall, busy = time.perf_counter(), time.process_time()
    for _ in range(5):
        np.matmul(a, b)
    return (time.process_time() - busy) / (time.perf_counter() - wall)


def _free_blas() -> None:
    """Starts anew if the environment tells OpenBLAS what processor this is or how many threads to use."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    if len(kept) < len(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], kept)


@dataclass(frozen=True)
class ProductRow:
    """Gop/s of one shape; ratio: of float32 to BLAS."""

    M: int
    N: int
    K: int
    gops: dict[str, float]
    ratio: float


@dataclass(frozen=True)
class DecodeRow:
    """A decode's KV bytes a second, and their share of the bandwidth that was measured beside it."""

    cache: str
    gb_s: float
    bandwidth_gb_s: float
    share: float


@dataclass(frozen=True)
class PrefillRow:
    """A prompt's attention in one layer, a token; growth: to the shortest prompt, of cost and arithmetic."""

    cache: str
    tokens: int
    us_per_token: float
    gops: float
    cost_growth: float
    arithmetic_growth: float


def products(team: ThreadTeam, rounds: int) -> list[ProductRow]:
    """Every shape in every format, and by BLAS."""
    rows = []
    for (N, K), M in itertools.product(MATRICES, TOKENS):
        rng = np.random.default_rng(0)
        x, w = rng.standard_normal((M, K), np.float32), rng.standard_normal((K, N), np.float32)
        out = np.empty((M, N), np.float32)
        cases = {name: Product(format, M, N, K) for name, format in FORMATS.items()}
        calls = {name: partial(case.run, team) for name, case in cases.items()}
        pair = {"float32": calls.pop("float32"), "BLAS": partial(np.matmul, x, w, out=out)}
        times = seconds_in_turns(pair, 2 * rounds) | seconds_in_turns(calls, rounds)
        gops = {name: 2 * M * N * K / 1e9 / seconds for name, seconds in times.items()}
        rows.append(ProductRow(M, N, K, gops, gops["float32"] / gops["BLAS"]))
        print(f"{M} x {N} x {K}: {rows[-1].ratio:.2f}", file=sys.stderr, flush=True)
    return rows


def decodes(team: ThreadTeam, rounds: int) -> list[DecodeRow]:
    """A batch of decodes over a long context in each cache format."""
    rows = []
    for name, format in CACHE_FORMATS.items():
        case = Attention(format, [(CONTEXT - 1, 1)] * BATCH)
        speeds, bandwidths = [], []
        for _ in range(rounds):
            before = bandwidth_gb_s()
            seconds = seconds_in_turns({name: partial(case.run, team)}, 1)[name] / LAYERS
            bandwidths.append(max(before, bandwidth_gb_s()))
            speeds.append(case.kv_bytes / 1e9 / seconds)
        share = median(speed / bandwidth for speed, bandwidth in zip(speeds, bandwidths, strict=True))
        rows.append(DecodeRow(name, median(speeds), median(bandwidths), share))
    return rows


def prefills(team: ThreadTeam, rounds: int) -> list[PrefillRow]:
    """The attention of a whole prompt, of twice as many tokens from row to row, in each cache format."""
    rows: list[PrefillRow] = []
    for name, format in CACHE_FORMATS.items():
        seconds = operations = 0.0
        shortest: tuple[float, float] | None = None
        for start in range(0, LONGEST_PROMPT, CHUNK):
            case = Attention(format, [(start, CHUNK)], layers=1)
            seconds += seconds_in_turns({name: partial(case.run, team)}, rounds)[name]
            operations += case.operations
            tokens = start + CHUNK
            shortest = shortest or (seconds / tokens, operations / tokens)
            if tokens & (tokens - 1) == 0:
                growth = (seconds / tokens / shortest[0], operations / tokens / shortest[1])
                speed = operations / 1e9 / seconds
                rows.append(PrefillRow(name, tokens, 1e6 * seconds / tokens, speed, *growth))
    return rows


def _print(product_rows: list[ProductRow], decode_rows: list[DecodeRow], rest: list[PrefillRow]) -> None:
    if product_rows:
        names = list(product_rows[0].gops)
        print(f"Gop/s; BLAS keeps {blas_cores():.1f} of {usable_cores()} cores busy; ratio: float32 to BLAS")
        print(f"{'M x N x K':>18}", *(f"{name:>11}" for name in names), f"{'ratio':>7}")
        for row in product_rows:
            shape = f"{row.M} x {row.N} x {row.K}"
            print(f"{shape:>18}", *(f"{row.gops[name]:11.0f}" for name in names), f"{row.ratio:7.2f}")
        peaks = {"BLAS": "", "int4, Q4_0": ""} | {name: f"{peak_gops(name):.0f}" for name in PEAKS}
        print(f"{'peak':>18}", *(f"{peaks[name]:>11}" for name in names))
    for decode in decode_rows:
        print(
            f"decode, {BATCH} x {CONTEXT} tokens, {decode.cache} cache: {decode.gb_s:.1f} GB/s of KV, "
            f"{decode.share:.2f} of {decode.bandwidth_gb_s:.1f}"
        )
    for prefill in rest:
        print(
            f"prefill, {prefill.tokens} tokens, {prefill.cache} cache: {prefill.us_per_token:.2f} us a token "
            f"and layer, {prefill.gops:.0f} Gop/s; to the shortest: cost {prefill.cost_growth:.2f}, "
            f"arithmetic {prefill.arithmetic_growth:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels beside the machine's limits and BLAS.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("products", "attention"))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    _free_blas()
    rounds = arguments.rounds
    team = ThreadTeam(usable_cores())
    product_rows = products(team, rounds) if arguments.only != "attention" else []
    decode_rows = decodes(team, rounds) if arguments.only != "products" else []
    prefill_rows = prefills(team, rounds) if arguments.only != "products" else []
    team.close()
    if arguments.json:
        parts: dict[str, list[Any]] = {
            "products": product_rows, "decodes": decode_rows, "prefills": prefill_rows
        }  # fmt: skip
        print(json.dumps({name: [asdict(row) for row in rows] for name, rows in parts.items()}, indent=2))
    else:
        _print(product_rows, decode_rows, prefill_rows)


def _random_words(format: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random numbers, one or two to a word."""
    values = rng.standard_normal(1 << 20, np.float32)
    if format != FLOAT32:
        values = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.float32)
    return values


if __name__ == "__main__":
    main()
