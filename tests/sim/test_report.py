"""A report is checked at the door, and shown in a terminal, on a page and beside another one."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pagellm.sim
from pagellm.engine import EngineConfig, ReportError
from pagellm.sim import TraceRequest
from pagellm.sim.report.report import (
    METRICS,
    compare,
    compare_json,
    to_html,
    to_text,
)
from pagellm.sim.report.schema import check_report, load_report
from tests.conftest import at_most
from tests.sim.sample_reports import one_request, sample_report

VOID = {"meta", "link", "br", "hr", "img", "input"}
DELETE = object()


def changed(field: str, value: object) -> dict[str, Any]:
    """A sample report with one field changed or taken out."""
    report = sample_report(num_buckets=3)
    *parents, name = field.split(".")
    inner = report
    for parent in parents:
        inner = inner[parent]
    if value is DELETE:
        del inner[name]
    else:
        inner[name] = value
    return report


# The door


def test_a_report_comes_back_from_its_file(tmp_path: Path) -> None:
    for report in (sample_report(), one_request()):
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert load_report(tmp_path / "report.json") == report


def test_what_a_replay_returns_and_what_a_file_holds_are_taken_alike(tmp_path: Path) -> None:
    trace = pagellm.sim.Trace.from_requests([TraceRequest(arrival_time=0, prompt_len=30, output_len=3)])
    costs = pagellm.sim.CostModel.roofline("l4", "smollm2-135m")
    report = pagellm.sim.Simulator(EngineConfig(num_blocks=8), costs).replay(trace)
    assert check_report(json.loads(report.to_json())) == report == report.data
    report.to_json(tmp_path / "report.json")
    loaded = pagellm.sim.load_report(tmp_path / "report.json")
    assert type(loaded) is type(report) is pagellm.sim.Report
    assert loaded == report
    assert loaded.summary["num_finished"] == loaded["summary"]["num_finished"] == 1
    texts = {pagellm.sim.compare(a, b) for a in (report, loaded, report.data) for b in (report, loaded)}
    assert len(texts) == 1
    for number, reports in enumerate(([report], [loaded], report, [report.data])):
        pagellm.sim.to_html(reports, tmp_path / f"{number}.html")
    report.to_html(tmp_path / "4.html")
    assert len({(tmp_path / f"{number}.html").read_text() for number in range(5)}) == 1
    with pytest.raises(ReportError, match=r"b: version: found nothing, expected 1"):
        pagellm.sim.compare(report, {})
    with pytest.raises(ReportError, match=r"reports\[1\]: found 5, expected an object"):
        pagellm.sim.to_html([report, 5], tmp_path / "5.html")  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (None, None),
        ({"mean": 0.5, "p90": 1, "mean_signed": -0.25, "num_steps": 3}, None),
        ({"mean": -0.5}, "profile_error.mean: found -0.5, expected a finite number from 0"),
        (
            {"mean": 1, "p90": 1, "mean_signed": "x"},
            'profile_error.mean_signed: found "x", expected a finite',
        ),
        (5, "profile_error: found 5, expected an object"),
    ],
)
def test_the_error_of_a_profile_may_be_missing_or_is_checked(error: Any, message: str | None) -> None:
    report = sample_report(num_buckets=2) | {"profile_error": error}
    if message is None:
        assert check_report(report).profile_error == error
    else:
        with pytest.raises(ReportError, match=f"report: {message}"):
            check_report(report)


def test_fields_that_are_not_known_are_let_through() -> None:
    assert check_report(changed("summary.more", {"x": 1}))["summary"]["more"] == {"x": 1}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "version: found 2, expected 1"),
        ("version", DELETE, "version: found nothing, expected 1"),
        ("kind", "guessed", 'kind: found "guessed", expected "simulated" or "real"'),
        ("config", [], r"config: found \[\], expected an object, each value a text, true or false, .*"),
        ("load", None, "load: found null, expected an object"),
        ("load.replicas", -1, "load.replicas: found -1, expected an integer from 0"),
        ("summary.duration_s", True, "summary.duration_s: found true, expected a finite number from 0"),
        ("summary.wall_s", float("inf"), "summary.wall_s: found Infinity, expected a finite number from 0"),
        (
            "summary.ttft_s.p99",
            "1",
            'summary.ttft_s.p99: found "1", expected a finite number from 0, or null',
        ),
        ("summary.goodput", 3, "summary.goodput: found 3, expected an object"),
        ("summary.kv.num_blocks", DELETE, "summary.kv.num_blocks: found nothing, expected an integer from 0"),
        (
            "timeline.running",
            [1, 2],
            "timeline.running: found 2, expected 3 values, as many as timeline.time_s",
        ),
        (
            "timeline.waiting",
            [1, None, 2],
            r"timeline.waiting: found \[1, null, 2\], expected a list, each .*",
        ),
        ("latencies.itl_s", [1.0], r"latencies.itl_s: found \[1.0\], expected no or 201 finite numbers .*"),
        ("latencies.itl_s", [2.0] + [1.0] * 200, "latencies.itl_s: found .*, expected .* do not decrease"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, message: str) -> None:
    with pytest.raises(ReportError, match=f"^report: {message}$"):
        check_report(changed(field, value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"report.json: found malformed JSON in line 1, column 2 .*, expected a report as JSON"),
        (b"[]", r"report.json: found \[\], expected an object"),
        (b"\xff", r"report.json: found b'\\xff' at byte 1, which is no UTF-8, expected a report as JSON"),
        (b"[" * 100_000, r"report.json: found JSON beyond limits \(.*, expected a report as JSON"),
    ],
    ids=["malformed", "array", "bytes", "deep"],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=message):
        load_report(tmp_path / "report.json")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"gone.json: cannot be read: No such file"):
        load_report(tmp_path / "gone.json")


# Text


def test_the_text_of_a_report() -> None:
    report = one_request()
    report["load"] |= {"mode": "closed", "clients": 3, "replicas": 2, "router": "least_loaded"}
    report["summary"]["kv"] |= {"peak_blocks": 71, "mean_blocks": 65.9, "peak_bytes": 71 * 2**20}
    report["summary"]["goodput"] = {
        "slo": {"ttft_s": 0.2, "e2e_s": None},
        "share": 1.0,
        "requests_per_s": 8.0,
    }
    report["summary"] |= {"num_skipped": 2, "num_dropped": 1000}
    report["summary"]["ttft_s"] |= {"max": 12.5, "count": 12_345_678}
    assert to_text(report) == (
        "mooncake_conversation.jsonl\n"
        "simulated on smollm2-135m-instruct, int8\n"
        "load          closed, 3 clients, 2 replicas by least_loaded\n"
        "requests      1: 1 finished, 0 timed out, 0 rejected\n"
        "left out      2 bad records, 1,000 without a request\n"
        "duration      0 s in 1 steps\n"
        "replayed in   0 s\n"
        "throughput    - requests/s\n"
        "              - output tokens/s\n"
        "              - tokens/s with prompts\n"
        "goodput       8.000 requests/s, 100.0 % within TTFT 200 ms\n"
        "prefix cache  - hit of 0 prompt tokens\n"
        "              120,000 tokens evicted\n"
        "              900 to the second tier, 400 hit there\n"
        "preemptions   0 by recompute, 0 by swap\n"
        "              of 41 requests, at most 3 of one\n"
        "KV blocks     71 of 512 at the peak, 71.0 MiB\n"
        "              65.9 on average\n"
        "              5.5 % of their slots unwritten\n"
        "scheduling    policy fcfs, preemption auto\n"
        "              block_size 16, max_num_seqs 128, max_num_batched_tokens 512\n"
        "\n"
        "latency          mean       P50       P90       P95       P99       max    count\n"
        "TTFT   s       0.1250    0.1250    0.1250    0.1250    0.1250     12.50     12 M\n"
        "TPOT   s            -         -         -         -         -         -        0\n"
        "ITL    s            -         -         -         -         -         -        0\n"
        "E2E    ms       125.0     125.0     125.0     125.0     125.0     125.0        1\n"
        "queue  s            0         0         0         0         0         0        1"
    )


@given(st.text(), st.text())
@at_most(30)
def test_no_name_breaks_the_text(trace: str, model: str) -> None:
    report = sample_report(num_buckets=3) | {"trace": trace, "model": model}
    text = to_text(report) + "\n" + compare(report, one_request())
    assert all(len(line) <= 80 for line in text.split("\n"))
    assert all(c.isprintable() or c == "\n" for c in text)


# Comparison


def test_a_comparison_gives_both_values_and_the_error_of_the_second() -> None:
    a, b = one_request(), one_request()
    b["trace"] = "other"
    b["summary"]["e2e_s"] |= {"mean": 0.25, "p50": 0.0625, "p90": 0.12504, "p99": None}
    b["summary"]["kv"]["peak_blocks"] = 142
    b["summary"]["preemptions"]["swap"] = 2
    b["summary"]["cache"]["hit_rate"] = 0.5
    lines = compare(a, b).split("\n")
    assert lines[:4] == [
        "a: mooncake_conversation.jsonl, simulated on smollm2-135m-instruct, int8",
        "b: other, simulated on smollm2-135m-instruct, int8",
        "",
        "                                       a               b   b is",
    ]
    for expected in (
        "  mean, ms                         125.0           250.0   100.0 % higher",
        "  P50, ms                          125.0           62.50   50.0 % lower",
        "  P90, ms                          125.0           125.0   < 0.1 % higher",
        "  P95, ms                          125.0           125.0   the same",
        "  P99, ms                          125.0               -   not measured",
        "  peak                                71             142   100.0 % higher",
        "  by swap                              0               2   higher, from zero",
        "  hit rate, %                          -           50.00   not measured in a",
    ):
        assert expected in lines
    assert "TPOT" not in lines, "nothing of it was measured"


def test_a_comparison_for_machines_is_exact() -> None:
    a, b = sample_report(0, num_buckets=3), sample_report(1, num_buckets=3, kind="real")
    document = json.loads(compare_json(a, b))
    unknown = {"profile_error": None, "fit": None}
    assert document["b"] == {"trace": b["trace"], "model": b["model"], "kind": "real"} | unknown
    assert [metric["metric"] for metric in document["metrics"]] == [metric.path for metric in METRICS]
    for metric in document["metrics"]:
        is_of_fleet = metric["metric"].startswith("fleet.")
        before, after = (a, b) if is_of_fleet else (a["summary"], b["summary"])
        for name in metric["metric"].split("."):
            before, after = (before or {}).get(name), (after or {}).get(name)
        assert (metric["a"], metric["b"]) == (before, after)
        error = 100 * (after - before) / before if before else 0
        is_known = before is not None and not before == 0 != after
        assert metric["error_percent"] == (error if is_known else None)


# The page


class Page(HTMLParser):
    """What a page consists of: it must be nested properly and name nothing that would be fetched."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        data, _ = self.texts["script"]
        document: dict[str, Any] = json.loads(data)
        return document


def page(directory: Path, *reports: dict[str, Any]) -> Page:
    to_html(reports, directory / "report.html")
    return Page(directory / "report.html")


@pytest.mark.parametrize("number", [1, 2])
def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path, number: int) -> None:
    found = page(tmp_path, *[sample_report(seed) for seed in range(number)])
    assert found.links == ["data:,"]
    assert len(found.data["reports"]) == number
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"'`<]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}, "a namespace, which nobody fetches"
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b\s*\(", text)


def test_the_page_holds_the_data_as_exactly_as_it_shows_it(tmp_path: Path) -> None:
    report = sample_report(num_buckets=50)
    [shown] = page(tmp_path, report).data["reports"]
    assert shown["timeline"]["running"] == pytest.approx(report["timeline"]["running"], rel=1e-5)
    assert shown["timeline"]["hit_rate"].count(None) == report["timeline"]["hit_rate"].count(None)
    assert shown["summary"]["num_steps"] == report["summary"]["num_steps"]


def test_a_page_of_two_thousand_buckets_is_small(tmp_path: Path) -> None:
    page(tmp_path, sample_report(num_buckets=2000))
    assert (tmp_path / "report.html").stat().st_size < 500_000


NAMES = st.text() | st.lists(
    st.sampled_from(["</script>", "<!--", "<script>", "]]>", '"', "'", "&lt;", "\\", "\u2028", "{{data}}"]),
    max_size=4,
).map("".join)  # fmt: skip


@given(trace=NAMES, model=NAMES, policy=NAMES)
@at_most(60)
def test_no_name_breaks_out_of_the_page(
    tmp_path_factory: pytest.TempPathFactory, trace: str, model: str, policy: str
) -> None:
    report = one_request() | {"trace": trace, "model": model}
    report["config"]["policy"] = policy
    found = page(tmp_path_factory.getbasetemp(), report)
    [shown] = found.data["reports"]
    assert (shown["trace"], shown["model"], shown["config"]["policy"]) == (trace, model, policy)
    assert {tag: len(texts) for tag, texts in found.texts.items()} == {
        **dict.fromkeys(("html", "head", "title", "style", "body", "noscript", "pre"), 1),
        **dict.fromkeys(("div", "script"), 2),
    }


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    [shown] = page(tmp_path, one_request() | {"trace": "\ud800"}).data["reports"]
    assert shown["trace"] == "\ud800"


def test_a_page_of_nothing_or_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="reports: found none, expected at least one"):
        to_html([], tmp_path / "report.html")
    with pytest.raises(ReportError, match=r"gone/report.html: cannot be written: No such file"):
        to_html([one_request()], tmp_path / "gone" / "report.html")
