"""The step log is enough to redraw a run: everything that happened can be read off it."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import LLM, ConfigError, SamplingParams
from tests.conftest import model_path

TINY = str(model_path("llama_gqa"))
PROMPTS = [[i + 1] * 20 for i in range(6)]


@pytest.fixture(params=["recompute", "swap"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "steps.jsonl"
    llm = LLM(
        TINY,
        block_size=4,
        num_blocks=30,
        max_num_batched_tokens=32,
        preemption=request.param,
        step_log=str(path),
        show_progress=False,
    )
    llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    llm.generate(PROMPTS[0], SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1))
    llm.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_steps_are_numbered_and_their_times_follow_each_other(log: list[dict[str, Any]]) -> None:
    assert [record["step"] for record in log] == list(range(len(log)))
    for record, following in itertools.pairwise(log):
        assert record["duration_s"] >= record["transfer_s"] >= 0
        assert record["start_s"] + record["duration_s"] <= following["start_s"] + 1e-3


def test_every_token_can_be_followed_from_its_arrival_to_its_end(log: list[dict[str, Any]]) -> None:
    """Replays the log by itself: what is computed when, what is forgotten by a preemption, who ends."""
    lengths: dict[int, int] = {}
    computed: Counter[int] = Counter()
    states: dict[int, str] = {}
    for record in log:
        for added in record["added"]:
            lengths[added["sequence"]] = added["num_prompt_tokens"]
            states[added["sequence"]] = "waiting"
        for preempted in record["preempted"]:
            assert states[preempted["sequence"]] == "running"
            assert preempted["num_computed_tokens"] == computed[preempted["sequence"]]
            states[preempted["sequence"]] = "swapped" if preempted["by"] == "swap" else "waiting"
        for sequence, was, cached, _ in record["admitted"]:
            assert states[sequence] == was
            states[sequence] = "running"
            if was == "waiting":
                computed[sequence] = cached
        for sequence, before, count, samples in record["scheduled"]:
            assert states[sequence] == "running"
            assert before == computed[sequence]
            computed[sequence] += count
            assert samples == (computed[sequence] == lengths[sequence])
            lengths[sequence] += samples
        for child, parent in record["forked"]:
            computed[child], lengths[child] = computed[parent], lengths[child] + 1
            states[child] = "running"
        for sequence, reason in record["finished"]:
            assert reason == "length"
            states[sequence] = "finished"
    assert len(states) == 9
    assert set(states.values()) == {"finished"}
    assert {lengths[sequence] for sequence in range(6)} == {50}
    assert {lengths[sequence] for sequence in range(6, 9)} == {24}


def test_the_block_tables_can_be_followed_and_account_for_the_blocks_in_use(
    log: list[dict[str, Any]],
) -> None:
    tables: dict[int, list[int]] = {}
    for record in log:
        for sequence, first, blocks in record["tables"]:
            tables[sequence] = tables.get(sequence, [])[:first] + blocks
        for sequence, before, count, _ in record["scheduled"]:
            assert len(tables[sequence]) * 4 >= before + count
        running = [tables[sequence] for sequence, *_ in record["scheduled"]]
        if len(running) == record["running"]:
            held = {block for table in running for block in table}
            assert record["blocks"]["used"] == len(held)
            assert record["blocks"]["shared"] == sum(map(len, running)) - len(held)
        assert record["blocks"]["used"] + record["blocks"]["free"] == 30
        assert 0 <= record["blocks"]["unwritten_slots"] <= 4 * record["blocks"]["used"]
        for sequence, _ in record["finished"]:
            tables.pop(sequence)


def test_preemptions_say_who_made_way_for_whom_and_what_it_was_thought_to_cost(
    log: list[dict[str, Any]],
) -> None:
    preemptions = [preempted for record in log for preempted in record["preempted"]]
    assert preemptions
    for preempted in preemptions:
        assert preempted["needed_by"] <= preempted["sequence"], "the youngest makes way"
        assert preempted["recompute_s"] > 0
        assert (preempted["swap_s"] > 0) == (preempted["by"] == "swap")
    moved = Counter[str]()
    for record in log:
        moved.update(record["transfers"])
    by_swap = any(preempted["by"] == "swap" for preempted in preemptions)
    assert (moved["swap_out"] > 0) == (moved["swap_in"] > 0) == by_swap
    assert moved["swap_in"] <= moved["swap_out"], "what the cache still has need not come back"
    assert moved["copy"] == 0, "five full blocks are shared, and nobody writes into them"


def test_a_run_that_ends_early_says_so(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    llm = LLM(TINY, num_blocks=30, step_log=str(path), show_progress=False)
    stream = llm.stream([1, 2, 3], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    llm.engine.step()
    stream.close()
    llm.generate([4], SamplingParams(temperature=0, max_tokens=1))
    llm.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[1]["ended"] == [[0, "abort"]]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"step_log: .*: Is a directory, expected a file to write to"):
        LLM(TINY, num_blocks=8, step_log=str(tmp_path), show_progress=False)


def test_a_disk_that_fills_ends_the_log_and_no_request(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    llm = LLM(TINY, num_blocks=8, step_log="/dev/full", show_progress=False)
    [output] = llm.generate([1, 2], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert len(output.token_ids) == 3
    llm.close()
    assert capsys.readouterr().err == "pagellm: step_log: /dev/full: No space left on device; it ends here\n"
