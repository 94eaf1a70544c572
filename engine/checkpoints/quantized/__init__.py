"""Hugging Face directories whose weights a quantizer wrote: several tensors a matrix become one again.

Knows GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes and MXFP4: their keys, each of which is obeyed, known
to change nothing, or refused by name; their tensors; and what their levels stand for. Other methods are left
as they are, for `models.hub_quantization` to refuse.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.json_files import CONFIG_FILE, config_parts, read_json_object
from pagellm.engine.checkpoints.quantized.bitsandbytes import read_bitsandbytes
from pagellm.engine.checkpoints.quantized.compressed_tensors import read_compressed_tensors
from pagellm.engine.checkpoints.quantized.fp8 import read_fp8
from pagellm.engine.checkpoints.quantized.gptq import read_awq, read_gptq
from pagellm.engine.checkpoints.quantized.matrix import QuantizedTensor, StackedTensor
from pagellm.engine.checkpoints.quantized.modules import Modules
from pagellm.engine.checkpoints.quantized.mxfp4 import Mxfp4Tensor, read_mxfp4
from pagellm.engine.checkpoints.quantized.section import Section
from pagellm.engine.errors import found
from pagellm.engine.quantized_config import SETTINGS, SETTINGS_FILES, is_bitsandbytes

__all__ = [
    "Mxfp4Tensor",
    "QuantizedTensor",
    "StackedTensor",
    "join_quantized",
]

_READERS: Mapping[str, Callable[[Section, Modules], str]] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "bitsandbytes": read_bitsandbytes,
    "mxfp4": read_mxfp4,
}
# What of a file beside a config.json must agree with what that says.
_SAME = ("bits", "group_size", "desc_act", "sym", "zero_point", "checkpoint_format", "version")


def join_quantized(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """The tensors with each quantized matrix as one, and what the method is called; "" where there is none.

    Raises `CheckpointError` for a setting of a known method that is not supported, and for tensors that do
    not fit it or each other.
    """
    section = _section(directory, config)
    if section is None:
        return dict(tensors), ""
    modules = Modules(directory, dict(tensors))
    described = _READERS[_method(section.values)](section, modules)
    return modules.tensors, described


def _section(directory: Path, config: Mapping[str, Any]) -> Section | None:
    """What says that the weights were quantized by a known method, and how."""
    config_path = directory / CONFIG_FILE
    sections = [
        Section(config_path, f"{prefix}{key}.", part[key])
        for prefix, part in config_parts(config).items()
        for key in SETTINGS
        if isinstance(part.get(key), dict)
    ]
    files = []
    for name, method in SETTINGS_FILES.items():
        if (directory / name).exists():
            values = read_json_object(directory / name)
            files.append(Section(directory / name, "", {"quant_method": method} | values))
    known = [section for section in sections or files if _method(section.values) in _READERS]
    if not known or (sections and len(known) < len(sections)):
        return None
    first = known[0]
    for other in known[1:]:
        if other.values != first.values:
            raise other.error(
                "quant_method", _method(other.values), f"the same as {first.path}: {first.prefix}"
            )
    for file in files:
        for key in _SAME:
            value, own = file.values.get(key), first.values.get(key)
            if value is not None and own is not None and value != own:
                raise file.error(key, value, f"{found(own)}, as {first.path.name} says")
    return first


def _method(values: Mapping[str, Any]) -> str:
    name = values.get("quant_method")
    if name is None and is_bitsandbytes(values):
        return "bitsandbytes"
    return name if isinstance(name, str) else ""
