"""Mixtures of experts (Shazeer et al. 2017): which experts a token goes to, and which tokens each expert has.

An expert is one of many feed-forwards; a router scores all of them for each token, and the token passes
through those that score best. Knows scores and rows; the products are in `kernels.matmul`.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.kernels.architecture import SIGMOID, SOFTMAX, TOP_SOFTMAX
from pagellm.kernels.jit import kernel, plain
from pagellm.kernels.packing import GROUP, padded, padded_rows
from pagellm.kernels.simd import LANES, broadcast, exp, load, store


class Groups(NamedTuple):
    """The rows of a step, expert by expert. A slot is a row of what the experts read and write.

    Each expert's slots begin a group of the packed activations and are in the order of the rows.
    """

    chosen: NDArray[np.int64]  # [max_tokens * experts_per_token], each row's experts, best first
    weights: NDArray[np.float32]  # likewise, what an expert's part is multiplied by
    slots: NDArray[np.int64]  # likewise, where it is computed
    gates: NDArray[np.float32]  # [max_tokens], what the shared experts' part is multiplied by
    experts: NDArray[np.int64]  # [num_experts], those that have rows, in ascending order
    num_rows: NDArray[np.int64]  # likewise, how many
    first_slot: NDArray[np.int64]  # likewise
    next_slot: NDArray[np.int64]  # [num_experts], scratch
    totals: NDArray[np.int64]  # [2]: the experts that have rows, and the rows of the one that has the most


def max_slots(max_tokens: int, experts_per_token: int, num_experts: int) -> int:
    """The slots that a step of `max_tokens` rows can take."""
    rows = max_tokens * experts_per_token
    return padded_rows(rows + min(num_experts, rows) * (GROUP - 1))


def new_groups(max_tokens: int, experts_per_token: int, num_experts: int) -> Groups:
    """Room for the groups of the layer with the most experts."""
    rows = max_tokens * experts_per_token
    return Groups(
        chosen=np.zeros(rows, np.int64),
        weights=np.zeros(rows, np.float32),
        slots=np.zeros(rows, np.int64),
        gates=np.zeros(max_tokens, np.float32),
        experts=np.zeros(num_experts, np.int64),
        num_rows=np.zeros(num_experts, np.int64),
        first_slot=np.zeros(num_experts, np.int64),
        next_slot=np.zeros(num_experts, np.int64),
        totals=np.zeros(2, np.int64),
    )


def scratch_size(num_experts: int) -> int:
    """Words of scratch memory that `choose_experts` needs."""
    return 4 * padded(num_experts)


@kernel
def _softmax(x, start, size, out):
    """`out[i] = exp(x[i]) / sum of exp(x)`; x and out: readable and writable up to a whole vector."""
    greatest = x[start]
    for i in range(1, size):
        greatest = max(greatest, x[start + i])
    for i in range(0, size, LANES):
        store(out, i, exp(load(x, start + i) - broadcast(greatest)))
    total = np.float32(0.0)
    for i in range(size):
        total += out[i]
    for i in range(size):
        out[i] /= total


@kernel
def sigmoid(x, start, size, out):
    """`out[i] = 1 / (1 + exp(-x[i]))`; x and out: readable and writable up to a whole vector."""
    one, zero = broadcast(np.float32(1.0)), broadcast(np.float32(0.0))
    for i in range(0, size, LANES):
        store(out, i, one / (one + exp(zero - load(x, start + i))))


@kernel
def _take_best(x, free, start, end):
    """The index of the greatest of `x[start : end]` that is free, the first of equals; it is free no more."""
    best = -1
    for i in range(start, end):
        if free[i] > 0.0 and (best < 0 or x[i] > x[best]):
            best = i
    free[best] = 0.0
    return best


@kernel
def _free_best_groups(features, selection, free, scores):
    """Leaves the experts of a token's best groups free (DeepSeek-AI 2024).

    selection: [num_experts]; free: likewise, out; scores: scratch, likewise.
    """
    count = features.expert_groups
    size = features.num_experts // count
    for group in range(count):
        total = np.float32(0.0)
        for _ in range(features.group_best):
            total += selection[_take_best(selection, free, group * size, (group + 1) * size)]
        scores[group] = total
    for group in range(count):
        free[group] = 1.0
    for _ in range(features.groups_per_token):
        _take_best(scores, free, plain(0), count)
    # The best groups are free no more; from the last expert on, because the first of `free` are the groups'.
    for i in range(features.num_experts - 1, -1, -1):
        free[i] = 1.0 - free[i // size]


@kernel
def choose_experts(features, logits, start, bias, bias_start, scratch, chosen, weights):
    """Chooses the experts of a row by the router's logits, [num_experts] at `start`; they are kept.

    features: the layer's row of `LAYER`. bias: holds the selection bias at `bias_start`, if there is one.
    scratch: `scratch_size` words. chosen, weights: out, [experts_per_token], best first; equals in the order
    of their indices.
    """
    size, k = features.num_experts, features.experts_per_token
    scores, selection, free = scratch, scratch[padded(size) :], scratch[2 * padded(size) :]
    if features.router == SOFTMAX:
        _softmax(logits, start, size, scores)
    elif features.router == SIGMOID:
        sigmoid(logits, start, size, scores)
    else:
        for i in range(size):
            scores[i] = logits[start + i]
    for i in range(size):
        free[i] = 1.0
        selection[i] = scores[i]
        if features.selection_bias:
            selection[i] += bias[bias_start + i]
    if features.expert_groups > 1:
        _free_best_groups(features, selection, free, scratch[3 * padded(size) :])
    for rank in range(k):
        chosen[rank] = _take_best(selection, free, plain(0), size)
        weights[rank] = scores[chosen[rank]]
    if features.router == TOP_SOFTMAX:
        for rank in range(k):
            selection[rank] = weights[rank]
        _softmax(selection, plain(0), k, scores)
        for rank in range(k):
            weights[rank] = scores[rank]
    divisor = np.float32(1.0)
    if features.renormalize:
        divisor = np.float32(0.0)
        for rank in range(k):
            divisor += weights[rank]
        divisor = max(divisor, np.float32(features.score_floor))
    for rank in range(k):
        weights[rank] = weights[rank] / divisor * np.float32(features.router_scale)


@kernel
def group_rows(features, num_rows, groups):
    """Gives each of the chosen experts of the rows a slot: fills the rest of `groups`."""
    k, next_slot = features.experts_per_token, groups.next_slot
    for expert in range(features.num_experts):
        next_slot[expert] = 0
    for i in range(num_rows * k):
        next_slot[groups.chosen[i]] += 1
    count = slot = most = 0
    for expert in range(features.num_experts):
        rows = next_slot[expert]
        if rows > 0:
            groups.experts[count], groups.num_rows[count], groups.first_slot[count] = expert, rows, slot
            next_slot[expert] = slot
            slot += padded_rows(rows)
            most = max(most, rows)
            count += 1
    groups.totals[0], groups.totals[1] = count, most
    for i in range(num_rows * k):
        expert = groups.chosen[i]
        groups.slots[i] = next_slot[expert]
        next_slot[expert] += 1
