"""Which type each matrix of a GGUF file gets, in the mixes that people know by llama.cpp's names.

A mix gives more bits to the matrices that lose most: the output matrix, and some of those that make
values and end a feed-forward. The rules are those of llama.cpp's `src/llama-quant.cpp` without an importance
matrix, so that a mix has the same size whichever of the two wrote it; only where llama.cpp falls back to Q5_1
are rows Q8_0 here. Mixes are of types; a mixture is always one of experts.
"""

import re
from dataclasses import dataclass

from gguf import LlamaFileType

from pagellm.engine.checkpoints import BLOCK_SIZES

# What each is called, `general.file_type`, and the type that most matrices get. Q4_K is Q4_K_M's short name.
MIXES = {
    "F32": (LlamaFileType.ALL_F32, "F32"),
    "F16": (LlamaFileType.MOSTLY_F16, "F16"),
    "BF16": (LlamaFileType.MOSTLY_BF16, "BF16"),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, "Q4_0"),
    "Q4_K_M": (LlamaFileType.MOSTLY_Q4_K_M, "Q4_K"),
}
ALIASES = {"Q4_K": "Q4_K_M"}

# Of types in blocks of 256, what rows get that are no multiple of it.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q8_0", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
# The matrices that make values, alone or among others.
_MAKES_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")


@dataclass(frozen=True)
class Matrices:
    """What the rules ask of a model. tied: whether output matrix and embedding are one."""

    architecture: str
    num_layers: int
    tied: bool
    num_experts: int = 0


def type_of(mix: str, pure: bool, model: Matrices, name: str, columns: int) -> str:
    """The type that a matrix gets, by its name and the length of its rows; pure: one type for all."""
    base = MIXES[mix][1]
    chosen = (
        base if pure or base in ("F32", "F16", "BF16") else _before_fallback(mix, base, model, name, columns)
    )
    if columns % _block(chosen):
        chosen = _FALLBACKS.get(chosen, chosen)
    return chosen if columns % _block(chosen) == 0 else "F16"


def _before_fallback(mix: str, base: str, model: Matrices, name: str, columns: int) -> str:
    is_falcon = model.architecture == "falcon"
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return "Q8_0" if base == "Q8_0" or is_falcon or columns % _block(base) else "Q6_K"
    in_layer = _LAYER.fullmatch(name)
    if in_layer is None or base == "Q8_0":
        return base
    layer, part = int(in_layer[1]), in_layer[2]
    eighth = model.num_layers // 8
    # The first and the last eighth of the layers, and every third between them.
    more = layer < eighth or layer >= 7 * model.num_layers // 8 or (layer - eighth) % 3 == 2
    if model.num_experts == 8 and part in (*_MAKES_VALUES, "attn_k"):
        return "Q8_0"
    if mix != "Q4_K_M":
        return base
    if part in _MAKES_VALUES:
        return "Q6_K" if more else base
    if part == "attn_output" and model.num_experts == 8:
        return "Q5_K"
    if part.startswith("ffn_down") and is_falcon:
        return "Q6_K" if layer < model.num_layers // 16 else "Q5_K" if more else base
    if part.startswith("ffn_down"):  # of experts and shared ones, too
        return "Q6_K" if more else base
    return base


def _block(dtype: str) -> int:
    return BLOCK_SIZES[dtype][0]
