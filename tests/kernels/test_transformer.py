"""The whole step against its definition, in models whose layers differ in every feature that a row has."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.kernels import activation
from pagellm.kernels.architecture import (
    LAYER_PARTS,
    NONE,
    PER_HEAD,
    REST_PARTS,
    SIGMOID,
    SOFTMAX,
    TOP_SOFTMAX,
    WHOLE,
    Architecture,
    Kind,
    Part,
    Weights,
    lay_out,
    layer_rows,
)
from pagellm.kernels.attention import KEY_CHUNK
from pagellm.kernels.buffers import (
    WANTED,
    Batch,
    Outputs,
    WantedRow,
    new_cache,
    new_plan,
    new_workspace,
)
from pagellm.kernels.encoding import encode
from pagellm.kernels.packing import BFLOAT16, FLOAT32, PANEL, aligned_zeros, pack_blocks, padded
from pagellm.kernels.threads import ThreadTeam
from pagellm.kernels.transformer import step
from tests import oracles
from tests.conftest import at_most
from tests.kernels.layouts import Exact, Matrix, random_matrix

HIDDEN, VOCAB, EPSILON = 40, 50, 1e-5
LENGTHS, MAX_LEN = (37, 9, 1), 2 * KEY_CHUNK + 40
ROUTERS = {SOFTMAX: "softmax", TOP_SOFTMAX: "top_softmax", SIGMOID: "sigmoid"}
ACTIVATIONS = [oracles.silu, oracles.gelu_tanh, oracles.gelu, oracles.relu, oracles.relu_squared]
FREQUENCIES = (10000.0 ** (-np.arange(4) / 4), 500.0 ** (-np.arange(10) / 10), np.zeros(0))
QUERY_SCALES = np.stack([np.ones(MAX_LEN), np.ones(MAX_LEN), 1 + np.arange(MAX_LEN) // 8 / 4])
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
    value_norm=[0, 1, 0, 1, 1, 0, 0],
    pre_norm=[1, 0, 1, 1, 1, 0, 1],
    post_norm=[0, 1, 1, 0, 0, 1, 0],
    sub_norm=[0, 0, 1, 0, 1, 0, 0],
    parallel=[0, 0, 0, 1, 0, 0, 1],
    residual_scale=[1.0, 1.0, 0.3, 1.0, 0.22, 0.5, 0.4],
    window=[0, 5, 1, 0, 16, 3, 40],
)
# Latent attention, beside one layer without: (query_rank or not, sizes of one vector, many or odd ones).
LATENT = layer_rows(
    5,
    num_heads=[3, 5, 2, 14, 4],
    num_kv_heads=[1, 1, 2, 1, 1],
    head_dim=[8 + 12, 20 + 40, 16, 6 + 5, 32],
    latent_dim=[12, 40, 0, 5, 32],
    nope_dim=[7, 33, 0, 3, 12],
    value_dim=[5, 36, 0, 9, 32],
    query_rank=[0, 17, 0, 40, 0],
    latent_epsilon=[1e-6, 0.5, 0, 1e-6, 1e-3],
    attention_scale=[0.3, 0.1, 0.3, 0.5, 0.2],
    rope_table=[0, 1, 0, -1, 2],
    intermediate_size=[48, 30, 33, 20, 16],
    activation=[0, 1, 2, 0, 0],
    gated=[1, 1, 0, 1, 1],
    attention_softcap=[0, 2.0, 0, 0, 0],
    window=[0, 5, 0, 0, 16],
    post_norm=[0, 1, 0, 0, 0],
    parallel=[0, 0, 0, 1, 0],
    residual_scale=[1.0, 1.0, 0.3, 1.0, 0.5],
)
# Layers with experts of every kind, and one without; each has fewer experts in a group than in all.
MIXTURE = layer_rows(
    8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    attention_scale=0.3,
    rope_table=0,
    intermediate_size=[0, 48, 12, 0, 30, 20, 0, 24],
    activation=[0, 1, 0, 5, 1, 0, 5, 1],
    gated=[1, 1, 0, 1, 1, 0, 1, 1],
    sinks=[0, 1, 0, 1, 0, 0, 1, 0],
    window=[0, 5, 0, 0, 0, 0, 0, 0],
    parallel=[0, 0, 0, 0, 0, 1, 0, 0],
    post_norm=[0, 0, 0, 0, 1, 0, 0, 1],
    pre_norm=[1, 1, 1, 1, 0, 1, 1, 1],
    sub_norm=[0, 0, 1, 0, 0, 0, 0, 0],
    residual_scale=[1.0, 1.0, 1.0, 0.4, 1.0, 1.0, 1.0, 0.8],
    qkv_clip=[0, 0.5, 0, 0, 0.7, 0, 0, 0],
    num_experts=[5, 0, 8, 3, 6, 4, 40, 7],
    experts_per_token=[2, 0, 3, 3, 2, 1, 7, 3],
    expert_size=[20, 0, 33, 16, 40, 48, 9, 21],
    router=[SOFTMAX, SOFTMAX, SIGMOID, TOP_SOFTMAX, SOFTMAX, SIGMOID, SOFTMAX, SOFTMAX],
    renormalize=[1, 0, 1, 0, 0, 0, 1, 1],
    score_floor=[0, 0, 2.0, 0, 0, 0, 1e-12, 0],
    router_scale=[1.0, 1.0, 2.5, 1.0, 0.7, 1.0, 1.0, 1.3],
    selection_bias=[0, 0, 1, 0, 1, 0, 0, 0],
    expert_groups=[1, 1, 4, 1, 3, 2, 1, 1],
    groups_per_token=[1, 1, 2, 1, 2, 1, 1, 1],
    group_best=[1, 1, 2, 1, 1, 1, 1, 1],
    expert_bias=[0, 0, 1, 1, 0, 0, 0, 0],
    shared_gate=[0, 0, 1, 0, 0, 1, 0, 0],
    value_norm=[0, 1, 0, 0, 0, 0, 0, 1],
    layer_scale=[0, 1, 0, 0, 0, 1, 0, 1],
    expert_norms=[0, 0, 0, 0, 0, 0, 0, 1],
    logit_scale=[1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 0.3],
    expert_scale=[0, 0, 1, 0, 0, 0, 0, 1],
)
# All layers have a window, so that blocks are given back; and a few that are made for long contexts.
WINDOWED = VARIED.copy()
WINDOWED["window"] = [4, 5, 1, 9, 16, 3, 12]
LONG = layer_rows(
    4,
    num_heads=[2, 4, 2, 3],
    num_kv_heads=[2, 2, 1, 1],
    head_dim=8,
    attention_scale=0.5,
    rope_table=0,
    intermediate_size=16,
    activation=activation.SILU,
    gated=1,
    window=[0, KEY_CHUNK + 90, 40, KEY_CHUNK],
)
# One with RMSNorm and today's neutral constants, one with LayerNorm and all others.
ARCHITECTURES = {
    "llama": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, LLAMA),
    "rms_norm": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, VARIED, 6.3, 1.0, 0.0),
    "layer_norm": Architecture(HIDDEN, VOCAB, MAX_LEN, False, True, EPSILON, VARIED, 1.0, 0.25, 3.0),
    "windowed": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, WINDOWED),
    "latent": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, LATENT),
    "mixture": Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, MIXTURE),
}
each = pytest.mark.parametrize("name", ARCHITECTURES)

Parts = dict[str, Matrix]


def random_parts(
    rng: np.random.Generator, arch: Architecture, parts: tuple[Part, ...], row: NDArray[np.void] | None
) -> Parts:
    """Every part of a row, scaled so that activations keep their size."""
    shapes = {part.name: part.shape(arch, row) for part in parts}
    made = {
        name: random_matrix(rng, *shape) / np.float32(np.sqrt(shape[-1]) if len(shape) > 1 else 1)
        for name, shape in shapes.items()
    }
    # No model has these.
    return made | {name: np.zeros_like(made[name]) for name in ("key_up_b", "value_up_b") if name in made}


def model(arch: Architecture) -> tuple[list[Parts], Weights]:
    """Random weights as plain matrices, by layer and then the rest, and as the step reads them."""
    rng = np.random.default_rng(0)
    plain = [random_parts(rng, arch, LAYER_PARTS, row) for row in arch.layers]
    plain.append(random_parts(rng, arch, REST_PARTS, None))
    layers, rest, panels, size = lay_out(arch, [{}] * len(plain))
    values = aligned_zeros(size)
    for parts, row, places in zip(plain, (*arch.layers, None), (*layers, *rest), strict=True):
        for part in LAYER_PARTS if row is not None else REST_PARTS:
            start, column = int(places[part.name]["start"]), 0
            for piece in np.split(parts[part.name], part.pieces(row)):
                if part.kind is Kind.MATRIX and len(piece):
                    blocks, K = encode(FLOAT32, piece), piece.shape[1]
                    [first, _] = panels[places[part.name]["panel"] + column // PANEL]
                    pack_blocks(FLOAT32, *blocks, 0, 0, K, values.view(np.uint32), first)
                elif part.kind is not Kind.MATRIX:
                    values[start + column : start + column + piece.size] = piece.reshape(-1)
                column += padded(len(piece))
    halves_of = np.array([len(f) for f in FREQUENCIES])
    tables = np.zeros((2, len(FREQUENCIES), MAX_LEN, halves_of.max()), np.float32)
    for table, frequencies in enumerate(FREQUENCIES):
        angles = np.outer(np.arange(MAX_LEN), frequencies)
        tables[:, table, :, : len(frequencies)] = np.cos(angles), np.sin(angles)
    scales = QUERY_SCALES.astype(np.float32)
    return plain, Weights(values, layers, rest, panels, tables[0], tables[1], halves_of, scales)


class Definition:
    """A model as its literature has it: the logits of every token of one sequence, in float64."""

    def __init__(self, arch: Architecture, plain: list[Parts]) -> None:
        self.arch, self.layers, self.rest = arch, plain[:-1], plain[-1]
        self.chosen: list[list[int]] = []  # the experts of each token in each layer that has any

    def logits(self, token_ids: NDArray[np.int32]) -> Exact:
        arch, rest = self.arch, self.rest
        hidden = rest["embedding"][token_ids].astype(np.float64) * arch.embedding_scale
        if arch.num_positions:
            hidden = hidden + rest["position_embedding"][: len(token_ids)]
        for row, parts in zip(arch.layers, self.layers, strict=True):
            normalized = self.norm(hidden, parts, "attention_norm")
            attended = self.attention(normalized, row, parts)
            attended = row["residual_scale"] * self.norm(attended, parts, "attention_post_norm")
            fed = self.feed_forward(hidden + (0 if row["parallel"] else attended), row, parts)
            fed = row["residual_scale"] * self.norm(fed, parts, "mlp_post_norm")
            hidden = (hidden + attended + fed) * (parts["layer_scale"] if row["layer_scale"] else 1)
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

    def latent_attention(self, x: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        """DeepSeek-AI 2024, section 2.1: keys and values widened from the latents, as they are defined."""
        heads, latent, nope, value_dim, rank = (
            int(row[name]) for name in ("num_heads", "latent_dim", "nope_dim", "value_dim", "query_rank")
        )
        rotary, table, epsilon = (
            int(row["head_dim"]) - latent,
            row["rope_table"],
            float(row["latent_epsilon"]),
        )

        def norm(x: Exact, name: str) -> Exact:
            return oracles.rms_norm(x, parts[name], epsilon) + parts[f"{name}_b"]

        first = oracles.matmul(x, parts["qkv"], parts["qkv_b"])
        q, k_rotary, latents = np.split(first, np.cumsum([first.shape[1] - rotary - latent, rotary]), axis=1)
        if rank:
            q = oracles.matmul(norm(q, "query_norm"), parts["query_up"], parts["query_up_b"])
        q, latents = q.reshape(len(x), heads, nope + rotary), norm(latents, "latent_norm")
        k_rotary = k_rotary[:, None].repeat(heads, axis=1)
        if table >= 0:
            turned = [oracles.rotary(h, p, FREQUENCIES[table]) for p, h in enumerate(q[..., nope:])]
            q[..., nope:] = turned
            k_rotary[:] = [oracles.rotary(h, p, FREQUENCIES[table]) for p, h in enumerate(k_rotary)]
            q *= QUERY_SCALES[table, : len(x), None, None]
        key_up = parts["key_up"].reshape(heads, latent, nope).astype(np.float64)
        value_up = parts["value_up"].reshape(heads, value_dim, latent).astype(np.float64)
        k = np.concatenate([np.einsum("tc,hcn->thn", latents, key_up), k_rotary], axis=2)
        v = np.einsum("tc,hvc->thv", latents, value_up)
        scale, cap = float(row["attention_scale"]), float(row["attention_softcap"])
        attended = oracles.attention(q, k, v, scale, int(row["window"]), cap).reshape(len(x), -1)
        return oracles.matmul(attended, parts["output"], parts["output_b"])

    def attention(self, x: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        if row["latent_dim"]:
            return self.latent_attention(x, row, parts)
        heads, kv_heads, head_dim = (int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
        qkv = oracles.matmul(x, parts["qkv"], parts["qkv_b"])
        q, k, v = np.split(qkv, np.cumsum([heads, kv_heads]) * head_dim, axis=1)
        q = self.norm(q.reshape(len(x), -1, parts["q_norm"].size or head_dim), parts, "q_norm")
        k = self.norm(k.reshape(len(x), -1, parts["k_norm"].size or head_dim), parts, "k_norm")
        if row["value_norm"]:
            v = oracles.rms_norm(v.reshape(len(x), -1, head_dim), np.ones(head_dim), EPSILON)
        if row["qkv_clip"]:
            q, k, v = (np.clip(part, -row["qkv_clip"], row["qkv_clip"]) for part in (q, k, v))
        q, k, v = (part.reshape(len(x), -1, head_dim) for part in (q, k, v))
        if (table := row["rope_table"]) >= 0:
            for heads_of in (q, k):
                turned = [oracles.rotary(h, p, FREQUENCIES[table]) for p, h in enumerate(heads_of)]
                heads_of[:] = turned
            q *= QUERY_SCALES[table, : len(x), None, None]
        scale, cap = float(row["attention_scale"]), float(row["attention_softcap"])
        sinks = parts["sinks"] if row["sinks"] else None
        attended = oracles.attention(q, k, v, scale, int(row["window"]), cap, sinks).reshape(len(x), -1)
        attended = self.norm(attended, parts, "attention_sub_norm")
        return oracles.matmul(attended, parts["output"], parts["output_b"])

    def feed_forward(self, hidden: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        x = self.norm(hidden, parts, "mlp_norm")
        if row["num_experts"]:
            return self.experts(hidden, x, row, parts)
        x = self.activated(oracles.matmul(x, parts["up"], parts["up_b"]), row)
        return oracles.matmul(self.norm(x, parts, "mlp_sub_norm"), parts["down"], parts["down_b"])

    def activated(self, x: Exact, row: NDArray[np.void]) -> Exact:
        gate, *linear = np.split(x, 2, axis=1) if row["gated"] else (x,)
        if row["activation"] == activation.CLAMPED_SWIGLU:
            return oracles.clamped_swiglu(gate, *linear)
        return ACTIVATIONS[row["activation"]](gate) * (linear[0] if linear else 1)

    def experts(self, hidden: Exact, x: Exact, row: NDArray[np.void], parts: Parts) -> Exact:
        """Each token's experts, times their weights, and the feed-forward that all tokens pass through.

        x: what that reads, and the router and the experts, too, unless they have norms of their own.
        """
        count, biased = int(row["num_experts"]), bool(row["expert_bias"])
        router = oracles.Router(
            ROUTERS[row["router"]], int(row["experts_per_token"]),
            parts["selection_bias"] if row["selection_bias"] else 0.0, bool(row["renormalize"]),
            float(row["score_floor"]), float(row["router_scale"]), int(row["expert_groups"]),
            int(row["groups_per_token"]), int(row["group_best"]),
        )  # fmt: skip
        up, down = (np.split(parts[name], count) for name in ("expert_up", "expert_down"))
        up_b, down_b = (
            np.split(parts[name], count) if biased else [parts[name]] * count
            for name in ("expert_up_b", "expert_down_b")
        )
        routed, read = (
            self.norm(hidden, parts, name) if row["expert_norms"] else x
            for name in ("router_norm", "expert_norm")
        )
        logits = oracles.matmul(routed, parts["router"], parts["router_b"])
        logits[:, :count] *= row["logit_scale"]
        scales = parts["expert_scale"] if row["expert_scale"] else np.ones(count)
        out = np.zeros_like(x)
        for token in range(len(x)):
            chosen, weights = router.choose(logits[token, :count])
            self.chosen.append(chosen.tolist())
            for expert, weight in zip(chosen, weights * scales[chosen], strict=True):
                passed = self.activated(oracles.matmul(read[token][None], up[expert], up_b[expert]), row)
                out[token] += weight * oracles.matmul(passed, down[expert], down_b[expert])[0]
        if row["intermediate_size"]:
            shared = self.activated(oracles.matmul(x, parts["up"], parts["up_b"]), row)
            shared = self.norm(shared, parts, "mlp_sub_norm")
            if row["shared_gate"]:
                shared = shared / (1 + np.exp(-logits[:, count:]))
            shared = oracles.matmul(shared, parts["down"], parts["down_b"])
            out = self.norm(out, parts, "expert_post_norm") + self.norm(shared, parts, "shared_post_norm")
        return out


# What a step computes: of some sequences, by their numbers, so many tokens more.
Step = dict[int, int]


@dataclass(frozen=True)
class Setting:
    """How a batch is served: none of it may show in the logits, but for the format of the cache."""

    num_threads: int = 1
    block_size: int = 16
    format: int = FLOAT32
    steps: tuple[Step, ...] = ()  # all tokens at once, if there are none
    seed: int = 0  # of the order of the blocks


def computed(
    arch: Architecture, weights: Weights, sequences: list[NDArray[np.int32]], setting: Setting
) -> list[Matrix]:
    """The logits of every token of each sequence.

    Blocks that are behind the windows of all layers are given back: what they hold is spoilt, and a table
    names another in their place.
    """
    size, lengths = setting.block_size, [len(ids) for ids in sequences]
    blocks = [-(-length // size) for length in lengths]
    order = np.random.default_rng(setting.seed).permutation(sum(blocks) + 1).astype(np.int32)
    tables = np.full((len(lengths), max(blocks)), order[-1], np.int32)
    for row, (first, count) in enumerate(zip(np.cumsum([0, *blocks]), blocks, strict=False)):
        tables[row, :count] = order[first : first + count]
    cache = new_cache(arch, setting.format, len(order), size)
    for words in (cache.keys, cache.values):
        words[:] = np.nan
    total = sum(lengths)
    work, team = new_workspace(arch, total, setting.num_threads), ThreadTeam(setting.num_threads)
    plan = new_plan(arch, total, len(lengths), -(-max(lengths) // KEY_CHUNK))
    window = int(arch.layers["window"].max()) if arch.layers["window"].all() else MAX_LEN
    done, logits = [0] * len(lengths), [np.zeros((length, VOCAB), np.float32) for length in lengths]
    for counts in setting.steps or (dict(enumerate(lengths)),):
        starts = [done[index] for index in counts]
        for index, start in zip(counts, starts, strict=True):
            given_back = max(start - window + 1, 0) // size
            for words, first_of in ((cache.keys, cache.key_start), (cache.values, cache.value_start)):
                for first, end in pairwise(first_of):
                    words[first:end].reshape(len(order), -1)[tables[index, :given_back]] = np.nan
            tables[index, :given_back] = order[-1]
        batch = Batch(
            np.concatenate([sequences[i][done[i] : done[i] + count] for i, count in counts.items()]),
            np.array(starts, np.int32),
            np.cumsum([0, *counts.values()]).astype(np.int32),
            tables[list(counts)],
        )
        rows = wanted(batch.token_ids.size)
        team.run(step, arch, weights, cache, batch, plan, rows, work)
        ends = batch.query_start_loc
        for (index, count), first, end in zip(counts.items(), ends, ends[1:], strict=False):
            logits[index][done[index] : done[index] + count] = rows.logits[first:end]
            done[index] += count
    team.close()
    assert done == lengths
    return logits


def wanted(num_rows: int) -> Outputs:
    """The logits of every token of a step."""
    rows = [
        WantedRow(row, 0, -1, row, -1, 0, 0, 0, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0) for row in range(num_rows)
    ]
    return Outputs(
        wanted=np.array(rows, WANTED),
        logits=np.zeros((num_rows, VOCAB), np.float32),
        history=np.zeros(0, np.int32), history_start=np.zeros(num_rows + 1, np.int32),
        bias_ids=np.zeros(0, np.int32), bias_values=np.zeros(0, np.float32),
        bias_start=np.zeros(num_rows + 1, np.int32), masks=np.zeros((0, (VOCAB + 31) // 32), np.uint32),
        tokens=np.zeros(num_rows, np.int32),
        logprobs=np.zeros(num_rows, np.float32), top_ids=np.zeros((num_rows, 0), np.int32),
        top_logprobs=np.zeros((num_rows, 0), np.float32),
    )  # fmt: skip


def sequences(*lengths: int) -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize(("format", "most"), [(FLOAT32, 2e-5), (BFLOAT16, 0.05)], ids=["float32", "bfloat16"])
@each
def test_layers_may_differ_in_every_feature(name: str, format: int, most: float) -> None:
    """The error as a share of the logits' range; keys and values of a bfloat16 cache are rounded."""
    arch = ARCHITECTURES[name]
    plain, weights = model(arch)
    definition = Definition(arch, plain)
    found = computed(arch, weights, sequences(*LENGTHS), Setting(num_threads=2, format=format))
    for token_ids, logits in zip(sequences(*LENGTHS), found, strict=True):
        right = definition.logits(token_ids)
        assert np.abs(logits - right).max() < most * np.ptp(right)


@st.composite
def settings(draw: st.DrawFn) -> Setting:
    """Tokens of the sequences in pieces and in any order."""
    left = dict(enumerate(LENGTHS))
    steps = []
    while left:
        counts = {index: draw(st.integers(1, count)) for index, count in left.items() if draw(st.booleans())}
        steps.append(counts or {min(left): 1})
        left = {i: count - steps[-1].get(i, 0) for i, count in left.items() if count > steps[-1].get(i, 0)}
    return Setting(
        num_threads=draw(st.integers(1, 3)),
        block_size=draw(st.sampled_from([1, 3, 4, 16, 20, 32])),
        format=draw(st.sampled_from([FLOAT32, BFLOAT16])),
        steps=tuple(steps),
        seed=draw(st.integers(0, 9)),
    )


@each
@at_most(40)
@given(setting=settings())
def test_bits_of_such_a_model_do_not_depend_on_how_it_is_served(name: str, setting: Setting) -> None:
    arch = ARCHITECTURES[name]
    _, weights = model(arch)
    served = computed(arch, weights, sequences(*LENGTHS), setting)
    for token_ids, logits in zip(sequences(*LENGTHS), served, strict=True):
        [alone] = computed(arch, weights, [token_ids], Setting(format=setting.format))
        np.testing.assert_array_equal(logits, alone)


def test_layers_of_different_windows_agree_with_their_definition_in_a_long_context() -> None:
    """At once, and with single tokens, few and many where chunks of keys end, beside another sequence."""
    arch = Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, LONG)
    plain, weights = model(arch)
    token_ids = sequences(MAX_LEN, 2 * KEY_CHUNK)
    alone = [computed(arch, weights, [ids], Setting())[0] for ids in token_ids]
    right = Definition(arch, plain).logits(token_ids[0])
    assert np.abs(alone[0] - right).max() < 2e-5 * np.ptp(right)
    steps = ({0: KEY_CHUNK - 1, 1: 7}, *[{0: 1, 1: 1}] * 3, {0: 88, 1: 1000}, *[{0: 1}] * 4, {0: 5, 1: 1})
    steps += ({0: 403, 1: 12}, {0: 1, 1: 1}, {0: 14}, {0: 35})
    for block_size in (16, 24):
        served = computed(arch, weights, token_ids, Setting(2, block_size, steps=steps))
        for found, expected in zip(served, alone, strict=True):
            np.testing.assert_array_equal(found, expected)


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


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"expert_norms": 1}, "found expert_norms, expected pre_norm, post_norm and a feed-forward"),
        ({"expert_norms": 1, "post_norm": 1, "intermediate_size": 0}, "found expert_norms"),
        ({"expert_norms": 1, "post_norm": 1, "pre_norm": 0}, "found expert_norms"),
        ({"latent_dim": 4, "value_norm": 1}, "found qk_norm, value_norm or sub_norm beside latent_dim"),
    ],
)
def test_features_that_exclude_each_other_are_refused(features: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_rows(1, **FEATURES | features)


def test_architectures_are_equal_if_all_of_their_numbers_are() -> None:
    arch = ARCHITECTURES["rms_norm"]
    assert arch == arch._replace(layers=VARIED.copy())
    assert arch != arch._replace(layers=LLAMA)
    assert arch != arch._replace(logits_scale=2.0)
