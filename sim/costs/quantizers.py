"""How a quantizer wrote a model's weights, of its config.json alone: bytes of a number, and the arithmetic.

Known are the methods that servers run. A method that also quantizes activations multiplies in its own format
where a device is faster in it; of the others weights are widened to 16 bits first.
"""

from pathlib import Path
from typing import NamedTuple

from pagellm.engine.errors import CheckpointError
from pagellm.engine.quantized_config import ALL_SETTINGS, ALL_SETTINGS_FILES, PARTS, is_bitsandbytes
from pagellm.sim.costs.constants import FORMATS
from pagellm.sim.fields import Fields, read_json

_METHODS = (
    "fp8, fbgemm_fp8, ptpc_fp8, gptq, gptq_marlin, awq, awq_marlin, compressed-tensors, bitsandbytes, "
    "modelopt or mxfp4"
)
_ELSE = "or none and --set-cost weights=FORMAT"


class Quantized(NamedTuple):
    """Matrices that a quantizer wrote.

    name: for reports. num_bytes: of a number, with its part of the scales. arithmetic: the format of
    `constants.FORMATS` that they are multiplied in. experts_only: others are in 16 bits.
    """

    name: str
    num_bytes: float
    arithmetic: str
    experts_only: bool = False


def read_quantizer(path: Path) -> Quantized | None:
    """What a config.json, or a file beside it, says; None of weights that nobody quantized.

    Raises `CheckpointError` for a method or a number of bits that is not known.
    """
    config = Fields(read_json(path, "a configuration", CheckpointError), str(path), CheckpointError)
    parts = [config]
    parts += [config.section(name) for name in PARTS if config.has(name)]
    for part in parts:
        for key in ALL_SETTINGS:
            if part.has(key):
                section = part.section(key)
                return _read(section, section.get("quant_method"))
    for name, method in ALL_SETTINGS_FILES.items():
        beside = path.with_name(name)
        if beside.is_file():
            values = Fields(read_json(beside, "a quantizer", CheckpointError), str(beside), CheckpointError)
            section = values.section("quantization") if values.has("quantization") else values
            return _read(section, section.get("quant_method") or method)
    return None


def _read(section: Fields, method: object) -> Quantized:
    if method is None and is_bitsandbytes(section.values):
        method = "bitsandbytes"
    match method:
        case "fp8" | "fbgemm_fp8" | "ptpc_fp8":
            return Quantized("fp8", FORMATS["fp8"], "fp8")
        case "gptq" | "gptq_marlin":
            return _of_bits("GPTQ", section, "bits")
        case "awq" | "awq_marlin":
            return _of_bits("AWQ", section, "w_bit" if section.has("w_bit") else "bits")
        case "bitsandbytes":
            if section.get("load_in_8bit") is True:
                return Quantized("int8 (bitsandbytes)", FORMATS["int8"], "int8")
            return Quantized("4-bit (bitsandbytes)", 0.5 + 4 / 64, "bf16")
        case "mxfp4":
            return Quantized("mxfp4", 0.5 + 1 / 32, "bf16", experts_only=True)
        case "modelopt" | "modelopt_fp4":
            return _of_modelopt(section)
        case "compressed-tensors":
            return _of_groups(section)
    raise section.bad("quant_method", method, f"{_METHODS}, {_ELSE}")


def _of_bits(name: str, section: Fields, key: str) -> Quantized:
    """Integers with 16 bits of a scale and a zero point for each group."""
    bits = section.integer(key) if section.has(key) else 4
    if bits not in (2, 3, 4, 8):
        raise section.bad(key, bits, f"2, 3, 4 or 8 bits, {_ELSE}")
    group = section.get("group_size") or section.get("q_group_size") or 128
    if type(group) is not int or not (group == -1 or group >= 1):
        raise section.bad("group_size", group, "a positive integer, or -1")
    scales = (16 + bits) / 8 / group if group > 0 else 0.0
    return Quantized(f"int{bits} ({name})", bits / 8 + scales, "bf16")


def _of_modelopt(section: Fields) -> Quantized:
    algorithm = section.get("quant_algo")
    if algorithm == "FP8":
        return Quantized("fp8 (ModelOpt)", FORMATS["fp8"], "fp8")
    if algorithm == "NVFP4":
        return Quantized("fp4 (ModelOpt)", FORMATS["fp4"], "fp4")
    raise section.bad("quant_algo", algorithm, f"FP8 or NVFP4, {_ELSE}")


def _of_groups(section: Fields) -> Quantized:
    """compressed-tensors: a group of modules says how its weights and activations are quantized."""
    groups = section.section("config_groups")
    kinds = {_of_group(groups.section(name)) for name in groups.values}
    if len(kinds) != 1:
        raise section.bad("config_groups", list(groups.values), f"groups that are quantized alike, {_ELSE}")
    return kinds.pop()


def _of_group(group: Fields) -> Quantized:
    weights = group.section("weights")
    kind = weights.get("type") or "int"
    bits = weights.integer("num_bits")
    if kind not in ("int", "float") or (kind, bits) not in (
        ("int", 4),
        ("int", 8),
        ("float", 4),
        ("float", 8),
    ):
        raise weights.bad("num_bits", f"{bits} of type {kind}", f"4 or 8 of type int or float, {_ELSE}")
    size = weights.get("group_size")
    scales = 2 / size if kind == "int" and type(size) is int and size > 0 else 0.0
    format = f"{'fp' if kind == 'float' else 'int'}{bits}"
    num_bytes = FORMATS["fp4"] if format == "fp4" else bits / 8 + scales
    arithmetic = format if group.has("input_activations") and format != "int4" else "bf16"
    return Quantized(f"{format} (compressed-tensors)", num_bytes, arithmetic)
