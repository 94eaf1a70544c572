"""Figures by replica, tenant and class, and goodput over time: parts that add up to the whole."""

from pathlib import Path
from typing import Any

from pagellm.sim import Report, Simulator, Trace, TraceRequest, to_html
from pagellm.sim.report.groups import MAX_GROUPS, OTHERS, Groups
from pagellm.sim.report.report import to_text
from pagellm.sim.report.schema import check_report
from tests.sim.browser import browse
from tests.sim.test_simulator import CONFIG, Seconds


def replayed(**options: Any) -> Report:
    requests = [
        TraceRequest(
            arrival_time=float(number),
            prompt_len=8,
            output_len=2 + number % 3,
            tenant="ab"[number % 2],
            class_=["chat", "batch", None][number % 3],
        )
        for number in range(30)
    ]
    options = {"slo": {"ttft_s": 1.5}, "replicas": 2} | options
    return Simulator(CONFIG, Seconds(), **options).replay(Trace.from_requests(requests))


def test_the_parts_add_up(tmp_path: Path) -> None:
    report = replayed()
    summary = report.summary
    for kind, names in (("replica", ["0", "1"]), ("tenant", ["a", "b"])):
        groups = [group for group in report["groups"] if group["by"] == kind]
        assert sorted(group["name"] for group in groups) == names
        for count in ("num_requests", "num_finished", "output_tokens", "prompt_tokens"):
            assert sum(group[count] for group in groups) == summary[count]  # type: ignore[literal-required]
        good = sum(group["goodput_share"] * group["num_requests"] for group in groups)
        assert summary["goodput"] is not None
        assert summary["goodput"]["share"] is not None
        assert round(good) == round(summary["goodput"]["share"] * 30)
    classes = {group["name"]: group for group in report["groups"] if group["by"] == "class"}
    assert {name: group["num_requests"] for name, group in classes.items()} == {"chat": 10, "batch": 10}
    # A chat has two tokens: one step each, and it may wait for the step under way.
    assert classes["chat"]["tpot_s"]["max"] == 1.0
    assert check_report(report.data) is not None


def test_a_class_of_its_own_latencies() -> None:
    report = replayed(replicas=1)
    tenants = {group["name"]: group for group in report["groups"] if group["by"] == "tenant"}
    counts = [tenants[name]["ttft_s"]["count"] for name in "ab"]
    assert sum(counts) == report.summary["ttft_s"]["count"]
    means = [tenants[name]["ttft_s"]["mean"] * count for name, count in zip("ab", counts, strict=True)]
    assert abs(sum(means) / 30 - (report.summary["ttft_s"]["mean"] or 0)) < 1e-9
    assert not [group for group in report["groups"] if group["by"] == "replica"]


def test_rejected_requests_count_where_they_belong() -> None:
    requests = [
        TraceRequest(arrival_time=0, prompt_len=10_000, output_len=1, tenant="a", class_="x"),
        TraceRequest(arrival_time=0, prompt_len=8, output_len=1, tenant="a"),
    ]
    report = Simulator(CONFIG, Seconds(), skip_bad=True).replay(Trace.from_requests(requests))
    groups = {(group["by"], group["name"]): group for group in report["groups"]}
    assert groups["tenant", "a"]["num_requests"] == 2
    assert groups["tenant", "a"]["num_finished"] == 1
    assert groups["class", "x"]["num_requests"] == 1


def test_many_tenants_are_counted_together() -> None:
    groups = Groups(False)
    for number in range(MAX_GROUPS + 50):
        for group in groups.of(0, str(number), None):
            group.counts["requests"] += 1
    found = groups.to_list(1.0, has_slo=False)
    assert len(found) == MAX_GROUPS + 1
    assert next(group for group in found if group["name"] == OTHERS)["num_requests"] == 50


def test_goodput_over_time_sums_up_to_goodput() -> None:
    report = replayed()
    assert report.summary["goodput"] is not None
    assert sum(report["timeline"]["good"]) == round((report.summary["goodput"]["share"] or 0) * 30)
    assert "good" not in replayed(slo=None)["timeline"]


def test_the_text_has_a_table_of_each_kind() -> None:
    text = to_text(replayed())
    assert all(f"\nby {kind}" in text for kind in ("replica", "tenant", "class"))
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_has_a_table_of_each_kind(tmp_path: Path) -> None:
    report = replayed()
    to_html(report, tmp_path / "page.html")
    document, console = browse(tmp_path / "page.html")
    assert console == []
    tables = document.one("section", aria_label="By replica, tenant and class").all("table")
    assert [table.rows()[0][0] for table in tables] == ["replica", "tenant", "class"]
    assert [row[0] for row in tables[1].rows()[1:]] == ["a", "b"]
    assert "in SLO" in tables[0].rows()[0]
