"""The commands: a parser of any kind takes them in; results on standard output, reports beside them."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from pagellm.engine import TraceError
from pagellm.sim import Trace
from pagellm.sim.commands import add_commands

EXAMPLES = Path(__file__).parents[2] / "examples" / "traces"
MOONCAKE = str(EXAMPLES / "mooncake_conversation.jsonl")


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(required=True))
    options = parser.parse_args(["trace", *arguments])
    options.command(options)


def test_describe(capsys: pytest.CaptureFixture[str]) -> None:
    run("describe", MOONCAKE, "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["num_requests"], document["name"], document["is_exact"]) == (200, MOONCAKE, True)
    assert 0 < document["shared_prefix_share"] < 1
    run("describe", MOONCAKE)
    assert "requests       200\n" in capsys.readouterr().out


def test_convert_to_a_file_reports_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.jsonl.gz")
    run("convert", MOONCAKE, "-o", output, "--limit", "50", "--rate-factor", "2", "--json")
    report = {"output": output, "num_requests": 50, "num_skipped": 0, "num_dropped": 0, "skipped": []}
    report["format"] = "mooncake"
    assert json.loads(capsys.readouterr().out) == report
    assert list(Trace.load(output)) == list(Trace.load(MOONCAKE).limited(50).scaled(2))


def test_convert_without_a_file_keeps_standard_output_for_the_trace(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run("convert", MOONCAKE, "--arrivals", "poisson:5", "--seed", "3")
    out, err = capfdbinary.readouterr()
    path = tmp_path / "trace.jsonl"
    path.write_bytes(out)
    assert [r.hash_ids for r in Trace.load(path)] == [r.hash_ids for r in Trace.load(MOONCAKE)]
    assert [r.arrival_time for r in Trace.load(path)] != [r.arrival_time for r in Trace.load(MOONCAKE)]
    assert err == b"200 requests written, 0 skipped, 0 dropped\n"


def test_convert_names_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "trace.jsonl"
    good = '{"arrival_time": %d, "prompt_len": 1, "output_len": 1}\n'
    source.write_text(good % 2 + "oops\n" + good % 1)
    arguments = ("convert", str(source), "-o", str(tmp_path / "out.jsonl"))
    with pytest.raises(TraceError, match=r"trace.jsonl:2: column"):
        run(*arguments)
    run(*arguments, "--skip-bad", "--sort")
    out, err = capsys.readouterr()
    assert out == "2 requests written, 1 skipped, 0 dropped\n"
    assert err.startswith("line 2: column 1: found 'oops', expected JSON")


def test_what_was_dropped_and_how_times_were_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "trace.jsonl"
    line = '{"timestamp": %s, "input_length": 5, "output_length": %d, "hash_ids": [1]}\n'
    source.write_text(line % (0, 7) + line % (1.5, 0) + line % (2.5, 7))
    run("convert", str(source), "-o", str(tmp_path / "out.jsonl"))
    assert capsys.readouterr().out == (
        "2 requests written, 0 skipped, 1 dropped, with nothing to generate\n"
        "read as mooncake-s, times in seconds, as they have fractions\n"
    )
    run("describe", str(source))
    out = capsys.readouterr().out
    assert "format         mooncake-s, times in seconds, as they have fractions\n" in out
    assert "requests       2, 1 dropped, with nothing to generate\n" in out
    assert "duration       2.5 s\n" in out


def test_synth_takes_every_setting_of_a_workload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {
        "--num-requests": "20", "--arrivals": "gamma:2,3", "--prompt-len": "uniform:5,9",
        "--output-len": "fixed:3",
        "--num-system-prompts": "2", "--system-prompt-len": "30", "--system-prompt-skew": "0.5",
        "--turns": "fixed:2", "--think-time-s": "fixed:1", "--seed": "8",
    }  # fmt: skip
    output = tmp_path / "out.jsonl"
    run("synth", "-o", str(output), *(word for setting in settings.items() for word in setting))
    assert capsys.readouterr().out == "20 requests written, 0 skipped, 0 dropped\n"
    requests = list(Trace.load(output))
    assert {(r.output_len, r.hash_block_size) for r in requests} == {(3, 30)}
    assert all(35 <= (r.prompt_len or 0) <= 51 for r in requests)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("describe", "missing.json"), "missing.json: cannot be read"),
        (("describe", MOONCAKE, "--format", "azure"), "TIMESTAMP|row"),
        (("convert", MOONCAKE, "--limit", "0"), "limit: found 0"),
        (("convert", MOONCAKE, "--arrivals", "daily"), "arrivals: found 'daily'"),
        (("synth", "--num-requests", "0"), "num_requests: found 0"),
        (("synth", "--turns", "many"), "turns: found 'many'"),
    ],
)
def test_bad_input_is_an_error(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        run(*arguments)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs names for open files")
def test_a_trace_may_be_written_to_standard_output_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")  # as /dev/stdout is
    command = [sys.executable, "-m", "pagellm", "trace", "synth", "--num-requests", "3", "-o"]
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run(
            [*command, str(tmp_path / "stdout")], stdout=out, stderr=subprocess.PIPE, check=True
        )
    assert len((tmp_path / "out").read_text().splitlines()) == 3
    assert done.stderr.startswith(b"3 requests written")
    assert (tmp_path / "stdout").is_symlink()
