"""The timeline keeps its sums while its buckets double, and never has more than it may."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.sim.report.timeline import MAX_BUCKETS, Timeline

spans = st.lists(
    st.tuples(st.sampled_from([0.0, 0.0004, 0.03, 7.0, 900.0]), st.sampled_from([0.0, 0.002, 5.0]))
)


@given(spans, st.floats(0, 1e6))
def test_sums_and_integrals_outlive_every_doubling(
    gaps_and_spans: list[tuple[float, float]], now: float
) -> None:
    timeline = Timeline()
    timeline.at(now)
    time, total = now, 0.0
    for gap, span in gaps_and_spans:
        start = time + gap
        time = start + span
        timeline.at(start).arrivals += 1
        for bucket, seconds in timeline.during(start, time):
            assert 0 <= seconds <= timeline.width_s * (1 + 1e-9)
            bucket.running_time += 3 * seconds
        total += 3 * span
    assert len(timeline.buckets) <= MAX_BUCKETS
    assert sum(bucket.arrivals for bucket in timeline.buckets) == len(gaps_and_spans)
    assert sum(bucket.running_time for bucket in timeline.buckets) == pytest.approx(total, rel=1e-6, abs=1e-8)


def test_a_bucket_has_what_happened_in_it() -> None:
    timeline = Timeline()
    timeline.at(10.0).finished += 1
    timeline.at(10.0035).finished += 2
    timeline.at(10.0035).peak_blocks = 7
    for bucket, seconds in timeline.during(10.0, 10.0025):
        bucket.used_blocks_time += 4 * seconds
    assert [bucket.finished for bucket in timeline.buckets] == [1, 0, 0, 2]
    series = timeline.to_dict(has_cache=False)
    assert series["time_s"] == pytest.approx([10.0, 10.001, 10.002, 10.003])
    assert series["bucket_s"] == 0.001
    assert series["used_blocks"] == pytest.approx([4, 4, 2, 0])
    assert series["peak_blocks"] == [0, 0, 0, 7]
    assert series["hit_rate"] == [None] * 4

    timeline.at(10.0 + 3.0)
    assert timeline.width_s == 0.002
    assert [bucket.finished for bucket in timeline.buckets[:3]] == [1, 2, 0]
    assert timeline.buckets[1].peak_blocks == 7


def test_the_last_bucket_is_as_wide_as_the_run_is_long() -> None:
    timeline = Timeline()
    timeline.at(0.0)
    for bucket, seconds in timeline.during(0.0, 0.0015):
        bucket.running_time += 2 * seconds
    assert timeline.to_dict(has_cache=False)["running"] == pytest.approx([2, 2])


def test_a_share_that_was_not_sampled_is_that_of_the_bucket_before() -> None:
    timeline = Timeline()
    for time, share in ((0.0, 0.5), (0.002, 0.25)):
        bucket = timeline.at(time)
        bucket.num_samples, bucket.unwritten_shares, bucket.cached_shares = 1, share, 1 - share
    timeline.at(0.0035)
    assert timeline.sampled("unwritten_shares") == [0.5, 0.5, 0.25, 0.25]
    assert timeline.to_dict(has_cache=True)["cached_share"] == [0.5, 0.5, 0.75, 0.75]
