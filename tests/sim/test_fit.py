"""Constants fitted to recorded runs: what each format says, what is refused, and what is found again."""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine.errors import ConfigError, TraceError
from pagellm.sim import CostModel, TraceRequest, Workload, synthesise
from pagellm.sim.costs.constants import CLIENT_FRONTEND_S, CONSTANTS, SORT_S
from pagellm.sim.fit.fit import Fit, _solve, relative_errors, replayed
from pagellm.sim.fit.formats import load_run, load_runs
from pagellm.sim.fit.recorded_run import Experiment, Half, Served, experiment_of, figures, requests_of
from pagellm.sim.report.schema import load_report

NUM_REQUESTS = 40
SETTINGS = {"num_blocks": 400, "block_size": 16, "max_num_seqs": 8, "max_num_batched_tokens": 512}


@dataclass(frozen=True)
class One:
    """A request of the runs below, in microseconds of some clock."""

    begin: int
    prompt_len: int
    output_len: int
    first: int
    last: int


def ones(start: int = 1_700_000_000_000_000) -> list[One]:
    random, found = Random(1), []
    for _ in range(NUM_REQUESTS):
        start += random.randrange(1, 400_000)
        first = start + random.randrange(10_000, 900_000)
        count = random.randrange(2, 60)
        found.append(One(start, random.randrange(1, 3000), count, first, first + 20_000 * (count - 1)))
    return found


def jsonl(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def vllm_bench(all_: list[One]) -> str:
    gaps = [[0.02] * (one.output_len - 1) for one in all_]
    return json.dumps({
        "date": "20261128-000000", "model_id": "m", "request_throughput": 1.0,
        "start_times": [one.begin / 1e6 for one in all_], "input_lens": [one.prompt_len for one in all_],
        "output_lens": [one.output_len for one in all_], "itls": gaps,
        "ttfts": [(one.first - one.begin) / 1e6 for one in all_], "errors": ["" for _ in all_],
    })  # fmt: skip


def aiperf(all_: list[One]) -> str:
    return jsonl([
        {
            "metadata": {"request_start_ns": one.begin * 1000, "benchmark_phase": "profiling"},
            "metrics": {
                "time_to_first_token": {"value": (one.first - one.begin) / 1e3, "unit": "ms"},
                "request_latency": {"value": one.last - one.begin, "unit": "us"},
                "input_sequence_length": {"value": one.prompt_len, "unit": "tokens"},
                "output_sequence_length": {"value": one.output_len, "unit": "tokens"},
            },
            "error": None,
        }
        for one in all_
    ])  # fmt: skip


def guidellm(all_: list[One], old: bool = False) -> str:
    requests = []
    for one in all_:
        moments = [one.begin / 1e6, one.first / 1e6, one.last / 1e6]
        names = ["request_start", "first_token_iteration", "last_token_iteration"]
        request: dict[str, Any] = {"prompt_tokens": one.prompt_len, "output_tokens": one.output_len}
        if old:
            names = ["start_time", "first_token_time", "last_token_time"]
            request |= dict(zip(names, moments, strict=True))
        else:
            request["info"] = {"timings": dict(zip(names, moments, strict=True))}
        requests.append(request)
    half = len(requests) // 2
    return json.dumps({
        "metadata": {"version": 2},
        "benchmarks": [
            {"requests": {"successful": part, "errored": [], "incomplete": []}}
            for part in (requests[:half], requests[half:])
        ],
    })  # fmt: skip


def inference_perf(all_: list[One], version: int = 2) -> str:
    """version: 0 has all beside each other, 1 has the response apart, 2 the request too."""
    entries = []
    for one in all_:
        times = [(one.first + 20_000 * n) / 1e6 for n in range(one.output_len)]
        response = {"output_tokens": one.output_len, "output_token_times": times}
        request = {"input_tokens": one.prompt_len}
        info: dict[str, Any] = {"request_metrics": {"text": request}} if version == 2 else request
        info |= {"response_metrics": response} if version else response
        entries.append(
            {"start_time": one.begin / 1e6, "end_time": one.last / 1e6, "info": info, "error": None}
        )
    return json.dumps(entries)


def llmservingsim(all_: list[One]) -> str:
    offset = 1_699_999_000_000_000  # the engine's clock shows another time
    return jsonl([
        {
            "request_id": str(n), "input_toks": one.prompt_len, "output_toks": one.output_len,
            "arrival_time": one.begin / 1e6, "queued_ts": (one.begin - offset) / 1e6,
            "scheduled_ts": (one.begin - offset) / 1e6, "first_token_ts": (one.first - offset) / 1e6,
            "last_token_ts": (one.last - offset) / 1e6,
        }
        for n, one in enumerate(all_)
    ])  # fmt: skip


def trace_v2(all_: list[One]) -> str:
    columns = "request_id,prefix_group,prefix_length,streaming,input_tokens,output_tokens,model,"
    columns += (
        "server_input_tokens,arrival_time_us,send_time_us,first_chunk_time_us,last_chunk_time_us,status"
    )
    rows = [
        f"{n},,0,true,{one.prompt_len},{one.output_len},m,{one.prompt_len},{one.begin - 5},{one.begin},"
        f"{one.first},{one.last},ok"
        for n, one in enumerate(all_)
    ]
    return "\n".join([columns, *rows]) + "\n"


def plain(all_: list[One]) -> str:
    return jsonl([
        {"arrival_time": one.begin / 1e6, "prompt_len": one.prompt_len, "output_len": one.output_len,
         "first_token_s": one.first / 1e6, "last_token_s": one.last / 1e6}
        for one in all_
    ])  # fmt: skip


def results(all_: list[One]) -> str:
    return jsonl([
        {"id": str(n), "outcome": "finished", "replica": 0, "arrival_s": one.begin / 1e6,
         "first_scheduled_s": one.begin / 1e6, "first_token_s": one.first / 1e6,
         "last_token_s": one.last / 1e6, "prompt_tokens": one.prompt_len, "output_tokens": one.output_len}
        for n, one in enumerate(all_)
    ])  # fmt: skip


FORMATS: dict[str, Callable[[list[One]], str]] = {
    "vLLM bench serve": vllm_bench,
    "AIPerf": aiperf,
    "GuideLLM": guidellm,
    "GuideLLM, old": lambda all_: guidellm(all_, old=True),
    "GuideLLM, without a request's start": lambda all_: guidellm(all_).replace(
        "request_start", "resolve_start"
    ),
    "inference-perf": inference_perf,
    "inference-perf, old": lambda all_: inference_perf(all_, version=1),
    "inference-perf, older": lambda all_: inference_perf(all_, version=0),
    "LLMServingSim": llmservingsim,
    "BLIS TraceV2": trace_v2,
    "requests in seconds": plain,
    "results of a replay": results,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same_of_a_run(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text(FORMATS[name](ones()))
    run = load_run(path)
    assert run.format == name.partition(",")[0]
    assert (run.num_fitted, run.num_scored, run.num_left_out) == (20, 20, 0)
    [experiment] = run.experiments
    begin = ones()[0].begin
    assert [(one.prompt_len, one.output_len) for one in experiment.requests] == [
        (one.prompt_len, one.output_len) for one in ones()
    ]
    arrivals = [one.arrival_time for one in experiment.requests]
    assert arrivals == pytest.approx([(one.begin - begin) / 1e6 for one in ones()], abs=2e-6)
    later = ones()[20:]
    assert experiment.scored is not None
    measured = experiment.scored.measured
    assert measured["ttft"] == pytest.approx(sum(one.first - one.begin for one in later) / 20e6, rel=1e-5)
    assert measured["tpot"] == pytest.approx(0.02, rel=1e-4)
    assert measured["e2e"] == pytest.approx(sum(one.last - one.begin for one in later) / 20e6, rel=1e-5)
    seconds = (max(one.last for one in later) - later[0].begin) / 1e6
    assert measured["throughput"] == pytest.approx(sum(one.output_len for one in later) / seconds, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("LLMServingSim", {"requests.jsonl": llmservingsim}),
        ("LLMServingSim", {"vllm/requests.jsonl": llmservingsim}),
        ("AIPerf", {"profile_export.jsonl": aiperf}),
        ("GuideLLM", {"benchmarks.json": guidellm}),
        ("inference-perf", {"results/per_request_lifecycle_metrics.json": inference_perf}),
    ],
)
def test_a_directory_is_told_by_its_file(name: str, files: dict[str, Any], tmp_path: Path) -> None:
    for file, write in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(write(ones()))
    assert load_run(tmp_path).format == name


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_may_be_compressed_and_alone_in_a_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text('{"a": 1}')
    (tmp_path / "what-i-measured.json.gz").write_bytes(gzip.compress(FORMATS[name](ones()).encode()))
    run = load_run(tmp_path)
    assert (run.format, run.num_fitted) == (name.partition(",")[0], 20)
    (tmp_path / "what-i-measured.json.gz").write_bytes(gzip.compress(FORMATS[name](ones()).encode())[:-9])
    with pytest.raises(TraceError, match="cannot be read: Compressed file ended before the end-of-stream"):
        load_run(tmp_path / "what-i-measured.json.gz")
    with pytest.raises(TraceError, match="found a directory without a recorded run"):
        load_run(tmp_path)


def test_results_that_vllm_appended_are_runs_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("\n".join([vllm_bench(ones())] * 2))
    assert [run.num_fitted for run in load_runs(path)] == [20, 20]
    with pytest.raises(TraceError, match="found 2 runs"):
        load_run(path)


def failed(name: str) -> str:
    """A run whose first request has no output, and no reason."""
    if name == "vLLM bench serve":
        document = json.loads(vllm_bench(ones()))
        for key, value in {"output_lens": 0, "ttfts": 0.0, "itls": [], "start_times": 0.0}.items():
            document[key][0] = value
        return json.dumps(document)
    if name == "BLIS TraceV2":
        header, first, *rest = trace_v2(ones()).splitlines()
        cells = first.split(",")
        cells[5], cells[10:12] = "0", ["0", "0"]
        return "\n".join([header, ",".join(cells), *rest])
    document = json.loads(inference_perf(ones()) if name == "inference-perf" else guidellm(ones()))
    if name == "inference-perf":
        document[0]["info"]["response_metrics"] = {"output_tokens": 0, "output_token_times": []}
    else:
        one = document["benchmarks"][0]["requests"]["successful"][0]
        one |= {"output_tokens": 0, "info": {"timings": {"request_start": 1.0}}}
    return json.dumps(document)


@pytest.mark.parametrize("name", ["vLLM bench serve", "BLIS TraceV2", "inference-perf", "GuideLLM"])
def test_a_request_without_output_is_left_out(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text(failed(name))
    run = load_run(path)
    assert (run.format, run.num_left_out, run.num_fitted + run.num_scored) == (name, 1, 39)


def test_requests_that_come_together_are_halved_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text(plain([One(5, 3000 - n, 1 + n, 9 + n, 99 + n) for n in range(20)]))
    [experiment] = load_run(path).experiments
    assert [one.prompt_len for one in experiment.requests] == [3000 - n for n in range(20)]


def test_what_a_server_was_set_to_is_read_beside_its_requests(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(llmservingsim(ones()))
    (tmp_path / "meta.json").write_text(json.dumps({
        "schema_version": 1, "model": "meta-llama/Llama-3.1-8B",
        "engine_kwargs": {"tensor_parallel_size": 2, "max_num_seqs": 128, "max_num_batched_tokens": 2048,
                          "max_model_len": None},
        "kv_cache": {"num_gpu_blocks": 35913, "block_size": 16},
        "hardware": {"device_name": "NVIDIA RTX PRO 6000 Blackwell Server Edition"},
    }))  # fmt: skip
    for path in (tmp_path, tmp_path / "requests.jsonl", tmp_path / "meta.json"):
        run = load_run(path)
        assert (run.model, run.num_devices) == ("meta-llama/Llama-3.1-8B", 2)
        assert run.experiments[0].settings == {
            "max_num_seqs": 128, "max_num_batched_tokens": 2048, "num_blocks": 35913, "block_size": 16,
        }  # fmt: skip


def test_a_run_of_several_engines_is_no_run_of_one(tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(llmservingsim(ones()))
    (tmp_path / "meta.json").write_text('{"engine_kwargs": {"data_parallel_size": 2}}')
    with pytest.raises(
        TraceError, match=r"engine_kwargs.data_parallel_size: found 2, expected the requests of"
    ):
        load_run(tmp_path)


def without(text: str, name: str) -> str:
    """Records without a field, or a list without it."""
    return text.replace(f'"{name}"', '"something_else"')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (without(vllm_bench(ones()), "start_times"), "start_times: found nothing, expected a list with a va"),
        (without(vllm_bench(ones()), "itls"), "itls: found nothing, expected a list with a value a request"),
        (vllm_bench(ones()).replace('"output_lens": [', '"output_lens": [3, '), "found 40, 40, 41, 40, 40"),
        (without(aiperf(ones()), "request_start_ns"), "run:1: metadata.request_start_ns: found nothing, exp"),
        (without(aiperf(ones()), "time_to_first_token"), "metrics.time_to_first_token: found nothing, expec"),
        (without(aiperf(ones()), "output_sequence_length"), "metrics.output_sequence_length: found nothing"),
        (aiperf(ones()).replace('"ms"', '"fortnights"'), "unit: found 'fortnights', expected one of"),
        (without(guidellm(ones()), "request_start"), "info.timings.request_start: found nothing, expected a"),
        (without(guidellm(ones()), "output_tokens"), "output_tokens: found nothing, expected a positive int"),
        (without(inference_perf(ones()), "output_token_times"), "output_token_times: found nothing, expecte"),
        (without(inference_perf(ones()), "input_tokens"), "input_tokens: found nothing, expected a number o"),
        (without(inference_perf(ones()), "start_time"), r"\[0\].start_time: found nothing, expected a time"),
        (without(llmservingsim(ones()), "queued_ts"), "run:1: queued_ts: found nothing, expected a time"),
        (without(plain(ones()), "arrival_time"), "run:1: arrival_time: found nothing, expected a time"),
        (trace_v2(ones()).replace("first_chunk_time_us", "x"), "first_chunk_time_us: found nothing, expecte"),
        (trace_v2(ones()) + "x" * 2**18, "run: found field larger than field limit .*, expected comma-separ"),
        (plain(ones()[:15]), "found 15 requests that were served, expected 16 or more"),
        (plain([One(5, 3, 2, 4, 9)] * 16), "run:1: found the first token 1e-06 s before the request"),
        (plain([One(5, 3, 2, 8, 7)] * 16), "run:1: found the last token 1e-06 s before the first"),
        ('{"successes": {}, "load_summary": {}}', "found the summary of a stage, expected its requests: inf"),
        ('{"summary": {}, "timeline": {}}', "found a report, expected its requests: replay --real --results"),
        ("time,latency\n1,2\n", "found 'time,latency', expected a recorded run: vLLM's bench serve"),
        ('{"a": 1}\n{"a": 2}\n', "found {'a': 1}, expected a recorded run"),
        ("[1]", r"\[0\]: found 1, expected an object with named fields"),
        ("", "found '', expected a recorded run"),
        (json.dumps({"benchmarks": [{"requests": {"successful": []},
                                     "metrics": {"request_totals": {"successful": 9}}}]}),
         "found 0 of 9 requests that were served, expected all of them"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_carry_enough_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        load_run(path)


def test_requests_that_failed_or_warmed_up_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "run"
    lines = aiperf(ones()).splitlines()
    lines[0] = lines[0].replace("profiling", "warmup")
    lines[1] = lines[1].replace('"error": null', '"error": {"code": 500}')
    path.write_text("\n".join(lines))
    assert (load_run(path).num_left_out, len(load_run(path).experiments[0].requests)) == (2, 38)
    path.write_text(vllm_bench(ones()).replace('"errors": [""', '"errors": ["timed out"'))
    assert load_run(path).num_left_out == 1


def test_prompts_that_share_a_prefix_share_its_tokens(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_text(trace_v2(ones()).replace(",,0,true,", ",a,100,true,", 2))
    first, second, third = load_run(path).experiments[0].requests[:3]
    assert first.prompt_token_ids is not None
    assert second.prompt_token_ids is not None
    shared = [a == b for a, b in zip(first.prompt_token_ids, second.prompt_token_ids, strict=False)]
    assert shared == [True] * 100 + [False] * (len(shared) - 100)
    assert third.prompt_token_ids is None


def test_a_step_log_is_a_run_of_our_own_engine(tmp_path: Path) -> None:
    served = [Served(0.5 * n, 30 + n, 5 + n, 0.0, 0.0) for n in range(20)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text(jsonl([one.to_dict() for one in requests_of(served)]))
    log, lines = tmp_path / "log.jsonl", tmp_path / "results.jsonl"
    command = ["replay", str(trace), "--roofline", "l4,smollm2-135m", "--num-blocks", "99"]
    command += ["--budget", "stall_free", "--eviction", "pagellm.engine.scheduling.policies:EvictionPolicy"]
    assert main([*command, "--step-log", str(log), "--results", str(lines)]) == 0
    [by_steps], [by_results] = load_run(log).experiments, load_run(lines).experiments
    assert by_steps.settings["num_blocks"] == 99
    assert by_steps.settings["budget"] == "stall_free"
    assert "eviction" not in by_steps.settings, "which is a user's, for all that is known"
    for a, b in ((by_steps.fitted, by_results.fitted), (by_steps.scored, by_results.scored)):
        assert a is not None
        assert b is not None
        assert a.measured == pytest.approx(b.measured)


def test_figures_are_what_they_are_called() -> None:
    served = [Served(0, 1, 3, 1.0, 2.0), Served(1, 1, 1, 4.0, 4.0)]
    found = figures(served)
    assert found["throughput"] == 4 / 4
    assert (found["ttft"], found["tpot"], found["e2e"]) == (2.0, 0.5, 2.5)
    assert (found["ttft_p50"], found["e2e_p50"]) == (2.0, 2.5)
    half = Half([0], {"ttft": 2.0, "e2e": 1.0, "unheard": 1.0})
    assert relative_errors(served, half) == {"ttft": -0.5, "e2e": 1.0}


def test_the_damped_step_is_that_of_least_squares() -> None:
    # x + 2 y = 5 and 3 x = 3 have one solution; a column of nothing moves nothing.
    step = _solve([[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]], [-5.0, -3.0], 0.0)
    assert step == pytest.approx([1.0, 2.0, 0.0])


TRUE = {"product_flops": 0.6, "product_bytes": 0.6, "decode_bytes": 0.7, "step_overhead_s": 2e-3}


def busy_run() -> list[Served]:
    """What a server of these constants does with more requests than it can take at once."""
    random, now, asked = Random(3), 0.0, []
    for _ in range(60):
        asked.append(Served(now, random.randrange(20, 1500), random.randrange(2, 80), 0.0, 0.0))
        now += random.expovariate(6)
    requests: list[TraceRequest] = requests_of(asked)
    costs = CostModel.roofline("l4", "qwen2.5-0.5b", **TRUE)
    return replayed(Experiment("run", requests, None, None, SETTINGS), costs)


def as_ones(served: list[Served]) -> list[One]:
    return [
        One(*(round(1e6 * x) if isinstance(x, float) else x for x in one[:1]), one[1], one[2],
            round(1e6 * one.first_token_s), round(1e6 * one.last_token_s))
        for one in served
    ]  # fmt: skip


def test_what_a_run_followed_from_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(plain(as_ones(busy_run())))
    fit = Fit(load_run(path), "l4", "qwen2.5-0.5b", settings=SETTINGS)
    assert fit.constants == tuple(TRUE)
    costs = fit.search()
    assert (costs.error["num_fitted"], costs.error["num_scored"]) == (30, 30)
    before = fit.score({})
    assert min(abs(before[name]) for name in ("ttft", "tpot", "e2e")) > 0.25  # type: ignore[literal-required]
    for name, most in (("throughput", 0.01), ("ttft", 0.05), ("tpot", 0.01), ("e2e", 0.01)):
        assert abs(costs.error[name]) < most  # type: ignore[literal-required]


def test_constants_that_are_far_away_are_found_too(tmp_path: Path) -> None:
    # Of a processor of which a few cores serve, where 96 are assumed.
    true = {"product_flops": 0.02, "product_bytes": 0.06, "decode_bytes": 0.05, "step_overhead_s": 1e-3}
    asked = [one._replace(arrival_s=8 * one.arrival_s, prompt_len=one.prompt_len // 2) for one in busy_run()]
    experiment = Experiment("run", requests_of(asked), None, None, SETTINGS)
    path = tmp_path / "run.jsonl"
    path.write_text(
        plain(as_ones(replayed(experiment, CostModel.roofline("epyc-9654", "smollm2-135m", **true))))
    )
    fit = Fit(load_run(path), "epyc-9654", "smollm2-135m", settings=SETTINGS)
    before, error = fit.score({}), fit.search().error
    for name in ("ttft", "tpot", "e2e"):
        assert abs(before[name]) > 0.8  # type: ignore[literal-required]
        assert abs(error[name]) < 0.03  # type: ignore[literal-required]


def test_the_front_end_is_fitted_where_a_client_took_the_times(tmp_path: Path) -> None:
    late = [
        one._replace(first_token_s=one.first_token_s + 0.03, last_token_s=one.last_token_s + 0.03)
        for one in busy_run()
    ]
    path = tmp_path / "run.csv"
    path.write_text(trace_v2(as_ones(late)))
    fit = Fit(
        load_run(path), "l4", "qwen2.5-0.5b", settings=SETTINGS,
        constants=["frontend_s", "step_overhead_s"],
        given={name: value for name, value in TRUE.items() if name != "step_overhead_s"},
    )  # fmt: skip
    constants = fit.search().constants
    assert constants["frontend_s"] == pytest.approx(0.03, rel=0.1)
    assert "frontend_s" in Fit(load_run(path), "l4", "qwen2.5-0.5b").constants


def test_what_a_run_says_of_its_server_is_assumed_where_nothing_is_given(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    path.write_text(stages(2, 3))
    fit = Fit(load_run(path), "l4", "qwen2.5-0.5b")
    first = fit.replay(load_run(path).experiments[0], {})[-1]
    known = {"frontend_s": CLIENT_FRONTEND_S, "sort_s": SORT_S}
    other = Fit(load_run(path), "l4", "qwen2.5-0.5b", given=known).replay(load_run(path).experiments[0], {})[
        -1
    ]
    assert first == other
    none = Fit(load_run(path), "l4", "qwen2.5-0.5b", given=dict.fromkeys(known, 0.0))
    assert none.replay(load_run(path).experiments[0], {})[-1].last_token_s < first.last_token_s
    path.write_text(results(ones()))
    assert load_run(path).constants == {"steps_ahead": 0}


def test_prompts_whose_texts_are_known_share_what_these_do(tmp_path: Path) -> None:
    path, document = tmp_path / "run.json", json.loads(inference_perf(ones()))
    system, length = "You are kind. " * 40, 1000
    for index, entry in enumerate(document):
        text = (system + f"{index % 3}? " * 200)[:length]
        entry["request"] = json.dumps({"prompt": text, "max_tokens": 9})
        entry["info"]["request_metrics"]["text"]["input_tokens"] = 250
    path.write_text(json.dumps(document))
    run = load_run(path)
    assert run.samples_as_model
    prompts = [tuple(one.prompt_token_ids or ()) for one in run.experiments[0].requests]
    assert {len(prompt) for prompt in prompts} == {250}
    assert len(set(prompts)) == 3
    # Of 1,000 characters and 250 tokens, 560 are of the system's prompt.
    shared = sum(a == b for a, b in zip(prompts[0], prompts[1], strict=True))
    assert shared == pytest.approx(560 / 4, abs=2)
    document[0]["request"] = json.dumps({"messages": [{"role": "user", "content": "x"}], "temperature": 0})
    path.write_text(json.dumps(document))
    assert not load_run(path).samples_as_model
    del document[0]["request"]
    path.write_text(json.dumps(document))
    assert load_run(path).experiments[0].requests[0].prompt_token_ids is None


@pytest.mark.parametrize("names", [("trace.csv", "trace.yaml"), ("trace_data.csv", "trace_header.yaml")])
def test_the_header_of_a_trace_says_what_served(names: tuple[str, str], tmp_path: Path) -> None:
    data, header = (tmp_path / name for name in names)
    data.write_text(trace_v2(ones()).replace(",m,", ",,"))
    header.write_text(
        "trace_version: 2\ntime_unit: microseconds\nmode: real\nwarm_up_requests: 4\nserver:\n"
        '  type: vllm\n  model: "Qwen/Qwen3-8B"\n  tensor_parallel: 2\n  max_num_seqs: 64 # at most\n'
        "  block_size: 16\nnetwork:\n  measured_rtt_ms: 0.5\n"
    )
    for path in (data, tmp_path):
        run = load_run(path)
        assert (run.model, run.num_devices, run.num_left_out) == ("Qwen/Qwen3-8B", 2, 4)
        assert run.experiments[0].settings == {"max_num_seqs": 64, "block_size": 16}
    for line, message in (
        ("time_unit: fortnights", "time_unit: found 'fortnights', expected 'microseconds'"),
        ("block_size: many", "block_size: found 'many', expected a positive integer"),
        ("warm_up_requests: -1", "warm_up_requests: found -1, expected a"),
    ):
        header.write_text(f"{line}\n")
        with pytest.raises(TraceError, match=re.escape(f"{header}: {message}")):
            load_run(data)


def test_clients_that_wait_for_their_answers_are_replayed_as_such(tmp_path: Path) -> None:
    path, document = tmp_path / "run.json", json.loads(vllm_bench(ones()))
    closed = document | {"max_concurrency": 3, "request_rate": "inf"}
    for values, clients in ((closed, 3), (closed | {"request_rate": 4.0}, None), (document, None)):
        path.write_text(json.dumps(values))
        assert load_run(path).experiments[0].clients == clients
    path.write_text(json.dumps(closed))
    [experiment] = load_run(path).experiments
    served = Fit(load_run(path), "l4", "qwen2.5-0.5b", given={"frontend_s": 0.0}).replay(experiment, {})
    assert [one.prompt_len for one in served] == [one.prompt_len for one in ones()]
    # Three begin at once, and each of the others when one has ended.
    ends = sorted(one.last_token_s for one in served)
    assert [one.arrival_s for one in served] == [0.0] * 3 + ends[:-3]


def test_a_few_requests_to_which_something_else_happened_move_nothing(tmp_path: Path) -> None:
    served = busy_run()
    spoilt = [
        one._replace(first_token_s=one.first_token_s + 40.0, last_token_s=one.last_token_s + 40.0)
        if index in (3, 17)
        else one
        for index, one in enumerate(served)
    ]
    path, found = tmp_path / "run.jsonl", []
    for run in (served, spoilt):
        path.write_text(plain(as_ones(run)))
        fit = Fit(
            load_run(path), "l4", "qwen2.5-0.5b", settings=SETTINGS,
            constants=["product_flops", "step_overhead_s"],
            given={name: TRUE[name] for name in ("product_bytes", "decode_bytes")},
        )  # fmt: skip
        found.append(fit.search())
    for name in ("product_flops", "step_overhead_s"):
        assert found[1].constants[name] == pytest.approx(found[0].constants[name], rel=0.1)
    assert found[1].constants["product_bytes"] == 0.6


@pytest.mark.parametrize(
    ("constants", "given", "message"),
    [
        (["product_flops"], {}, "found product_flops, expected 2 to 6 different ones"),
        (["product_flops"] * 2, {}, "found product_flops, product_flops, expected 2 to 6 different ones"),
        (list(CONSTANTS)[:7], {}, "expected 2 to 6 different ones"),
        (["product_flops", "speed"], {}, "constants: found 'speed', expected some of product_flops"),
        (["product_flops", "steps_ahead"], {}, "found 'steps_ahead', expected some of product_flops"),
        (
            ["product_flops", "head_flops"],
            {"head_flops": 0.5},
            "found head_flops, which is given, expected o",
        ),
    ],
)
def test_constants_that_cannot_be_fitted_are_refused(
    constants: list[str], given: dict[str, float | str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    path.write_text(plain(ones()))
    with pytest.raises(ConfigError, match=message):
        Fit(load_run(path), "l4", "qwen2.5-0.5b", constants=constants, given=given)


def stages(*rates: float) -> str:
    return json.dumps([
        {
            "experiment": "7", "stage": str(n), "max_num_seqs": 128, "num_blocks": 5000,
            "system_prompts": 3, "system_len": 32, "question_len": 60, "output_len": 21,
            "request_rate_per_s": rate, "model": "Qwen/Qwen2.5-0.5B", "hardware": "L4", "tp": 1,
            "max_num_batched_tokens": 2048,
            "measured_ms": {"e2e_mean": 230.0, "ttft_mean": 30.0, "ttft_p99": 50.0, "itl_mean": 10.9},
            "predicted_ms": {"other": {"e2e_mean": 120.0, "ttft_mean": 20.0, "itl_mean": 5.0}},
        }
        for n, rate in enumerate(rates)
    ])  # fmt: skip


def test_stages_have_their_last_one_score(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    path.write_text(stages(2, 3))
    run = load_run(path)
    first, last = run.experiments
    assert (first.scored, last.fitted) == (None, None)
    assert last.scored is not None
    assert last.scored.measured == {"ttft": 0.03, "ttft_p99": 0.05, "e2e": 0.23, "tpot": pytest.approx(0.01)}
    assert last.published == {"other": {"ttft": 0.02, "e2e": 0.12, "tpot": pytest.approx(0.005)}}
    rate = len(last.requests) / last.requests[-1].arrival_time
    assert rate == pytest.approx(3, rel=0.15)
    begins, prompts = (
        {tuple(one.prompt_token_ids or ())[:size] for one in last.requests} for size in (32, 99)
    )
    assert (len(begins), last.requests[0].prompt_len, last.requests[0].output_len) == (3, 92, 21)
    # Of each of three prompts five users, who ask the same again; each has done so once before it counts.
    assert len(prompts) == 15
    assert {tuple(one.prompt_token_ids or ()) for one in last.requests[:15]} == prompts
    assert list(last.scored.positions) == list(range(15, len(last.requests)))
    path.write_text(stages(2, 3).replace('"output_len"', '"users_per_system_prompt": 2, "output_len"'))
    assert len({tuple(one.prompt_token_ids or ()) for one in load_run(path).experiments[0].requests}) == 6
    path.write_text(stages(2))
    with pytest.raises(ConfigError, match="found one stage, expected two or more: one is to be scored"):
        Fit(load_run(path), "l4", "qwen2.5-0.5b").search()
    path.write_text(json.dumps([*json.loads(stages(2)), json.loads(stages(2))[0] | {"experiment": "8"}]))
    assert len(load_runs(path)) == 2
    with pytest.raises(
        TraceError, match="found 2 runs, experiment 7, stage 0, experiment 8, stage 0, expected"
    ):
        load_run(path)


def test_the_command_writes_costs_whose_error_every_report_repeats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, costs = tmp_path / "run.jsonl", tmp_path / "costs.json"
    run.write_text(plain(as_ones(busy_run())))
    settings = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = ["fit", str(run), "--roofline", "l4,qwen2.5-0.5b", "-o", str(costs), *settings]
    assert main([*command, "--constants", "product_bytes,step_overhead_s", "--json"]) == 0
    said, written = json.loads(capsys.readouterr().out), json.loads(costs.read_text())
    assert said == {"output": str(costs), "format": "requests in seconds"} | written
    assert set(written["constants"]) == {"product_bytes", "step_overhead_s"}

    trace, page = tmp_path / "trace.jsonl", tmp_path / "page.html"
    trace.write_text(jsonl([one.to_dict() for one in requests_of(busy_run())[:5]]))
    estimate = ["--roofline", "l4,qwen2.5-0.5b", "--costs", str(costs)]
    report = tmp_path / "report.json"
    assert main(["replay", str(trace), *estimate, "-o", str(report), "--report", str(page)]) == 0
    text = capsys.readouterr().out
    ttft, tpot = (f"{100 * written['fit'][name]:+.1f} %" for name in ("ttft", "tpot"))
    assert "fitted to 30 requests of run.jsonl; error on the" in text
    assert f"TTFT {ttft}, TPOT {tpot}" in text
    assert load_report(report).fit == written["fit"]
    origins = {row["name"]: row["origin"] for row in load_report(report).data["constants"]}
    assert (origins["product_bytes"], origins["product_flops"]) == ("fitted", "assumed")
    assert json.dumps(written["fit"]["run"])[1:-1] in page.read_text()

    sweep = ["sweep", str(trace), *estimate, "--set", "max_num_seqs=4,8", "--jobs", "1"]
    assert main(sweep) == 0
    assert f"TTFT {ttft}, TPOT {tpot}" in capsys.readouterr().out
    assert main([*sweep, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"] == written["fit"]

    busy = tmp_path / "busy.jsonl"
    synthesise(Workload(num_requests=400, arrivals="poisson:4", output_len="fixed:20")).save(busy)
    capacity = ["capacity", str(busy), *estimate, "--slo", "ttft=10", "--rate", "4", "--seeds", "1"]
    policy = Path(__file__).parents[2] / "examples" / "policies" / "lru.py"
    for command in ([*capacity, "--jobs", "1"], ["lab", str(policy), "--trace", str(trace), *estimate]):
        assert main(command) == 0
        assert f"TTFT {ttft}, TPOT {tpot}" in capsys.readouterr().out
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["fit"] == written["fit"]

    assert main(["replay", str(trace), *estimate, "--set-cost", "product_bytes=0.5", "--json"]) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert model.endswith("roofline of 2 fitted constants, with product_bytes=0.5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "costs.json: format: found 'other', expected 'pagellm-costs'"),
        ({"version": 2}, "costs.json: version: found 2, expected 1"),
        ({"constants": {"speed": 1}}, "costs.json: constants: roofline: found 'speed', expected one of wei"),
        (
            {"constants": {"product_bytes": 2}},
            "product_bytes: found 2, expected a number above 0 and up to 1",
        ),
        ({"fit": {}}, "costs.json: fit.run: found nothing, expected a string"),
    ],
)
def test_costs_that_are_none_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    costs = {
        "format": "pagellm-costs", "version": 1, "hardware": "l4", "model": "qwen2.5-0.5b", "num_devices": 1,
        "constants": {"product_bytes": 0.5},
        "fit": {"run": "r", "num_fitted": 8, "num_scored": 8, "ttft": -0.1},
    }  # fmt: skip
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(costs))
    assert CostModel.roofline("l4", "qwen2.5-0.5b", costs=path).fit == {
        "run": "r", "num_fitted": 8, "num_scored": 8,
        "throughput": None, "ttft": -0.1, "tpot": None, "e2e": None,
    }  # fmt: skip
    path.write_text(json.dumps(costs | change))
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline("l4", "qwen2.5-0.5b", costs=path)


def test_costs_want_an_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(jsonl([one.to_dict() for one in requests_of(busy_run())[:2]]))
    assert main(["replay", str(trace), "--profile", "p.json", "--costs", "c.json"]) == 2
    assert "costs: found c.json without --roofline, expected none" in capsys.readouterr().err
    assert main(["replay", str(trace), "--roofline", "l4,qwen2.5-0.5b", "--costs", str(tmp_path / "no")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_halved_run_begins_at_zero() -> None:
    served = [Served(100.0 + n, 5, 2, 101.0 + n, 102.0 + n) for n in reversed(range(16))]
    experiment = experiment_of("run", served)
    assert [one.arrival_time for one in experiment.requests] == list(range(16))
    assert experiment.fitted is not None
    assert experiment.fitted.measured["ttft"] == 1.0
