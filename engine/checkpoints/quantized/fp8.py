"""Directories of FP8 weights as transformers and vLLM read them: DeepSeek's blocks, or one scale a matrix.

Their activations are quantized, too, where a GPU computes with them; here they stay floats.
"""

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.quantized.bytes import SCALES, ByteMatrix
from pagellm.engine.checkpoints.quantized.matrix import StackedTensor
from pagellm.engine.checkpoints.quantized.modules import Modules, misshapen
from pagellm.engine.checkpoints.quantized.section import Section, by_parts

_FLOATS = "activations stay floats"
_HARMLESS = frozenset(
    {"quant_method", "activation_scheme", "scale_fmt", "dequantize", "is_checkpoint_fp8_serialized"}
)
# What transformers takes for a `weight_block_size` that is not there.
_BLOCK = (128, 128)


def _has_blocks(weight: Tensor, scales: Tensor) -> bool:
    """Whether there is a scale for each block of a matrix, and more than one of them."""
    blocks = tuple(-(-size // side) for size, side in zip(weight.shape, _BLOCK, strict=False))
    return scales.shape == blocks and blocks != (1, 1)


def read_fp8(section: Section, modules: Modules) -> str:
    """Joins the tensors of each matrix; what the method is called in reports."""
    section.only("activation_scheme", "dynamic", "static", default="dynamic")
    section.only("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    section.only("scale_fmt", "float", "ue8m0", default="float")
    section.only("expert_dtype", "fp8", default="fp8")
    block = None if section.get("weight_block_size") is None else section.pair("weight_block_size")
    used = block
    skipped = section.get("modules_to_not_convert")
    key = "ignored_layers" if skipped is None or skipped == [] else "modules_to_not_convert"
    names = section.names(key)
    excluded = by_parts(names, section, key)
    section.get("modules_to_convert")
    section.refuse_others(_HARMLESS)
    for module in modules.with_tensor("weight", "F8_E4M3"):
        weight = modules.take(module, "weight", ("F8_E4M3",))
        scales = modules.take_any(module, ("weight_scale_inv", "weight_scale"), SCALES)
        if scales is None:
            scales = modules.take(module, "weight_scale_inv", SCALES)
        modules.take_any(module, ("input_scale", "activation_scale"), SCALES)
        implied = "weight_block_size" not in section.values and _has_blocks(weight, scales)
        size = _BLOCK if implied else block
        used = used or size
        modules.put(module, ByteMatrix(weight, scales, "E4M3", size).tensor())
    _read_stacked(modules, block)
    modules.check(section, key, excluded, lambda module: module.endswith(tuple(names)))
    how = "one scale a matrix or output" if used is None else f"blocks of {used[0]} x {used[1]}"
    return f"FP8 (E4M3), {how}, {_FLOATS}"


def _read_stacked(modules: Modules, block: tuple[int, int] | None) -> None:
    """Experts that are in one tensor, [experts, outputs, inputs], as transformers has them in memory."""
    for name in [name for name, tensor in modules.tensors.items() if _is_stacked(tensor)]:
        weight = modules.take_whole(name, ("F8_E4M3",))
        scales = modules.take_whole(f"{name}_scale_inv", SCALES)
        modules.tensors.pop(f"{name}_activation_scale", None)
        count, outputs, inputs = weight.shape
        size = block
        if size is None and scales.shape == (count, 2, 1) and outputs % 2 == 0:
            size = (outputs // 2, inputs)  # of a gate and a linear half
        if len(scales.shape) != 3 or scales.shape[0] != count:
            raise misshapen(scales, (count, -(-outputs // (size or weight.shape[1:])[0]), 1))
        own = weight.shape[1:], scales.shape[1:]
        matrices = [
            ByteMatrix(weight.part(own[0], i), scales.part(own[1], i), "E4M3", size).tensor()
            for i in range(count)
        ]
        num_bytes = weight.num_bytes + scales.num_bytes
        modules.put_whole(
            StackedTensor(name, weight.shape, "E4M3", weight.file, weight.offset, num_bytes, matrices)
        )


def _is_stacked(tensor: Tensor) -> bool:
    return tensor.dtype == "F8_E4M3" and len(tensor.shape) == 3 and ".experts." in tensor.name
