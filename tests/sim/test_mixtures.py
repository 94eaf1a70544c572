"""Mixtures of experts and latent attention: sizes against published counts, and each operator by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagellm.engine import CheckpointError, ConfigError, EngineConfig
from pagellm.engine.models.shape import read_shape
from pagellm.engine.scheduling.batch import PreemptionCosts
from pagellm.sim import CostModel
from pagellm.sim.costs.decoder import Layers, Model, load_model
from pagellm.sim.costs.experts import UnevenExperts, read_loads, zipf_loads
from pagellm.sim.costs.mixtures import read_mixture
from tests.conftest import ARCHITECTURES
from tests.sim.batches import batch_of
from tests.sim.test_roofline import bare

# config.json of the models that they are named after, what of it is a size.
COMMON = {"tie_word_embeddings": False}
MIXTRAL = COMMON | {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": None,
}  # fmt: skip
QWEN3 = COMMON | {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "vocab_size": 151936, "max_position_embeddings": 40960, "sliding_window": None,
}  # fmt: skip
QWEN2 = COMMON | {
    "model_type": "qwen2_moe", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 8,
    "moe_intermediate_size": 2560, "shared_expert_intermediate_size": 20480, "vocab_size": 151936,
    "max_position_embeddings": 131072, "sliding_window": 65536, "use_sliding_window": False,
}  # fmt: skip
DEEPSEEK = COMMON | {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "vocab_size": 129280, "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8"},
}  # fmt: skip
GPT_OSS = COMMON | {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
    "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072, "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
SCOUT = {
    "model_type": "llama4",
    "text_config": COMMON | {
        "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
        "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1, "attention_chunk_size": 8192, "vocab_size": 202048,
        "max_position_embeddings": 10485760,
    },
}  # fmt: skip


def model_of(config: dict[str, Any], tmp_path: Path) -> Model:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load_model(str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("config", "num_parameters", "active"),
    [  # as the models' pages have them
        (MIXTRAL, 46.7028e9, 12.88e9),
        (QWEN3, 30.5321e9, 3.35e9),
        (QWEN2, 57.409e9, 14.25e9),
        (DEEPSEEK, 671.026e9, 37.55e9),
        (GPT_OSS, 116.83e9, 5.13e9 + 0.58e9),  # whose page leaves the embedding out of what is active
        (SCOUT, 107.77e9, 17.17e9),
    ],
)
def test_sizes_are_those_that_are_published(
    config: dict[str, Any], num_parameters: float, active: float, tmp_path: Path
) -> None:
    model = model_of(config, tmp_path)
    assert model.num_parameters == pytest.approx(num_parameters, rel=2e-3)
    resting = sum(
        layer.count * (layer.num_experts - layer.experts_per_token) * layer.expert_parameters
        for layer in model.layers
    )
    assert model.num_parameters - resting == pytest.approx(active, rel=5e-3)


def test_layers_that_differ_are_told_apart(tmp_path: Path) -> None:
    dense, sparse = model_of(DEEPSEEK, tmp_path).layers
    assert (dense.count, dense.num_experts, sparse.count, sparse.num_experts) == (3, 0, 58, 256)
    assert sparse.intermediate_size == 9 * 2048
    assert model_of(DEEPSEEK, tmp_path).layer_bytes == 1.0
    assert [(kind.count, kind.window) for kind in model_of(GPT_OSS, tmp_path).layers] == [(18, 128), (18, 0)]
    assert [(kind.count, kind.window) for kind in model_of(SCOUT, tmp_path).layers] == [(36, 8192), (12, 0)]
    assert [kind.window for kind in model_of(QWEN2, tmp_path).layers] == [0]
    # Of 4.25 bits a number of an expert, and 16 of the others.
    oss = model_of(GPT_OSS, tmp_path)
    size = 0.53125 * oss.expert_parameters + 2 * oss.product_parameters
    assert oss.layer_bytes == pytest.approx(size / (oss.expert_parameters + oss.product_parameters))
    some = model_of(QWEN3 | {"mlp_only_layers": [0, 2], "decoder_sparse_step": 2}, tmp_path)
    assert {(kind.count, kind.num_experts) for kind in some.layers} == {(24, 0), (24, 128)}


def test_what_is_kept_of_a_token_is_latent_and_each_device_has_all_of_it(tmp_path: Path) -> None:
    model_of(DEEPSEEK, tmp_path)
    name = str(tmp_path / "config.json")
    numbers = 61 * (512 + 64)
    assert CostModel.roofline("h200-sxm", name, 8).block_bytes(64) == 8 * 64 * 2 * numbers
    # Of 135 GB that are used of each, weights take 84, and the logits of 1,024 sequences 3.
    costs = CostModel.roofline("h200-sxm", name, 8)
    free = costs.num_blocks(costs.settings({"block_size": 64})) * 64 * 2 * numbers
    assert 135e9 - 84e9 - 6e9 < free < 135e9 - 84e9 - 3e9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_topk": 2048}, "index_topk: found 2048, expected attention over all or the latest tokens"),
        (
            {"layer_types": ["linear_attention"] * 48},
            "layer_types: found 'linear_attention', expected full_at",
        ),
        (
            {"layer_types": ["full_attention"]},
            r"layer_types: found \['full_attention'\], expected 48 of them",
        ),
        (
            {"quantization_config": {"quant_method": "aqlm"}},
            "quantization_config.quant_method: found 'aqlm', expected fp8, fbgemm_fp8",
        ),
        ({"num_experts_per_tok": None}, "num_experts_per_tok: found nothing, expected a number"),
        ({"hidden_size": "big"}, "hidden_size: found 'big', expected a positive integer"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: found 0, expected an integer from 1 to 128"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok: found 129, expected an integer from 1 to 128"),
        ({"num_key_value_heads": 0}, "num_key_value_heads: found 0, expected a positive integer"),
        ({"layer_types": [[]] * 48}, r"layer_types: found \[\], expected full_attention or"),
        ({"quantization_config": {"quant_method": []}}, r"quant_method: found \[\], expected fp8, fbgemm"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: found 0, expected a positive integer"),
        ({"moe_layer_freq": [0, 1]}, r"moe_layer_freq: found \[0, 1\], expected a positive integer"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: found 3, expected a list"),
        ({"moe_layers": "odd"}, "moe_layers: found 'odd', expected a list"),
        (
            {"num_hidden_layers": 2**40},
            "num_hidden_layers: found 1099511627776, expected .* to 16384",
        ),
        ({"num_experts": 2**40}, "num_experts: found 1099511627776, expected .* to 131072"),
    ],
)
def test_what_would_change_the_work_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_of(QWEN3 | change, tmp_path)


# 2 layers of 400 numbers that all tokens meet and 8 experts of 100, of which each token meets 2.
MIXED = Model(
    num_parameters=2560, hidden_size=4, vocab_size=40,
    layers=(Layers(2, num_heads=2, num_kv_heads=2, head_dim=5, intermediate_size=6, product_parameters=400,
                   num_experts=8, experts_per_token=2, expert_parameters=100),),
)  # fmt: skip
PLAIN = replace(
    MIXED, num_parameters=960,
    layers=(replace(MIXED.layers[0], num_experts=0, experts_per_token=0, expert_parameters=0),),
)  # fmt: skip


def test_experts_are_read_that_a_batch_meets() -> None:
    for num_sequences, met in ((1, 2.0), (2, 8 * (1 - (6 / 8) ** 2)), (30, 8 * (1 - (6 / 8) ** 30))):
        batch = batch_of(*[(1, 49)] * num_sequences)
        more = bare(model=MIXED).step_time(batch) - bare(model=PLAIN).step_time(batch)
        assert more == pytest.approx(2 * met * 100 * 2 / 1e4)
    # 10,000 tokens with 2 experts each: 2 operations a number, in 2 layers.
    prompt = batch_of((10_000, 0))
    more = bare(model=MIXED).step_time(prompt) - bare(model=PLAIN).step_time(prompt)
    assert more == pytest.approx(10_000 * 2 * 2 * 100 * 2 / 1e6)
    # As long again as their share says, where an expert gets as few tokens as do not fill the device.
    slow = bare(model=MIXED, product_fill_tokens=1e9).step_time(prompt)
    assert slow == pytest.approx(
        bare(model=PLAIN, product_fill_tokens=1e9).step_time(prompt) + 2 * more, rel=1e-4
    )


def test_experts_weigh_in_memory_and_in_what_a_recomputed_token_costs() -> None:
    config = EngineConfig(block_size=10, max_num_batched_tokens=1, max_num_seqs=1)
    fewer = bare(model=PLAIN).num_blocks(config) - bare(model=MIXED).num_blocks(config)
    assert fewer == pytest.approx(1600 * 2 / (10 * 80), abs=1)
    model = bare(model=MIXED)
    model.begin(config)
    plain = bare(model=PLAIN)
    plain.begin(config)
    assert model.costs == PreemptionCosts(
        pytest.approx(plain.costs.recompute_token_s + 2 * 2 * 2 * 100 / 1e6), plain.costs.swap_block_s
    )


def test_whole_experts_on_each_device_take_exchanges_of_their_own() -> None:
    batch = batch_of((1, 49))
    tensor = bare(model=MIXED, num_devices=2).step_time(batch)
    expert = bare(model=MIXED, num_devices=2, experts="expert").step_time(batch)
    # In the place of an all-reduce of 4 numbers of 2 bytes in 2 layers, of which a ring of 2 sends each once,
    # 2 copies of a state go to their experts and come back: half of the tokens' stay where they are, and
    # each of the 2 devices sends half of them. Two exchanges begin where one did.
    saved, sent = 2 * 8 / 1e3, 2 * 2 * 2 * 8 * 0.5 / 2 / 1e3
    assert expert - tensor == pytest.approx(sent - saved + 2 * 0.25)
    odd = replace(MIXED, layers=(replace(MIXED.layers[0], num_experts=7),))
    with pytest.raises(
        ConfigError, match="num_devices: found 2 for 7 experts, expected a number that divides"
    ):
        bare(model=odd, num_devices=2, experts="expert")
    with pytest.raises(ConfigError, match="experts: found 'data', expected auto, tensor, expert"):
        bare(model=MIXED, experts="data")


def test_latent_attention_meets_what_is_kept_or_widens_it() -> None:
    layer = Layers(
        2, num_heads=2, num_kv_heads=1, head_dim=7, intermediate_size=6, product_parameters=400,
        latent_dim=10, rope_dim=3, value_dim=4,
    )  # fmt: skip
    model = replace(PLAIN, layers=(layer,))
    without = bare(
        model=replace(model, layers=(replace(layer, latent_dim=0, rope_dim=0, head_dim=0, num_heads=0),))
    )
    vectors = 2 * 2 * 2 * (2 + 1) * 7 / 1e4
    # 50 tokens: 13 numbers of 2 bytes each in 2 layers, which 2 x 2 x 23 operations do not outlast.
    decode = bare(model=model).step_time(batch_of((1, 49))) - without.step_time(batch_of((1, 49)))
    assert decode == pytest.approx(50 * 2 * 13 * 2 / 1e4 + vectors)
    # 300 tokens after 100: pairs of 2 heads of 7 and 4 numbers; the 100 are widened to 4 + 4 a head.
    batch = batch_of((300, 100))
    prefill = bare(model=model).step_time(batch) - without.step_time(batch)
    pairs = 300 * 100 + 300 * 301 // 2
    widened = 100 * 2 * 2 * 10 * 2 * (4 + 4) / 1e6
    assert prefill == pytest.approx(pairs * 2 * 2 * 2 * (7 + 4) / 1e6 + widened + 300 * vectors)


FOUR = Layers(
    1, num_heads=2, num_kv_heads=2, head_dim=5, intermediate_size=12, product_parameters=100,
    num_experts=4, experts_per_token=2, expert_parameters=50,
)  # fmt: skip


def test_experts_that_are_chosen_alike_are_as_if_nothing_was_said_of_them() -> None:
    for num_tokens in (1, 7, 300):
        even = UnevenExperts(FOUR, [[1.0] * 4]).seconds(num_tokens, 2.0, 3.0, 0.0)
        chosen, met = 2 * num_tokens, 4 * (1 - 0.5**num_tokens)
        assert even == pytest.approx(max(chosen * 2.0, met * 3.0))
        assert UnevenExperts(FOUR, [[1.0] * 4], 2).seconds(num_tokens, 2.0, 3.0, 0.0) == pytest.approx(even)
    assert UnevenExperts(FOUR, [[1.0] * 4], 2).imbalance == 1.0


def test_the_device_with_the_busiest_experts_is_waited_for() -> None:
    # Of two choices a token, 0.8, 0.4, 0.4 and 0.4: the first two experts have 1.2 of them.
    uneven = UnevenExperts(FOUR, [[2.0, 1.0, 1.0, 1.0]], 2)
    assert uneven.imbalance == pytest.approx(1.2)
    # Arithmetic of 1.2 choices a token by one device of two, which has half of what all have.
    assert uneven.seconds(10, 1.0, 0.0, 0.0) == pytest.approx(2 * 10 * 1.2)
    met = 2 - 0.2**3 - 0.6**3
    assert uneven.seconds(3, 0.0, 5.0, 0.0) == pytest.approx(2 * met * 5)
    # Where all share each expert nobody waits, and fewer are met than if they were chosen alike.
    shared = UnevenExperts(FOUR, [[2.0, 1.0, 1.0, 1.0]])
    assert shared.imbalance == 1.0
    assert shared.seconds(10, 1.0, 0.0, 0.0) == pytest.approx(20)
    assert shared.seconds(3, 0.0, 5.0, 0.0) == pytest.approx(5 * (4 - 0.2**3 - 3 * 0.6**3))


def test_nothing_is_chosen_twice_by_one_token() -> None:
    # Of 2 choices the first takes one at most; the others share the second.
    uneven = UnevenExperts(FOUR, [[1000.0, 1.0, 1.0, 1.0]], 4)
    assert uneven.imbalance == pytest.approx(1 / 0.5)
    assert uneven.seconds(3, 1.0, 0.0, 0.0) == pytest.approx(4 * 3)


def test_each_layer_has_its_own_loads() -> None:
    two = replace(FOUR, count=2)
    rows = [[2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    assert UnevenExperts(two, rows, 2).imbalance == pytest.approx((1.2 + 1.0) / 2)
    assert UnevenExperts(two, rows, 2).seconds(10, 1.0, 0.0, 0.0) == pytest.approx((2 * 12 + 2 * 10) / 2)


def test_zipf_gives_each_rank_its_share() -> None:
    assert sorted(zipf_loads(4, 1.0), reverse=True) == [1.0, 1 / 2, 1 / 3, 1 / 4]
    assert zipf_loads(64, 1.0) == zipf_loads(64, 1.0) != sorted(zipf_loads(64, 1.0))


def test_a_skew_slows_devices_with_whole_experts_more(tmp_path: Path) -> None:
    batch = batch_of(*[(1, 100)] * 64)

    def slower(**given: Any) -> float:
        times = [
            CostModel.roofline("h100-sxm", "qwen3-30b-a3b", 4, expert_skew=skew, **given).step_time(batch)
            for skew in (0.0, 1.0)
        ]
        return times[1] / times[0]

    # A few tokens meet fewer experts, most of all where nobody waits for the busiest device.
    assert slower(experts="tensor") < slower(experts="expert") < 1.0
    prompt = batch_of((4000, 0))
    even, skewed = (
        CostModel.roofline("h100-sxm", "qwen3-30b-a3b", 4, experts="expert", expert_skew=skew).step_time(
            prompt
        )
        for skew in (0.0, 1.0)
    )
    assert skewed > 1.2 * even
    # A file of what was measured says the same as the law that it follows.
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps(zipf_loads(128, 1.0)))
    measured = CostModel.roofline("h100-sxm", "qwen3-30b-a3b", 4, experts="expert", expert_loads=str(loads))
    assert measured.step_time(prompt) == pytest.approx(skewed)
    assert read_loads(str(loads)) == [zipf_loads(128, 1.0)]
    loads.write_text(json.dumps([[1] * 128] * 48))
    alike = CostModel.roofline("h100-sxm", "qwen3-30b-a3b", 4, experts="expert", expert_loads=str(loads))
    assert alike.step_time(prompt) == pytest.approx(even)
    assert alike.identity() != measured.identity()


@pytest.mark.parametrize(
    ("loads", "model", "message"),
    [
        ([1] * 127, "qwen3-30b-a3b", "loads.json: found loads of 127 experts, expected 128"),
        ([[1] * 128] * 3, "qwen3-30b-a3b", "loads.json: found 3 lists, expected one for all layers, or one"),
        ([1] * 7 + [0] * 121, "qwen3-30b-a3b", "found 7 experts that are chosen, expected at least 8"),
        ([-1] * 128, "qwen3-30b-a3b", "loads.json: found -1, expected a number from 0"),
        ([0] * 128, "qwen3-30b-a3b", "loads.json: found an expert layer of zeros"),
        ([], "qwen3-30b-a3b", r"loads.json: found \[\], expected a list of how often"),
        ({"a": 1}, "qwen3-30b-a3b", "loads.json: found {'a': 1}, expected a list of how often"),
        ([1] * 8, "llama-3.1-8b", "expert_loads: found .*loads.json for a model without experts, expected"),
    ],
)  # fmt: skip
def test_loads_that_are_not_of_these_experts_are_refused(
    loads: Any, model: str, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(loads))
    with pytest.raises(ConfigError, match=message):
        CostModel.roofline("h100-sxm", model, 4, expert_loads=str(file))


@pytest.mark.parametrize("given", [{"expert_skew": 0.8}, {"experts": "expert"}, {"expert_loads": "x.json"}])
def test_what_is_said_of_experts_is_refused_where_there_are_none(given: dict[str, Any]) -> None:
    [(name, value)] = given.items()
    with pytest.raises(
        ConfigError, match=f"{name}: found {value} for a model without experts, expected none"
    ):
        CostModel.roofline("h100-sxm", "llama-3.1-8b", **given)


def test_a_skew_is_not_taken_beside_measured_loads() -> None:
    with pytest.raises(ConfigError, match=r"expert_skew: found 0\.8 beside expert_loads, expected one"):
        CostModel.roofline("h100-sxm", "qwen3-30b-a3b", expert_skew=0.8, expert_loads="x.json")


def test_a_skew_has_its_limits() -> None:
    with pytest.raises(ConfigError, match="expert_skew: found 11, expected a finite number from 0 to 10"):
        CostModel.roofline("h100-sxm", "qwen3-30b-a3b", expert_skew=11)
    with pytest.raises(ConfigError, match="expert_loads: found 3, expected the path of a file"):
        CostModel.roofline("h100-sxm", "qwen3-30b-a3b", expert_loads=3)
    with pytest.raises(ConfigError, match=r"no\.json: cannot be read"):
        CostModel.roofline("h100-sxm", "qwen3-30b-a3b", expert_loads="no.json")


@pytest.mark.parametrize(
    "name",
    [
        *("mixtral", "qwen2_moe", "qwen2_moe_dense", "qwen3_moe", "qwen3_moe_dense", "olmoe", "granitemoe"),
        *("granitemoeshared", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
        "glm4_moe_lite_layers",
    ],
)
def test_what_is_read_of_a_mixture_is_what_the_engine_serves(name: str) -> None:
    """Read in this process, without the compiler, and by the engine's own readers: the same layers."""
    served, read = read_shape(ARCHITECTURES / name / "config.json"), read_mixture(ARCHITECTURES / name)
    assert read is not None
    for own, engines in zip(read["layers"], served["layers"], strict=True):
        assert {key: own.get(key, engines[key]) for key in engines} == engines
    for key in ("hidden_size", "vocab_size", "tied_embeddings", "max_model_len"):
        assert read[key] == served[key]


@pytest.mark.parametrize("name", ["dbrx", "ernie4_5_moe", "granitemoehybrid_experts", "gemma4_text"])
def test_of_other_mixtures_the_engine_is_asked(name: str) -> None:
    model = load_model(str(ARCHITECTURES / name / "config.json"))
    layers = model.layers[-1]
    assert layers.num_experts > layers.experts_per_token > 1
    assert layers.touched_experts(1) == pytest.approx(layers.experts_per_token)
    assert layers.touched_experts(1000) == pytest.approx(layers.num_experts)
    shape = read_shape(ARCHITECTURES / name / "config.json")
    assert model.num_parameters == shape["num_parameters"]


def test_recurrent_layers_are_refused_by_the_engine(tmp_path: Path) -> None:
    config = json.loads((ARCHITECTURES / "granitemoehybrid_experts" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["mamba", "attention"]}))
    with pytest.raises(CheckpointError, match="layer_types: found "):
        load_model(str(tmp_path / "config.json"))
