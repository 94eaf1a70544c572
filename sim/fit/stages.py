"""Stages of a load test of which only means and percentiles are known, and what others predicted of them.

A JSON list with an object for each stage: requests that arrive at random at request_rate_per_s, with one of
system_prompts prompts of system_len tokens before question_len tokens of their own, and output_len tokens of
an answer; what a client measured, in milliseconds; and what simulators predicted, in the same terms. The
earlier stages of an experiment are fitted to, the last one scores.
"""

from pathlib import Path
from random import Random
from typing import Any

from pagellm.engine.errors import TraceError
from pagellm.sim.fields import Fields
from pagellm.sim.fit.recorded_run import Experiment, Half, RecordedRun, Served, requests_of, settings_of

# Enough for means to settle: requests, and seconds of the load.
_NUM_REQUESTS, _SECONDS = 300, 120.0


def is_stages(document: list[Any]) -> bool:
    """Whether the value of a JSON document has stages."""
    return bool(document) and isinstance(document[0], dict) and "measured_ms" in document[0]


def read_stages(path: Path, document: list[Any]) -> list[RecordedRun]:
    """A run for each experiment, in the order of the file. Raises `TraceError`."""
    experiments: dict[str, list[Fields]] = {}
    for index, values in enumerate(document):
        stage = Fields(values, str(path), TraceError, f"[{index}].")
        experiments.setdefault(str(stage.get("experiment")), []).append(stage)
    return [_run(path, name, stages) for name, stages in experiments.items()]


def _run(path: Path, name: str, stages: list[Fields]) -> RecordedRun:
    first = stages[0]
    read = [
        _stage(f"experiment {name}, stage {stage.get('stage')}", stage, is_scored=stage is stages[-1])
        for stage in stages
    ]
    return RecordedRun(
        str(path),
        "stages",
        at_client=True,
        experiments=read,
        model=first.text("model"),
        hardware=first.text("hardware"),
        num_devices=first.integer("tp"),
    )


def _stage(name: str, stage: Fields, is_scored: bool) -> Experiment:
    rate = stage.number("request_rate_per_s", 1e-6)
    num_prompts = stage.integer("system_prompts", 0)
    system_len, question_len = stage.integer("system_len", 0), stage.integer("question_len")
    output_len = stage.integer("output_len")
    random, now, served = Random(0), 0.0, []
    # The rate is met exactly: what is left to chance is who comes close to whom.
    for _ in range(max(_NUM_REQUESTS, round(rate * _SECONDS))):
        prefix = (f"system prompt {random.randrange(num_prompts)}", system_len) if num_prompts else ("", 0)
        served.append(Served(now, prefix[1] + question_len, output_len, 0.0, 0.0, prefix))
        now += random.expovariate(rate)
    stretch = len(served) / rate / now
    served = [one._replace(arrival_s=stretch * one.arrival_s) for one in served]
    half = Half(range(len(served)), _seconds(stage.section("measured_ms"), output_len))
    published = Fields(stage.get("predicted_ms") or {}, stage.place, TraceError, "predicted_ms.")
    return Experiment(
        name,
        requests_of(served),
        fitted=None if is_scored else half,
        scored=half if is_scored else None,
        settings=settings_of(stage),
        published={
            simulator: _seconds(published.section(simulator), output_len) for simulator in published.values
        },
    )


def _seconds(values: Fields, output_len: int) -> dict[str, float]:
    """Means and percentiles in seconds.

    What the files call ITL is for some the time of a request a token, for others that between tokens. So
    tpot follows from the other two means.
    """
    found = {}
    for metric in ("ttft", "e2e"):
        for statistic in ("mean", "p90", "p99"):
            if values.has(f"{metric}_{statistic}"):
                called = metric if statistic == "mean" else f"{metric}_{statistic}"
                found[called] = values.number(f"{metric}_{statistic}") / 1e3
    for name in ("ttft", "e2e"):
        if name not in found:
            raise values.bad(f"{name}_mean", None, "milliseconds")
    if output_len > 1:
        found["tpot"] = (found["e2e"] - found["ttft"]) / (output_len - 1)
    return found
