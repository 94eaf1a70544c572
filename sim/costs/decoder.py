"""A decoder whose step times are estimated: its shape, by its name in hardware.json or from the model itself.

A config.json of most mixtures of experts is read by mixtures.py. Another one, or a GGUF file, is read by the
engine's own readers in a process of its own, because these load the compiler and a replay does not.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagellm.engine import checks
from pagellm.engine.errors import CheckpointError, ConfigError, found
from pagellm.sim.costs.devices import known
from pagellm.sim.costs.mixtures import read_mixture
from pagellm.sim.costs.quantizers import read_quantizer
from pagellm.sim.fields import Fields, read_json

_MAX_MESSAGE = 600


@dataclass(frozen=True)
class Layers:
    """Layers of one kind, and how many there are of them.

    window: tokens that a token sees, itself included; 0: all before it. num_norms: of whole hidden states.
    product_parameters: numbers of the matrices of one layer that every token meets. intermediate_size: of all
    feed-forwards that a token passes.

    num_experts, experts_per_token, expert_parameters: of a mixture, each expert's matrices; 0 of others.
    latent_dim, rope_dim: of latent attention, numbers that are kept of a token in the place of keys and
    values; head_dim and value_dim are then what they are widened to. 0 of others.
    """

    count: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    product_parameters: int
    gated: bool = True
    window: int = 0
    num_norms: int = 2
    num_experts: int = 0
    experts_per_token: int = 0
    expert_parameters: int = 0
    latent_dim: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    @property
    def kv_numbers(self) -> int:
        """Numbers of a token's keys and values in one layer."""
        return (self.latent_dim + self.rope_dim) or 2 * self.num_kv_heads * self.head_dim

    @property
    def decode_operations(self) -> int:
        """Of a query and a key with its value, for all heads; latent ones are met as they are kept."""
        per_head = 2 * self.latent_dim + self.rope_dim if self.latent_dim else 2 * self.head_dim
        return 2 * self.num_heads * per_head

    @property
    def prefill_operations(self) -> int:
        """The same where several tokens are computed, for which latent keys and values are widened."""
        return 2 * self.num_heads * (self.head_dim + (self.value_dim or self.head_dim))

    @property
    def widening_operations(self) -> int:
        """Of a token of the context, to widen what is kept of it."""
        return 2 * self.latent_dim * self.num_heads * (self.head_dim - self.rope_dim + self.value_dim)

    def touched_experts(self, num_tokens: int) -> float:
        """How many different experts so many tokens meet, if each chooses at random."""
        share = self.experts_per_token / self.num_experts
        return self.num_experts * float(1 - (1 - share) ** num_tokens)


@dataclass(frozen=True)
class Model:
    """What of a decoder's shape matters for its time.

    num_parameters: all numbers. vocab_size: rows of the embedding and of the output head. tied_embeddings:
    whether the two are one matrix. takes_top: whether its own generation_config.json samples of the most
    likely tokens alone (top_p, top_k). max_model_len: tokens that it takes, None for no limit. layer_bytes,
    head_bytes: of a number of the layers' matrices and of the head, where a file of weights says, or a
    quantizer, which is named so. arithmetic: the format in which weights are multiplied.
    """

    num_parameters: int
    hidden_size: int
    layers: tuple[Layers, ...]
    vocab_size: int = 0
    tied_embeddings: bool = True
    takes_top: bool = False
    max_model_len: int | None = None
    layer_bytes: float | None = None
    head_bytes: float | None = None
    quantizer: str | None = None
    arithmetic: str = "bf16"

    @property
    def num_layers(self) -> int:
        """How many there are of all kinds."""
        return sum(layer.count for layer in self.layers)

    @property
    def product_parameters(self) -> int:
        """Numbers of the matrices of all layers that every token meets."""
        return sum(layer.count * layer.product_parameters for layer in self.layers)

    @property
    def expert_parameters(self) -> int:
        """Numbers of the matrices of all experts."""
        return sum(layer.count * layer.num_experts * layer.expert_parameters for layer in self.layers)

    @property
    def head_parameters(self) -> int:
        """Numbers of the output head, which multiplies only what is sampled from."""
        return self.vocab_size * self.hidden_size

    @property
    def window(self) -> int:
        """Tokens that a token sees in the layer that sees the most, itself included; 0: all before it."""
        windows = [layer.window for layer in self.layers]
        return max(windows) if all(windows) else 0

    def check_devices(self, num_devices: int) -> None:
        """Raises `ConfigError` where so many devices cannot share each layer alike.

        Each has whole heads, and whole KV heads or, where there are fewer of these, a copy of one.
        """
        for layer in self.layers:
            heads, kv_heads = layer.num_heads, layer.num_kv_heads
            if heads % num_devices or (kv_heads % num_devices and num_devices % kv_heads):
                raise ConfigError(
                    f"num_devices: found {num_devices} for {heads} heads and {kv_heads} KV heads, expected a "
                    "number that divides the heads, and divides the KV heads or is a multiple of them"
                )
            if layer.intermediate_size % num_devices:
                raise ConfigError(
                    f"num_devices: found {num_devices}, expected a number that divides the "
                    f"{layer.intermediate_size} columns of the feed-forward"
                )


def load_model(name: str) -> Model:
    """A model by its name, or of a config.json, a directory that has one, or a GGUF file.

    Raises `ConfigError` for what is none of them, and `CheckpointError` for what the engine's readers refuse.
    """
    models = known()["models"]
    if name in models:
        return _model(models[name])
    if not checks.is_path(name) or not Path(name).exists():
        expected = f"one of {', '.join(models)}, or the path of a config.json or a GGUF file"
        raise ConfigError(f"models: found {found(name)}, expected {expected}")
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.suffix == ".json" and path.is_file():
        return _configured(_read_shape(name), path)
    return _read_shape(name)


def _configured(model: Model, path: Path) -> Model:
    """A model with what its configurations say of its weights, and of how tokens are sampled."""
    beside = path.with_name("generation_config.json")
    if beside.is_file():
        sampling = Fields(read_json(beside, "a configuration", CheckpointError), str(beside), CheckpointError)
        top_p, top_k = sampling.get("top_p"), sampling.get("top_k")
        few = (isinstance(top_p, int | float) and top_p < 1) or (isinstance(top_k, int) and top_k > 0)
        model = replace(model, takes_top=few and sampling.get("do_sample") is not False)
    quantized = read_quantizer(path)
    if quantized is None:
        return model
    products, experts = model.product_parameters, model.expert_parameters
    others = 2.0 if quantized.experts_only else quantized.num_bytes
    size = (experts * quantized.num_bytes + products * others) / (experts + products)
    return replace(model, layer_bytes=size, quantizer=quantized.name, arithmetic=quantized.arithmetic)


def _read_shape(name: str) -> Model:
    mixture = read_mixture(Path(name))
    if mixture is not None:
        return _model(mixture)
    command = [sys.executable, "-m", "pagellm.engine.models.shape", name]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["its shape cannot be read"])[-1]
        raise CheckpointError(message[:_MAX_MESSAGE])
    return _model(json.loads(done.stdout))


def _model(shape: Mapping[str, Any]) -> Model:
    values = {name: shape[name] for name in Model.__dataclass_fields__ if name in shape}
    return Model(**values | {"layers": tuple(Layers(**layer) for layer in shape["layers"])})
