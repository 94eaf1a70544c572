"""What a model is and what serving it would take, from its headers: weights are not read, nothing compiled.

(A GGUF file keeps the factors of RoPE as a tensor, which is read.) Of a model that is refused, everything
that can still be told, and each reason for which it is. Knows what the readers make of a checkpoint; does not
know how a report is shown.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import log, prod
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from pagellm.engine.checkpoints import (
    BLOCK_SIZES,
    SUPPORTED_DTYPES,
    Checkpoint,
    open_checkpoint,
    resolve_model,
)
from pagellm.engine.checkpoints.gguf import read_gguf
from pagellm.engine.checkpoints.json_files import CONFIG_FILE, read_json_object
from pagellm.engine.checks import JsonError, parse_json
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import CheckpointError
from pagellm.engine.execution.memory import read_memory
from pagellm.engine.execution.weights import (
    FORMAT_NAMES,
    formats_of,
    is_kept,
    kv_bytes_per_token,
    kv_format,
)
from pagellm.engine.files import read_plain
from pagellm.engine.loading import tokenizer_of
from pagellm.engine.models import ModelSpec, read_spec
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.tokenizer import Tokenizer
from pagellm.engine.tokenizer.chat_files import read_chat_templates
from pagellm.engine.tokenizer.chat_template import ChatTemplate
from pagellm.engine.tokenizer.thinking import THINKING_VARIABLES, markers_of_template
from pagellm.kernels.activation import KINDS
from pagellm.kernels.architecture import (
    LAYER_PARTS,
    NONE,
    PER_HEAD,
    REST_PARTS,
    SIGMOID,
    SOFTMAX,
    TOP_SOFTMAX,
    WHOLE,
    Formats,
    Kind,
    lay_out,
)
from pagellm.kernels.packing import FLOAT32, panels_size

Report = dict[str, Any]
_Read = TypeVar("_Read")

_ACTIVATIONS = {number: name for name, number in KINDS.items()}
_QK_NORMS = {NONE: "none", PER_HEAD: "per head", WHOLE: "whole"}
_ROUTERS = {SOFTMAX: "softmax", TOP_SOFTMAX: "softmax of the chosen", SIGMOID: "sigmoid"}
_SWITCHES = (
    *("gated", "value_norm", "pre_norm", "post_norm", "sub_norm", "parallel", "layer_scale"),
    *("sinks", "renormalize", "selection_bias", "expert_bias", "shared_gate"),
    *("expert_norms", "expert_scale"),
)
# Where a configuration says what can be told of a model that no reader takes: GGUF's key, config.json's.
_FACTS = {
    "num_layers": ("block_count", "num_hidden_layers"),
    "hidden_size": ("embedding_length", "hidden_size"),
    "num_heads": ("attention.head_count", "num_attention_heads"),
    "num_kv_heads": ("attention.head_count_kv", "num_key_value_heads"),
    "context_tokens": ("context_length", "max_position_embeddings"),
}
_KEYS = [
    *("model", "path", "format", "supported", "refusals", "files", "architecture", "weights"),
    *("kv_cache", "context", "tokenizer", "chat_template", "memory"),
]
_TOKENIZER_KINDS = {
    "gpt2": "byte-level BPE",
    "llama": "SentencePiece BPE",
    "gemma4": "SentencePiece BPE",
    "t5": "Unigram",
    "bert": "WordPiece",
    "rwkv": "RWKV",
    "plamo2": "PLaMo 2",
    "BPE": "BPE",
    "Unigram": "Unigram",
    "WordPiece": "WordPiece",
    "WordLevel": "WordLevel",
}


def inspect_model(model: str | PathLike[str], quantization: str = "auto") -> Report:
    """A report of JSON's types on a model: a known name, a local path or a hub id.

    quantization: of `EngineConfig`, by which formats and memory are counted. The keys:

        model, path, format     as asked for; the file or directory; "gguf", "safetensors" or null
        supported, refusals     whether it would be served, and each reason why not
        files                   of the weights, with their bytes
        architecture            its name, the numbers of the whole model, its RoPE tables, and its layers: the
                                features of each kind of layer beside the layers that have them; left_alone
                                says what of the checkpoint is no language model
        weights                 how many there are; by what method a directory's were quantized; types in the
                                file and formats in memory with bytes and share; what is converted, with
                                bytes a weight, and whether that rounds
        kv_cache                its format, bytes a token, bytes of the blocks of one sequence as long as the
                                context
        context                 in tokens
        tokenizer               its kind, size and end tokens
        chat_template           null, or its names, the variables that it reads, whether it knows tools and
                                how it is told to think
        memory                  bytes that weights and one whole context take, and that the machine has free

    What cannot be told is null. Raises `CheckpointError` where there is nothing that looks like a model, and
    for a known name or a hub id that cannot be fetched.
    """
    refusals: list[str] = []

    def attempt(read: Callable[..., _Read], *arguments: Any) -> _Read | None:
        try:
            return read(*arguments)
        except CheckpointError as error:
            if str(error) not in refusals:
                refusals.append(str(error))
            return None

    directory = Path(os.path.expanduser(model)) if model and isinstance(model, str | PathLike) else None
    if directory is not None and (directory / CONFIG_FILE).exists():
        path = attempt(resolve_model, model) or directory
    else:
        path = resolve_model(model)
    report: Report = dict.fromkeys(_KEYS)
    report |= {"model": str(model), "path": str(path)}
    opened = None if refusals else attempt(open_checkpoint, path)
    if opened is None:
        opened = _rest_of(path)
    if opened is not None:
        with replace(opened, headers_only=True) as checkpoint:
            spec = None if refusals else attempt(read_spec, checkpoint)
            refusals += _unread_types(checkpoint) if spec is None else []
            tokenizer = attempt(tokenizer_of, checkpoint, spec.vocab_size if spec else None)
            report |= _of_checkpoint(checkpoint)
            if spec is not None:
                formats = formats_of(checkpoint, spec, quantization)
                report |= _of_spec(spec) | _of_memory(checkpoint, spec, formats, report["weights"])
            report |= _of_tokenizer(checkpoint, tokenizer)
    return report | {"supported": not refusals, "refusals": refusals}


def _rest_of(path: Path) -> Checkpoint | None:
    """What can be read of a model that does not open: one part of it, or its configuration."""
    try:
        if path.is_dir():
            return Checkpoint(path, "safetensors", read_json_object(path / CONFIG_FILE), {})
        return read_gguf(path)
    except CheckpointError:
        return None


def _unread_types(checkpoint: Checkpoint) -> list[str]:
    """A refusal for each type of element that is not supported, whatever else the model is refused for."""
    counts = Counter(tensor.dtype for tensor in checkpoint.tensors.values())
    return [
        f"{checkpoint.path}: {count} tensors of type {dtype}, expected one of {SUPPORTED_DTYPES}"
        for dtype, count in counts.items()
        if dtype not in BLOCK_SIZES
    ]


def _of_checkpoint(checkpoint: Checkpoint) -> Report:
    """What the file says, whoever can or cannot use it."""
    key = "model_type" if checkpoint.format == "safetensors" else "general.architecture"
    config, name = checkpoint.config, checkpoint.config.get(key)
    if isinstance(config.get("text_config"), dict):
        config = config | config["text_config"]
    facts = {}
    for fact, names in _FACTS.items():
        place = f"{name}.{names[0]}" if checkpoint.format == "gguf" else names[1]
        value = config.get(place)
        facts[fact] = value if type(value) is int and value > 0 else None
    context = facts.pop("context_tokens")
    types: dict[str, list[int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = types.setdefault(tensor.dtype, [0, 0])
        entry[0] += tensor.num_bytes
        entry[1] += prod(tensor.shape)
    return {
        "format": checkpoint.format,
        "files": [{"name": file.path.name, "bytes": file.num_bytes} for file in checkpoint.files],
        "architecture": {"name": name if isinstance(name, str) else None} | facts,
        "weights": None
        if not types
        else {
            "count": sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()),
            "quantization": checkpoint.quantization or None,
            "file": _shares(types, "type"),
            "memory": None,
            "converted": None,
        },
        "context": context,
    }


def _shares(sizes: dict[str, list[int]], label: str) -> list[Report]:
    """Names with their bytes and weights, and each one's share of all bytes, the largest first."""
    total = sum(num_bytes for num_bytes, _ in sizes.values())
    return [
        {
            label: name,
            "bytes": num_bytes,
            "weights": count,
            "share": num_bytes / total if total else 0.0,
            "bits_a_weight": 8 * num_bytes / count if count else 0.0,
        }
        for name, (num_bytes, count) in sorted(sizes.items(), key=lambda item: -item[1][0])
    ]


def _of_spec(spec: ModelSpec) -> Report:
    """The architecture as the step will see it."""
    arch = spec.arch
    kinds: dict[bytes, list[int]] = {}
    for index in range(arch.num_layers):
        kinds.setdefault(arch.layers[index].tobytes(), []).append(index)
    layers = []
    for indices in kinds.values():
        row = arch.layers[indices[0]]
        features = {name: row[name].item() for name in row.dtype.names}
        features["activation"] = _ACTIVATIONS[features["activation"]]
        features["qk_norm"] = _QK_NORMS[features["qk_norm"]]
        features["router"] = _ROUTERS[features["router"]]
        for name in _SWITCHES:
            features[name] = bool(features[name])
        layers.append({"layers": indices} | features)
    return {
        "architecture": {
            "name": spec.architecture,
            "num_layers": arch.num_layers,
            "hidden_size": arch.hidden_size,
            "vocab_size": arch.vocab_size,
            "norm": "LayerNorm" if arch.layer_norm else "RMSNorm",
            "learned_positions": arch.num_positions,
            "tied": arch.tied,
            "embedding_scale": arch.embedding_scale,
            "logits_scale": arch.logits_scale,
            "logits_softcap": arch.logits_softcap,
            "rope": [_rope(table) for table in spec.rope_tables],
            "layers": layers,
            "left_alone": spec.left_alone or None,
        },
        "context": spec.max_positions,
    }


def _rope(table: RopeTable) -> Report:
    """Its numbers; scaling: none, linear, or of each frequency by itself."""
    frequencies, base, factor = [one for one in table.frequencies if one], None, None
    scaling = "by frequency"
    if len(frequencies) > 1:
        ratio = frequencies[0] / frequencies[1]
        if all(abs(f / g / ratio - 1) < 1e-6 for f, g in pairwise(frequencies)):
            base = ratio ** len(table.frequencies)
            factor = 1 / frequencies[0]
            scaling = "none" if abs(log(factor)) < 1e-6 else "linear"
    return {
        "rotated_dims": 2 * len(frequencies),
        "scaling": scaling,
        "base": None if base is None else round(base, 2),
        "factor": None if factor is None else round(factor, 4),
        "attention_factor": table.attention_factor,
        "query_scale": None if table.query_scale is None else list(table.query_scale),
    }


def _of_memory(checkpoint: Checkpoint, spec: ModelSpec, formats: Formats, weights: Report) -> Report:
    """Weights and KV cache as they would be kept."""
    sizes: dict[str, list[int]] = {}
    converted: dict[tuple[str, str], list[int]] = {}
    rows = zip(
        [LAYER_PARTS] * spec.arch.num_layers + [REST_PARTS],
        (*spec.arch.layers, None),
        (*spec.layers, spec.rest),
        formats,
        strict=True,
    )
    for parts, row, sources, by_part in rows:
        for part in parts:
            shape = part.shape(spec.arch, row)
            if part.kind is not Kind.MATRIX:
                entry = sizes.setdefault(FORMAT_NAMES[FLOAT32], [0, 0])
                entry[0] += 4 * part.size(spec.arch, row)
                entry[1] += prod(shape)
                continue
            runs = part.runs(spec.arch, row, by_part)
            for run in runs:
                entry = sizes.setdefault(FORMAT_NAMES[run.format], [0, 0])
                entry[0] += 4 * panels_size(run.format, run.columns, shape[1])
                entry[1] += run.columns * shape[1]
            for index, source in enumerate(sources.get(part.name, ())):
                dtype = checkpoint.tensors[source.tensor].dtype
                format = runs[index if len(runs) > 1 else 0].format
                if not is_kept(dtype, format):
                    count = source.outputs * shape[1]
                    entry = converted.setdefault((dtype, FORMAT_NAMES[format]), [0, 0])
                    entry[0] += 4 * panels_size(format, source.outputs, shape[1])
                    entry[1] += count
    cache_format = kv_format(formats)
    token_bytes = kv_bytes_per_token(spec.arch, cache_format)
    weight_bytes = 4 * lay_out(spec.arch, formats).size
    # Blocks behind the windows of all layers are given back.
    settings = EngineConfig()
    context_bytes = token_bytes * settings.block_size * settings.most_blocks(spec.max_positions, spec.window)
    return {
        "weights": weights
        | {
            "memory": _shares(sizes, "format"),
            "converted": [
                {
                    "type": dtype,
                    "format": format,
                    "bytes_a_weight": num_bytes / count,
                    "rounds": format != FORMAT_NAMES[FLOAT32],
                }
                for (dtype, format), (num_bytes, count) in sorted(converted.items())
            ],
        },
        "kv_cache": {
            "format": FORMAT_NAMES[cache_format],
            "bytes_a_token": token_bytes,
            "bytes_of_context": context_bytes,
        },
        "memory": {
            "weight_bytes": weight_bytes,
            "kv_bytes_of_context": context_bytes,
            "available_bytes": read_memory().available,
        },
    }


def _of_tokenizer(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Report:
    """The tokenizer's kind, as its files call it, and what the chat template reads."""
    kind = _tokenizer_kind(checkpoint)
    if tokenizer is None:
        return {"tokenizer": {"kind": kind} if kind else None, "chat_template": _of_files(checkpoint)}
    if tokenizer.vocab_size == 0:
        return {"tokenizer": {"kind": None, "vocab_size": 0, "absence": tokenizer.absence}}
    report: Report = {
        "tokenizer": {
            "kind": kind,
            "vocab_size": tokenizer.vocab_size,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_ids": list(tokenizer.eos_token_ids),
            "adds_bos": tokenizer.add_bos_token,
        }
    }
    if tokenizer.chat_template is not None:
        report["chat_template"] = _of_template(tokenizer.chat_template)
    return report


def _of_files(checkpoint: Checkpoint) -> Report | None:
    """The chat template of a model whose tokenizer is refused, as far as it is found."""
    try:
        if checkpoint.format == "gguf":
            text = checkpoint.config.get("tokenizer.chat_template")
            sources = {"default": text} if isinstance(text, str) else {}
        else:
            path = checkpoint.path / "tokenizer_config.json"
            config = parse_json(read_plain(path)) if path.exists() else {}
            sources = read_chat_templates(checkpoint.path, config if isinstance(config, dict) else {})
    except (CheckpointError, OSError, JsonError):
        return None
    return _of_template(ChatTemplate(sources)) if sources else None


def _of_template(template: ChatTemplate) -> Report:
    names = sorted(template.sources)
    try:
        variables = template.variables()
    except CheckpointError as error:
        return {"names": names, "refusal": str(error)}
    markers = markers_of_template(template)
    return {
        "names": names,
        "refusal": None,
        "variables": sorted(variables),
        "tools": "tools" in variables,
        "thinking": {
            "variables": [name for name in THINKING_VARIABLES if name in variables],
            "markers": None if markers is None else list(markers),
        },
    }


def _tokenizer_kind(checkpoint: Checkpoint) -> str | None:
    if checkpoint.format == "gguf":
        name = checkpoint.config.get("tokenizer.ggml.model")
        pre = checkpoint.config.get("tokenizer.ggml.pre")
        kind = _TOKENIZER_KINDS.get(name, name) if isinstance(name, str) else None
        return f"{kind}, {pre}" if kind and name == "gpt2" and isinstance(pre, str) else kind
    name = _model_of_tokenizer_json(checkpoint.path / "tokenizer.json")
    if name is not None:
        return _TOKENIZER_KINDS.get(name, name)
    if (checkpoint.path / "tokenizer.model").exists():
        return "SentencePiece"
    return "byte-level BPE" if (checkpoint.path / "vocab.json").exists() else None


def _model_of_tokenizer_json(path: Path) -> str | None:
    try:
        model = parse_json(read_plain(path))["model"]
    except (OSError, JsonError, TypeError, KeyError):
        return None
    if not isinstance(model, dict) or not isinstance(model.get("type", "BPE"), str):
        return None
    return f"{model.get('type', 'BPE')}" + (" with byte fallback" * (model.get("byte_fallback") is True))
