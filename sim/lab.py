"""The laboratory: policies of any kind replayed on traces beside what is built in, and confirmed for real.

A policy is confirmed on the real engine in two ways. Its decisions: a trace is served with a step log, and a
simulation whose steps take as long decides the same, step by step. And its bits: every token of every answer
and its log-probability are those that the same request gets alone.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagellm.engine.config import EngineConfig
from pagellm.engine.errors import ConfigError, PagellmError
from pagellm.engine.scheduling.policies import KINDS
from pagellm.engine.user_policy import user_module
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.report.schema import Report
from pagellm.sim.router import Router
from pagellm.sim.simulator import Simulator, foresee
from pagellm.sim.traces.prompt_tokens import PromptTokens
from pagellm.sim.traces.request import TraceRequest
from pagellm.sim.traces.trace import Trace

if TYPE_CHECKING:
    from pagellm.engine.llm_engine import LLMEngine

_LONGEST_PROMPT, _LONGEST_ANSWER = 48, 12  # tokens of a request that is served to confirm
_PIECE, _MOST_PIECES = 8, 6  # tokens of one piece of a prompt whose pieces the trace tells apart, and pieces
# What of a step is a measurement and no decision.
_MEASURED = ("transfer_s", "duration_s")


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


def replay(entry: Entry, trace: Trace, costs: CostModel, given: Mapping[str, Any], replicas: int) -> Report:
    """A trace under one policy; routers serve several replicas."""
    settings = {**given, **entry.settings}
    load: dict[str, Any] = {}
    if entry.setting == "router":
        load = {"replicas": replicas, "router": entry.value}
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
        outputs = []
        engine.restart_clock()
        for request in requests:
            params = replace(request.sampling_params(), logprobs=0)
            outputs.append(engine.add_request(request.id, self._prompt_tokens(request).tolist(), params))
        while engine.has_unfinished:
            engine.step()
        return [
            [(one.token_id, one.logprob) for one in output.outputs[0].logprobs or []] for output in outputs
        ]


def _steps(path: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in json.loads(line).items() if name not in _MEASURED}
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
