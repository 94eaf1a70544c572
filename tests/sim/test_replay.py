"""The command `replay`: simulated, for real, compared; and what the real engine reports of a trace."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import ConfigError, EngineConfig, LLMEngine, TraceError
from pagellm.engine.step_log import StepRecorder
from pagellm.sim import CostModel, Simulator, Trace, TraceRequest
from pagellm.sim.real_replay import replay_for_real
from tests.conftest import model_path
from tests.sim.test_cost_profile import PROFILE

TINY = str(model_path("llama_gqa"))
REQUESTS = [
    TraceRequest(
        arrival_time=0.02 * number,
        prompt_len=20,
        output_len=10,
        hash_ids=(number % 2, number),
        hash_block_size=16,
    )
    for number in range(8)
]
ROOFLINE = ("--roofline", "l4,smollm2-135m")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[LLMEngine]:
    config = EngineConfig(
        block_size=4, num_blocks=30, preemption="swap", step_log=str(tmp_path / "steps.jsonl")
    )
    engine = LLMEngine(TINY, config)
    yield engine
    engine.close()


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "trace.jsonl"
    Trace.from_requests(REQUESTS).save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["replay", *arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def test_the_real_engine_serves_every_request_of_a_trace_and_counts_it(
    engine: LLMEngine, tmp_path: Path
) -> None:
    report = replay_for_real(engine, Trace.from_requests(REQUESTS), model="tiny", slo={"ttft_s": 60.0})
    summary = report.summary
    assert (summary["num_requests"], summary["num_finished"]) == (8, 8)
    assert (summary["prompt_tokens"], summary["output_tokens"]) == (160, 80)
    assert summary["goodput"]["share"] == 1.0
    assert summary["duration_s"] >= 0.02 * 7
    records = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert summary["num_steps"] == len(records)
    assert summary["kv"]["peak_blocks"] >= max(record["blocks"]["used"] for record in records)
    assert summary["cache"]["hit_tokens"] == records[-1]["cache"]["hits"] > 0
    arrivals = [added["arrival_s"] for record in records for added in record["added"]]
    assert arrivals == [request.arrival_time for request in REQUESTS], "the engine's clock is the trace's"
    assert [type(listener) for listener in engine.loop.listeners] == [StepRecorder]
    assert not engine.has_unfinished


def test_a_request_that_can_never_be_served_ends_a_real_replay_and_leaves_nothing_behind(
    engine: LLMEngine,
) -> None:
    requests = [REQUESTS[0], TraceRequest(arrival_time=0.01, prompt_len=1000, output_len=1, id="huge")]
    with pytest.raises(
        TraceError, match=r"request 'huge': prompt: found 1000 tokens, expected at most .*--skip-bad"
    ):
        replay_for_real(engine, Trace.from_requests(requests), model="tiny")
    assert not engine.has_unfinished
    report = replay_for_real(engine, Trace.from_requests(requests), model="tiny", skip_bad=True)
    assert (report.summary["num_finished"], report.summary["num_rejected"]) == (1, 1)


@pytest.mark.parametrize("step", [1, 9, 13])
def test_an_interrupted_real_replay_leaves_nothing_behind(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also where the collector of metrics has heard of ends that the outputs do not have yet."""
    give_out, calls = engine._outputs, iter(range(10**9))

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == step:
            raise KeyboardInterrupt
        return give_out(*arguments)

    monkeypatch.setattr(engine, "_outputs", interrupted)
    trace = Trace.from_requests([replace(request, arrival_time=0.0) for request in REQUESTS])
    with pytest.raises(KeyboardInterrupt):
        replay_for_real(engine, trace, model="tiny")
    assert not engine.has_unfinished
    assert engine.block_manager.num_free_blocks == 30
    engine.scheduler.check()
    assert replay_for_real(engine, trace, model="tiny").summary["num_finished"] == 8


def test_a_simulated_replay_reports_in_every_form(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    page, perfetto, output, results = (tmp_path / name for name in ("r.html", "p.json", "r.json", "r.jsonl"))
    report = run(
        capsys, trace, *ROOFLINE, "--num-blocks", "64", "--report", str(page), "--perfetto", str(perfetto),
        "--results", str(results), "-o", str(output), "--policy", "shortest_job", "--slo", "ttft=1,tpot=1",
    )  # fmt: skip
    assert report["summary"]["num_finished"] == 8
    assert report["config"]["policy"] == "shortest_job"
    assert report["summary"]["goodput"]["slo"] == {"ttft_s": 1.0, "tpot_s": 1.0}
    assert json.loads(output.read_text()) == report
    assert len(results.read_text().splitlines()) == 8
    assert "</html>" in page.read_text()
    assert json.loads(perfetto.read_text())["traceEvents"]


def test_a_report_of_a_run_without_the_prefix_cache_can_be_compared(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "report.json")
    run(capsys, trace, *ROOFLINE, "--num-blocks", "64", "--no-prefix-caching", "-o", path)
    assert main(["replay", "--compare", path, path]) == 0


def test_several_reports_are_compared_with_the_first(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    paths = [str(tmp_path / f"{policy}.json") for policy in ("fcfs", "fair", "slo")]
    for path in paths:
        settings = ("--num-blocks", "64", "--policy", Path(path).stem)
        run(capsys, trace, *ROOFLINE, *settings, "-o", path)
    page = tmp_path / "page.html"
    assert main(["replay", "--compare", *paths, "--report", str(page)]) == 0
    assert capsys.readouterr().out.count("b is") == 2
    assert '"policy":"slo"' in page.read_text()
    assert main(["replay", "--compare", *paths, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["a"] for line in lines] == [lines[0]["a"]] * 2


@pytest.mark.parametrize("source", [ROOFLINE, ("--real", "--model", TINY)], ids=["simulated", "real"])
def test_what_was_left_out_is_said_wherever_the_replay_is_shown(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, source: tuple[str, ...]
) -> None:
    with open(trace, "a") as file:
        file.write("oops\n")
    arguments = [trace, *source, "--num-blocks", "64"]
    assert main(["replay", *arguments]) == 2
    assert "trace.jsonl:9: column 1: found 'oops', expected JSON" in capsys.readouterr().err
    output, page = tmp_path / "report.json", tmp_path / "page.html"
    arguments += ["--skip-bad", "-o", str(output), "--report", str(page)]
    assert main(["replay", *arguments]) == 0
    out, err = capsys.readouterr()
    assert "\nleft out      1 bad records, 0 without a request\n" in out
    assert "line 9: column 1: found 'oops', expected JSON" in err
    report = json.loads(output.read_text())
    assert (report["summary"]["num_requests"], report["summary"]["num_skipped"]) == (8, 1)
    [record] = report["skipped"]
    assert (record["line"], record["message"][:8]) == (9, "column 1")
    assert '"num_skipped":1' in page.read_text()


@pytest.mark.parametrize(
    ("slo", "message"),
    [
        ("speed=1", "found 'speed', expected one of ttft, tpot, e2e, queue"),
        ("ttft_p99=1", "found 'ttft_p99', .*; limits on statistics .* are for `sweep`"),
        ("ttft", "ttft: found '', expected seconds"),
        ("ttft=1,tpot=fast", "tpot: found 'fast', expected seconds"),
    ],
)
def test_a_bad_slo_is_named(capsys: pytest.CaptureFixture[str], trace: str, slo: str, message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["replay", trace, *ROOFLINE, "--num-blocks", "64", "--slo", slo])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt2"), "--model: found 'gpt2', expected the profile's, 'tiny'"),
        (("--quantization", "int4"), "quantization: found 'int4', expected 'int8', as in the profile"),
        (("--num-threads", "1"), "num_threads: found 1, expected 2, as in the profile"),
        (("--model", "tiny", "--quantization", "int8", "--num-threads", "2"), ""),
    ],
)
@pytest.mark.filterwarnings("ignore:.*asked for")
def test_a_profile_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE))
    status = main(["replay", trace, "--profile", str(path), "--num-blocks", "64", *arguments])
    assert (status, message in capsys.readouterr().err) == (2 if message else 0, True)


POOR = {"mean_error": 0.54, "p90_error": 1.25, "mean_signed_error": -0.5, "num_steps": 60}
SHOWN = "off by 54.0 % on average, 9 of 10 within 125.0 %; too short by 50.0 %"


@pytest.mark.filterwarnings("ignore:.*asked for")
def test_a_poor_profile_has_to_be_accepted_and_every_report_says_how_poor_it_is(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    profile, report, page = tmp_path / "profile.json", tmp_path / "r.json", tmp_path / "r.html"
    profile.write_text(json.dumps(PROFILE | {"fit": POOR, "num_blocks": 64, "max_model_len": 100}))
    for command in (["replay"], ["sweep", "--jobs", "1"]):
        assert main([*command, trace, "--profile", str(profile)]) == 2
        error = capsys.readouterr().err
        assert f"profile: {profile}: found a mean error of 54% in the step times of tiny, int8" in error
        assert "expected at most 25%: calibrate again" in error
        assert "--accept-profile-error" in error
    accept = ("--profile", str(profile), "--accept-profile-error")

    assert main(["replay", trace, *accept, "-o", str(report), "--report", str(page)]) == 0
    assert f"\nstep times    {SHOWN}\n" in capsys.readouterr().out
    error = {"mean": 0.54, "p90": 1.25, "mean_signed": -0.5, "num_steps": 60}
    assert json.loads(report.read_text())["profile_error"] == error
    assert '"profile_error":{"mean":0.54,' in page.read_text()
    assert main(["replay", "--compare", str(report), str(report)]) == 0
    assert f"\nb: step times {SHOWN}\n" in capsys.readouterr().out

    assert main(["sweep", trace, *accept, "--jobs", "1", "--report", str(page)]) == 0
    assert f"\nstep times: {SHOWN}\n" in capsys.readouterr().out
    assert '"profile_error":{"mean":0.54,' in page.read_text()
    assert main(["sweep", trace, *accept, "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile_error"] == error

    policy = Path(__file__).parents[2] / "examples" / "policies" / "lru.py"
    lab = ["lab", str(policy), "--trace", trace, "--profile", str(profile)]
    assert main(lab) == 2
    assert "--accept-profile-error" in capsys.readouterr().err
    assert main([*lab, "--accept-profile-error"]) == 0
    assert capsys.readouterr().out.startswith(f"step times: {SHOWN}\n")
    assert main([*lab, "--accept-profile-error", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["profile_error"] == error


@pytest.mark.parametrize("name", ["", "missing/file"])
@pytest.mark.parametrize(
    "command",
    [
        ["replay", "TRACE", "--roofline", "l4,smollm2-135m", "-o"],
        ["replay", "TRACE", "--roofline", "l4,smollm2-135m", "--report"],
        ["sweep", "TRACE", "--roofline", "l4,smollm2-135m", "--report"],
        ["lab", "lru.py", "--trace", "TRACE", "--roofline", "l4,smollm2-135m", "--report"],
        ["fit", "TRACE", "--roofline", "l4,smollm2-135m", "-o"],
    ],
)
def test_a_result_that_could_not_be_written_is_an_error_before_the_work(
    command: list[str], name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The trace, which is not there, is not looked for first."""
    assert main([*command, str(tmp_path / name)]) == 2
    assert re.search("expected a file to write|cannot be written: No such file", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:.*asked for")
def test_a_good_profile_is_used_as_it_is(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(PROFILE | {"fit": POOR | {"mean_error": 0.25}, "num_blocks": 64}))
    assert run(capsys, trace, "--profile", str(path))["profile_error"]["mean"] == 0.25
    with pytest.raises(ConfigError, match="accept_profile_error: found 1, expected True or False"):
        Simulator(EngineConfig(), CostModel.load(path), accept_profile_error=1)  # type: ignore[arg-type]


def test_a_real_replay_and_a_simulated_one_of_its_steps_agree(
    capsys: pytest.CaptureFixture[str], trace: str, tmp_path: Path
) -> None:
    """The recorded steps' times in the place of the clock: the same decisions, hence the same blocks."""
    log = str(tmp_path / "steps.jsonl")
    settings = ("--block-size", "4", "--num-blocks", "30", "--max-model-len", "64")
    real = run(capsys, trace, "--real", "--model", TINY, *settings, "--step-log", log)
    assert real["kind"] == "real"
    simulated = run(capsys, trace, "--profile", log, *settings)
    for name in ("num_steps", "output_tokens", "prompt_tokens", "num_finished"):
        assert simulated["summary"][name] == real["summary"][name]
    paths = []
    for name, report in (("a.json", simulated), ("b.json", real)):
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_text(json.dumps(report))
    assert main(["replay", "--compare", *paths]) == 0
    assert "TTFT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "TRACE: found none, expected a file, or --compare"),
        (("TRACE",), "--profile, --roofline, --real: expected one of them"),
        (("TRACE", "--roofline", "l4"), "--roofline: found 'l4', expected HARDWARE,MODEL"),
        (("TRACE", "--roofline", "abacus,smollm2-135m"), "abacus"),
        (("TRACE", "--profile", "nowhere.json"), "nowhere.json: cannot be read: No such file"),
        (("TRACE", "--real", "--timeout-s", "2"), "--timeout-s: not with --real"),
        (("TRACE", "--real", "--price", "0"), "--price: not with --real"),
        (("TRACE", *ROOFLINE, "--policy", "lottery"), "policy: found 'lottery'"),
        (("TRACE", *ROOFLINE, "--model", "gpt2"), "--model: not with step times that are of one model"),
        (("TRACE", *ROOFLINE, "--quantization", "int8"), "--quantization: not with step times"),
        (
            ("TRACE", *ROOFLINE, "--num-blocks", "1"),
            "expected at most 16, what max_model_len and the KV cache allow; skip_bad (--skip-bad)",
        ),
        (("nowhere.jsonl", *ROOFLINE), "nowhere.jsonl"),
        (("--compare", "a.json", "b.json"), "a.json"),
        (("--compare", "a.json"), "--compare: found one report, a.json, expected at least two"),
        (("TRACE", "--compare", "a.json", "b.json"), "TRACE: not with --compare"),
        (("--real", "--compare", "a.json", "b.json"), "--real: not with --compare"),
        (("--compare", "a.json", "b.json", "--slo", "ttft=1"), "--slo: not with --compare"),
        (("TRACE", *ROOFLINE, "--num-blocks", "64", "-o", "/no/r.json"), "/no/r.json: cannot be written"),
        (
            ("TRACE", *ROOFLINE, "--num-blocks", "64", "--report", "/no/r.html"),
            "/no/r.html: cannot be written",
        ),
    ],
)
def test_what_cannot_be_replayed_is_one_line(
    capsys: pytest.CaptureFixture[str], trace: str, arguments: tuple[str, ...], message: str
) -> None:
    arguments = tuple(trace if argument == "TRACE" else argument for argument in arguments)
    assert main(["replay", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
