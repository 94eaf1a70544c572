"""A model of a Hugging Face directory in GGUF's form: its name there, its metadata, its tensors.

What the form says is what the readers in `engine.models` read; so a model is written as its own spec says it,
and the header is read back: where a model says something that GGUF has no place for, the two specs differ,
and it is refused by name. Where each tensor lies, and in which order rotary pairs are stored, follows from
the spec that was read back, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import ModelSpec, Source
from pagellm.engine.models.decoder import Decoder, Names
from pagellm.engine.models.gguf import NAMES
from pagellm.engine.models.gguf_latent import latent_names
from pagellm.engine.models.multimodal import TEXT_TYPES
from pagellm.engine.quantization.gguf_architectures import FORMS, Form, check_form, form_of, notes_on
from pagellm.engine.quantization.gguf_keys import gguf_keys, rope_section
from pagellm.kernels.architecture import LAYER, PARTS, SOFTMAX, TOP_SOFTMAX, Kind

# Features that mean nothing in a layer without experts.
_ROUTING = (
    *("router", "renormalize", "score_floor", "router_scale", "expert_size"),
    *("expert_groups", "groups_per_token", "group_best"),
)

# What was published in few bits, and has no original that could be quantized instead.
KEPT = "MXFP4"
# Of a number that float32 has rounded.
_ROUNDED = 1e-6


class Shape(NamedTuple):
    """Of a tensor to write. is_packed: whether all that it is made of is in blocks of the type `KEPT`."""

    shape: tuple[int, ...]
    is_matrix: bool
    is_packed: bool = False


@dataclass(frozen=True)
class GgufModel:
    """A model as it is written.

    constants: tensors that follow from the configuration, by their names. notes: why llama.cpp does not read
    it, or reads it otherwise than this engine.
    """

    architecture: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Shape]
    constants: Mapping[str, NDArray[np.float32]]
    notes: tuple[str, ...]


def as_written(spec: ModelSpec) -> ModelSpec:
    """The model with an output matrix of its own, a copy of the embedding, where its form must have one."""
    form = form_of(spec)
    if form is None or form.tied is not False or not spec.arch.tied:
        return spec
    rest = {**spec.rest, "lm_head": spec.rest["embedding"]}
    return replace(spec, arch=spec.arch._replace(tied=False), rest=rest)


def gguf_form(checkpoint: Checkpoint, spec: ModelSpec) -> GgufModel:
    """The form of a directory that was read. Raises `CheckpointError` for what has none, by its name."""
    config, form = _text_config(checkpoint), form_of(spec)
    if form is None:
        raise CheckpointError(
            f"{checkpoint.path}: model_type: found {found(spec.architecture)}, which has no GGUF form here, "
            f"expected one of {', '.join(FORMS)}; or an OUT that is a directory of safetensors"
        )
    check_form(checkpoint, form, spec)
    keys, constants = gguf_keys(form, config, spec, checkpoint)
    tensors = dict(_tensors(checkpoint, _names(form, spec), spec))
    tensors |= {name: Shape(values.shape, False) for name, values in constants.items()}
    name = str(config.get("_name_or_path") or checkpoint.path.resolve().name)
    metadata = {
        "general.architecture": form.architecture,
        "general.type": "model",
        "general.name": name.rstrip("/").rpartition("/")[2],
        **{f"{form.architecture}.{key}": value for key, value in keys.items()},
    }
    return GgufModel(form.architecture, metadata, tensors, constants, tuple(notes_on(form, spec)))


def _text_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """That of the language model."""
    config = checkpoint.config
    text = config.get("text_config")
    return {**config, **text} if config.get("model_type") in TEXT_TYPES and isinstance(text, dict) else config


def _names(form: Form, spec: ModelSpec) -> Names:
    layer, row = spec.layers[0], spec.arch.layers[0]
    names: dict[str, str | tuple[str, ...]] = {**NAMES, **form.names}
    if row["latent_dim"]:
        split = form.architecture == "deepseek2"
        names |= latent_names(compressed=bool(row["query_rank"]), split=split)
    if not row["gated"]:
        names["up"] = "ffn_up"
    if form.architecture == "falcon" and layer["attention_norm"] != layer["mlp_norm"]:
        names["attention_norm"] = "attn_norm_2"
    return names


def _tensors(checkpoint: Checkpoint, names: Names, spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    """The tensors that a reader with these names looks for, those of experts stacked."""
    arch, whole = spec.arch, (*spec.layers, spec.rest)
    decoder = Decoder(
        **{name: value for name, value in arch._asdict().items() if name != "layers"},
        architecture=spec.architecture,
        num_layers=arch.num_layers,
        max_positions=spec.max_positions,
        names=names,
        features={name: arch.layers[name] for name in LAYER.names or ()},
        keys_as_values=[index for index, parts in enumerate(spec.layers) if _has_one_tensor(parts["qkv"])],
        biases={
            part.removesuffix("_b") for parts in whole for part in parts if PARTS[part].kind is Kind.BIAS
        },
        rope_tables=spec.rope_tables,
    )
    form = decoder.spec()
    for own, parts in zip(whole, (*form.layers, form.rest), strict=True):
        for part, sources in parts.items():
            types = {checkpoint.tensors[source.tensor].dtype for source in own.get(part, ())}
            for source in sources:
                # The gate of the shared experts has one row, which is a vector in GGUF.
                shape = source.stored_shapes[-1 if source.shape[0] == 1 and source.inputs else 0]
                yield source.tensor, Shape(shape, PARTS[part].kind is Kind.MATRIX, types == {KEPT})


def _has_one_tensor(qkv: Sequence[Source]) -> bool:
    """Whether keys and values are all that one tensor makes."""
    return len(qkv) == 3 and qkv[1] == qkv[2]


def check_same(checkpoint: Checkpoint, spec: ModelSpec, written: ModelSpec) -> list[str]:
    """Refuses a model of which the file says something else: GGUF has no place for it there.

    What llama.cpp's converter lets pass, too, because it changes next to nothing, is returned, to be said.
    Raises `CheckpointError`.
    """
    notes: dict[str, None] = {}
    config = _text_config(checkpoint)
    for where, own, other in _compared(spec, written):
        if not _is_same(own, other):
            told = _told(where.rpartition(": ")[2], config, own, other)
            if told is None:
                raise CheckpointError(
                    f"{checkpoint.path}: {where}: found {found(own)}, which GGUF's {written.architecture} "
                    f"has no place for: it would be read as {found(other)}"
                )
            notes[f"GGUF's {written.architecture} {told}"] = None
    return list(notes)


def _told(name: str, config: Mapping[str, Any], own: Any, other: Any) -> str | None:
    """What there is to say of a difference that is no reason to refuse a model; None: it is one."""
    if name == "latent_epsilon":
        return (
            f"has one epsilon for all norms: {other:g}, not {own:g}, for those of compressed queries and keys"
        )
    if name == "score_floor":
        return f"divides the scores of a token's experts by {other:g} at least, not {own:g}"
    others = {"frequencies": ()}
    untruncated = rope_section(config)[0].get("truncate") is False
    if name == "RoPE" and untruncated and own and other and _is_same(own | others, other | others):
        return "rounds the ends of YaRN's ramp to whole dimensions, which this model does not"
    return None


def _compared(spec: ModelSpec, written: ModelSpec) -> Iterator[tuple[str, Any, Any]]:
    """What has to be the same: where, as it is, and as it was written."""
    yield "context", spec.max_positions, written.max_positions
    own, other = spec.arch._asdict(), written.arch._asdict()
    rows, other_rows = own.pop("layers"), other.pop("layers")
    yield from ((name, own[name], other[name]) for name in own)
    yield "layers", len(rows), len(other_rows)
    for index, (row, other_row) in enumerate(zip(rows, other_rows, strict=False)):
        yield f"layer {index}: RoPE", _table(spec, row), _table(written, other_row)
        features, others = _features(row), _features(other_row)
        yield from ((f"layer {index}: {name}", features[name], others[name]) for name in features)
    for index, (parts, other_parts) in enumerate(
        zip((*spec.layers, spec.rest), (*written.layers, written.rest), strict=False)
    ):
        where = f"layer {index}: parts" if parts is not spec.rest else "parts"
        yield where, sorted(parts), sorted(other_parts)


def _features(row: Any) -> dict[str, Any]:
    """What a layer computes, where two ways to say it are one."""
    features = {name: row[name].item() for name in row.dtype.names if name != "rope_table"}
    if not features["num_experts"]:
        return {name: value for name, value in features.items() if name not in _ROUTING}
    if features["expert_groups"] == 1:
        features |= {"groups_per_token": 1, "group_best": 1}
    if features["router"] == TOP_SOFTMAX:
        features |= {"router": SOFTMAX, "renormalize": 1}
    # The best experts' part of a softmax is never so little.
    least = features["experts_per_token"] / features["num_experts"]
    is_best = features["router"] == SOFTMAX and not features["selection_bias"]
    if not features["renormalize"] or (is_best and features["score_floor"] < least):
        features["score_floor"] = 0.0
    return features


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
