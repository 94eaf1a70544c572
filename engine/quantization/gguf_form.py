"""A model of a Hugging Face directory in GGUF's form: its name there, its metadata, its tensors.

What the form says is what the readers in `engine.models` read; so a model is written as its own spec says it,
and the header is read back: where a model says something that GGUF has no place for, the two specs differ,
and it is refused by name. Where each tensor lies, and in which order rotary pairs are stored, follows from
the spec that was read back, too.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import ModelSpec, Source, gemma4
from pagellm.engine.models.decoder import Decoder, Names
from pagellm.engine.models.gguf import NAMES
from pagellm.engine.models.gguf_latent import latent_names
from pagellm.engine.models.gguf_rope import STILL
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.multimodal import TEXT_TYPES
from pagellm.engine.models.rope import LongRope, RopeTable
from pagellm.kernels.architecture import LAYER, PARTS, SIGMOID, SOFTMAX, TOP_SOFTMAX, Architecture, Kind


@dataclass(frozen=True)
class Form:
    """What a model_type is in GGUF, and what llama.cpp's loader of it asks for.

    names: of tensors that are called otherwise than llama's. biases: the parts that may have one; needed:
    that must. tied: whether the output matrix is the embedding or is there; None: either. square:
    whether a layer's heads together have to be as wide as its hidden state. own_width: whether the width of
    experts has a key of its own; one_width: whether what is beside them has that of a feed-forward alone.
    """

    architecture: str
    names: Names = field(default_factory=dict)
    biases: tuple[str, ...] = ("qkv_b",)
    needed: tuple[str, ...] = ()
    tied: bool | None = None
    square: bool = False
    own_width: bool = False
    one_width: bool = False


_ONE_NORM = {"mlp_norm": "attn_norm"}
_FUSED_QKV = {"qkv": "attn_qkv"}
_FUSED_UP = {"up": "ffn_up"}
_LINEAR = ("qkv_b", "output_b", "up_b", "down_b")
_ATTENTION = _LINEAR[:2]
_OF_GPT2: Any = {"names": _FUSED_QKV, "biases": _LINEAR, "needed": _LINEAR, "square": True}
_DEEPSEEK = Form("deepseek2", biases=(), own_width=True)
_GRANITE_MOE = Form("granitemoe", biases=_ATTENTION)
FORMS = {
    "bitnet": Form("bitnet", biases=(), tied=True, square=True),
    "cohere": Form("command-r", _ONE_NORM, tied=True, square=True),
    "cohere2": Form("cohere2", _ONE_NORM, tied=True, square=True),
    "dbrx": Form("dbrx", {**_FUSED_QKV, "mlp_norm": "attn_output_norm"}, biases=(), tied=False, square=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "ernie4_5": Form("ernie4_5", biases=_ATTENTION),
    "ernie4_5_moe": Form("ernie4_5-moe", biases=_ATTENTION, own_width=True),
    "falcon": Form("falcon", {**_FUSED_QKV, **_ONE_NORM}, biases=(), square=True),
    "gemma2": Form("gemma2", tied=True),
    "gemma3_text": Form("gemma3"),
    "gemma4_text": Form(
        "gemma4", {**gemma4.GGUF_NAMES, "expert_up": gemma4.STACKED}, own_width=True, one_width=True
    ),
    "glm": Form("chatglm", _FUSED_UP, square=True),
    "glm4": Form("glm4", _FUSED_UP),
    "glm4_moe_lite": _DEEPSEEK,
    "gpt2": Form("gpt2", **_OF_GPT2),
    "gpt_bigcode": Form("starcoder", **_OF_GPT2),
    "gpt_neox": Form("gptneox", **_OF_GPT2, tied=False),
    "gpt_oss": Form(
        "gpt-oss", {"mlp_norm": "post_attention_norm"}, _ATTENTION, _ATTENTION, tied=False, own_width=True
    ),
    "granite": Form("granite", biases=_LINEAR),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "granitemoehybrid": Form("granite", biases=_LINEAR),
    "llama": Form("llama", biases=_LINEAR),
    "minicpm": Form("minicpm", biases=_LINEAR),
    "minicpm3": Form("minicpm3", biases=()),
    "ministral3": Form("mistral3", biases=_LINEAR),
    "mistral": Form("llama", biases=_LINEAR),
    "mixtral": Form("llama", biases=_ATTENTION),
    "olmo2": Form("olmo2", tied=False, square=True),
    "olmo3": Form("olmo2", tied=False, square=True),
    "olmoe": Form("olmoe", tied=False, square=True),
    "phi": Form("phi2", _ONE_NORM, _LINEAR, _LINEAR[1:], tied=False, square=True),
    "phi3": Form("phi3", {**_FUSED_QKV, **_FUSED_UP}, biases=(), square=True),
    "qwen2": Form("qwen2", square=True),
    "qwen2_moe": Form(
        "qwen2moe",
        {"router": ("ffn_gate_inp", "ffn_gate_inp_shexp")},
        tied=False,
        square=True,
        own_width=True,
    ),
    "qwen3": Form("qwen3"),
    "qwen3_moe": Form("qwen3moe", own_width=True),
    "smollm3": Form("smollm3"),
    "starcoder2": Form("starcoder2", {}, _LINEAR, _LINEAR[1:], square=True),
}
# Architectures of which llama.cpp lets every layer see everything, whatever its window.
_WITHOUT_WINDOWS = ("llama", "phi3")
# Where llama.cpp reads what a scaling of RoPE needs.
_READS_DIVISORS = ("llama",)
_READS_LONGROPE = ("phi3", "minicpm", "minicpm3")
# The numbers of layers of DeepSeek's models that llama.cpp reads without compressed queries, and those alone;
# and one more, with its vocabulary.
_LITE_LAYERS, _OTHER_LITE = (26, 27), (48, 128256)
_GATING = {SOFTMAX: 1, SIGMOID: 2}
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
    form = FORMS.get(spec.architecture)
    if form is None or form.tied is not False or not spec.arch.tied:
        return spec
    rest = {**spec.rest, "lm_head": spec.rest["embedding"]}
    return replace(spec, arch=spec.arch._replace(tied=False), rest=rest)


def gguf_form(checkpoint: Checkpoint, spec: ModelSpec) -> GgufModel:
    """The form of a directory that was read. Raises `CheckpointError` for what has none, by its name."""
    config = _text_config(checkpoint)
    model_type = spec.architecture
    if model_type not in FORMS:
        raise CheckpointError(
            f"{checkpoint.path}: model_type: found {found(model_type)}, which has no GGUF form here, "
            f"expected one of {', '.join(FORMS)}; or an OUT that is a directory of safetensors"
        )
    form = FORMS[model_type]
    if model_type == "granitemoehybrid" and (spec.arch.layers["num_experts"] > 0).any():
        form = _GRANITE_MOE
    _check(checkpoint, form, spec)
    keys, constants = _keys(form, config, spec, checkpoint)
    tensors = dict(_tensors(checkpoint, _names(form, spec), spec))
    tensors |= {name: Shape(values.shape, False) for name, values in constants.items()}
    name = str(config.get("_name_or_path") or checkpoint.path.resolve().name)
    metadata = {
        "general.architecture": form.architecture,
        "general.type": "model",
        "general.name": name.rstrip("/").rpartition("/")[2],
        **{f"{form.architecture}.{key}": value for key, value in keys.items()},
    }
    return GgufModel(form.architecture, metadata, tensors, constants, tuple(_notes(form, spec)))


def _notes(form: Form, spec: ModelSpec) -> Iterator[str]:
    """What there is to say of llama.cpp and this model."""
    name, layers = form.architecture, spec.arch.layers
    if name in _WITHOUT_WINDOWS and (layers["window"] > 0).any():
        yield f"llama.cpp lets every layer of {name} see everything, this engine obeys the window"
    if name == "olmoe" and (layers["num_kv_heads"] != layers["num_heads"]).any():
        yield "llama.cpp reads olmoe with as many KV heads as heads alone, this engine reads others, too"
    if name == "deepseek2":
        sizes, has_rank = (spec.arch.num_layers, spec.arch.vocab_size), (layers["query_rank"] > 0).all()
        if has_rank == (sizes[0] in _LITE_LAYERS or sizes == _OTHER_LITE):
            yield (
                f"llama.cpp does not read deepseek2 with {sizes[0]} layers and queries that are "
                f"{'' if has_rank else 'not '}compressed, this engine does"
            )


def _check(checkpoint: Checkpoint, form: Form, spec: ModelSpec) -> None:
    """Refuses what this engine would read and llama.cpp would not."""
    refused = []
    biases = {part for parts in spec.layers for part in parts if part in _LINEAR}
    for wrong, what in ((biases - set(form.biases), "a bias of"), (set(form.needed) - biases, "no bias of")):
        refused += [f"{what} {part.removesuffix('_b')}" for part in sorted(wrong)]
    if form.tied is not None and spec.arch.tied != form.tied:
        refused.append(f"an output matrix that is {'' if spec.arch.tied else 'not '}the embedding")
    layers = spec.arch.layers
    widths = layers["num_heads"] * layers["head_dim"]
    if form.square and (widths != spec.arch.hidden_size).any():
        refused.append(f"heads that are {widths.max()} wide beside a hidden state of {spec.arch.hidden_size}")
    if form.architecture == "minicpm3" and not (layers["query_rank"] > 0).all():
        refused.append("queries that are not compressed")
    if refused:
        raise CheckpointError(
            f"{checkpoint.path}: found {refused[0]}, which llama.cpp's {form.architecture} has no place for"
        )


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
        "attention.head_count": int(first["num_heads"]),
        "attention.head_count_kv": int(first["num_kv_heads"]),
        "attention.key_length": int(first["head_dim"]),
        "attention.value_length": int(first["head_dim"]),
        f"attention.{epsilon}": arch.norm_epsilon,
        "vocab_size": arch.vocab_size,
        **_feed_forward_keys(form, config, arch),
    }
    if first["latent_dim"]:
        keys |= _latent_keys(form, first)
    if name == "gemma4":
        keys |= _gemma4_keys(config, arch)
    if first["qkv_clip"]:
        keys["attention.clamp_kqv"] = float(first["qkv_clip"])
    windows = arch.layers["window"]
    if (windows > 0).any():
        keys["attention.sliding_window"] = int(windows.max())
        if name == "olmo2":
            keys["attention.sliding_window_pattern"] = [bool(window) for window in windows]
    if first["attention_softcap"]:
        keys["attn_logit_softcapping"] = float(first["attention_softcap"])
    if arch.logits_softcap:
        keys["final_logit_softcapping"] = arch.logits_softcap
    if name in ("granite", "granitemoe", "minicpm"):
        keys["embedding_scale"] = arch.embedding_scale
        keys["residual_scale"] = float(first["residual_scale"])
        keys["logit_scale"] = 1 / arch.logits_scale
    if name in ("granite", "granitemoe"):
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


def _feed_forward_keys(form: Form, config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The width of the feed-forward, and what there is to say of experts."""
    layers = arch.layers
    sparse, name = layers["num_experts"] > 0, form.architecture
    width = int((layers if form.one_width else layers[~sparse])["intermediate_size"].max(initial=0))
    if not sparse.any() and name != "deepseek2":
        return {"feed_forward_length": width}
    row = layers[int(sparse.argmax())]
    size, shared = int(row["expert_size"]), int(row["intermediate_size"]) if sparse.any() else 0
    said = config.get("intermediate_size")
    if not width:  # that of no layer; where experts have no key of their own it is theirs
        width = said if form.own_width and type(said) is int and said > 0 else size
    keys: dict[str, Any] = {"feed_forward_length": width}
    if form.own_width:
        keys["expert_feed_forward_length"] = size or width
    if sparse.any():
        keys["expert_count"] = int(row["num_experts"])
        keys["expert_used_count"] = int(row["experts_per_token"])
    if name == "deepseek2":
        keys["leading_dense_block_count"] = int(sparse.argmax()) if sparse.any() else arch.num_layers
        keys["expert_shared_count"] = shared // max(1, size)
        keys["expert_weights_scale"] = float(row["router_scale"])
        keys["expert_weights_norm"] = bool(row["renormalize"])
        keys["expert_gating_func"] = _GATING[int(row["router"])]
        if sparse.any():
            keys["expert_group_count"] = int(row["expert_groups"])
            keys["expert_group_used_count"] = int(row["groups_per_token"])
    elif shared and not form.one_width:
        keys["expert_shared_feed_forward_length"] = shared
    if name == "ernie4_5-moe":
        keys["leading_dense_block_count"] = int(config.get("moe_layer_start_index", 1))
        keys["interleave_moe_layer_step"] = int(config.get("moe_layer_interval", 1))
        keys["expert_shared_count"] = shared // max(1, size)
    return keys


def _gemma4_keys(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    """The heads of layers that see everything and of those that do not, which differ in size."""
    layers = arch.layers
    slides = layers["window"] > 0
    full, local = (int(layers[rows]["head_dim"].max(initial=0)) for rows in (~slides, slides))
    return {
        "attention.head_count_kv": layers["num_kv_heads"].tolist(),
        "attention.key_length": full,
        "attention.value_length": full,
        "attention.key_length_swa": local or full,
        "attention.value_length_swa": local or full,
        "attention.shared_kv_layers": 0,
        "embedding_length_per_layer_input": 0,
        "attention.sliding_window": int(config.get("sliding_window", 512)),
        "attention.sliding_window_pattern": slides.tolist(),
    }


def _latent_keys(form: Form, row: Any) -> dict[str, Any]:
    """The sizes of latent attention: of what is kept, and of heads, which may have keys of their own."""
    latent, rotary = int(row["latent_dim"]), int(row["head_dim"] - row["latent_dim"])
    key, value = int(row["nope_dim"]) + rotary, int(row["value_dim"])
    keys = {"attention.kv_lora_rank": latent}
    if row["query_rank"]:
        keys["attention.q_lora_rank"] = int(row["query_rank"])
    if form.architecture != "deepseek2":
        heads = int(row["num_heads"])
        return keys | {
            "attention.head_count_kv": heads, "attention.key_length": key, "attention.value_length": value
        }  # fmt: skip
    return keys | {
        "attention.key_length": latent + rotary,
        "attention.value_length": latent,
        "attention.key_length_mla": key,
        "attention.value_length_mla": value,
    }


def _rope(
    form: Form, config: Mapping[str, Any], spec: ModelSpec, checkpoint: Checkpoint
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """How queries and keys are rotated, in layers that see everything and in those with a window."""
    if not spec.rope_tables:
        return {}, {}
    if form.architecture == "gemma4":
        return _gemma4_rope(config, spec)
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
        if section.get("mscale_all_dim") and name in ("mistral3", "deepseek2"):
            # Of deepseek2 a tenth: see `gguf_rope.score_factor`.
            factor = 0.1 if name == "deepseek2" else 1.0
            keys["rope.scaling.yarn_log_multiplier"] = factor * float(section["mscale_all_dim"])
    elif kind != "default":
        raise CheckpointError(
            f"{checkpoint.path}: rope_type: found {found(kind)}, which GGUF's {name} has no place for"
        )
    if table.query_scale is not None:
        keys["attention.temperature_scale"] = table.query_scale[0]
    if len(spec.rope_tables) > 1:
        keys["rope.freq_base_swa"] = _theta(spec.rope_tables[1])
    return keys, constants


def _gemma4_rope(
    config: Mapping[str, Any], spec: ModelSpec
) -> tuple[dict[str, Any], dict[str, NDArray[np.float32]]]:
    """Of layers that see everything, of whose pairs some do not turn, and of the others."""
    layers = spec.arch.layers
    keys: dict[str, Any] = {}
    constants: dict[str, NDArray[np.float32]] = {}
    sections: Any = config.get("rope_parameters") or gemma4.DEFAULTS["rope_parameters"]
    for suffix, kind, rows in (
        ("", FULL, layers[layers["window"] == 0]),
        ("_swa", SLIDING, layers[layers["window"] > 0]),
    ):
        if not len(rows):
            continue
        table = spec.rope_tables[int(rows[0]["rope_table"])]
        theta = float(sections[kind]["rope_theta"])
        keys[f"rope.freq_base{suffix}"] = theta
        keys[f"rope.dimension_count{suffix}"] = table.rotary_dim
        if not suffix:
            turned = np.array(table.frequencies)
            plain = theta ** (-2.0 * np.arange(len(turned)) / table.rotary_dim)
            divisors = np.divide(plain, turned, out=np.full(len(turned), STILL), where=turned > 0)
            constants["rope_freqs.weight"] = divisors.astype(np.float32)
    return keys, constants


def _section(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """What the configuration says of the layers that see everything, and the kind of scaling."""
    current, legacy = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    current = current.get(FULL, current)
    section = {**current, **legacy}
    kind = str(legacy.get("rope_type", legacy.get("type", current.get("rope_type", "default"))))
    return section, {"su": "longrope"}.get(kind, kind)


def _theta(table: RopeTable) -> float:
    """Of a table without a scaling that changes the ratio of its frequencies."""
    if len(table.frequencies) < 2:
        return 10000.0
    return float((table.frequencies[0] / table.frequencies[1]) ** (table.rotary_dim / 2))


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
    untruncated = _section(config)[0].get("truncate") is False
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
