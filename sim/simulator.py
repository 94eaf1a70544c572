"""The simulator: replays a trace against the scheduler and the block manager that the engine runs.

A discrete-event loop. Events are ordered by time, then kind, then number, so that a replay is repeated
exactly. A replica stands for an engine: it takes in what came for it between two steps, schedules, and has
the step's tokens after as long as the cost model says. Nothing here knows weights or a clock.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import KW_ONLY, dataclass, field
from enum import IntEnum
from functools import cached_property
from heapq import heapify, heappop, heappush, heappushpop
from itertools import accumulate, islice
from os import PathLike
from typing import Any

from pagellm.engine.checks import SMALLEST, integer, number
from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PagellmError, RequestError, TraceError
from pagellm.engine.requests.outputs import FinishReason
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.step_log import StepLogFile, StepRecord, StepRecorder
from pagellm.sim.costs.cost_model import CostConstant, CostModel
from pagellm.sim.fleet.account import Use, account
from pagellm.sim.fleet.fleet import Fleet, Group
from pagellm.sim.fleet.pools import Pools
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.report.metrics import MetricsCollector
from pagellm.sim.report.perfetto import PerfettoTrace
from pagellm.sim.report.schema import FleetData, Report
from pagellm.sim.router import load_router
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.request import MAX_LEN, TraceRequest
from pagellm.sim.traces.sessions import Sessions
from pagellm.sim.traces.trace import SKIP_BAD, Trace


class EventKind(IntEnum):
    """What happens, in the order in which it does where times are equal."""

    STEP_END = 0
    STRIDE_END = 1
    TIMEOUT = 2
    FAILURE = 3
    READY = 4
    KV_ARRIVAL = 5
    ARRIVAL = 6
    SCALING = 7
    STEP_START = 8
    STRIDE_STEP_START = 9


# Sampling parameters that are kept to be used again.
_MAX_PARAMS = 2**16

_THEN = "the replay ends here"  # after a policy has failed

# Time, kind, a number that is unique among events of the kind, and what it is about.
Event = tuple[float, EventKind, int, Any]
# What happens then; it may return an event that follows.
Handler = Callable[[float, Any], Event | None]


def foresee(
    schedulers: list[Scheduler], trace: Trace, prompt_tokens: PromptTokens, moves: bool = False
) -> None:
    """Tells a policy that needs it which prompts are to come, in the trace's order.

    moves: as `Fleet.moves`. Raises `ConfigError` where the prompts are not known: which of several engines
    gets a request depends on the run, and so does what is computed anew after a failure, and a turn that goes
    on with an answer.
    """
    if not any(scheduler.policies.needs_future for scheduler in schedulers):
        return
    why = ""
    if len(schedulers) > 1:
        why = f"{len(schedulers)} replicas"
    elif moves:
        why = "replicas that fail, or come and go"
    elif trace.has_sessions():
        why = "a trace whose turns wait for answers"
    if why:
        raise ConfigError(
            f"eviction: found a policy that needs to know the requests to come with {why}, expected one "
            "engine and prompts that are known"
        )
    requests = enumerate(trace)
    schedulers[0].foresee(Sequence(i, prompt_tokens(one), one.sampling_params()) for i, one in requests)


@dataclass(frozen=True)
class Simulator:
    """Replays traces with some settings and step times.

    config: as the engine's. Where it leaves num_blocks and max_model_len open, they are what the cost model
    knows of the machine and the model, as with an engine. Its step_log gets the records of the engine's step
    log; num_threads and quantization only say what a profile must be of.
    prompt_tokens: what prompts are made of, with a tokenizer for a trace of texts.

    rate_factor: lets requests arrive so many times as often. clients: leaves the arrival times aside; so many
    clients ask at once, and each again, with the trace's next request, when its request has ended; with its
    next conversation, when all of one has.
    replicas, router: how many engines serve, and who gets a request: round_robin, least_loaded, prefix_aware
    or a Router of your own as module:Class or path/file.py:Class. fleet: replicas that differ, in the place
    of so many with `config` and `cost_model`; see `of_fleet`. price_per_h: of a device, in any unit.
    timeout_s: when a client gives up; its engine hears of that between two steps, and a request that the step
    before ended has ended.

    skip_bad: count requests that can never be computed as rejected, instead of ending with an error.
    slo: the most seconds that a good request takes: ttft_s, tpot_s, e2e_s, queue_s. results: a file that gets
    a line of JSON for each request. perfetto: a file that gets the run as a trace for ui.perfetto.dev.
    accept_profile_error: use a profile whose own error is above `MAX_PROFILE_ERROR`, too. progress: called
    with the number of requests that have ended and the simulated time, whenever one has.

    Raises `ConfigError`.
    """

    config: EngineConfig
    cost_model: CostModel
    _: KW_ONLY
    prompt_tokens: PromptTokens = field(default_factory=lambda: PromptTokens(MAX_LEN))
    rate_factor: float = 1.0
    clients: int | None = None
    replicas: int = 1
    router: str = "round_robin"
    fleet: Fleet | None = None
    price_per_h: float | None = None
    timeout_s: float | None = None
    skip_bad: bool = False
    slo: Mapping[str, float] | None = None
    results: str | PathLike[str] | None = None
    perfetto: str | PathLike[str] | None = None
    accept_profile_error: bool = False
    progress: Callable[[int, float], None] | None = None

    def __post_init__(self) -> None:
        for name in ("clients", "replicas"):
            count = getattr(self, name)
            if count is not None:
                object.__setattr__(self, name, integer(name, count, 1, error=ConfigError))
        for name in ("rate_factor", "timeout_s"):
            value = getattr(self, name)
            if value is not None:
                number(name, value, SMALLEST, error=ConfigError, expected="a number above 0")
        load_router(self.router)
        if self.fleet is not None and (self.replicas != 1 or self.price_per_h is not None):
            name = "replicas" if self.replicas != 1 else "price_per_h"
            raise ConfigError(f"{name}: found {getattr(self, name)} with a fleet, whose groups say that")
        object.__setattr__(self, "config", self._fleet.groups[0].config)
        for costs in self._fleet.cost_models:
            costs.check_error(self.accept_profile_error)

    @classmethod
    def of_fleet(cls, fleet: Fleet, **options: Any) -> "Simulator":
        """What replays with a fleet; the first group's settings name the step log. options: as above."""
        first = fleet.groups[0]
        return cls(first.config, first.costs, fleet=fleet, **options)

    def _new_replay(self, trace: Trace) -> "Replay":
        if not self._fleet.moves:
            return Replay(self, trace)
        from pagellm.sim.fleet.moving import MovingReplay

        return MovingReplay(self, trace)

    @cached_property
    def _fleet(self) -> Fleet:
        """The fleet that was given, or one of replicas that are alike."""
        if self.fleet is not None:
            return self.fleet
        alike = Group(
            costs=self.cost_model, config=self.config, count=self.replicas, price_per_h=self.price_per_h
        )
        return Fleet((alike,))

    def replay(self, trace: Trace) -> Report:
        """Simulates a whole trace.

        Output tokens are no tokens of any prompt. So equal prompts have equal answers, as with greedy
        decoding. A request of a session is sent when what it waits for has ended (see `TraceRequest`), and
        the answers that its prompt goes on with are those of the replay; after one that was not served it is
        as the trace has it. An answer that max_model_len or the KV cache cannot hold is cut, as the
        engine cuts it.

        Raises `TraceError` for a request that can never be computed, `PolicyError` for a policy that fails.
        """
        begin = time.perf_counter()
        fleet = self._fleet
        fleet.begin()
        replay = self._new_replay(trace)
        with closing(replay):
            replay.run()
        return replay.metrics.report(
            trace,
            kind="simulated",
            model=" and ".join(dict.fromkeys(costs.name for costs in fleet.cost_models)),
            extrapolated=sum(costs.extrapolated for costs in fleet.cost_models),
            profile_error=next((costs.error for costs in fleet.cost_models if costs.error), None),
            fit=next((costs.fit for costs in fleet.cost_models if costs.fit), None),
            constants=_constants(fleet),
            config=self.config,
            load={
                "mode": "open" if self.clients is None else "closed",
                "rate_factor": self.rate_factor,
                "clients": self.clients,
                "replicas": fleet.num_replicas,
                "router": self.router if fleet.max_engines > 1 else None,
                "timeout_s": self.timeout_s,
            },
            fleet=replay.account(),
            wall_s=time.perf_counter() - begin,
        )


class Replay:
    """One replay of one trace: the events to come, and what they do. Its replicas stay as they are."""

    def __init__(self, simulator: Simulator, trace: Trace) -> None:
        self.fleet = fleet = simulator._fleet
        config = fleet.groups[0].complete
        self._simulator = simulator
        self._frontend_s = fleet.groups[0].costs.frontend_s
        self._trace = trace
        scaled = trace if simulator.rate_factor == 1 else trace.scaled(simulator.rate_factor)
        self._sessions = Sessions(scaled, keeps_times=simulator.clients is None)
        self._has_sessions = bool(self._sessions)
        self._requests = self._sessions.openers()
        self._requests_of: dict[Sequence, TraceRequest] = {}  # where there are sessions
        self.replicas: list[Replica] = []
        self._pools = Pools(fleet, simulator.router)
        sizes = {group.costs.block_bytes(group.config.block_size) for group in fleet.groups}
        self.metrics = MetricsCollector(
            [],
            simulator.slo,
            simulator.results,
            sizes.pop() if len(sizes) == 1 else None,
            fleet.max_engines > 1,
        )
        self._step_log = None if config.step_log is None else StepLogFile(config.step_log, is_live=False)
        self._perfetto = None if simulator.perfetto is None else PerfettoTrace(simulator.perfetto)
        self._output_tokens = (simulator.prompt_tokens.vocab_size,)  # of a sequence in a step
        self._params: dict[tuple[Any, ...], SamplingParams] = {}
        self._events: list[Event] = []
        self._num_arrivals = self._num_sequences = self._num_ended = 0
        self._make_replicas()
        # Whether its one engine's requests and steps are all that happens.
        self._is_alone = fleet.max_engines == 1 and not fleet.moves
        foresee([one.scheduler for one in self.replicas], trace, simulator.prompt_tokens, fleet.moves)

    def _make_replicas(self) -> None:
        for group in self.fleet.groups:
            for _ in range(group.count):
                self._new_replica(group)
        self._pools.update(self.replicas)

    def _new_replica(self, group: Group) -> Replica:
        """One more replica, and all that listen to it."""
        replica = Replica(len(self.replicas), group)
        self.replicas.append(replica)
        kind = group.name if len(self.fleet.groups) > 1 else None
        replica.loop.listen(self.metrics.add(replica.scheduler, kind))
        if self._step_log is not None:
            number = replica.number if self.fleet.max_engines > 1 else None
            replica.loop.listen(StepRecorder(replica.scheduler, self._record, group.complete, number))
        if self._perfetto is not None:
            replica.loop.listen(self._perfetto.listener(replica.scheduler, replica.number))
        return replica

    def account(self) -> FleetData:
        """What the fleet took, when the replay is over."""
        whole = [(-math.inf, math.inf)]
        uses = [Use(one.group, whole, self.metrics.busy_s(one.number)) for one in self.replicas]
        return account(self.fleet, uses, self.metrics)

    def _handlers(self) -> dict[EventKind, Handler]:
        """What happens at each kind of event."""
        return {
            EventKind.STEP_END: self._end_step,
            EventKind.STRIDE_END: self._end_stride,
            EventKind.TIMEOUT: self._time_out,
            EventKind.ARRIVAL: self._arrive,
            EventKind.STEP_START: self._start_step,
            EventKind.STRIDE_STEP_START: self._start_last_step,
        }

    def run(self) -> None:
        """Lets everything happen, in order."""
        events = self._events
        events += self._first_arrivals()
        heapify(events)
        found = self._handlers()
        handlers: list[Handler] = [found.get(kind, self._end_step) for kind in EventKind]  # by kind
        following: Event | None = None
        while events or following:
            now, kind, _, subject = heappop(events) if following is None else heappushpop(events, following)
            following = handlers[kind](now, subject)

    def close(self) -> None:
        """Closes the files that were written."""
        with ExitStack() as stack:
            stack.callback(self.metrics.close)
            stack.callback(self._close_step_log)
            if self._perfetto is not None:
                stack.callback(self._perfetto.close)

    def _close_step_log(self) -> None:
        if self._step_log is not None:
            try:
                self._step_log.close()
            except OSError as error:
                raise self._unwritable_step_log(error) from error

    def _unwritable_step_log(self, error: OSError) -> ConfigError:
        path = self._simulator.config.step_log
        return ConfigError(f"step_log: {path}: {error.strerror}, expected a file to write to")

    def _record(self, record: StepRecord) -> None:
        assert self._step_log is not None
        try:
            self._step_log.write(record)
        except OSError as error:
            raise self._unwritable_step_log(error) from error

    def _first_arrivals(self) -> Iterator[Event]:
        clients = self._simulator.clients
        if clients is None:
            for request in islice(self._requests, 1):
                yield self._arrival(request.arrival_time, request)
        else:
            for request in islice(self._requests, clients):
                yield self._arrival(0.0, request)

    def _arrival(self, now: float, request: TraceRequest) -> Event:
        """A client sends a request; the front end has it for a while."""
        self._num_arrivals += 1
        reached_s = now + self._frontend_s
        # Of those that arrive together the first in the trace is first.
        number = request.index << 32 | self._num_arrivals
        return (reached_s, EventKind.ARRIVAL, number, (now, request))

    def _arrive(self, now: float, subject: tuple[float, TraceRequest]) -> Event | None:
        """A request reaches the replica that the router chooses; it counts as arrived since it was sent."""
        sent_s, request = subject
        sequence = self._new_sequence(request)
        if self._has_sessions:
            self._requests_of[sequence] = request
        replica = self._place(sent_s, sequence, request)
        if replica is not None:
            replica.inbox.append((sent_s, sequence, request))
            replica.unfinished.add(sequence)
        if self._simulator.timeout_s is not None:
            timeout = max(now, sent_s + self._simulator.timeout_s)
            heappush(self._events, (timeout, EventKind.TIMEOUT, sequence.seq_id, (replica, sequence)))
        if self._simulator.clients is None and not (self._has_sessions and self._sessions.waits(request)):
            upcoming = next(self._requests, None)
            if upcoming is not None:
                heappush(self._events, self._arrival(upcoming.arrival_time, upcoming))
        return None if replica is None or replica.is_busy else self._next_start(now, replica)

    def _place(self, sent_s: float, sequence: Sequence, request: TraceRequest) -> Replica | None:
        """Who gets a request that has come; None where nobody is there."""
        try:
            return self._pools.choose(sequence, request)
        except TraceError as error:
            raise self._error(request, error) from None

    def _new_sequence(self, request: TraceRequest) -> Sequence:
        try:
            prompt = self._sessions.prompt(request, self._simulator.prompt_tokens)
        except TraceError as error:
            raise self._error(request, error) from None
        key = (request.output_len, request.priority, request.tenant, request.deadline_s)
        params = self._params.get(key)
        if params is None:
            if len(self._params) >= _MAX_PARAMS:
                self._params.clear()
            params = self._params[key] = request.sampling_params()
        sequence = Sequence(self._num_sequences, prompt, params, request_id=request.id)
        self._num_sequences += 1
        return sequence

    def _time_out(self, now: float, subject: tuple[Replica, Sequence]) -> Event | None:
        """A client gives up. Where a step is under way, its replica hears of it after that."""
        replica, sequence = subject
        if sequence in replica.unfinished:
            replica.inbox.append((now, sequence, None))
        return None

    def _next_start(self, now: float, replica: Replica) -> Event:
        replica.is_busy = True
        start = replica.costs.next_start(now)
        return (start, EventKind.STEP_START, replica.number, replica)

    def _start_step(self, now: float, replica: Replica) -> Event | None:
        """The replica takes in what came for it, and schedules; what decides nothing it takes in strides."""
        if replica.inbox:
            self._take_in(now, replica)
        scheduler = replica.scheduler
        if not scheduler.has_unfinished:
            replica.is_busy = False
            return None
        while True:
            batch = replica.loop.begin(now, replica.costs.costs)
            for sequence in batch.shed:
                self._note_end(now, replica, sequence)
            if not batch.sequences and not batch.shed:
                self._none_computed(replica, batch, now)
                return None
            duration_s = self._duration_s(now, replica, batch)
            next_s = self._events[0][0] if self._events else math.inf
            times, durations_s, goes_on = self._next_steps(now, replica, batch, duration_s, next_s)
            if len(durations_s) < 2:
                break
            if goes_on:
                last_s = durations_s.pop()
                del times[-1]
            token_id = self._output_tokens[0]
            stride, following = replica.loop.advance(batch, token_id, times, durations_s, goes_on)
            last_start_s, now = stride.times[-2:]
            if now >= next_s:
                end = (now, EventKind.STRIDE_END, replica.number, (replica, stride.finished))
                if last_start_s < next_s:
                    return end
                return (last_start_s, EventKind.STRIDE_STEP_START, replica.number, (replica, end))
            if stride.finished:
                return self._ended(now, replica, stride.finished)
            replica.scheduler.policies.raise_error(_THEN)
            if following is not None:
                batch, duration_s = following, last_s
                break
        return (now + duration_s, EventKind.STEP_END, replica.number, (replica, batch, duration_s))

    def _duration_s(self, now: float, replica: Replica, batch: ScheduledBatch) -> float:
        """Seconds of a step that begins now."""
        costs = replica.costs
        seconds = costs.step_time(batch) if batch.sequences else costs.empty_step_time()
        return checked_seconds(costs, seconds)

    def _next_steps(
        self, now: float, replica: Replica, batch: ScheduledBatch, duration_s: float, next_s: float
    ) -> tuple[list[float], list[float], bool]:
        """The step that has begun and those behind it that are like it, up to one in which something happens.

        next_s: when that is. What comes in a step is for the next one, and if the scheduler is a step ahead,
        for the one behind that; so where nobody else looks at the engine meanwhile, as a router does, these
        are steps like the others. Returns when they begin, how long they take, and whether the engine goes
        on behind all but the last, of which it is not sure then that it is like the others.
        """
        is_ahead = self._is_alone and replica.costs.schedules_ahead
        # What a scheduler that is a step ahead has not taken in is for the next step.
        if replica.inbox or not (is_ahead or now + duration_s < next_s):
            return [], [], True
        most = replica.loop.most_alike(batch)
        if most < 2:
            return [], [], True
        durations_s = replica.costs.stride_times(batch, duration_s, most + 1, next_s - now)
        times = list(accumulate(durations_s, initial=now))
        num_steps = bisect_left(times, next_s)
        goes_on = not self._is_alone or num_steps > most
        if not goes_on:
            num_steps = min(num_steps + is_ahead, most)
        del times[num_steps + 1 :], durations_s[num_steps:]
        return times, durations_s, goes_on

    def _start_last_step(self, now: float, subject: tuple[Replica, Event]) -> Event:
        """The last step of a stride begins, behind one in which something came."""
        replica, end = subject
        replica.note_seen()
        return end

    def _take_in(self, now: float, replica: Replica) -> None:
        for time_s, sequence, request in replica.take_in():
            if request is None:
                if sequence in replica.unfinished:
                    replica.loop.abort(sequence)
                    self._note_end(now, replica, sequence)
                continue
            if request.class_ is not None:
                self.metrics.note_class(sequence, request.class_)
            try:
                replica.loop.add(sequence, time_s)
            except RequestError as error:
                if not self._simulator.skip_bad:
                    raise self._error(request, f"{error}; {SKIP_BAD}") from None
                self._reject(now, replica, sequence, request, time_s)
        if replica.inbox and not replica.scheduler.has_unfinished:  # all that went on has given up
            self._take_in(now, replica)

    def _reject(
        self, now: float, replica: Replica, sequence: Sequence, request: TraceRequest, time_s: float
    ) -> None:
        """A request can never be computed."""
        self.metrics.rejected(request.id, time_s, tenant=request.tenant, class_=request.class_)
        self._note_end(now, replica, sequence)

    def _none_computed(self, replica: Replica, batch: ScheduledBatch, now: float) -> None:
        """A scheduler that has requests computes none, and sheds none."""
        num_waiting = replica.scheduler.stats.num_waiting
        raise PagellmError(f"the scheduler has {num_waiting} requests and computes none")

    def _end_step(self, now: float, step: tuple[Replica, ScheduledBatch, float]) -> Event | None:
        """The replica has its step's tokens; what came meanwhile is for the next one."""
        replica, batch, duration_s = step
        token_ids = [self._output_tokens] * batch.num_sampled
        return self._ended(now, replica, replica.loop.end(batch, token_ids, now, duration_s=duration_s))

    def _end_stride(self, now: float, stride: tuple[Replica, list[Sequence]]) -> Event | None:
        """A stride in which something came is over; its sequences have their tokens, and some have ended."""
        replica, finished = stride
        return self._ended(now, replica, finished)

    def _ended(self, now: float, replica: Replica, finished: list[Sequence]) -> Event | None:
        """A replica's step is over, and some of its sequences with it."""
        replica.scheduler.policies.raise_error(_THEN)
        for sequence in finished:
            self._note_end(now, replica, sequence)
        replica.is_busy = bool(replica.inbox) or replica.scheduler.has_unfinished
        return self._next_start(now, replica) if replica.is_busy else None

    def _note_end(self, now: float, replica: Replica, sequence: Sequence) -> None:
        """A request has ended, one way or another; a client has its turn again."""
        replica.unfinished.remove(sequence)
        self._num_ended += 1
        if self._simulator.progress is not None:
            self._simulator.progress(self._num_ended, now)
        if self._has_sessions:
            self._go_on(now, sequence)
        elif self._simulator.clients is not None:
            self._ask_next(now)

    def _go_on(self, now: float, sequence: Sequence) -> None:
        """Whoever waited for an answer asks again."""
        ended = self._requests_of.pop(sequence)
        is_answered = sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        for sent_s, request in self._sessions.ended(ended, sequence.token_ids, now, is_answered):
            heappush(self._events, self._arrival(sent_s, request))
        if self._simulator.clients is not None and self._sessions.is_over(ended):
            self._ask_next(now)

    def _ask_next(self, now: float) -> None:
        """A client has its turn again."""
        request = next(self._requests, None)
        if request is not None:
            heappush(self._events, self._arrival(now, request))

    def _error(self, request: TraceRequest, error: object) -> TraceError:
        return TraceError(f"{self._trace.name}: request {request.id!r}: {error}")


def checked_seconds(costs: CostModel, seconds: float) -> float:
    """What a step takes, as step times have it. Raises `ConfigError`."""
    if not seconds >= 0:
        raise ConfigError(f"cost_model: {costs.name}: found {seconds} seconds for a step, expected 0 or more")
    return seconds


def _constants(fleet: Fleet) -> list[CostConstant]:
    """The constants of the first group's step times, and of the other groups those that differ."""
    first, *others = fleet.groups
    table = first.costs.constants_table()
    known = {one["name"]: one["value"] for one in table}
    for group in others:
        for one in group.costs.constants_table():
            if known.get(one["name"]) != one["value"]:
                table.append(one | {"name": f"{group.name}: {one['name']}"})
    return table
