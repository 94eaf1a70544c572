"""Whatever the policies of all extension points answer, nothing is lost and nothing is computed wrong.

A state machine adds, steps, aborts, resets the cache and recovers, under policies that answer at random or
go wrong, on caches far too small. The memory knows of each slot on which tokens it depends. All is done to
two schedulers, which must agree; where blocks go by the least recent use, one of them asks a policy for it.
"""

from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import PolicyError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import PreemptionCosts, ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from tests.properties import extensions
from tests.properties.memory import Memory

MOST_ALIVE = 8


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    names = {setting: draw(st.sampled_from(choices)) for setting, choices in extensions.NAMES.items()}
    preemption = draw(st.sampled_from(["recompute", "swap", "auto"]))
    offloads = draw(st.booleans())
    return {
        "block_size": draw(st.integers(1, 3)),
        "num_blocks": draw(st.integers(2, 10)),
        "max_num_seqs": draw(st.sampled_from([1, 2, 4, 6])),
        "max_num_batched_tokens": draw(st.sampled_from([2, 5, 12])),
        "max_prefill_chunk": draw(st.sampled_from([None, 1, 3])),
        "max_preemptions": draw(st.sampled_from([1, 2, 8])),
        "window": draw(st.sampled_from([None, None, None, 2, 5])),
        "preemption": preemption,
        "enable_hierarchical_cache": offloads,
        "num_swap_blocks": draw(st.integers(1, 6)) if preemption == "swap" or offloads else None,
        **names,
    }


class Side:
    """A scheduler, its sequences and the memory that its steps write."""

    def __init__(self, config: dict[str, Any]) -> None:
        names = {setting: extensions.named(config[setting]) for setting in extensions.NAMES}
        self.config = EngineConfig(**config | names).complete(context=24)
        self.scheduler = Scheduler.with_blocks(self.config)
        self.manager = self.scheduler.block_manager
        self.memory = Memory(
            self.config.num_blocks, self.config.block_size, self.config.num_swap_blocks, self.config.window
        )
        self.sequences: dict[int, Sequence] = {}
        self.num_failures = 0

    def alive(self) -> list[Sequence]:
        return [s for s in self.sequences.values() if s.finish_reason is None]

    def add(self, seq_id: int, prompt: list[int], params: SamplingParams) -> None:
        group = [Sequence(seq_id + i, prompt, params.of_completion(i)) for i in range(params.n)]
        self.scheduler.add(group[0], 0.0, group[1:])
        self.sequences.update({s.seq_id: s for s in group})

    def step(self, now: float, token: int) -> list[Any]:
        before = {s.seq_id for s in self.scheduler.running}
        batch = self.scheduler.schedule(now, PreemptionCosts(0.5, 0.25))
        config = self.config
        assert batch.num_tokens <= config.max_num_batched_tokens
        assert all(count <= config.max_prefill_chunk for count in batch.num_new_tokens if count > 1)
        assert batch.sequences or batch.shed or not self.scheduler.has_unfinished
        assert all(s.finish_reason is FinishReason.SHED and not s.num_computed_tokens for s in batch.shed)
        if not self.scheduler.policies.prefills_alone and not batch.preempted:
            done = {s.seq_id for s in batch.sequences}
            decodes = {i for i in before if self.sequences[i].num_tokens - 1 == self.computed(i)}
            assert decodes <= done, "a decode did not get its token"
        while self.manager.transfers:
            self.memory.move(self.manager.transfers[0])
            self.manager.transferred()
        for sequence, count in zip(batch.sequences, batch.num_new_tokens, strict=True):
            start = sequence.num_computed_tokens
            self.memory.write(sequence, start, start + count)
            assert self.memory.holds(sequence, start + count), "computed on what is not its own"
        told = _told(batch)
        self.scheduler.commit(batch, [[token]] * len(batch.sampled))
        assert self.memory.holds_what_the_cache_says(self.manager)
        return told

    def computed(self, seq_id: int) -> int:
        return self.sequences[seq_id].num_computed_tokens

    def check(self) -> None:
        self.scheduler.check()
        waiting, running = list(self.scheduler.waiting), self.scheduler.running
        held = list(self.scheduler._held.values())
        places = [*waiting, *running, *held]
        to_begin = [fork for sequence in places for fork in sequence.forks]
        assert sorted(s.seq_id for s in [*places, *to_begin]) == sorted(s.seq_id for s in self.alive())
        for sequence in waiting:
            cached = len(self.manager.cached_prefix(sequence)) * self.config.block_size
            assert self.manager.num_cached_tokens(sequence) == cached, "a policy sees another prefix"
        for _ in extensions.NAMES:
            try:
                self.scheduler.policies.raise_error()
            except PolicyError:
                self.num_failures += 1
        assert self.num_failures <= 1


def _told(batch: ScheduledBatch) -> list[Any]:
    return [
        [(s.seq_id, list(s.block_table)) for s in batch.sequences],
        batch.num_new_tokens,
        [(p.sequence.seq_id, p.by) for p in batch.preempted],
        [(a.sequence.seq_id, a.num_cached_tokens, a.num_host_tokens) for a in batch.admitted],
        [(t.kind, t.source, t.target) for t in batch.transfers],
        [s.seq_id for s in batch.shed],
    ]


class ExtensionPoints(RuleBasedStateMachine):
    """Everything that can be called, in every order that is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.next_id, self.now = 0, 0.0

    @initialize(config=configs(), fault=st.sampled_from(extensions.FAULTS), after=st.sampled_from([0, 1, 5]))
    def configure(self, config: dict[str, Any], fault: tuple[str, Any], after: int) -> None:
        extensions.Whims.fault, extensions.Whims.after = fault, after
        other = "Recent" if config["eviction"] == "lru" else config["eviction"]
        self.sides = [Side(config), Side(config | {"eviction": other})]

    @precondition(lambda self: len(self.sides[0].alive()) < MOST_ALIVE)
    @rule(
        prompt=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=1, max_size=8),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        max_tokens=st.integers(1, 8),
        tenant=st.sampled_from(["", "a"]),
    )
    def add(self, prompt: list[int], n: int, max_tokens: int, tenant: str) -> None:
        longest = self.sides[0].config.max_model_len
        for side in self.sides:
            params = SamplingParams(n=n, max_tokens=max_tokens, tenant=tenant)
            side.add(self.next_id, prompt[:longest], params)
        self.next_id += n

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=6), wait_s=st.sampled_from([0.0, 0.5]))
    def steps(self, tokens: list[int], wait_s: float) -> None:
        for token in tokens:
            self.now += wait_s
            self.step(token)

    @precondition(lambda self: self.sides[0].alive())
    @rule(pick=st.integers(0, 100))
    def abort(self, pick: int) -> None:
        for side in self.sides:
            alive = side.alive()
            side.scheduler.abort(alive[pick % len(alive)])

    @rule()
    def reset_cache(self) -> None:
        for side in self.sides:
            side.manager.reset_cache()

    @rule()
    def recover(self) -> None:
        for side in self.sides:
            side.scheduler.recover({s: s.num_tokens for s in side.alive()})

    @invariant()
    def all_is_well_and_both_agree(self) -> None:
        if hasattr(self, "sides"):
            for side in self.sides:
                side.check()

    def step(self, token: int) -> None:
        one, other = (side.step(self.now, token) for side in self.sides)
        assert one == other, "the same operations gave another schedule"

    def teardown(self) -> None:
        """Nothing that was accepted is lost: all of it ends."""
        if not hasattr(self, "sides"):
            return
        for _ in range(3000):
            if not self.sides[0].scheduler.has_unfinished:
                break
            self.step(0)
        for side in self.sides:
            assert not side.scheduler.has_unfinished
            side.check()
            assert side.manager.num_free_blocks == side.manager.num_blocks
            shed = {s for s in side.sequences.values() if s.finish_reason is FinishReason.SHED}
            assert not shed or side.config.admission != "accept"


TestExtensionPoints = ExtensionPoints.TestCase
TestExtensionPoints.settings = settings(max_examples=400, stateful_step_count=20, deadline=None)
