"""What steps take by their times: calm ones count, and all of them where there are no others."""

import pytest

from pagellm.sim.calibration.staged_steps import StepShape
from pagellm.sim.calibration.step_times import StepTimes

PROMPT, LONG_PROMPT = StepShape(chunks=(8,)), StepShape(chunks=(32,))
DECODE = StepShape(decodes=(9, 9))


def measured(slowness_of_prompts: list[float], slowness_of_decodes: list[float]) -> StepTimes:
    times = StepTimes()
    for prompts, decodes in zip(slowness_of_prompts, slowness_of_decodes, strict=True):
        times.add(PROMPT, [0.010 * prompts])
        times.add(LONG_PROMPT, [0.040 * prompts])
        times.add(DECODE, [0.002 * decodes] * 3)
    return times


def test_scatter_is_averaged_and_what_it_does_not_explain_is_cut() -> None:
    times = StepTimes()
    times.add(PROMPT, [0.9, 1.0, 1.0, 1.1, 50.0])
    assert times.seconds(PROMPT) == pytest.approx((0.9 + 1.0 + 1.0 + 1.1 + 1.3) / 5)


def test_a_slow_time_of_the_machine_is_left_out() -> None:
    times = measured([1] * 50 + [2] * 20, [1] * 50 + [2] * 20)
    assert times.seconds(PROMPT) == pytest.approx(0.010)
    assert times.seconds(DECODE) == pytest.approx(0.002)
    assert times.disturbed_share == pytest.approx(2 * 20 / (50 + 2 * 20), abs=0.05)


def test_a_machine_that_is_mostly_slow_counts_as_it_is() -> None:
    times = measured([1] * 20 + [2] * 40, [1] * 20 + [2] * 40)
    assert times.disturbed_share == pytest.approx(2 * 40 / (20 + 2 * 40), abs=0.05)
    assert times.seconds(PROMPT) == pytest.approx(0.010 * (20 + 2 * 40) / 60)
    assert times.seconds(DECODE) == pytest.approx(0.002 * (20 + 2 * 40) / 60)


def test_what_slows_prompts_down_may_leave_decodes_alone() -> None:
    times = measured([1] * 30 + [1.3] * 20, [1] * 30 + [1.05] * 20)
    assert times.seconds(PROMPT) == pytest.approx(0.010)
    assert times.seconds(DECODE) == pytest.approx(0.002 * (30 + 1.05 * 20) / 50)


def test_a_shape_that_was_only_measured_in_a_slow_time_counts_as_it_was() -> None:
    times = measured([1] * 60 + [2] * 10, [1] * 70)
    seldom = StepShape(chunks=(64,))
    times.add(seldom, [0.2])
    for _ in range(10):
        times.add(PROMPT, [0.020])
    assert times.seconds(seldom) == pytest.approx(0.2)


def test_a_calm_machine_is_not_disturbed() -> None:
    assert measured([1, 1.05, 0.97] * 10, [1, 1.02, 0.99] * 10).disturbed_share == 0
    assert StepTimes().disturbed_share == 0


def test_steps_and_sequences_are_accounted_for_apart() -> None:
    times = measured([1] * 3, [1] * 3)
    assert times.least_sequence_s == pytest.approx(0.001)
    times.step_s, times.sequence_s = 0.0005, 0.0001
    assert times.seconds(DECODE) == pytest.approx(0.002 - 0.0005 - 2 * 0.0001)
    assert times.seconds(StepShape(decodes=(1,))) is None
