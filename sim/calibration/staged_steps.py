"""Steps of a real engine, of any shape that is asked for, timed whole: with all that Python does around them.

What leads to a step is not computed. As in a simulation, the scheduler is told that it was: what a step takes
does not depend on what the KV cache holds. So a long context costs no more to reach than a short one.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, TypeVar

from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch, StepLimits
from pagellm.engine.scheduling.block_manager import Transfer, TransferKind
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepListener

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine

_Result = TypeVar("_Result")

DECODE_STEPS = 4  # in a row, of one shape; the first follows a pause, as it seldom does in serving
_MAX_TOKENS = DECODE_STEPS + 4  # of an answer: more than are ever computed of it
_NUM_REPEATS = 32  # of what is too short to be timed a few times only
# Tokens of context in one step beyond which nothing is measured: what they take grows linearly.
_MAX_CONTEXT_TOKENS = 1 << 16


@dataclass(frozen=True)
class StepShape:
    """What a step computes.

    decodes: tokens before the one of each decoding sequence. chunks: tokens of each prompt. before: tokens of
    each of these prompts that were computed before.
    """

    decodes: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()
    before: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences of which anything is computed."""
        return len(self.decodes) + len(self.chunks)


class _Pricer(StepListener):
    """Notes what `price` says of the batch of each step. Asking takes some microseconds of the step."""

    def __init__(self, price: Callable[[ScheduledBatch], float]) -> None:
        self._price = price
        self.priced = 0.0

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        self.priced = self._price(batch)


class Stage:
    """Brings an idle engine before a step, and times it.

    clock: seconds. max_tokens, max_chunk, max_decodes, max_context: how far its settings let a step reach;
    max_kv_tokens: with the contexts of all sequences together. The prefix cache is empty afterwards, because
    the blocks do not hold what the scheduler was told.
    """

    def __init__(self, engine: "LLMEngine", clock: Callable[[], float]) -> None:
        self.random = random.Random(0)
        config, scheduler = engine.config, engine.scheduler
        self._engine = engine
        self._clock = clock
        self._block_size = config.block_size
        self._num_blocks = config.num_blocks - int(config.watermark * config.num_blocks)
        self._params = SamplingParams(temperature=0, max_tokens=_MAX_TOKENS, ignore_eos=True)
        self._request_ids: list[str] = []
        self._has_content: set[int] = set()
        self.max_tokens = scheduler.limits.max_num_batched_tokens
        # With a window, more tokens than the blocks hold at once.
        num_slots = config.max_model_len if config.window else self._num_blocks * self._block_size
        self.max_context = min(config.max_model_len, num_slots) - _MAX_TOKENS - 1
        self.max_chunk = min(self.max_tokens, scheduler.limits.max_prefill_chunk, self.max_context)
        self.max_decodes = scheduler.max_num_running
        self.max_kv_tokens = _MAX_CONTEXT_TOKENS if config.window else min(num_slots, _MAX_CONTEXT_TOKENS)

    def fits(self, shape: StepShape) -> bool:
        """Whether the engine's settings allow a step of this shape."""
        lengths = [*shape.decodes, *(shape.before + chunk for chunk in shape.chunks)]
        config = self._engine.config
        num_blocks = sum(config.most_blocks(length + _MAX_TOKENS + 1, config.window) for length in lengths)
        return (
            shape.num_sequences <= self.max_decodes
            and max(lengths) <= self.max_context
            and max(shape.chunks, default=0) <= self.max_chunk
            and len(shape.decodes) + sum(shape.chunks) <= self.max_tokens
            and sum(lengths) <= self.max_kv_tokens
            and num_blocks <= self._num_blocks
        )

    def time(
        self, shape: StepShape, price: Callable[[ScheduledBatch], float] = lambda batch: 0.0
    ) -> list[tuple[float, float]]:
        """What `price` says of each of a few steps of this shape, and the seconds that it took.

        One step where there are chunks, else `DECODE_STEPS` but the first.
        """
        pricer = _Pricer(price)

        def steps() -> list[tuple[float, float]]:
            self._prepare(shape)
            self._engine.loop.listen(pricer)
            times = []
            for _ in range(1 if shape.chunks else DECODE_STEPS):
                start = self._clock()
                self._engine.step()
                times.append((pricer.priced, self._clock() - start))
            return times if shape.chunks else times[1:]

        return self._cleared(steps, pricer)

    def scheduling_s(self) -> float:
        """Seconds of scheduling a step of one sequence and taking note of its token."""

        def step() -> float:
            self._prepare(StepShape(decodes=(1,)))
            start = self._clock()
            self._skip(1)
            return self._clock() - start

        return median(self._cleared(step) for _ in range(_NUM_REPEATS))

    def transfer_s(self, *kinds: TransferKind) -> float:
        """Seconds of moving a block's content, in the middle of these kinds and of several blocks."""
        owner, num_slots = Sequence(-1, [0], self._params), max(1, self._engine.config.num_swap_blocks)
        times = []
        for is_first in (True, False):  # the first write to a block pays for its memory
            for number in range(_NUM_REPEATS):
                block, slot = number % self._num_blocks, number % num_slots
                for kind in kinds:
                    source, target = {
                        TransferKind.COPY: (0, block),
                        TransferKind.SWAP_OUT: (block, slot),
                        TransferKind.SWAP_IN: (slot, block),
                    }[kind]
                    start = self._clock()
                    self._engine.runner.transfer(Transfer(kind, source, target, owner))
                    if not is_first:
                        times.append(self._clock() - start)
        return median(times)

    def _prepare(self, shape: StepShape) -> None:
        for length in shape.decodes:
            self._add(length)
        scheduler = self._engine.scheduler
        while scheduler.waiting or any(s.num_tokens - s.num_computed_tokens > 1 for s in scheduler.running):
            self._skip(sys.maxsize)  # more than once if blocks are given back on the way
        for chunk in shape.chunks:
            self._add(shape.before + chunk)
        left = shape.before if shape.chunks else 0
        while left:
            self._skip(left)
            left = shape.before - scheduler.running[-1].num_computed_tokens
        self._fill_blocks()

    def _add(self, length: int) -> None:
        request_id = f"calibration-{len(self._request_ids)}"
        self._request_ids.append(request_id)
        prompt = self.random.choices(range(self._engine.spec.vocab_size), k=length)
        self._engine.add_request(request_id, prompt, self._params)

    def _skip(self, max_tokens: int) -> None:
        """Lets the scheduler take a step of up to so many tokens of each prompt for computed."""
        loop, now = self._engine.loop, self._engine.now()
        self._engine.changing = True  # until it is done; an interrupt is dealt with by the engine's next call
        batch = loop.begin(now, limits=StepLimits(sys.maxsize, max_tokens))
        loop.end(batch, [[0]] * len(batch.sampled), now)
        self._engine.changing = False

    def _fill_blocks(self) -> None:
        """Gives blocks memory of their own: the system keeps one page of zeros for all new ones."""
        for sequence in self._engine.scheduler.running:
            for block in sequence.block_table:
                if block not in self._has_content:
                    self._has_content.add(block)
                    self._engine.runner.transfer(Transfer(TransferKind.COPY, 0, block, sequence))

    def _cleared(self, measure: Callable[[], _Result], listener: StepListener | None = None) -> _Result:
        """What is measured. Then the stage is cleared, also if an interrupt comes in the midst of that."""
        try:
            try:
                return measure()
            finally:
                self._clear(listener)
        finally:
            self._clear(listener)

    def _clear(self, listener: StepListener | None) -> None:
        if listener is not None:
            self._engine.loop.ignore(listener)
        if not self._request_ids:
            return
        # Blocks without a known prefix are the first to be taken again: so few blocks are ever written.
        self._engine.reset_prefix_cache()
        for request_id in self._request_ids:
            self._engine.abort(request_id)
        self._request_ids.clear()
