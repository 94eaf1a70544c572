"""Settings and tensors of quantizers' directories that are refused by name, with what was expected."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pagellm.engine import CheckpointError
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.execution.weights import formats_of, load_weights
from pagellm.engine.models import read_spec
from pagellm.kernels.packing import FLOAT32, INT4
from tests.conftest import QUANTIZED

GROUP = "config_groups", "group_0"


def edited(tmp_path: Path, name: str, keys: dict[str, Any], *path: str) -> Path:
    """A copy of a fixture with these keys in its quantization_config, or in a part of it; None: without."""
    directory = tmp_path / name
    shutil.copytree(QUANTIZED / name, directory)
    config = json.loads((directory / "config.json").read_text())
    section = config["quantization_config"]
    for part in path:
        section = section[part]
    for key, value in keys.items():
        section.pop(key, None) if value is None else section.update({key: value})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def loaded(directory: Path) -> None:
    with open_checkpoint(directory) as checkpoint:
        spec = read_spec(checkpoint)
        load_weights(checkpoint, spec, formats_of(checkpoint, spec, "auto"), 8, show=False)


@pytest.mark.parametrize(
    ("name", "path", "keys", "message"),
    [
        ("gptq", (), {"bits": 3}, "bits: found 3, expected 4"),
        ("gptq", (), {"bits": True}, "bits: found True, expected 4"),
        ("gptq", (), {"group_size": 0}, "group_size: found 0, expected a positive integer, or -1"),
        ("gptq", (), {"group_size": 64}, r"has shape \(8, 128\), expected \(4, 128\)"),
        ("gptq", (), {"checkpoint_format": "marlin"}, "checkpoint_format: found 'marlin', expected"),
        ("gptq", (), {"is_marlin_format": True}, "is_marlin_format: found True, expected False"),
        ("gptq", (), {"dynamic": {"-:.*k_proj.*": {}}}, "k_proj: found quantized .*dynamic excludes it"),
        ("gptq", (), {"dynamic": {"+:.*k_proj": {"bits": 8}}}, r"dynamic: found '\+:.*', expected '-:' and"),
        ("gptq", (), {"dynamic": {"-:(": {}}}, r"dynamic: found '\(', expected a regular expression"),
        ("gptq", (), {"checkpoint_format": "gptq_v2"}, "found zero point 7, expected 8 for all, as"),
        ("gptq", (), {"rotated_by": 3}, "rotated_by: found 3, expected no such key"),
        (
            "gptq", (), {"modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            "down_proj: found quantized weights, expected others: .*in_block_to_quantize excludes it",
        ),
        (
            "gptq", (), {"dynamic": {"-:none": {}}, "modules_in_block_to_quantize": [["self_attn.q_proj"]]},
            "down_proj: found quantized .*dynamic or modules_in_block_to_quantize excludes it",
        ),
        ("gptq_order", (), {"desc_act": False}, "desc_act: found False, expected true: the g_idx"),
        ("awq", (), {"bits": 8}, "bits: found 8, expected 4"),
        ("awq", (), {"version": "gemv"}, "version: found 'gemv', expected 'gemm'"),
        ("awq", (), {"zero_point": False}, "zero_point: found False, expected True"),
        ("awq", (), {"modules_to_not_convert": ["mlp"]}, "modules_to_not_convert excludes it"),
        ("awq", (), {"modules_to_not_convert": "mlp"}, "modules_to_not_convert: found 'mlp', expected a"),
        ("w4a16", (), {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: found .*, expected none"),
        ("w4a16", (), {"format": "marlin-24"}, "format: found 'marlin-24', expected 'pack-quantized' or"),
        ("w4a16", (), {"ignore": ["lm_head", "re:.*down_proj"]}, "down_proj: found quantized.*ignore excl"),
        ("w4a16", (), {"ignore": ["re:("]}, r"ignore: found '\(', expected a regular expression"),
        ("w4a16", (), {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config.format: found"),
        ("w4a16", (), {"transform_config": {"config_groups": {}}}, "transform_config: found"),
        ("w4a16", GROUP, {"targets": ["re:.*mlp.*"]}, "no group of .*config_groups targets it"),
        ("w4a16", GROUP, {"output_activations": {"num_bits": 8}}, "group_0.output_activations: found"),
        ("w4a16", (*GROUP, "weights"), {"num_bits": 8}, "weights.symmetric|weights.strategy|format"),
        ("w4a16", (*GROUP, "weights"), {"num_bits": 3}, "weights.num_bits: found 3, expected 4 or 8"),
        ("w4a16", (*GROUP, "weights"), {"group_size": 32}, r"has shape \(128, 2\), expected \(128, 8\)"),
        ("w4a16", (*GROUP, "weights"), {"dynamic": True}, "weights.dynamic: found True, expected False"),
        ("w4a16", (*GROUP, "weights"), {"rounding": "up"}, "weights.rounding: found 'up', expected no"),
        ("w4a16_zeros", (*GROUP, "weights"), {"symmetric": True}, "weight_zero_point has no place"),
        ("w4a16", (*GROUP, "weights"), {"actorder": "group"}, "weight_g_idx is missing"),
        ("w4a16", (*GROUP, "weights"), {"actorder": True}, "weight_g_idx is missing"),
        ("w4a16_column", (*GROUP, "weights"), {"actorder": "group"}, "actorder: found 'group', expected"),
        ("w8a8", (*GROUP, "weights"), {"actorder": "group"}, "actorder: found 'group', .* beside 8"),
        ("w4a16_column", (*GROUP, "weights"), {"symmetric": False}, "weight_zero_point is missing"),
        ("w8a8", (*GROUP, "input_activations"), {"dynamic": False}, "dynamic: found False, expected True"),
        ("w8a8", (*GROUP, "input_activations"), {"num_bits": 4}, "input_activations.num_bits: found 4"),
        ("w8a8", GROUP, {"input_activations": None}, "input_activations: found None, expected those of W8A8"),
        ("fp8_block", (), {"fmt": "e5m2"}, "fmt: found 'e5m2', expected 'e4m3'"),
        ("fp8_block", (), {"weight_block_size": [64, 64]}, r"has shape \(1, 2\), expected \(2, 4\)"),
        ("fp8_block", (), {"weight_block_size": 128}, "weight_block_size: found 128, expected two positive"),
        ("fp8_tensor", (), {"activation_scheme": "block"}, "activation_scheme: found 'block'"),
        ("fp8_tensor", (), {"modules_to_not_convert": ["model.layers.0"]}, "modules_to_not_convert excludes"),
        ("nf4", (), {"bnb_4bit_quant_type": "fp4"}, "found quant_type 'nf4', expected 'fp4'"),
        ("nf4", (), {"load_in_8bit": True}, "load_in_4bit: found True, expected one of"),
        ("nf4", (), {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage: found 'bfloat16'"),
        ("nf4", (), {"_load_in_8bit": True}, "_load_in_8bit: found True, expected False"),
        ("fp8_block", (), {"modules_to_not_convert": ""}, "modules_to_not_convert: found '', expected a"),
        ("llm_int8", (), {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight: found True"),
        ("llm_int8", (), {"llm_int8_skip_modules": ["o_proj"]}, "llm_int8_skip_modules excludes it"),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_so_is_refused_by_name(
    tmp_path: Path, name: str, path: tuple[str, ...], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(edited(tmp_path, name, keys, *path))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 700


def replaced(tensor: str, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        value = tensors.pop(f"model.layers.0.{tensor}")
        if "to" in changes:
            tensors[f"model.layers.0.{tensor}"] = changes["to"](value)
        if "name" in changes:
            tensors[f"model.layers.0.{changes['name']}"] = value

    return change


def with_first(value: Any) -> Callable[[Any], Any]:
    """The same tensor with another first element."""

    def change(tensor: Any) -> Any:
        tensor = tensor.copy()
        tensor.reshape(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq", replaced("mlp.up_proj.scales"), "mlp.up_proj.scales is missing"),
        ("gptq", replaced("mlp.up_proj.qzeros", to=lambda t: t[:1]), r"qzeros has shape \(1, 32\), expected"),
        ("gptq", replaced("mlp.up_proj.g_idx", to=with_first(4)), "found group 4 of an input, expected one"),
        ("gptq", replaced("mlp.up_proj.g_idx", to=lambda t: t[:8]), r"g_idx has shape \(8,\), expected"),
        ("gptq", replaced("mlp.up_proj.scales", to=with_first(np.inf)), "a scale that is no finite number"),
        ("gptq", replaced("mlp.up_proj.qweight", to=lambda t: t.astype(np.int64)), "qweight has type I64"),
        (
            "gptq", replaced("mlp.up_proj.qweight", name="mlp.up_proj.weights"),
            "tensor model.layers.0.mlp.up_proj.weight is missing",
        ),
        ("w4a16_column", replaced("mlp.up_proj.weight_shape", to=with_first(9)), "found .9, 128"),
        ("w4a16_order", replaced("mlp.up_proj.weight_g_idx", to=with_first(-1)), "found group -1 of an inp"),
        ("w4a16_order", replaced("mlp.up_proj.weight_g_idx", to=with_first(2)), "found group 2 of an input"),
        ("w4a16_order", replaced("mlp.up_proj.weight_g_idx", to=lambda t: t[:8]), r"g_idx has shape \(8,\)"),
        ("llm_int8", replaced("mlp.up_proj.SCB", to=lambda t: t[:3]), r"SCB has shape \(3,\), expected \(1,"),
        ("nf4", replaced("mlp.up_proj.weight.absmax", to=lambda t: t[:3]), r"absmax has shape \(3,\), exp"),
        ("nf4", replaced("mlp.up_proj.weight.quant_map", to=with_first(-2)), "found another table than that"),
        (
            "nf4",
            replaced("mlp.up_proj.weight.quant_state.bitsandbytes__nf4", to=lambda t: np.zeros(10, np.uint8)),
            "quant_state.bitsandbytes__nf4: not JSON",
        ),
        (
            "nf4",
            replaced(
                "mlp.up_proj.weight.quant_state.bitsandbytes__nf4",
                to=lambda t: np.frombuffer(b'{"shape": [256], "blocksize": 64}', np.uint8),
            ),
            r"shape: found \[256\], expected two positive integers",
        ),
        ("llm_int8", replaced("mlp.up_proj.weight_format", to=lambda t: np.uint8([1])), "another layout"),
        ("llm_int8", replaced("mlp.up_proj.SCB", to=with_first(np.nan)), "a scale that is no finite number"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    directory = edited(tmp_path, name, {})
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        loaded(directory)


def test_blocks_of_fp8_are_those_of_transformers_where_nothing_is_said(tmp_path: Path) -> None:
    directory = edited(tmp_path, "fp8_block", {"weight_block_size": None})
    loaded(directory)
    with open_checkpoint(directory) as checkpoint:
        assert "blocks of 128 x 128" in checkpoint.quantization


def test_a_weight_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    """The last byte of either sign in E4M3; NumPy has no such type, so the file's own byte is changed."""
    directory = edited(tmp_path, "fp8_channel", {})
    with open_checkpoint(directory) as checkpoint:
        tensor = checkpoint.tensors["model.layers.0.mlp.up_proj.weight"]
        place = tensor.offset + 1000
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[place] = 0xFF
    (directory / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="rows 0 to 255: found a weight that is not a number"):
        loaded(directory)


def test_a_matrix_that_should_be_quantized_and_is_not_is_refused(tmp_path: Path) -> None:
    directory = edited(tmp_path, "awq", {})
    tensors = load_file(directory / "model.safetensors")
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((256, 128), np.float32)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj: found weights of type F32, expected quantized ones"):
        loaded(directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["up_proj"]
    (directory / "config.json").write_text(json.dumps(config))
    with open_checkpoint(directory) as checkpoint:  # and where it is excluded it may be so
        runs = formats_of(checkpoint, read_spec(checkpoint), "auto")[0]["up"]
    assert {run.format for run in runs} == {FLOAT32}


def test_a_file_beside_the_configuration_must_agree_with_it(tmp_path: Path) -> None:
    directory = edited(tmp_path, "gptq", {})
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    (directory / "quantize_config.json").write_text(json.dumps(section))
    loaded(directory)
    (directory / "quantize_config.json").write_text(json.dumps(section | {"desc_act": True}))
    with pytest.raises(CheckpointError, match=r"quantize_config\.json: desc_act: found True, expected False"):
        loaded(directory)


def test_a_file_beside_the_configuration_is_enough(tmp_path: Path) -> None:
    directory = edited(tmp_path, "awq", {})
    config = json.loads((directory / "config.json").read_text())
    section = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    own = {"zero_point": True, "q_group_size": section["group_size"], "w_bit": 4, "version": "GEMM"}
    (directory / "quant_config.json").write_text(json.dumps(own))
    loaded(directory)


def test_two_configurations_that_differ_are_refused(tmp_path: Path) -> None:
    directory = edited(tmp_path, "gptq", {})
    config = json.loads((directory / "config.json").read_text())
    config["compression_config"] = config["quantization_config"] | {"group_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="found 'gptq', expected the same as"):
        loaded(directory)


def test_matrices_of_one_part_with_orders_of_their_own_become_float32(tmp_path: Path) -> None:
    directory = edited(tmp_path, "gptq_order", {})
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[name] = np.roll(tensors[name], 1)
    save_file(tensors, directory / "model.safetensors")
    with open_checkpoint(directory) as checkpoint:
        formats = formats_of(checkpoint, read_spec(checkpoint), "auto")[0]
    assert [(run.format, run.ordered) for run in formats["qkv"]] == [(FLOAT32, False)]
    assert [(run.format, run.ordered) for run in formats["up"]] == [(INT4, True)]


def test_an_order_of_minus_ones_is_none(tmp_path: Path) -> None:
    """As compressed-tensors has it where it has not found one."""
    rows = []
    for number, keys in enumerate(({}, {"actorder": None})):
        directory = edited(tmp_path / str(number), "w4a16_order", keys, *GROUP, "weights")
        tensors = load_file(directory / "model.safetensors")
        for name in [name for name in tensors if name.endswith("weight_g_idx")]:
            tensors[name] = np.full_like(tensors[name], -1)
            if keys:
                del tensors[name]
        save_file(tensors, directory / "model.safetensors")
        with open_checkpoint(directory) as checkpoint:
            rows.append({name: one.rows(0, one.shape[0]) for name, one in checkpoint.tensors.items()})
    assert all(np.array_equal(values, rows[1][name]) for name, values in rows[0].items())


STACKED = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate_up_proj_scale_inv", None, "tensor .*gate_up_proj_scale_inv is missing"),
        (
            "gate_up_proj_scale_inv",
            (4, 8, 1),
            r"gate_up_proj_scale_inv has shape \(8, 1\), expected \(4, 2\)",
        ),
        ("gate_up_proj_scale_inv", (2, 8, 2), r"gate_up_proj_scale_inv has shape \(2, 8, 2\), expected \(4"),
        ("down_proj_scale_inv", (16,), r"down_proj_scale_inv has shape \(16,\), expected \(4"),
    ],
)
def test_scales_of_stacked_experts_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...] | None, message: str
) -> None:
    directory = edited(tmp_path, "qwen3_moe_fp8_stacked", {})
    rewrite(directory, f"{STACKED}.{name}", shape)
    with pytest.raises(CheckpointError, match=message):
        loaded(directory)


def rewrite(directory: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """The file with another shape of a tensor, or without it. Done to the header: NumPy has no FP8."""
    path = directory / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if shape is None:
        header[f"{name}_of_nothing"] = header.pop(name)
    else:
        header[name]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def plain(tmp_path: Path, name: str, chosen: Callable[[str], bool], keys: dict[str, Any]) -> Path:
    """A copy of a fixture of which some modules are not quantized."""
    directory = edited(tmp_path, name, keys)
    tensors = load_file(directory / "model.safetensors")
    with open_checkpoint(QUANTIZED / name) as checkpoint:
        modules = [one.removesuffix(".weight") for one in checkpoint.tensors if chosen(one)]
        rows = {f"{one}.weight": checkpoint.tensors[f"{one}.weight"] for one in modules}
        values = {one: tensor.rows(0, tensor.shape[0]) for one, tensor in rows.items()}
    kept = {
        one: tensor for one, tensor in tensors.items() if not one.startswith(tuple(f"{m}." for m in modules))
    }
    save_file(kept | values, directory / "model.safetensors")
    return directory


def test_experts_of_bitsandbytes_directories_may_be_as_they_were(tmp_path: Path) -> None:
    """transformers 5 has the experts of a layer in one tensor, which bitsandbytes passes over."""
    loaded(plain(tmp_path / "all", "olmoe_nf4", lambda name: ".experts." in name, {}))
    with pytest.raises(CheckpointError, match=r"experts.2.down_proj: found weights of type F32, expected"):
        loaded(plain(tmp_path / "some", "olmoe_nf4", lambda name: ".experts.2." in name, {}))
    with pytest.raises(CheckpointError, match=r"q_proj: found weights of type F32, expected quantized ones"):
        loaded(plain(tmp_path / "q", "olmoe_nf4", lambda name: "q_proj" in name, {}))


def test_an_excluded_part_of_a_name_is_that_of_awq(tmp_path: Path) -> None:
    keys = {"modules_to_not_convert": ["gate"]}
    loaded(plain(tmp_path / "gates", "awq", lambda name: "gate_proj" in name, keys))
    loaded(edited(tmp_path / "none", "awq", keys))  # as transformers goes by it
    with pytest.raises(CheckpointError, match=r"up_proj: found weights of type F32, expected quantized ones"):
        loaded(plain(tmp_path / "up", "awq", lambda name: "up_proj" in name, keys))


def test_modules_that_gptqmodel_leaves_may_be_as_they_were(tmp_path: Path) -> None:
    keys, left = {"dynamic": {"-:.*k_proj": {}, "-:.*mlp\\.gate": {}}}, ["k_proj", "gate_proj"]
    loaded(plain(tmp_path / "left", "gptq", lambda name: any(one in name for one in left), keys))
    left.append("q_proj")
    with pytest.raises(CheckpointError, match=r"q_proj: found weights of type F32, expected quantized ones"):
        loaded(plain(tmp_path / "more", "gptq", lambda name: any(one in name for one in left), keys))
