"""A naive NumPy version of every kernel, written from the literature's definitions, in float64.

Nothing here knows how the kernels compute, tile or pack, and nothing is imported from them. Shapes are plain
ones: rows of activations are [num_rows, size], heads are [num_tokens, num_heads, head_dim].
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def _exact(x: ArrayLike) -> Floats:
    return np.asarray(x, np.float64)


# Short numbers


def bfloat16(x: ArrayLike) -> Floats:
    """Each number rounded to 8 significant bits in the range of float32, ties to the even one."""
    x = _exact(x)
    _, exponent = np.frexp(x)
    step = np.ldexp(1.0, np.maximum(exponent, -125) - 8)  # below 2^-126 steps no longer shrink
    rounded = np.rint(x / step) * step
    rounded = np.where(np.abs(rounded) < 2.0**128, rounded, np.copysign(np.inf, x))
    return np.where(np.isnan(x), np.nan, rounded)


def quantized_blocks(x: ArrayLike) -> tuple[Floats, Floats]:
    """Rows [M, K] in blocks of 32 as whole numbers times a scale: the greatest magnitude becomes 127.

    Returns the numbers [M, blocks, 32] and the scales [M, blocks]. The arithmetic is float32's, because it
    decides which way a tie goes. Zeros fill up the last block; magnitudes below 1e-30 count as zeros.
    """
    x = np.asarray(x, np.float32)
    blocks = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    greatest = np.abs(blocks).max(axis=2)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(greatest > 1e-30, np.float32(127) / greatest, np.float32(0))
        return _exact(np.rint(blocks * inverse[..., None])), _exact(greatest) / 127


def quantized_rows(x: ArrayLike) -> tuple[Floats, Floats]:
    """Like `quantized_blocks`, where a whole row has one scale: the numbers [M, K] and the scales [M]."""
    x = np.asarray(x, np.float32)
    greatest = np.abs(x).max(axis=1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        inverse = np.where(greatest > 1e-30, np.float32(127) / greatest, np.float32(0))
        return _exact(np.rint(x * inverse[:, None])), _exact(greatest) / 127


def e4m3(bytes: ArrayLike) -> Floats:
    """What bytes stand for as E4M3 (Micikevicius et al. 2022): sign, four bits of exponent, mantissa."""
    byte = np.asarray(bytes, np.int64)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    return np.where(byte >> 7 == 1, -magnitude, magnitude)


# Linear algebra


def matmul(x: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> Floats:
    """[M, K] times the transpose of [N, K], plus [N]."""
    return _exact(x) @ _exact(weights).T + _exact(bias)


def rounding_bound(x: ArrayLike, weights: ArrayLike, bias: ArrayLike, roundings: int) -> Floats:
    """How far from `matmul` float32 may be if no product goes through more roundings (Higham 2002, 3.1)."""
    unit, n = 2.0**-24, roundings
    magnitudes = matmul(np.abs(x), np.abs(weights), np.abs(bias))
    return n * unit / (1 - n * unit) * magnitudes + n * np.finfo(np.float32).smallest_subnormal


# Normalisation


def layer_norm(x: ArrayLike, scale: ArrayLike, shift: ArrayLike, epsilon: float) -> Floats:
    """Ba et al. 2016, over the last axis; the variance is the biased one."""
    x = _exact(x)
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    return centered / np.sqrt(variance + epsilon) * _exact(scale) + _exact(shift)


def rms_norm(x: ArrayLike, scale: ArrayLike, epsilon: float) -> Floats:
    """Zhang and Sennrich 2019, over the last axis."""
    x = _exact(x)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * _exact(scale)


# Mixtures of experts


@dataclass(frozen=True)
class Router:
    """How scores become a few experts of a token, and what these are multiplied by (Shazeer et al. 2017).

    kind: "softmax" of all logits, "top_softmax" of the chosen ones' alone, or "sigmoid" of each. bias: added
    to the scores that experts are chosen by, and to no weight. groups, per_token, best: neighbouring experts
    are in so many groups, of which the best by the sum of so many best experts stay (DeepSeek-AI 2024).
    """

    kind: str
    num_chosen: int
    bias: ArrayLike = 0.0
    renormalize: bool = False
    floor: float = 0.0
    scale: float = 1.0
    groups: int = 1
    per_token: int = 1
    best: int = 1

    def choose(self, logits: ArrayLike) -> tuple[NDArray[np.int64], Floats]:
        """Of one token's logits: the experts, best first and the first of equals, and their weights."""
        x = _exact(logits)
        scores = {"softmax": softmax(x), "top_softmax": x, "sigmoid": 1 / (1 + np.exp(-x))}[self.kind]
        selection = scores + _exact(self.bias)
        grouped = selection.reshape(self.groups, -1)
        of_group = np.sort(grouped, axis=1)[:, ::-1][:, : self.best].sum(axis=1)
        lost = np.argsort(-of_group, kind="stable")[self.per_token :]
        grouped[lost] = -np.inf
        chosen = np.argsort(-selection, kind="stable")[: self.num_chosen]
        weights = softmax(x[chosen]) if self.kind == "top_softmax" else scores[chosen]
        if self.renormalize:
            weights = weights / max(weights.sum(), self.floor)
        return chosen, weights * self.scale


def softmax(x: ArrayLike) -> Floats:
    """Over the last axis."""
    powers = np.exp(_exact(x) - np.max(x, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


# Activations


def silu(x: ArrayLike) -> Floats:
    """Hendrycks and Gimpel 2016: x * sigmoid(x)."""
    x = _exact(x)
    with np.errstate(over="ignore"):
        return x / (1.0 + np.exp(-x))


def gelu(x: ArrayLike) -> Floats:
    """Hendrycks and Gimpel 2016: x times the normal distribution's cumulative function."""
    return np.vectorize(lambda v: 0.5 * v * math.erfc(-v / math.sqrt(2.0)), otypes=[np.float64])(_exact(x))


def gelu_tanh(x: ArrayLike) -> Floats:
    """Hendrycks and Gimpel 2016: the approximation by tanh."""
    x = _exact(x)
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def relu(x: ArrayLike) -> Floats:
    """The positive part."""
    return np.clip(_exact(x), 0.0, None)


def clamped_swiglu(gate: ArrayLike, linear: ArrayLike) -> Floats:
    """OpenAI 2025: both halves clamped at 7, from below the linear one alone."""
    gate, linear = np.minimum(_exact(gate), 7), np.clip(_exact(linear), -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (linear + 1)


def relu_squared(x: ArrayLike) -> Floats:
    """So et al. 2021: the square of the positive part."""
    return relu(x) ** 2


def softcap(x: ArrayLike, cap: float) -> Floats:
    """Bello et al. 2017: what a tanh bounds by a cap; 0 bounds nothing."""
    return cap * np.tanh(_exact(x) / cap) if cap else _exact(x)


# Positions and attention


def rotary(x: ArrayLike, position: int, frequencies: ArrayLike) -> Floats:
    """Su et al. 2021, half-split, over the last axis: dimensions i and i + n turn as one complex number.

    n is the number of frequencies; dimensions from 2 n on stay as they are.
    """
    turned = _exact(x).copy()
    n = len(np.asarray(frequencies))
    rotated = (turned[..., :n] + 1j * turned[..., n : 2 * n]) * np.exp(1j * position * _exact(frequencies))
    turned[..., :n], turned[..., n : 2 * n] = rotated.real, rotated.imag
    return turned


def attention(
    queries: ArrayLike,
    keys: ArrayLike,
    values: ArrayLike,
    scale: float,
    window: int = 0,
    cap: float = 0.0,
    sinks: ArrayLike | None = None,
) -> Floats:
    """Causal attention (Vaswani et al. 2017) of one sequence's last T tokens to all of its S tokens.

    queries: [T, num_heads, head_dim]; keys, values: [S, num_kv_heads, own size]. Consecutive query heads
    share a KV head (Ainslie et al. 2023). window: the last tokens that each sees, itself included (Beltagy
    et al. 2020), or 0; cap: of `softcap`, for the scores. sinks: [num_heads], a score each that no value
    belongs to (Xiao et al. 2023).
    """
    queries, keys, values = _exact(queries), _exact(keys), _exact(values)
    num_queries, num_heads, _ = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    out = np.empty((num_queries, num_heads, values.shape[-1]))
    for t in range(num_queries):
        end = num_keys - num_queries + t + 1
        seen = slice(max(end - window, 0) if window else 0, end)
        for head in range(num_heads):
            kv_head = head * num_kv_heads // num_heads
            scores = softcap(keys[seen, kv_head] @ queries[t, head] * scale, cap)
            greatest = scores.max() if sinks is None else max(scores.max(), _exact(sinks)[head])
            weights = np.exp(scores - greatest)
            given = weights.sum() + (0 if sinks is None else np.exp(_exact(sinks)[head] - greatest))
            out[t, head] = weights @ values[seen, kv_head] / given
    return out


# From logits to tokens


def penalize(
    logits: ArrayLike,
    prompt: list[int],
    output: list[int],
    repetition: float,
    frequency: float,
    presence: float,
) -> Floats:
    """Repetition (Keskar et al. 2019) over prompt and output, then frequency and presence over the output."""
    logits = _exact(logits).copy()
    for token in set(prompt) | set(output):
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token in set(output):
        logits[token] -= frequency * output.count(token) + presence
    return logits


@dataclass(frozen=True)
class Filters:
    """What limits the tokens that may be sampled; the defaults limit nothing."""

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def by_likelihood(logits: ArrayLike) -> NDArray[np.int64]:
    """Ids, the greatest logit first, the lower id first among equals."""
    return np.argsort(-_exact(logits), kind="stable")


def likelihoods(logits: ArrayLike, temperature: float) -> Floats:
    """The probabilities up to a factor that makes the greatest 1."""
    logits = _exact(logits)
    with np.errstate(over="ignore"):
        return np.exp((logits - logits.max()) / temperature)


def kept(logits: ArrayLike, temperature: float, filters: Filters) -> NDArray[np.int64]:
    """The ids that top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) keep, ascending.

    top-k keeps exactly k, the lower ids among equals; top-p the fewest of the likeliest whose share of what
    top-k kept is top_p or more; min-p those with at least min_p of the greatest probability.
    """
    ids = by_likelihood(logits)
    p = likelihoods(logits, temperature)
    if filters.top_k > 0:
        ids = ids[: filters.top_k]
    if filters.top_p < 1.0:
        share = np.cumsum(p[ids]) / p[ids].sum()
        ids = ids[: 1 + np.searchsorted(share, filters.top_p)]
    ids = ids[p[ids] >= filters.min_p]
    return np.sort(ids[p[ids] > 0])


def cumulative(logits: ArrayLike, temperature: float, filters: Filters) -> tuple[NDArray[np.int64], Floats]:
    """The kept ids, ascending, and the probability of a token up to and with each."""
    ids = kept(logits, temperature, filters)
    p = likelihoods(logits, temperature)[ids]
    return ids, np.cumsum(p) / p.sum()


def sample(logits: ArrayLike, temperature: float, filters: Filters, uniform: float) -> int:
    """The first kept id, in the order of ids, whose cumulative probability exceeds a uniform draw."""
    if temperature == 0:
        return int(by_likelihood(logits)[0])
    ids, shares = cumulative(logits, temperature, filters)
    return int(ids[min(np.searchsorted(shares, uniform, side="right"), len(ids) - 1)])


def log_softmax(logits: ArrayLike) -> Floats:
    """Log-probabilities."""
    logits = _exact(logits)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def top_tokens(logits: ArrayLike, count: int) -> list[int]:
    """The ids of the greatest logits."""
    return by_likelihood(logits)[:count].tolist()


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four random words for a counter and a key of words."""
    word = (1 << 32) - 1
    right0, left0, right1, left1 = counter
    key0, key1 = key
    for _ in range(10):
        product0, product1 = right0 * 0xD2511F53, right1 * 0xCD9E8D57
        right0, left0, right1, left1 = (
            (product1 >> 32) ^ left0 ^ key0,
            product1 & word,
            (product0 >> 32) ^ left1 ^ key1,
            product0 & word,
        )
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word
    return right0, left0, right1, left1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1): the upper 53 of 64 bits that a seed (the key) and a position (the counter) give."""
    word = (1 << 32) - 1
    low, high, _, _ = philox4x32((position & word, position >> 32, 0, 0), (seed & word, seed >> 32))
    return ((high << 32 | low) >> 11) * 2.0**-53
