"""The pages in a browser: nothing goes wrong on them, and they show what the report and the sweep say."""

import re
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import EngineConfig
from pagellm.sim import (
    CostModel,
    CostSource,
    Grid,
    Report,
    Simulator,
    Slo,
    Sweep,
    Trace,
    TraceFile,
    Workload,
    synthesise,
    to_html,
)
from pagellm.sim.fleet.fleet import Autoscale, Failure, Fleet, Group, known_link
from pagellm.sim.sweep import report as sweep_report
from tests.sim.browser import Element, browse
from tests.sim.sample_reports import one_request, sample_report

NONE = "\u2013"  # a dash
UNITS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "%": 0.01, "": 1.0}
LATENCIES = {"TTFT": "ttft_s", "TPOT": "tpot_s", "ITL": "itl_s", "E2E": "e2e_s", "Queue": "queue_s"}
SERIES = {
    "Requests": ["running", "waiting", "swapped"],
    "Tokens a second": ["prefill", "decode"],
    "Batch": ["batch"],
    "KV blocks": ["used", "peak"],
    "Prefix cache and waste": ["hit rate", "cached share", "unwritten share"],
    "Requests a second": ["arrived", "finished", "within the SLO"],
    "Preemptions": ["preemptions"],
}


def shown(text: str) -> float | None:
    """A number as a page writes it, in plain units; None for a dash."""
    if text.strip() == NONE:
        return None
    match = re.fullmatch(r"\s*([\d,.]+)\s*(\S*)\s*", text)
    assert match, text
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def assert_shows(text: str, value: float | None) -> None:
    """Three significant digits of a value, in whatever unit."""
    found = shown(text)
    if value is None:
        assert found is None, text
    else:
        assert found == pytest.approx(value, rel=6e-3, abs=6e-4 if "%" in text else 0), text


def page(directory: Path, reports: Any) -> Element:
    to_html(reports, directory / "report.html")
    document, console = browse(directory / "report.html")
    assert console == []
    return document


def sweep_page(directory: Path, setting: str, slo: Slo | None = None) -> Element:
    """The page of a sweep over one setting."""
    synthesise(Workload(num_requests=20, seed=1)).save(directory / "trace.jsonl")
    sweep = Sweep(
        TraceFile(str(directory / "trace.jsonl")),
        CostSource(roofline=("l4", "smollm2-135m", 1)),
        Grid.parse([setting]),
        slo,
        jobs=1,
    )
    sweep_report.to_html(sweep.run(), directory / "sweep.html")
    document, console = browse(directory / "sweep.html")
    assert console == []
    return document


def replayed() -> Report:
    workload = Workload(
        num_requests=300,
        arrivals="poisson:40",
        num_system_prompts=3,
        system_prompt_len=64,
        seed=5,
        prompt_len="uniform:20,300",
        output_len="uniform:5,200",
    )
    config = EngineConfig(num_blocks=200, preemption="recompute", max_num_seqs=24)
    return Simulator(config, CostModel.roofline("l4", "smollm2-135m"), slo={"ttft_s": 1}).replay(
        synthesise(workload)
    )


def test_what_goes_wrong_on_a_page_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<p>before</p><script>undefined.field</script>")
    document, console = browse(tmp_path / "bad.html")
    assert document.one("p").text == "before"
    assert len(console) == 1
    assert "TypeError" in console[0]


def test_a_page_tells_of_a_fleet(tmp_path: Path) -> None:
    costs, link = CostModel.roofline("l4", "smollm2-135m"), known_link("roce")
    config = EngineConfig(num_blocks=200, max_num_seqs=24)
    alike: dict[str, Any] = {"costs": costs, "config": config, "link": link, "price_per_h": 0.5}
    fleet = Fleet(
        (
            Group(name="p", role="prefill", count=2, start_s=1.0, **alike),
            Group(name="d", role="decode", autoscale=Autoscale(max=3, target=2.0, interval_s=1.0), **alike),
        ),
        (Failure(2.0, "p", 1),),
    )
    workload = Workload(num_requests=100, arrivals="poisson:20", prompt_len="uniform:20,300", seed=5)
    report = Simulator.of_fleet(fleet).replay(synthesise(workload))
    document = page(tmp_path, report)
    head, *rows = document.one("table", _class="comparison groups fleet").rows()
    assert head == [
        "group", "role", "model", "replicas", "devices of each", "hours", "busy", "Wh", "cost",
    ]  # fmt: skip
    assert [(row[0], row[1], row[3]) for row in rows] == [("p", "prefill", "2"), ("d", "decode", "3")]
    assert_shows(rows[0][7], report["fleet"]["groups"][0]["energy_wh"])
    assert_shows(rows[1][8], report["fleet"]["groups"][1]["cost"])
    section = next(one for one in document.all("section") if one.attributes.get("aria-label") == "Fleet")
    facts = {one.one("dt").text: one.one("dd").text for one in section.all("div") if one.all("dt")}
    assert list(facts) == ["energy", "cost", "KV over roce", "failures", "scaling"]
    assert section.one("p", _class="hint power").text == (
        "Power of a device: 72 W while a step is under way, of this device: the most that a device may draw, "
        "so an upper bound; 11 W idle, assumed: 15 % of power_w"
    )
    assert facts["failures"].startswith("1 of replicas, down for 1.00 s on average; ")
    assert "Replicas" in [one.text.split(" ")[0] for one in document.all("figcaption")]


def test_a_report_is_shown_as_it_is(tmp_path: Path) -> None:
    report = replayed()
    summary = report.summary
    document = page(tmp_path, report)
    assert document.one("h1").text == report["trace"]

    figures = {f.one("dt").text: f for f in document.one("dl", _class="figures").all("div")}
    assert_shows(
        figures["Output"].one("dd", _class="value").text.removesuffix("tokens/s"),
        summary["output_tokens_per_s"],
    )
    assert figures["Finished"].one("dd", _class="value").text == "300 of 300"
    assert summary["goodput"] is not None
    assert_shows(figures["Goodput"].one("dd", _class="value").text, summary["goodput"]["share"])
    preemptions = summary["preemptions"]["recompute"]
    assert preemptions > 0
    assert figures["Preemptions"].one("dd", _class="value").text == str(preemptions)
    for name in ("TTFT", "TPOT", "E2E"):
        assert_shows(
            figures[f"{name}, median"].one("dd", _class="value").text,
            report["summary"][LATENCIES[name]]["p50"],
        )

    head, *rows = document.one("table", _class="latencies").rows()
    assert head == ["Latency", "mean", "P50", "P90", "P95", "P99", "max", "count"]
    assert [row[0] for row in rows] == list(LATENCIES)
    for name, *cells in rows:
        distribution = report["summary"][LATENCIES[name]]
        for column, cell in zip(head[1:], cells, strict=True):
            assert_shows(cell, distribution[column.lower()])


def test_the_charts_of_a_report_hold_its_timeline_and_distributions(tmp_path: Path) -> None:
    report = replayed()
    document = page(tmp_path, report)
    charts = {}
    for figure in document.one("div", _class="timeline").all("figure"):
        for image in figure.all("svg", role="img"):
            title, _, said = image.attributes["aria-label"].partition(". ")
            values = re.findall(
                r"([a-zA-Z ]+): mean (\S+ ?%?), highest (\S+ ?%?)(?:; |$)", said.replace("\u202f", " ")
            )
            charts[title] = {name.strip(): (mean, most) for name, mean, most in values}
            assert len(image.all("path", _class="line")) == len(values)
            assert all(path.attributes["d"].count("H") > 10 for path in image.all("path", _class="line"))
    assert {title: list(series) for title, series in charts.items()} == SERIES
    timeline = report["timeline"]
    assert_shows(charts["KV blocks"]["peak"][1], max(timeline["peak_blocks"]))
    for name in ("running", "waiting"):
        assert shown(charts["Requests"][name][1]) == pytest.approx(max(timeline[name]), rel=0.15)

    curves = document.one("div", _class="cdfs").all("svg")
    assert len(curves) == len(LATENCIES)
    for curve, name in zip(curves, LATENCIES.values(), strict=True):
        [path] = curve.all("path", _class="line")
        assert len(re.findall(r"[\d.]+", path.attributes["d"])) > 100
        values = dict(re.findall(r"(P\d+) ([^,]+)", curve.attributes["aria-label"].replace("\u202f", " ")))
        for statistic in ("P50", "P90", "P99"):
            assert_shows(values[statistic], report["summary"][name][statistic.lower()])


def test_a_report_of_one_request_has_a_page(tmp_path: Path) -> None:
    document = page(tmp_path, one_request())
    _, *rows = document.one("table", _class="latencies").rows()
    cells = {row[0]: row[1:] for row in rows}
    assert cells["TPOT"] == [NONE] * 6 + ["0"]
    assert [shown(cell) for cell in cells["TTFT"]] == [0.125] * 6 + [1]


def test_several_reports_are_compared_with_the_first(tmp_path: Path) -> None:
    reports = [sample_report(0), sample_report(1, speed=1.2), sample_report(2, policy="fair")]
    document = page(tmp_path, reports)
    tables = [table.rows() for table in document.all("table", _class="comparison")]
    rows = {(table[0][0], row[0]): row[1:] for table in tables for row in table[1:]}
    first = reports[0]["summary"]
    for group, name in (("Time to first token", "ttft_s"), ("End to end", "e2e_s")):
        cells = rows[group, "P99"]
        assert len(cells) == len(reports)
        for cell, report in zip(cells, reports, strict=True):
            value = report["summary"][name]["p99"]
            found = re.fullmatch(r"([\d,.]+ (?:ms|s|min))(?:([+\u2212])([\d.]+) %)?", cell)
            assert found, cell
            assert_shows(found[1], value)
            if found[2]:
                difference = float(found[3]) * (1 if found[2] == "+" else -1)
                assert difference == pytest.approx(100 * (value / first[name]["p99"] - 1), abs=0.06)
    for image in document.one("div", _class="cdfs").all("svg"):
        assert len(image.all("path", _class="line")) == len(reports)


def test_an_error_of_the_profile_is_shown(tmp_path: Path) -> None:
    error = {"mean": 0.54, "p90": 1.25, "mean_signed": -0.5, "num_steps": 60}
    said = "step times off by 54.0 % on average, 9 of 10 within 125.0 %; too short by 50.0 %"
    poor = sample_report(0) | {"profile_error": error}
    assert said in page(tmp_path, poor).one("p", _class="subtitle").text
    several = page(tmp_path, [poor, sample_report(1)])
    first, second = several.one("ul", _class="reports").all("li")
    assert said in first.text
    assert said not in second.text


def test_a_sweep_is_shown_as_it_is(tmp_path: Path) -> None:
    synthesise(Workload(num_requests=60, arrivals="poisson:20", seed=1)).save(tmp_path / "trace.jsonl")
    sweep = Sweep(
        TraceFile(str(tmp_path / "trace.jsonl")),
        CostSource(roofline=("l4", "smollm2-135m", 1)),
        Grid.parse(["policy=fcfs,fair", "num_blocks=2,200,400"]),
        Slo.parse("ttft_p99=0.05"),
        jobs=1,
    )
    result = sweep.run_capacity(0.2)
    sweep_report.to_html(result, tmp_path / "sweep.html")
    document, console = browse(tmp_path / "sweep.html")
    assert console == []

    capacities, grid = (
        document.one("section", aria_label=name).one("table").rows() for name in ("Capacity", "Grid")
    )
    assert grid[0][:2] == capacities[0][:2] == ["policy", "num_blocks"]
    for row, point in zip(grid[1:], result.points, strict=True):
        assert row[:2] == [str(value) for value in point.settings.values()]
        if point.summary is None:
            assert row[2:] == [point.error]
            continue
        cells = dict(zip(grid[0], row, strict=True))
        assert_shows(cells["requests/s"], point.summary["requests_per_s"])
        assert_shows(cells["TTFT P99"], point.summary["ttft_s"]["p99"])
        assert cells["SLO"] in ("holds", "broken")
    assert result.capacities is not None
    for row, capacity in zip(capacities[1:], result.capacities, strict=True):
        cells = dict(zip(capacities[0], row, strict=True))
        assert_shows(
            cells["rate factor"],
            None if capacity.at is None or capacity.transient else float(capacity.at.settings["rate_factor"]),
        )
        assert ("refused: " in row[-1]) is (capacity.transient is not None)
        assert cells["probes"] == str(len(capacity.probes))

    plots = [document.one("section", aria_label=name).one("figure") for name in ("Capacity", "Grid")]
    probes = [p for c in result.capacities for p in c.probes if p.summary is not None]
    assert len(plots[0].all("circle")) == len(probes)
    assert len(plots[1].all("circle")) == sum(point.summary is not None for point in result.points)


def test_a_sweep_says_its_slo_and_what_a_million_tokens_take(tmp_path: Path) -> None:
    document = sweep_page(tmp_path, "price_per_h=1,2", Slo.parse("ttft_p99=1,ttft=0.5,tpot=0.05", 0.9))
    said = document.one("p", _class="subtitle").text
    assert "SLO ttft_p99 1 s, 90.0 % of requests within ttft 500 ms and tpot 50 ms" in said
    head, *rows = document.one("section", aria_label="Grid").one("table").rows()
    energies, costs = (
        [float(row[head.index(name)]) for row in rows] for name in ("Wh/M tokens", "cost/M tokens")
    )
    assert energies[0] == energies[1] > 0
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.01)


def test_titles_are_names_and_no_paths(tmp_path: Path) -> None:
    synthesise(Workload(num_requests=9, seed=1)).save(tmp_path / "trace.jsonl")
    report = Simulator(
        EngineConfig(num_blocks=200, step_log=str(tmp_path / "steps.jsonl")),
        CostModel.roofline("l4", "smollm2-135m"),
    ).replay(Trace.load(tmp_path / "trace.jsonl"))
    document = page(tmp_path, report)
    assert document.one("h1").text == "trace.jsonl"
    assert document.one("title").text.startswith("trace.jsonl, simulated on smollm2-135m")
    assert report["trace"] == str(tmp_path / "trace.jsonl")
    settings = {name.text for name in document.one("dl", _class="settings").all("dt")}
    assert "block_size" in settings
    assert not settings & {"num_threads", "quantization", "step_log", "swap_dir"}  # of this machine, or gone


def test_better_and_worse_differ_in_more_than_a_sign(tmp_path: Path) -> None:
    fast, slow = sample_report(0), sample_report(1, speed=0.8)
    for reports, kind in (([fast, slow], "worse"), ([slow, fast], "better")):
        document = page(tmp_path, reports)
        kinds = {
            row.all("th")[0].text: [e.attributes["title"] for e in row.all("span") if "title" in e.attributes]
            for table in document.all("table", _class="comparison")
            for row in table.all("tr")
            if row.all("td")
        }
        # Of the first more is better, of the second less; the others are neither, or did not change.
        assert kinds["output tokens/s"] == kinds["by recompute"] == [kind]
        assert kinds["requests preempted"] == kinds["steps"] == []
    styles = document.one("style").text
    assert ".difference.better { color: var(--better); }" in styles
    assert ".difference.worse { color: var(--worse); }" in styles


def test_ticks_of_a_sweep_are_its_values(tmp_path: Path) -> None:
    document = sweep_page(tmp_path, "max_num_batched_tokens=128,512,2048", Slo.parse("ttft_p99=1"))
    labels = [
        e.text for e in document.one("figure").all("text") if e.attributes.get("text-anchor") == "middle"
    ]
    assert labels == ["128", "512", "2,048"]
    head = document.one("section", aria_label="Grid").one("table").rows()[0]
    assert head[:2] == ["max_num_batched_tokens", "SLO"]  # seen without scrolling


def test_a_wide_table_says_that_it_is_cut(tmp_path: Path) -> None:
    document = page(tmp_path, replayed())
    hints = document.all("p", _class="more")
    assert hints
    assert {hint.text for hint in hints} == {"Scroll sideways for more columns →"}
    assert all("hidden" in hint.attributes for hint in hints)  # at this width nothing is cut


def test_what_itl_means_is_said(tmp_path: Path) -> None:
    text = page(tmp_path, replayed()).text
    assert "which AIPerf calls ITL" in text


def test_settings_are_written_without_zeros(tmp_path: Path) -> None:
    rows = sweep_page(tmp_path, "rate_factor=0.5,1").one("section", aria_label="Grid").one("table").rows()
    assert [row[0] for row in rows[1:]] == ["0.5", "1"]
