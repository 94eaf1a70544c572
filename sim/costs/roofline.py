"""Step times from the rates of a machine: of each operator the longer of its arithmetic and its traffic.

A step is a sequence of operators, and none hides another's traffic behind its own arithmetic. So a step that
computes a prompt and decodes beside it takes the time of both, as on a device.
"""

import json
import os
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import asdict
from typing import Any

from pagellm.engine.checks import integer
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.sim.costs.constants import AUTO, FORMATS, SORT_ROWS, Constants
from pagellm.sim.costs.cost_model import CostConstant, CostModel, decode_contexts, shape_of
from pagellm.sim.costs.decoder import Layers, Model, load_model
from pagellm.sim.costs.devices import Hardware, load_hardware
from pagellm.sim.costs.experts import UnevenExperts, check_loads, read_loads, zipf_loads
from pagellm.sim.costs.fitted import FittedCosts, read_costs

# Hidden states, logits that are exchanged, and norms are in 16 bits; so are embedding and head, which
# quantizers leave alone.
_STATE_BYTES = 2
# Logits are read and written so often on the way to a token, in float32.
_LOGIT_PASSES = 3


class RooflineCostModel(CostModel):
    """Estimated step times of a model that is spread over devices.

    num_devices share each layer (tensor parallelism). pipeline_parallel: so many stages of such devices have
    the layers one after the other. data_parallel: so many ranks of all that have sequences of their own; of a
    mixture, they share the experts.

    The operators are these, each at its own achieved shares of the peak rates (`constants.CONSTANTS`):

        products            a step's tokens times the matrices of all layers, which are read once
        experts             of a mixture: a step's tokens times those that they choose, each of them read once
        head                a state of each sequence that gets a token times the output head; none, no time
        prefill attention   of the sequences of which several tokens are computed, their contexts read once;
                            latent keys and values are widened for it, as vLLM does (pagellm's own engine
                            meets them as they are kept, in prefills too: its times are measured, in profiles)
        decode attention    of the others
        vectors             norms, rotation, activation and sampling: traffic alone
        communication       a ring all-reduce after attention and after the feed-forward, and of the logits;
                            where devices have whole experts, an all-to-all to them and one back

    and an overhead a step, a layer and a sequence. Experts are chosen alike, or as expert_skew and
    expert_loads say; devices that have whole ones then wait for the busiest. fitted: constants with how far
    they are off. given: constants by name, of `Constants`. Raises `ConfigError`.
    """

    def __init__(
        self,
        hardware: Hardware,
        model: Model,
        num_devices: int = 1,
        pipeline_parallel: int = 1,
        data_parallel: int = 1,
        *,
        name: str = "roofline",
        fitted: FittedCosts | None = None,
        **given: float | str,
    ) -> None:
        integer("num_devices", num_devices, 1, error=ConfigError)
        integer("data_parallel", data_parallel, 1, error=ConfigError)
        integer("pipeline_parallel", pipeline_parallel, 1, error=ConfigError)
        model.check_devices(num_devices)
        if pipeline_parallel > model.num_layers:
            expected = f"at most as many stages as the {model.num_layers} layers of the model"
            raise ConfigError(f"pipeline_parallel: found {pipeline_parallel}, expected {expected}")
        self.constants = c = Constants(given, hardware.constants, fitted and fitted.constants)
        self.name = name + _words(c)
        if fitted is not None:
            self.fit = fitted.error
        self.max_model_len, self.window = model.max_model_len, model.window or None
        self._hardware, self._model, self._tensor = hardware, model, num_devices
        self.num_stages, self.data_parallel = pipeline_parallel, data_parallel
        self.num_devices = num_devices * pipeline_parallel * data_parallel
        self._shares = _stage_shares(model.num_layers, pipeline_parallel)
        self._num_groups = self._groups_of_experts()
        self.power_w, self.idle_power_w = hardware.power_w, hardware.idle_power_w
        self.assumed_powers = hardware.assumed
        self._choose_formats()
        flops, bytes_per_s, n = hardware.flops_per_s, hardware.memory_bytes_per_s, num_devices

        weights = model.arithmetic if c.formats["weights"] == AUTO else c.formats["weights"]
        product_flops = hardware.flops_of(weights) * c["product_flops"] * n
        self._product_token_s = 2 * model.product_parameters / product_flops
        self._fill_tokens = c["product_fill_tokens"]
        self._products_s = (
            model.product_parameters * self._layer_bytes / (bytes_per_s * c["product_bytes"] * n)
        )
        # Of each kind of expert layers: the kind, seconds of a token and an expert by arithmetic, and of an
        # expert by traffic.
        num_sharing = n * (data_parallel if self.is_lockstep else 1)
        expert_rate = bytes_per_s * c["product_bytes"] * num_sharing
        self._experts = [
            (
                layer,
                2 * layer.count * layer.expert_parameters / (product_flops * num_sharing / n),
                layer.count * layer.expert_parameters * self._layer_bytes / expert_rate,
            )
            for layer in model.layers
            if layer.num_experts
        ]
        self._loads = self._read_loads()
        self._uneven = {
            layer: UnevenExperts(layer, self._loads_of(layer), self._num_groups)
            for layer, *_ in self._experts
            if self._loads is not None or c["expert_skew"]
        }
        self._head_token_s = 2 * model.head_parameters / (flops * c["head_flops"] * n)
        self._head_s = model.head_parameters * self._head_bytes / (bytes_per_s * c["head_bytes"] * n)
        vector_rate = bytes_per_s * c["vector_bytes"]
        vectors = sum(layer.count * _vector_numbers(layer, model.hidden_size, n) for layer in model.layers)
        self._vector_token_s = vectors * _STATE_BYTES / vector_rate
        sort_s = c["sort_s"] * model.vocab_size / 2**17
        self._sample_s = _LOGIT_PASSES * 4 * model.vocab_size / vector_rate + sort_s
        self._set_exchanges()
        self._overhead_s = c["step_overhead_s"] + model.num_layers * c["layer_overhead_s"]
        self._overhead_s += SORT_ROWS * sort_s
        self._sequence_overhead_s = c["sequence_overhead_s"]
        self.frontend_s = c["frontend_s"]
        # Batches of a pipeline follow each other anyway.
        self.schedules_ahead = bool(c["steps_ahead"]) and pipeline_parallel == 1
        self._copy_block_s = 0.0
        self._attention: list[tuple[int, float, float, float, float]] = []
        self._set_windows(0)
        if self._room(EngineConfig()) < self._kv_token_bytes * max(self._shares):
            raise ConfigError(
                f"num_devices: found {self.num_devices} for {self._weight_bytes / 1e9:.1f} GB of weights, "
                f"expected more: one has {hardware.memory_bytes / 1e9:.1f} GB"
            )

    @property
    def is_lockstep(self) -> bool:
        """Whether data parallel ranks share experts, and hence have each layer together."""
        return self.data_parallel > 1 and any(layer.num_experts for layer in self._model.layers)

    def _groups_of_experts(self) -> int:
        """Devices that have whole experts, 1 where all share each. Raises `ConfigError`."""
        way = self.constants.formats["experts"]
        if self.is_lockstep:
            if way == "tensor":
                raise ConfigError(
                    f"experts: found 'tensor' with data_parallel {self.data_parallel}, expected 'expert': "
                    "each device has whole ones"
                )
            if self.num_stages > 1:
                raise ConfigError(
                    f"pipeline_parallel: found {self.num_stages} with data_parallel {self.data_parallel} of "
                    "a mixture, expected 1"
                )
            return self._tensor * self.data_parallel
        return self._tensor if way == "expert" else 1

    def _set_exchanges(self) -> None:
        """Prepares communication: for a step, for each of its tokens, and for each that is sampled."""
        c, hardware, model, n = self.constants, self._hardware, self._model, self._tensor
        link = hardware.link_bytes_per_s * c["link_bytes"]
        state = model.hidden_size * _STATE_BYTES
        reductions, all_to_alls, sent = (2 * model.num_layers if n > 1 else 0), 0, 0.0
        groups = self._num_groups
        for layer in model.layers if groups > 1 else ():
            if layer.num_experts % groups:
                raise ConfigError(
                    f"num_devices: found {groups} for {layer.num_experts} experts, expected a number that "
                    "divides them"
                )
            if layer.num_experts:  # in the place of an all-reduce there are two all-to-alls
                reductions -= layer.count if n > 1 else 0
                all_to_alls += 2 * layer.count
                busiest = self._uneven[layer].imbalance if layer in self._uneven else 1.0
                sent += busiest * 2 * layer.count * layer.experts_per_token * (groups - 1) / (groups * n)
        self._exchange_s = (reductions + all_to_alls) * hardware.link_latency_s
        self._exchange_token_s = (reductions * 2 * (n - 1) / n + sent) * state / link
        self._exchange_sample_s = model.vocab_size * _STATE_BYTES * (n - 1) / n / link
        self._send_token_s = state / n / link  # from stage to stage, a part by each device

    @classmethod
    def of_names(
        cls,
        hardware: str,
        model: str,
        num_devices: int = 1,
        pipeline_parallel: int = 1,
        data_parallel: int = 1,
        *,
        costs: str | os.PathLike[str] | None = None,
        **given: float | str,
    ) -> "RooflineCostModel":
        """The estimate of a device and a decoder by their names or files. Raises as those that load them."""
        Constants(given)
        fitted = None if costs is None else read_costs(costs)
        device, decoder = load_hardware(hardware), load_model(model)
        others = {**(fitted.constants if fitted is not None else {}), **given}
        quantizer = decoder.quantizer if others.get("weights", AUTO) == AUTO else None
        name = _name_of(hardware, model, num_devices, pipeline_parallel, data_parallel, quantizer)
        made = cls(
            device,
            decoder,
            num_devices,
            pipeline_parallel,
            data_parallel,
            name=name,
            fitted=fitted,
            **given,
        )
        made.model_name = _short(model)
        return made

    def _read_loads(self) -> list[list[float]] | None:
        """How often each expert was measured to be chosen, if a file is given."""
        path, skew = self.constants.formats["expert_loads"], self.constants["expert_skew"]
        for name, value, neutral in (
            ("expert_loads", path, AUTO),
            ("expert_skew", skew, 0.0),
            ("experts", self.constants.formats["experts"], AUTO),
        ):
            if value != neutral and not self._experts:
                raise ConfigError(f"{name}: found {value} for a model without experts, expected none")
        if path == AUTO:
            return None
        if skew:
            raise ConfigError(f"expert_skew: found {skew} beside expert_loads, expected one of them")
        rows = read_loads(path)
        for layer, *_ in self._experts:
            check_loads(path, rows, layer)
        return rows

    def _loads_of(self, layer: Layers) -> list[list[float]]:
        return self._loads or [zipf_loads(layer.num_experts, self.constants["expert_skew"])]

    def _choose_formats(self) -> None:
        """Bytes of weights and KV, by the formats asked for."""
        model, formats = self._model, self.constants.formats
        sixteen_bits = FORMATS["bf16"]
        layer, head = model.layer_bytes or sixteen_bits, model.head_bytes or sixteen_bits
        if formats["weights"] != AUTO:
            layer, head = FORMATS[formats["weights"]], sixteen_bits
        kv = sixteen_bits if formats["kv"] == AUTO else FORMATS[formats["kv"]]
        self._layer_bytes, self._head_bytes, self._kv_bytes = layer, head, kv
        matrices, heads = model.product_parameters + model.expert_parameters, model.head_parameters
        others = model.num_parameters - matrices - heads
        self._weight_bytes = matrices * layer + heads * head + others * sixteen_bits
        # Of one device; where it has a copy of a KV head that another has, too, that is a whole one.
        self._kv_token_bytes = kv * sum(
            layers.count * layers.kv_numbers / min(self._tensor, layers.num_kv_heads)
            for layers in model.layers
        )

    def _set_windows(self, window: int) -> None:
        """Prepares attention for layers that see so many tokens at most; 0: as many as each layer does.

        For each window: seconds of a pair of query and key in a decode; of one in a prefill by arithmetic,
        of a token of its context by traffic, and of widening one.
        """
        c, hardware = self.constants, self._hardware
        by_window: dict[int, list[float]] = {}
        for layer in self._model.layers:
            seen = min(filter(None, (layer.window, window)), default=0)
            operation_s = layer.count / self._tensor / hardware.flops_per_s
            numbers = layer.kv_numbers / min(self._tensor, layer.num_kv_heads)
            traffic = layer.count * numbers * self._kv_bytes / hardware.memory_bytes_per_s
            decode_s = layer.decode_operations * operation_s / c["decode_flops"]
            sums = by_window.setdefault(seen, [0.0, 0.0, 0.0, 0.0])
            sums[0] += max(decode_s, traffic / c["decode_bytes"])
            sums[1] += layer.prefill_operations * operation_s / c["prefill_flops"]
            sums[2] += traffic / c["prefill_bytes"]
            sums[3] += layer.widening_operations * operation_s / c["product_flops"]
        self._attention = [(seen, *sums) for seen, sums in by_window.items()]  # type: ignore[misc]

    def settings(self, given: Mapping[str, Any]) -> EngineConfig:
        """The settings with those of an engine on this hardware in the place of the defaults."""
        hardware = self._hardware
        of_hardware = {
            "max_num_batched_tokens": hardware.max_num_batched_tokens,
            "max_num_seqs": hardware.max_num_seqs,
        }
        return EngineConfig(**(of_hardware | dict(given)))

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:
        self._set_windows(config.window or 0)
        block_bytes = self._kv_token_bytes * config.block_size * max(self._shares)
        copy_rate = self._hardware.memory_bytes_per_s * self.constants["vector_bytes"]
        self._copy_block_s = 2 * block_bytes / copy_rate
        swap_block_s = block_bytes / self._hardware.host_bytes_per_s
        experts_s = sum(layer.experts_per_token * token_s for layer, token_s, _ in self._experts)
        token_s = self._product_token_s + experts_s + self._vector_token_s
        self.costs = PreemptionCosts(token_s, swap_block_s)

    def step_time(self, batch: ScheduledBatch) -> float:
        return self._time(batch, sum(batch.num_new_tokens))

    def joint_time(self, batches: Items[ScheduledBatch]) -> float:
        """Each rank attends to its own sequences; all meet in the layers that have experts."""
        num_tokens = sum(sum(batch.num_new_tokens) for batch in batches)
        return max((self._time(batch, num_tokens) for batch in batches), default=0.0)

    def stage_times(self, batch: ScheduledBatch) -> list[float]:
        """Each stage computes its layers, starts its own kernels, and sends; the last has the head, too."""
        num_tokens, num_samples = sum(batch.num_new_tokens), sum(batch.samples)
        step_s = self.constants["step_overhead_s"]
        last_s = len(batch.sequences) * self._sequence_overhead_s
        last_s += num_samples * (self._sample_s + self._exchange_sample_s)
        if num_samples:
            last_s += max(num_samples * self._head_token_s, self._head_s)
        layers_s = self.step_time(batch) - step_s - last_s
        send_s = self._hardware.link_latency_s + num_tokens * self._send_token_s
        *others, last = (step_s + share * layers_s for share in self._shares)
        return [*(stage_s + send_s for stage_s in others), last + last_s]

    def _time(self, batch: ScheduledBatch, num_expert_tokens: int) -> float:
        """Seconds of a step in which experts have so many tokens."""
        num_samples, num_tokens = sum(batch.samples), sum(batch.num_new_tokens)
        total = self._before_attention(len(batch.sequences), num_tokens, num_samples, num_expert_tokens)
        for window, decode_s, pair_s, token_s, widen_s in self._attention:
            num_decodes, context, prefills = shape_of(batch, window)
            total += (context + num_decodes) * decode_s
            if prefills:
                pairs = read = num_before = 0
                for count, before in prefills:
                    pairs += count * before + count * (count + 1) // 2
                    read += count + before
                    num_before += before
                total += max(pairs * pair_s, read * token_s)
                if widen_s:
                    total += num_before * widen_s
        total += num_tokens * (self._vector_token_s + self._exchange_token_s) + self._exchange_s
        total += num_samples * (self._sample_s + self._exchange_sample_s)
        if batch.transfers:
            total += self.transfer_time(batch, self._copy_block_s)
        return total

    def stride_times(self, batch: ScheduledBatch, duration_s: float, most: int, span_s: float) -> list[float]:
        """The sums of `step_time`, in its order, of which attention alone is another in each step."""
        if self.num_stages > 1 or self.is_lockstep:
            return []  # others have a part in how long it takes
        count = len(batch.sequences)
        before = self._before_attention(count, count, count, count)
        vectors_s = count * (self._vector_token_s + self._exchange_token_s) + self._exchange_s
        samples_s = count * (self._sample_s + self._exchange_sample_s)
        # None of them takes less than without attention.
        num_more = int(min(most - 1, (span_s - duration_s) / (before + vectors_s + samples_s) + 1))
        times = [before] * num_more
        for window, decode_s, *_ in self._attention:
            contexts = decode_contexts(batch, window, num_more)
            times = [
                total + (context + count) * decode_s for total, context in zip(times, contexts, strict=True)
            ]
        return [duration_s, *[total + vectors_s + samples_s for total in times]]

    def _before_attention(
        self, num_sequences: int, num_tokens: int, num_samples: int, num_expert_tokens: int
    ) -> float:
        """Seconds of a step for what comes before its attention in the sum."""
        total = self._overhead_s + num_sequences * self._sequence_overhead_s
        # Fewer tokens than fill the device leave much of it idle.
        filled = 1 + self._fill_tokens / (num_tokens + self._fill_tokens)
        total += max(num_tokens * filled * self._product_token_s, self._products_s)
        if num_samples:
            total += max(num_samples * self._head_token_s, self._head_s)
        for layer, token_s, expert_s in self._experts:
            if layer in self._uneven:
                total += self._uneven[layer].seconds(num_expert_tokens, token_s, expert_s, self._fill_tokens)
                continue
            touched = layer.touched_experts(num_expert_tokens)
            chosen = num_expert_tokens * layer.experts_per_token
            filled = 1 + self._fill_tokens / (chosen / touched + self._fill_tokens)
            total += max(chosen * filled * token_s, touched * expert_s)
        return total

    def block_bytes(self, block_size: int) -> int:
        return int(self._kv_token_bytes * block_size * self._tensor)

    def num_blocks(self, config: EngineConfig) -> int:
        """Of one engine; those whose batches are in a pipeline at once share what there is."""
        num_blocks = int(self._room(config) // (self._kv_token_bytes * max(self._shares) * config.block_size))
        num_blocks //= self.num_stages
        if num_blocks < 1:
            raise ConfigError(
                f"num_devices: found {self.num_devices}, whose memory has no room for a KV block beside "
                f"weights and steps of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} "
                "sequences, expected more devices, or smaller steps"
            )
        return num_blocks

    def constants_table(self) -> list[CostConstant]:
        return self.constants.table()

    def identity(self) -> str:
        """All that its times follow from, as JSON."""
        parts = asdict(self._hardware), asdict(self._model), self._tensor, self.constants.formats
        parallel = self.num_stages, self.data_parallel
        return json.dumps([*parts, parallel, self._loads, self.constants_table(), self.fit])

    def _room(self, config: EngineConfig) -> float:
        """Bytes for KV blocks of the device that has the least, in the stage with the most layers."""
        return min(self._free_bytes(config, weights) for weights in self._weights_of_devices())

    def _weights_of_devices(self) -> list[float]:
        """Bytes of weights of a device in each stage: the first has the embedding, the last the head."""
        model, n = self._model, self._tensor
        experts = model.expert_parameters * self._layer_bytes
        if self.num_stages == 1:
            shared = experts * (1 - 1 / self.data_parallel) if self.is_lockstep else 0.0
            return [(self._weight_bytes - shared) / n]
        embedding, head = model.head_parameters * FORMATS["bf16"], model.head_parameters * self._head_bytes
        between = self._weight_bytes - head - (0.0 if model.tied_embeddings else embedding)
        weights = [between * share for share in self._shares]
        weights[0] += embedding
        weights[-1] += head
        return [stage / n for stage in weights]

    def _free_bytes(self, config: EngineConfig, weights: float) -> float:
        """Of one device: what weights, libraries and the largest step leave for KV blocks.

        The largest step has its hidden states thrice, and the feed-forward's inner states thrice, and of a
        mixture what each expert that a token meets makes of it; or it samples for all sequences.
        """
        c, model, n = self.constants, self._model, self._tensor
        inner = max(layer.intermediate_size for layer in model.layers) / n
        chosen = max(layer.experts_per_token for layer in model.layers)
        numbers = 3 * (inner + model.hidden_size) + chosen * model.hidden_size
        states = config.max_num_batched_tokens * numbers * _STATE_BYTES
        logits = config.max_num_seqs * model.vocab_size * c["sampler_bytes"]
        reserved = c["runtime_bytes"] + c["graph_bytes"]
        reserved += c["exchange_bytes"] if self.num_devices > 1 else 0.0
        usable = c["memory_utilization"] * (self._hardware.memory_bytes - c["driver_bytes"])
        return usable - reserved - max(states, logits) - weights


def _name_of(
    hardware: str, model: str, num_devices: int, pipeline: int, data: int, quantizer: str | None
) -> str:
    """What an estimate is of, by the names of files where they are files."""
    weights = f" in {quantizer}" if quantizer else ""
    parts = [f"{_short(model)}{weights} on {num_devices} x {_short(hardware)}"]
    parts += [f"{pipeline} stages"] * (pipeline > 1) + [f"{data} data parallel"] * (data > 1)
    return f"{', '.join(parts)}, roofline"


def _stage_shares(num_layers: int, num_stages: int) -> list[float]:
    """Of all layers, the share of each stage: as many for each, and of those left over one for some.

    The later ones get them, but for the last, which has the head, as in vLLM.
    """
    counts = [num_layers // num_stages] * num_stages
    for place in range(num_layers % num_stages):
        counts[-2 - place] += 1
    return [count / num_layers for count in counts]


def _short(name: str) -> str:
    """The last parts of a path: config.json says nothing without its directory."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    return "/".join(parts[-2:]) if parts[-1] == "config.json" else parts[-1]


def _words(constants: Constants) -> str:
    """What a name says of constants: whether they were assumed, and those that were given."""
    given = [f"{name}={value}" for name, value in constants.given.items()]
    origin = " of assumed constants" if constants.assumed else " of given constants"
    if constants.fitted:
        origin = f" of {len(constants.fitted)} fitted constants"
    return origin + (f", with {', '.join(given)}" if given else "")


def _vector_numbers(layer: Layers, hidden_size: int, num_devices: int) -> float:
    """Numbers that the operators without products read and write for a token in one layer, on each device.

    A norm with the sum before it reads and writes two states, a rotation queries and keys, an activation its
    inputs and outputs.
    """
    heads = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim
    inner = layer.intermediate_size * (3 if layer.gated else 2)
    return 4 * layer.num_norms * hidden_size + (heads + inner) / num_devices
