"""The discrete-event loop: who runs when, to the exact second, and the same every time."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import (
    ConfigError,
    EngineConfig,
    PagellmError,
    PolicyError,
    SchedulingPolicy,
    TraceError,
)
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.sim import CostModel, Simulator, Trace, TraceRequest, Workload, load_report, synthesise
from pagellm.sim.costs.profile import write_profile

CONFIG = EngineConfig(block_size=4, num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64)
EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"


class Seconds(CostModel):
    """Every step takes so long."""

    name = "a constant"

    def __init__(self, seconds: float = 1.0) -> None:
        self._seconds = seconds

    def step_time(self, batch: ScheduledBatch) -> float:
        return self._seconds


def trace_of(*requests: tuple[float, int, int], **fields: Any) -> Trace:
    """Requests as (arrival, prompt tokens, output tokens)."""
    return Trace.from_requests(
        TraceRequest(arrival_time=time, prompt_len=prompt_len, output_len=output_len, **fields)
        for time, prompt_len, output_len in requests
    )


class Run:
    """A replay with the logs of its steps and requests."""

    def __init__(self, trace: Trace, path: Path, config: EngineConfig = CONFIG, **options: Any) -> None:
        steps, results = path / "steps.jsonl", path / "results.jsonl"
        options.setdefault("cost_model", Seconds())
        config = replace(config, step_log=str(steps))
        self.report = Simulator(config, results=results, **options).replay(trace)
        self.summary = self.report.summary
        self.steps, self.results = (
            [json.loads(line) for line in file.read_text().splitlines()] for file in (steps, results)
        )

    def events(self) -> list[tuple[float, list[tuple[int, int]]]]:
        """When each step started, and what it computed: (sequence, tokens)."""
        return [
            (step["start_s"], [(sequence, count) for sequence, _, count, _ in step["scheduled"]])
            for step in self.steps
        ]

    def outcomes(self) -> list[tuple[str, str, float | None]]:
        """(id, outcome, last token) of requests in the order in which they ended."""
        return [(r["id"], r["outcome"], r.get("last_token_s")) for r in self.results]


class Ahead(Seconds):
    """Of an engine that schedules a step when the one before it begins."""

    schedules_ahead = True


def test_what_comes_in_a_step_waits_for_the_one_after_next_of_an_engine_that_is_a_step_ahead(
    tmp_path: Path,
) -> None:
    # The first finds nothing under way. What comes at 0.5 and 1, while the first step is under way or as it
    # ends, is not in the second, which was scheduled at 0; at 1.5, not in the third. Behind the first two,
    # which are over at 4 and 3, nothing is under way when the last comes.
    trace = trace_of((0, 5, 4), (0.5, 6, 1), (1.0, 7, 1), (1.5, 8, 1), (9, 9, 1))
    run = Run(trace, tmp_path, cost_model=Ahead())
    assert run.events() == [
        (0.0, [(0, 5)]),
        (1.0, [(0, 1)]),
        (2.0, [(0, 1), (1, 6), (2, 7)]),
        (3.0, [(0, 1), (3, 8)]),
        (9.0, [(4, 9)]),
    ]
    plain = Run(trace, tmp_path)
    assert plain.events()[1:3] == [(1.0, [(0, 1), (1, 6), (2, 7)]), (2.0, [(0, 1), (3, 8)])]


def test_an_engine_that_is_a_step_ahead_takes_all_in_where_nothing_goes_on(tmp_path: Path) -> None:
    run = Run(trace_of((0, 5, 1), (0.5, 6, 1), (0.7, 7, 1)), tmp_path, cost_model=Ahead())
    assert run.events() == [(0.0, [(0, 5)]), (1.0, [(1, 6), (2, 7)])]


def test_who_comes_to_an_engine_a_step_ahead_as_the_last_one_gives_up_is_served(tmp_path: Path) -> None:
    # It hears at 3 that the first gave up at 1.5, and then nothing is under way.
    trace = trace_of((0, 5, 100), (2.8, 9, 1))
    run = Run(trace, tmp_path, cost_model=Ahead(), timeout_s=1.5)
    assert run.events() == [(0.0, [(0, 5)]), (1.0, [(0, 1)]), (2.0, [(0, 1)]), (3.0, [(1, 9)])]
    assert [run.report.summary[f"num_{name}"] for name in ("finished", "timed_out")] == [1, 1]


def test_one_request_alone(tmp_path: Path) -> None:
    run = Run(trace_of((2.5, 6, 3)), tmp_path)
    assert run.events() == [(2.5, [(0, 6)]), (3.5, [(0, 1)]), (4.5, [(0, 1)])]
    assert run.results == [
        {
            "id": "0", "outcome": "finished", "replica": 0, "arrival_s": 2.5, "first_scheduled_s": 2.5,
            "first_token_s": 3.5, "last_token_s": 5.5, "prompt_tokens": 6, "output_tokens": 3,
            "cached_tokens": 0, "preemptions": 0,
        }
    ]  # fmt: skip
    summary = run.summary
    assert (summary["duration_s"], summary["num_steps"]) == (3.0, 3)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (6, 3)
    assert (summary["requests_per_s"], summary["total_tokens_per_s"]) == (1 / 3, 3)
    figures = [summary[name]["max"] for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s")]
    assert figures == [1.0, 1.0, 3.0, 0.0]
    assert summary["itl_s"] == pytest.approx(dict.fromkeys(summary["itl_s"], 1.0) | {"count": 2}, rel=0.005)


def test_who_comes_during_a_step_waits_for_its_end_and_who_comes_at_its_end_does_not(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 3), (0.25, 5, 1), (1, 6, 1), (1, 7, 1), (1.5, 8, 1)), tmp_path)
    assert run.events() == [
        (0, [(0, 4)]),
        (1, [(0, 1), (1, 5), (2, 6), (3, 7)]),
        (2, [(0, 1), (4, 8)]),
    ]
    assert [step["added"][0]["arrival_s"] for step in run.steps] == [0, 0.25, 1.5]
    assert [r["first_scheduled_s"] - r["arrival_s"] for r in run.results] == [0.75, 0, 0, 0, 0.5]


def test_an_idle_engine_starts_when_somebody_comes(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 1), (7.5, 4, 2)), tmp_path)
    assert run.events() == [(0, [(0, 4)]), (7.5, [(1, 4)]), (8.5, [(1, 1)])]


def test_arrivals_come_as_often_as_one_says(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 1), (10, 5, 1)), tmp_path, rate_factor=4)
    assert run.events() == [(0, [(0, 4)]), (2.5, [(1, 5)])]
    assert run.report.data["load"]["rate_factor"] == 4


def test_clients_ask_again_when_they_have_their_answer(tmp_path: Path) -> None:
    run = Run(trace_of((9, 4, 1), (9, 5, 3), (9, 6, 1), (9, 7, 2)), tmp_path, clients=2)
    assert run.events() == [
        (0, [(0, 4), (1, 5)]),
        (1, [(1, 1), (2, 6)]),
        (2, [(1, 1), (3, 7)]),
        (3, [(3, 1)]),
    ]
    assert run.report.data["load"] == {
        "mode": "closed", "rate_factor": 1.0, "clients": 2, "replicas": 1, "router": None, "timeout_s": None,
    }  # fmt: skip


def test_a_client_that_gives_up_is_noticed_between_two_steps(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 9), (0.5, 5, 9), (1.25, 6, 1)), tmp_path, timeout_s=2.25)
    assert run.events() == [
        (0, [(0, 4)]),
        (1, [(0, 1), (1, 5)]),
        (2, [(0, 1), (1, 1), (2, 6)]),
    ]
    assert run.outcomes() == [("2", "finished", 3.0), ("0", "timed_out", 3.0), ("1", "timed_out", 3.0)]
    summary = run.summary
    assert (summary["num_finished"], summary["num_timed_out"]) == (1, 2)
    assert summary["e2e_s"]["count"] == 1
    assert summary["ttft_s"]["count"] == 3
    assert summary["output_tokens"] == 6


def test_an_answer_at_the_last_moment_counts(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 2), (0, 4, 3)), tmp_path, timeout_s=2)
    assert run.outcomes() == [("0", "finished", 2.0), ("1", "timed_out", 2.0)]
    assert len(run.steps) == 2


def test_a_client_that_gave_up_asks_again(tmp_path: Path) -> None:
    run = Run(trace_of((0, 4, 9), (0, 5, 1)), tmp_path, timeout_s=1.5, clients=1)
    assert run.events() == [(0, [(0, 4)]), (1, [(0, 1)]), (2, [(1, 5)])]


def test_one_that_waits_can_give_up_before_it_runs(tmp_path: Path) -> None:
    config = replace(CONFIG, max_num_seqs=1)
    run = Run(trace_of((0, 4, 4), (0, 5, 1)), tmp_path, config, timeout_s=3.5)
    assert run.outcomes() == [("1", "timed_out", None), ("0", "finished", 4.0)][::-1]
    assert run.results[1]["first_scheduled_s"] is None
    assert run.summary["queue_s"]["count"] == 1


def test_a_prompt_that_can_never_fit_is_an_error_or_counted(tmp_path: Path) -> None:
    trace = trace_of((0, 4, 1), (0.5, 401, 1), (0.75, 5, 1))
    message = r"trace: request '1': prompt: found 401 tokens, expected at most 400, what max_model_len and"
    with pytest.raises(TraceError, match=message):
        Simulator(CONFIG, Seconds()).replay(trace)
    for clients, end in ((None, 2.0), (1, 2.0)):
        run = Run(trace, tmp_path, skip_bad=True, clients=clients)
        assert run.outcomes() == [("0", "finished", 1.0), ("1", "rejected", None), ("2", "finished", end)]
        assert (run.summary["num_requests"], run.summary["num_rejected"]) == (3, 1)


def test_a_text_needs_a_tokenizer() -> None:
    trace = Trace.from_requests([TraceRequest(arrival_time=0, prompt="hello", output_len=1, id="x")])
    with pytest.raises(TraceError, match=r"trace: request 'x': prompt: found 'hello', expected a tokenizer"):
        Simulator(CONFIG, Seconds()).replay(trace)


def test_replicas_take_turns(tmp_path: Path) -> None:
    trace = trace_of((0, 4, 5), (0, 4, 1), (0, 4, 1), (2.5, 4, 1))
    run = Run(trace, tmp_path, replicas=2)
    assert [(r["id"], r["replica"], r["last_token_s"]) for r in run.results] == [
        ("2", 0, 1.0), ("1", 1, 1.0), ("3", 1, 3.5), ("0", 0, 5.0),
    ]  # fmt: skip
    assert [step["replica"] for step in run.steps] == [0, 1, 0, 0, 1, 0, 0]
    assert run.report.data["load"]["router"] == "round_robin"
    assert run.summary["kv"]["num_blocks"] == 200
    assert run.summary["kv"]["peak_blocks"] == 3


def test_the_least_loaded_replica_gets_the_next_request(tmp_path: Path) -> None:
    trace = trace_of((0, 4, 5), (0, 4, 1), (0.5, 4, 1), (1.5, 4, 1), (1.5, 4, 1))
    run = Run(trace, tmp_path, replicas=2, router="least_loaded")
    # The third comes while both have one; the fourth when the second replica has none left.
    assert sorted((r["id"], r["replica"]) for r in run.results) == [
        ("0", 0), ("1", 1), ("2", 0), ("3", 1), ("4", 1),
    ]  # fmt: skip


def test_a_request_goes_where_most_of_its_prompt_is_cached(tmp_path: Path) -> None:
    def request(time: float, hash_ids: list[int]) -> TraceRequest:
        return TraceRequest(
            arrival_time=time,
            prompt_len=8 * len(hash_ids),
            hash_ids=hash_ids,
            hash_block_size=8,
            output_len=1,
        )

    trace = Trace.from_requests(
        [
            request(0, [1, 2]),
            request(0, [3, 4]),
            request(2, [3, 5]),
            request(4, [3, 5, 6]),
            request(4, [1, 7]),
        ]
    )
    run = Run(trace, tmp_path, replicas=2, router="prefix_aware")
    assert sorted((r["id"], r["replica"], r["cached_tokens"]) for r in run.results) == [
        ("0", 0, 0), ("1", 1, 0), ("2", 1, 8), ("3", 1, 16), ("4", 0, 8),
    ]  # fmt: skip
    assert run.summary["cache"] == {
        "query_tokens": 88, "hit_tokens": 32, "hit_rate": 32 / 88, "evicted_tokens": 0,
    }  # fmt: skip


def test_equal_prompts_have_equal_answers_that_no_other_prompt_contains(tmp_path: Path) -> None:
    ids = [list(range(8)), list(range(8)), [*range(8), 8, 8, 8, 8]]
    trace = Trace.from_requests(
        TraceRequest(arrival_time=20 * number, prompt_token_ids=prompt, output_len=9)
        for number, prompt in enumerate(ids)
    )
    run = Run(trace, tmp_path)
    assert [r["cached_tokens"] for r in run.results] == [0, 4, 8]


WORKLOAD = Workload(
    num_requests=300, arrivals="poisson:3", prompt_len="lognormal:40,1", output_len="lognormal:20,0.7",
    num_system_prompts=3, system_prompt_len=16, turns="uniform:1,3", think_time_s="exponential:5", seed=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"clients": 7}, {"replicas": 3, "router": "prefix_aware", "timeout_s": 6}]
)
def test_a_replay_is_repeated_exactly(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, num_blocks=60, max_num_seqs=16)
    options = {"cost_model": Seconds(0.0625), "skip_bad": True} | options
    runs = [Run(synthesise(WORKLOAD), tmp_path, config, **options) for _ in range(2)]
    assert runs[0].steps == runs[1].steps
    assert runs[0].results == runs[1].results
    for run in runs:
        assert run.summary.pop("wall_s") > 0
    assert runs[0].report.to_json() == runs[1].report.to_json()
    summary = runs[0].summary
    assert len(runs[0].results) == summary["num_requests"] == 300
    assert summary["preemptions"]["requests"] > 0
    assert summary["num_rejected"] > 0


def test_only_the_next_arrival_is_read_ahead() -> None:
    arrived = ended = most_ahead = 0

    def requests() -> Iterator[TraceRequest]:
        nonlocal arrived, most_ahead
        for request in trace_of(*[(2.0 * number, 4, 1) for number in range(50)]):
            arrived += 1
            most_ahead = max(most_ahead, arrived - ended)
            yield request

    def progress(num_ended: int, now: float) -> None:
        nonlocal ended
        assert now == 2.0 * ended + 1
        ended = num_ended

    Simulator(CONFIG, Seconds(), progress=progress).replay(Trace(requests))
    assert (arrived, ended, most_ahead) == (50, 50, 2)


def test_the_examples_can_be_replayed() -> None:
    for path in sorted(EXAMPLES.glob("*conversation*")):
        trace = Trace.load(path)
        simulator = Simulator(
            EngineConfig(block_size=64, max_num_batched_tokens=8192),
            CostModel.roofline("h100-sxm", "llama-3.1-8b"),
        )
        summary = simulator.replay(trace).summary
        assert summary["num_finished"] == sum(1 for _ in trace)
        assert summary["prompt_tokens"] == sum(request.prompt_len or 0 for request in trace)
        assert summary["output_tokens"] == sum(request.output_len for request in trace)
        assert (summary["cache"]["hit_tokens"] > 0) == ("mooncake" in path.name)


class Failing(SchedulingPolicy):
    """Fails when it is asked."""

    def order(self, sequence: Sequence, stats: object) -> float:
        raise KeyError("oops")


def test_a_policy_that_fails_ends_the_replay() -> None:
    config = replace(CONFIG, policy="tests.sim.test_simulator:Failing")
    with pytest.raises(
        PolicyError, match=r"policy Failing: order\(\): KeyError: 'oops'; the replay ends here"
    ):
        Simulator(config, Seconds()).replay(trace_of((0, 4, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clients": 0}, "clients: found 0, expected a positive integer"),
        ({"replicas": True}, "replicas: found True, expected a positive integer"),
        ({"rate_factor": 0}, "rate_factor: found 0, expected a number above 0"),
        ({"timeout_s": -1}, "timeout_s: found -1, expected a number above 0"),
        (
            {"router": "best"},
            "router: found 'best', expected round_robin, least_loaded, prefix_aware, module:Class or "
            "path/file.py:Class",
        ),
        ({"slo": {"ttft": 1}}, "slo: found 'ttft', expected one of ttft_s, tpot_s, e2e_s, queue_s"),
        ({"results": "/"}, "results: /: Is a directory, expected a file to write to"),
        ({"config": EngineConfig()}, "num_blocks: found nothing, expected a number"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Simulator(**{"config": CONFIG, "cost_model": Seconds()} | options).replay(trace_of((0, 4, 1)))


def test_step_times_must_not_go_back() -> None:
    for seconds in (-1.0, float("nan")):
        with pytest.raises(
            ConfigError, match=r"cost_model: a constant: found .* seconds for a step, expected"
        ):
            Simulator(CONFIG, Seconds(seconds)).replay(trace_of((0, 4, 1)))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("name", ["results", "step_log"])
def test_a_disk_that_fills_is_an_error(name: str) -> None:
    config = replace(CONFIG, step_log="/dev/full" if name == "step_log" else None)
    simulator = Simulator(config, Seconds(), results="/dev/full" if name == "results" else None)
    with pytest.raises(ConfigError, match=rf"^{name}: /dev/full: No space left on device, expected a file"):
        simulator.replay(trace_of((0, 4, 1)))


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 5000, 5])
def test_what_cannot_be_a_path_is_refused_by_every_door(tmp_path: Path, path: Any) -> None:
    trace = trace_of((0, 4, 1))
    report = Simulator(CONFIG, Seconds()).replay(trace)
    doors: dict[str, Callable[[], Any]] = {
        "trace": lambda: Trace.load(path),
        "trace (saved)": lambda: trace.save(path),
        "profile": lambda: CostModel.load(path),
        "profile (written)": lambda: write_profile({}, path),
        "report": lambda: report.to_json(path),
        "report (page)": lambda: report.to_html(path),
        "report (loaded)": lambda: load_report(path),
        "results": lambda: Simulator(CONFIG, Seconds(), results=path).replay(trace),
        "perfetto": lambda: Simulator(CONFIG, Seconds(), perfetto=path).replay(trace),
    }
    for name, call in doors.items():
        with pytest.raises(PagellmError, match=rf"^{name.split()[0]}: found .{{1,100}}, expected a path"):
            call()


def test_with_a_window_a_long_request_runs_in_few_blocks(tmp_path: Path) -> None:
    config = replace(CONFIG, num_blocks=30, window=20, max_model_len=5000, watermark=0.0)
    run = Run(trace_of((0.0, 4000, 3)), tmp_path, config)
    assert run.outcomes() == [("0", "finished", 65.0)]
    assert max(step["blocks"]["used"] for step in run.steps) <= 5 + 1 + 16
    with pytest.raises(TraceError, match="4000 tokens, expected at most 120"):
        Run(trace_of((0.0, 4000, 3)), tmp_path, replace(config, window=None))


def test_a_window_is_the_model_s_where_step_times_are_those_of_a_model() -> None:
    model = Seconds()
    model.window, model.max_model_len = 16, 10_000
    filled = model.fill(EngineConfig(num_blocks=100))
    assert (filled.window, filled.max_model_len) == (16, 10_000)
    with pytest.raises(ConfigError, match="window: found 20, expected 16"):
        model.fill(EngineConfig(num_blocks=100, window=20))
