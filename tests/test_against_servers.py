"""The ledger of recorded runs: which run is of what, and that everybody's error is counted alike."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import against_servers
from tests.sim.test_fit import as_ones, busy_run, plain, stages


@pytest.mark.parametrize(
    ("path", "named", "expected"),
    [
        ("vllm-0.19_rtx4090_llama-3.1-8b.jsonl", {}, ("rtx-4090", "llama-3.1-8b", None)),
        ("RTXPRO6000/Llama-3.1-8B/vllm/requests.jsonl", {}, ("rtx-pro-6000-server", "llama-3.1-8b", None)),
        ("a.json", {"hardware": "NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "model": "Qwen3-32B"},
         ("rtx-pro-6000", "qwen3-32b", None)),
        ("a.jsonl", {"hardware": "NVIDIA H100 80GB HBM3", "model": "meta-llama/Meta-Llama-3.1-70B-Instruct",
                     "num_devices": 4}, ("h100-sxm", "llama-3.1-70b", 4)),
        ("a.json", {"hardware": "L40S", "model": "Qwen/Qwen2.5-7B-Instruct"}, ("l40s", "qwen2.5-7b", None)),
        ("tp2/a100/qwen3-8b.csv", {}, ("a100-80gb", "qwen3-8b", 2)),
        ("a.csv", {"hardware": "NVIDIA A100-SXM4-40GB", "model": "m"}, ("a100-40gb", None, None)),
        ("a.csv", {"hardware": "NVIDIA A100-SXM4-80GB", "model": "m"}, ("a100-80gb", None, None)),
        ("a.csv", {"hardware": "NVIDIA H100 PCIe", "model": "Qwen3-8B"}, ("h100-pcie", "qwen3-8b", None)),
        ("a.csv", {"hardware": "NVIDIA RTX 6000 Ada Generation", "model": "m"}, ("rtx-6000-ada", None, None)),
        ("somewhere/else.json", {}, (None, None, None)),
    ],
)  # fmt: skip
def test_a_run_is_told_by_what_it_says_else_by_its_path(
    path: str, named: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    run = against_servers.RecordedRun(path, "any", False, [], **named)
    assert against_servers.identify(run) == expected


def test_everybody_is_held_against_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stages.json").write_text(stages(2, 3))
    (tmp_path / "l4_qwen2.5-0.5b.jsonl").write_text(plain(as_ones(busy_run())))
    (tmp_path / "unknown.jsonl").write_text(plain(as_ones(busy_run())))
    (tmp_path / "other.json").write_text("{}")
    arguments = ["against_servers.py", "--runs", str(tmp_path), "--no-fit"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json"])
    against_servers.main()
    out, err = capsys.readouterr()
    assert "other.json: found {}, expected a recorded run" in err
    rows = json.loads(out)
    # 20 of 30, 120 of 230 and 5 of 10 milliseconds.
    theirs = [row for row in rows if row["simulator"] == "other"]
    assert len(theirs) == 2
    for row in theirs:
        assert [row[name] for name in ("ttft", "e2e", "tpot")] == pytest.approx([-1 / 3, -11 / 23, -0.5])
    ours = [row for row in rows if row["simulator"] == "pagellm, assumed"]
    assert len(ours) == 3
    [refused] = [row for row in rows if "refused" in row]
    assert "found no device that is known" in refused["refused"]
    [run] = against_servers.load_runs(tmp_path / "unknown.jsonl")
    [row] = against_servers.ledger(run, False, ("l40s", "qwen2.5-0.5b", 2))
    assert (row["hardware"], row["model"], row["num_devices"]) == ("l40s", "qwen2.5-0.5b", 2)
    assert isinstance(row["e2e"], float)
    monkeypatch.setattr("sys.argv", [*arguments, "--roofline", "l40s"])
    with pytest.raises(SystemExit, match="2"):
        against_servers.main()
    assert "--roofline: found 'l40s', expected HARDWARE,MODEL" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", arguments)
    against_servers.main()
    assert "-33.3 %" in capsys.readouterr().out


def test_published_figures_have_their_source() -> None:
    for entry in against_servers.PUBLISHED["runs"]:
        assert entry["source"]
        assert entry["published"]


def test_what_a_published_run_was_served_by_is_known_where_it_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "rtxpro6000_qwen3-32b.jsonl"
    path.write_text(plain(as_ones(busy_run())))
    [run] = against_servers.load_runs(path)
    rows = list(against_servers.ledger(run, with_fit=False))
    assert [row["num_devices"] for row in rows] == [2, 2]
    assert rows[1]["simulator"] == "LLMServingSim"
    others = ("l40s", "qwen2.5-0.5b", 1)  # told for runs that say nothing
    assert list(against_servers.ledger(run, False, others)) == rows
    path = path.rename(tmp_path / "rtxpro6000_qwen3-30b-a3b.jsonl")
    [run] = against_servers.load_runs(path)
    assert (
        "found 2 engines that share experts" in next(against_servers.ledger(run, with_fit=False))["refused"]
    )
