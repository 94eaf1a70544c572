"""What may be handed over as a prompt, as several, and as their parameters."""

from array import array
from typing import Any

import numpy as np
import pytest

from pagellm.engine import RequestError, SamplingParams
from pagellm.engine.requests.prompts import as_prompts, params_for_each, read_prompt


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("ab", "ab", None),
        ([1, 2], None, [1, 2]),
        ((1, np.int64(2)), None, [1, 2]),
        (np.array([1, 2], np.uint8), None, [1, 2]),
        (array("q", [1, 2]), None, [1, 2]),
        (range(1, 3), None, [1, 2]),
        ({"prompt": "ab"}, "ab", None),
        ({"prompt_token_ids": [1, 2]}, None, [1, 2]),
        ({"prompt": "ab", "prompt_token_ids": [1, 2]}, "ab", [1, 2]),
    ],
)
def test_every_form_of_a_prompt_is_read(prompt: Any, text: str | None, token_ids: list[int] | None) -> None:
    assert read_prompt(prompt) == (text, token_ids)
    assert all(type(token) is int for token in read_prompt(prompt).token_ids or [])
    assert as_prompts([prompt, prompt]) == [prompt, prompt] or isinstance(prompt, np.ndarray)
    assert len(as_prompts(prompt)) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt: found None"),
        (b"ab", "prompt: found b'ab'"),
        (memoryview(b"ab"), "prompt: found <memory"),
        (7, "prompt: found 7"),
        ({1, 2}, "prompt: found {1, 2}"),
        ((token for token in [1]), "prompt: found <generator"),
        ({}, "prompt: found {}"),
        ({"prompts": "ab"}, "prompt: found {'prompts': 'ab'}"),
        ({"prompt": None}, "prompt: found None, expected a string"),
        ({"prompt_token_ids": "ab"}, "prompt_token_ids: found 'ab'"),
        ({"prompt": "ab", "multi_modal_data": {}}, "multi_modal_data"),
        ([1, True], r"prompt\[1\]: found True, expected an integer"),
        ([1, 2.0], r"prompt\[1\]: found 2.0, expected an integer"),
        (np.array([1.5]), r"prompt\[0\]: found 1.5, expected an integer"),
        ("a\ud800", "character 1 is a lone surrogate"),
    ],
)
def test_anything_else_is_refused_by_name(prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_prompt(prompt)


@pytest.mark.parametrize("prompts", [None, 7, {"ab"}, b"ab", memoryview(b"ab"), (text for text in ["ab"])])
def test_what_is_no_list_of_prompts_is_refused(prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompts: found"):
        as_prompts(prompts)


def test_what_was_read_is_a_copy() -> None:
    token_ids = [1, 2]
    read = read_prompt(token_ids)
    token_ids[0] = 9
    assert read.token_ids == [1, 2]


def test_parameters_are_one_for_all_or_one_for_each() -> None:
    one, other = SamplingParams(seed=1), SamplingParams(seed=2)
    assert params_for_each(None, 2) == [None, None]
    assert params_for_each(one, 2) == [one, one]
    assert params_for_each([one, other], 2) == [one, other]
    with pytest.raises(RequestError, match="sampling_params: found 1, expected 2"):
        params_for_each([one], 2)


@pytest.mark.parametrize("params", [{"temperature": 0}, [{"temperature": 0}], "greedy", 0.5])
def test_parameters_of_another_kind_are_refused(params: Any) -> None:
    with pytest.raises(RequestError, match=r"sampling_params: found .*, expected a SamplingParams"):
        params_for_each(params, 1)
