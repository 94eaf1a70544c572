"""Step times from a machine's limits and from a recorded run; what of a batch they look at."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagellm.engine import ConfigError, EngineConfig, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.sim import CostModel
from pagellm.sim.costs.cost_model import shape_of
from pagellm.sim.costs.recorded import RecordedCostModel
from pagellm.sim.costs.roofline import Hardware, Model, RooflineCostModel
from tests.sim.batches import batch_of

ROUND_HARDWARE = Hardware(
    flops_per_s=1e6, memory_bytes=1e6, memory_bytes_per_s=1e4, link_bytes_per_s=1e3, host_bytes_per_s=100
)
ROUND_MODEL = Model(
    num_parameters=1000, num_layers=1, hidden_size=4, num_heads=2, num_kv_heads=1, head_dim=5,
    weight_bytes=2, kv_bytes=1,
)  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9))))
def test_the_shape_of_a_batch_separates_single_tokens_from_chunks(rows: list[tuple[int, int]]) -> None:
    num_decodes, decode_context, prefills = shape_of(batch_of(*rows))
    assert num_decodes == sum(count == 1 for count, _ in rows)
    assert decode_context == sum(before for count, before in rows if count == 1)
    assert sorted(prefills) == sorted(row for row in rows if row[0] > 1)


def test_a_roofline_is_the_longer_of_arithmetic_and_memory() -> None:
    model = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL)
    # 2000 bytes of weights, 10 bytes of KV for each token before and for the new one.
    assert model.step_time(batch_of((1, 49))) == pytest.approx((2000 + 50 * 10) / 1e4)
    # 1000 tokens of 2000 operations, and 1000 * 1001 / 2 pairs of 4 * 2 heads * 5.
    assert model.step_time(batch_of((1000, 0))) == pytest.approx((2_000_000 + 500_500 * 40) / 1e6)


def test_a_roofline_reads_only_what_multiplies_and_asks_the_head_only_for_tokens() -> None:
    # Of the 1000 numbers 2 tables of 40 x 4 are the embedding and the head, or one that is both.
    untied = RooflineCostModel(ROUND_HARDWARE, replace(ROUND_MODEL, vocab_size=40, tied_embeddings=False))
    tied = RooflineCostModel(ROUND_HARDWARE, replace(ROUND_MODEL, vocab_size=40))
    for model, read, layers in ((untied, 840, 680), (tied, 1000, 840)):
        assert model.step_time(batch_of((1, 49))) == pytest.approx((2 * read + 50 * 10) / 1e4)
        prefill = batch_of((1000, 0))
        arithmetic = 1000 * 2 * layers + 500_500 * 40
        assert model.step_time(prefill) == pytest.approx((arithmetic + 2 * 160) / 1e6)
        prefill.samples[0] = False
        assert model.step_time(prefill) == pytest.approx(arithmetic / 1e6)
        model.begin(EngineConfig())
        assert model.costs.recompute_token_s == pytest.approx(2 * layers / 1e6)


def test_a_roofline_adds_what_it_is_told_and_what_devices_exchange() -> None:
    batch = batch_of((1, 49), (1, 49))
    alone = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL)
    told = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL, step_overhead_s=3, sequence_overhead_s=0.5)
    assert told.step_time(batch) == pytest.approx(alone.step_time(batch) + 4)
    half = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL, efficiency=0.5)
    assert half.step_time(batch) == pytest.approx(2 * alone.step_time(batch))
    # Two tokens, two sums a layer of 4 numbers of 2 bytes, each sent 2 * (2 - 1) / 2 times.
    two = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL, 2)
    assert two.step_time(batch) == pytest.approx(alone.step_time(batch) / 2 + 2 * 2 * 4 * 2 / 1e3)


def test_a_roofline_prices_transfers_by_the_block_size() -> None:
    model = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL)
    model.begin(EngineConfig(block_size=20))
    assert model.costs == PreemptionCosts(recompute_token_s=2000 / 1e6, swap_block_s=200 / 100)
    batch = batch_of((1, 49))
    before = model.step_time(batch)
    kinds = (TransferKind.COPY, TransferKind.SWAP_OUT, TransferKind.SWAP_IN)
    batch.transfers.extend(Transfer(kind, 0, 1, batch.sequences[0]) for kind in kinds)
    assert model.step_time(batch) == pytest.approx(before + 2 * 200 / 1e4 + 2 * 2.0)


def test_the_known_machines_and_models_make_rooflines() -> None:
    model = CostModel.roofline("h100-sxm", "llama-3.1-8b")
    assert model.block_bytes(16) == 16 * 2 * 32 * 8 * 128 * 2
    assert model.num_blocks(16) == int((0.9 * 80e9 - 2 * 8030261248) // model.block_bytes(16))
    assert model.name == "llama-3.1-8b on 1 x h100-sxm, roofline"
    # Reading 15 GB at 3.35 TB/s, all but the embedding of 1 GB, is a decode step's floor.
    read = 8030261248 - 128256 * 4096
    assert model.step_time(batch_of((1, 0))) == pytest.approx(2 * read / 3350e9, rel=1e-3)
    known = json.loads((Path(__file__).parents[2] / "sim" / "costs" / "hardware.json").read_text())
    assert all(entry["source"] for kind in known.values() for entry in kind.values())
    for hardware in known["hardware"]:
        for name in known["models"]:
            CostModel.roofline(hardware, name, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h100", "qwen2.5-7b"), r"hardware: found 'h100', expected one of a100-80gb, h100-sxm"),
        (("l4", "gpt-5"), r"models: found 'gpt-5', expected one of smollm2-135m, llama-3.1-8b"),
        (("h100-sxm", "llama-3.1-70b"), r"num_devices: found 1 for 141.1 GB of weights, expected more"),
        (("l4", "qwen2.5-7b", 0), r"num_devices: found 0, expected a positive integer"),
    ],
)  # fmt: skip
def test_a_roofline_that_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline(*arguments)
    with pytest.raises(ConfigError, match=r"efficiency: found 0, expected a number above 0 and up to 1"):
        CostModel.roofline("l4", "qwen2.5-7b", efficiency=0)
    with pytest.raises(ConfigError, match=r"step_overhead_s: found -1, expected seconds from 0"):
        CostModel.roofline("l4", "qwen2.5-7b", step_overhead_s=-1)


def test_a_misspelt_option_of_a_roofline_is_one_error_that_names_those_that_there_are() -> None:
    expected = "found 'efficency', expected one of efficiency, step_overhead_s, sequence_overhead_s"
    with pytest.raises(ConfigError, match=f"roofline: {expected}"):
        CostModel.roofline("l4", "smollm2-135m", efficency=0.5)
    with pytest.raises(ConfigError, match="efficiency: found 'half', expected a number above 0 and up to 1"):
        CostModel.roofline("l4", "smollm2-135m", efficiency="half")  # type: ignore[arg-type]


def step_log(path: Path, **changes: Any) -> Path:
    """Two steps, the second one changed."""
    costs = {"recompute_token_s": 0.001, "swap_block_s": 0.002}
    first = {"step": 0, "start_s": 0.5, "duration_s": 0.25, "costs": costs}
    second = {"step": 1, "start_s": 2.0, "duration_s": 0.125, "costs": costs | {"swap_block_s": 0.5}}
    path.write_text("".join(json.dumps(record) + "\n" for record in (first, second | changes)))
    return path


def test_recorded_steps_start_and_last_as_they_did(tmp_path: Path) -> None:
    model = CostModel.load(step_log(tmp_path / "steps.jsonl"))
    assert isinstance(model, RecordedCostModel)
    for _ in range(2):
        model.begin(EngineConfig())
        assert model.next_start(0.1) == 0.5
        assert model.costs == PreemptionCosts(0.001, 0.002)
        assert model.step_time(batch_of((1, 1))) == 0.25
        assert model.next_start(3.0) == 3.0
        assert model.costs == PreemptionCosts(0.001, 0.5)
        assert model.step_time(batch_of((9, 9))) == 0.125
    with pytest.raises(ProfileError, match=r"steps.jsonl: found 2 steps, expected more"):
        model.next_start(4.0)
    with pytest.raises(ConfigError, match=r"replicas: found 2 with a recorded run, expected 1"):
        model.begin(EngineConfig(), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, r"steps.jsonl:2: step: found .*, expected 1"),
        ({"duration_s": -1}, r"steps.jsonl:2: duration_s: found -1, expected a finite number of sec"),
        ({"start_s": None}, r"steps.jsonl:2: start_s: found nothing, expected"),
        ({"costs": {"recompute_token_s": 1}}, r"steps.jsonl:2: costs.swap_block_s: found nothing, expected"),
    ],
)  # fmt: skip
def test_a_damaged_step_log_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=message):
        CostModel.load(step_log(tmp_path / "steps.jsonl", **changes))


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"missing.json: cannot be read: No such file"):
        CostModel.load(tmp_path / "missing.json")
    for text, message in (
        ("", r"found malformed JSON in line 1, column 1 \(.*, expected a profile as JSON"),
        ("[" * 100_000, r"found JSON beyond limits \(.*, expected a profile as JSON"),
        ("[1]", r"profile: found \[1\], expected an object with named fields"),
        ("{}", r"format: found nothing, expected 'pagellm-profile'"),
        ("\x00", r"expected a profile as JSON"),
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(ProfileError, match=f"other.json: .*{message}"):
            CostModel.load(tmp_path / "other.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"binary: found b'\\xff\\xfe', expected UTF-8"):
        CostModel.load(tmp_path / "binary")
    with pytest.raises(ProfileError, match=r"cannot be read: Is a directory"):
        CostModel.load(tmp_path)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30)), min_size=1, max_size=5), st.integers(1, 12))
def test_with_a_window_only_the_tokens_that_are_seen_count(rows: list[tuple[int, int]], window: int) -> None:
    num_decodes, decode_context, prefills = shape_of(batch_of(*rows), window)
    assert num_decodes == sum(count == 1 for count, _ in rows)
    assert decode_context == sum(min(before, window - 1) for count, before in rows if count == 1)
    chunks = [row for row in reversed(rows) if row[0] > 1]
    for (count, before), (as_many, seen_before) in zip(chunks, prefills, strict=True):
        pairs = sum(min(before + i + 1, window) for i in range(count))
        fewest = count * (count + 1) // 2  # of a chunk that sees all of itself
        assert as_many == count
        assert pairs - count < count * seen_before + fewest <= max(pairs, fewest)


def test_a_roofline_reads_no_more_context_than_the_window_has() -> None:
    model = RooflineCostModel(ROUND_HARDWARE, ROUND_MODEL)
    near, far = batch_of((1, 49)), batch_of((1, 100_000))
    model.begin(model.fill(EngineConfig(num_blocks=9, window=50)))
    assert model.step_time(far) == model.step_time(near)
    model.begin(model.fill(EngineConfig(num_blocks=9)))
    assert model.step_time(far) > model.step_time(near)
