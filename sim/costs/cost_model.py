"""What a step costs: seconds from the shape of a scheduled batch, without computing anything.

Three models: a profile of measured tables (profile.py), the rates of a machine (roofline.py), and the
steps of a recorded run (recorded.py). All are plain Python, because they are asked once for each step.
"""

import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from itertools import repeat
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict

from pagellm.engine import checks
from pagellm.engine.checks import JsonError, flag, parse_json
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, ProfileError
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.block_manager import TransferKind
from pagellm.sim.fields import read_lines

if TYPE_CHECKING:
    from pagellm.sim.costs.roofline import RooflineCostModel

_context = attrgetter("num_computed_tokens")
# The mean error of a profile's step times above which nobody uses it without having said so.
MAX_PROFILE_ERROR = 0.25


# A number that may be negative.
Signed = Annotated[float, "signed"]


class StepTimeError(TypedDict):
    """How far a profile's step times were from steps that were measured to check them, relative to these.

    mean, p90: of the absolute error. mean_signed: negative where steps took longer than was predicted.
    """

    mean: float
    p90: float
    mean_signed: Signed
    num_steps: int


FIT_METRICS = ("throughput", "ttft", "tpot", "e2e")


class FitError(TypedDict):
    """How far replays with fitted constants are from a recorded run, on the part that was not fitted to.

    run: its name. num_fitted, num_scored: requests. The others: simulated / measured - 1, of means; None
    where the run does not say.
    """

    run: str
    num_fitted: int
    num_scored: int
    throughput: Signed | None
    ttft: Signed | None
    tpot: Signed | None
    e2e: Signed | None


class CostConstant(TypedDict):
    """A constant of estimated step times.

    origin: assumed for every device and model, known of the device, fitted to a recorded run, or given.
    source: where what was assumed is from; else empty.
    """

    name: str
    value: float
    origin: Literal["assumed", "device", "fitted", "given"]
    source: str


class CostModel(ABC):
    """Prices steps.

    name: what the times come from, for reports. costs: what preemption is expected to cost in the step to
    come, for the scheduler. error: of a profile's times, None where nothing was held against them. fit: of
    constants that were fitted to a recorded run.
    frontend_s: seconds from a client's sending to an engine's having a request. place: the file that it is
    from. max_model_len: tokens that the model takes, if that is known. window: of the model, if that is
    known: see `EngineConfig`. model_name: as a request may name it. schedules_ahead: whether a step is
    scheduled when the one before it begins, so that what comes in between is for the one behind it.
    num_devices: of one replica. num_stages: of its pipeline; data_parallel: its ranks. power_w, idle_power_w:
    of a device while it computes, and while it does not, if that is known; assumed_powers: of these those
    that are assumed, and from what.
    """

    name: str
    costs = PreemptionCosts()
    error: StepTimeError | None = None
    fit: FitError | None = None
    frontend_s: float = 0.0
    place: str | None = None
    max_model_len: int | None = None
    window: int | None = None
    model_name: str | None = None
    schedules_ahead: bool = False
    num_devices: int = 1
    num_stages: int = 1
    data_parallel: int = 1
    power_w: float | None = None
    idle_power_w: float | None = None
    assumed_powers: Mapping[str, str] = MappingProxyType({})

    @property
    def num_engines(self) -> int:
        """Engines of one replica, each with a scheduler and a KV cache of its own.

        A data parallel rank is one. A pipeline has as many batches under way as it has stages, of as many
        engines, among which its memory is divided: vLLM's virtual engines.
        """
        return self.num_stages * self.data_parallel

    @property
    def is_lockstep(self) -> bool:
        """Whether the ranks of a replica have their steps together."""
        return False

    @property
    def extrapolated(self) -> int:
        """Look-ups that fell outside of what was measured, since `begin`."""
        return 0

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "CostModel":
        """A model from a file: a profile, or the step log of a run. Raises `ProfileError`."""
        from pagellm.sim.costs.profile import ProfileCostModel
        from pagellm.sim.costs.recorded import RecordedCostModel

        path = checks.path("profile", path, ProfileError)
        first = next(read_lines(path, ProfileError), "")
        try:
            record = parse_json(first)
        except JsonError:
            record = None
        is_step_log = isinstance(record, dict) and "duration_s" in record
        return RecordedCostModel(path) if is_step_log else ProfileCostModel.from_file(path)

    @staticmethod
    def roofline(
        hardware: str,
        model: str,
        num_devices: int = 1,
        *,
        pipeline_parallel: int = 1,
        data_parallel: int = 1,
        costs: str | os.PathLike[str] | None = None,
        **constants: float | str,
    ) -> "RooflineCostModel":
        """The estimate of a model on so many devices, by the rates of the hardware.

        num_devices: that share each layer. pipeline_parallel, data_parallel: see `RooflineCostModel`.

        hardware: a name in hardware.json, or a JSON file like an entry of it. model: a name there, a
        config.json, a directory that has one, or a GGUF file. costs: a file of fitted constants, see
        fitted.py. constants: any of `constants.CONSTANTS` and `constants.CHOICES`; they go before fitted
        ones. Raises `ConfigError`, and `CheckpointError` for a model that the engine refuses.
        """
        from pagellm.sim.costs.roofline import RooflineCostModel

        return RooflineCostModel.of_names(
            hardware, model, num_devices, pipeline_parallel, data_parallel, costs=costs, **constants
        )

    def settings(self, given: Mapping[str, Any]) -> EngineConfig:
        """The engine's settings: those given, else those of the run that was recorded, else the defaults.

        Raises `ConfigError`.
        """
        return EngineConfig(**given)

    def fill(self, config: EngineConfig) -> EngineConfig:
        """The settings with num_blocks, max_model_len and window, where they were open and are known here.

        Raises `ConfigError` where num_blocks stays open, and for what the model does not take.
        """
        num_blocks = config.num_blocks or self.num_blocks(config)
        if num_blocks is None:
            raise ConfigError(
                f"num_blocks: found nothing, expected a number (--num-blocks): {self.name} does not say what "
                "the machine holds"
            )
        wanted, known = config.max_model_len, self.max_model_len
        if wanted is not None and known is not None and wanted > known:
            raise ConfigError(
                f"max_model_len: found {wanted}, expected at most {known}, the context of this model"
            )
        if config.window is not None and self.window not in (None, config.window):
            raise ConfigError(f"window: found {config.window}, expected {self.window}, that of this model")
        complete = config.complete(num_blocks, known, self.window or 0)
        return replace(
            config, num_blocks=num_blocks, max_model_len=complete.max_model_len, window=complete.window
        )

    def check_error(self, accept: bool) -> None:
        """Raises `ConfigError` for times that were far from what was measured, unless that is accepted."""
        flag("accept_profile_error", accept, ConfigError)
        if self.error is not None and self.error["mean"] > MAX_PROFILE_ERROR and not accept:
            found = f"a mean error of {self.error['mean']:.0%} in the step times of {self.name}"
            place = "profile" if self.place is None else f"profile: {self.place}"
            raise ConfigError(
                f"{place}: found {found}, expected at most {MAX_PROFILE_ERROR:.0%}: calibrate again when the "
                "machine is idle, or accept it with accept_profile_error (--accept-profile-error)"
            )

    def begin(self, config: EngineConfig, num_replicas: int = 1) -> None:  # noqa: B027 (may do nothing)
        """Prepares for a replay with these settings, from its first step. Raises `ConfigError`."""

    def next_start(self, now: float) -> float:
        """When the next step starts, in seconds, if it could start now."""
        return now

    @abstractmethod
    def step_time(self, batch: ScheduledBatch) -> float:
        """Seconds from scheduling a batch, as `schedule` returned it, to having its tokens."""

    def stride_times(self, batch: ScheduledBatch, duration_s: float, most: int, span_s: float) -> list[float]:
        """Seconds of a step of decodes and of those behind it, in each of which each has a token more.

        duration_s: of the first, as `step_time` has it. They are `most` steps, or as many as take `span_s`.
        Empty where that is not known; then it is asked for each. Where it is known, `step_time` depends on
        the batch alone, and `next_start` is not asked.
        """
        return []

    def stage_times(self, batch: ScheduledBatch) -> list[float]:
        """Seconds of a step in each stage of a pipeline."""
        return [self.step_time(batch)]

    def joint_time(self, batches: Items[ScheduledBatch]) -> float:
        """Seconds of a step that ranks have together, each with a batch of its own."""
        return max(map(self.step_time, batches), default=0.0)

    def empty_step_time(self) -> float:
        """Seconds of a step that computes nothing, because all that waited has been shed."""
        return 0.0

    def transfer_time(self, batch: ScheduledBatch, copy_block_s: float) -> float:
        """Seconds of the batch's transfers, where a copy of a block takes so long."""
        num_copies = sum(transfer.kind is TransferKind.COPY for transfer in batch.transfers)
        num_swaps = len(batch.transfers) - num_copies
        return num_copies * copy_block_s + num_swaps * self.costs.swap_block_s

    def block_bytes(self, block_size: int) -> int | None:
        """Bytes of a KV block of so many tokens, if they are known."""
        return None

    def num_blocks(self, config: EngineConfig) -> int | None:
        """KV blocks that the machine holds with these settings, if that is known. Raises `ConfigError`."""
        return None

    def constants_table(self) -> list[CostConstant]:
        """The constants of estimated times, for reports; none of measured ones."""
        return []


class BatchShape(NamedTuple):
    """What of a batch matters for its time.

    num_decodes, decode_context: sequences of which one token is computed, and the tokens before those, in
    all. prefills: (tokens, tokens before them) of each other sequence. With a window only those tokens count
    that are seen; before the tokens of a prefill as many as give it its pairs of a query and a key.
    """

    num_decodes: int
    decode_context: int
    prefills: list[tuple[int, int]]


def shape_of(batch: ScheduledBatch, window: int = 0) -> BatchShape:
    """The shape of a batch. Prefills are few and stand at its end, so that decodes cost a sum each.

    window: the tokens that a token sees, itself included; 0: all before it.
    """
    sequences, counts = batch.sequences, batch.num_new_tokens
    contexts = map(_context, sequences)
    if window:
        contexts = map(min, contexts, repeat(window - 1))
    num_decodes, context = len(sequences), sum(contexts)
    prefills = []
    index, beyond_one = num_decodes, sum(counts) - num_decodes
    while beyond_one:
        index -= 1
        count = counts[index]
        if count > 1:
            before = sequences[index].num_computed_tokens
            beyond_one -= count - 1
            num_decodes -= 1
            context -= before if not window else min(before, window - 1)
            prefills.append((count, _seen_before(count, before, window) if window else before))
    return BatchShape(num_decodes, context, prefills)


def decode_contexts(batch: ScheduledBatch, window: int, count: int) -> Items[int]:
    """`decode_context` of each of `count` batches of decodes that follow one, each a token longer."""
    num_decodes, context, _ = shape_of(batch, window)
    if not window:
        return range(context + num_decodes, context + num_decodes * count + 1, num_decodes)
    growing = sorted(window - 1 - min(_context(s), window - 1) for s in batch.sequences)
    contexts = []
    for step in range(1, count + 1):
        context += num_decodes - bisect_left(growing, step)
        contexts.append(context)
    return contexts


def _seen_before(count: int, before: int, window: int) -> int:
    """The context with which `count` tokens that see all before them have as many pairs, none if too many."""
    num_growing = min(max(window - before, 0), count)  # whose tokens see all before them
    pairs = num_growing * before + num_growing * (num_growing + 1) // 2 + (count - num_growing) * window
    return max(0, (pairs - count * (count + 1) // 2) // count)
