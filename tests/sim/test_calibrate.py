"""What calibration owes: a profile that loads, in the time it was given, and an engine left as it was."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import (
    ConfigError,
    EngineConfig,
    LLMEngine,
    PagellmError,
    ProfileError,
    RequestError,
    SamplingParams,
)
from pagellm.sim import CostModel
from pagellm.sim.calibration.calibrate import _continued, _level, calibrate
from pagellm.sim.calibration.staged_steps import DECODE_STEPS, Stage, StepShape
from pagellm.sim.commands.calibrate import add_calibrate
from pagellm.sim.costs.profile import ProfileCostModel, write_profile
from pagellm.sim.outputs import check_writable
from tests.conftest import model_path
from tests.sim.batches import batch_of

MODEL = str(model_path("llama_gqa"))
CONFIG = EngineConfig(max_num_seqs=6, num_blocks=24, max_num_batched_tokens=24, num_swap_blocks=2)


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    engine = LLMEngine(MODEL, CONFIG)
    yield engine
    engine.close()


class Clock:
    """Moves by a millisecond whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def calibrated(engine: LLMEngine, seconds: float = 2.0) -> dict[str, Any]:
    return calibrate(engine, model="tiny", seconds=seconds, clock=Clock())


def test_a_profile_loads_and_names_what_was_measured(engine: LLMEngine, tmp_path: Path) -> None:
    profile = calibrated(engine)
    write_profile(profile, tmp_path / "profile.json")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    model = CostModel.load(tmp_path / "profile.json")
    assert isinstance(model, ProfileCostModel)
    assert model.name.startswith(f"tiny, auto, {engine.config.num_threads} threads, ")
    assert model.block_size == 16
    assert model.block_bytes(16) == 2 * model.block_bytes(8) > 0
    token_words = profile["block_bytes"] / 16 / 4
    assert token_words >= 2 * 2 * 2 * 8  # layers, KV heads, keys and values, dimensions of a head


def test_the_tables_reach_as_far_as_the_settings(engine: LLMEngine) -> None:
    profile = calibrated(engine)
    assert profile["prefill"]["chunk_tokens"][:: len(profile["prefill"]["chunk_tokens"]) - 1] == [2, 24]
    assert profile["decode"]["num_sequences"] == [1, 2, 4, 6]
    assert profile["mixed"]["num_sequences"] == [1, 5]
    assert profile["mixed"]["chunk_tokens"] == [2, 19, 23]
    assert profile["mixed"]["context_tokens"] == 24 * 16 // (2 * 6)


def test_a_step_is_priced_at_what_it_took(engine: LLMEngine) -> None:
    """All steps take a tick of this clock, so all predictions are a tick, and none is wrong."""
    profile = calibrated(engine)
    model = ProfileCostModel(profile)
    for batch in (batch_of((1, 9)), batch_of(*[(1, 9)] * 6), batch_of((20, 0)), batch_of((1, 9), (20, 0))):
        assert model.step_time(batch) == pytest.approx(0.001)
    fit = profile["fit"]
    assert fit["num_steps"] > 10
    assert fit["passes"] > 1
    assert fit["mean_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seconds", [0.8, 1.5, 3.0])
def test_the_time_is_kept_to_and_all_of_it_reported(engine: LLMEngine, seconds: float) -> None:
    clock, shares = Clock(), list[float]()
    calibrate(engine, seconds=seconds, clock=clock, progress=shares.append)
    longest_visit = 0.001 * 3 * DECODE_STEPS
    assert seconds <= clock.now <= seconds + longest_visit
    assert sum(shares) == pytest.approx(seconds)
    assert min(shares) >= 0


def test_too_little_time_is_an_error(engine: LLMEngine) -> None:
    with pytest.raises(ConfigError, match="seconds, num_blocks: found too few to measure a table"):
        calibrated(engine, 0.25)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True])
def test_a_time_that_is_none_is_an_error(engine: LLMEngine, seconds: Any) -> None:
    with pytest.raises(ConfigError, match="seconds: found"):
        calibrate(engine, seconds=seconds)


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_num_seqs", 1), ("max_num_batched_tokens", 3), ("max_prefill_chunk", 2), ("max_model_len", 15)],
)
def test_settings_that_leave_nothing_to_measure_are_an_error(field: str, value: int) -> None:
    engine = LLMEngine(MODEL, replace(CONFIG, **{field: value}))
    with pytest.raises(ConfigError, match=f"{field}: found {value}, expected at least"):
        calibrate(engine)
    engine.close()


def test_a_policy_that_never_mixes_is_an_error() -> None:
    engine = LLMEngine(MODEL, replace(CONFIG, policy="prefill_first"))
    with pytest.raises(ConfigError, match="policy: found prefill_first"):
        calibrate(engine)
    engine.close()


def test_the_smallest_settings_can_be_measured() -> None:
    config = EngineConfig(max_num_seqs=2, num_blocks=2, max_num_batched_tokens=4, max_model_len=16)
    engine = LLMEngine(MODEL, config)
    assert ProfileCostModel(calibrated(engine)).step_time(batch_of((1, 3))) == pytest.approx(0.001)
    engine.close()


def test_an_engine_that_serves_is_left_alone(engine: LLMEngine) -> None:
    engine.add_request("mine", [3, 4, 5])
    with pytest.raises(RequestError, match="requests under way"):
        calibrate(engine)
    assert engine.has_unfinished


def test_the_engine_answers_afterwards_as_it_did_before(engine: LLMEngine) -> None:
    def answer(name: str) -> list[int]:
        prompt = [7, 8, 9] * 8
        output = engine.add_request(
            name, prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        )
        while engine.has_unfinished:
            engine.step()
        return output.outputs[0].token_ids

    before = answer("before")
    calibrated(engine)
    assert not engine.has_unfinished
    engine.scheduler.check()
    assert engine.block_manager.usage().used == 0
    assert answer("after") == before


def test_an_interruption_leaves_an_idle_engine(engine: LLMEngine) -> None:
    ticks = count()

    def progress(_: float) -> None:
        if next(ticks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, seconds=2, clock=Clock(), progress=progress)
    assert not engine.has_unfinished
    engine.scheduler.check()


def test_a_step_has_the_shape_that_was_asked_for(engine: LLMEngine) -> None:
    stage = Stage(engine, Clock())
    seen = []
    run = engine.runner.run

    def spy(batch: Any, *rest: Any) -> Any:
        seen.append(
            sorted(
                (s.num_computed_tokens, n) for s, n in zip(batch.sequences, batch.num_new_tokens, strict=True)
            )
        )
        return run(batch, *rest)

    engine.runner.run = spy  # type: ignore[method-assign]
    stage.time(StepShape(decodes=(9, 4)))
    assert seen == [[(4 + i, 1), (9 + i, 1)] for i in range(DECODE_STEPS)]
    seen.clear()
    stage.time(StepShape(chunks=(6, 3), before=10))
    stage.time(StepShape(decodes=(9,), chunks=(6,)))
    assert seen == [[(10, 3), (10, 6)], [(0, 6), (9, 1)]]


def test_what_is_priced_is_what_runs(engine: LLMEngine) -> None:
    stage = Stage(engine, Clock())
    priced, ran = [], []
    run = engine.runner.run

    def shape(batch: Any) -> list[tuple[int, int]]:
        return [
            (s.num_computed_tokens, n) for s, n in zip(batch.sequences, batch.num_new_tokens, strict=True)
        ]

    def price(batch: Any) -> float:
        priced.append(shape(batch))
        return 0.0

    def spy(batch: Any, *rest: Any) -> Any:
        ran.append(shape(batch))
        return run(batch, *rest)

    engine.runner.run = spy  # type: ignore[method-assign]
    for step in (
        StepShape(decodes=(9, 4)),
        StepShape(chunks=(6, 3), before=10),
        StepShape(decodes=(9, 2), chunks=(6, 3)),
        StepShape(decodes=(9, 2), chunks=(6,), before=5),
    ):
        stage.time(step, price)
    assert priced == ran


def test_what_is_missing_lies_on_a_line() -> None:
    assert _continued([0, 1, 2, 4], [None, 1.0, 3.0, None]) == [0.0, 1.0, 3.0, 7.0]
    assert _continued([0, 1, 4], [2.0, None, 8.0]) == [2.0, 3.5, 8.0]
    assert _continued([0, 1], [None, 1.0]) == [None, 1.0]


def test_the_ends_of_an_axis_come_first_then_its_middle() -> None:
    assert [_level(index, 9) for index in range(9)] == [0, 3, 2, 3, 1, 3, 2, 3, 0]
    assert [_level(index, 2) for index in range(2)] == [0, 0]


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_calibrate(parser.add_subparsers(required=True))
    options = parser.parse_args(["calibrate", "--model", MODEL, *arguments])
    options.command(options)


SMALL = ("--max-num-seqs", "4", "--num-blocks", "16", "--max-num-batched-tokens", "16", "--seconds", "1")


def test_the_command_writes_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    run("-o", str(path), *SMALL, "--quantization", "int8", "--num-threads", "1", "--json")
    said = json.loads(capsys.readouterr().out)
    profile = json.loads(path.read_text())
    assert said["output"] == str(path)
    assert (profile["quantization"], profile["num_threads"], profile["fit"]) == ("int8", 1, said["fit"])
    assert profile["transfer"]["swap_block_s"] > 0
    run("-o", str(path), *SMALL)
    assert "other steps predicted with a mean error of" in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pagellm.sim.commands.calibrate.calibrate", lambda *_, **__: pytest.fail("measured"))
    for path in (tmp_path, tmp_path / "missing" / "profile.json"):
        with pytest.raises(PagellmError, match=r"expected a file|cannot be written"):
            run("-o", str(path), *SMALL)
        with pytest.raises(ProfileError):
            write_profile({}, path)
    check_writable("output", tmp_path / "new.json", ProfileError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
def test_a_device_in_the_place_of_a_profile_is_written_and_not_replaced(tmp_path: Path) -> None:
    for device in ("null", "full"):
        (tmp_path / device).symlink_to(f"/dev/{device}")
        check_writable("output", tmp_path / device, ProfileError)
    write_profile({}, tmp_path / "null")
    with pytest.raises(ProfileError, match="full: cannot be written: No space left on device"):
        write_profile({}, tmp_path / "full")
    assert all(path.is_symlink() for path in tmp_path.iterdir())


def test_ctrl_c_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pagellm.sim.commands.calibrate.calibrate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("-o", str(tmp_path / "profile.json"), *SMALL)
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(PagellmError, match="block_size: found 0"):
        run("-o", str(tmp_path / "profile.json"), "--block-size", "0")


@pytest.mark.parametrize("owner", ["scheduler", "engine", "block_manager"])
def test_an_interrupted_calibration_leaves_the_engine_as_it_was(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    """Above all without prefixes in the cache that were never computed."""
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1)
    prompt = Stage(engine, Clock()).random.choices(range(engine.spec.vocab_size), k=12)
    expected = served(engine, prompt, params)
    whose, name = {
        "scheduler": (engine.scheduler, "commit"),
        "engine": (engine, "reset_prefix_cache"),
        "block_manager": (engine.block_manager, "reset_cache"),
    }[owner]
    original, calls = getattr(whose, name), count()

    def interrupted(*arguments: Any) -> Any:
        result = None if name == "reset_prefix_cache" else original(*arguments)
        if next(calls) == 0:
            raise KeyboardInterrupt
        return original(*arguments) if name == "reset_prefix_cache" else result

    monkeypatch.setattr(whose, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        Stage(engine, Clock()).time(StepShape(chunks=(4,), before=8))
    monkeypatch.undo()
    assert not engine.has_unfinished
    engine.scheduler.check()
    assert engine.block_manager.num_cached_blocks == 0
    assert engine.loop.listeners == ()
    assert served(engine, prompt, params) == expected


def served(engine: LLMEngine, prompt: list[int], params: SamplingParams) -> object:
    output = engine.add_request("served", prompt, params)
    while not output.finished:
        engine.step()
    return output.outputs[0].logprobs
