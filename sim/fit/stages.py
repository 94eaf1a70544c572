"""Stages of a load test of which only means and percentiles are known, and what others predicted of them.

A JSON list with an object for each stage: requests that arrive at random at request_rate_per_s, with one of
system_prompts prompts of system_len tokens before question_len tokens of their own, and output_len tokens of
an answer; what a client measured, in milliseconds; and what simulators predicted, in the same terms. The
earlier stages of an experiment are fitted to, the last one scores.

Such loads are of inference-perf, whose shared prefixes have so many users each, and every user asks the same
question again and again (`users_per_system_prompt`; 5 in BLIS's profiles, where a file does not say). So all
but a user's first prompt is in the prefix cache. A stage comes behind others: its requests begin when each
question has been asked once. Nothing is said of sampling, so that vLLM samples as the model's own
generation_config.json has it.
"""

from array import array
from pathlib import Path
from random import Random
from typing import Any

from pagellm.engine.errors import TraceError
from pagellm.sim.fields import Fields
from pagellm.sim.fit.recorded_run import Experiment, Half, RecordedRun, settings_of
from pagellm.sim.traces.request import TraceRequest

# Enough for means to settle: requests, and seconds of the load.
_NUM_REQUESTS, _SECONDS = 300, 120.0
_USERS = 5


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
        samples_as_model=True,
        model=first.text("model"),
        hardware=first.text("hardware"),
        num_devices=first.integer("tp"),
    )


def _stage(name: str, stage: Fields, is_scored: bool) -> Experiment:
    rate = stage.number("request_rate_per_s", 1e-6)
    output_len = stage.integer("output_len")
    prompts = _prompts(stage)
    # The rate is met exactly: what is left to chance is who comes close to whom.
    random, gaps = Random(0), []
    for _ in range(max(_NUM_REQUESTS, round(rate * _SECONDS))):
        gaps.append(random.expovariate(rate))
    stretch = len(gaps) / rate / sum(gaps)
    asked = [*prompts, *random.choices(prompts, k=len(gaps))]
    times, now = [], 0.0
    for gap in [*(1 / rate for _ in prompts), *(stretch * gap for gap in gaps)]:
        times.append(now)
        now += gap
    requests = [
        TraceRequest(
            arrival_time=time, prompt_token_ids=prompt, output_len=output_len, id=str(index), index=index
        )
        for index, (time, prompt) in enumerate(zip(times, asked, strict=True))
    ]
    measured = _seconds(stage.section("measured_ms"), output_len)
    half = Half(range(len(prompts), len(requests)), measured)
    published = Fields(stage.get("predicted_ms") or {}, stage.place, TraceError, "predicted_ms.")
    return Experiment(
        name,
        requests,
        fitted=None if is_scored else half,
        scored=half if is_scored else None,
        settings=settings_of(stage),
        published={
            simulator: _seconds(published.section(simulator), output_len) for simulator in published.values
        },
    )


def _prompts(stage: Fields) -> list["array[int]"]:
    """What users ask, the tokens of each."""
    num_systems, system_len = stage.integer("system_prompts", 0), stage.integer("system_len", 0)
    question_len = stage.integer("question_len")
    name = "users_per_system_prompt"
    num_users = stage.integer(name) if stage.has(name) else _USERS
    prompts, upcoming = [], num_systems * system_len
    for system in range(num_systems) if num_systems else (-1,):
        begins = range(system * system_len, (system + 1) * system_len) if num_systems else range(0)
        for _ in range(num_users):
            prompts.append(array("i", [*begins, *range(upcoming, upcoming + question_len)]))
            upcoming += question_len
    return prompts


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
