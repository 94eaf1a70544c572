"""A request's fields are checked when it is made."""

import math
from typing import Any

import pytest

from pagellm.engine import TraceError
from pagellm.sim import TraceRequest

GOOD: dict[str, Any] = {"arrival_time": 1.5, "output_len": 2, "prompt_len": 20}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("arrival_time", value) for value in (-0.1, math.nan, math.inf, True, "1", None, 10**400)),
        *(("output_len", value) for value in (0, -1, 1.0, True, "1", None, 2**31)),
        *(("prompt_len", value) for value in (0, -1, 20.0, True, None, 10**400)),
        *(
            ("hash_ids", value)
            for value in ([], [1], [1, 2, 3], [1, -2], [1, True], [1, 2.0], [1, 2**64], "12", 5)
        ),
        *(("hash_block_size", value) for value in (0, True, 16.0)),
        *(("priority", value) for value in (1.0, True, "high")),
        *(("id", value) for value in (5, None, "\ud800")),
        *(("session", value) for value in ("", 5, "\ud800")),
        *(("tenant", value) for value in ("", 5)),
        *(("deadline_s", value) for value in (-1, math.inf, "1")),
    ],
)
def test_a_bad_value_is_an_error_that_names_its_field(name: str, value: Any) -> None:
    hashes = {"hash_ids": [1, 2], "hash_block_size": 16} if name.startswith("hash") else {}
    with pytest.raises(TraceError, match=rf"^{name}(\[1\])?: found .*, expected "):
        TraceRequest(**GOOD | hashes | {name: value})


@pytest.mark.parametrize(
    ("prompts", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "prompt_len": 1}, "prompt"),
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, -1]}, r"prompt_token_ids\[1\]"),
        ({"prompt_token_ids": [True]}, r"prompt_token_ids\[0\]"),
        ({"prompt_token_ids": [1, 2], "prompt_len": 3}, "prompt_len"),
        ({"prompt_token_ids": [1, 2], "hash_ids": [1]}, "hash_ids"),
        ({"prompt": "x", "hash_ids": [1]}, "hash_ids"),
        ({"prompt_len": 5, "hash_block_size": 16}, "hash_ids"),
    ],
)
def test_a_prompt_is_given_in_one_way(prompts: dict[str, Any], field: str) -> None:
    with pytest.raises(TraceError, match=f"^{field}: found"):
        TraceRequest(arrival_time=0, output_len=1, **prompts)


def test_what_follows_from_other_fields_is_filled_in() -> None:
    ids = TraceRequest(arrival_time=0, output_len=1, prompt_token_ids=[4, 5, 6])
    assert (ids.prompt_len, ids.prompt_token_ids, type(ids.arrival_time)) == (3, (4, 5, 6), float)
    hashed = TraceRequest(arrival_time=0, output_len=1, prompt_len=513, hash_ids=[7, 8])
    assert (hashed.hash_block_size, hashed.hash_ids) == (512, (7, 8))
    text = TraceRequest(arrival_time=0, output_len=1, prompt="nine bytes")
    assert (text.prompt_len, text.expected_prompt_len) == (None, 3)


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(TraceError) as caught:
        TraceRequest(arrival_time=0, output_len=1, prompt_token_ids=["x" * 1000])
    assert len(str(caught.value)) < 200
