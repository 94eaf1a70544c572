"""Step times from a machine's limits and from a recorded run; what of a batch they look at."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import ConfigError, EngineConfig, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.sim import CostModel
from pagellm.sim.costs.cost_model import shape_of
from pagellm.sim.costs.recorded import RecordedCostModel
from tests.sim.batches import batch_of


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9))))
def test_the_shape_of_a_batch_separates_single_tokens_from_chunks(rows: list[tuple[int, int]]) -> None:
    num_decodes, decode_context, prefills = shape_of(batch_of(*rows))
    assert num_decodes == sum(count == 1 for count, _ in rows)
    assert decode_context == sum(before for count, before in rows if count == 1)
    assert sorted(prefills) == sorted(row for row in rows if row[0] > 1)


def step_log(path: Path, **changes: Any) -> Path:
    """Two steps, the second one changed."""
    costs = {"recompute_token_s": 0.001, "swap_block_s": 0.002}
    first = {"step": 0, "start_s": 0.5, "duration_s": 0.25, "costs": costs}
    second = {"step": 1, "start_s": 2.0, "duration_s": 0.125, "costs": costs | {"swap_block_s": 0.5}}
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, second | changes)))
    return path


def test_recorded_steps_start_and_last_as_they_did(tmp_path: Path) -> None:
    model = CostModel.load(step_log(tmp_path / "steps.jsonl"))
    assert isinstance(model, RecordedCostModel)
    for _ in range(2):
        model.begin(EngineConfig())
        assert model.next_start(0.1) == 0.5
        assert model.costs == PreemptionCosts(0.001, 0.002)
        assert model.step_time(batch_of((1, 1))) == 0.25
        assert model.next_start(3.0) == 3.0
        assert model.costs == PreemptionCosts(0.001, 0.5)
        assert model.step_time(batch_of((9, 9))) == 0.125
    with pytest.raises(ProfileError, match=r"steps.jsonl: found 2 steps, expected more"):
        model.next_start(4.0)
    with pytest.raises(ConfigError, match=r"replicas: found 2 with a recorded run, expected 1"):
        model.begin(EngineConfig(), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, r"steps.jsonl:2: step: found .*, expected 1"),
        ({"duration_s": -1}, r"steps.jsonl:2: duration_s: found -1, expected a finite number of sec"),
        ({"start_s": None}, r"steps.jsonl:2: start_s: found nothing, expected"),
        ({"costs": {"recompute_token_s": 1}}, r"steps.jsonl:2: costs.swap_block_s: found nothing, expected"),
    ],
)  # fmt: skip
def test_a_damaged_step_log_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=message):
        CostModel.load(step_log(tmp_path / "steps.jsonl", **changes))


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing.json: cannot be read: No such file"):
        CostModel.load(tmp_path / "missing.json")
    for text, message in (
        ("", r"found malformed JSON in line 1, column 1 \(.*, expected a profile as JSON"),
        ("[" * 100_000, r"found JSON beyond limits \(.*, expected a profile as JSON"),
        ("[1]", r"profile: found \[1\], expected an object with named fields"),
        ("{}", r"format: found nothing, expected 'pagellm-profile'"),
        ("\x00", r"expected a profile as JSON"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ProfileError, match=f"other.json: .*{message}"):
            CostModel.load(tmp_path / "other.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"binary: found b'\\xff\\xfe', expected UTF-8"):
        CostModel.load(tmp_path / "binary")
    with pytest.raises(ProfileError, match=r"cannot be read: Is a directory"):
        CostModel.load(tmp_path)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30)), min_size=1, max_size=5), st.integers(1, 12))
def test_with_a_window_only_the_tokens_that_are_seen_count(rows: list[tuple[int, int]], window: int) -> None:
    num_decodes, decode_context, prefills = shape_of(batch_of(*rows), window)
    assert num_decodes == sum(count == 1 for count, _ in rows)
    assert decode_context == sum(min(before, window - 1) for count, before in rows if count == 1)
    chunks = [row for row in reversed(rows) if row[0] > 1]
    for (count, before), (as_many, seen_before) in zip(chunks, prefills, strict=True):
        pairs = sum(min(before + i + 1, window) for i in range(count))
        fewest = count * (count + 1) // 2  # of a chunk that sees all of itself
        assert as_many == count
        assert pairs - count < count * seen_before + fewest <= max(pairs, fewest)
