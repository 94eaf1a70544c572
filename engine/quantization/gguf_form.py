"""A model of a Hugging Face directory in GGUF's form: its name there, its metadata, its tensors.

What the form says is what the readers in `engine.models` read; so a model is written as its own spec says it,
and the header is read back: where a model says something that GGUF has no place for, the two specs differ,
and it is refused by name. Where each tensor lies, and in which order rotary pairs are stored, follows from
the spec that was read back, too.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import ModelSpec
from pagellm.engine.models.gguf import NAMES
from pagellm.engine.models.multimodal import TEXT_TYPES
from pagellm.engine.models.rope import LongRope, RopeTable
from pagellm.kernels.architecture import PARTS, Kind


@dataclass(frozen=True)
class Form:
    """What a model_type is in GGUF, and what llama.cpp's loader of it asks for.

    names: of tensors that are called otherwise than llama's. biases: the parts that may have one; needed:
    that must. tied: whether the output matrix has to be the embedding, or may not; None: either. square:
    whether a layer's heads together have to be as wide as its hidden state.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ("qkv_b",)
    needed: tuple[str, ...] = ()
    tied: bool | None = None
    square: bool = False


_ONE_NORM = {"mlp_norm": "attn_norm"}
_FUSED_QKV = {"qkv": "attn_qkv"}
_FUSED_UP = {"up": "ffn_up"}
_LINEAR = ("qkv_b", "output_b", "up_b", "down_b")
_OF_GPT2: Any = {"names": _FUSED_QKV, "biases": _LINEAR, "needed": _LINEAR, "square": True}
FORMS = {
    "bitnet": Form("bitnet", biases=(), tied=True, square=True),
    "cohere": Form("command-r", _ONE_NORM, tied=True, square=True),
    "cohere2": Form("cohere2", _ONE_NORM, tied=True, square=True),
    "ernie4_5": Form("ernie4_5", biases=("qkv_b", "output_b")),
    "falcon": Form("falcon", {**_FUSED_QKV, **_ONE_NORM}, biases=(), square=True),
    "gemma2": Form("gemma2", tied=True),
    "gemma3_text": Form("gemma3"),
    "glm": Form("chatglm", _FUSED_UP, square=True),
    "glm4": Form("glm4", _FUSED_UP),
    "gpt2": Form("gpt2", **_OF_GPT2),
    "gpt_bigcode": Form("starcoder", **_OF_GPT2),
    "gpt_neox": Form("gptneox", **_OF_GPT2, tied=False),
    "granite": Form("granite", biases=_LINEAR),
    "granitemoehybrid": Form("granite", biases=_LINEAR),
    "llama": Form("llama", biases=_LINEAR),
    "minicpm": Form("minicpm", biases=_LINEAR),
    "ministral3": Form("mistral3", biases=_LINEAR),
    "mistral": Form("llama", biases=_LINEAR),
    "olmo2": Form("olmo2", tied=False, square=True),
    "olmo3": Form("olmo2", tied=False, square=True),
    "phi": Form("phi2", _ONE_NORM, _LINEAR, _LINEAR[1:], tied=False, square=True),
    "phi3": Form("phi3", {**_FUSED_QKV, **_FUSED_UP}, biases=(), square=True),
    "qwen2": Form("qwen2", square=True),
    "qwen3": Form("qwen3"),
    "smollm3": Form("smollm3"),
    "starcoder2": Form("starcoder2", {}, _LINEAR, _LINEAR[1:], square=True),
}
# Architectures of which llama.cpp lets every layer see everything, whatever its window.
WITHOUT_WINDOWS = ("llama", "phi3")
# Where llama.cpp reads what a scaling of RoPE needs.
_READS_DIVISORS = ("llama",)
_READS_LONGROPE = ("phi3", "minicpm")

# Of a number that float32 has rounded.
_ROUNDED = 1e-6


@dataclass(frozen=True)
class GgufModel:
    """A model as it is written. tensors: their shapes and whether they are matrices; constants: tensors that
    follow from the configuration, by their names."""

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], bool]]
    constants: Mapping[str, NDArray[np.float32]]


def gguf_form(checkpoint: Checkpoint, spec: ModelSpec) -> GgufModel:
    """The form of a directory that was read. Raises `CheckpointError` for what has none, by its name."""
    config = _text_config(checkpoint)
    model_type = spec.architecture
    if model_type not in FORMS:
        raise CheckpointError(
            f"{checkpoint.path}: model_type: found {found(model_type)}, which has no GGUF form here, "
            f"expected one of {', '.join(FORMS)}"
        )
    form = FORMS[model_type]
    _check(checkpoint, form, spec)
    keys, constants = _keys(form, config, spec, checkpoint)
    tensors = dict(_tensors(_names(form, spec), spec))
    tensors |= {name: (values.shape, False) for name, values in constants.items()}
    name = str(config.get("_name_or_path") or checkpoint.path.resolve().name)
    metadata = {
        "general.architecture": form.architecture,
        "general.type": "model",
        "general.name": name.rstrip("/").rpartition("/")[2],
        **{f"{form.architecture}.{key}": value for key, value in keys.items()},
    }
    return GgufModel(form.architecture, metadata, tensors, constants)


def _check(checkpoint: Checkpoint, form: Form, spec: ModelSpec) -> None:
    """Refuses what this engine would read and llama.cpp would not."""
    if (spec.arch.layers["num_experts"] > 0).any():
        raise CheckpointError(
            f"{checkpoint.path}: found a mixture of experts in a directory, expected a dense model, or a "
            "mixture's GGUF file"
        )
    refused = []
    biases = {part for parts in spec.layers for part in parts if part in _LINEAR}
    for wrong, what in ((biases - set(form.biases), "a bias of"), (set(form.needed) - biases, "no bias of")):
        refused += [f"{what} {part.removesuffix('_b')}" for part in sorted(wrong)]
    if form.tied is not None and spec.arch.tied != form.tied:
        refused.append(f"an output matrix that is {'' if spec.arch.tied else 'not '}the embedding")
    widths = spec.arch.layers["num_heads"] * spec.arch.layers["head_dim"]
    if form.square and (widths != spec.arch.hidden_size).any():
        refused.append(f"heads that are {widths.max()} wide beside a hidden state of {spec.arch.hidden_size}")
    if refused:
        raise CheckpointError(
            f"{checkpoint.path}: found {refused[0]}, which llama.cpp's {form.architecture} has no place for"
        )


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """That of the language model."""
    config = checkpoint.config
    text = config.get("text_config")
    return {**config, **text} if config.get("model_type") in TEXT_TYPES and isinstance(text, dict) else config


def _names(form: Form, spec: ModelSpec) -> dict[str, str | tuple[str, ...]]:
    names: dict[str, str | tuple[str, ...]] = {**NAMES, **form.names}
    layer = spec.layers[0]
    if not spec.arch.layers[0]["gated"]:
        names["up"] = "ffn_up"
    if form.architecture == "falcon" and layer["attention_norm"] != layer["mlp_norm"]:
        names["attention_norm"] = "attn_norm_2"
    return names


def _tensors(
    names: Mapping[str, str | tuple[str, ...]], spec: ModelSpec
) -> Iterator[tuple[str, tuple[tuple[int, ...], bool]]]:
    """Names, shapes, and whether they are matrices."""
    for index, parts in enumerate((*spec.layers, spec.rest)):
        row = spec.arch.layers[index] if parts is not spec.rest else None
        prefix = "" if row is None else str(names["layer"]).format(index)
        for part, sources in parts.items():
            of_part = names[part.removesuffix("_b")]
            suffix = "bias" if PARTS[part].kind is Kind.BIAS else "weight"
            outputs = sum(source.outputs for source in sources)
            sizes = [outputs] if isinstance(of_part, str) else _pieces(part, row, outputs)
            inputs = () if sources[0].inputs is None else (sources[0].inputs,)
            for name, size in zip([of_part] if isinstance(of_part, str) else of_part, sizes, strict=True):
                yield f"{prefix}{name}.{suffix}", ((size, *inputs), PARTS[part].kind is Kind.MATRIX)


def _pieces(part: str, row: Any, outputs: int) -> list[int]:
    """The outputs of Q, K and V, or of the gate and the linear half."""
    if part.startswith("up"):
        return [outputs // 2] * 2
    heads, kv_heads, head_dim = (int(row[name]) for name in ("num_heads", "num_kv_heads", "head_dim"))
    return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]


def _keys(
    form: Form, config: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """The keys behind the architecture's prefix, and tensors of constants."""
    arch, first, name = spec.arch, spec.arch.layers[0], form.architecture
    context = next(
        (config[key] for key in ("max_position_embeddings", "n_positions") if type(config.get(key)) is int),
        spec.max_positions,
    )
    epsilon = "layer_norm_epsilon" if arch.layer_norm else "layer_norm_rms_epsilon"
    keys: dict[str, Any] = {
        "block_count": arch.num_layers,
        "context_length": context,
        "embedding_length": arch.hidden_size,
        "feed_forward_length": int(first["intermediate_size"]),
        "attention.head_count": int(first["num_heads"]),
        "attention.head_count_kv": int(first["num_kv_heads"]),
        "attention.key_length": int(first["head_dim"]),
        "attention.value_length": int(first["head_dim"]),
        f"attention.{epsilon}": arch.norm_epsilon,
        "vocab_size": arch.vocab_size,
    }
    windows = arch.layers["window"]
    if (windows > 0).any():
        keys["attention.sliding_window"] = int(windows.max())
        if name == "olmo2":
            keys["attention.sliding_window_pattern"] = [bool(window) for window in windows]
    if first["attention_softcap"]:
        keys["attn_logit_softcapping"] = float(first["attention_softcap"])
    if arch.logits_softcap:
        keys["final_logit_softcapping"] = arch.logits_softcap
    if name in ("granite", "minicpm"):
        keys["embedding_scale"] = arch.embedding_scale
        keys["residual_scale"] = float(first["residual_scale"])
        keys["logit_scale"] = 1 / arch.logits_scale
    if name == "granite":
        keys["attention.scale"] = float(first["attention_scale"])
        if first["rope_table"] < 0:
            keys["rope.scaling.finetuned"] = False
    if name in ("command-r", "cohere2"):
        keys["logit_scale"] = arch.logits_scale
    if name == "gptneox":
        keys["use_parallel_residual"] = bool(first["parallel"])
    if name == "falcon":
        keys["tensor_data_layout"] = "jploski"
    rope, constants = _rope(form, config, spec, checkpoint)
    return {**keys, **rope}, constants


def _rope(
    form: Form, config: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """How queries and keys are rotated, in layers that see everything and in those with a window."""
    if not spec.rope_tables:
        return {}, {}
    table, name = spec.rope_tables[0], form.architecture
    section, kind = _section(config)
    theta = section.get("rope_theta", config.get("rope_theta", config.get("rotary_emb_base")))
    theta = _theta(table) if not isinstance(theta, int | float) else float(theta)
    keys: dict[str, Any] = {"rope.dimension_count": table.rotary_dim, "rope.freq_base": theta}
    constants: dict[str, NDArray[np.float32]] = {}
    plain = theta ** (-2.0 * np.arange(len(table.frequencies)) / table.rotary_dim)
    if kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(section["factor"])}
    elif kind == "llama3" and name in _READS_DIVISORS:
        constants["rope_freqs.weight"] = (plain / np.array(table.frequencies)).astype(np.float32)
    elif isinstance(table, LongRope) and name in _READS_LONGROPE:
        if name == "minicpm":
            keys["rope.scaling.type"] = "longrope"
        keys["rope.scaling.attn_factor"] = table.attention_factor
        keys["rope.scaling.original_context_length"] = table.original
        for length, frequencies in (("long", table.long_frequencies), ("short", table.frequencies)):
            constants[f"rope_factors_{length}.weight"] = (plain / np.array(frequencies)).astype(np.float32)
    elif kind == "yarn" and not isinstance(table, LongRope):
        key = "original_max_position_embeddings"
        original = config.get(key) or section.get(key) or spec.max_positions
        keys["rope.scaling.type"] = "yarn"
        keys["rope.scaling.factor"] = float(section.get("factor") or table.max_positions / original)
        keys["rope.scaling.original_context_length"] = int(original)
        for which in ("beta_fast", "beta_slow"):
            if section.get(which):
                keys[f"rope.scaling.yarn_{which}"] = float(section[which])
        if section.get("mscale_all_dim") and name == "mistral3":
            keys["rope.scaling.yarn_log_multiplier"] = float(section["mscale_all_dim"])
    elif kind != "default":
        raise CheckpointError(
            f"{checkpoint.path}: rope_type: found {found(kind)}, which GGUF's {name} has no place for"
        )
    if table.query_scale is not None:
        keys["attention.temperature_scale"] = table.query_scale[0]
    if len(spec.rope_tables) > 1:
        keys["rope.freq_base_swa"] = _theta(spec.rope_tables[1])
    return keys, constants


def _section(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What the configuration says of the layers that see everything, and the kind of scaling."""
    current, legacy = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    current = current.get("full_attention", current)
    section = {**current, **legacy}
    kind = str(legacy.get("rope_type", legacy.get("type", current.get("rope_type", "default"))))
    return section, {"su": "longrope"}.get(kind, kind)


def _theta(table: RopeTable) -> float:
    """Of a table without a scaling that changes the ratio of its frequencies."""
    if len(table.frequencies) < 2:
        return 10000.0
    return float((table.frequencies[0] / table.frequencies[1]) ** (table.rotary_dim / 2))


def check_same(path: object, spec: ModelSpec, written: ModelSpec) -> None:
    """Refuses a model of which the file says something else: GGUF has no place for it there.

    Raises `CheckpointError`.
    """
    for where, own, other in _compared(spec, written):
        if not _is_same(own, other):
            raise CheckpointError(
                f"{path}: {where}: found {found(own)}, which GGUF's {written.architecture} has no place "
                f"for: it would be read as {found(other)}"
            )


def _compared(spec: ModelSpec, written: ModelSpec) -> Iterator[tuple[str, Any, Any]]:
    """What has to be the same: where, as it is, and as it was written."""
    yield "context", spec.max_positions, written.max_positions
    own, other = spec.arch._asdict(), written.arch._asdict()
    rows, other_rows = own.pop("layers"), other.pop("layers")
    yield from ((name, own[name], other[name]) for name in own)
    yield "layers", len(rows), len(other_rows)
    for index, (row, other_row) in enumerate(zip(rows, other_rows, strict=False)):
        for name in row.dtype.names or ():
            if name == "rope_table":
                yield f"layer {index}: RoPE", _table(spec, row), _table(written, other_row)
            else:
                yield f"layer {index}: {name}", row[name].item(), other_row[name].item()
    for index, (parts, others) in enumerate(
        zip((*spec.layers, spec.rest), (*written.layers, written.rest), strict=False)
    ):
        where = f"layer {index}: parts" if parts is not spec.rest else "parts"
        yield where, sorted(parts), sorted(others)


def _table(spec: ModelSpec, row: Any) -> dict[str, Any] | None:
    index = int(row["rope_table"])
    if index < 0:
        return None
    table = spec.rope_tables[index]
    return {"kind": type(table).__name__} | vars(table)


def _is_same(own: Any, other: Any) -> bool:
    if isinstance(own, dict) and isinstance(other, dict):
        return own.keys() == other.keys() and all(_is_same(own[key], other[key]) for key in own)
    if isinstance(own, tuple | list) and isinstance(other, tuple | list):
        return len(own) == len(other) and all(map(_is_same, own, other))
    if isinstance(own, float) and isinstance(other, int | float):
        return math.isclose(own, other, rel_tol=_ROUNDED)
    return bool(own == other)
