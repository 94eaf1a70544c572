"""The constants of estimated step times: what of the peak rates is reached, and what a step costs beside.

Each has a default that was assumed for every device and model, and where that is from. They are the same for
all, so where one is known better, of a device or of a server, it is better given.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pagellm.engine.checks import LARGEST, SMALLEST, is_path, number
from pagellm.engine.errors import ConfigError, found
from pagellm.sim.costs.cost_model import CostConstant

# Bytes of a number in each format, with the scales of a group: of 128 numbers (2 bytes and a zero point of
# 4 bits) in int4, of 16 numbers (1 byte) in fp4.
FORMATS = {"fp16": 2.0, "bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2.5 / 128, "fp4": 0.5 + 1 / 16}
AUTO = "auto"
# What is chosen by name beside AUTO. Experts are split over devices as other matrices are, or each has some
# of them whole and tokens are sent to those.
CHOICES: dict[str, tuple[str, ...]] = {
    "weights": tuple(FORMATS),
    "kv": tuple(FORMATS),
    "experts": ("tensor", "expert"),
}
# What is read from a file: how often each expert is chosen, see experts.py; AUTO: as expert_skew has it.
FILES = ("expert_loads",)
_GIB = 2**30


class Constant(NamedTuple):
    """A number with its limits, and where its default is from."""

    default: float
    low: float
    high: float
    source: str


def _share(default: float, source: str) -> Constant:
    return Constant(default, SMALLEST, 1.0, source)


def _amount(default: float, source: str) -> Constant:
    return Constant(default, 0.0, LARGEST, source)


CONSTANTS = {
    "product_flops": _share(
        0.82, "of the peak arithmetic, in products of many tokens with weights: fits vLLM 0.15 on H100"
    ),
    "product_bytes": _share(
        0.83, "of the memory's rate, in products with weights: BLIS measured 0.82 on H100; InferSim takes 0.8"
    ),
    "product_fill_tokens": _amount(
        256, "of which a product takes half as long again as its share says: fewer do not fill the device's "
        "tiles. Fits vLLM 0.15 on H100; chunks of 512 are slower, as AISimulate has it of measured kernels"
    ),
    "head_flops": _share(0.82, "as product_flops"),
    "head_bytes": _share(0.83, "as product_bytes"),
    "prefill_flops": _share(
        0.5, "of the peak arithmetic, in attention of prefills: FlashAttention-2 50 to 73 % on A100 and 35 % "
        "on H100, FlashAttention-3 up to 75 % on H100"
    ),
    "prefill_bytes": _share(0.82, "as product_bytes"),
    "decode_flops": _share(0.5, "as prefill_flops"),
    "decode_bytes": _share(0.8, "of the memory's rate, in attention of decodes: KV blocks lie apart"),
    "vector_bytes": _share(0.82, "of the memory's rate, in norms, activation and sampling: as product_bytes"),
    "link_bytes": _share(0.8, "of the links' rate, in exchanges among devices: fits vLLM 0.15 on 4 x H100"),
    "step_overhead_s": _amount(
        3e-4, "scheduling, launching and fetching tokens of a step: fits vLLM 0.15 on H100, 0.19 on RTX 4090"
    ),
    "expert_skew": Constant(
        0.0, 0.0, 10.0, "of how often experts are chosen, the exponent of Zipf's law: none, as training "
        "balances them"
    ),
    "layer_overhead_s": _amount(
        1.2e-5, "starting the kernels of a layer from a CUDA graph, about ten: fits the same runs"
    ),
    "sequence_overhead_s": _amount(2e-6, "scheduling and sampling of a sequence: fits the same runs"),
    "sort_s": _amount(
        0.0, "sorting the logits of a sequence, 131,072 of them, where a token is one of the most likely: "
        "none, as of greedy sampling"
    ),
    "frontend_s": _amount(0.0, "HTTP and tokenizer before the engine: none, as where an engine is measured"),
    "steps_ahead": Constant(
        1.0, 0.0, 1.0, "that are scheduled when the one before them begins: vLLM since 0.14 (pull request "
        "27614); a request waits for the step under way and the one behind it"
    ),
    "memory_utilization": _share(0.9, "of what a device's memory holds: vLLM's gpu_memory_utilization"),
    "driver_bytes": _amount(
        0.45 * _GIB, "of a device's memory that processes do not see: 79.6 GiB of an H100 are 79.2 to CUDA"
    ),
    "runtime_bytes": _amount(0.44 * _GIB, "of libraries and contexts on a device: vLLM 0.15 and 0.19"),
    "exchange_bytes": _amount(
        0.36 * _GIB, "of buffers on each of several devices: vLLM 0.15"
    ),
    "graph_bytes": _amount(
        0.0, "of CUDA graphs: vLLM before 0.21 has them outside of its share; later ones have them within a "
        "share of 0.92, which leaves as many blocks"
    ),
    "sampler_bytes": _amount(
        24.0, "of a logit of each sequence, with its copies, sorted values and indices: vLLM's profiling run"
    ),
}  # fmt: skip


# Of a server that a client measures: vLLM's own TTFT is 8 to 12 ms shorter than its client's (pull request
# 54628), BLIS's trained constants have 15.6.
CLIENT_FRONTEND_S = 0.010
# PyTorch's sort, which vLLM takes for top_p: 60 us a row of 131,072 logits and as much as ten rows in each
# step, by the tables of its pull requests 32558 and 51507.
SORT_S, SORT_ROWS = 6e-5, 10
# Of the constants, those that are 0 or 1.
SWITCHES = ("steps_ahead",)


class Constants:
    """All constants of an estimate, some of them given, and the formats of weights and KV.

    weights, kv: of `FORMATS`, or "auto": as a model's file has them, else bf16. experts: how devices share
    them, "tensor" or "expert" parallel; "auto": tensor. given: names and values of those that were given;
    fitted: of those that were fitted to a recorded run; of_device: of those which the hardware's entry has.
    The former go before the latter. Raises `ConfigError` for what is none, or beyond its limits.
    """

    def __init__(
        self,
        given: Mapping[str, Any] | None = None,
        of_device: Mapping[str, Any] | None = None,
        fitted: Mapping[str, Any] | None = None,
    ) -> None:
        self.given, self.fitted, self.of_device = dict(given or {}), dict(fitted or {}), dict(of_device or {})
        self.formats = dict.fromkeys((*CHOICES, *FILES), AUTO)
        self._values = {name: constant.default for name, constant in CONSTANTS.items()}
        for name, value in {**self.of_device, **self.fitted, **self.given}.items():
            if name in FILES:
                if not isinstance(value, str) or not value or not is_path(value):
                    raise ConfigError(f"{name}: found {found(value)}, expected the path of a file")
                self.formats[name] = value
                continue
            if name in self.formats:
                choices = (AUTO, *CHOICES[name])
                if not isinstance(value, str) or value not in choices:
                    raise ConfigError(f"{name}: found {found(value)}, expected {', '.join(choices)}")
                self.formats[name] = value
                continue
            if name not in CONSTANTS:
                expected = f"one of {', '.join((*self.formats, *CONSTANTS))}"
                raise ConfigError(f"roofline: found {found(name)}, expected {expected}")
            _, low, high, _ = CONSTANTS[name]
            if name in SWITCHES and value not in (0, 1):
                raise ConfigError(f"{name}: found {found(value)}, expected 0 or 1")
            words = "a number above 0 and up to 1" if high == 1 else "a finite number from 0"
            words += f" to {high:g}" if 1 < high < LARGEST else ""
            self._values[name] = number(name, value, low, high, error=ConfigError, expected=words)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    @property
    def assumed(self) -> list[str]:
        """The names of those that were neither given nor fitted, and are not known of the device."""
        return [name for name in CONSTANTS if self._origin(name) == "assumed"]

    def _origin(self, name: str) -> Literal["assumed", "device", "fitted", "given"]:
        if name in self.given:
            return "given"
        if name in self.fitted:
            return "fitted"
        return "device" if name in self.of_device else "assumed"

    def table(self) -> list[CostConstant]:
        """Every constant with what is to be said of it."""
        return [
            {
                "name": name,
                "value": self._values[name],
                "origin": self._origin(name),
                "source": constant.source if self._origin(name) == "assumed" else "",
            }
            for name, constant in CONSTANTS.items()
        ]


def parse_constants(texts: Iterable[str]) -> dict[str, float | str]:
    """Constants from texts such as "product_flops=0.6". Raises `ConfigError`."""
    values: dict[str, float | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"set-cost: found {found(text)}, expected key=value")
        if name in values:
            raise ConfigError(f"set-cost: {name}: found twice, expected one value")
        try:
            values[name] = float(value)
        except ValueError:
            values[name] = value
    Constants(values)
    return values
