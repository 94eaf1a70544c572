"""Step times from what a machine can do at most: the longer of its arithmetic and its memory traffic."""

import json
from dataclasses import dataclass, fields
from importlib.resources import files
from typing import Any

from pagellm.engine.checks import SMALLEST, integer, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.sim.costs.cost_model import CostModel, shape_of

# Of a device's memory, what weights and KV blocks may take; the rest is for activations.
_USABLE_MEMORY = 0.9
_OPTIONS = ("efficiency", "step_overhead_s", "sequence_overhead_s")


@dataclass(frozen=True)
class Hardware:
    """One device: peak rates of dense bfloat16 arithmetic, of its memory and of its links.

    link_bytes_per_s: to the other devices, host_bytes_per_s: to the host's memory; in one direction.
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float


@dataclass(frozen=True)
class Model:
    """What of a decoder's shape matters for its time; weights and KV take so many bytes a number.

    vocab_size: rows of the embedding and of the output head; 0 takes both for a part of the layers.
    tied_embeddings: whether the two are one matrix. max_model_len: tokens that it takes, None for no limit.
    """

    num_parameters: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    weight_bytes: float
    kv_bytes: float
    vocab_size: int = 0
    tied_embeddings: bool = True
    max_model_len: int | None = None

    @property
    def head_parameters(self) -> int:
        """Numbers of the output head, which multiplies only what is sampled from."""
        return self.vocab_size * self.hidden_size

    @property
    def read_parameters(self) -> int:
        """Numbers that a step reads: of an embedding of its own it looks a few rows up."""
        return self.num_parameters - (0 if self.tied_embeddings else self.head_parameters)

    @property
    def kv_token_bytes(self) -> float:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes


class RooflineCostModel(CostModel):
    """A lower bound of step times for a model spread over devices by tensor parallelism.

    Each step reads all weights that multiply and the context of every sequence once. The output head
    multiplies one state of each sequence that gets a token. Devices exchange two sums of all hidden states a
    layer (a ring all-reduce), after the arithmetic. efficiency: the share of the peak rates that is reached.
    step_overhead_s, sequence_overhead_s: what scheduling, launching and sampling add.
    Raises `ConfigError`.
    """

    def __init__(
        self,
        hardware: Hardware,
        model: Model,
        num_devices: int = 1,
        *,
        efficiency: float = 1.0,
        step_overhead_s: float = 0.0,
        sequence_overhead_s: float = 0.0,
        name: str = "roofline",
    ) -> None:
        integer("num_devices", num_devices, 1, error=ConfigError)
        above = "a number above 0 and up to 1"
        number("efficiency", efficiency, SMALLEST, 1, error=ConfigError, expected=above)
        for option, value in (("step", step_overhead_s), ("sequence", sequence_overhead_s)):
            number(f"{option}_overhead_s", value, 0, error=ConfigError, expected="seconds from 0")
        self.name = name
        self.max_model_len = model.max_model_len
        self._hardware, self._model, self._num_devices = hardware, model, num_devices
        self._step_overhead_s, self._sequence_overhead_s = step_overhead_s, sequence_overhead_s
        flops_per_s = hardware.flops_per_s * num_devices * efficiency
        self._bytes_per_s = hardware.memory_bytes_per_s * num_devices * efficiency
        attention_size = model.num_heads * model.head_dim
        self._token_s = 2 * (model.read_parameters - model.head_parameters) / flops_per_s
        self._sample_s = 2 * model.head_parameters / flops_per_s
        self._pair_s = 4 * model.num_layers * attention_size / flops_per_s
        self._weights_s = model.read_parameters * model.weight_bytes / self._bytes_per_s
        self._kv_token_s = model.kv_token_bytes / self._bytes_per_s
        exchanged = 2 * model.num_layers * model.hidden_size * model.weight_bytes
        ring = 2 * (num_devices - 1) / num_devices
        self._exchange_s = exchanged * ring / (hardware.link_bytes_per_s * efficiency)
        self._copy_block_s = 0.0
        self._window = 0
        if self.num_blocks(1) < 1:
            needed = model.num_parameters * model.weight_bytes
            raise ConfigError(
                f"num_devices: found {num_devices} for {needed / 1e9:.1f} GB of weights, expected more: one "
                f"has {hardware.memory_bytes / 1e9:.1f} GB"
            )

    @classmethod
    def of_names(
        cls, hardware: str, model: str, num_devices: int = 1, **options: float
    ) -> "RooflineCostModel":
        """The model of a known device and a known decoder. Raises `ConfigError`."""
        known = json.loads(files("pagellm.sim.costs").joinpath("hardware.json").read_text("utf-8"))
        device = Hardware(**_entry(known, "hardware", hardware, Hardware))
        decoder = Model(**_entry(known, "models", model, Model))
        name = f"{model} on {num_devices} x {hardware}, roofline"
        for option in options:
            if option not in _OPTIONS:
                raise ConfigError(f"roofline: found {option!r}, expected one of {', '.join(_OPTIONS)}")
        return cls(device, decoder, num_devices, name=name, **options)

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:
        self._window = config.window or 0
        block_bytes = self.block_bytes(config.block_size)
        self._copy_block_s = 2 * block_bytes / self._bytes_per_s
        swap_block_s = block_bytes / (self._hardware.host_bytes_per_s * self._num_devices)
        self.costs = PreemptionCosts(self._token_s, swap_block_s)

    def step_time(self, batch: ScheduledBatch) -> float:
        num_decodes, context, prefills = shape_of(batch, self._window)
        num_tokens, pairs = num_decodes, context + num_decodes
        for count, before in prefills:
            num_tokens += count
            context += before
            pairs += count * before + count * (count + 1) // 2
        compute_s = num_tokens * self._token_s + pairs * self._pair_s + sum(batch.samples) * self._sample_s
        memory_s = self._weights_s + (context + num_tokens) * self._kv_token_s
        total = self._step_overhead_s + len(batch.sequences) * self._sequence_overhead_s
        if batch.transfers:
            total += self.transfer_time(batch, self._copy_block_s)
        return total + max(compute_s, memory_s) + num_tokens * self._exchange_s

    def block_bytes(self, block_size: int) -> int:
        return int(self._model.kv_token_bytes * block_size)

    def num_blocks(self, block_size: int) -> int:
        memory = _USABLE_MEMORY * self._hardware.memory_bytes * self._num_devices
        weights = self._model.num_parameters * self._model.weight_bytes
        return int((memory - weights) // self.block_bytes(block_size))


def _entry(known: dict[str, Any], kind: str, name: str, form: type) -> dict[str, Any]:
    if name not in known[kind]:
        raise ConfigError(f"{kind}: found {name!r}, expected one of {', '.join(known[kind])}")
    return {field.name: known[kind][name][field.name] for field in fields(form)}
