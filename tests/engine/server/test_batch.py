"""`pagellm batch`: a file of requests becomes a file of answers, those that the server gives."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from tests.engine.server.conftest import THOUGHTS
from tests.engine.server.test_clients import ask

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")


def line(custom_id: Any, body: Any, url: str = "/v1/completions", method: str = "POST") -> str:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body}) + "\n"


def command(model: Path, source: Path, target: Path, *flags: str) -> list[str]:
    settings = [
        "--num-blocks", "64", "--block-size", "8", "--max-num-seqs", "8", "--served-model-name", "tiny",
        "--reasoning-markers", THOUGHTS,
    ]  # fmt: skip
    return [
        sys.executable, "-m", "pagellm", "batch", str(source), str(target), "--model", str(model), *settings,
        *flags,
    ]  # fmt: skip


def run(model: Path, source: Path, target: Path, status: int = 0, *flags: str) -> Any:
    done = subprocess.run(command(model, source, target, "--json", *flags), capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout) if status == 0 else done.stderr


def answers(target: Path) -> dict[str, Any]:
    read = [json.loads(one) for one in target.read_text().splitlines()]
    assert all(set(one) == {"id", "custom_id", "response", "error"} for one in read)
    assert len({one["id"] for one in read}) == len(read)
    return {one["custom_id"]: one for one in read}


def test_each_request_gets_the_servers_answer(thinker: Path, llm: LLM, server: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    completion = {"model": "tiny", "prompt": "hello world", "max_tokens": 8, "seed": 4, "temperature": 1.0}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 1}
    source.write_text(line("a", completion) + "\n" + line("b", chat, "/v1/chat/completions"))
    counts = run(thinker, source, target)
    assert (counts["total"], counts["completed"], counts["failed"], counts["kept"]) == (2, 2, 0, 0)
    found = answers(target)
    [expected] = llm.generate("hello world", SamplingParams(max_tokens=8, seed=4, temperature=1.0))
    for name, path, body in (("a", "/v1/completions", completion), ("b", "/v1/chat/completions", chat)):
        assert found[name]["error"] is None
        response = found[name]["response"]
        assert response["status_code"] == 200
        assert response["request_id"]
        over_http = ask(server, path, body)
        assert response["body"]["choices"] == over_http["choices"]
        assert response["body"]["model"] == "tiny"
    assert found["a"]["response"]["body"]["choices"][0]["text"] == expected.text


def test_a_line_that_is_no_request_and_a_body_that_is_refused_get_errors(
    thinker: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = {"prompt": "hello", "max_tokens": 2}
    source.write_text(
        "{not json}\n"
        + line("good", good)
        + line("temperature", {**good, "temperature": -1})
        + line("model", {**good, "model": "another"})
        + line("url", good, "/v1/embeddings")
        + line("method", good, method="GET")
        + line("stream", {**good, "stream": True})
        + line("body", [1])
        + line(7, good)
        + "[]\n"
        + line("\ud800", good)
        + line("surrogate", {**good, "prompt": "\ud800"})
        + line("bits", {**good, "seed": 10**30})
        + line("nan", {**good, "temperature": math.nan})
        + line("deep", {**good, "metadata": {"a": json.loads("[" * 300 + "]" * 300)}})
    )
    counts = run(thinker, source, target)
    assert (counts["total"], counts["completed"], counts["failed"]) == (15, 1, 14)
    read = [json.loads(one) for one in target.read_text().splitlines()]
    unnamed = {one["error"]["line"]: one for one in read if one["custom_id"] is None}
    assert sorted(unnamed) == [1, 9, 10, 11]
    assert "custom_id: found 7, expected a text" in unnamed[9]["error"]["message"]
    found = answers(target)
    assert found["good"]["response"]["status_code"] == 200
    for name, status, param in (("temperature", 400, "temperature"), ("model", 404, "model")):
        response = found[name]["response"]
        assert (response["status_code"], response["body"]["error"]["param"]) == (status, param)
    for name in ("surrogate", "bits", "nan", "deep"):
        assert found[name]["response"]["status_code"] == 400, "as a client's, to whom the same was sent"
    for name in ("url", "method", "stream", "body"):
        assert found[name]["response"] is None
        assert f"{name}" in found[name]["error"]["message"]
    before = target.read_text()
    assert run(thinker, source, target)["kept"] == 15
    assert target.read_text() == before


def test_how_calls_are_written_is_said_as_to_a_server(thinker: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(thinker, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% if tools %}{% endif %}" + config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    source = tmp_path / "in.jsonl"
    tools = [{"type": "function", "function": {"name": "add"}}]
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "tools": tools}
    source.write_text(line("a", chat, "/v1/chat/completions"))
    assert run(model, source, tmp_path / "unsaid.jsonl")["failed"] == 1
    assert run(model, source, tmp_path / "said.jsonl", 0, "--tool-call-parser", "hermes")["completed"] == 1


def test_after_kill_it_goes_on_with_what_it_has(thinker: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "hello world", "max_tokens": 60, "ignore_eos": True, "temperature": 1.0}
    source.write_text("".join(line(f"r{index}", {**body, "seed": index}) for index in range(200)))
    whole = tmp_path / "whole.jsonl"
    run(thinker, source, whole)
    process = subprocess.Popen(command(thinker, source, target), stderr=subprocess.DEVNULL)
    while process.poll() is None and not (target.exists() and target.read_bytes().count(b"\n") >= 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = target.read_bytes()
    assert 20 <= kept.count(b"\n") < 200, "it was to be killed in between"
    whole_lines = kept[: kept.rindex(b"\n") + 1]
    target.write_bytes(whole_lines + b'{"id": "batch_req_half", "custom')
    counts = run(thinker, source, target)
    assert counts["kept"] == whole_lines.count(b"\n")
    assert target.read_bytes().startswith(whole_lines)
    assert target.read_bytes().count(b"\n") == 200
    expected, found = answers(whole), answers(target)
    for name, answer in expected.items():
        assert found[name]["response"]["body"]["choices"] == answer["response"]["body"]["choices"]


def test_files_that_cannot_be_used_are_refused_before_anything_is_computed(
    thinker: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    twice = line("same", {"prompt": "a"}) + "\n" + line("same", {"prompt": "b"})
    source.write_text(twice)
    said = run(thinker, source, target, 2)
    assert "found custom_id 'same' again, which line 1 has" in said
    assert said.count("\n") == 1
    assert not target.exists()
    source.write_text("\n")
    assert "found no line" in run(thinker, source, target, 2)
    source.write_text(line("one", {"prompt": "a"}))
    assert "found the input" in run(thinker, source, source, 2)
    assert "cannot read" in run(thinker, tmp_path / "none.jsonl", target, 2)
    target.write_text('{"custom_id": "other", "error": null}\n')
    assert "out.jsonl:1: found a line that is no answer to the input" in run(thinker, source, target, 2)
    assert target.read_text() == '{"custom_id": "other", "error": null}\n'
    assert "cannot write" in run(thinker, source, tmp_path, 2)
