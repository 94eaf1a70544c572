"""An exception while one request is dealt with ends that request alone; the engine goes on.

Failures are put into every place where a request's own data is touched. Those that were there before it, and
those that come after, get what they get alone.
"""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pagellm.engine import (
    LLM,
    BeamSearchParams,
    EngineError,
    FinishReason,
    PagellmError,
    RequestError,
    RequestOutput,
    SamplingParams,
    completion,
)
from pagellm.engine.completion import Completion, Request
from pagellm.engine.execution import model_runner
from pagellm.engine.intake import Intake
from pagellm.engine.requests.sampling_params import LogitBias
from pagellm.engine.scheduling.block_manager import BlockManager
from pagellm.engine.scheduling.scheduler import Scheduler
from pagellm.engine.scheduling.sequence import Sequence
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
SALT = "the one that fails"
GOOD = SamplingParams(temperature=0.8, seed=3, max_tokens=9, ignore_eos=True, logprobs=1)
BAD = SamplingParams(
    temperature=0.8,
    seed=4,
    n=2,
    max_tokens=9,
    ignore_eos=True,
    logprobs=1,
    prompt_logprobs=1,
    logit_bias={5: 7.5},
    presence_penalty=0.5,
    stop=["never said"],
    cache_salt=SALT,
)
PROMPT = list(range(20, 31))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(TINY, num_blocks=40, block_size=4, show_progress=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[RequestOutput]:
    return [llm.generate(prompt, GOOD)[0] for prompt in ("ab", PROMPT)]


def is_bad(sequence: Sequence) -> bool:
    return sequence.sampling_params.cache_salt == SALT


class Failing:
    """Puts a failure in the place of what is done for the bad request, from its call number `after` on."""

    def __init__(self, owner: Any, name: str, is_its: Callable[..., bool], after: int = 0) -> None:
        self.owner, self.name, self.is_its, self.after = owner, name, is_its, after
        self.num_calls = 0

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = self.owner.__dict__[self.name]
        original = whole.fget if isinstance(whole, property) else whole

        def failing(*arguments: Any, **named: Any) -> Any:
            if self.is_its(*arguments):
                self.num_calls += 1
                if self.num_calls > self.after:
                    raise RuntimeError("its own data")
            return original(*arguments, **named)

        monkeypatch.setattr(
            self.owner, self.name, property(failing) if isinstance(whole, property) else failing
        )


def first_is_bad(sequence: Sequence, *_: object) -> bool:
    return is_bad(sequence)


def second_is_bad(_: object, sequence: Sequence, *__: object) -> bool:
    return is_bad(sequence)


PLACES = {
    "looking a prompt up in the cache": lambda: Failing(BlockManager, "cached_prefix", second_is_bad),
    "hashing": lambda: Failing(BlockManager, "_block_hash", second_is_bad, 1),
    "admission": lambda: Failing(Scheduler, "_give_blocks", second_is_bad),
    "entering its blocks into the cache": lambda: Failing(BlockManager, "register", second_is_bad),
    "whether it has ended": lambda: Failing(Scheduler, "_finish_if_ended", second_is_bad),
    "penalties": lambda: Failing(SamplingParams, "has_penalties", lambda p: p.cache_salt == SALT),
    "penalties of a later token": lambda: Failing(
        SamplingParams, "has_penalties", lambda p: p.cache_salt == SALT, 7
    ),
    "logit bias": lambda: Failing(SamplingParams, "bias", lambda p: p.cache_salt == SALT, 1),
    "laying its bias out": lambda: Failing(
        LogitBias, "__len__", lambda bias: 7.5 in bias._bias_of.values(), 1
    ),
    "the number of log-probabilities": lambda: Failing(
        model_runner, "_num_logprobs", lambda sequence, *_: is_bad(sequence)
    ),
    "its log-probabilities": lambda: Failing(
        model_runner, "_logprob", lambda row, *_: is_bad(row.sequence), 12
    ),
    "those of its prompt": lambda: Failing(
        Request, "collect_prompt", lambda request, *_: is_bad(request.completions[0].sequence)
    ),
    "its text": lambda: Failing(Completion, "_add_text", lambda own, *_: is_bad(own.sequence)),
    "the text of a later token": lambda: Failing(
        Completion, "_add_text", lambda own, *_: is_bad(own.sequence), 6
    ),
    "its output": lambda: Failing(Completion, "append", lambda own, *_: is_bad(own.sequence), 3),
    "stop strings": lambda: Failing(
        completion.StopChecker, "append", lambda own, *_: own._automaton is not None, 2
    ),
    "the text so far": lambda: Failing(
        completion.StopChecker, "safe_text", lambda own: own._automaton is not None, 2
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("heals", [False, True], ids=["always", "once"])
def test_a_failure_ends_its_own_request_alone(
    llm: LLM, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, place: str, heals: bool
) -> None:
    failing = PLACES[place]()
    if heals:
        its, calls = failing.is_its, iter(range(10**9))
        failing.is_its = lambda *arguments: its(*arguments) and next(calls) <= failing.after
    llm.engine.reset_prefix_cache()
    failing.put(monkeypatch)
    first, bad, second = llm.generate(["ab", PROMPT, PROMPT], [GOOD, BAD, GOOD])
    assert failing.num_calls > failing.after, "nothing failed"
    reasons = [completion.finish_reason for completion in bad.outputs]
    assert FinishReason.ERROR in reasons
    for completed in bad.outputs:
        if completed.finish_reason is FinishReason.ERROR:
            assert completed.error == "RuntimeError: its own data"
            assert len(completed.token_ids) < 9
        else:
            assert heals
            assert len(completed.token_ids) == 9
    for output, expected in zip((first, second), alone, strict=True):
        assert output.outputs[0].finish_reason is FinishReason.LENGTH
        assert output.token_ids == expected.token_ids
        assert output.text == expected.text
        assert output.outputs[0].logprobs == expected.outputs[0].logprobs
    monkeypatch.undo()
    assert_nothing_is_left(llm)
    assert llm.generate(PROMPT, GOOD)[0].token_ids == alone[1].token_ids


@pytest.mark.parametrize("place", ["hashing", "penalties", "its text"])
def test_a_stream_and_a_beam_search_say_what_failed(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    llm.engine.reset_prefix_cache()
    PLACES[place]().put(monkeypatch)
    params = SamplingParams(max_tokens=9, seed=1, ignore_eos=True, cache_salt=SALT)
    with pytest.raises(PagellmError, match="RuntimeError: its own data"):
        list(llm.stream(PROMPT, params))
    [beams] = llm.beam_search(PROMPT, BeamSearchParams(2, 5, cache_salt=SALT))
    assert (beams.finish_reason, beams.outputs[0].error) == (FinishReason.ERROR, "RuntimeError: its own data")
    monkeypatch.undo()
    assert_nothing_is_left(llm)


@pytest.mark.parametrize("name", ["_read_prompt", "_new_completion"])
def test_a_failure_while_a_request_is_taken_in_is_its_callers(
    llm: LLM, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = iter(range(10**9))
    failing = Failing(Intake, name, lambda *_: next(calls) == 1)
    failing.put(monkeypatch)
    with pytest.raises(RuntimeError, match="its own data"):
        llm.generate(["ab", "cd"], GOOD)
    assert_nothing_is_left(llm)
    assert llm.generate("ab", GOOD)[0].token_ids == alone[0].token_ids


@pytest.mark.parametrize("field", ["cache_salt", "tenant"])
def test_a_text_that_cannot_be_encoded_is_refused_at_the_door(field: str) -> None:
    with pytest.raises(RequestError, match=f"{field}: found .*surrogate"):
        SamplingParams(**{field: "\ud800"})  # type: ignore[arg-type]
    if field == "cache_salt":
        with pytest.raises(RequestError, match=f"{field}: found .*surrogate"):
            BeamSearchParams(cache_salt="\ud800")


def assert_nothing_is_left(llm: LLM) -> None:
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check()
    assert llm.engine.block_manager.num_free_blocks == llm.engine.block_manager.num_blocks


def test_threads_that_do_not_start_are_one_error_and_the_next_call_works(
    alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(TINY, num_blocks=40, block_size=4, num_threads=3, show_progress=False) as llm:
        with monkeypatch.context() as context:

            def refuse(thread: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            context.setattr(threading.Thread, "start", refuse)
            with pytest.raises(EngineError, match="num_threads: the system starts 1 threads, expected 3"):
                llm.generate(PROMPT, GOOD)
        assert llm.engine.scheduler.block_manager.num_free_blocks == 40
        assert llm.generate(PROMPT, GOOD)[0].token_ids == alone[1].token_ids
