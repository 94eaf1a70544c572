"""Estimated step times: each operator by hand, what a device holds, and what is refused at the door."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagellm.__main__ import main
from pagellm.engine import CheckpointError, ConfigError, EngineConfig
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.models import read_spec
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.sim import CostModel, Simulator, Trace, TraceRequest, load_report
from pagellm.sim.costs.constants import CONSTANTS, FORMATS
from pagellm.sim.costs.decoder import Layers, Model, load_model
from pagellm.sim.costs.devices import Hardware, known, load_hardware
from pagellm.sim.costs.roofline import RooflineCostModel
from pagellm.sim.costs.source import CostSource
from tests.conftest import model_path
from tests.sim.batches import batch_of

ROOT = Path(__file__).parents[2]
TRACE = str(ROOT / "examples" / "traces" / "mooncake_conversation.jsonl")
# Every rate is reached and nothing is added, so that a time is one operator's.
BARE: dict[str, float | str] = {
    name: 1.0 if constant.high == 1 else 0.0 for name, constant in CONSTANTS.items()
}
# A million operations and 10,000 bytes a second.
DEVICE = Hardware(
    flops_per_s=1e6, memory_bytes=1e6, memory_bytes_per_s=1e4, link_bytes_per_s=1e3, host_bytes_per_s=100,
    link_latency_s=0.25, fp8_flops_per_s=2e6,
)  # fmt: skip
# Of 2 layers of 400 numbers and an output head of 40 x 4, which is the embedding.
TINY = Model(
    num_parameters=960, hidden_size=4, vocab_size=40,
    layers=(Layers(2, num_heads=2, num_kv_heads=2, head_dim=5, intermediate_size=6, product_parameters=400),),
)  # fmt: skip
# What TINY's tokens cost beside, in numbers of 2 bytes: two norms of 4 states of 4; queries and keys, 4 heads
# of 5, twice; the feed-forward's 6, thrice; in each of 2 layers. And a sampled one: 40 logits of 4 bytes,
# thrice.
VECTORS = 2 * 2 * (2 * 4 * 4 + 2 * 4 * 5 + 3 * 6) / 1e4
SAMPLE = 3 * 4 * 40 / 1e4


def bare(hardware: Hardware = DEVICE, model: Model = TINY, num_devices: int = 1, **given: Any) -> Any:
    return RooflineCostModel(hardware, model, num_devices, **BARE | given)


def test_a_step_is_the_sum_of_its_operators_each_the_longer_of_arithmetic_and_traffic() -> None:
    # One token after 49: its products read 800 numbers of 2 bytes, its head 160; 50 tokens of KV, each of 2
    # layers, keys and values, 2 heads of 5 numbers of 2 bytes.
    decode = (2 * 800 + 2 * 160) / 1e4 + 50 * 2 * 2 * 2 * 5 * 2 / 1e4
    assert bare().step_time(batch_of((1, 49))) == pytest.approx(decode + VECTORS + SAMPLE)
    # A prompt of 1000: 2 operations a number and token, and 4 a pair, head and dimension of it, in 2 layers;
    # the head still reads its 160 numbers.
    pairs = 1000 * 1001 // 2
    prefill = 1000 * 2 * 800 / 1e6 + pairs * 4 * 2 * 5 * 2 / 1e6 + 2 * 160 / 1e4
    assert bare().step_time(batch_of((1000, 0))) == pytest.approx(prefill + 1000 * VECTORS + SAMPLE)
    # Together the products are the prompt's, one token more; neither attention hides behind the other.
    both = prefill + 2 * 800 / 1e6 + 50 * 80 / 1e4
    assert bare().step_time(batch_of((1, 49), (1000, 0))) == pytest.approx(both + 1001 * VECTORS + 2 * SAMPLE)


def test_a_head_that_nobody_asks_takes_no_time() -> None:
    batch = batch_of((1000, 0))
    asked = bare().step_time(batch)
    batch.samples[0] = False
    assert asked - bare().step_time(batch) == pytest.approx(2 * 160 / 1e4 + SAMPLE)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("product_flops", 1001 * 2 * 800 / 1e6),
        ("head_bytes", 2 * 160 / 1e4),
        ("prefill_flops", 500_500 * 4 * 2 * 5 * 2 / 1e6),
        ("decode_bytes", 50 * 80 / 1e4),
        ("vector_bytes", 1001 * VECTORS + 2 * SAMPLE),
        ("product_bytes", 0.0),
        ("prefill_bytes", 0.0),
        ("head_flops", 0.0),
        ("decode_flops", 0.0),
    ],
)
def test_a_share_of_a_peak_rate_lengthens_its_own_operator_alone(name: str, seconds: float) -> None:
    batch = batch_of((1, 49), (1000, 0))
    if not seconds:  # the other side of this operator is the longer one, and stays it
        assert bare(**{name: 0.9}).step_time(batch) == pytest.approx(bare().step_time(batch))
    else:
        expected = bare().step_time(batch) + seconds
        assert bare(**{name: 0.5}).step_time(batch) == pytest.approx(expected)


def test_overheads_are_of_a_step_a_layer_and_a_sequence() -> None:
    batch = batch_of((1, 49), (1, 49))
    told = bare(step_overhead_s=3, layer_overhead_s=0.5, sequence_overhead_s=0.25)
    assert told.step_time(batch) == pytest.approx(bare().step_time(batch) + 3 + 2 * 0.5 + 2 * 0.25)
    # In the products of a prompt, whose arithmetic is the longer side: half as long again with 300 tokens.
    for count in (300, 1000):
        prompt = batch_of((count, 0))
        filled = bare(product_fill_tokens=300).step_time(prompt)
        longer = 300 / (count + 300) * count * 2 * 800 / 1e6
        assert filled == pytest.approx(bare().step_time(prompt) + longer)


def test_devices_share_products_and_heads_and_exchange_what_they_have() -> None:
    batch = batch_of((1, 49), (1, 49))
    # Norms are of whole states on each device; all else is halved. Two sums a layer and token of 4 numbers of
    # 2 bytes, sent 2 * (2 - 1) / 2 times, each a quarter of a second late; and half of 40 logits of 2 bytes.
    norms = 2 * 2 * 2 * 4 * 4 / 1e4
    halved = (2 * 960 / 1e4 + 100 * 80 / 1e4) / 2 + 2 * (norms + (VECTORS - norms) / 2 + SAMPLE)
    exchanged = 2 * 2 * 0.25 + 2 * (2 * 2 * 4 * 2) / 1e3 + 2 * 40 * 2 / 2 / 1e3
    assert bare(num_devices=2).step_time(batch) == pytest.approx(halved + exchanged)


def test_layers_cost_what_they_see() -> None:
    [layer] = TINY.layers
    near = replace(layer, count=1, window=50)
    mixed = replace(TINY, layers=(near, replace(layer, count=1)))
    extra = lambda model, before: model.step_time(batch_of((1, before))) - model.step_time(batch_of((1, 49)))  # noqa: E731
    assert extra(bare(model=mixed), 1049) == pytest.approx(1000 * 40 / 1e4)  # one of the two layers
    all_near = bare(model=replace(TINY, layers=(replace(near, count=2),)))
    assert extra(all_near, 1049) == 0
    assert (all_near.window, bare(model=mixed).window) == (50, None)
    # Settings narrow the layers that see more.
    narrowed = bare(model=mixed)
    narrowed.begin(narrowed.fill(EngineConfig(num_blocks=99, window=100)))
    assert extra(narrowed, 1049) == pytest.approx(50 * 40 / 1e4)
    # A prompt of 3 after 100 has 3 * 50 pairs in one layer, and 101 + 102 + 103 in the other; 48 of context.
    prompt = bare(model=mixed, product_flops=1.0)
    slower = bare(model=mixed, prefill_bytes=1e-3)
    read = (48 + 3 + 100 + 3) * 40 / 1e4
    assert slower.step_time(batch_of((3, 100))) - prompt.step_time(batch_of((3, 100))) == pytest.approx(
        1000 * read - read
    )


def test_formats_change_bytes_and_rates() -> None:
    batch, prompt = batch_of((1, 49)), batch_of((1000, 0))
    for name, num_bytes in FORMATS.items():
        changed = bare(weights=name, kv=name)
        # Embedding and head stay in 16 bits.
        decode = (num_bytes * 800 + 2 * 160) / 1e4 + 50 * 40 * num_bytes / 1e4
        assert changed.step_time(batch) == pytest.approx(decode + VECTORS + SAMPLE)
        assert changed.block_bytes(16) == int(16 * 40 * num_bytes)
        faster = 1000 * 2 * 800 / 2e6 if name == "fp8" else 0  # the device has a rate of its own for it alone
        assert changed.step_time(prompt) == pytest.approx(bare().step_time(prompt) - faster)
    in_file = bare(model=replace(TINY, layer_bytes=0.5, head_bytes=1.0))
    assert in_file.step_time(batch) == pytest.approx(
        (0.5 * 800 + 160) / 1e4 + 50 * 80 / 1e4 + VECTORS + SAMPLE
    )


def test_transfers_are_priced_by_the_block() -> None:
    model = bare()
    model.begin(EngineConfig(block_size=20))
    block_bytes = 20 * 80
    assert model.costs == PreemptionCosts(2 * 800 / 1e6 + VECTORS, block_bytes / 100)
    batch = batch_of((1, 49))
    before = model.step_time(batch)
    kinds = (TransferKind.COPY, TransferKind.SWAP_OUT, TransferKind.SWAP_IN)
    batch.transfers.extend(Transfer(kind, 0, 1, batch.sequences[0]) for kind in kinds)
    assert model.step_time(batch) == pytest.approx(before + 2 * block_bytes / 1e4 + 2 * block_bytes / 100)


@pytest.mark.parametrize(
    ("hardware", "model", "num_devices", "given", "num_blocks"),
    [  # what recorded runs of vLLM, 0.19, 0.15.1 and 0.28, had
        (
            "rtx-pro-6000-server",
            "llama-3.1-8b",
            1,
            {"max_num_batched_tokens": 2048, "max_num_seqs": 128},
            35913,
        ),
        ("rtx-4090", "llama-3.1-8b", 1, {"max_num_batched_tokens": 2048, "max_num_seqs": 256}, 2588),
        ("h100-sxm", "llama-3.1-70b", 4, {"max_num_batched_tokens": 8192, "max_num_seqs": 128}, 30251),
    ],
)
def test_blocks_are_those_that_a_server_has(
    hardware: str, model: str, num_devices: int, given: dict[str, Any], num_blocks: int
) -> None:
    costs = CostModel.roofline(hardware, model, num_devices)
    assert costs.num_blocks(costs.settings(given)) == pytest.approx(num_blocks, rel=0.02)


def test_blocks_are_what_weights_and_the_largest_step_leave() -> None:
    model = bare(num_devices=2, memory_utilization=0.5, driver_bytes=1000, graph_bytes=10, sampler_bytes=3)
    free = 0.5 * (1e6 - 1000) - 10 - 960 * 2 / 2
    states = 3 * 100 * (6 / 2 + 4) * 2
    config = EngineConfig(block_size=10, max_num_batched_tokens=100, max_num_seqs=1)
    assert model.num_blocks(config) == int((free - states) // (10 * 40))
    many = replace(config, max_num_seqs=1000)
    assert model.num_blocks(many) == int((free - 1000 * 40 * 3) // (10 * 40))
    with pytest.raises(ConfigError, match=r"num_devices: found 2, whose memory has no room for a KV block"):
        model.num_blocks(replace(config, max_num_seqs=100_000))


def test_settings_follow_the_hardware_where_none_are_given() -> None:
    large, small = (CostModel.roofline(name, "qwen2.5-0.5b") for name in ("h100-sxm", "l4"))
    assert large.settings({}) == EngineConfig(max_num_batched_tokens=8192, max_num_seqs=1024)
    assert small.settings({"max_num_seqs": 9}) == EngineConfig(max_num_batched_tokens=2048, max_num_seqs=9)


def test_larger_chunks_are_better_as_on_servers() -> None:
    # AISimulate of kernels measured on H100, the whole of this trace, chunks of 512, 2,048 and 8,192: 322,
    # 366 and 366 output tokens a second, the first token after 76, 59 and 58 s.
    trace = Trace.load(TRACE).limited(60)
    costs = CostModel.roofline("h100-sxm", "llama-3.1-8b")
    times = []
    for tokens in (512, 2048, 8192):
        config = costs.settings({"max_num_batched_tokens": tokens, "block_size": 64})
        times.append(Simulator(config, costs, rate_factor=8).replay(trace).summary["ttft_s"]["mean"])
    assert times[0] > 1.05 * times[1]
    assert times[1] > times[2]


@pytest.mark.parametrize("clients", [None, 1])
def test_a_front_end_delays_what_a_client_sees_of_the_first_token(clients: int | None) -> None:
    # Each alone: they neither wait for each other nor share a step.
    requests = [TraceRequest(arrival_time=100.0 * n, output_len=3, prompt_len=50 + n) for n in range(3)]
    trace = Trace(lambda: iter(requests))
    plain, delayed = (
        Simulator(
            EngineConfig(), CostModel.roofline("l4", "smollm2-135m", frontend_s=seconds), clients=clients
        )
        .replay(trace)
        .summary
        for seconds in (0.0, 0.25)
    )
    for name in ("ttft_s", "queue_s", "e2e_s"):
        assert delayed[name]["mean"] == pytest.approx(plain[name]["mean"] + 0.25)  # type: ignore[literal-required]
    assert delayed["tpot_s"]["mean"] == pytest.approx(plain["tpot_s"]["mean"])
    waits = 1 if clients is None else 3
    assert delayed["duration_s"] == pytest.approx(plain["duration_s"] + waits * 0.25)


def test_an_engine_on_a_gpu_schedules_a_step_ahead_unless_it_is_said_not_to() -> None:
    assert CostModel.roofline("l4", "smollm2-135m").schedules_ahead
    assert not CostModel.roofline("l4", "smollm2-135m", steps_ahead=0).schedules_ahead
    assert not CostModel.roofline("l4", "smollm2-135m", pipeline_parallel=2).schedules_ahead
    assert not CostModel.roofline("epyc-9654", "smollm2-135m").schedules_ahead


def test_the_known_machines_and_models_have_sources() -> None:
    data = known()
    assert all(entry["source"] for kind in data.values() for entry in kind.values())
    assert load_hardware("h100-sxm").memory_bytes == 81_559 * 2**20
    # The floor of a decode step: 15 GB of weights, all but the embedding of 1 GB, at 3.35 TB/s.
    costs = CostModel.roofline("h100-sxm", "llama-3.1-8b")
    floor = 2 * (8030261248 - 128256 * 4096) / 3350e9
    assert floor < costs.step_time(batch_of((1, 0))) < 1.6 * floor
    assert costs.name == "llama-3.1-8b on 1 x h100-sxm, roofline of assumed constants"
    for name in data["models"]:
        CostModel.roofline("b200", name)


CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 20, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def written(path: Path, **changes: Any) -> str:
    path.write_text(json.dumps(CONFIG | changes))
    return str(path)


def test_a_shape_is_read_of_a_configuration_without_weights(tmp_path: Path) -> None:
    model = load_model(written(tmp_path / "config.json"))
    products = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    layers = Layers(3, 4, 2, 2, intermediate_size=12, product_parameters=products)
    size = 3 * (products + 2 * 8) + 2 * 20 * 8 + 8
    assert model == Model(size, 8, (layers,), vocab_size=20, tied_embeddings=False, max_model_len=64)
    assert load_model(str(tmp_path)) == model
    sliding = {"model_type": "mistral", "sliding_window": 16, "tie_word_embeddings": True}
    near = load_model(written(tmp_path / "config.json", **sliding))
    assert (near.window, near.tied_embeddings, near.num_parameters) == (16, True, size - 160)


# All but those of whose head only the weights say that it is not the embedding.
CONFIGURED = sorted(
    path.parent.name
    for path in (ROOT / "tests" / "fixtures" / "models").glob("*/config.json")
    if path.parent.name != "llama_tied_other_head"
)


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_shape_is_the_same_with_and_without_the_weights(name: str) -> None:
    path = model_path(name)
    without = load_model(str(path / "config.json"))
    with open_checkpoint(path) as checkpoint:
        spec = read_spec(checkpoint)
        used = {
            source.tensor
            for parts in (*spec.layers, spec.rest)
            for sources in parts.values()
            for source in sources
        }
        num_parameters = sum(math.prod(checkpoint.tensors[name].shape) for name in used)
    assert without.tied_embeddings == spec.arch.tied
    assert without.num_parameters == num_parameters
    sizes = [
        sum(source.size for part in ("qkv", "output", "up", "down") for source in parts[part])
        for parts in spec.layers
    ]
    assert without.product_parameters == sum(sizes)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "group_size": 128}}
BYTES = {"num_bits": 8, "type": "float", "strategy": "channel"}


@pytest.mark.parametrize(
    ("section", "name", "num_bytes", "arithmetic"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 1.0, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4 (GPTQ)", 0.5 + 2.5 / 128, "bf16"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8 (GPTQ)", 1.0, "bf16"),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "int4 (AWQ)", 0.5 + 2.5 / 64, "bf16"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "4-bit (bitsandbytes)", 0.5625, "bf16"),
        ({"load_in_8bit": True}, "int8 (bitsandbytes)", 1.0, "int8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4 (ModelOpt)", 0.5625, "fp4"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": GROUP}},
            "int4 (compressed-tensors)", 0.5 + 2 / 128, "bf16",
        ),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"a": {"weights": BYTES, "input_activations": BYTES}}},
            "fp8 (compressed-tensors)", 1.0, "fp8",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": BYTES}}},
            "fp8 (compressed-tensors)", 1.0, "bf16",
        ),
    ],
)  # fmt: skip
def test_a_configuration_says_how_its_weights_were_quantized(
    section: dict[str, Any], name: str, num_bytes: float, arithmetic: str, tmp_path: Path
) -> None:
    plain = load_model(written(tmp_path / "config.json"))
    path = written(tmp_path / "config.json", quantization_config=section)
    model = load_model(path)
    assert (model.quantizer, model.layer_bytes, model.arithmetic) == (name, num_bytes, arithmetic)
    assert replace(model, quantizer=None, layer_bytes=None, arithmetic="bf16") == plain
    costs = CostModel.roofline("h100-sxm", path)
    assert f"config.json in {name} on 1 x h100-sxm, roofline of assumed constants" in costs.name
    assert CostModel.roofline("h100-sxm", path, weights="bf16").name.endswith("with weights=bf16")


def test_fp8_weights_are_half_as_long_to_read_and_half_as_long_to_multiply(tmp_path: Path) -> None:
    fp8 = replace(TINY, layer_bytes=1.0, quantizer="fp8", arithmetic="fp8")
    assert bare(model=fp8).step_time(batch_of((1, 49))) == pytest.approx(
        bare(weights="fp8").step_time(batch_of((1, 49)))
    )
    prompt = batch_of((1000, 0))
    assert bare(model=fp8).step_time(prompt) == pytest.approx(bare(weights="fp8").step_time(prompt))
    assert bare(model=fp8, weights="bf16").step_time(prompt) == pytest.approx(bare().step_time(prompt))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "aqlm"}, "quantization_config.quant_method: found 'aqlm', expected fp8"),
        ({"quant_method": "gptq", "bits": 5}, "quantization_config.bits: found 5, expected 2, 3, 4 or 8 b"),
        ({"quant_method": "modelopt"}, "quantization_config.quant_algo: found nothing, expected FP8 or NV"),
        (
            {"quant_method": "compressed-tensors",
             "config_groups": {"a": GROUP, "b": {"weights": BYTES}}},
            r"config_groups: found \['a', 'b'\], expected groups that are quantized alike",
        ),
        ("fp8", "quantization_config: found 'fp8', expected an object"),
    ],
)  # fmt: skip
def test_a_quantizer_that_is_not_known_is_refused_by_name(section: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(written(tmp_path / "config.json", quantization_config=section))


def test_weights_that_mlx_wrote_are_refused_by_its_own_key(tmp_path: Path) -> None:
    path = written(tmp_path / "config.json", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(CheckpointError, match=r"config.json: quantization.quant_method: found nothing, exp"):
        load_model(path)


def test_how_a_model_samples_is_said_beside_its_configuration(tmp_path: Path) -> None:
    path = written(tmp_path / "config.json")
    for values, few in (({"top_p": 0.9}, True), ({"top_k": 20}, True), ({"temperature": 1.0}, False)):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        assert load_model(path).takes_top is few


def test_a_gguf_file_says_what_its_weights_take() -> None:
    model = load_model(str(model_path("gguf_llama_q8_0")))
    assert model.layer_bytes == pytest.approx(34 / 32)  # 32 numbers and a scale of 2 bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h100", "qwen2.5-7b"), r"hardware: found 'h100', expected one of a100-80gb, h100-sxm"),
        (("l4", "gpt-5"), r"models: found 'gpt-5', expected one of smollm2-135m, llama-3.1-8b"),
        (("h100-sxm", "llama-3.1-70b"), r"num_devices: found 1 for 141.1 GB of weights, expected more"),
        (("l4", "qwen2.5-7b", 0), r"num_devices: found 0, expected a positive integer"),
        (("h100-sxm", "llama-3.1-8b", 3), r"num_devices: found 3 for 32 heads and 8 KV heads, expected a nu"),
        (("h100-sxm", "qwen2.5-0.5b", 4), r"num_devices: found 4 for 14 heads and 2 KV heads"),
        (("h100-sxm", "smollm2-135m", 9), r"num_devices: found 9, expected a number that divides the 1536"),
    ],
)  # fmt: skip
def test_an_estimate_that_cannot_be_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline(*arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"product_flops": 0}, "product_flops: found 0, expected a number above 0 and up to 1"),
        ({"product_flops": 1.01}, "product_flops: found 1.01, expected a number above 0 and up to 1"),
        ({"product_flops": "half"}, "product_flops: found 'half', expected a number above 0 and up to 1"),
        ({"steps_ahead": 0.5}, "steps_ahead: found 0.5, expected 0 or 1"),
        ({"step_overhead_s": -1}, "step_overhead_s: found -1, expected a finite number from 0"),
        (
            {"efficency": 0.5},
            "roofline: found 'efficency', expected one of weights, kv, experts, expert_loads, ",
        ),
        ({"weights": "fp6"}, "weights: found 'fp6', expected auto, fp16, bf16, fp8, int8, int4, fp4"),
        ({"kv": 8.0}, "kv: found 8.0, expected auto, fp16"),
        ({"kv": ["fp8"]}, r"kv: found \['fp8'\], expected auto, fp16"),
    ],
)
def test_a_bad_constant_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline("l4", "smollm2-135m", **given)


def test_devices_with_fewer_kv_heads_than_there_are_devices_have_a_copy() -> None:
    costs = CostModel.roofline("h100-sxm", "llama-3.1-8b", 16)
    assert costs.block_bytes(16) == 2 * CostModel.roofline("h100-sxm", "llama-3.1-8b", 8).block_bytes(16)


def test_a_device_is_read_from_a_file_with_what_is_known_of_it(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    entry = {
        "flops_per_s": 1e14, "memory_bytes": 32e9, "memory_bytes_per_s": 1e12, "link_bytes_per_s": 1e10,
        "host_bytes_per_s": 1e10, "max_num_seqs": 7, "constants": {"product_bytes": 0.5, "decode_bytes": 0.6},
        "source": "measured",
    }  # fmt: skip
    path.write_text(json.dumps(entry))
    costs = CostModel.roofline(str(path), "smollm2-135m", product_bytes=0.7)
    assert costs.settings({}).max_num_seqs == 7
    assert (
        costs.name == "smollm2-135m on 1 x card.json, roofline of assumed constants, with product_bytes=0.7"
    )
    origins = {row["name"]: (row["value"], row["origin"]) for row in costs.constants_table()}
    assert origins["product_bytes"] == (0.7, "given")
    assert origins["decode_bytes"] == (0.6, "device")
    assert origins["head_bytes"] == (CONSTANTS["head_bytes"].default, "assumed")
    for change, message in (
        ({"memory_bytes": 0}, "card.json: memory_bytes: found 0, expected a number above 0"),
        ({"flops": 1}, "card.json: flops: found 1, expected no such field: one of flops_per_s"),
        ({"constants": {"speed": 1}}, "roofline: found 'speed', expected one of weights"),
        ({"constants": 3}, r"card.json: constants: found 3, expected an object"),
        ({"flops_per_s": None}, "card.json: flops_per_s: found nothing, expected a number above 0"),
    ):
        path.write_text(json.dumps(entry | change))
        with pytest.raises(ConfigError, match=message):
            CostModel.roofline(str(path), "smollm2-135m")
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"card.json"):
        CostModel.roofline(str(path), "smollm2-135m")


def test_a_configuration_that_the_engine_refuses_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_type: found 'mystery', expected an architecture"):
        CostModel.roofline("l4", written(tmp_path / "config.json", model_type="mystery"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json: not found; expected a Hugging"):
        CostModel.roofline("l4", str(tmp_path / "empty"))


def test_the_command_takes_files_and_constants_and_says_which_are_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path / "config.json", max_position_embeddings=200_000)
    report, page = tmp_path / "report.json", tmp_path / "report.html"
    command = ["replay", TRACE, "--limit", "5", "--roofline", f"l4,{config},2", "--set-cost", "kv=fp8"]
    command += ["--set-cost", "step_overhead_s=0.25", "--report", str(page), "-o", str(report)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "step times    estimated; 23 of 24 constants are assumed, not measured" in shown
    data = load_report(report).data
    assert data["model"].endswith(
        "config.json on 2 x l4, roofline of assumed constants, with kv=fp8, step_overhead_s=0.25"
    )
    assert data["summary"]["tpot_s"]["mean"] > 0.25
    assert data["config"]["max_num_batched_tokens"] == 2048
    assert {row["name"] for row in data["constants"]} == set(CONSTANTS)
    assert json.dumps(CONSTANTS["decode_bytes"].source)[1:-1] in page.read_text()
    for options, message in (
        (["--set-cost", "kv"], "set-cost: found 'kv', expected key=value"),
        (["--set-cost", "kv=fp8", "--set-cost", "kv=int8"], "set-cost: kv: found twice, expected one value"),
        (["--set-cost", "speed=2"], "roofline: found 'speed', expected one of weights, kv"),
    ):
        assert main(["replay", TRACE, "--roofline", "l4,smollm2-135m", *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["replay", TRACE, "--profile", "p.json", "--set-cost", "kv=fp8"]) == 2
    assert "set-cost: found kv without --roofline" in capsys.readouterr().err


def test_a_sweep_knows_its_points_by_all_that_they_follow_from(tmp_path: Path) -> None:
    config = written(tmp_path / "config.json")
    first = CostSource(roofline=("l4", config, 1)).hash()
    assert first == CostSource(roofline=("l4", config, 1)).hash()
    assert first != CostSource(roofline=("l4", config, 1), constants=(("kv", "fp8"),)).hash()
    written(tmp_path / "config.json", vocab_size=21)
    assert first != CostSource(roofline=("l4", config, 1)).hash()


def test_a_replay_of_a_configuration_loads_no_compiler(tmp_path: Path) -> None:
    config = written(tmp_path / "config.json")
    program = (
        "import sys\n"
        "from pagellm.sim import CostModel\n"
        f"CostModel.roofline('l4', {config!r})\n"
        "print(*sorted({'numpy', 'numba', 'llvmlite', 'pagellm.kernels'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
