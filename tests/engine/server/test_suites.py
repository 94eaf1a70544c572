"""Clients and suites of others, unchanged, against a live server, each by its own command line.

They are found beside Python or in the folder that PAGELLM_CLIENTS names, as `make clients` installs them;
what is not installed is skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams

pytest.importorskip("fastapi", reason="the server's tests need the extra serve")

CLOZE = """
task: cloze_here
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def tool(name: str) -> str:
    """The path of a command; without it the test is skipped."""
    places = [
        str(Path(os.environ.get("PAGELLM_CLIENTS", ".")).resolve()),
        str(Path(sys.executable).parent),
        os.environ["PATH"],
    ]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        pytest.skip(f"{name} is not installed: make clients")
    return found


def run(command: list[str], directory: Path, **settings: str) -> str:
    """What a command says."""
    environment = {**os.environ, "HOME": str(directory), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=directory, env={**environment, **settings}, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("stream", [True, False])
def test_llm_talks_to_it(llm: LLM, server: Any, tmp_path: Path, stream: bool) -> None:
    models = f"- model_id: here\n  model_name: tiny\n  api_base: {server.url}/v1\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    command = [tool("llm"), "-m", "here", "hello there", "-o", "seed", "3", "-o", "max_tokens", "20"]
    command += [] if stream else ["--no-stream"]
    said = run(command, tmp_path, LLM_USER_PATH=str(tmp_path), OPENAI_API_KEY="unused")
    messages = [{"role": "user", "content": "hello there"}]
    [expected] = llm.chat(messages, SamplingParams(seed=3, max_tokens=20))
    assert (expected.outputs[0].text or "").strip() in said


def test_lm_evals_cloze_task_gets_the_log_probabilities_of_the_engine(
    llm: LLM, server: Any, tmp_path: Path
) -> None:
    """Each choice is scored by `echo` and `logprobs`; the sums are those of `LLM.generate`, bit for bit."""
    docs = [
        {"query": "hello world and", "choices": [" hello", " world", " the quick brown fox"], "gold": 1},
        {"query": "the quick", "choices": [" brown fox", " hello"], "gold": 0},
        {"query": "a", "choices": [" b", " c", " d", " e"], "gold": 2},
    ]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "cloze_here.yaml").write_text(CLOZE.format(data=data))
    url = f"base_url={server.url}/v1/completions,model=tiny,tokenizer_backend=remote,tokenized_requests=True"
    run(
        [
            tool("lm_eval"), "--model", "local-completions", "--model_args", url, "--tasks", "cloze_here",
            "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        tmp_path, OPENAI_API_KEY="unused",
    )  # fmt: skip
    [samples] = (tmp_path / "out").glob("**/samples_*.jsonl")
    read = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()), key=lambda one: one["doc_id"]
    )
    assert len(read) == 3
    for doc, sample in zip(docs, read, strict=True):
        for choice, (score, _) in zip(doc["choices"], (one[0] for one in sample["resps"]), strict=True):
            assert float(score) == pytest.approx(loglikelihood(llm, doc["query"], choice), rel=1e-12)


def loglikelihood(llm: LLM, context: str, choice: str) -> float:
    """The sum of the choice's tokens behind the context, as lm-eval defines it."""
    whole, before = llm.tokenizer.encode(context + choice), llm.tokenizer.encode(context)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    [output] = llm.generate({"prompt_token_ids": whole}, params)
    return sum(one.logprob for one in output.prompt_logprobs[len(before) :])


def test_schemathesis_finds_no_error_of_the_server(server: Any, tmp_path: Path) -> None:
    run(
        [
            tool("schemathesis"), "run", f"{server.url}/openapi.json", "--url", server.url, "--checks",
            "not_a_server_error", "--max-examples", "15", "--generation-deterministic", "--phases",
            "examples,coverage,fuzzing", "--suppress-health-check", "all", "--request-timeout", "60",
        ],
        tmp_path,
    )  # fmt: skip
