"""The laboratory: policies of any kind replayed on traces beside what is built in, and confirmed for real.

A policy is confirmed on the real engine in two ways. Its decisions: a trace is served with a step log, and a
simulation whose steps take as long decides the same, step by step. And its bits: every token of every answer
and its log-probability are those that the same request gets alone.

A router is confirmed on several real engines. Measured times would tell which of them is ahead, so they take
their steps in turns: a round is a second for each, and some requests come with it. The simulation of that has
steps of a second, and must send each request to the same engine, whose steps it must decide alike.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.engine.scheduling.batch import ScheduledBatch
from pagellm.engine.scheduling.policies import KINDS
from pagellm.engine.scheduling.sequence import Sequence
from pagellm.engine.user_policy import user_module
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.fleet.fleet import Group
from pagellm.sim.fleet.replica import Replica
from pagellm.sim.report.schema import Report
from pagellm.sim.router import CheckedRouter, Router
from pagellm.sim.simulator import Simulator, foresee
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.trace import Trace

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine
    from pagellm.engine.requests.outputs import RequestOutput

_LONGEST_PROMPT, _LONGEST_ANSWER = 48, 12  # tokens of a request that is served to confirm
_PIECE, _MOST_PIECES = 8, 6  # tokens of one piece of a prompt whose pieces the trace tells apart, and pieces
# What of a step is a measurement and no decision.
_MEASURED = ("transfer_s", "duration_s")
# And what is, too, where rounds take the place of time.
_TIMES = ("step", "start_s", "costs", "replica", "config")
_ENGINES, _A_ROUND = 2, 2  # engines that a router chooses between, and requests that come in a round


@dataclass(frozen=True)
class Entry:
    """A policy and the setting that it is for; the built-in ones have neither."""

    name: str
    setting: str | None = None
    value: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What an engine is given."""
        return {} if self.setting in (None, "router") else {str(self.setting): str(self.value)}


def entries(files: list[str]) -> Iterator[Entry]:
    """The policies that files define, in their order. Raises `ConfigError` for a file without one."""
    for file in files:
        try:
            module = user_module(file) if file.endswith(".py") else None
        except (Exception, SystemExit) as error:  # the user's file may raise anything
            raise ConfigError(f"{file}: cannot be loaded: {type(error).__name__}: {error}") from error
        if module is None:
            raise ConfigError(f"{file}: found no Python file, expected one that ends in .py")
        own = [one for one in vars(module).values() if isinstance(one, type)]
        found = [(one, _setting(one)) for one in own if one.__module__ == module.__name__]
        named = [(one, setting) for one, setting in found if setting is not None]
        if not named:
            raise ConfigError(f"{file}: found no policy, expected a class that is one")
        for one, setting in named:
            yield Entry(one.__name__, setting, f"{file}:{one.__name__}")


def _setting(cls: type) -> str | None:
    """The setting that a class is for; a scheduling policy says who makes way, too."""
    if issubclass(cls, Router):
        return "router"
    return next((setting for setting, kind in KINDS.items() if issubclass(cls, kind.base)), None)


def replay(
    entry: Entry,
    trace: Trace,
    costs: CostModel,
    given: Mapping[str, Any],
    replicas: int,
    accept_profile_error: bool = False,
) -> Report:
    """A trace under one policy; routers serve several replicas."""
    settings = {**given, **entry.settings}
    load: dict[str, Any] = {"accept_profile_error": accept_profile_error}
    if entry.setting == "router":
        load |= {"replicas": replicas, "router": entry.value}
    return Simulator(costs.settings(settings), costs, skip_bad=True, **load).replay(trace)


def small(trace: Trace, num_requests: int) -> list[TraceRequest]:
    """The first requests, cut so that a small model serves them, all at once, which makes a crowd.

    Of a prompt its first pieces stay and its last one, each of `_PIECE` tokens: so those that begin alike do
    so here, and those that are equal are.
    """
    made = []
    for number, request in enumerate(islice(trace, num_requests)):
        ids = request.hash_ids
        length = max(1, min(_LONGEST_PROMPT, request.prompt_len or _LONGEST_PROMPT))
        if ids is not None:
            ids = ids if len(ids) <= _MOST_PIECES else (*ids[: _MOST_PIECES - 1], ids[-1])
            length = min(length, _PIECE * len(ids))
        made.append(
            TraceRequest(
                arrival_time=0.0,
                prompt_len=length,
                output_len=min(_LONGEST_ANSWER, request.output_len),
                hash_ids=ids,
                hash_block_size=None if ids is None else _PIECE,
                priority=request.priority,
                tenant=request.tenant,
                deadline_s=request.deadline_s,
                id=f"{number}",
                index=number,
            )
        )
    return made


class Confirmation:
    """Serves requests on the real engine, alone and under policies, and holds both to each other.

    model: what is served. requests: come all at once; one at least. The settings of all policies leave few
    blocks, so that there is something to decide.
    """

    def __init__(self, model: str, requests: list[TraceRequest]) -> None:
        self._model = model
        self._requests = requests
        most = max(-(-((request.prompt_len or 1) + request.output_len) // 8) for request in requests)
        self._config = EngineConfig(
            block_size=8, num_blocks=2 * most, max_num_seqs=4, max_num_batched_tokens=64, max_preemptions=2
        )
        engine = self._engine(self._config)
        try:
            self._prompt_tokens = PromptTokens(engine.spec.vocab_size, engine.tokenizer)
            self._alone = [self._served(engine, [request])[0] for request in requests]
        finally:
            engine.close()

    def __call__(self, entry: Entry) -> tuple[int, int]:
        """How many steps and tokens were the same. Raises `PagellmError` for the first that was not."""
        if entry.setting == "router":
            return self._route(entry)
        with tempfile.TemporaryDirectory() as folder:
            real, simulated = Path(folder, "real.jsonl"), Path(folder, "simulated.jsonl")
            config = replace(self._config, **entry.settings, step_log=str(real))
            engine = self._engine(config)
            try:
                foresee([engine.scheduler], Trace.from_requests(self._requests), self._prompt_tokens)
                answers = self._served(engine, self._requests)
                complete = replace(engine.config, step_log=str(simulated))
            finally:
                engine.close()
            happened = _steps(real)
            came = [added["arrival_s"] for step in happened for added in step["added"]]
            trace = Trace.from_requests(
                replace(request, arrival_time=time)
                for request, time in zip(self._requests, came, strict=True)
            )
            Simulator(complete, CostModel.load(real), prompt_tokens=self._prompt_tokens).replay(trace)
            self._compare(entry, happened, _steps(simulated), answers)
        return len(happened), sum(len(answer) for answer in answers)

    def _route(self, entry: Entry) -> tuple[int, int]:
        """The same of several engines and the router between them."""
        requests = [replace(one, arrival_time=float(i // _A_ROUND)) for i, one in enumerate(self._requests)]
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder, f"{number}.jsonl") for number in range(_ENGINES)]
            simulated, results = Path(folder, "simulated.jsonl"), Path(folder, "results.jsonl")
            # What is measured would say how one makes way.
            config = replace(self._config, preemption="recompute")
            engines = [self._engine(replace(config, step_log=str(log))) for log in logs]
            try:
                chosen, answers = self._serve_in_rounds(entry, engines, requests)
                complete = replace(engines[0].config, step_log=str(simulated))
            finally:
                for engine in engines:
                    engine.close()
            Simulator(
                complete,
                _Rounds(),
                prompt_tokens=self._prompt_tokens,
                replicas=_ENGINES,
                router=str(entry.value),
                results=results,
            ).replay(Trace.from_requests(requests))
            sent = {one["id"]: one["replica"] for one in map(json.loads, results.read_text().splitlines())}
            for request, number in zip(requests, chosen, strict=True):
                place = sent[request.id]
                if place != number:
                    raise PagellmError(
                        f"{entry.name}: request {request.id} went to engine {number}, simulated {place}"
                    )
            decided = _steps(simulated)
            for number, log in enumerate(logs):
                happened = _without_times(_steps(log))
                of_engine = _without_times([step for step in decided if step["replica"] == number])
                self._compare(entry, happened, of_engine, answers)
        return len(decided), sum(len(answer) for answer in answers)

    def _serve_in_rounds(
        self, entry: Entry, engines: list["LLMEngine"], requests: list[TraceRequest]
    ) -> tuple[list[int], list[list[Any]]]:
        """The engine that each request was sent to, and the answers."""
        router, group = CheckedRouter(str(entry.value)), Group(costs=_Rounds(), config=engines[0].config)
        replicas = [Replica(number, group) for number in range(len(engines))]
        for replica, engine in zip(replicas, engines, strict=True):
            replica.scheduler, replica.loop = engine.scheduler, engine.loop
        router.show(replicas)
        chosen: list[int] = []
        outputs: dict[str, RequestOutput] = {}
        under_way: dict[str, tuple[Replica, Sequence]] = {}
        for now in count():
            came: list[list[TraceRequest]] = [[] for _ in engines]
            for request in [one for one in requests if one.arrival_time == now]:
                sequence = Sequence(len(chosen), self._prompt_tokens(request), request.sampling_params())
                chosen.append(router.choose(sequence))
                came[chosen[-1]].append(request)
                replicas[chosen[-1]].unfinished.add(sequence)
                under_way[request.id] = replicas[chosen[-1]], sequence
            for engine, new in zip(engines, came, strict=True):
                for request in new:
                    outputs[request.id] = self._add(engine, request)
                for output in engine.step():
                    if output.finished:
                        replica, sequence = under_way.pop(output.request_id)
                        replica.unfinished.remove(sequence)
            if len(chosen) == len(requests) and not under_way:
                break
        return chosen, [_answer(outputs[request.id]) for request in requests]

    def _compare(
        self,
        entry: Entry,
        happened: list[dict[str, Any]],
        decided: list[dict[str, Any]],
        answers: list[list[Any]],
    ) -> None:
        for number, (step, other) in enumerate(zip(happened, decided, strict=False)):
            differing = [name for name in step if step[name] != other.get(name) and name != "config"]
            if differing:
                raise PagellmError(
                    f"{entry.name}: step {number}: {differing[0]} differs from the simulation's"
                )
        if len(happened) != len(decided):
            raise PagellmError(f"{entry.name}: {len(happened)} steps, simulated {len(decided)}")
        for request, answer, alone in zip(self._requests, answers, self._alone, strict=True):
            if answer and answer != alone:  # one that was shed has none
                raise PagellmError(f"{entry.name}: request {request.id}: its bits differ from those alone")

    def _engine(self, config: EngineConfig) -> "LLMEngine":
        from pagellm.engine.llm_engine import LLMEngine

        return LLMEngine(self._model, config)

    def _served(self, engine: "LLMEngine", requests: list[TraceRequest]) -> list[list[Any]]:
        """The tokens of each answer with their log-probabilities."""
        engine.restart_clock()
        outputs = [self._add(engine, request) for request in requests]
        while engine.has_unfinished:
            engine.step()
        return list(map(_answer, outputs))

    def _add(self, engine: "LLMEngine", request: TraceRequest) -> "RequestOutput":
        params = replace(request.sampling_params(), logprobs=0)
        return engine.add_request(request.id, self._prompt_tokens(request).tolist(), params)


class _Rounds(CostModel):
    """Every step is a round."""

    name = "a second a step"

    def step_time(self, batch: ScheduledBatch) -> float:
        return 1.0


def _answer(output: "RequestOutput") -> list[Any]:
    """Its tokens with their log-probabilities."""
    return [(one.token_id, one.logprob) for one in output.outputs[0].logprobs or []]


def _without_times(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one engine's scheduler decided, its sequences numbered as they came to it."""
    numbers: dict[int, int] = {}
    told = []
    for step in steps:
        for added in step["added"]:
            numbers[added["sequence"]] = len(numbers)
        kept = {name: value for name, value in step.items() if name not in _TIMES}
        for name in ("scheduled", "admitted", "tables", "finished", "ended"):
            kept[name] = [[numbers[one], *rest] for one, *rest in step[name]]
        kept["forked"] = [[numbers[child], numbers[parent]] for child, parent in step["forked"]]
        kept["added"] = [
            {**one, "sequence": numbers[one["sequence"]], "arrival_s": 0} for one in step["added"]
        ]
        kept["preempted"] = [
            [numbers[one["sequence"]], one["by"], numbers[one["needed_by"]], one["num_computed_tokens"]]
            for one in step["preempted"]
        ]
        told.append(kept)
    return told


def _steps(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in json.loads(line).items() if name not in _MEASURED}
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
