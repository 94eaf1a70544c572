"""The second tier: what is written is read, and a medium that fails harms no request."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from pagellm.engine import LLM, ConfigError, RequestOutput, SamplingParams
from pagellm.engine.execution.swap_space import FileSwapSpace, MemorySwapSpace, SwapSpace
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from tests.conftest import model_path

TINY = str(model_path("llama_gqa"))
PROMPTS = [[i + 1] * 20 for i in range(6)]
FEW = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=1)
PARAMS = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, logprobs=1)


@pytest.fixture(params=["memory", "file"])
def space(request: pytest.FixtureRequest, tmp_path: Path) -> SwapSpace:
    return MemorySwapSpace(5, 7) if request.param == "memory" else FileSwapSpace(5, 7, str(tmp_path))


def test_every_block_is_read_as_it_was_written_last(space: SwapSpace) -> None:
    blocks = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    for slot in (3, 0, 4, 1, 2):
        space.write(slot, np.zeros(7, np.float32))
        space.write(slot, blocks[slot])
    for slot in range(5):
        assert space.read(slot).tobytes() == blocks[slot].tobytes()
    space.close()


def test_the_file_has_no_name_and_its_room_is_reserved_at_the_start(tmp_path: Path) -> None:
    space = FileSwapSpace(5, 1024, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert os.fstat(space._file.fileno()).st_size == 5 * 4096
    space.close()


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"swap_dir: .*gone: No such file or directory, expected a directory"
    ):
        LLM(TINY, num_blocks=8, swap_dir=str(tmp_path / "gone"), show_progress=False)


def test_a_full_disk_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        ConfigError, match=r"swap_dir: .*: No space left on device, expected room for 80 bytes"
    ):
        FileSwapSpace(5, 4, str(tmp_path))


def generate(**settings: object) -> list[RequestOutput]:
    llm = LLM(TINY, block_size=4, show_progress=False, **settings)
    outputs = llm.generate(PROMPTS, PARAMS)
    llm.close()
    return outputs


@pytest.fixture(scope="module")
def undisturbed() -> list[RequestOutput]:
    return generate(num_blocks=200)


def test_a_directory_that_vanishes_in_the_middle_harms_nothing(
    tmp_path: Path, undisturbed: list[RequestOutput]
) -> None:
    directory = tmp_path / "swap"
    directory.mkdir()
    llm = LLM(
        TINY, block_size=4, num_blocks=30, preemption="swap", swap_dir=str(directory), show_progress=False
    )
    directory.rmdir()
    outputs = llm.generate(PROMPTS, PARAMS)
    llm.close()
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in undisturbed]


@pytest.mark.parametrize("kind", [TransferKind.SWAP_OUT, TransferKind.SWAP_IN])
@pytest.mark.parametrize("failing", [1, 2, 6])
def test_what_cannot_be_moved_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: list[RequestOutput],
    kind: TransferKind,
    failing: int,
) -> None:
    """From the transfer number `failing` of its kind on, the medium is broken."""
    llm = LLM(TINY, block_size=4, num_blocks=30, preemption="swap", show_progress=False)
    move, count = llm.engine.runner.transfer, 0

    def broken(transfer: Transfer) -> None:
        nonlocal count
        count += transfer.kind is kind
        if transfer.kind is kind and count >= failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(transfer)

    monkeypatch.setattr(llm.engine.runner, "transfer", broken)
    outputs = llm.generate(PROMPTS, PARAMS)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pagellm: swap: ")
    assert line.endswith("Input/output error; preempted sequences are computed again")
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in undisturbed]
    manager = llm.engine.block_manager
    llm.engine.scheduler.check()
    assert (manager.num_free_blocks, manager.num_free_swap_blocks) == (30, 30)
    llm.close()


def test_auto_learns_both_costs_and_they_decide(undisturbed: list[RequestOutput]) -> None:
    llm = LLM(TINY, block_size=4, num_blocks=30, num_swap_blocks=30, show_progress=False)
    assert llm.engine.costs.swap_block_s > 0
    outputs = llm.generate(PROMPTS, PARAMS)
    assert llm.engine.costs.recompute_token_s > 0
    llm.close()
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in undisturbed]


# Evicted blocks of the prefix cache


def serve_twice(**settings: object) -> tuple[list[RequestOutput], LLM]:
    """Prompts that do not fit into the cache together, one after the other, twice."""
    llm = LLM(TINY, block_size=4, show_progress=False, **settings)
    prompts = [[i + 1] * 20 + list(range(10)) for i in range(5)]
    return [llm.generate(prompt, FEW)[0] for _ in range(2) for prompt in prompts], llm


@pytest.fixture(scope="module")
def computed_each_time() -> list[RequestOutput]:
    outputs, llm = serve_twice(num_blocks=100, enable_prefix_caching=False)
    llm.close()
    return outputs


@pytest.mark.parametrize("num_swap_blocks", [1, 5, 40])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_answers_have_the_same_bits_whatever_the_tier(
    computed_each_time: list[RequestOutput], tmp_path: Path, num_swap_blocks: int, in_a_file: bool
) -> None:
    outputs, llm = serve_twice(
        num_blocks=12,
        num_swap_blocks=num_swap_blocks,
        preemption="recompute",
        enable_hierarchical_cache=True,
        swap_dir=str(tmp_path) if in_a_file else None,
    )
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in computed_each_time]
    metrics = [output.metrics for output in outputs]
    found = [(one.num_cached_tokens, one.num_host_tokens) for one in metrics]
    assert found[:5] == [(0, 0)] * 5
    if num_swap_blocks == 40:
        assert found[5:] == [(28, 28)] * 5, "all but the block of the last token, from the second tier"
    assert llm.engine.block_manager.stats.host_hits == sum(host for _, host in found)
    llm.engine.block_manager.check()
    llm.close()


@pytest.mark.parametrize("kind", [TransferKind.OFFLOAD, TransferKind.LOAD])
@pytest.mark.parametrize("failing", [1, 3])
def test_a_medium_that_breaks_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    computed_each_time: list[RequestOutput],
    kind: TransferKind,
    failing: int,
) -> None:
    count = 0

    def broken(transfer: Transfer) -> None:
        nonlocal count
        count += transfer.kind is kind
        if transfer.kind is kind and count >= failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        move(transfer)

    tier = {"enable_hierarchical_cache": True, "num_swap_blocks": 40}
    llm = LLM(TINY, block_size=4, num_blocks=12, **tier, show_progress=False)
    move = llm.engine.runner.transfer
    monkeypatch.setattr(llm.engine.runner, "transfer", broken)
    prompts = [[i + 1] * 20 + list(range(10)) for i in range(5)]
    outputs = [llm.generate(prompt, FEW)[0] for _ in range(2) for prompt in prompts]
    assert [o.outputs[0].logprobs for o in outputs] == [o.outputs[0].logprobs for o in computed_each_time]
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("pagellm: swap: ")
    assert not llm.engine.block_manager.offloads
    llm.engine.scheduler.check()
    llm.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preemption": "never"}, "preemption: found 'never', expected one of auto, recompute, swap"),
        ({"num_swap_blocks": -1}, "num_swap_blocks: found -1"),
        ({"num_swap_blocks": True}, "num_swap_blocks: found True"),
        ({"preemption": "swap", "num_swap_blocks": 0}, "num_swap_blocks: found 0 with preemption swap"),
        ({"preemption": "recompute", "num_swap_blocks": 4}, "found 4 with preemption recompute"),
        ({"preemption": "recompute", "swap_dir": "/tmp"}, "swap_dir: found '/tmp' with preemption recompute"),
        ({"swap_dir": ""}, "swap_dir: found ''"),
        ({"watermark": 1.0}, "watermark: found 1.0"),
        ({"watermark": float("nan")}, "watermark: found nan"),
        ({"max_preemptions": 0}, "max_preemptions: found 0"),
        ({"max_prefill_chunk": 0}, "max_prefill_chunk: found 0"),
        ({"policy": "lottery"}, "policy: found 'lottery', expected fcfs, prefill_first, "),
        ({"num_swap_blocks": 10**12}, "num_swap_blocks: found 1000000000000 beside 8 blocks"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(TINY, num_blocks=8, show_progress=False, **settings)
