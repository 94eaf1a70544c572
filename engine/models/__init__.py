"""One small file an architecture: a checkpoint's config and tensor names become one `ModelSpec`.

What a reader obeys is what its format's reference obeys, transformers for a config.json and llama.cpp for a
GGUF file, with the reference's defaults for absent keys; what could change the arithmetic and is not obeyed
is refused by name.
"""

import re
from dataclasses import replace

from pagellm.engine.checkpoints import BLOCK_SIZES, SUPPORTED_DTYPES, Checkpoint
from pagellm.engine.checkpoints.quantized import QuantizedTensor, StackedTensor
from pagellm.engine.errors import CheckpointError, found, named
from pagellm.engine.models import (
    bitnet,
    cohere,
    dbrx,
    deepseek,
    ernie4_5,
    falcon,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe_lite,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    llama,
    minicpm,
    minicpm3,
    ministral3,
    mistral,
    mixtral,
    multimodal,
    olmo2,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen_moe,
    smollm3,
    starcoder2,
)
from pagellm.engine.models.names import names_of
from pagellm.engine.models.spec import ModelSpec, Source

__all__ = ["GGUF_READERS", "HUGGINGFACE_READERS", "ModelSpec", "Source", "is_left_over", "read_spec"]

# The readers of architectures, by the model_type of a config.json and by general.architecture of a GGUF file.
HUGGINGFACE_READERS = {
    "bitnet": bitnet.from_huggingface,
    "cohere": cohere.from_huggingface,
    "cohere2": cohere.cohere2_from_huggingface,
    "dbrx": dbrx.from_huggingface,
    "deepseek_v2": deepseek.from_huggingface,
    "deepseek_v3": deepseek.v3_from_huggingface,
    "ernie4_5": ernie4_5.from_huggingface,
    "ernie4_5_moe": ernie4_5.mixture_from_huggingface,
    "falcon": falcon.from_huggingface,
    "gemma2": gemma2.from_huggingface,
    "gemma3_text": gemma3.from_huggingface,
    "gemma4_text": gemma4.from_huggingface,
    "glm": glm4.from_huggingface,
    "glm4": glm4.from_huggingface,
    "glm4_moe_lite": glm4_moe_lite.from_huggingface,
    "gpt2": gpt2.from_huggingface,
    "gpt_bigcode": gpt_bigcode.from_huggingface,
    "gpt_neox": gpt_neox.from_huggingface,
    "gpt_oss": gpt_oss.from_huggingface,
    "gptj": gptj.from_huggingface,
    "granite": granite.from_huggingface,
    "granitemoe": granite.mixture_from_huggingface,
    "granitemoehybrid": granite.hybrid_from_huggingface,
    "granitemoeshared": granite.mixture_from_huggingface,
    "llama": llama.from_huggingface,
    "minicpm": minicpm.from_huggingface,
    "minicpm3": minicpm3.from_huggingface,
    "ministral3": ministral3.from_huggingface,
    "mistral": mistral.from_huggingface,
    "mixtral": mixtral.from_huggingface,
    "olmo2": olmo2.from_huggingface,
    "olmo3": olmo2.olmo3_from_huggingface,
    "olmoe": olmoe.from_huggingface,
    "opt": opt.from_huggingface,
    "phi": phi.from_huggingface,
    "phi3": phi3.from_huggingface,
    "qwen2": qwen2.from_huggingface,
    "qwen3": qwen3.from_huggingface,
    "qwen2_moe": qwen_moe.qwen2_from_huggingface,
    "qwen3_moe": qwen_moe.from_huggingface,
    "smollm3": smollm3.from_huggingface,
    "starcoder2": starcoder2.from_huggingface,
}
GGUF_READERS = {
    "bitnet": bitnet.from_gguf,
    "chatglm": glm4.from_gguf,
    "cohere2": cohere.from_gguf,
    "command-r": cohere.from_gguf,
    "dbrx": dbrx.from_gguf,
    "deepseek2": deepseek.from_gguf,
    "ernie4_5": ernie4_5.from_gguf,
    "ernie4_5-moe": ernie4_5.mixture_from_gguf,
    "falcon": falcon.from_gguf,
    "gemma2": gemma2.from_gguf,
    "gemma3": gemma3.from_gguf,
    "gemma4": gemma4.from_gguf,
    "glm4": glm4.from_gguf,
    "gpt2": gpt2.from_gguf,
    "gpt-oss": gpt_oss.from_gguf,
    "gptneox": gpt_neox.from_gguf,
    "granite": granite.from_gguf,
    "granitehybrid": granite.from_gguf,
    "granitemoe": granite.from_gguf,
    "llama": llama.from_gguf,
    "minicpm": minicpm.from_gguf,
    "minicpm3": minicpm3.from_gguf,
    "mistral3": ministral3.from_gguf,
    "olmo2": olmo2.from_gguf,
    "olmoe": olmoe.from_gguf,
    "phi2": phi.from_gguf,
    "phi3": phi3.from_gguf,
    "qwen2": qwen2.from_gguf,
    "qwen2moe": qwen_moe.qwen2_from_gguf,
    "qwen3": qwen3.from_gguf,
    "qwen3moe": qwen_moe.from_gguf,
    "smollm3": smollm3.from_gguf,
    "starcoder": gpt_bigcode.from_gguf,
    "starcoder2": starcoder2.from_gguf,
}

# Tensors of published checkpoints that repeat the configuration or say nothing of the next token;
# transformers passes over them, too.
_REDUNDANT = {
    "safetensors": re.compile(
        r".*\.rotary_emb\.inv_freq|(.*\.)?h\.\d+\.attn\.(masked_)?bias"
        r"|(.*\.)?layers\.\d+\.attention\.(masked_)?bias"
        # Layers of ERNIE that predict tokens further on.
        r"|(.*\.)?mtp_(block|emb_norm|hidden_norm|linear_proj)\..*"
    ),
    "gguf": re.compile(r"(?!)"),
}


def read_spec(checkpoint: Checkpoint) -> ModelSpec:
    """Finds the checkpoint's architecture and maps it; checks that every tensor is there in its shape.

    Raises `CheckpointError` for an architecture that is not supported, a bad field of the configuration, a
    missing or misshapen tensor, or a tensor that this architecture has no place for.
    """
    key, readers = (
        ("model_type", HUGGINGFACE_READERS)
        if checkpoint.format == "safetensors"
        else ("general.architecture", GGUF_READERS)
    )
    try:
        name = checkpoint.config.get(key)
        redundant, left_alone = _REDUNDANT[checkpoint.format], ""
        wrapped = multimodal.TEXT_TYPES if key == "model_type" else {}
        if isinstance(name, str) and name in wrapped:
            checkpoint = multimodal.text_checkpoint(checkpoint)
            name = checkpoint.config[key]
            redundant = re.compile(f"{redundant.pattern}|{multimodal.OTHER_TENSORS.pattern}")
            left_alone = multimodal.LEFT_ALONE
        if not isinstance(name, str) or name not in readers:
            raise CheckpointError(
                f"{key}: found {found(name)}, expected an architecture that is supported: "
                f"{', '.join(sorted({*readers, *wrapped}))}"
            )
        spec = readers[name](checkpoint)
        spec = replace(spec, left_alone=left_alone or spec.left_alone)
    except CheckpointError as error:
        if str(error).startswith(str(checkpoint.path)):
            raise
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    if not checkpoint.config_only:
        _check_tensors(checkpoint, spec, redundant)
    return spec


def _check_tensors(checkpoint: Checkpoint, spec: ModelSpec, redundant: re.Pattern[str]) -> None:
    used = set(spec.repeated)
    for parts in (*spec.layers, spec.rest):
        for sources in parts.values():
            for source in sources:
                _check_shape(checkpoint, source)
                used.add(source.tensor)
    for name in checkpoint.tensors:
        if name not in used and not redundant.fullmatch(name) and not is_left_over(checkpoint, name):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {named(name)} has no place in architecture {spec.architecture} "
                "with this configuration"
            )


def is_left_over(checkpoint: Checkpoint, name: str) -> bool:
    """Whether it is the zero bias of a quantized matrix: older versions of AutoGPTQ gave one to each."""
    weight = checkpoint.tensors.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or not isinstance(weight, QuantizedTensor):
        return False
    bias = checkpoint.tensors[name]
    is_vector = bias.shape == weight.shape[:1] and bias.dtype in BLOCK_SIZES
    return is_vector and (checkpoint.headers_only or not bias.rows(0, bias.shape[0]).any())


def _check_shape(checkpoint: Checkpoint, source: Source) -> None:
    tensor = checkpoint.tensors.get(source.tensor)
    if tensor is None:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source.tensor} is missing, expected with shape "
            f"{source.stored_shapes[0]}; "
            f"there are {names_of(checkpoint)}"
        )
    if tensor.shape not in source.stored_shapes:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source.tensor} has shape {tensor.shape}, expected "
            f"{source.stored_shapes[0]}"
        )
    if tensor.dtype not in BLOCK_SIZES and not isinstance(tensor, QuantizedTensor | StackedTensor):
        raise CheckpointError(
            f"{checkpoint.path}: tensor {source.tensor} has type {tensor.dtype}, expected one of "
            f"{SUPPORTED_DTYPES}"
        )
