"""A profile is read with care, and between and beyond its points times continue linearly."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import EngineConfig, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.sim import CostModel
from pagellm.sim.costs.profile import ProfileCostModel, Table
from tests.sim.batches import batch_of

PROFILE: dict[str, Any] = {
    "format": "pagellm-profile",
    "version": 1,
    "model": "tiny",
    "quantization": "int8",
    "num_threads": 2,
    "machine": "a desk",
    "block_size": 16,
    "block_bytes": 1600,
    "prefill": {
        "chunk_tokens": [2, 10, 100],
        "context_tokens": [0, 100],
        "seconds": [[0.5, 0.6], [1.0, 2.0], [8.0, 20.0]],
    },
    "decode": {"num_sequences": [1, 5], "context_tokens": [0, 10], "seconds": [[0.1, 0.2], [0.3, 0.8]]},
    "mixed": {
        "chunk_tokens": [2, 100],
        "num_sequences": [1, 5],
        "context_tokens": 10,
        "seconds": [[0.6, 1.1], [8.1, 8.0]],
    },
    "overhead": {"step_s": 0.01, "sequence_s": 0.001},
    "transfer": {"copy_block_s": 0.25, "swap_block_s": 0.5},
    "fit": {"num_steps": 9, "mean_error": 0.1, "p90_error": 0.2, "mean_signed_error": -0.1},
}


def profile(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(PROFILE) | changes


def test_measured_points_are_given_back_and_between_them_it_is_bilinear() -> None:
    table = Table("t", [0, 10], [0, 2, 4], [[0, 1, 5], [10, 21, 45]])
    assert [table(x, y) for x in (0, 10) for y in (0, 2, 4)] == [0, 1, 5, 10, 21, 45]
    assert table(5, 0) == 5
    assert table(0, 3) == 3
    assert table(5, 3) == (3 + 33) / 2
    assert table.num_outside == 0


@given(st.floats(-50, 50), st.floats(-50, 50))
@pytest.mark.filterwarnings("ignore:t. asked")
def test_a_bilinear_law_is_found_again_everywhere(x: float, y: float) -> None:
    def law(x: float, y: float) -> float:
        return 3 + 2 * x + 5 * y + 0.5 * x * y

    xs, ys = [1.0, 2.0, 7.0], [0.0, 4.0, 9.0]
    table = Table("t", xs, ys, [[law(x, y) for y in ys] for x in xs])
    assert table(x, y) == pytest.approx(law(x, y), abs=1e-9)
    assert table.num_outside == (not (1 <= x <= 7 and 0 <= y <= 9))


def test_decodes_prefills_and_overheads_add_up() -> None:
    model = ProfileCostModel(PROFILE)
    assert model.step_time(batch_of((1, 10))) == pytest.approx(0.2 + 0.011)
    assert model.step_time(batch_of((1, 3), (1, 7), (1, 5))) == pytest.approx(0.35 + 0.013)
    assert model.step_time(batch_of((10, 100))) == pytest.approx(2.0 + 0.011)
    assert model.step_time(batch_of((55, 50))) == pytest.approx((1.5 + 14.0) / 2 + 0.011)
    assert model.extrapolated == 0
    assert model.name == "tiny, int8, 2 threads, a desk"


def test_several_chunks_cost_as_much_as_one_with_as_many_pairs_of_query_and_key() -> None:
    model = ProfileCostModel(PROFILE)
    # 6 tokens after 45 and 4 after 30: 6 * 48 + 4 * 32 pairs, as 10 tokens after 36.6.
    two, one = batch_of((6, 45), (4, 30)), 1.0 + 0.366
    assert model.step_time(two) == pytest.approx(one + 0.012)
    # Short new prompts have fewer pairs than one of their tokens together.
    assert model.step_time(batch_of((5, 0), (5, 0))) == pytest.approx(1.0 + 0.012)


def test_a_mixed_step_takes_what_was_measured() -> None:
    model = ProfileCostModel(PROFILE)
    five = [(1, 10)] * 5
    assert model.step_time(batch_of(*five, (2, 0))) == pytest.approx(1.1 + 0.016)
    assert model.step_time(batch_of((1, 10), (2, 0))) == pytest.approx(0.6 + 0.012)
    # 0.1 saved, whatever the context.
    assert model.step_time(batch_of((1, 10), (2, 100))) == pytest.approx(0.6 + 0.2 - 0.1 + 0.012)
    apart = ProfileCostModel(profile(mixed=None))
    assert apart.step_time(batch_of(*five, (2, 0))) == pytest.approx(0.5 + 0.8 + 0.016)


def test_a_mixed_step_takes_no_less_than_its_longer_part() -> None:
    model = ProfileCostModel(PROFILE)  # measured 0.8 less than the two parts take, so as much as the prefill
    assert model.step_time(batch_of(*[(1, 0)] * 5, (100, 0))) == pytest.approx(8.0 + 0.016)


def test_transfers_cost_by_the_block_and_its_size() -> None:
    model = ProfileCostModel(PROFILE)
    batch = batch_of((1, 10))
    kinds = (TransferKind.COPY, TransferKind.SWAP_OUT, TransferKind.SWAP_IN)
    batch.transfers.extend(Transfer(kind, 0, 1, batch.sequences[0]) for kind in kinds)
    for block_size, scale in ((16, 1), (32, 2)):
        model.begin(EngineConfig(block_size=block_size))
        assert model.step_time(batch) == pytest.approx(0.211 + scale * 1.25)
        assert model.block_bytes(block_size) == scale * 1600
        assert model.costs == PreemptionCosts(recompute_token_s=0.08, swap_block_s=scale * 0.5)


def test_what_lies_outside_is_continued_counted_and_said_once() -> None:
    model = ProfileCostModel(PROFILE, "p.json")
    asked = (
        r"p.json: decode \(num_sequences by context_tokens\): asked for 6 by 0, measured 1 to 5 by 0 to 10"
    )
    with pytest.warns(UserWarning, match=asked):
        assert model.step_time(batch_of(*[(1, 0)] * 6)) == pytest.approx(0.35 + 0.016)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.step_time(batch_of((1, 30))) == pytest.approx(0.4 + 0.011)
    assert model.extrapolated == 2
    model.begin(EngineConfig())
    assert model.extrapolated == 0


def test_a_profile_is_told_from_a_step_log_by_its_content(tmp_path: Path) -> None:
    for indent in (None, 1):
        (tmp_path / "p").write_text(json.dumps(PROFILE, indent=indent))
        model = CostModel.load(tmp_path / "p")
        assert isinstance(model, ProfileCostModel)
        assert model.step_time(batch_of((1, 10))) == pytest.approx(0.211)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format: found 'other', expected 'pagellm-profile'"),
        ({"version": 2}, "version: found 2, expected 1"),
        ({"machine": None}, "machine: found nothing, expected a string"),
        ({"num_threads": 0}, "num_threads: found 0, expected a positive integer"),
        ({"block_bytes": True}, "block_bytes: found True, expected a positive integer"),
        ({"decode": []}, r"decode: found \[\], expected an object"),
        ({"decode": {}}, "decode.num_sequences: found nothing, expected two or more increasing numbers"),
        (
            {"decode": {"num_sequences": [1, 1], "context_tokens": [0, 1]}},
            r"decode.num_sequences: found \[1, 1\], expected two or more increasing",
        ),
        (
            {"decode": {"num_sequences": [1, 2], "context_tokens": [0, 1], "seconds": [[1, 2]]}},
            r"decode.seconds: found \[\[1, 2\]\], expected 2 rows, one for each of num_sequences",
        ),
        (
            {"decode": {"num_sequences": [1, 2], "context_tokens": [0, 1], "seconds": [[1, 2], [1]]}},
            r"decode.seconds\[1\]: found \[1\], expected 2 numbers, one for each of context_tokens",
        ),
        (
            {"decode": {"num_sequences": [1, 2], "context_tokens": [0, 1], "seconds": [[1, 2], [1, "x"]]}},
            r"decode.seconds\[1\]\[1\]: found 'x', expected a finite number of seconds from 0",
        ),
        ({"mixed": PROFILE["decode"]}, "mixed.chunk_tokens: found nothing"),
        ({"mixed": PROFILE["mixed"] | {"context_tokens": 0}}, "mixed.context_tokens: found 0, expected"),
        ({"overhead": {"step_s": -1}}, "overhead.step_s: found -1, expected"),
        ({"transfer": {"copy_block_s": 1}}, "transfer.swap_block_s: found nothing, expected"),
        ({"num_blocks": 0}, "num_blocks: found 0, expected a positive integer"),
        ({"max_model_len": "long"}, "max_model_len: found 'long', expected a positive integer"),
        ({"fit": {"mean_error": -1}}, "fit.mean_error: found -1, expected a finite number from 0"),
        ({"fit": {"mean_error": 0, "p90_error": 0}}, "fit.mean_signed_error: found nothing, expected a fin"),
    ],
)  # fmt: skip
def test_a_bad_profile_is_refused_by_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=f"p.json: {message}"):
        ProfileCostModel(profile(**changes), "p.json")


def test_a_profile_that_does_not_say_how_right_it_is_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(profile(fit=None)))
    with pytest.warns(UserWarning, match=r"p.json: found no fit: how right its step times are is unknown"):
        model = CostModel.load(tmp_path / "p.json")
    assert model.error is None
    assert model.name == "tiny, int8, 2 threads, a desk, of unknown error"
