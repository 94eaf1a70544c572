"""Directories that compressed-tensors wrote: W4A16, W8A8 and FP8.

A group of the configuration says for the modules that it targets how their weights and activations are
quantized. Activations of FP8 models stay floats here; those of W8A8 are quantized by token, as vLLM does.
"""

from collections.abc import Callable
from typing import NamedTuple

from pagellm.engine.checkpoints.quantized.bytes import SCALES, ByteMatrix
from pagellm.engine.checkpoints.quantized.modules import Modules, misshapen
from pagellm.engine.checkpoints.quantized.nibbles import Words, described_groups, integers
from pagellm.engine.checkpoints.quantized.section import Section, by_regex
from pagellm.engine.errors import CheckpointError, found, named

_HARMLESS = frozenset({"quant_method", "quantization_status", "global_compression_ratio", "version"})
_HARMLESS_ARGS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})
# What means that groups are of inputs in the order of their activations; others are so only meanwhile.
_ORDERED = (True, "group", "dynamic")
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class _Group(NamedTuple):
    """How the modules are quantized that a group targets."""

    section: Section
    targets: Callable[[str], bool]
    format: str
    kind: str  # INT4, INT8 or E4M3
    group_size: int = -1
    symmetric: bool = True
    block: tuple[int, int] | None = None
    ordered: bool = False  # whether inputs are in groups in an order of their own


def read_compressed_tensors(section: Section, modules: Modules) -> str:
    """Joins the tensors of each matrix; what the method is called in reports."""
    format = section.only("format", *_FORMATS, "mixed-precision")
    section.only("quantization_status", "compressed", "frozen", default="compressed")
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if section.get(key):
            raise section.error(key, section.get(key), "none: it is not supported")
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.get("format", "dense") != "dense":
        raise sparsity.error("format", sparsity.get("format"), "'dense'")
    excluded = by_regex(section.names("ignore"), section, "ignore")
    whole = section.section("config_groups")
    if whole is None:
        raise section.error("config_groups", section.get("config_groups"), "groups of modules")
    groups = [_read_group(whole, name, format) for name in whole.values]
    section.refuse_others(_HARMLESS)
    for module in modules.with_tensor("weight_scale"):
        group = next((group for group in groups if group.targets(module)), None)
        if group is None:
            raise CheckpointError(
                f"{modules.directory}: {named(module)}: found quantized weights, but no group of "
                f"{section.prefix}config_groups targets it"
            )
        (_read_packed if group.kind == "INT4" else _read_bytes)(module, group, modules)

    def is_plain(module: str) -> bool:
        return excluded(module) or not any(group.targets(module) for group in groups)

    modules.check(section, "ignore", is_plain)
    return "compressed-tensors, " + "; ".join(dict.fromkeys(map(_described, groups)))


def _read_group(whole: Section, name: str, format: str) -> _Group:
    group = whole.section(name)
    if group is None:
        raise whole.error(name, whole.get(name), "a group of modules")
    own = group.get("format", format)
    if own not in _FORMATS:
        raise group.error("format", own, " or ".join(map(found, _FORMATS)))
    names = group.names("targets")
    by_name = by_regex(names, group, "targets")
    targets = (lambda module: True) if "Linear" in names else by_name
    if group.get("output_activations"):
        raise group.error("output_activations", group.get("output_activations"), "none: it is not supported")
    weights, inputs = group.section("weights"), group.section("input_activations")
    if weights is None:
        raise group.error("weights", group.get("weights"), "how weights are quantized")
    group.refuse_others(())
    bits, kind = weights.only("num_bits", 4, 8), weights.only("type", "int", "float", default="int")
    weights.only("dynamic", False, default=False)
    order = weights.only("actorder", False, True, "weight", "static", "group", "dynamic", default=False)
    symmetric = weights.only("symmetric", True, False, default=True)
    size = weights.get("group_size")
    strategy = weights.get("strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    weights.get("block_structure")  # known, even where nothing is in blocks
    weights.refuse_others(_HARMLESS_ARGS)
    if (bits, kind) == (4, "int"):
        if own != "pack-quantized" or inputs is not None:
            raise group.error("format", own, "'pack-quantized' and no input_activations for 4-bit integers")
        if strategy not in ("group", "channel"):
            raise weights.error("strategy", strategy, "'group' or 'channel'")
        if strategy == "group" and (type(size) is not int or size < 1):
            raise weights.error("group_size", size, "a positive integer")
        if order in _ORDERED and strategy != "group":
            raise weights.error("actorder", order, "none without groups")
        size = size if strategy == "group" else -1
        return _Group(group, targets, own, "INT4", size, symmetric, ordered=order in _ORDERED)
    if order in _ORDERED:
        raise weights.error("actorder", order, "none beside 8 bits")
    if not symmetric or own == "pack-quantized":
        raise weights.error("symmetric", symmetric, "true, and a format that is not packed, for 8 bits")
    if kind == "int":
        if strategy not in ("channel", "tensor"):
            raise weights.error("strategy", strategy, "'channel' or 'tensor'")
        _check_activations(group, inputs, "int", ("token",), must_be=True)
        return _Group(group, targets, own, "INT8")
    if strategy not in ("channel", "tensor", "block"):
        raise weights.error("strategy", strategy, "'channel', 'tensor' or 'block'")
    block = weights.pair("block_structure") if strategy == "block" else None
    _check_activations(group, inputs, "float", ("token", "tensor", "group"), must_be=False)
    return _Group(group, targets, own, "E4M3", block=block)


def _check_activations(
    group: Section, inputs: Section | None, kind: str, strategies: tuple[str, ...], must_be: bool
) -> None:
    """Those of int8 must be quantized by token when they come; those of FP8 stay floats however they are."""
    if inputs is None:
        if must_be:
            raise group.error("input_activations", None, "those of W8A8: 8 bits, int, dynamic, by token")
        return
    inputs.only("num_bits", 8)
    inputs.only("type", kind, default="int")
    inputs.only("symmetric", True, default=True)
    strategy = inputs.only("strategy", *strategies)
    dynamic = inputs.get("dynamic", False)
    if must_be and dynamic is not True:
        raise inputs.error("dynamic", dynamic, "True: static scales of int8 activations are not supported")
    for key in ("group_size", "block_structure", "actorder"):
        if inputs.get(key) and strategy != "group":
            raise inputs.error(key, inputs.get(key), "none")
    inputs.refuse_others(_HARMLESS_ARGS)


def _read_packed(module: str, group: _Group, modules: Modules) -> None:
    words = modules.take(module, "weight_packed", ("I32",))
    scales = modules.take(module, "weight_scale", ("F16", "BF16", "F32"))
    shape_tensor = modules.take(module, "weight_shape", ("I64", "I32"))
    zeros = None if group.symmetric else modules.take(module, "weight_zero_point", ("I32",))
    order = modules.take_any(module, ("weight_g_idx",), ("I32", "I64"))
    shape = tuple(integers(shape_tensor).tolist())
    if len(shape) != 2 or min(shape) < 1 or words.shape != (shape[0], -(-shape[1] // 8)):
        raise CheckpointError(
            f"{shape_tensor.file.path}: tensor {named(shape_tensor.name)}: found {shape}, expected the shape "
            f"of a matrix that {words.shape} words hold"
        )
    if order is None and group.ordered:
        order = modules.take(module, "weight_g_idx", ("I32", "I64"))  # which refuses it
    if order is not None and order.shape != (shape[1],):
        raise misshapen(order, (shape[1],))
    groups = None if order is None else integers(order)
    if groups is not None and (groups == -1).all():  # as the library has it where there is no order
        groups = None
    matrix = Words(f"{module}.weight", shape, "rows", words, scales, zeros, group.group_size, groups=groups)
    modules.put(module, matrix.tensor())


def _read_bytes(module: str, group: _Group, modules: Modules) -> None:
    weight = modules.take(module, "weight", ("I8" if group.kind == "INT8" else "F8_E4M3",))
    scales = modules.take(module, "weight_scale", SCALES)
    modules.take_any(module, ("input_scale",), SCALES)
    modules.put(module, ByteMatrix(weight, scales, group.kind, group.block).tensor())


def _described(group: _Group) -> str:
    if group.kind == "INT8":
        return "W8A8, activations quantized by token"
    if group.kind == "E4M3":
        return "FP8 (E4M3), activations stay floats"
    return f"W4A16, {described_groups(group.group_size)}{', with zero points' * (not group.symmetric)}"
