"""The whole step against its definition, in models whose layers differ in every feature that a row has."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pagellm.kernels import activation
from pagellm.kernels.architecture import (
    LAYER_PARTS,
    NONE,
    PER_HEAD,
    REST_PARTS,
    WHOLE,
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
ACTIVATIONS = [oracles.silu, oracles.gelu_tanh, oracles.gelu, oracles.relu, oracles.relu_squared]
FREQUENCIES = (10000.0 ** (-np.arange(4) / 4), 500.0 ** (-np.arange(10) / 10), np.zeros(0))
QUERY_SCALES = np.stack([np.ones(LENGTHS[0]), np.ones(LENGTHS[0]), 1 + np.arange(LENGTHS[0]) // 8 / 4])
# The features that every row has; then those that a row may have besides.
LLAMA = layer_rows(
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
VARIED = layer_rows(
    7,
    num_heads=[6, 4, 9, 71, 2, 5, 3],
    num_kv_heads=[2, 4, 3, 1, 1, 1, 3],
    head_dim=[8, 20, 24, 4, 24, 16, 20],
    attention_scale=[0.3, 0.2, 1.0, 0.5, 0.7, 0.1, 0.2],
    rope_table=[0, 1, -1, 2, 0, 0, 1],
    intermediate_size=[48, 72, 33, 100, 50, 16, 40],
    activation=[0, 1, 2, 3, 4, 4, 1],
    gated=[1, 0, 1, 1, 1, 0, 1],
    attention_softcap=[0, 2.0, 0, 0.5, 0, 0, 30.0],
    qk_norm=[PER_HEAD, WHOLE, NONE, NONE, WHOLE, PER_HEAD, NONE],
    pre_norm=[1, 0, 1, 1, 1, 0, 1],
    post_norm=[0, 1, 1, 0, 0, 1, 0],
    sub_norm=[0, 0, 1, 0, 1, 0, 0],
    parallel=[0, 0, 0, 1, 0, 0, 1],
    residual_scale=[1.0, 1.0, 0.3, 1.0, 0.22, 0.5, 0.4],
)
# One with RMSNorm and today's neutral constants, one with LayerNorm and all others.
ARCHITECTURES = {
    "llama": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, LLAMA),
    "rms_norm": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, VARIED, 6.3, 1.0, 0.0),
    "layer_norm": Architecture(HIDDEN, VOCAB, LENGTHS[0], False, True, EPSILON, VARIED, 1.0, 0.25, 3.0),
}
each = pytest.mark.parametrize("name", ARCHITECTURES)

Parts = dict[str, Matrix]


def random_parts(
    rng: np.random.Generator, arch: Architecture, parts: tuple[Part, ...], row: NDArray[np.void] | None
) -> Parts:
    """Every part of a row, scaled so that activations keep their size."""
    shapes = {part.name: part.shape(arch, row) for part in parts}
    return {
        name: random_matrix(rng, *shape) / np.float32(np.sqrt(shape[-1]) if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }


def model(arch: Architecture) -> tuple[list[Parts], Weights]:
    """Random weights as plain matrices, by layer and then the rest, and as the step reads them."""
    rng = np.random.default_rng(0)
    plain = [random_parts(rng, arch, LAYER_PARTS, row) for row in arch.layers]
    plain.append(random_parts(rng, arch, REST_PARTS, None))
    layers, rest, size = lay_out(arch, [{}] * len(plain))
    values = aligned_zeros(size)
    for parts, row, places in zip(plain, (*arch.layers, None), (*layers, *rest), strict=True):
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
    scales = QUERY_SCALES.astype(np.float32)
    return plain, Weights(values, layers, rest, tables[0], tables[1], halves_of, scales)


class Definition:
    """A model as its literature has it: the logits of every token of one sequence, in float64."""

    def __init__(self, arch: Architecture, plain: list[Parts]) -> None:
        self.arch, self.layers, self.rest = arch, plain[:-1], plain[-1]

    def logits(self, token_ids: NDArray[np.int32]) -> Exact:
        arch, rest = self.arch, self.rest
        hidden = rest["embedding"][token_ids].astype(np.float64) * arch.embedding_scale
        if arch.num_positions:
            hidden = hidden + rest["position_embedding"][: len(token_ids)]
        for row, parts in zip(arch.layers, self.layers, strict=True):
            normalized = self.norm(hidden, parts, "attention_norm")
            attended = self.attention(normalized, row, parts)
            attended = row["residual_scale"] * self.norm(attended, parts, "attention_post_norm")
            normalized = self.norm(hidden + (0 if row["parallel"] else attended), parts, "mlp_norm")
            fed = self.feed_forward(normalized, row, parts)
            fed = row["residual_scale"] * self.norm(fed, parts, "mlp_post_norm")
            hidden = hidden + attended + fed
        x = self.norm(hidden, rest, "final_norm")
        logits = oracles.matmul(x, rest["embedding" if arch.tied else "lm_head"], rest["lm_head_b"])
        return oracles.softcap(logits * arch.logits_scale, arch.logits_softcap)

    def norm(self, x: Exact, parts: Parts, name: str) -> Exact:
        """Nothing where the layer has no such norm."""
        scale, shift = parts[name], parts[f"{name}_b"]
        if not scale.size:
            return x
        if self.arch.layer_norm:
            return oracles.layer_norm(x, scale, shift, EPSILON)
        return oracles.rms_norm(x, scale, EPSILON) + shift

    def attention(self, x: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        heads, kv_heads, head_dim = (int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
        qkv = oracles.matmul(x, parts["qkv"], parts["qkv_b"])
        q, k, v = np.split(qkv, np.cumsum([heads, kv_heads]) * head_dim, axis=1)
        q = self.norm(q.reshape(len(x), -1, parts["q_norm"].size or head_dim), parts, "q_norm")
        k = self.norm(k.reshape(len(x), -1, parts["k_norm"].size or head_dim), parts, "k_norm")
        q, k, v = (part.reshape(len(x), -1, head_dim) for part in (q, k, v))
        if (table := row["rope_table"]) >= 0:
            for heads_of in (q, k):
                turned = [oracles.rotary(h, p, FREQUENCIES[table]) for p, h in enumerate(heads_of)]
                heads_of[:] = turned
            q *= QUERY_SCALES[table, : len(x), None, None]
        scale, cap = float(row["attention_scale"]), float(row["attention_softcap"])
        attended = oracles.attention(q, k, v, scale, int(row["window"]), cap).reshape(len(x), -1)
        attended = self.norm(attended, parts, "attention_sub_norm")
        return oracles.matmul(attended, parts["output"], parts["output_b"])

    def feed_forward(self, x: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        x = oracles.matmul(x, parts["up"], parts["up_b"])
        gate, *linear = np.split(x, 2, axis=1) if row["gated"] else (x,)
        x = ACTIVATIONS[row["activation"]](gate) * (linear[0] if linear else 1)
        return oracles.matmul(self.norm(x, parts, "mlp_sub_norm"), parts["down"], parts["down_b"])


def computed(
    arch: Architecture,
    weights: Weights,
    sequences: list[NDArray[np.int32]],
    num_threads: int = 1,
    format: int = FLOAT32,
) -> list[Matrix]:
    """The logits of every token of a batch of whole sequences, by sequence."""
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
    cache = new_cache(arch, format, sum(blocks), BLOCK_SIZE)
    plan = new_plan(arch, total, len(counts), 1)
    work = new_workspace(arch, total, num_threads)
    team = ThreadTeam(num_threads)
    team.run(step, arch, weights, cache, batch, plan, outputs, work)
    team.close()
    return np.split(outputs.logits, np.cumsum(counts)[:-1])


def sequences() -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in LENGTHS]


@pytest.mark.parametrize(("format", "most"), [(FLOAT32, 2e-5), (BFLOAT16, 0.05)], ids=["float32", "bfloat16"])
@each
def test_layers_may_differ_in_every_feature(name: str, format: int, most: float) -> None:
    """The error as a share of the logits' range; keys and values of a bfloat16 cache are rounded."""
    arch = ARCHITECTURES[name]
    plain, weights = model(arch)
    definition = Definition(arch, plain)
    found = computed(arch, weights, sequences(), 2, format)
    for token_ids, logits in zip(sequences(), found, strict=True):
        right = definition.logits(token_ids)
        assert np.abs(logits - right).max() < most * np.ptp(right)


@each
def test_bits_of_such_a_model_depend_neither_on_the_batch_nor_on_the_threads(name: str) -> None:
    arch = ARCHITECTURES[name]
    _, weights = model(arch)
    together = computed(arch, weights, sequences(), 3)
    for token_ids, logits in zip(sequences(), together, strict=True):
        np.testing.assert_array_equal(computed(arch, weights, [token_ids])[0], logits)


FEATURES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "attention_scale": 0.3, "rope_table": 0}
FEATURES |= {"intermediate_size": 16, "activation": activation.SILU, "gated": 1}


def test_a_layer_s_row_names_every_feature_but_those_with_a_default() -> None:
    [row] = layer_rows(1, **FEATURES)
    assert row["residual_scale"] == row["pre_norm"] == 1
    assert row["window"] == row["qk_norm"] == row["post_norm"] == row["sub_norm"] == row["parallel"] == 0
    expected = r"features: found \['head_dim', 'windows'\], expected \['num_heads', .*'window'\]"
    with pytest.raises(TypeError, match=expected):
        layer_rows(1, head_dim=4, windows=1)
    with pytest.raises(TypeError, match="features: found"):
        layer_rows(1, **FEATURES, windows=1)


def test_a_parallel_layer_has_no_norm_behind_its_halves() -> None:
    with pytest.raises(ValueError, match="found post_norm in a parallel layer"):
        layer_rows(3, **FEATURES, parallel=[0, 1, 1], post_norm=[1, 0, 1])


def test_architectures_are_equal_if_all_of_their_numbers_are() -> None:
    arch = ARCHITECTURES["rms_norm"]
    assert arch == arch._replace(layers=VARIED.copy())
    assert arch != arch._replace(layers=LLAMA)
    assert arch != arch._replace(logits_scale=2.0)
