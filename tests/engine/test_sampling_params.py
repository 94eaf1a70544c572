"""Sampling parameters are checked when they are made."""

import math
from typing import Any

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
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("stop", [""]),
        ("stop", [1]),
        ("stop", 5),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "12"),
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
