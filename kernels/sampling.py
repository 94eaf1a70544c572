"""From one row of logits to one token id: penalties, filters, a counter-based draw, and log-probabilities.

The order is: repetition, frequency and presence penalties, logit bias, a mask of allowed tokens, temperature,
top-k, top-p (over what top-k left), min-p. Log-probabilities are the model's own, before any of these. The
draw is a function of (seed, position) alone, so what a row samples never depends on the other rows.

Nothing is sorted. Tokens rank by logit, the lower id first among equals, and every filter keeps a beginning
of that ranking: the logits above a cut and the first few ("ties") that equal it. So a filter is a cut, which
is found by halving a range, and a draw is a walk along the ids. Sums add up float32 within a block of tokens
and float64 from block to block, in an order that the ids give.
"""

import math

import numpy as np

from pagellm.kernels.jit import kernel
from pagellm.kernels.simd import (
    LANES,
    broadcast,
    exp,
    first_lane,
    load,
    maximum,
    reduce_add,
    reduce_max,
    store,
    store_within,
    where_at_least,
)

# Tokens that are looked at together, and passed over together where none of them is of interest.
_BLOCK = 16 * LANES
# A token that is so many nats less likely than the likeliest is never drawn: `exp` ends there.
_NATS = 87.3


@kernel
def philox(seed, counter):
    """64 random bits for a (seed, counter) pair of uint64: Philox4x32-10 (Salmon et al. 2011)."""
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    key0, key1 = seed & word, seed >> half
    c0, c1, c2, c3 = counter & word, counter >> half, np.uint64(0), np.uint64(0)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (product1 >> half) ^ c1 ^ key0, product1 & word
        c2, c3 = (product0 >> half) ^ c3 ^ key1, product0 & word
        key0 = (key0 + np.uint64(0x9E3779B9)) & word
        key1 = (key1 + np.uint64(0xBB67AE85)) & word
    return c1 << half | c0


@kernel
def uniform(seed, counter):
    """A float64 in [0, 1) for a (seed, counter) pair."""
    return np.float64(philox(seed, counter) >> np.uint64(11)) * 2.0**-53


@kernel
def _greatest_by_lane(x, start):
    """The greatest of `x[start : start + _BLOCK]` in each lane."""
    best = load(x, start)
    for i in range(start + LANES, start + _BLOCK, LANES):
        best = maximum(load(x, i), best)
    return best


@kernel
def greatest(x, size):
    """The greatest of `x[:size]`."""
    best = broadcast(np.float32(-np.inf))
    whole = size - size % _BLOCK
    for start in range(0, whole, _BLOCK):
        best = maximum(_greatest_by_lane(x, start), best)
    result = reduce_max(best)
    for i in range(whole, size):
        result = max(result, x[i])
    return result


@kernel
def has_softmax(x, size):
    """Whether `x[:size]` are logits: no NaN, none infinitely great, one that is not -inf."""
    zero, nothing = broadcast(np.float32(0.0)), broadcast(np.float32(-np.inf))
    not_a_number = broadcast(np.float32(np.nan))
    total, whole = zero, size - size % LANES
    for i in range(0, whole, LANES):
        total = total + where_at_least(load(x, i), nothing, zero, not_a_number)
    numbers = reduce_add(total) == 0
    for i in range(whole, size):
        numbers = numbers and x[i] == x[i]
    return numbers and abs(greatest(x, size)) < np.inf


@kernel
def argmax(x, size):
    """The first index of the greatest of `x[:size]`."""
    best = greatest(x, size)
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        if end - start == _BLOCK and reduce_max(_greatest_by_lane(x, start)) < best:
            continue
        for i in range(start, end):
            if x[i] == best:
                return i
    return 0


@kernel
def penalize(logits, tokens, prompt_len, repetition, frequency, presence, counts):
    """Applies the penalties in place.

    tokens: prompt and output so far; repetition (Keskar et al. 2019) looks at both, frequency and presence
    at the output. counts: int32 [vocab_size] of zeros, and zeros again afterwards.
    """
    for i in range(tokens.size):
        counts[tokens[i]] |= 1
        if i >= prompt_len:
            counts[tokens[i]] += 2
    for i in range(tokens.size):
        token = tokens[i]
        if counts[token] != 0:
            logit, count = logits[token], np.float32(counts[token] >> 1)
            logit = logit / repetition if logit > 0 else logit * repetition
            logit -= frequency * count
            if count > 0:
                logit -= presence
            logits[token] = logit
            counts[token] = 0


@kernel
def apply_mask(logits, size, mask):
    """Leaves tokens whose bits are 0 no chance: minus infinity.

    mask: uint32 [(size + 31) // 32], the bit of token t is bit t % 32 of word t // 32.
    """
    everything, one = np.uint32(0xFFFFFFFF), np.uint32(1)
    for w in range(mask.size):
        word = mask[w]
        if word != everything:
            for i in range(32 * w, min(32 * w + 32, size)):
                if word & one == 0:
                    logits[i] = -np.inf
                word = word >> one


@kernel
def _walk(logits, size, top, inverse, cut, ties, target, scratch):
    """Adds up the weights of the kept tokens in the order of ids until the sum exceeds `target`.

    Returns the sum and the token that it ended with. A token weighs exp((logit - top) * inverse); kept are
    those above `cut` and the first `ties` that equal it. A logit that is no number makes the sum none.
    scratch: [size up to a whole vector], of which no more than _BLOCK is used.
    """
    tops, inverses, cuts = broadcast(top), broadcast(inverse), broadcast(cut)
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    weight_at_cut = np.float64(first_lane(exp((cuts - tops) * inverses)))
    reached = 0.0
    for start in range(0, size, _BLOCK):
        end = min(start + _BLOCK, size)
        if end - start == _BLOCK:
            if reduce_max(_greatest_by_lane(logits, start)) < cut:
                continue
            above, equal = zero, zero  # what those above the cut weigh, how many are equal to it
            for i in range(start, end, LANES):
                x = load(logits, i)
                above = above + where_at_least(cuts, x, zero, exp((x - tops) * inverses))
            if ties > 0:
                for i in range(start, end, LANES):
                    x = load(logits, i)
                    equal = equal + where_at_least(x, cuts, where_at_least(cuts, x, one, zero), zero)
            taken = min(np.float64(reduce_add(equal)), ties)
            amount = np.float64(reduce_add(above)) + taken * weight_at_cut
            if not reached + amount > target:
                reached += amount
                ties -= taken
                continue
        # The walk ends in this block, token by token: the sum exceeds the target, or there are no more.
        for i in range(start, end, LANES):
            store(scratch, i - start, exp((load(logits, i) - tops) * inverses))
        token = start
        for i in range(start, end):
            weight = np.float64(scratch[i - start])
            if logits[i] == cut:
                ties -= 1.0
            if logits[i] < cut or (logits[i] == cut and ties < 0) or weight == 0:
                continue
            token = i
            reached += weight
            if reached > target:
                break
        return reached, token
    return reached, 0


@kernel
def _keep(x, size, low, high, out):
    """Copies those of `x[:size]` from low to high, in their order, to `out`, which may be `x`.

    Returns how many there are with the -inf that fill the last vector up.
    """
    lows, highs = broadcast(low), broadcast(high)
    kept, whole = 0, size - size % LANES
    for i in range(0, whole, LANES):
        kept += store_within(out, kept, load(x, i), lows, highs)
    for i in range(whole, size):
        if low <= x[i] <= high:
            out[kept] = x[i]
            kept += 1
    while kept % LANES:
        out[kept] = -np.inf
        kept += 1
    return kept


@kernel
def _cutoff(logits, size, low, top, inverse, target, scratch):
    """The greatest logit such that it and those above it weigh `target` or more, and the weight above it.

    Only logits from `low` on are considered; if they weigh less, the cut leaves all of them. At an inverse
    temperature of 0 every token weighs 1, which makes a top-k of the target.
    scratch: [size up to a whole vector].

    Quickselect (Hoare 1961) by values: a pass weighs what reaches the middle between low and high. Both then
    snap to logits that are there, so that it ends soon whatever the scale, and what is outside is dropped.
    """
    tops, inverses = broadcast(top), broadcast(inverse)
    zero, one = broadcast(np.float32(0.0)), broadcast(np.float32(1.0))
    nothing = broadcast(np.float32(-np.inf))
    weigh = inverse > 0
    above, high = 0.0, top
    count = _keep(logits, size, low, high, scratch)
    while low < high:
        middle = low * np.float32(0.5) + high * np.float32(0.5)
        if not low < middle < high:
            middle = high
        middles = broadcast(middle)
        # The logits nearest to the middle: those from it on negated, as there is no minimum of vectors.
        weight, from_middle, to_middle = 0.0, nothing, nothing
        for start in range(0, count, _BLOCK):
            total = zero
            for i in range(start, min(start + _BLOCK, count), LANES):
                x = load(scratch, i)
                total = total + where_at_least(x, middles, exp((x - tops) * inverses) if weigh else one, zero)
                from_middle = maximum(where_at_least(x, middles, zero - x, nothing), from_middle)
                to_middle = maximum(where_at_least(x, middles, nothing, x), to_middle)
            weight += np.float64(reduce_add(total))
        if above + weight >= target:
            low = -reduce_max(from_middle)
        else:
            above += weight
            high = reduce_max(to_middle)
        count = _keep(scratch, count, low, high, scratch)
    return low, above


@kernel
def sample(logits, size, temperature, top_k, top_p, min_p, seed, position, scaled, weights):
    """The sampled token id, or -1 if no token is allowed.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing. Reads `logits` up to a whole vector.
    scaled, weights: working memory, [vocab_size up to a whole vector].
    """
    top = greatest(logits, size)
    if not abs(top) < np.inf:
        return -1
    if temperature == 0:
        return argmax(logits, size)
    inverse = np.float32(min(1.0 / np.float64(temperature), 3e38))
    lowest = np.float32(max(top - _NATS * temperature, -3e38))
    cut, ties = np.float32(-np.inf), 0.0
    if 0 < top_k < size:
        cut, above = _cutoff(logits, size, lowest, top, np.float32(0.0), np.float64(top_k), scaled)
        ties = top_k - above
    if top_p < 1.0:
        mass, _ = _walk(logits, size, top, inverse, cut, ties, np.inf, weights)
        # Tokens that weigh less than this are, all together, less than the share that may be left out.
        bound = top + temperature * math.log((1.0 - top_p) * mass / size)
        low = max(np.float32(bound - abs(bound) * 2.0**-23), lowest, cut)
        value, above = _cutoff(logits, size, low, top, inverse, top_p * mass, scaled)
        weight = np.float64(first_lane(exp(broadcast((value - top) * inverse))))
        needed = max(np.ceil((top_p * mass - above) / weight), 1.0)
        ties = needed if value > cut else min(needed, ties)
        cut = value
    if min_p > 0:
        # What float32 cannot tell from min_p of the greatest is kept.
        bound = top + temperature * (math.log(np.float64(min_p)) - 2.0**-24)
        value = np.float32(bound)
        if value > cut or (value == cut and value < bound):
            cut, ties = value, (np.inf if value >= bound else 0.0)
    total, _ = _walk(logits, size, top, inverse, cut, ties, np.inf, weights)
    _, token = _walk(logits, size, top, inverse, cut, ties, uniform(seed, position) * total, weights)
    return token


@kernel
def top_tokens(logits, size, ids):
    """Fills `ids`, [count], with those of the greatest `logits[:size]`, lower ids first among equals."""
    count = 0
    for start in range(0, size if ids.size else 0, _BLOCK):
        end = min(start + _BLOCK, size)
        if count == ids.size and end - start == _BLOCK:
            best = reduce_max(_greatest_by_lane(logits, start))
            if best <= logits[ids[count - 1]]:
                continue
        for i in range(start, end):
            if count == ids.size and not logits[i] > logits[ids[count - 1]]:
                continue
            place = count if count < ids.size else count - 1
            while place > 0 and logits[i] > logits[ids[place - 1]]:
                ids[place] = ids[place - 1]
                place -= 1
            ids[place] = i
            count = min(count + 1, ids.size)


@kernel
def log_sum_exp(logits, size, scratch):
    """The logarithm of the sum of exp(logits[:size]): a log-probability is a logit minus this.

    scratch: [size up to a whole vector].
    """
    top = greatest(logits, size)
    total, _ = _walk(logits, size, top, np.float32(1.0), np.float32(-np.inf), 0.0, np.inf, scratch)
    return np.float64(top) + math.log(total)
