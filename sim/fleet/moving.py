"""A replay in which requests go from engine to engine, replicas come and go, or several engines are one.

Prefill and decode. A prefill replica's scheduler computes a prompt and gives the first token, as in SGLang,
TensorRT-LLM and Splitwise. Then the sequence is handed over: its KV travels, without what the decode replica
has in its prefix cache when it sets off. There it waits in the scheduler, which gives it blocks that count as
computed. Until then its blocks stay taken in the prefill replica, so that a fleet that decodes too slowly
stops those who compute prompts.

Failures. A replica that fails loses its KV, its cache and the step under way; so do those that share its
devices. Its requests keep the tokens that their clients have: they go to others at once, which compute prompt
and tokens anew and go on (Dynamo calls that request migration). One that has done so as often as the fleet's
migration_limit says fails. The replica comes back after its repair and start-up, with an empty cache.

Engines that share devices. A pipeline of so many stages has as many engines, each with a part of its memory,
whose batches follow each other through the stages: vLLM's virtual engines. Data parallel ranks of a mixture
begin their steps together, those that have any, and end together; of other models they know nothing of each
other.

Scaling. A replica that is started takes requests after its start-up time. One that is to stop takes no more,
and is gone when it has none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappush
from random import Random
from statistics import fmean
from typing import Any

from pagellm.engine.errors import ConfigError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.scheduling.step_loop import StepEnd, StepListener
from pagellm.sim.fleet.account import Use, account
from pagellm.sim.fleet.fleet import Group
from pagellm.sim.fleet.instance import Instance
from pagellm.sim.fleet.links import Links
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.fleet.scaling import Scaler
from pagellm.sim.report.schema import FailureFigures, FleetData, ScalingEvent
from pagellm.sim.simulator import Event, EventKind, Replay, Simulator, checked_seconds
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.trace import Trace

MAX_SCALING_EVENTS = 1000  # that a report lists
_FRUITLESS = 10_000  # failures of each instance in a row, after which no request will get a token either


@dataclass(eq=False)
class Journey:
    """A request on its way.

    at: the replica that has it, or that its KV travels to; None while it waits for one to be there.
    keeper, source: what keeps its blocks where its prompt was computed, and where that is; None if nothing
    does. attempt: how often its KV was sent, which tells an old arrival. is_under_way: its KV is.
    num_migrations: how often it began anew after a failure.
    gave_up: its client has, before it was anywhere where that could be told.
    """

    sequence: Sequence
    request: TraceRequest
    sent_s: float
    at: Replica | None = None
    keeper: Sequence | None = None
    source: Replica | None = None
    attempt: int = 0
    num_migrations: int = 0
    is_under_way: bool = False
    gave_up: bool = False


class _HandsOver(StepListener):
    """Hears of the first tokens that a prefill replica gives."""

    def __init__(self, replay: "MovingReplay", replica: Replica) -> None:
        self._replay = replay
        self._replica = replica

    def committed(self, end: StepEnd) -> None:
        for sequence in end.sampled:
            if sequence.finish_reason is None and sequence.block_table:
                self._replay.hand_over(end.now, self._replica, sequence)


class _TakesOver(StepListener):
    """Hears of who gets blocks where it was handed over to; in a stride nobody does."""

    takes_strides = True

    def __init__(self, replay: "MovingReplay") -> None:
        self._replay = replay

    def scheduled(self, batch: ScheduledBatch, now: float) -> None:
        for admitted in batch.admitted:
            self._replay.release(now, admitted.sequence)


class MovingReplay(Replay):
    """One replay of a fleet that moves."""

    def __init__(self, simulator: Simulator, trace: Trace) -> None:
        self.links = Links()
        self.instances: list[Instance] = []
        self.scaling: list[ScalingEvent] = []
        self.losses: FailureFigures = {
            "failures": 0, "lost_requests": 0, "lost_tokens": 0, "failed_requests": 0, "mean_down_s": None,
        }  # fmt: skip
        self._down_s: list[float] = []
        self._journeys: dict[Sequence, Journey] = {}
        self._held_back: dict[Sequence, Journey] = {}  # that wait for a replica, in order
        self._instance_of: dict[Replica, Instance] = {}
        self._num_pushed = 0  # events of its own
        self._progress, self._failures_before = (0, 0, 0), 0
        super().__init__(simulator, trace)
        self._scalers = {
            group.name: Scaler(group.autoscale) for group in self.fleet.groups if group.autoscale is not None
        }
        self._clocks: dict[tuple[str, int], Random] = {}

    # What there is

    def _make_replicas(self) -> None:
        for group in self.fleet.groups:
            for _ in range(group.count):
                instance = self._new_instance(group)
                instance.start(-float("inf"))
                instance.ready(-float("inf"))
        self._update_pools()

    def _new_instance(self, group: Group) -> Instance:
        replicas = [self._new_replica(group) for _ in range(group.costs.num_engines)]
        for replica in replicas:
            if group.role == "prefill":
                replica.loop.listen(_HandsOver(self, replica))
            elif any(other.role == "prefill" for other in self.fleet.groups):
                replica.loop.listen(_TakesOver(self))
        place = sum(instance.group is group for instance in self.instances)
        instance = Instance(group, place, replicas)
        self.instances.append(instance)
        self._instance_of |= dict.fromkeys(replicas, instance)
        return instance

    def _update_pools(self) -> None:
        self._pools.update([one for i in self.instances if i.takes_requests for one in i.replicas])

    def account(self) -> FleetData:
        data = account(self.fleet, list(map(self._use, self.instances)), self.metrics)
        if self.links.figures():
            data["links"] = self.links.figures()
        if self.losses["failures"]:
            data["failures"] = self.losses | {"mean_down_s": fmean(self._down_s) if self._down_s else None}
        if self.scaling:
            data["scaling"] = self.scaling
        return data

    def _use(self, instance: Instance) -> Use:
        busy_s = instance.busy_s
        if not instance.shares_devices:
            each = [self.metrics.busy_s(replica.number) for replica in instance.replicas]
            busy_s = sum(each) / len(each)
        return Use(instance.group, instance.paid_spans, busy_s)

    def _is_over(self) -> bool:
        """Whether all requests have ended, and no more come."""
        return self._num_ended == self._num_arrivals

    # Events of steps, which a failure in between makes void

    def _handlers(self) -> dict[EventKind, Any]:
        return super()._handlers() | {
            EventKind.FAILURE: self._fail,
            EventKind.READY: self._ready,
            EventKind.KV_ARRIVAL: self._kv_arrives,
            EventKind.SCALING: self._scale,
        }

    def run(self) -> None:
        for failure in self.fleet.failures:
            instance = next(
                one
                for one in self.instances
                if one.group.name == failure.group and one.place == failure.replica
            )
            self._push(failure.time_s, EventKind.FAILURE, (instance, failure.down_s, None))
        for instance in self.instances:
            self._expect_failure(0.0, instance)
        for group in self.fleet.groups:
            if group.autoscale is not None:
                self._push(group.autoscale.interval_s, EventKind.SCALING, group)
        super().run()
        for instance in self.instances:
            instance.end(float("inf"))
        if self.losses["failures"] or self.scaling:
            self.metrics.up = [span for instance in self.instances for span in instance.spans]

    def _push(self, time_s: float, kind: EventKind, subject: Any) -> None:
        self._num_pushed += 1
        heappush(self._events, (time_s, kind, self._num_pushed, subject))

    def _next_start(self, now: float, replica: Replica) -> Event:
        time_s, kind, number, _ = super()._next_start(now, replica)
        generation = self._instance_of[replica].generation
        return time_s, kind, generation << 32 | number, (replica, generation)

    def _start_step(self, now: float, subject: Any) -> Event | None:
        replica, generation = subject
        instance = self._instance_of[replica]
        if instance.generation != generation or replica in instance.stepping:
            return None
        free_s = instance.step_end_s if replica.costs.is_lockstep else instance.free_s(replica)
        if free_s > now:
            return free_s, EventKind.STEP_START, generation << 32 | replica.number, subject
        if replica.costs.is_lockstep:
            self._start_together(now, instance)
            return None
        event = super()._start_step(now, replica)
        if event is None:
            self._stop_if_empty(now, replica)
            return None
        time_s, kind, number, step = event
        if kind is EventKind.STEP_START:  # some ended with a stride
            return event
        return time_s, kind, generation << 32 | number, (step, generation)

    def _end_step(self, now: float, subject: Any) -> Event | None:
        step, generation = subject
        replica = step[0]
        instance = self._instance_of[replica]
        if instance.generation != generation:
            return None
        instance.stepping.discard(replica)
        return super()._end_step(now, step)

    def _start_together(self, now: float, instance: Instance) -> None:
        """Begins a step of each of some engines that has requests; they end together."""
        steps = []
        for replica in instance.replicas:
            if replica.inbox:
                self._take_in(now, replica)
            replica.is_busy = replica.scheduler.has_unfinished
            if not replica.is_busy:
                continue
            batch = replica.loop.begin(now, replica.costs.costs)
            for sequence in batch.shed:
                self._note_end(now, replica, sequence)
            if batch.sequences or batch.shed:
                steps.append((replica, batch))
            else:
                self._none_computed(replica, batch, now)
        if steps:
            costs = instance.group.costs
            seconds = costs.joint_time([batch for _, batch in steps if batch.sequences])
            seconds = checked_seconds(costs, seconds)
            instance.step_end_s = now + seconds
            instance.busy_s += seconds
        for replica, batch in steps:
            instance.stepping.add(replica)
            number = instance.generation << 32 | replica.number
            step = (replica, batch, seconds), instance.generation
            heappush(self._events, (instance.step_end_s, EventKind.STEP_END, number, step))
        self._stop_if_empty(now, instance.replicas[0])

    def _duration_s(self, now: float, replica: Replica, batch: ScheduledBatch) -> float:
        instance = self._instance_of[replica]
        if not (instance.shares_devices and batch.sequences):
            return super()._duration_s(now, replica, batch)
        times = [checked_seconds(replica.costs, seconds) for seconds in replica.costs.stage_times(batch)]
        return instance.through_stages(now, replica, times) - now

    def _ended(self, now: float, replica: Replica, finished: list[Sequence]) -> Event | None:
        following = super()._ended(now, replica, finished)
        if following is None:
            self._stop_if_empty(now, replica)
        return following

    def _none_computed(self, replica: Replica, batch: ScheduledBatch, now: float) -> None:
        """All its blocks are kept for those whose KV is not taken in yet: it waits for that."""
        if not replica.num_kept:
            super()._none_computed(replica, batch, now)
        replica.loop.end(batch, [], now)
        replica.is_busy = False

    def _wake(self, now: float, replica: Replica) -> None:
        if not replica.is_busy:
            heappush(self._events, self._next_start(now, replica))

    # Requests on their way

    def _place(self, sent_s: float, sequence: Sequence, request: TraceRequest) -> Replica | None:
        journey = self._journeys[sequence] = Journey(sequence, request, sent_s)
        journey.at = super()._place(sent_s, sequence, request)
        if journey.at is None:
            self._held_back[sequence] = journey
        return journey.at

    def _deliver(self, now: float, journey: Journey, replica: Replica) -> None:
        """A request comes to a replica: its scheduler hears of it between two steps."""
        sequence = journey.sequence
        journey.at = replica
        replica.unfinished.add(sequence)
        replica.inbox.append((journey.sent_s, sequence, journey.request))
        if journey.gave_up:
            replica.inbox.append((now, sequence, None))
        self._wake(now, replica)

    def _send_on(self, now: float, journey: Journey) -> None:
        """Lets a request go on where a router says, or wait for somebody to be there."""
        is_computed = journey.keeper is not None
        replica = self._pools.choose(journey.sequence, journey.request, is_computed)
        journey.at = replica
        if replica is None:
            self._held_back[journey.sequence] = journey
        elif is_computed:
            self._send_kv(now, journey, replica)
        else:
            self._deliver(now, journey, replica)

    def hand_over(self, now: float, source: Replica, sequence: Sequence) -> None:
        """A prefill replica has given the first token: the request goes on elsewhere."""
        journey = self._journeys[sequence]
        journey.keeper, journey.source = source.loop.hand_over(sequence), source
        source.num_kept += 1
        source.unfinished.remove(sequence)
        self._send_on(now, journey)

    def _send_kv(self, now: float, journey: Journey, target: Replica) -> None:
        sequence, manager = journey.sequence, target.scheduler.block_manager
        assert journey.source is not None
        target.unfinished.add(sequence)
        journey.is_under_way = True
        journey.attempt += 1
        cached = len(manager.cached_prefix(sequence))
        there = max(cached, manager.window.num_behind(sequence.num_computed_tokens)) * manager.block_size
        num_tokens = max(0, sequence.num_computed_tokens - there)
        num_bytes = num_tokens * (target.group.block_token_bytes() or 0.0)
        arrival = self.links.send(now, journey.source, target, num_bytes)
        self._push(arrival, EventKind.KV_ARRIVAL, (journey, journey.attempt))

    def _kv_arrives(self, now: float, subject: tuple[Journey, int]) -> Event | None:
        journey, attempt = subject
        if journey.is_under_way and journey.attempt == attempt:
            journey.is_under_way = False
            assert journey.at is not None
            self._deliver(now, journey, journey.at)
        return None

    def release(self, now: float, sequence: Sequence) -> None:
        """A request has blocks where it was handed over to, or needs none: those that were kept are free."""
        journey = self._journeys[sequence]
        if journey.keeper is None or journey.source is None:
            return
        source = journey.source
        source.scheduler.block_manager.free(journey.keeper)
        self.metrics.note_blocks(source.number)
        self._forget_keeper(journey)
        if source.scheduler.has_unfinished:
            self._wake(now, source)
        else:
            self._stop_if_empty(now, source)

    def _forget_keeper(self, journey: Journey) -> None:
        if journey.source is not None:
            journey.source.num_kept -= 1
        journey.keeper = journey.source = None

    def _time_out(self, now: float, subject: tuple[Replica | None, Sequence]) -> Event | None:
        _, sequence = subject
        journey = self._journeys.get(sequence)
        if journey is None:
            return None
        if journey.at is None or journey.is_under_way:
            journey.gave_up = True
            return None
        journey.at.inbox.append((now, sequence, None))
        self._wake(now, journey.at)
        return None

    def _reject(
        self, now: float, replica: Replica, sequence: Sequence, request: TraceRequest, time_s: float
    ) -> None:
        if not sequence.was_admitted:
            super()._reject(now, replica, sequence, request, time_s)
            return
        # It was served elsewhere, and cannot go on here.
        self._cut_off(now, replica, sequence, FinishReason.SHED)

    def _cut_off(self, now: float, replica: Replica, sequence: Sequence, reason: FinishReason) -> None:
        """A request that was served before ends where it is, though its scheduler does not have it."""
        sequence.finish_reason = reason
        for listener in replica.loop.listeners:
            listener.ended(sequence)
        self._note_end(now, replica, sequence)

    def _note_end(self, now: float, replica: Replica, sequence: Sequence) -> None:
        self.release(now, sequence)
        del self._journeys[sequence]
        super()._note_end(now, replica, sequence)

    # Replicas that come and go

    def _expect_failure(self, now: float, instance: Instance) -> None:
        settings = self.fleet.random_failures
        if settings is None or (settings.groups and instance.group.name not in settings.groups):
            return
        clock = self._clock(instance)
        time_s = now + clock.expovariate(1 / settings.mtbf_s)
        down_s = clock.expovariate(1 / settings.mttr_s) if settings.mttr_s else 0.0
        self._push(time_s, EventKind.FAILURE, (instance, down_s, instance.generation))

    def _clock(self, instance: Instance) -> Random:
        key = instance.group.name, instance.place
        if key not in self._clocks:
            settings = self.fleet.random_failures
            assert settings is not None
            self._clocks[key] = Random(f"{settings.seed}/{instance.group.name}/{instance.place}")
        return self._clocks[key]

    def _fail(self, now: float, subject: tuple[Instance, float, int | None]) -> Event | None:
        instance, down_s, generation = subject
        is_old = generation is not None and generation != instance.generation
        if is_old or not instance.is_up or self._is_over():
            return None
        was_draining = instance.is_draining
        instance.fail(now)
        self._update_pools()
        self.losses["failures"] += 1
        self._check_progress()
        lost = [journey for replica in instance.replicas for journey in self._lose(now, replica)]
        if was_draining:
            instance.stop(now)
        else:
            back_s = now + down_s + instance.group.start_s
            self._down_s.append(back_s - now)
            self._push(back_s, EventKind.READY, (instance, instance.generation))
        for journey in lost:
            self._send_on(now, journey)
        return None

    def _check_progress(self) -> None:
        """Raises `ConfigError` where replicas fail so often that the replay would never end."""
        num_failures = self.losses["failures"]
        if num_failures - self._failures_before < _FRUITLESS * len(self.instances):
            return
        num_tokens = sum(len(sequence.token_ids) for sequence in self._journeys)
        progress = self._num_arrivals, self._num_ended, num_tokens
        if self._journeys and progress == self._progress:
            raise ConfigError(
                f"failures: found {num_failures - self._failures_before:,} in a row in which no request got "
                "a token, expected a longer time between failures, mtbf_s, or a migration_limit"
            )
        self._progress, self._failures_before = progress, num_failures

    def _lose(self, now: float, replica: Replica) -> Iterator[Journey]:
        """All that a replica had is gone; the requests that are to go on elsewhere, in their order."""
        gave_up = {sequence for _, sequence, request in replica.inbox if request is None}
        not_added = {sequence for _, sequence, request in replica.inbox if request is not None}
        there = sorted(replica.unfinished, key=lambda sequence: sequence.seq_id)
        not_added.update(sequence for sequence in there if self._journeys[sequence].is_under_way)
        num_computed = {sequence: sequence.num_computed_tokens for sequence in there}
        replica.unfinished.clear()
        replica.forget()
        replica.loop.lose(sequence for sequence in there if sequence not in not_added)
        self.metrics.note_blocks(replica.number)
        for journey in [one for one in self._journeys.values() if one.source is replica]:
            self._forget_keeper(journey)
            if journey.is_under_way or journey.at is None:  # its KV is nowhere else
                if journey.at is not None:
                    journey.at.unfinished.remove(journey.sequence)
                self._held_back.pop(journey.sequence, None)
                yield from self._begun_anew(now, replica, journey, journey.sequence.num_computed_tokens)
        for sequence in there:
            journey = self._journeys[sequence]
            journey.gave_up = journey.gave_up or sequence in gave_up
            if journey.keeper is None:
                yield from self._begun_anew(now, replica, journey, num_computed[sequence])
            else:  # its KV is sent once more, from where it is kept
                journey.is_under_way = False
                sequence.num_computed_tokens = journey.keeper.num_computed_tokens
                yield journey

    def _begun_anew(self, now: float, replica: Replica, journey: Journey, num_lost: int) -> Iterator[Journey]:
        """A request whose computed tokens are lost; those of its answer that its client has are not.

        Unless it fails, because it has begun anew too often. One that no engine had taken in has not.
        """
        sequence, limit = journey.sequence, self.fleet.migration_limit
        journey.is_under_way = False
        self.losses["lost_requests"] += 1
        journey.num_migrations += self.metrics.knows(sequence)
        if limit is not None and journey.num_migrations > limit:
            self.losses["failed_requests"] += 1
            replica.unfinished.add(sequence)
            self._cut_off(now, replica, sequence, FinishReason.ERROR)
            return
        self.losses["lost_tokens"] += num_lost
        sequence.restart(sequence.num_tokens)
        yield journey

    def _ready(self, now: float, subject: tuple[Instance, int]) -> Event | None:
        instance, generation = subject
        if instance.generation != generation:
            return None
        instance.ready(now)
        self._update_pools()
        self._expect_failure(now, instance)
        held_back, self._held_back = self._held_back, {}
        for journey in held_back.values():
            self._send_on(now, journey)
        return None

    def _scale(self, now: float, group: Group) -> Event | None:
        if self._is_over() or group.autoscale is None:
            return None
        scaler = self._scalers[group.name]
        paid = [one for one in self.instances if one.group is group and one.is_paid and not one.is_draining]
        up = [one for one in paid if one.is_up]
        wanted = scaler.wanted(now, up, len(self._held_back))
        if wanted > len(paid):
            for _ in range(wanted - len(paid)):
                self._start(now, group)
        elif scaler.most_wanted() < len(paid):
            idle_first = sorted(up, key=lambda one: (one.num_unfinished, -one.place))
            for instance in idle_first[: len(paid) - scaler.most_wanted()]:
                instance.is_draining = True
                self._update_pools()
                self._note_scaling(now, group)
                self._stop_if_empty(now, instance.replicas[0])
        self._push(now + group.autoscale.interval_s, EventKind.SCALING, group)
        return None

    def _start(self, now: float, group: Group) -> None:
        gone = (one for one in self.instances if one.group is group and not one.is_paid)
        instance = next(gone, None) or self._new_instance(group)
        instance.start(now)
        self._note_scaling(now, group)
        self._push(now + group.start_s, EventKind.READY, (instance, instance.generation))

    def _stop_if_empty(self, now: float, replica: Replica) -> None:
        instance = self._instance_of[replica]
        if instance.is_draining and instance.is_empty:
            instance.stop(now)
            for one in instance.replicas:
                one.is_busy = False
                one.loop.lose([])

    def _note_scaling(self, now: float, group: Group) -> None:
        count = sum(one.group is group and one.is_paid and not one.is_draining for one in self.instances)
        if len(self.scaling) < MAX_SCALING_EVENTS:
            self.scaling.append({"time_s": now, "group": group.name, "replicas": count})
