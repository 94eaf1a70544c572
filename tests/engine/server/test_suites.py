"""Clients and suites of others, unchanged, against a live server, each by its own command line.

They are found beside Python or in the folder that PAGELLM_CLIENTS names, as `make clients` installs them;
what is not installed is skipped.
"""

import json
import math
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


PERPLEXITY = """
task: perplexity_here
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: byte_perplexity
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
            whole, before = llm.tokenizer.encode(doc["query"] + choice), llm.tokenizer.encode(doc["query"])
            expected = loglikelihood(llm, before, whole[len(before) :])
            assert float(score) == pytest.approx(expected, rel=1e-12)


def test_lm_evals_perplexity_is_that_of_the_engine(llm: LLM, server: Any, tmp_path: Path) -> None:
    """By `echo`, in windows of the context's length, with the tokenizer that the server tells of."""
    texts = ["hello world and the quick brown fox", "the quick, the brown and the fox " * 3]
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "perplexity_here.yaml").write_text(PERPLEXITY.format(data=data))
    url = f"base_url={server.url}/v1/completions,model=tiny,tokenizer_backend=remote,tokenized_requests=True"
    run(
        [
            tool("lm_eval"), "--model", "local-completions", "--model_args", f"{url},max_length=200",
            "--tasks", "perplexity_here", "--include_path", str(tmp_path),
            "--output_path", str(tmp_path / "out"),
        ],
        tmp_path, OPENAI_API_KEY="unused",
    )  # fmt: skip
    [found] = (tmp_path / "out").glob("**/results_*.json")
    tokenizer = llm.tokenizer
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    total = sum(loglikelihood(llm, [first], tokenizer.encode(text)) for text in texts)
    expected = math.exp(-total / sum(len(text.encode()) for text in texts))
    scores = json.loads(found.read_text())["results"]["perplexity_here"]
    assert scores["byte_perplexity,none"] == pytest.approx(expected, rel=1e-12)


def loglikelihood(llm: LLM, before: list[int], behind: list[int]) -> float:
    """The sum of the log-probabilities of the tokens behind others, as lm-eval defines it."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    [output] = llm.generate({"prompt_token_ids": before + behind}, params)
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
