"""The whole step against its definition, in a model whose layers differ in every feature that a row has."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels import activation
from pagellm.kernels.architecture import (
    LAYER_PARTS,
    REST_PARTS,
    Architecture,
    Kind,
    Part,
    Weights,
    lay_out,
    layer_rows,
)
from pagellm.kernels.buffers import (
    WANTED,
    Batch,
    Outputs,
    WantedRow,
    new_cache,
    new_plan,
    new_workspace,
)
from pagellm.kernels.packing import BFLOAT16, FLOAT32, aligned_zeros, encode, num_blocks, pack_blocks, padded
from pagellm.kernels.threads import ThreadTeam
from pagellm.kernels.transformer import step
from tests import oracles
from tests.kernels.layouts import Exact, Matrix, random_matrix

HIDDEN, VOCAB, EPSILON = 40, 50, 1e-5
BLOCK_SIZE, LENGTHS = 4, (37, 9)
ACTIVATIONS = [oracles.silu, oracles.gelu_tanh, oracles.gelu, oracles.relu]
FREQUENCIES = (10000.0 ** (-np.arange(4) / 4), 500.0 ** (-np.arange(10) / 10))
LAYERS = layer_rows(
    4,
    num_heads=[6, 4, 2, 5],
    num_kv_heads=[2, 4, 1, 1],
    head_dim=[8, 20, 24, 16],
    attention_scale=[0.3, 0.2, 1.0, 0.1],
    rope_table=[0, 1, -1, 0],
    intermediate_size=[48, 72, 33, 100],
    activation=[activation.SILU, activation.GELU_TANH, activation.GELU, activation.RELU],
    gated=[1, 0, 1, 1],
)
ARCHITECTURE = Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, LAYERS)

Parts = dict[str, Matrix]


def random_parts(rng: np.random.Generator, parts: tuple[Part, ...], row: NDArray[np.void] | None) -> Parts:
    """Every part of a row, scaled so that activations keep their size."""
    shapes = {part.name: part.shape(ARCHITECTURE, row) for part in parts}
    return {
        name: random_matrix(rng, *shape) / np.float32(np.sqrt(shape[-1]) if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


def model() -> tuple[list[Parts], Weights]:
    """Random weights as plain matrices, by layer and then the rest, and as the step reads them."""
    rng = np.random.default_rng(0)
    plain = [random_parts(rng, LAYER_PARTS, row) for row in LAYERS] + [random_parts(rng, REST_PARTS, None)]
    layers, rest, size = lay_out(ARCHITECTURE, [{}] * len(plain))
    values = aligned_zeros(size)
    for parts, row, places in zip(plain, (*LAYERS, None), (*layers, *rest), strict=True):
        for part in LAYER_PARTS if row is not None else REST_PARTS:
            start, column = int(places[part.name]["start"]), 0
            for piece in np.split(parts[part.name], part.pieces(row)):
                if part.kind is Kind.MATRIX and len(piece):
                    words, halves = encode(FLOAT32, piece)
                    blocks = num_blocks(piece.shape[1])
                    pack_blocks(words, halves, column, 0, blocks, values.view(np.uint32), start)
                elif part.kind is not Kind.MATRIX:
                    values[start + column : start + column + piece.size] = piece.reshape(-1)
                column = padded(len(piece))
    halves_of = np.array([len(f) for f in FREQUENCIES])
    tables = np.zeros((2, len(FREQUENCIES), max(LENGTHS), halves_of.max()), np.float32)
    for table, frequencies in enumerate(FREQUENCIES):
        angles = np.outer(np.arange(max(LENGTHS)), frequencies)
        tables[:, table, :, : len(frequencies)] = np.cos(angles), np.sin(angles)
    return plain, Weights(values, layers, rest, tables[0], tables[1], halves_of)


def expected(plain: list[Parts], token_ids: NDArray[np.int32]) -> Exact:
    """The logits of every token of one sequence."""
    *layers, rest = plain
    hidden = rest["embedding"][token_ids].astype(np.float64)
    for row, parts in zip(LAYERS, layers, strict=True):
        heads, kv_heads, head_dim = (int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
        x = oracles.rms_norm(hidden, parts["attention_norm"], EPSILON) + parts["attention_norm_b"]
        qkv = oracles.matmul(x, parts["qkv"], parts["qkv_b"]).reshape(len(x), -1, head_dim)
        if row["rope_table"] >= 0:
            for position, tokens in enumerate(qkv):
                turned = tokens[: heads + kv_heads]
                turned[:] = [oracles.rotary(x, position, FREQUENCIES[row["rope_table"]]) for x in turned]
        q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
        attended = oracles.attention(q, k, v, float(row["attention_scale"])).reshape(len(x), -1)
        hidden = hidden + oracles.matmul(attended, parts["output"], parts["output_b"])
        x = oracles.rms_norm(hidden, parts["mlp_norm"], EPSILON) + parts["mlp_norm_b"]
        x = oracles.matmul(x, parts["up"], parts["up_b"])
        gate, *linear = np.split(x, 2, axis=1) if row["gated"] else (x,)
        x = ACTIVATIONS[row["activation"]](gate) * (linear[0] if linear else 1)
        hidden = hidden + oracles.matmul(x, parts["down"], parts["down_b"])
    x = oracles.rms_norm(hidden, rest["final_norm"], EPSILON) + rest["final_norm_b"]
    return oracles.matmul(x, rest["embedding"], rest["lm_head_b"])


def computed(weights: Weights, sequences: list[NDArray[np.int32]], num_threads: int, format: int) -> Matrix:
    """The logits of every token of a batch of whole sequences."""
    counts = [len(ids) for ids in sequences]
    blocks = [-(-count // BLOCK_SIZE) for count in counts]
    tables = np.zeros((len(counts), max(blocks)), np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *blocks]), blocks, strict=False)):
        tables[row, :count] = np.arange(first, first + count)[::-1]
    total = sum(counts)
    batch = Batch(
        np.concatenate(sequences),
        np.zeros(len(counts), np.int32),
        np.cumsum([0, *counts]).astype(np.int32),
        tables,
    )
    wanted = [WantedRow(row, 0, -1, row, 0, 0, 0, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0) for row in range(total)]
    outputs = Outputs(
        wanted=np.array(wanted, WANTED),
        logits=np.zeros((total, VOCAB), np.float32),
        history=np.zeros(0, np.int32), history_start=np.zeros(total + 1, np.int32),
        bias_ids=np.zeros(0, np.int32), bias_values=np.zeros(0, np.float32),
        bias_start=np.zeros(total + 1, np.int32), tokens=np.zeros(total, np.int32),
        logprobs=np.zeros(total, np.float32), top_ids=np.zeros((total, 0), np.int32),
        top_logprobs=np.zeros((total, 0), np.float32),
    )  # fmt: skip
    cache = new_cache(ARCHITECTURE, format, sum(blocks), BLOCK_SIZE)
    plan = new_plan(ARCHITECTURE, total, len(counts), 1)
    work = new_workspace(ARCHITECTURE, total, num_threads)
    team = ThreadTeam(num_threads)
    team.run(step, ARCHITECTURE, weights, cache, batch, plan, outputs, work)
    team.close()
    return outputs.logits


def sequences() -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize(("format", "most"), [(FLOAT32, 1e-4), (BFLOAT16, 0.05)], ids=["float32", "bfloat16"])
def test_layers_may_differ_in_every_feature(format: int, most: float) -> None:
    """The error as a share of the logits' range; keys and values of a bfloat16 cache are rounded."""
    plain, weights = model()
    found = np.split(computed(weights, sequences(), 2, format), np.cumsum(LENGTHS)[:-1])
    for token_ids, logits in zip(sequences(), found, strict=True):
        right = expected(plain, token_ids)
        assert np.abs(logits - right).max() < most * np.ptp(right)


def test_bits_of_such_a_model_depend_neither_on_the_batch_nor_on_the_threads() -> None:
    _, weights = model()
    together = np.split(computed(weights, sequences(), 3, FLOAT32), np.cumsum(LENGTHS)[:-1])
    for token_ids, logits in zip(sequences(), together, strict=True):
        np.testing.assert_array_equal(computed(weights, [token_ids], 1, FLOAT32), logits)


def test_a_layer_s_row_names_every_feature() -> None:
    with pytest.raises(
        TypeError, match=r"features: found \['head_dim', 'windows'\], expected \['activation', "
    ):
        layer_rows(1, head_dim=4, windows=1)
