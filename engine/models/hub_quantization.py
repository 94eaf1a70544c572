"""Methods of quantization that a Hugging Face directory may name and that are not read.

transformers has `quantization_config` in config.json, as most quantizers write it; compressed-tensors had
`compression_config`, MLX has `quantization`. AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt wrote a file beside it.
What `checkpoints.quantized` has read is not refused; the tensors of others would be taken for something else.
"""

from typing import Any

from pagellm.engine.checkpoints import SUPPORTED_DTYPES, Checkpoint
from pagellm.engine.checkpoints.json_files import config_parts, read_json_object
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models.fields import Fields
from pagellm.engine.quantized_config import ALL_SETTINGS, ALL_SETTINGS_FILES, SETTINGS, is_bitsandbytes

_SUPPORTED = (
    "weights in float32, float16 or bfloat16, which the setting quantization converts while loading, or "
    "quantized by GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes or MXFP4, or a GGUF file of any of these "
    f"types: {SUPPORTED_DTYPES}"
)
# What tells variants of a method apart, in the order in which it is shown.
_DETAILS = (
    "mode",
    "quant_algo",
    "quant_type",
    "format",
    "fmt",
    "bits",
    "w_bit",
    "group_size",
    "q_group_size",
)


def refuse_quantized(fields: Fields, checkpoint: Checkpoint) -> None:
    """Raises `CheckpointError` if config.json or a file beside it says that the weights were quantized.

    That is, by a method that is not read.
    """
    for key in ALL_SETTINGS:
        fields.get(key)
    if checkpoint.config_only:
        return  # whoever asks for a shape alone reads for himself what its weights take
    is_read = bool(checkpoint.quantization)
    for prefix, section in config_parts(fields.values).items():
        for key in ALL_SETTINGS:
            if section.get(key) is not None and not (is_read and key in SETTINGS):
                raise CheckpointError(
                    f"{fields.path}: {prefix}{key}: found {_method(section[key])}, expected {_SUPPORTED}"
                )
    for name, method in ALL_SETTINGS_FILES.items() if not is_read else ():
        path = fields.path.with_name(name)
        if path.exists():
            values = read_json_object(path)
            inner = values.get("quantization")
            described = _method({"quant_method": method} | (inner if isinstance(inner, dict) else values))
            raise CheckpointError(f"{path}: found {described}, expected {_SUPPORTED}")


def _method(section: Any) -> str:
    """The method by its name, with what tells its variants apart."""
    if not isinstance(section, dict):
        return found(section)
    name = section.get("quant_method")
    if not name:
        # Those that write no name: bitsandbytes at first, and MLX.
        name = "bitsandbytes" if is_bitsandbytes(section) else "mlx" if "bits" in section else section
    return ", ".join([found(name)] + [f"{key} {found(section[key])}" for key in _DETAILS if key in section])
