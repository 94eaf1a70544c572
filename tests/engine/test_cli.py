"""The command line: exact JSON, one line and status 2 for bad input, results alone on standard output."""

import argparse
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import LLM, SamplingParams, SchedulingPolicy
from pagellm.engine.commands.cli import add_commands, engine_config
from pagellm.engine.scheduling.policies import SchedulerStats
from pagellm.engine.scheduling.sequence import Sequence
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
MODEL = ["--model", TINY, "--num-blocks", "16"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints when all is well."""
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_json_is_one_document_with_exact_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "ab",
        "cd",
        *MODEL,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--logprobs",
        "1",
        "--json",
    ]
    document = json.loads(run(capsys, *arguments))
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1)
    llm = LLM(TINY, num_blocks=16, show_progress=False)
    expected = llm.generate(["ab", "cd"], params)
    llm.close()
    assert [output["prompt"] for output in document["outputs"]] == ["ab", "cd"]
    for output, reference in zip(document["outputs"], expected, strict=True):
        assert output["text"] == reference.text
        assert output["token_ids"] == reference.token_ids
        assert output["finish_reason"] == "length"
        assert len(output["outputs"][0]["logprobs"]) == 5


def test_text_goes_to_standard_output_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "ab", *MODEL, "--max-tokens", "5", "--ignore-eos"]
    document = json.loads(run(capsys, *arguments, "--json"))
    assert run(capsys, *arguments) == document["outputs"][0]["text"] + "\n"


def test_several_completions_are_printed_below_their_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "generate",
        "ab",
        "cd",
        *MODEL,
        "--max-tokens",
        "3",
        "--ignore-eos",
        "--n",
        "2",
        "--seed",
        "1",
    ]
    arguments += ["--temperature", "1"]
    document = json.loads(run(capsys, *arguments, "--json"))
    expected = [
        f">>> {output['prompt']}\n{completion['text']}\n"
        for output in document["outputs"]
        for completion in output["outputs"]
    ]
    assert run(capsys, *arguments) == "\n".join(expected)


def test_the_prompt_may_come_on_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", *MODEL, "--max-tokens", "3", "--ignore-eos", "--json"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab"))
    assert json.loads(run(capsys, *arguments))["outputs"][0]["prompt"] == "ab"


def test_a_chat_answers_each_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nho\n"))
    lines = run(capsys, "chat", *MODEL, "--max-tokens", "3", "--temperature", "0", "--json").splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["role"] for answer in answers] == ["assistant", "assistant"]
    assert len(answers[1]["prompt_token_ids"]) > len(answers[0]["prompt_token_ids"])


def test_bench_reports_each_batch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", *MODEL, "--prefill", "8", "--decode", "4", "--batch", "1,3", "--repeat", "1"]
    document = json.loads(run(capsys, *arguments, "--json"))
    assert [result["batch"] for result in document["results"]] == [1, 3]
    assert all(result["prefill_tokens_per_s"] > 0 for result in document["results"])
    assert all(result["decode_tokens_per_s"] > 0 for result in document["results"])
    assert len(run(capsys, *arguments).splitlines()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--model", "no-such-model"], "no-such-model"),
        (["generate", "a", *MODEL, "--top-p", "2"], "top_p: found 2.0"),
        (["generate", "", *MODEL], "no tokens"),
        (["generate", "a" * 5000, *MODEL], "expected at most"),
        (["generate", "a", *MODEL, "--block-size", "0"], "block_size: found 0"),
        (["generate", "a", *MODEL, "--max-tokens", "0"], "max_tokens: found 0"),
        (["bench", *MODEL, "--prefill", "0"], "--prefill: found 0"),
        (["bench", *MODEL, "--prefill", "5000"], "expected at most"),
        (["bench", *MODEL, "--prefill", "100", "--decode", "500", "--batch", "1"], "prefill + decode"),
        (["bench", *MODEL, "--prefill", "100", "--decode", "100", "--batch", "2"], "decode: found 100"),
        (["bench", *MODEL, "--batch", "200", "--prefill", "1", "--decode", "1"], "batch"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("pagellm: ")
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [[], ["fly"], ["generate", "--max-tokens", "x"], ["bench", "--batch", "1,x"], ["bench", "--x"]],
)
def test_a_bad_argument_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "pagellm", "generate", "ab", *MODEL, "--ignore-eos"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    command = [sys.executable, "-m", "pagellm", "generate", "ab", *MODEL, "--ignore-eos"]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, cwd=Path(__file__).parents[2], check=False
        )
    assert process.returncode == 2
    assert len(process.stderr.splitlines()) == 1


def test_help_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    def helped(*arguments: str) -> Any:
        with pytest.raises(SystemExit) as exit_status:
            main([*arguments, "--help"])
        assert exit_status.value.code == 0
        return capsys.readouterr().out

    assert "generate" in helped()
    assert "--top-k" in helped("generate")


# Memory and scheduling


@pytest.mark.parametrize(
    "options",
    [
        ["--preemption", "swap"],
        ["--preemption", "recompute"],
        ["--preemption", "auto", "--swap-blocks", "12"],
        ["--policy", "prefill_first"],
        ["--policy", "tests.engine.test_cli:Backwards"],
    ],
)
def test_pressure_changes_what_is_done_and_nothing_that_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    prompts = ["ab cd ef gh", "ij kl mn op", "qr st uv wx"]
    generate = ["generate", *prompts, "--n", "2", "--temperature", "1", "--seed", "5", "--max-tokens", "40"]
    common = [*generate, "--ignore-eos", "--json", "--model", TINY, "--block-size", "4"]
    calm = json.loads(run(capsys, *common))["outputs"]
    log = tmp_path / "steps.jsonl"
    arguments = [*common, "--num-blocks", "30", "--max-model-len", "96", *options, "--step-log", str(log)]
    pressed = json.loads(run(capsys, *arguments))["outputs"]
    assert [o["token_ids"] for o in pressed] == [o["token_ids"] for o in calm]
    assert [c["text"] for o in pressed for c in o["outputs"]] == [
        c["text"] for o in calm for c in o["outputs"]
    ]
    preempted = [p for line in log.read_text().splitlines() for p in json.loads(line)["preempted"]]
    assert preempted
    if "swap" in options:
        assert "swap" in {p["by"] for p in preempted}


class Backwards(SchedulingPolicy):
    """The last to arrive goes first."""

    def order(self, sequence: Sequence, stats: SchedulerStats) -> float:
        return -sequence.arrival_index


class Nonsense(SchedulingPolicy):
    def order(self, sequence: Sequence, stats: SchedulerStats) -> float:
        return float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "lottery"], "pagellm: policy: found 'lottery', expected fcfs, prefill_first,"),
        (["--policy", "no_such_module:Policy"], "pagellm: policy: 'no_such_module:Policy' cannot be loaded"),
        (["--policy", "json:JSONDecoder"], "expected a subclass of pagellm.SchedulingPolicy"),
        (
            ["--policy", "tests.engine.test_cli:Nonsense"],
            "policy Nonsense: order(): found nan, expected a number",
        ),
        (["--preemption", "swap", "--swap-blocks", "0"], "num_swap_blocks: found 0 with preemption swap"),
        (["--preemption", "swap", "--swap-dir", "/no/such"], "swap_dir: /no/such: No such file or directory"),
        (["--step-log", "/no/such/log"], "step_log: /no/such/log: No such file or directory"),
    ],
)
def test_settings_that_cannot_be_served_are_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["generate", "ab", *MODEL, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "budget"),
    [("serve", "stall_free"), ("serve --budget full", "full"), ("batch IN OUT", "full"), ("bench", "full")],
)
def test_who_is_served_over_http_waits_for_no_prompt_unless_it_is_asked_for(
    command: str, budget: str
) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    assert engine_config(parser.parse_args(command.split())).budget == budget


def test_the_example_of_a_policy_is_found_beside_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = Path(__file__).parents[2] / "examples" / "policies"
    assert len((examples / "chats_and_jobs.py").read_text().splitlines()) < 40
    monkeypatch.chdir(examples)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pagellm", "generate", "ab", "cd", *MODEL),
            *("--max-tokens", "3", "--json", "--policy", "chats_and_jobs:ChatsAndJobs"),
        ],
        env=os.environ | {"PYTHONPATH": str(examples.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["outputs"]) == 2


THINKING = [*MODEL, "--reasoning-markers", "...a", "--max-tokens", "8", "--temperature", "0"]


def test_a_thought_goes_to_standard_error_and_the_answer_to_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["generate", "--chat", "hi", *THINKING, "--thinking-token-budget", "3", "--ignore-eos"]
    document = json.loads(run(capsys, *arguments, "--json"))
    [output] = document["outputs"]
    assert output["num_reasoning_tokens"] == output["outputs"][0]["num_reasoning_tokens"] == 3
    assert output["reasoning"]
    assert output["text"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == output["text"] + "\n"
    assert output["reasoning"] in printed.err


def test_a_chat_hands_thoughts_on_to_the_template(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    original = LLM.chat_prompt

    def chat_prompt(self: LLM, messages: Any, **options: Any) -> list[int]:
        seen.append([dict(message) for message in messages])
        return original(self, messages, **options)

    monkeypatch.setattr(LLM, "chat_prompt", chat_prompt)
    for as_json in ([], ["--json"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nho\n"))
        run(capsys, "chat", *THINKING, *as_json)
        assert seen[-1][1]["reasoning"]
        assert seen[-1][1]["content"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--thinking", "on"], "thinking: found on, expected --chat with it (--thinking)"),
        (["generate", "a", "--chat", "--thinking", "off"], "no switch for it (--thinking)"),
        (["generate", "a", "--chat", "--reasoning-effort", "low"], "does not ask (--reasoning-effort)"),
        (["generate", "a", "--chat", "--chat-template-kwargs", "{"], "malformed JSON"),
        (["generate", "a", "--chat", "--chat-template-kwargs", "[]"], "(--chat-template-kwargs)"),
        (["generate", "a", "--thinking-token-budget", "5"], "no markers of thoughts are known"),
        (["generate", "a", "--thinking-token-budget", "-1"], "found -1"),
        (["generate", "a", "--reasoning-markers", "think"], "(--reasoning-markers)"),
    ],
)
def test_what_a_model_does_not_know_about_thoughts_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([*arguments, *MODEL]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
    assert printed.err.count("\n") == 1
