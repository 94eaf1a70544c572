"""How a report is shown: a table for the terminal, a page for the browser, a comparison of two.

What a report is stands in `schema`. The page is one file that asks for nothing else: its parts are
in `page/`, its data is JSON inside it, and every name in that data is only ever shown as text.
"""

import html
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any, cast

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ReportError
from pagellm.engine.scheduling.policies import KINDS
from pagellm.sim.costs.cost_model import FIT_METRICS, CostConstant, FitError, StepTimeError
from pagellm.sim.outputs import write_whole
from pagellm.sim.report.schema import (
    Cache,
    FleetData,
    Goodput,
    Group,
    Load,
    Report,
    Steady,
    Summary,
    check_report,
)

# What a replay returned, or the JSON of one.
AnyReport = Report | Mapping[str, Any]
_WIDTH = 80
_PAGE = Path(__file__).with_name("page")
_SCRIPTS = ("draw.js", "summary.js", "fleet.js", "timeline.js", "distributions.js", "page.js")
# Six digits are more than a plot shows, and half the size.
_PAGE_DIGITS = 6
_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "itl_s": "ITL", "e2e_s": "E2E", "queue_s": "queue"}


@dataclass(frozen=True)
class Metric:
    """A number of the summary: what it is called, its unit (s, 1/s, share or count), and where it is."""

    group: str
    label: str
    unit: str
    path: str

    def value(self, report: AnyReport) -> float | None:
        """The report's value, None if it has none."""
        value: Any = report["summary"] if self.group != "fleet" else report
        for name in self.path.split("."):
            value = None if value is None else value.get(name)
        return None if value is None else value


METRICS = (
    Metric("throughput", "requests/s", "1/s", "requests_per_s"),
    Metric("throughput", "output tokens/s", "1/s", "output_tokens_per_s"),
    Metric("throughput", "all tokens/s", "1/s", "total_tokens_per_s"),
    Metric("throughput", "requests/s in SLO", "1/s", "goodput.requests_per_s"),
    Metric("throughput", "requests in SLO", "share", "goodput.share"),
    Metric("throughput", "duration", "s", "duration_s"),
    *(
        Metric(group, label, "s", f"{path}.{statistic}")
        for path, group in _NAMES.items()
        for label, statistic in (
            ("mean", "mean"), ("P50", "p50"), ("P90", "p90"), ("P95", "p95"), ("P99", "p99"), ("max", "max"),
        )
    ),
    Metric("KV blocks", "peak", "count", "kv.peak_blocks"),
    Metric("KV blocks", "mean", "count", "kv.mean_blocks"),
    Metric("KV blocks", "unwritten slots", "share", "kv.mean_unwritten_share"),
    Metric("prefix cache", "hit rate", "share", "cache.hit_rate"),
    Metric("prefix cache", "evicted tokens", "count", "cache.evicted_tokens"),
    Metric("prefix cache", "hits in the second tier", "count", "cache.host_hit_tokens"),
    Metric("prefix cache", "offloaded tokens", "count", "cache.offloaded_tokens"),
    Metric("preemptions", "by recompute", "count", "preemptions.recompute"),
    Metric("preemptions", "by swap", "count", "preemptions.swap"),
    Metric("preemptions", "requests preempted", "count", "preemptions.requests"),
    Metric("fleet", "Wh/M tokens", "count", "fleet.wh_per_million"),
    Metric("fleet", "cost/M tokens", "count", "fleet.cost_per_million"),
    Metric("requests", "finished", "count", "num_finished"),
    Metric("requests", "timed out", "count", "num_timed_out"),
    Metric("requests", "rejected", "count", "num_rejected"),
    Metric("requests", "failed", "count", "num_failed"),
    Metric("requests", "bad records skipped", "count", "num_skipped"),
    Metric("requests", "records dropped", "count", "num_dropped"),
    Metric("requests", "steps", "count", "num_steps"),
)  # fmt: skip


def to_text(report: AnyReport) -> str:
    """A summary for the terminal, of at most 80 columns. Raises `ReportError` for what is no report."""
    report = check_report(report)
    summary, config, load = report["summary"], report["config"], report["load"]
    cache, preemptions, kv = summary["cache"], summary["preemptions"], summary["kv"]
    outcomes = ["finished", "timed_out", "rejected", *(["failed"] if "num_failed" in summary else [])]
    counts = ", ".join(f"{summary[f'num_{o}']:,} {o.replace('_', ' ')}" for o in outcomes)
    speed = f" ({summary['duration_s'] / summary['wall_s']:,.0f} x real time)" if summary["wall_s"] else ""
    lines = [
        ("", _name(report["trace"], _WIDTH)),
        ("", f"{report['kind']} on {_name(report['model'], _WIDTH - 13)}"),
        *(("step times", words) for words in profile_error_text(report.profile_error)),
        *(("step times", words) for words in constants_text(report.get("constants", []))),
        *(("", words) for words in fit_text(report.fit)),
        *_extrapolated(report.get("extrapolated", 0), summary["num_steps"]),
        ("load", _load(load)),
        ("requests", f"{summary['num_requests']:,}: {counts}"),
        *_left_out(summary),
        ("duration", f"{seconds_text(summary['duration_s'])} in {summary['num_steps']:,} steps"),
        ("replayed in", f"{seconds_text(summary['wall_s'])}{speed}"),
        ("throughput", f"{number_text(summary['requests_per_s'])} requests/s"),
        ("", f"{number_text(summary['output_tokens_per_s'])} output tokens/s"),
        ("", f"{number_text(summary['total_tokens_per_s'])} tokens/s with prompts"),
        *_goodput(summary["goodput"]),
        *_steady(summary.get("steady")),
        ("prefix cache", f"{share_text(cache['hit_rate'])} hit of {cache['query_tokens']:,} prompt tokens"),
        ("", f"{cache['evicted_tokens']:,} tokens evicted"),
        *_second_tier(cache),
        ("preemptions", f"{preemptions['recompute']:,} by recompute, {preemptions['swap']:,} by swap"),
        (
            "",
            f"of {preemptions['requests']:,} requests, at most {preemptions['most_of_one_request']:,} of one",
        ),
        ("KV blocks", f"{kv['peak_blocks']:,} of {kv['num_blocks']:,} at the peak{_bytes(kv['peak_bytes'])}"),
        ("", f"{kv['mean_blocks']:,.1f} on average{_bytes(kv['mean_bytes'])}"),
        ("", f"{share_text(kv['mean_unwritten_share'])} of their slots unwritten"),
        ("scheduling", _settings(config, "policy", *_policies_given(config), "preemption")),
        ("", _settings(config, "block_size", "max_num_seqs", "max_num_batched_tokens")),
    ]
    lines += _fleet(report.get("fleet"))
    table = [f"{label:<14}{value}" if label or i > 1 else value for i, (label, value) in enumerate(lines)]
    tables = *_latency_table(summary), *_group_tables(report.get("groups", [])), *_fleet_table(report)
    return "\n".join([*table, "", *tables])


def _second_tier(cache: Cache) -> Iterator[tuple[str, str]]:
    if "offloaded_tokens" in cache and "host_hit_tokens" in cache:
        out, found = cache["offloaded_tokens"], cache["host_hit_tokens"]
        yield "", f"{out:,} to the second tier, {found:,} hit there"


def profile_error_text(error: StepTimeError | None) -> Iterator[str]:
    """How far a profile's step times were from measured ones, in words; nothing where that is not known."""
    if error is not None:
        way = "short" if error["mean_signed"] < 0 else "long"
        bias = f"too {way} by {share_text(abs(error['mean_signed']))}"
        mean, p90 = share_text(error["mean"]), share_text(error["p90"])
        yield f"off by {mean} on average, 9 of 10 within {p90}; {bias}"


def constants_text(constants: Sequence[CostConstant]) -> Iterator[str]:
    """How many constants of estimated times were assumed, in words; nothing of measured times."""
    if constants:
        num_assumed = sum(constant["origin"] == "assumed" for constant in constants)
        yield f"estimated; {num_assumed} of {len(constants)} constants are assumed, not measured"


def fit_text(fit: FitError | None) -> Iterator[str]:
    """How far fitted constants are off on the part of a run that was held out, in words."""
    if fit is not None:
        shown = {name: fit[name] for name in FIT_METRICS}  # type: ignore[literal-required]
        errors = (
            f"{_NAMES.get(f'{name}_s', name)} {100 * value:+.1f} %"
            for name, value in shown.items()
            if value is not None
        )
        run = _name(fit["run"].replace("\\", "/").rsplit("/", 1)[-1], 30)
        yield f"fitted to {fit['num_fitted']:,} requests of {run}; error on the"
        yield f"{fit['num_scored']:,} others: {', '.join(errors) or 'not known'}"


def step_times_text(error: StepTimeError | None, fit: FitError | None) -> Iterator[str]:
    """Both, as far as they are known, above a table of replays."""
    yield from (f"step times: {words}" for words in profile_error_text(error))
    yield from fit_text(fit)


def _extrapolated(count: int, num_steps: int) -> Iterator[tuple[str, str]]:
    if count:
        yield "", f"{count:,} look-ups outside of what was measured, in {num_steps:,} steps"


def _latency_table(summary: Summary) -> Iterator[str]:
    statistics = ("mean", "p50", "p90", "p95", "p99", "max")
    names = (name.upper() if name.startswith("p") else name for name in statistics)
    yield f"{'latency':<11}" + "".join(f"{name:>10}" for name in names) + f"{'count':>9}"
    for path, name in _NAMES.items():
        found: dict[str, Any] = cast(dict[str, Any], summary)[path]
        values = [found[statistic] for statistic in statistics]
        unit, factor = _seconds_unit(values, 10.0)
        cells = "".join(f"{number_text(value and value * factor):>10}" for value in values)
        yield f"{name:<7}{unit:<4}{cells}{_short(found['count']):>9}"


def _group_tables(groups: Sequence[Group]) -> Iterator[str]:
    """The figures by replica, tenant and class: a table of each kind."""
    names = ("TTFT P50", "TTFT P99", "TPOT P99", "E2E P99")
    for kind, found in groupby(groups, lambda group: group["by"]):
        yield ""
        head = f"{f'by {kind}':<14}{'requests':>9}{'tokens/s':>9}{'in SLO':>8}"
        yield head + "".join(f"{name:>10}" for name in names)
        for group in found:
            times = (
                group["ttft_s"]["p50"],
                group["ttft_s"]["p99"],
                group["tpot_s"]["p99"],
                group["e2e_s"]["p99"],
            )
            cells = "".join(f"{'-' if time is None else seconds_text(time):>10}" for time in times)
            share = share_text(group["goodput_share"])
            rate = number_text(group["output_tokens_per_s"])
            name = _name(group["name"], 13)
            yield f"{name:<14}{group['num_requests']:>9,}{rate:>9}{share:>8}{cells}".rstrip()


def _fleet(fleet: FleetData | None) -> Iterator[tuple[str, str]]:
    if fleet is None:
        return
    if fleet["energy_wh"] is not None:
        million = f", {number_text(fleet['wh_per_million'])} Wh a million output tokens"
        yield "energy", f"{number_text(fleet['energy_wh'])} Wh of devices{million}"
        yield from (("", words) for words in _powers(fleet))
    if fleet["cost"] is not None:
        million = f", {number_text(fleet['cost_per_million'])} a million output tokens"
        yield "cost", f"{number_text(fleet['cost'])} in the unit of prices{million}"
    for link in fleet.get("links", []):
        waited = f"after {seconds_text(link['mean_wait_s'])} of waiting"
        sent = f"{link['transfers']:,} times KV{_bytes(link['bytes'])} in all"
        yield "transfers", f"{sent}, over {_name(link['name'], 20)}"
        yield "", f"each in {seconds_text(link['mean_transfer_s'])} {waited}, on average"
    failures = fleet.get("failures")
    if failures is not None:
        mean_s = failures["mean_down_s"]
        down = "" if mean_s is None else f", each down for {seconds_text(mean_s)} on average"
        yield "failures", f"{failures['failures']:,} of replicas{down}"
        failed = failures.get("failed_requests", 0)
        lost = f"{failures['lost_tokens']:,} tokens computed anew"
        yield "", f"{failures['lost_requests'] - failed:,} requests began anew, {lost}"
        if failed:
            yield "", f"{failed:,} requests failed with them"
    if fleet.get("scaling"):
        yield "scaling", f"{len(fleet['scaling']):,} times replicas were started or stopped"


def _powers(fleet: FleetData) -> Iterator[str]:
    """What the energy of devices rests on."""
    powers = [(group["name"], power) for group in fleet["groups"] for power in group.get("powers", [])]
    if any(power["name"] == "power_w" and power["origin"] == "device" for _, power in powers):
        yield "at most: as if each drew all that it may while a step is under way"
    for name, what in (("power_w", "power"), ("idle_power_w", "idle power")):
        all_of = [group for group, power in powers if power["name"] == name]
        assumed = [group for group, power in powers if power["name"] == name and power["origin"] == "assumed"]
        if assumed:
            of = "" if assumed == all_of else f" of {_name(', '.join(assumed), 30)}"
            yield f"{what}{of} is assumed, not measured"


def _fleet_table(report: AnyReport) -> Iterator[str]:
    """What served, where that is more than replicas that are alike."""
    fleet = report.get("fleet")
    if fleet is None or (len(fleet["groups"]) < 2 and not fleet.get("scaling")):
        return
    yield ""
    yield f"{'fleet':<14}{'role':<9}{'replicas':>9}{'devices':>9}{'busy':>9}{'Wh':>10}{'cost':>10}"
    for group in fleet["groups"]:
        busy = share_text(group["busy_s"] / group["paid_s"] if group["paid_s"] else None)
        counts = f"{group['replicas']:>9,}{group['replicas'] * group['devices']:>9,}{busy:>9}"
        amounts = f"{number_text(group['energy_wh']):>10}{number_text(group['cost']):>10}"
        yield f"{_name(group['name'], 13):<14}{group['role']:<9}{counts}{amounts}"


def _load(load: Load) -> str:
    if load["mode"] == "closed":
        rate = f"closed, {load['clients']:,} clients" if load["clients"] is not None else "closed"
    else:
        rate = f"open, arrivals x {load['rate_factor'] or 1:g}"
    replicas = f", {load['replicas']:,} replicas" if load["replicas"] != 1 else ""
    router = f" by {_name(load['router'], 20)}" if replicas and load["router"] else ""
    return f"{rate}{replicas}{router}"


def _left_out(summary: Summary) -> Iterator[tuple[str, str]]:
    skipped, dropped = summary["num_skipped"], summary["num_dropped"]
    if skipped or dropped:
        yield "left out", f"{skipped:,} bad records, {dropped:,} without a request"


def _steady(steady: Steady | None) -> Iterator[tuple[str, str]]:
    if steady is not None:
        yield "offered", f"{number_text(steady['offered_per_s'])} requests/s after a warm-up"
        verdict = "too short to say" if steady["verdict"] == "short" else steady["verdict"]
        for line in wrap(f"{verdict}: {steady['reason']}", _WIDTH - 14):
            yield "", line


def _goodput(goodput: Goodput | None) -> Iterator[tuple[str, str]]:
    if goodput is not None:
        slo = ", ".join(
            f"{_NAMES.get(name, name)} {seconds_text(limit)}"
            for name, limit in goodput["slo"].items()
            if limit is not None
        )
        rate = f"{number_text(goodput['requests_per_s'])} requests/s"
        yield "goodput", f"{rate}, {share_text(goodput['share'])} within {_name(slo, 32)}"


def _policies_given(config: dict[str, Any]) -> list[str]:
    """The policies beside the scheduling policy that are not the default ones."""
    return [
        name
        for name in list(KINDS)[1:]
        if config.get(name, getattr(EngineConfig, name)) != getattr(EngineConfig, name)
    ]


def _settings(config: dict[str, Any], *names: str) -> str:
    return _name(", ".join(f"{name} {config.get(name, '-')}" for name in names), _WIDTH - 14)


def compare(a: AnyReport, b: AnyReport) -> str:
    """Metric by metric: both values, and by how many percent b differs from a.

    Each is what a replay returned, or what its JSON holds. Raises `ReportError` for what is no report.
    """
    a, b = check_report(a, "a"), check_report(b, "b")
    lines = [f"{name}: {_name(report.title, _WIDTH - 3)}" for name, report in (("a", a), ("b", b))]
    for name, report in (("a", a), ("b", b)):
        lines += [f"{name}: step times {words}" for words in profile_error_text(report.profile_error)]
        lines += [f"{name}: {' '.join(words)}" for words in [list(fit_text(report.fit))] if words]
    lines += ["", f"{'':<24}{'a':>16}{'b':>16}   b is"]
    for group, metrics in groupby(METRICS, lambda metric: metric.group):
        rows = [(metric, metric.value(a), metric.value(b)) for metric in metrics]
        rows = [row for row in rows if row[1:] != (None, None)]
        if rows:
            lines += [group, *_compared(rows)]
    return "\n".join(lines)


def _compared(rows: list[tuple[Metric, float | None, float | None]]) -> Iterator[str]:
    """The lines of one group, its times all in one unit."""
    times = [value for metric, *values in rows if metric.unit == "s" for value in values]
    units = {"s": _seconds_unit(times, 10.0), "share": ("%", 100.0)}
    for metric, *values in rows:
        unit, factor = units.get(metric.unit, ("", 1))
        label = f"{metric.label}, {unit}" if unit else metric.label
        cells = "".join(f"{number_text(value and value * factor):>16}" for value in values)
        yield f"  {label:<22}{cells}   {_difference(*values)}"


def compare_json(a: AnyReport, b: AnyReport) -> str:
    """The same as one JSON object; error_percent is null where a is zero or either has no value."""
    a, b = check_report(a, "a"), check_report(b, "b")
    metrics = [
        {
            "metric": metric.path,
            "unit": metric.unit,
            "a": metric.value(a),
            "b": metric.value(b),
            "error_percent": error_percent(metric.value(a), metric.value(b)),
        }
        for metric in METRICS
    ]
    names = {
        side: {name: report.get(name) for name in ("trace", "model", "kind", "profile_error", "fit")}
        for side, report in (("a", a), ("b", b))
    }
    return json.dumps({"version": 1, **names, "metrics": metrics}, allow_nan=False)


def error_percent(a: float | None, b: float | None) -> float | None:
    """By how much b differs from a; None where a is zero or either has no value."""
    if a is None or b is None:
        return None
    return 0.0 if a == b else 100.0 * (b - a) / a if a else None


def _difference(a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return "not measured" if b is None else "not measured in a"
    error = error_percent(a, b)
    if error is None:
        return "higher, from zero"
    if error == 0:
        return "the same"
    size = f"{abs(error):,.1f}" if abs(error) >= 0.05 else "< 0.1"
    return f"{size} % {'higher' if error > 0 else 'lower'}"


def to_html(reports: AnyReport | Iterable[AnyReport], path: str | os.PathLike[str]) -> None:
    """Writes one page that shows a report, or compares several with the first of them.

    Each is what a replay returned, or what its JSON holds. Raises `ReportError` for what is no report.
    """
    given = [reports] if isinstance(reports, Mapping) else list(reports)
    if not given:
        raise ReportError("reports: found none, expected at least one")
    checked = [check_report(report, f"reports[{index}]") for index, report in enumerate(given)]
    write_page(
        path,
        title=" and ".join(dict.fromkeys(report.title for report in checked)),
        text="\n\n\n".join(map(to_text, checked)),
        data={
            "metrics": [vars(metric) for metric in METRICS],
            "reports": [report.data for report in checked],
        },
        scripts=_SCRIPTS,
        styles=("page.css",),
    )


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    text: str,
    data: dict[str, Any],
    scripts: Sequence[str | Path],
    styles: Sequence[str | Path],
) -> None:
    """Writes one page that asks for nothing else.

    text: what it says without scripts. data: for the scripts, as JSON. scripts, styles: files, in order;
    names are those of `page/`. Raises `ReportError`.
    """
    parts = {
        "title": html.escape(title),
        "style": _joined(styles),
        "text": html.escape(text),
        "data": _script_safe(json.dumps(_rounded(data), separators=(",", ":"), allow_nan=False)),
        "script": _joined(scripts),
    }
    template = (_PAGE / "page.html").read_text(encoding="utf-8")
    # One pass, so that what looks like a placeholder in the data stays as it is.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
    write_whole("report", path, page, ReportError)


def _joined(names: Sequence[str | Path]) -> str:
    return "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in names)


def _script_safe(text: str) -> str:
    """JSON in which nothing can end the script element that it stands in, or begin another one."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _rounded(value: Any) -> Any:
    """The same with numbers as a plot needs them; what is no finite number becomes null."""
    if isinstance(value, dict):
        return {str(name): _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{_PAGE_DIGITS}g}")
        return int(rounded) if rounded.is_integer() else rounded
    return value


def _name(text: str, width: int) -> str:
    """A name on one line of a terminal, cut to a width."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= width else f"{shown[: width - 3]}..."


def number_text(value: float | None) -> str:
    """Four significant digits, or all of an integer's or of what is before the point."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}" if value >= 1e-3 else f"{value:.2e}"


def _short(count: int) -> str:
    return f"{count:,}" if count < 10**7 else f"{count / 10**6:,.0f} M"


def share_text(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{value:.1%}".replace("%", " %")


def seconds_text(value: float) -> str:
    """A time of four significant digits in the unit that suits it."""
    unit, factor = _seconds_unit([value], 1.0)
    return f"{value * factor:,.4g} {unit}" if value * factor < 1e4 else f"{value * factor:,.0f} {unit}"


def _seconds_unit(values: Sequence[float | None], seconds_from: float) -> tuple[str, float]:
    """What a column of times is shown in, and how many of it a second has."""
    largest = max((value for value in values if value is not None), default=0.0)
    return ("ms", 1e3) if 0 < largest < seconds_from else ("s", 1.0)


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f", {value:,.1f} {unit}"
        value /= 1024
    return f", {value:,.1f} GiB"
