"""Routing against its definition, and products of experts that have the bits of products by themselves."""

import ctypes
import faulthandler
import os
import sys
from mmap import PAGESIZE
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pagellm.kernels.activation import SILU
from pagellm.kernels.architecture import (
    SIGMOID,
    SOFTMAX,
    TOP_SOFTMAX,
    Architecture,
    Weights,
    layer_rows,
)
from pagellm.kernels.experts import Groups, choose_experts, group_rows, max_slots, new_groups
from pagellm.kernels.experts import scratch_size as router_scratch_size
from pagellm.kernels.matmul import expert_matmul, scratch_size
from pagellm.kernels.packing import BLOCK, FLOAT32, GROUP, PANEL, padded, padded_rows, panel_words
from pagellm.kernels.threads import new_counters
from tests import oracles
from tests.conftest import at_most
from tests.kernels.layouts import FORMATS, Matrix, packed_rows, packed_weights, random_matrix, whole_panels
from tests.kernels.test_matmul import multiply
from tests.kernels.test_transformer import EPSILON, HIDDEN, VOCAB, Definition, Setting, computed, model

ROUTERS = {SOFTMAX: "softmax", TOP_SOFTMAX: "top_softmax", SIGMOID: "sigmoid"}


def row_of(**features: Any) -> Any:
    """The row of a layer with experts."""
    defaults = {
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "attention_scale": 1.0,
        "rope_table": 0,
        "intermediate_size": 0,
        "activation": SILU,
        "gated": 1,
        "expert_size": 8,
    }
    return layer_rows(1, **defaults | features)[0]


def chosen(row: Any, logits: Matrix, bias: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """What the kernel chooses for one token; around everything is poison."""
    size, k = int(row["num_experts"]), int(row["experts_per_token"])
    x = np.full(padded(size) + 3, np.nan, np.float32)
    x[3 : 3 + size] = logits
    experts, weights = np.full(k, -1), np.full(k, np.nan, np.float32)
    scratch = np.full(router_scratch_size(size), np.nan, np.float32)
    choose_experts(row, x, 3, np.concatenate([[np.float32(9)], bias]), 1, scratch, experts, weights)
    assert x[3 : 3 + size].tobytes() == logits.tobytes(), "logits are kept"
    return experts, weights


@st.composite
def routers(draw: st.DrawFn) -> tuple[Any, Matrix, Matrix]:
    """A row and a token's logits and biases: of few values, so that many are equal."""
    groups, in_group = draw(st.sampled_from([(1, 1), (1, 5), (1, 40), (1, 300), (4, 3), (3, 8), (2, 1)]))
    per_token = draw(st.integers(1, groups))
    size = groups * in_group
    row = row_of(
        num_experts=size,
        experts_per_token=draw(st.integers(1, per_token * in_group)),
        router=draw(st.sampled_from(sorted(ROUTERS))),
        renormalize=draw(st.booleans()),
        score_floor=draw(st.sampled_from([0.0, 3.0])),
        router_scale=draw(st.sampled_from([1.0, 2.5])),
        selection_bias=draw(st.booleans()),
        expert_groups=groups,
        groups_per_token=per_token,
        group_best=draw(st.integers(1, in_group)),
    )
    values = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.25, 2.0, 5.0]), min_size=size, max_size=size)
    return row, np.array(draw(values), np.float32), np.array(draw(values), np.float32)


@at_most(400)
@given(drawn=routers())
def test_experts_are_chosen_as_defined_and_the_first_of_equals(drawn: tuple[Any, Matrix, Matrix]) -> None:
    row, logits, bias = drawn
    router = oracles.Router(
        ROUTERS[row["router"]], int(row["experts_per_token"]), bias if row["selection_bias"] else 0.0,
        bool(row["renormalize"]), float(row["score_floor"]), float(row["router_scale"]),
        int(row["expert_groups"]), int(row["groups_per_token"]), int(row["group_best"]),
    )  # fmt: skip
    experts, weights = chosen(row, logits, bias)
    expected, right = router.choose(logits)
    # Sums that are equal in exact numbers may be an ulp apart: then another group is as good.
    if row["expert_groups"] == 1 or row["group_best"] == 1:
        np.testing.assert_array_equal(experts, expected)
        np.testing.assert_allclose(weights, right, rtol=1e-5)
    else:
        assert len(set(experts // (row["num_experts"] // row["expert_groups"]))) <= row["groups_per_token"]
        np.testing.assert_allclose(weights.sum(), right.sum(), rtol=1e-5)


@at_most(100)
@given(drawn=routers(), data=st.data())
def test_experts_are_different_ones_also_where_logits_are_no_numbers(
    drawn: tuple[Any, Matrix, Matrix], data: st.DataObject
) -> None:
    """A token that comes to nothing must not write where another one's experts are."""
    row, logits, bias = drawn
    wrong = st.sampled_from([np.nan, np.inf, -np.inf])
    for index in data.draw(st.sets(st.integers(0, len(logits) - 1), min_size=1)):
        logits[index] = data.draw(wrong)
    experts, _ = chosen(row, logits, bias)
    assert len(set(experts)) == row["experts_per_token"]
    assert 0 <= experts.min() <= experts.max() < row["num_experts"]


def grouped(row: Any, chosen: NDArray[np.int64]) -> Groups:
    """Rows that chose these experts, [rows, experts_per_token]."""
    groups = new_groups(len(chosen), chosen.shape[1], int(row["num_experts"]))
    groups.chosen[:] = chosen.reshape(-1)
    group_rows(row, len(chosen), groups)
    return groups


@st.composite
def choices(draw: st.DrawFn) -> NDArray[np.int64]:
    """Experts of up to three groups of rows; often nearly all rows choose the same."""
    experts, k = draw(st.sampled_from([(1, 1), (5, 2), (40, 7)]))
    orders = st.permutations(range(experts)).map(lambda order: order[:k])
    hot = draw(orders)
    rows = draw(st.lists(st.just(hot) | orders, min_size=1, max_size=3 * GROUP))
    return np.array(rows, np.int64)


@at_most(200)
@given(rows=choices())
def test_each_row_has_a_slot_with_each_of_its_experts(rows: NDArray[np.int64]) -> None:
    count = int(rows.max()) + 1
    row = row_of(num_experts=count, experts_per_token=rows.shape[1])
    groups = grouped(row, rows)
    slots = groups.slots.reshape(rows.shape)
    assert len(set(groups.slots)) == rows.size
    assert groups.slots.max() < max_slots(*rows.shape, count)
    hit = np.unique(rows)
    num_hit, most = groups.totals
    assert groups.experts[:num_hit].tolist() == hit.tolist()
    counts = [(rows == expert).sum() for expert in hit]
    assert groups.num_rows[:num_hit].tolist() == counts
    assert most == max(counts)
    for expert, first, num_rows in zip(hit, groups.first_slot, counts, strict=False):
        # A group of packed activations holds rows of one expert, in the order of the batch.
        assert first % GROUP == 0
        assert slots[rows == expert].tolist() == list(range(first, first + num_rows))
    ends = groups.first_slot[:num_hit] + [padded_rows(n) for n in counts]
    assert (groups.first_slot[1:num_hit] >= ends[:-1]).all()


@pytest.mark.parametrize("own_biases", [0, 1])
@pytest.mark.parametrize("format", FORMATS, ids=FORMATS.get)
def test_a_row_has_the_bits_that_it_has_alone_with_its_expert(format: int, own_biases: int) -> None:
    """Of one expert that most rows chose, some that few did, and one that none did and that is poison."""
    rng = np.random.default_rng(format)
    N, K, experts = 2 * PANEL + 5, 8 * BLOCK, 4
    counts = [9 * GROUP + 2, 1, 0, GROUP]
    rows = np.repeat(np.arange(experts), counts)[rng.permutation(sum(counts))][:, None]
    groups = grouped(row_of(num_experts=experts, experts_per_token=1), rows)
    x, biases = random_matrix(rng, len(rows), K), random_matrix(rng, experts, N)
    biases[:] = biases if own_biases else biases[0]
    matrices = [random_matrix(rng, N, K) for _ in range(experts)]
    num_panels, size = whole_panels(N) // PANEL, panel_words(format, K)
    values, panels, all_biases = [], [], np.zeros((experts, whole_panels(N)), np.float32)
    for expert in range(experts):
        packed, start, _ = packed_weights(format, matrices[expert], biases[expert], K)
        begin = sum(map(len, values)) + start
        panels += [[begin + panel * size, format] for panel in range(num_panels)]
        values.append(np.full_like(packed, np.nan) if counts[expert] == 0 else packed)
        all_biases[expert, :N] = biases[expert]
    weights = np.concatenate([*values, all_biases.reshape(-1)])
    bias_start = sum(map(len, values))
    num_slots = max_slots(len(rows), 1, experts)
    in_slots = np.zeros((num_slots, K), np.float32)
    in_slots[groups.slots] = x
    out = np.full(num_slots * whole_panels(N), np.nan, np.float32)
    counters = new_counters()
    expert_matmul(
        counters, 1, np.array(panels), packed_rows(format, in_slots), groups, K, weights, bias_start,
        own_biases, N, out, np.full(scratch_size(), np.nan, np.float32),
    )  # fmt: skip
    found = out.reshape(num_slots, -1)[groups.slots, :N]
    for expert in np.unique(rows):
        of = rows[:, 0] == expert
        alone = multiply(format, x[of], matrices[expert], biases[expert])
        np.testing.assert_array_equal(found[of], alone)


def items_of(counts: list[int], num_threads: int) -> int:
    """Work items of a product whose experts have so many rows."""
    rows = np.repeat(np.arange(len(counts)), counts)[:, None]
    groups = grouped(row_of(num_experts=len(counts), experts_per_token=1), rows)
    N, K, format = 24 * PANEL, BLOCK, 0
    panels = np.array([[0, format]] * (len(counts) * N // PANEL))
    x = np.zeros(max_slots(len(rows), 1, len(counts)) * K, np.float32)
    weights = np.zeros(panel_words(format, K) + len(counts) * N + 64, np.float32)
    counters = new_counters()
    expert_matmul(
        counters, num_threads, panels, x, groups, K, weights, panel_words(format, K), 0, N,
        np.zeros(len(x) // K * N, np.float32), np.zeros(scratch_size(), np.float32),
    )  # fmt: skip
    return int(counters.max()) - 1


@pytest.mark.parametrize("num_threads", [2, 8, 16])
def test_work_is_cut_as_small_where_one_expert_has_nearly_all_rows(num_threads: int) -> None:
    """No item is more than a share of what one thread of all has to do."""
    hot, even = [40 * GROUP, 1, 1, 1], [10 * GROUP] * 4
    assert items_of(hot, num_threads) >= items_of(even, num_threads) >= 4 * num_threads
    assert items_of([1, 1, 1, 1], num_threads) >= num_threads


MIXTURE = layer_rows(
    1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_scale=0.3,
    rope_table=0,
    intermediate_size=0,
    activation=SILU,
    gated=1,
    num_experts=8,
    experts_per_token=3,
    expert_size=128,
)


def run_of(weights: Weights, expert: int) -> tuple[int, int]:
    """Where in the weights the run of an expert's matrices begins and ends, in words."""
    size = int(MIXTURE[0]["expert_size"])
    ends = []
    for name, columns in (("expert_up", 2 * padded(size)), ("expert_down", padded(HIDDEN))):
        first, count = int(weights.layers[0][name]["panel"]) + expert * (columns // PANEL), columns // PANEL
        starts = weights.panels[first : first + count, 0]
        words = panel_words(FLOAT32, HIDDEN if name == "expert_up" else size)
        assert (np.diff(starts) == words).all()
        ends += [int(starts[0]), int(starts[-1]) + words]
    assert ends[1] == ends[2], "a run of memory"
    return ends[0], ends[3]


def survives(arch: Architecture, weights: Weights, token: NDArray[np.int32], unreadable: list[int]) -> bool:
    """Whether a process can take a step that has no right to read the pages of these experts."""
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()
            protect, address = ctypes.CDLL(None).mprotect, weights.values.ctypes.data
            for expert in unreadable:
                first, end = (address + 4 * word for word in run_of(weights, expert))
                first, end = -(-first // PAGESIZE) * PAGESIZE, end // PAGESIZE * PAGESIZE
                assert first < end
                assert protect(ctypes.c_void_p(first), ctypes.c_size_t(end - first), 0) == 0
            computed(arch, weights, [token], Setting())
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs fork and mprotect")
def test_a_decode_reads_the_experts_that_its_token_chose_and_no_others() -> None:
    arch = Architecture(HIDDEN, VOCAB, 0, True, False, EPSILON, MIXTURE)
    plain, weights = model(arch)
    token = np.array([7], np.int32)
    definition = Definition(arch, plain)
    definition.logits(token)
    [read] = definition.chosen
    assert len(set(read)) == 3
    assert survives(arch, weights, token, sorted(set(range(8)) - set(read)))
    for expert in read:
        assert not survives(arch, weights, token, [expert])
