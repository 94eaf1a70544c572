"""The command `inspect`: a report on a model, for people or as JSON; `inspection` knows what is in it."""

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from math import isclose
from typing import Any

from pagellm.engine.config import QUANTIZATIONS

_LABEL_WIDTH = 15
_LINE_WIDTH = 110
_GATED_NAMES = {
    "silu": "SwiGLU",
    "gelu_tanh": "GeGLU (tanh)",
    "gelu": "GeGLU",
    "relu": "ReGLU",
    "clamped_swiglu": "clamped SwiGLU",
}
_PLAIN_NAMES = {"silu": "SiLU", "gelu_tanh": "GELU (tanh)", "gelu": "GELU", "relu": "ReLU"}


def add_command(commands: "argparse._SubParsersAction[Any]") -> None:
    """Adds `inspect`; after parsing, `options.command(options)` runs it."""
    parser = commands.add_parser(
        "inspect", help="say what a model is and what it takes", description=_inspect.__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="a known name, a path or a hub id")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="auto", help="format of the weights (default: auto)"
    )
    parser.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    """Say what a model is, what serving it takes, and whether it is refused, and why.

    Headers are read, weights are not. A model that is refused is reported, too, with exit status 0 and
    "supported": false; only where there is no such model it is 2.
    """
    from pagellm.engine.commands.inspection import inspect_model

    report = inspect_model(options.model, options.quantization)
    if options.json:
        print(json.dumps(report, allow_nan=False))
        return
    print(f"{options.model}: {'supported' if report['supported'] else 'refused'}")
    for label, lines in _lines(report):
        for line in lines:
            indent = " " * _LABEL_WIDTH
            print(
                textwrap.fill(
                    line, _LINE_WIDTH, initial_indent=f"{label:{_LABEL_WIDTH}}", subsequent_indent=indent
                )
            )
            label = ""


def _lines(report: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Labels, and the lines beside each."""
    if report["refusals"]:
        yield "why", [reason.removeprefix(f"{report['path']}: ") for reason in report["refusals"]]
    if report["files"]:
        total = _size(sum(file["bytes"] for file in report["files"]))
        names = [file["name"] for file in report["files"]]
        more = f" and {len(names) - 1} more files" if len(names) > 1 else ""
        yield "file", [f"{names[0]}{more}, {report['format']}, {total}"]
    if report["architecture"]:
        yield "architecture", list(_architecture(report["architecture"], report["weights"]))
    if report["weights"]:
        yield "weights", list(_weights(report["weights"]))
    if report["kv_cache"]:
        cache = report["kv_cache"]
        yield "KV cache", [f"{cache['format']}, {cache['bytes_a_token']:,} bytes a token"]
    if report["context"]:
        yield "context", [f"{report['context']:,} tokens"]
    if report["tokenizer"]:
        yield "tokenizer", [_tokenizer(report["tokenizer"])]
        yield "chat template", [_chat_template(report["chat_template"])]
    if report["memory"]:
        yield "memory", [_memory(report["memory"])]


def _architecture(facts: dict[str, Any], weights: dict[str, Any] | None) -> Iterator[str]:
    numbers = [facts["name"] or "unknown"]
    for name, unit in (("num_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens known")):
        if facts.get(name):
            numbers.append(f"{facts[name]:,} {unit}")
    if weights is not None:
        numbers.append(f"{_number(weights['count'])} weights")
    yield ", ".join(numbers)
    if "layers" not in facts:
        return
    of_model = [
        f"{facts['norm']}",
        "output matrix is the embedding" if facts["tied"] else "output matrix of its own",
    ]
    if facts["learned_positions"]:
        of_model.append("learned positions")
    for name, text, neutral in (
        ("embedding_scale", "embedding times", 1.0),
        ("logits_scale", "logits times", 1.0),
        ("logits_softcap", "logits softly capped at", 0.0),
    ):
        if facts[name] != neutral:
            of_model.append(f"{text} {facts[name]:.5g}")
    yield ", ".join(of_model)
    described = [_layer(kind, facts["rope"]) for kind in facts["layers"]]
    shared = [text for text in described[0] if all(text in texts for texts in described)]
    yield ", ".join(shared)
    if len(described) > 1:
        for kind, texts in zip(facts["layers"], described, strict=True):
            own = ", ".join(text for text in texts if text not in shared)
            yield f"layer{'s' * (len(kind['layers']) > 1)} {_ranges(kind['layers'])}: {own}"
    if facts["left_alone"]:
        yield facts["left_alone"]


def _layer(features: dict[str, Any], rope: list[dict[str, Any]]) -> list[str]:
    """What one kind of layer is like."""
    heads, kv_heads, head_dim = features["num_heads"], features["num_kv_heads"], features["head_dim"]
    rotated_of = head_dim
    if features["latent_dim"]:
        rotated_of = head_dim - features["latent_dim"]
        head_dim = features["nope_dim"] + rotated_of
        texts = [_latent(features, head_dim)]
    else:
        texts = [f"{heads} heads of {head_dim}"]
        if kv_heads < heads:
            texts.append("one KV head for all" if kv_heads == 1 else f"{kv_heads} KV heads")
    texts.append(f"a window of {features['window']:,} tokens" if features["window"] else "full attention")
    texts.append(
        _rotation(rope[features["rope_table"]], rotated_of) if features["rope_table"] >= 0 else "no rotation"
    )
    if features["qk_norm"] != "none":
        texts.append(
            "QK-norm of each head" if features["qk_norm"] == "per head" else "QK-norm of all heads together"
        )
    if features["value_norm"]:
        texts.append("values normalised")
    if not isclose(features["attention_scale"], head_dim**-0.5, rel_tol=1e-6):
        texts.append(f"scores times {features['attention_scale']:.5g}")
    if features["attention_softcap"]:
        texts.append(f"scores softly capped at {features['attention_softcap']:g}")
    norms = [name for name in ("pre", "post") if features[f"{name}_norm"]]
    texts.append(
        {"pre": "norms before", "post": "norms after", "pre post": "norms before and after"}.get(
            " ".join(norms), "no norms"
        )
    )
    if features["sub_norm"]:
        texts.append("norms inside attention and feed-forward")
    if features["parallel"]:
        texts.append("attention and feed-forward in parallel")
    if features["sinks"]:
        texts.append("attention sinks")
    if features["qkv_clip"]:
        texts.append(f"queries, keys and values clipped at {features['qkv_clip']:g}")
    if features["residual_scale"] != 1:
        texts.append(f"residuals times {features['residual_scale']:.4g}")
    if features["layer_scale"]:
        texts.append("the sum of each layer times a number")
    kind = features["activation"]
    name = (_GATED_NAMES if features["gated"] else _PLAIN_NAMES).get(
        kind, kind.replace("_", " ") + " with a gate" * features["gated"]
    )
    if features["num_experts"]:
        texts.append(_experts(features, name))
    if features["intermediate_size"]:
        beside = " beside them" if features["num_experts"] else ""
        beside += ", each with norms of its own" * features["expert_norms"]
        gate = " times a gate of its own" if features["shared_gate"] else ""
        texts.append(f"{name} {features['intermediate_size']:,} wide{beside}{gate}")
    return texts


def _latent(features: dict[str, Any], head_dim: int) -> str:
    """40 heads of 96 (64 + 32 rotated) with values of 64, and what is kept of a token in their place."""
    rotated, nope = features["head_dim"] - features["latent_dim"], features["nope_dim"]
    text = (
        f"{features['num_heads']} heads of {head_dim} ({nope} + {rotated} rotated) with values of "
        f"{features['value_dim']}, latent attention that keeps {features['latent_dim']} + {rotated} "
        "numbers of a token"
    )
    rank = features["query_rank"]
    return text + (f", queries compressed to {rank}" if rank else "")


def _experts(features: dict[str, Any], activation: str) -> str:
    """Of a mixture: 8 of 128 experts, SwiGLU 768 wide, chosen by a softmax."""
    text: str = (
        f"{features['experts_per_token']} of {features['num_experts']} experts, {activation} "
        f"{features['expert_size']:,} wide, chosen by a {features['router']}"
    )
    text += " plus a bias" * features["selection_bias"]
    if features["expert_groups"] > 1:
        text += f" in {features['groups_per_token']} of {features['expert_groups']} groups"
    if features["router_scale"] != 1:
        text += f", times {features['router_scale']:.4g}"
    text += ", each times a number of its own" * features["expert_scale"]
    return text


def _rotation(rope: dict[str, Any], head_dim: int) -> str:
    text = "RoPE" if rope["base"] is None else f"RoPE base {rope['base']:,.10g}"
    if rope["rotated_dims"] < head_dim:
        text += f" on {rope['rotated_dims']} of {head_dim} dimensions"
    if rope["scaling"] == "linear":
        text += f" stretched {rope['factor']:g} times"
    elif rope["scaling"] != "none":
        text += " scaled by frequency"
    if rope["attention_factor"] != 1:
        text += f" (times {rope['attention_factor']:.4g})"
    return text + " with queries scaled by position" * (rope["query_scale"] is not None)


def _weights(weights: dict[str, Any]) -> Iterator[str]:
    if weights["quantization"]:
        yield f"quantized: {weights['quantization']}"
    yield f"in the file: {_shares(weights['file'], 'type')}"
    if weights["memory"]:
        total = sum(entry["bytes"] for entry in weights["memory"])
        yield f"in memory: {_shares(weights['memory'], 'format')}; {_size(total)}"
    for entry in weights["converted"] or ():
        size = f"{entry['bytes_a_weight']:.3g} bytes a weight"
        yield f"{entry['type']} becomes {entry['format']}, {size}{', rounded' * entry['rounds']}"


def _shares(entries: Sequence[dict[str, Any]], name: str) -> str:
    return ", ".join(f"{entry[name]} {entry['share']:.1%}" for entry in entries)


def _tokenizer(facts: dict[str, Any]) -> str:
    texts = [facts["kind"] or facts.get("absence") or "of an unknown kind"]
    if facts.get("vocab_size"):
        texts.append(f"{facts['vocab_size']:,} tokens")
        if facts["adds_bos"]:
            texts.append(f"begins a text with token {facts['bos_token_id']}")
        if facts["eos_token_ids"]:
            texts.append(f"a text ends at {', '.join(map(str, facts['eos_token_ids']))}")
    return ", ".join(texts)


def _chat_template(facts: dict[str, Any] | None) -> str:
    if facts is None:
        return "none"
    if facts["refusal"]:
        return f"refused: {facts['refusal']}"
    thinking = facts["thinking"]
    texts = ["yes" if facts["names"] == ["default"] else ", ".join(facts["names"])]
    texts.append("knows tools" if facts["tools"] else "no tools")
    how = [*thinking["variables"], *filter(None, ["...".join(thinking["markers"] or ())])]
    texts.append(f"thinking ({', '.join(how)})" if how else "no thinking")
    return ", ".join(texts)


def _memory(memory: dict[str, Any]) -> str:
    weights, context = memory["weight_bytes"], memory["kv_bytes_of_context"]
    return (
        f"{_size(weights)} of weights and {_size(context)} for one sequence as long as the context; "
        f"{_size(memory['available_bytes'])} are free"
    )


def _ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5", and how many where they are several."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    text = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in ranges)
    return f"{text} ({len(indices)} in all)" if len(ranges) > 1 else text


def _size(num_bytes: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes} bytes"


def _number(count: int) -> str:
    for unit, size in ((" billion", 1e9), (" million", 1e6)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:,}"
