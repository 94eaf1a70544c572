"""Where a Hugging Face model says that its weights were quantized: the names of keys and files, nothing more.

They are for those who load it, and for those who only estimate it, where nothing may be loaded.
"""

from collections.abc import Mapping
from typing import Any

# Sections of a configuration that describe the language model of a larger one.
PARTS = ("text_config", "llm_config")
# As transformers has it, and as compressed-tensors had it.
SETTINGS = ("quantization_config", "compression_config")
# What older quantizers write beside a config.json.
SETTINGS_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
# With those of methods that are never read: MLX's key, ModelOpt's file.
ALL_SETTINGS = (*SETTINGS, "quantization")
ALL_SETTINGS_FILES = {**SETTINGS_FILES, "hf_quant_config.json": "modelopt"}


def is_bitsandbytes(settings: Mapping[str, Any]) -> bool:
    """Whether settings that name no method are of bitsandbytes, which wrote none at first."""
    return any(settings.get(key) is True for key in ("load_in_4bit", "load_in_8bit"))
