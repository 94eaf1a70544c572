"""Many at once: each gets the bits that it gets alone, nobody waits for another's prompt, nothing is left."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.step_loop import StepListener
from tests.conftest import model_path
from tests.engine.server.conftest import eventually, serving, wait_until_ready
from tests.engine.server.soak import MODEL_SETTINGS, soak

openai = pytest.importorskip("openai", reason="the server's tests need the client openai")
pytest.importorskip("fastapi", reason="the server's tests need the extra serve")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


class Steps(StepListener):
    """How many tokens and sequences each step has, and how often one makes way."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int]] = []
        self.num_preemptions = 0

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        self.steps.append((batch.num_tokens, len(batch.sequences)))
        self.num_preemptions += len(batch.preempted)


def test_a_crowd_of_64_gets_bit_for_bit_what_generate_gives(llm: LLM, server: Any) -> None:
    """Among clients that go away, with structured neighbours, and so few blocks that many make way."""
    prompts = [f"{'hello world ' * (index % 5 + 1)}{index}" for index in range(64)]
    forms = [{"json": SCHEMA} if index % 4 == 1 else None for index in range(64)]
    params = [
        SamplingParams(
            max_tokens=40, temperature=1.0, seed=index, logprobs=1, structured=form, ignore_eos=form is None
        )
        for index, form in enumerate(forms)
    ]
    expected = [llm.generate(prompt, one)[0] for prompt, one in zip(prompts, params, strict=True)]
    found: dict[int, Any] = {}
    start = threading.Barrier(64)

    def ask(index: int) -> None:
        extra: dict[str, Any] = {"return_token_ids": True, "ignore_eos": forms[index] is None}
        if forms[index] is not None:
            extra["structured_outputs"] = forms[index]
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
            start.wait(60)
            stream = client.completions.create(
                model="tiny", prompt=prompts[index], max_tokens=40, temperature=1.0, seed=index, logprobs=1,
                stream=True, extra_body=extra,
            )  # fmt: skip
            ids, logprobs = [], []
            for number, chunk in enumerate(stream):
                if index % 4 == 3 and number == index % 7:
                    stream.close()
                    return
                [choice] = chunk.choices
                ids += choice.token_ids
                logprobs += choice.logprobs.token_logprobs
            found[index] = ids, logprobs

    steps = Steps()
    server.llm.engine.loop.listen(steps)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(found) == [index for index in range(64) if index % 4 != 3]
    for index, (ids, logprobs) in found.items():
        assert ids == expected[index].token_ids
        assert logprobs == [one.logprob for one in expected[index].outputs[0].logprobs]
    server.llm.engine.loop.ignore(steps)
    assert steps.num_preemptions > 0, "blocks were to run short"


@pytest.fixture
def long_server(tmp_path: Path) -> Iterator[Any]:
    """A server whose model takes 8,192 tokens, 256 of them in a step at most."""
    directory = tmp_path / "long"
    shutil.copytree(model_path("llama_tiny"), directory)
    config = json.loads((directory / "config.json").read_text())
    config["max_position_embeddings"] = 8192
    (directory / "config.json").write_text(json.dumps(config))
    few = {"num_blocks": 1024, "block_size": 16, "max_num_batched_tokens": 256, "max_num_seqs": 8}
    with serving(lambda: LLM(directory, show_progress=False, **few), "tiny") as service:
        wait_until_ready(service)
        yield service


def test_a_prompt_of_7000_tokens_delays_nobody_by_more_than_a_step_of_the_budget(long_server: Any) -> None:
    steps = Steps()
    long_server.llm.engine.loop.listen(steps)
    with openai.OpenAI(base_url=f"{long_server.url}/v1", api_key="unused", max_retries=0) as client:
        streams = [
            client.completions.create(
                model="tiny", prompt=f"hello {index}", max_tokens=4000, stream=True,
                extra_body={"ignore_eos": True},
            )
            for index in range(3)
        ]  # fmt: skip
        for stream in streams:
            next(iter(stream))
        answer = client.completions.create(model="tiny", prompt=[[17] * 7000], max_tokens=1)
        assert answer.usage.prompt_tokens == 7000
        for stream in streams:
            stream.close()
    assert eventually(lambda: not long_server.llm.engine.has_unfinished)
    assert max(num_tokens for num_tokens, _ in steps.steps) == 256
    large = [num_sequences for num_tokens, num_sequences in steps.steps if num_tokens > 128]
    assert len(large) >= 7000 // 256
    assert set(large) == {4}, "each of the three others has a token in every step of the long prompt"


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind() -> None:
    """Also: `python -m tests.engine.server.soak --minutes 60`."""
    path = model_path("llama_tiny")
    with serving(lambda: LLM(path, show_progress=False, **MODEL_SETTINGS), "tiny") as service:
        wait_until_ready(service)
        crowd = soak(service, 15, clients=24, seed=0)
    assert crowd.num_whole > 50
    assert crowd.num_given_up > 50
