"""Sampling parameters are checked when they are made."""

import math
import pickle
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from pagellm.engine import RequestError, SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e39),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("repetition_penalty", 1e-40),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("seed", "x"),
        ("seed", 1 << 64),
        ("seed", -(1 << 63) - 1),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 5),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [1]),
        ("bad_words", ["a\ud800"]),
        ("bad_words", ["a" * 70_000]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
        ("stop_token_ids", np.int64(2)),
        ("stop_token_ids", np.array(2)),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: 1e39}),
        ("logit_bias", [1]),
        ("logprobs", -1),
        ("logprobs", 101),
        ("prompt_logprobs", 1.0),
        ("ignore_eos", 1),
        ("skip_special_tokens", "no"),
        ("stop", ["a\ud800"]),
        ("stop", ["a" * 40_000, "b" * 40_000]),
        ("cache_salt", "\ud800"),
        ("tenant", 5),
        ("temperature", 10**400),
        ("top_k", [-(10**5000)]),
        ("top_k", 10**50),
        ("max_tokens", 1 << 64),
        ("stop_token_ids", [10**5000, "x"]),
        ("logit_bias", {10**5000: 1}),
        ("n", np.bool_(True)),
        ("deadline_s", math.nan),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_it(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        SamplingParams(**{name: value})


def test_the_edges_of_the_ranges_are_allowed() -> None:
    SamplingParams(temperature=0, top_k=-1, top_p=1, min_p=1, presence_penalty=-2, frequency_penalty=2, n=1)
    SamplingParams(max_tokens=None, min_tokens=1000, seed=-5, logit_bias={0: -math.inf}, logprobs=0)
    assert tuple(SamplingParams(stop="x").stop) == ("x",)


def test_a_completions_seed_follows_its_index() -> None:
    params = SamplingParams(n=4, seed=2**63, temperature=0.5)
    assert params.of_completion(3) == SamplingParams(n=1, seed=2**63 + 3, temperature=0.5)
    assert SamplingParams(n=2, seed=2**64 - 1).of_completion(1).seed == 0  # the largest that there is, and on


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    params = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), seed=np.uint8(3), logit_bias={np.int32(5): np.float16(1)},
        stop_token_ids=np.array([1, 2]),
    )  # type: ignore[arg-type] # fmt: skip
    assert params == SamplingParams(n=2, temperature=0.5, seed=3, logit_bias={5: 1}, stop_token_ids=(1, 2))
    values = [params.n, params.temperature, params.seed, *params.stop_token_ids, *params.logit_bias]
    assert list(map(type, values)) == [int, float, int, int, int, int]


def test_what_is_given_is_copied() -> None:
    stop, stop_token_ids, logit_bias = ["a"], [1], {5: 1.0}
    params = SamplingParams(stop=stop, stop_token_ids=stop_token_ids, logit_bias=logit_bias)
    stop.append("b")
    stop_token_ids.append(2)
    logit_bias[10**9] = 1.0
    assert (params.stop, params.stop_token_ids, dict(params.logit_bias)) == (("a",), (1,), {5: 1.0})
    assert params.of_completion(0).logit_bias is params.logit_bias


def test_parameters_are_pickled_and_copied_whole() -> None:
    params = SamplingParams(logit_bias={5: 1.0, 7: -math.inf}, stop=["a"])
    assert pickle.loads(pickle.dumps(params)) == params
    assert asdict(params)["logit_bias"] == {5: 1.0, 7: -math.inf}
