"""How a sweep's result is shown: a table for the terminal, JSON, and a page with plots.

The page has the look of a report's page and its way with data: one file, JSON inside it, and every name in
that data is only ever shown as text.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pagellm.sim.report.report import (
    METRICS,
    number_text,
    seconds_text,
    share_text,
    step_times_text,
    write_page,
)
from pagellm.sim.report.schema import short_name
from pagellm.sim.sweep.capacity import HIGHEST, LOWEST
from pagellm.sim.sweep.file import Point
from pagellm.sim.sweep.grid import Limit
from pagellm.sim.sweep.serving import Settings
from pagellm.sim.sweep.sweep import Capacity, SweepResult

_PAGE = Path(__file__).with_name("page")
_LATENCIES = [Limit("ttft", "p50", 0), Limit("ttft", "p99", 0), Limit("tpot", "p99", 0)]
_MAX_ERROR = 100  # characters of one in a table
# What a column shows of a point, and what the column is called.
_Column = tuple[str, Callable[[Point], str]]


def to_text(result: SweepResult) -> str:
    """Tables for the terminal: the grid, and the capacities where they were searched."""
    lines = [_printable(result.trace), f"simulated on {_printable(result.cost_model)}"]
    lines += step_times_text(result.profile_error, result.fit)
    lines += _left_out(result.points)
    if result.slo is not None:
        lines.append(f"SLO: {result.slo.words()}")
    lines += ["", *_grid_table(result)]
    if result.capacities is not None:
        lines += ["", *_capacity_table(result, result.capacities)]
    return "\n".join(lines)


def to_json(result: SweepResult) -> str:
    """The whole result as one JSON object.

    version, trace, cost_model, profile_error and fit (as in a report), slo (seconds by name, or null), grid
      (values by key)
    points: settings, summary, extrapolated, error, slo_holds; null where there is none
    capacities: null, or for each point settings, status, error, rate_factor (the highest at which the SLO
      holds), fails_at (the lowest at which it does not), requests_per_s, range and probes, which are points

    status: found, never, always, transient or failed. transient: why the highest load is no answer, which
    is null then. offered_per_s: what came at it. range: the lowest and the highest rate factor that is tried.
    """
    return json.dumps(_to_dict(result), allow_nan=False)


def to_html(result: SweepResult, path: str | os.PathLike[str]) -> None:
    """Writes one page with plots of the grid and of the capacities. Raises `ReportError`."""
    metrics = [vars(metric) for metric in METRICS if not metric.path.startswith("goodput.")]
    write_page(
        path,
        title=f"{short_name(result.trace)}, a sweep on {short_name(result.cost_model)}",
        text=to_text(result),
        data=_to_dict(result) | {"metrics": metrics},
        scripts=["draw.js", _PAGE / "plots.js", _PAGE / "sweep.js"],
        styles=["page.css", _PAGE / "sweep.css"],
    )


def words(settings: Settings) -> str:
    """Settings in a line: "policy fair, num_blocks 100"."""
    return ", ".join(f"{name} {_value(value)}" for name, value in settings.items()) or "the defaults"


def status_of(capacity: Capacity) -> str:
    """found, never (nowhere down to the lowest factor), always (up to the highest), transient or failed."""
    if capacity.bracket is None:
        return "failed"
    if capacity.bracket.holds is None:
        return "never"
    if capacity.transient is not None:
        return "transient"
    return "always" if capacity.bracket.fails is None else "found"


def _to_dict(result: SweepResult) -> dict[str, Any]:
    def point(point: Point) -> dict[str, Any]:
        holds = None if result.slo is None or not point.summary else result.slo.holds(point.summary)
        return vars(point) | {"slo_holds": holds}

    def capacity(capacity: Capacity) -> dict[str, Any]:
        at = None if capacity.transient is not None else capacity.at
        return {
            "settings": capacity.settings,
            "status": status_of(capacity),
            "error": capacity.error,
            "transient": capacity.transient,
            "offered_per_s": None if at is None or at.summary is None else _offered(at.summary),
            "rate_factor": None if at is None else at.settings["rate_factor"],
            "fails_at": None if capacity.bracket is None else capacity.bracket.fails,
            "requests_per_s": None if at is None or at.summary is None else at.summary["requests_per_s"],
            "range": [LOWEST, HIGHEST],
            "probes": [point(probe) for probe in capacity.probes],
        }

    capacities = result.capacities
    return {
        "version": 1,
        "trace": result.trace,
        "cost_model": result.cost_model,
        "profile_error": result.profile_error,
        "fit": result.fit,
        "slo": None if result.slo is None else result.slo.to_dict(),
        "grid": result.grid.axes,
        "points": [point(p) for p in result.points],
        "capacities": None if capacities is None else [capacity(c) for c in capacities],
    }


def _offered(summary: Mapping[str, Any]) -> float | None:
    steady = summary.get("steady")
    return None if steady is None else steady["offered_per_s"]


def _left_out(points: Sequence[Point]) -> Iterator[str]:
    """The most that any point left out; with fewer requests replayed it may be less."""
    summaries = [point.summary for point in points if point.summary is not None]
    skipped, dropped, rejected = (
        max((summary[name] for summary in summaries), default=0)
        for name in ("num_skipped", "num_dropped", "num_rejected")
    )
    if skipped or dropped or rejected:
        yield f"left out: {skipped:,} bad records, {dropped:,} without a request, up to {rejected:,} rejected"


def _grid_table(result: SweepResult) -> Iterator[str]:
    columns = [*_axes(result), _rate("requests/s", "requests_per_s")]
    columns += [_rate("tokens/s", "output_tokens_per_s"), *_limits(result), *_amounts(result)]
    slo = result.slo
    if slo is not None:
        columns.append(("SLO", lambda p: "holds" if p.summary and slo.holds(p.summary) else "broken"))
    rows = [
        [
            cell(point) if i < len(result.grid.axes) or point.summary else ""
            for i, (_, cell) in enumerate(columns)
        ]
        for point in result.points
    ]
    notes = [_note(point.error) for point in result.points]
    yield from _table([name for name, _ in columns], rows, notes)


def _capacity_table(result: SweepResult, capacities: list[Capacity]) -> Iterator[str]:
    columns: list[_Column] = [("rate factor", lambda p: _value(p.settings["rate_factor"]))]
    columns.append(("offered/s", lambda p: number_text(_offered(p.summary)) if p.summary else ""))
    columns += [_rate("requests/s", "requests_per_s"), *_limits(result)]
    axes = _axes(result)
    rows, notes = [], []
    for capacity in capacities:
        at = None if capacity.transient is not None else capacity.at
        settings = Point(capacity.settings)
        rows.append(
            [cell(settings) for _, cell in axes]
            + ["" if at is None else cell(at) for _, cell in columns]
            + [str(len(capacity.probes))]
        )
        said = {
            "never": f"never holds, down to {_lowest(capacity):g}",
            "always": f"holds up to {HIGHEST:g}, the highest tried",
            "failed": _note(capacity.error),
            "transient": _printable(f"refused: {capacity.transient}"),
            "found": "",
        }
        notes.append(said[status_of(capacity)])
    yield "the highest load at which the SLO holds"
    yield from _table([*(name for name, _ in axes), *(name for name, _ in columns), "probes"], rows, notes)


def _lowest(capacity: Capacity) -> float:
    return capacity.bracket.fails if capacity.bracket and capacity.bracket.fails else LOWEST


def _table(names: Sequence[str], rows: list[list[str]], notes: list[str]) -> Iterator[str]:
    """Columns as wide as they need to be, and a note at the end of a line."""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row, note in zip([names, *rows], ["", *notes], strict=True):
        cells = "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        # A note stands in the place of the cells that it explains.
        yield f"{cells.rstrip()}  {note}".rstrip()


def _axes(result: SweepResult) -> list[_Column]:
    def column(name: str) -> _Column:
        return name, lambda point: _value(point.settings[name])

    return [column(name) for name in result.grid.axes]


def _rate(label: str, name: str) -> _Column:
    return label, lambda point: number_text(point.summary[name]) if point.summary else ""


def _limits(result: SweepResult) -> list[_Column]:
    def column(limit: Limit) -> _Column:
        def cell(point: Point) -> str:
            value = None if point.summary is None else limit.value(point.summary)
            return "-" if value is None else seconds_text(value)

        return limit.name, cell

    slo = result.slo
    columns = [column(limit) for limit in (_LATENCIES if slo is None else slo.limits)]
    if slo is not None and slo.joint:
        columns.append(("within", lambda p: _attained(p.summary)))
    return columns


def _amounts(result: SweepResult) -> Iterator[_Column]:
    """What a million tokens of output take, where that is known of any point."""

    def column(label: str, name: str) -> _Column:
        return label, lambda point: number_text(point.summary["fleet"][name]) if point.summary else ""

    for label, name in (("Wh/M", "wh_per_million"), ("cost/M", "cost_per_million")):
        if any(point.summary and point.summary["fleet"][name] is not None for point in result.points):
            yield column(label, name)


def _attained(summary: Mapping[str, Any] | None) -> str:
    return share_text(((summary or {}).get("steady") or {}).get("attainment"))


def _note(error: str | None) -> str:
    text = _printable(error or "")
    return text if len(text) <= _MAX_ERROR else f"{text[: _MAX_ERROR - 3]}..."


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else _printable(str(value))


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
