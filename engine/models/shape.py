"""A model's shape: the sizes that decide what a step of it costs, as JSON, from a configuration alone.

Run as a program, `python -m pagellm.engine.models.shape PATH`, so that a process which must not load the
compiler can ask for it. PATH is a config.json, a directory that has one, or a GGUF file; no weight is read.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from pagellm.engine.checkpoints import Checkpoint, open_checkpoint
from pagellm.engine.checkpoints.json_files import CONFIG_FILE, read_json_object
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import read_spec
from pagellm.engine.models.spec import ModelSpec, Parts, Source
from pagellm.kernels.architecture import PARTS, Kind, latent_query_dim

# Norms of less than whole hidden states.
_OTHER_NORMS = ("q_norm", "k_norm", "query_norm", "latent_norm")


def read_shape(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The shape of a model; see `pagellm.sim.costs.decoder.Model` for its fields.

    layer_bytes, head_bytes: what a number of a layer's matrices and one of the output head take in a GGUF
    file; null of a configuration, which has no weights. Raises `CheckpointError`.
    """
    with _headers(Path(path)) as checkpoint:
        spec = read_spec(checkpoint)
        shape = _of_spec(spec)
        if not checkpoint.config_only:
            head = spec.rest["embedding" if spec.arch.tied else "lm_head"]
            products = [
                source
                for parts in spec.layers
                for experts in (False, True)
                for name in _products(parts, experts)
                for source in parts[name]
            ]
            shape |= {
                "layer_bytes": _bytes_each(checkpoint, products),
                "head_bytes": _bytes_each(checkpoint, head),
            }
    return shape


def _headers(path: Path) -> Checkpoint:
    if path.is_dir() and (path / CONFIG_FILE).exists():
        path /= CONFIG_FILE
    if path.suffix == ".json":
        config = read_json_object(path)
        return Checkpoint(path.parent, "safetensors", config, {}, headers_only=True, config_only=True)
    return replace(open_checkpoint(path), headers_only=True)


def _of_spec(spec: ModelSpec) -> dict[str, Any]:
    arch = spec.arch
    kinds: dict[tuple[tuple[str, int], ...], int] = {}
    for row, parts in zip(arch.layers, spec.layers, strict=True):
        kind = tuple(_layer(row, parts).items())
        kinds[kind] = kinds.get(kind, 0) + 1
    layers = [{"count": count} | dict(kind) for kind, count in kinds.items()]
    # Two parts may read one tensor.
    tensors = {
        (source.tensor, source.ranges, source.inputs_taken, source.stack): source.size
        for parts in (*spec.layers, spec.rest)
        for sources in parts.values()
        for source in sources
    }
    return {
        "architecture": spec.architecture,
        "num_parameters": sum(tensors.values()),
        "hidden_size": arch.hidden_size,
        "vocab_size": arch.vocab_size,
        "tied_embeddings": arch.tied,
        "max_model_len": spec.max_positions,
        "layers": layers,
        "layer_bytes": None,
        "head_bytes": None,
    }


def _layer(row: Any, parts: Parts) -> dict[str, int]:
    """What of one layer matters."""
    num_norms = sum(name.endswith("norm") and name not in _OTHER_NORMS for name in parts)
    if row["parallel"] and parts["attention_norm"] == parts["mlp_norm"]:
        num_norms -= 1
    names = ("num_heads", "num_kv_heads", "head_dim", "window", "num_experts", "experts_per_token")
    size, of_experts = (
        sum(source.size for name in _products(parts, experts) for source in parts[name])
        for experts in (False, True)
    )
    latent = {}
    if row["latent_dim"]:
        latent = {
            "head_dim": int(latent_query_dim(row)),
            "latent_dim": int(row["latent_dim"]),
            "rope_dim": int(row["head_dim"] - row["latent_dim"]),
            "value_dim": int(row["value_dim"]),
        }
    return (
        {name: int(row[name]) for name in names}
        | latent
        | {
            "gated": bool(row["gated"]),
            "num_norms": num_norms,
            "intermediate_size": int(
                row["intermediate_size"] + row["experts_per_token"] * row["expert_size"]
            ),
            "product_parameters": size,
            "expert_parameters": of_experts // max(1, int(row["num_experts"])),
        }
    )


def _products(parts: Parts, of_experts: bool) -> list[str]:
    """The matrices that every token meets, or those of experts."""
    return [
        name for name in parts if PARTS[name].kind is Kind.MATRIX and PARTS[name].of_experts == of_experts
    ]


def _bytes_each(checkpoint: Checkpoint, sources: Iterable[Source]) -> float:
    """Bytes of a number, on average."""
    num_bytes = count = 0.0
    for source in sources:
        tensor = checkpoint.tensors[source.tensor]
        num_bytes += tensor.num_bytes / prod(tensor.shape) * source.size
        count += source.size
    return num_bytes / count


if __name__ == "__main__":
    try:
        print(json.dumps(read_shape(sys.argv[1])))
    except CheckpointError as error:
        sys.exit(f"{error}")
