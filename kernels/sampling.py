"""From one row of logits to one token id: penalties, filters, a counter-based draw, and log-probabilities.

The order is: repetition, frequency and presence penalties, logit bias, temperature, top-k, top-p (over what
top-k left), min-p. Log-probabilities are the model's own, before any of these. The draw is a function of
(seed, position) alone, so what a row samples never depends on the other rows.
"""

import numpy as np

from kernels.jit import kernel
from kernels.simd import LANES, broadcast, exp, load, maximum, reduce_add, reduce_max, store

# Candidates are ordered by histogram: buckets of equal width below the greatest logit, the last one open.
_BUCKETS = 2048
_BUCKETS_PER_NAT = 64.0
_SUM_CHUNK = 1024


@kernel
def _mul_hi_lo(a, b):
    product = np.uint64(a) * np.uint64(b)
    return np.uint32(product >> np.uint64(32)), np.uint32(product & np.uint64(0xFFFFFFFF))


@kernel
def philox(seed, counter):
    """64 random bits for a (seed, counter) pair of uint64: Philox4x32-10 (Salmon et al. 2011)."""
    key0, key1 = np.uint32(seed & np.uint64(0xFFFFFFFF)), np.uint32(seed >> np.uint64(32))
    c0, c1 = np.uint32(counter & np.uint64(0xFFFFFFFF)), np.uint32(counter >> np.uint64(32))
    c2, c3 = np.uint32(0), np.uint32(0)
    for _ in range(10):
        high0, low0 = _mul_hi_lo(np.uint32(0xD2511F53), c0)
        high1, low1 = _mul_hi_lo(np.uint32(0xCD9E8D57), c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 = np.uint32(key0 + np.uint32(0x9E3779B9))
        key1 = np.uint32(key1 + np.uint32(0xBB67AE85))
    return (np.uint64(c1) << np.uint64(32)) | np.uint64(c0)


@kernel
def uniform(seed, counter):
    """A float64 in [0, 1) for a (seed, counter) pair."""
    return np.float64(philox(seed, counter) >> np.uint64(11)) * 2.0**-53


@kernel
def greatest(x, size):
    """The greatest of `x[:size]`."""
    whole = size - size % LANES
    best = broadcast(np.float32(-np.inf))
    for i in range(0, whole, LANES):
        best = maximum(load(x, i), best)
    result = reduce_max(best)
    for i in range(whole, size):
        result = max(result, x[i])
    return result


@kernel
def argmax(x, size):
    """The first index of the greatest of `x[:size]`."""
    best = greatest(x, size)
    for i in range(size):
        if x[i] == best:
            return i
    return 0


@kernel
def exponentials(x, size, shift, out):
    """`out[i] = exp(x[i] - shift)`; returns their sum. x and out reach up to a whole vector."""
    sum_of_chunks = 0.0
    for chunk in range(0, size, _SUM_CHUNK):
        end = min(chunk + _SUM_CHUNK, size)
        whole = chunk + (end - chunk) // LANES * LANES
        total = broadcast(np.float32(0.0))
        for i in range(chunk, whole, LANES):
            value = exp(load(x, i) - broadcast(shift))
            store(out, i, value)
            total = total + value
        sum_of_chunks += np.float64(reduce_add(total))
        if whole < end:
            store(out, whole, exp(load(x, whole) - broadcast(shift)))
            for i in range(whole, end):
                sum_of_chunks += np.float64(out[i])
    return sum_of_chunks


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
def _bucket(distance):
    return np.int64(min(distance * _BUCKETS_PER_NAT, _BUCKETS - 1.0))


@kernel
def _cutoff(scaled, weights, size, top, top_k, top_p):
    """Where top-k and then top-p end: (value, id); a token stays if it is greater, or equal with id <= id.

    Ties go to the lower id. The candidates are sorted only within the histogram bucket of each boundary.
    """
    masses = np.zeros(_BUCKETS, np.float64)
    counts = np.zeros(_BUCKETS, np.int64)
    for i in range(size):
        bucket = _bucket(np.float64(top - scaled[i])) if scaled[i] > -np.inf else _BUCKETS - 1
        masses[bucket] += weights[i]
        counts[bucket] += 1

    value, last_id, mass = np.float32(-np.inf), size, 0.0
    if 0 < top_k < size:
        kept, bucket = 0, 0
        while kept + counts[bucket] < top_k:
            kept += counts[bucket]
            mass += masses[bucket]
            bucket += 1
        ids = _sorted_bucket(scaled, size, top, bucket, counts[bucket])
        for i in ids[: top_k - kept]:
            mass += weights[i]
            value, last_id = scaled[i], i
    else:
        for bucket in range(_BUCKETS):
            mass += masses[bucket]
    if top_p < 1.0:
        target, reached, bucket = top_p * mass, 0.0, 0
        while bucket < _BUCKETS - 1 and reached + masses[bucket] < target:
            reached += masses[bucket]
            bucket += 1
        least_value, least_id = value, last_id
        for i in _sorted_bucket(scaled, size, top, bucket, counts[bucket]):
            if reached >= target or scaled[i] < least_value or (scaled[i] == least_value and i > least_id):
                break
            reached += weights[i]
            value, last_id = scaled[i], i
    return value, last_id


@kernel
def _sorted_bucket(scaled, size, top, bucket, count):
    """The ids in one histogram bucket, greatest value first, lower ids first among equals."""
    ids = np.empty(count, np.int64)
    values = np.empty(count, np.float32)
    found = 0
    for i in range(size):
        inside = bucket == _BUCKETS - 1
        if scaled[i] > -np.inf:
            inside = _bucket(np.float64(top - scaled[i])) == bucket
        if inside:
            ids[found] = i
            values[found] = -scaled[i]
            found += 1
    return ids[np.argsort(values, kind="mergesort")]


@kernel
def sample(logits, size, temperature, top_k, top_p, min_p, seed, position, scaled, weights):
    """The sampled token id, or -1 if no token is allowed.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing.
    scaled, weights: working memory, [vocab_size] up to a whole vector.
    """
    top = greatest(logits, size)
    if top == -np.inf:
        return -1
    if temperature == 0:
        return argmax(logits, size)
    # Dividing after subtracting the greatest keeps a tiny temperature from overflowing.
    for i in range(size):
        scaled[i] = (logits[i] - top) / temperature
    total = exponentials(scaled, size, np.float32(0.0), weights)
    value, last_id = np.float32(-np.inf), size
    if 0 < top_k < size or top_p < 1.0:
        value, last_id = _cutoff(scaled, weights, size, np.float32(0.0), top_k, top_p)
    if value > -np.inf or min_p > 0:
        total = 0.0
        for i in range(size):
            if scaled[i] < value or (scaled[i] == value and i > last_id) or weights[i] < min_p:
                weights[i] = 0.0
            total += weights[i]
    target, reached, chosen = uniform(seed, position) * total, 0.0, 0
    for i in range(size):
        if weights[i] > 0:
            chosen = i
            reached += weights[i]
            if reached > target:
                break
    return chosen


@kernel
def top_tokens(logits, size, ids):
    """Fills `ids` with the ids of the greatest logits, greatest first, lower ids first among equals."""
    count = 0
    for i in range(size if ids.size else 0):
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
    """The logarithm of the sum of exp(logits): a log-probability is a logit minus this."""
    top = greatest(logits, size)
    return np.float64(top) + np.log(exponentials(logits, size, top, scratch))
