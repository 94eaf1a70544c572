"""Which tokens run in the next step: one budget for decodes and prefill chunks, in a policy's order.

Who goes first, who makes way, who is let in at all, which cached blocks are given up and how large a step is
are questions to policies (`policies/`), within the laws that are kept here.

A pure state machine, driven by a `StepLoop` alone, through `add`, `fork`, `schedule`, `commit` and `abort`.
It knows no clock, no text and no arrays; times and measured costs are arguments. A sequence is admitted when
all of its tokens fit into free blocks, or with a window as many as it holds at once. When a running one needs
a block and none is free, another is preempted: its blocks are given back to be computed again, or its content
moves to the second tier of blocks, whichever is said to be cheaper.

Nobody waits for ever, whatever the policy. Running sequences are never more than the step's budget, so each
decode gets its token in every step. One that was preempted `max_preemptions` times is admitted before all
others, with every block that it can ever need, and is not preempted again.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from pagellm.engine.config import CompleteConfig
from pagellm.engine.errors import RequestError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.batch import (
    Admitted,
    Preempted,
    Preemption,
    PreemptionCosts,
    ScheduledBatch,
    StepLimits,
)
from pagellm.engine.scheduling.block_manager import BlockManager, Transfer
from pagellm.engine.scheduling.policies import Admission, CheckedPolicies, SchedulerStats
from pagellm.engine.scheduling.policies.future import Future
from pagellm.engine.scheduling.sequence import GIVEN_BACK, Sequence, SequenceError, SequenceStatus
from pagellm.engine.scheduling.waiting_queue import WaitingQueue


class Scheduler:
    """Owns the queues: every sequence it was given waits, runs or has finished."""

    def __init__(self, config: CompleteConfig, block_manager: BlockManager) -> None:
        self.block_manager = block_manager
        self.limits = StepLimits(config.max_num_batched_tokens, config.max_prefill_chunk)
        self.max_num_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self._max_chunk = min(config.max_prefill_chunk, config.max_num_batched_tokens)
        self.max_preemptions = config.max_preemptions
        self.max_len = config.max_model_len
        self.preemption = Preemption(config.preemption)
        self.costs = PreemptionCosts()  # as `schedule` was told last
        self.policies = CheckedPolicies.load(config, block_manager)
        block_manager.evict_by(self.policies)
        self._standing = 0.0, 0, 0, 0  # the first of `SchedulerStats`, as it was noted last
        self._stats: SchedulerStats | None = None  # the same, if somebody has asked since
        self.waiting = WaitingQueue(self.policies)
        self._held: dict[int, Sequence] = {}  # by seq_id: those that are not let in yet, in order of arrival
        self._num_changes = 0  # of the cache, when the order was asked for last
        self.running: list[Sequence] = []
        self._watermark = int(config.watermark * block_manager.num_blocks)
        self._num_arrived = 0
        # The first in the queue, if its blocks were not free, what the cache had of it, and when that was.
        self._blocked: tuple[Sequence, list[int], int] | None = None

    @classmethod
    def with_blocks(cls, config: CompleteConfig) -> "Scheduler":
        """A scheduler with a block manager as the settings have it, for an engine or a simulated one."""
        manager = BlockManager(
            config.num_blocks,
            config.block_size,
            config.enable_prefix_caching,
            config.num_swap_blocks,
            window=config.window,
            offloads=config.enable_hierarchical_cache,
        )
        return cls(config, manager)

    @property
    def stats(self) -> SchedulerStats:
        """How things stood when the step began, or when the last sequence came."""
        if self._stats is None:
            manager = self.block_manager
            self._stats = SchedulerStats(*self._standing, manager.num_blocks, manager.block_size)
        return self._stats

    @property
    def num_waiting(self) -> int:
        """Sequences that wait, swapped ones and those held back included."""
        return len(self.waiting) + len(self._held)

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits, runs or is held back."""
        return bool(self.waiting or self.running or self._held)

    def foresee(self, sequences: Iterable[Sequence]) -> None:
        """Tells policies that need it of all that will be added, in order; not one has been yet."""
        if self.policies.needs_future:
            fitting = (s for s in sequences if 0 < s.num_tokens <= self.max_len)
            self.policies.future = Future(map(self.block_manager.prompt_hashes, fitting))

    def add(self, sequence: Sequence, now: float = 0.0, forks: Items[Sequence] = ()) -> None:
        """Takes a new sequence in, and other completions of its prompt that take their first tokens from it.

        Raises `RequestError`, and takes nothing in, if it could never be computed.
        """
        self._accept(sequence, now, forks)
        if self.policies.admits:
            self._held[sequence.seq_id] = sequence
        else:
            self.waiting.push(sequence, self.stats)

    def fork(self, parent: Sequence, child: Sequence, now: float = 0.0, forks: Items[Sequence] = ()) -> None:
        """Takes a new sequence in that begins like a running one, to share the blocks of what they share.

        Where the parent does not run or has not computed so much, the child is computed by itself; so it is
        where the admission policy, which is asked at once, does not accept it now. Raises `RequestError` like
        `add`.
        """
        self._accept(child, now, forks)
        if self.policies.admits and self.policies.admit(child, self.stats) is not Admission.ACCEPT:
            self._held[child.seq_id] = child
        elif not self._share(parent, child, child.num_tokens - 1):
            self.waiting.push(child, self.stats)

    def schedule(
        self, now: float = 0.0, costs: PreemptionCosts | None = None, limits: StepLimits | None = None
    ) -> ScheduledBatch:
        """Chooses the next step's work and gives it its blocks. `commit` must follow before the next call.

        now: seconds, on the clock of `add`. costs: what has been measured, if that is new. limits: of this
        step, where they are not the settings'.

        Raises `SequenceError` if one sequence cannot be dealt with; `recover` must follow.
        """
        self.update_stats(now)
        self.costs = costs or self.costs
        batch = ScheduledBatch()
        if self._held:
            self._let_in(batch)
        if self.policies.makes_way and self.running and self.waiting:
            self._make_way(batch)
        decodes = [s for s in self.running if len(s.token_ids) - s.num_computed_tokens == 1]
        prefills: list[Sequence] = []
        if len(decodes) < len(self.running):
            prefills = [s for s in self.running if len(s.token_ids) - s.num_computed_tokens > 1]
        limits = limits or (self._budget(decodes, prefills) if self.policies.has_budget else self.limits)
        prefills_alone = self.policies.prefills_alone  # a policy that goes wrong in this step changes it
        if not prefills_alone:
            self._make_room(decodes, batch)
        if prefills:
            self._make_room(prefills, batch)  # for those that got several tokens at once
        if not prefills_alone:
            batch.add_decodes([s for s in decodes if s.block_table] if batch.preempted else decodes)
        budget = self._schedule_prefills(prefills, batch, limits)
        if self.waiting and (
            not batch.preempted or all(preempted.needed_by is None for preempted in batch.preempted)
        ):
            self._admit(batch, budget, limits)
        if prefills_alone and not batch.sequences:
            self._make_room(decodes, batch)
            batch.add_decodes([s for s in decodes if s.block_table])
        if self.block_manager.transfers:
            batch.transfers += self.block_manager.transfers
        batch.changed_tables = self.block_manager.take_changed_tables()
        return batch

    def commit(self, batch: ScheduledBatch, token_ids: Items[Items[int]]) -> list[Sequence]:
        """Takes note that a batch has been computed; returns the sequences that this finished.

        token_ids: for each of `batch.sampled`, in order, one or more tokens that it gets. What comes behind a
        token that ends it is dropped; the rest is computed in the steps to come, as a single token is.
        Sequences that were aborted since `schedule` are passed over. Raises `SequenceError` like
        `schedule`.
        """
        self.block_manager.transfers.clear()
        batch.token_ids = token_ids
        if self.policies.counts_batches:
            self.policies.on_commit(batch, self.stats)
        finished: list[Sequence] = []
        manager = self.block_manager
        registers, block_size = manager.registers, manager.block_size
        num_dropped = 0
        given, to_forks = batch.by_sequence(token_ids)
        try:
            for sequence, count, new in zip(batch.sequences, batch.num_new_tokens, given, strict=True):
                if sequence.block_table:
                    sequence.num_computed_tokens = computed = sequence.num_computed_tokens + count
                    if registers and computed >= (sequence.num_registered_blocks + 1) * block_size:
                        manager.register(sequence)
                else:  # it was aborted
                    num_dropped += len(new)
                    new = ()
                if to_forks and sequence in to_forks:
                    num_dropped += self._commit_forks(sequence, to_forks[sequence], finished)
                own = sequence.token_ids
                for token_id in new:
                    own.append(token_id)
                    stops = sequence.stop_token_ids
                    ends = len(own) >= sequence.max_len or (stops and token_id in stops)
                    if ends and self._finish_if_ended(sequence, finished):
                        num_dropped += computed + len(new) - len(own)
                        break
        except Exception as error:
            raise SequenceError(sequence) from error
        batch.num_dropped_tokens = num_dropped
        if finished:
            self.running = [s for s in self.running if s.block_table]
        return finished

    def abort(self, sequence: Sequence, reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends a sequence that was added, whatever state it is in; a finished one stays as it is."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        group = sequence.group
        is_held = self._held.pop(sequence.seq_id, None) is not None
        if group is not None and group[0] is not sequence:
            _leave_group(sequence)
        elif sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif not is_held:
            self.waiting.remove(sequence)
        self.finish(sequence, reason)
        if sequence.group is not None:
            _, successor, *_ = sequence.group
            _leave_group(sequence)
            if is_held:
                self._held[successor.seq_id] = successor
                self._held = dict(sorted(self._held.items(), key=lambda held: held[1].arrival_index))
            else:
                self.waiting.push(successor, self.stats)

    def hand_over(self, sequence: Sequence) -> Sequence:
        """Lets a running sequence go, between two steps, that is to go on with another scheduler.

        Returns who keeps its blocks until `block_manager.free` is called with that. Where the sequence is
        added next, what it has computed counts as computed.
        """
        self.running.remove(sequence)
        self.policies.on_finish(sequence, self.stats)
        return self.block_manager.hand_over(sequence)

    def transfer_failed(self, transfer: Transfer, batch: ScheduledBatch) -> None:
        """Takes note that a transfer could not be done: who counts on it is computed again.

        So is whoever makes way from now on, and the second tier keeps nothing of the prefix cache.
        """
        self.preemption = Preemption.RECOMPUTE
        lost = self.block_manager.give_up_offloading(transfer) if self.block_manager.offloads else []
        if transfer.sequence is not None and transfer.sequence not in lost:
            lost.append(transfer.sequence)
        for sequence in lost:
            if sequence.status is SequenceStatus.FINISHED:
                continue
            if sequence.status is SequenceStatus.RUNNING:
                self.running.remove(sequence)
                batch.discard(sequence)
            else:
                self.waiting.remove(sequence)
            self.block_manager.free(sequence)
            self.waiting.push(sequence, self.stats, guaranteed=self._is_guaranteed(sequence))

    def recover(self, num_known: Mapping[Sequence, int]) -> None:
        """Begins anew after an operation that did not end, whatever it left behind.

        num_known: the sequences that have not ended, and how many of its tokens each keeps. All of them wait,
        in their order, and are computed again; so does the policy begin anew, and is told of them. May be
        called again if it did not end itself.
        """
        self.block_manager.recover()
        self.policies.restart()
        self.waiting, self.running = WaitingQueue(self.policies), []
        self._blocked = None
        held = [one for first in self._held.values() for one in (first, *first.forks)]
        self._held = {one.seq_id: one for one in held if one in num_known}
        for sequence in sorted(num_known, key=lambda sequence: sequence.arrival_index):
            sequence.restart(num_known[sequence])
            self.policies.on_add(sequence, self.stats)
            if sequence.seq_id not in self._held:
                self.waiting.push(sequence, self.stats, guaranteed=self._is_guaranteed(sequence))

    def update_stats(self, now: float) -> None:
        """Notes how things stand when a step begins, for policies."""
        num_waiting, num_running = len(self.waiting) + len(self._held), len(self.running)
        self._standing = now, num_waiting, num_running, self.block_manager.num_free_blocks
        self._stats = None

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence that is in no queue any more, or is about to leave the running ones."""
        self.block_manager.free(sequence)
        sequence.finish_reason = reason
        if not sequence.was_admitted:
            self._no_longer_to_come(sequence)
        if self.policies.hears_ends:
            self.policies.on_finish(sequence, self.stats)

    def lets_nobody_in(self, num_decodes: int) -> bool:
        """Whether a step of so many decodes lets nobody in, and asks no policy for it."""
        if self._held:
            return False
        if not self.waiting:
            return True
        policies = self.policies
        if policies.makes_way:
            return False
        if len(self.running) >= self.max_num_running:
            return True
        if policies.prefills_alone or policies.asks_queues or policies.order_changes != "never":
            return False
        if num_decodes >= self.limits.max_num_batched_tokens:
            return True
        return self._is_still_blocked(self.waiting.first(self.stats))

    def check(self) -> None:
        """Asserts that queues, states and blocks agree."""
        self.block_manager.check()
        assert len(self.running) <= self.max_num_running
        assert all(s.status is SequenceStatus.RUNNING for s in self.running)
        waiting = list(self.waiting)
        assert len(waiting) == len(self.waiting)
        swapped = [s for s in waiting if s.status is SequenceStatus.SWAPPED]
        assert all(s.status in (SequenceStatus.WAITING, SequenceStatus.SWAPPED) for s in waiting)
        assert len(swapped) == self.block_manager.num_swapped
        assert all(s.status is SequenceStatus.WAITING for s in self._held.values())
        assert not self._held.keys() & {s.seq_id for s in waiting}, "one that waits is held back"
        for sequence in (*self.running, *waiting, *self._held.values()):
            group = sequence.group
            assert group is None or group[0] is sequence, "one that is to take its first token from another"
            assert all(s.group is group and s.status is SequenceStatus.WAITING for s in sequence.forks)
            assert group is None or len(group) > 1
        held = {block for s in self.running for block in s.block_table} - {GIVEN_BACK}
        assert len(held) + self.block_manager.num_free_blocks == self.block_manager.num_blocks

    def _accept(self, sequence: Sequence, now: float, forks: Items[Sequence]) -> None:
        """Checks a new sequence and gives it and its forks their places in the order of arrival."""
        length = sequence.num_tokens
        if self.policies.needs_future and self.policies.future is None:
            raise RequestError(
                "eviction: found a policy that needs to know the requests to come, expected the replay of a "
                "trace, which alone does"
            )
        if length == 0:
            raise RequestError("prompt: found no tokens, expected at least one")
        if length > self.max_len:
            raise RequestError(
                f"prompt: found {length} tokens, expected at most {self.max_len}, what max_model_len and the "
                "KV cache allow"
            )
        self.update_stats(now)
        group = [sequence, *forks]
        for new in group:
            new.arrival_index, new.arrival_time = self._num_arrived, now
            self._num_arrived += 1
            # A prompt that fills everything still gives one token, which needs no slot of its own.
            max_tokens = new.sampling_params.max_tokens
            most = new.num_prompt_tokens + (max_tokens or 0)  # it may come with tokens that it got elsewhere
            new.max_len = self.max_len if max_tokens is None else min(most, self.max_len)
            new.group = group if forks else None
            if self.policies.hears_adds:
                self.policies.on_add(new, self.stats)

    def _let_in(self, batch: ScheduledBatch) -> None:
        """Asks about those that are held back; the first goes on where there is nothing else to do."""
        for sequence in list(self._held.values()):
            decision = self.policies.admit(sequence, self.stats)
            if decision is Admission.QUEUE:
                continue
            if decision is Admission.ACCEPT:
                del self._held[sequence.seq_id]
                self.waiting.push(sequence, self.stats)
                continue
            for one in [*sequence.forks, sequence]:
                batch.shed.append(one)
                self.abort(one, FinishReason.SHED)
        if self._held and not (self.waiting or self.running):
            first = next(iter(self._held))
            self.waiting.push(self._held.pop(first), self.stats)

    def _make_way(self, batch: ScheduledBatch) -> None:
        """Lets those that run make way whom the policy wants to."""
        candidates = [s for s in self.running if not self._is_guaranteed(s)]
        if not candidates:
            return
        self._ask_for_order()
        first = self.waiting.first(self.stats)
        for victim in self.policies.make_way(candidates, first, self.stats):
            self._preempt(victim, None, batch)

    def _ask_for_order(self) -> None:
        """Asks for the order of those that wait where it may have changed."""
        changes, num_changes = self.policies.order_changes, self.block_manager.num_changes
        if changes == "always" or (changes == "cache" and num_changes != self._num_changes):
            self._num_changes = num_changes
            self.waiting.ask_again(self.stats)

    def _budget(self, decodes: list[Sequence], prefills: list[Sequence]) -> StepLimits:
        """The tokens of this step as the policy has them, within the settings."""
        most = self.limits.max_num_batched_tokens, self.limits.max_prefill_chunk
        budget, chunk = self.policies.budget(most, decodes, prefills, self.stats)
        return StepLimits(budget, max(1, chunk))

    def _make_room(self, sequences: list[Sequence], batch: ScheduledBatch) -> None:
        """Gives running sequences slots for their next tokens; where blocks run out, somebody makes way.

        Those are all of a sequence's tokens; with a window, as many as one step may compute.
        """
        for sequence in [s for s in sequences if len(s.token_ids) > s.num_slots]:
            if sequence.block_table:  # else it has made way in this step
                self._make_room_for(sequence, batch)

    def _schedule_prefills(self, prefills: list[Sequence], batch: ScheduledBatch, limits: StepLimits) -> int:
        """The next chunks of prompts under way, within what the decodes leave; returns the rest."""
        budget = limits.max_num_batched_tokens - len(batch.sequences)
        if not batch.sequences:  # also where the decodes that a budget was meant for have made way
            budget = max(1, budget)
        for sequence in prefills:
            if budget > 0 and sequence.block_table:
                budget -= self._schedule_chunk(sequence, batch, budget, limits)
        return budget

    def _schedule_chunk(
        self, sequence: Sequence, batch: ScheduledBatch, budget: int, limits: StepLimits
    ) -> int:
        remaining = sequence.num_tokens - sequence.num_computed_tokens
        slots = sequence.num_slots - sequence.num_computed_tokens
        count = min(remaining, budget, limits.max_prefill_chunk, slots)
        batch.add(sequence, count)
        return count

    def _admit(self, batch: ScheduledBatch, budget: int, limits: StepLimits) -> None:
        """Lets those in that wait, first come what the policy puts first, until one does not fit."""
        if budget > 0 and len(self.running) < self.max_num_running:
            self._ask_for_order()
        while budget > 0 and self.waiting and len(self.running) < self.max_num_running:
            sequence = self.waiting.first(self.stats)
            if batch.preempted and batch.sequences and sequence in _made_way(batch):
                return  # it has just made way for others
            was = sequence.status
            try:
                prefix = self._give_blocks(sequence)
            except Exception as error:
                raise SequenceError(sequence) from error
            if prefix is None:
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            manager = self.block_manager
            num_cached = len(prefix) * manager.block_size
            num_host = manager.num_offloaded_tokens(prefix) if manager.offloads else 0
            if not sequence.was_admitted:
                sequence.was_admitted = True
                self._no_longer_to_come(sequence)
                sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
                sequence.num_host_tokens = min(num_host, sequence.num_prompt_tokens)
            batch.admitted.append(Admitted(sequence, was, num_cached, num_host))
            budget -= self._schedule_chunk(sequence, batch, budget, limits)

    def _give_blocks(self, sequence: Sequence) -> list[int] | None:
        """Gives one that waits its blocks, if they are free; returns those that were cached."""
        manager = self.block_manager
        if self.running and self._is_still_blocked(sequence):
            return None
        prefix = manager.cached_prefix(sequence)
        num_tokens = sequence.num_tokens
        fits = True
        if self._is_guaranteed(sequence):
            num_tokens = max(num_tokens, sequence.max_len - 1)  # the last token needs no slot
            fits = not manager.window.tokens or self._can_guarantee(sequence)
        swapped = sequence.status is SequenceStatus.SWAPPED
        num_computed = max(sequence.num_computed_tokens, len(prefix) * manager.block_size)
        if manager.window.tokens:
            most = manager.window.num_behind(num_computed) + self._most_blocks(num_tokens)
            num_tokens = min(num_tokens, most * manager.block_size)
        spare = self._watermark if self.running else 0
        if not (fits and manager.can_allocate(num_tokens, prefix, spare, num_computed)):
            self._blocked = sequence, prefix, manager.num_releases
            return None
        self._blocked = None
        if swapped:
            manager.swap_in(sequence, prefix, num_tokens)
        else:
            manager.allocate(sequence, prefix, num_tokens)
        return prefix

    def _is_still_blocked(self, sequence: Sequence) -> bool:
        """Whether nothing has happened since it did not fit that could let it in: so this costs O(1)."""
        if self._blocked is None or self._blocked[0] is not sequence:
            return False
        _, prefix, num_releases = self._blocked
        manager = self.block_manager
        return num_releases == manager.num_releases and not manager.prefix_grew(sequence, prefix)

    def _most_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds at once."""
        return self.block_manager.window.most_blocks(num_tokens, self._max_chunk)

    def _can_guarantee(self, sequence: Sequence) -> bool:
        """Whether it and all that run guaranteed can have as many blocks at once as each ever needs.

        With a window they take blocks and give some back as they go on, so all are not theirs from the start;
        but whoever is not guaranteed makes way for them.
        """
        others = [running for running in self.running if self._is_guaranteed(running)]
        needed = sum(self._most_blocks(one.max_len - 1) for one in (sequence, *others))
        return needed <= self.block_manager.num_blocks

    def _is_guaranteed(self, sequence: Sequence) -> bool:
        """Whether it has made way often enough: it gets all its blocks at once and keeps them."""
        return sequence.num_preemptions >= self.max_preemptions

    def _make_room_for(self, sequence: Sequence, batch: ScheduledBatch) -> None:
        """Gives a running sequence slots for its next tokens, preempting for it, if need be itself."""
        manager = self.block_manager
        num_tokens = len(sequence.token_ids)
        if manager.window.tokens:
            num_tokens = min(num_tokens, sequence.num_computed_tokens + self._max_chunk)
        while not manager.can_grow(sequence, num_tokens):
            candidates = [s for s in self.running if not self._is_guaranteed(s)]
            victim = self.policies.victim(candidates, self.stats)
            self._preempt(victim, sequence, batch)
            if victim is sequence:
                return
        manager.grow(sequence, num_tokens)

    def _preempt(self, victim: Sequence, needed_by: Sequence | None, batch: ScheduledBatch) -> None:
        self.running.remove(victim)
        computed, manager = victim.num_computed_tokens, self.block_manager
        recompute_s = computed * self.costs.recompute_token_s
        swap_s = 2 * manager.held_blocks(computed) * self.costs.swap_block_s
        swaps = self.preemption is Preemption.SWAP or (
            self.preemption is Preemption.AUTO and swap_s < recompute_s
        )
        by = Preemption.SWAP if swaps and manager.can_swap_out(victim) else Preemption.RECOMPUTE
        batch.preempted.append(Preempted(victim, by, needed_by, computed, recompute_s, swap_s))
        victim.num_preemptions += 1
        if victim.num_computed_tokens >= victim.num_prompt_tokens:
            victim.reads_cache = True  # its prompt's logits have been given out
        if by is Preemption.SWAP:
            manager.swap_out(victim)
        else:
            manager.free(victim)
        guaranteed = self._is_guaranteed(victim)
        self.waiting.push(victim, self.stats, guaranteed, by_choice=needed_by is None)

    def _share(self, parent: Sequence, child: Sequence, num_shared: int) -> bool:
        """Lets a new sequence run on a running one's blocks, if they hold so many of its tokens."""
        if (
            parent.status is not SequenceStatus.RUNNING
            or self._is_guaranteed(parent)  # what it has must stay its own
            or len(self.running) >= self.max_num_running
            or self.block_manager.transfers  # the parent's content may not be there yet
            or not 0 < num_shared <= parent.num_computed_tokens
            or not self.block_manager.can_fork(parent, num_shared)
            or parent.token_ids[:num_shared] != child.token_ids[:num_shared]
            or parent.sampling_params.cache_salt != child.sampling_params.cache_salt
        ):
            return False
        self.block_manager.fork(parent, child, num_shared)
        child.was_admitted, child.num_cached_tokens = True, min(parent.num_cached_tokens, num_shared)
        child.num_host_tokens = min(parent.num_host_tokens, num_shared)
        self.running.append(child)
        return True

    def _commit_forks(
        self, parent: Sequence, to_forks: list[tuple[Sequence, Items[int]]], finished: list[Sequence]
    ) -> int:
        """Gives the completions that begin like this one their first tokens and lets them go on.

        Returns how many tokens were dropped.
        """
        num_dropped = 0
        for child, new in to_forks:
            if child.group is None or child.group is not parent.group:  # it was aborted, or its parent was
                num_dropped += len(new)
                continue
            _leave_group(child)
            num_shared = child.num_tokens
            for token_id in new:
                child.token_ids.append(token_id)
                if self._finish_if_ended(child, finished):
                    break
            num_dropped += num_shared + len(new) - child.num_tokens
            if child.finish_reason is None and not self._share(parent, child, num_shared):
                self.waiting.push(child, self.stats)
        return num_dropped

    def _finish_if_ended(self, sequence: Sequence, finished: list[Sequence]) -> bool:
        params = sequence.sampling_params
        stops = sequence.token_ids[-1] in sequence.stop_token_ids
        if stops and sequence.num_output_tokens > params.min_tokens:
            self.finish(sequence, FinishReason.STOP)
        elif len(sequence.token_ids) >= sequence.max_len:
            self.finish(sequence, FinishReason.LENGTH)
        else:
            return False
        finished.append(sequence)
        return True

    def _no_longer_to_come(self, sequence: Sequence) -> None:
        if self.policies.future is not None:
            self.policies.future.began(self.block_manager.prompt_hashes(sequence))


def _made_way(batch: ScheduledBatch) -> list[Sequence]:
    return [preempted.sequence for preempted in batch.preempted]


def _leave_group(sequence: Sequence) -> None:
    """Takes a sequence out of its group; one that is left alone in it is no group."""
    group, sequence.group = sequence.group, None
    assert group is not None
    group.remove(sequence)
    if len(group) == 1:
        group[0].group = None
