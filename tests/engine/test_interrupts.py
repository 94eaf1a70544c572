"""An exception from outside, at whatever moment: the caller gets it, and nothing is left behind.

Raised at every line of what drives a model, one at a time, and by a signal at random moments. Afterwards no
request, block or wrong table is there, and the next call gives the bits that it always gives.
"""

import dis
import gc
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pagellm.engine import (
    LLM,
    BeamSearchParams,
    EngineConfig,
    EngineError,
    FinishReason,
    LLMEngine,
    SamplingParams,
    SchedulingPolicy,
)
from pagellm.engine.completion import Completion, Request
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
ENGINE = Path(sys.modules[LLM.__module__].__file__ or "").parent
DRIVING = [
    "llm.py",
    "llm_engine.py",
    "intake.py",
    "turns.py",
    "completion.py",
    "beam_search.py",
    "model_runner.py",
]
THINKING = [*DRIVING, "thoughts.py", "reasoning.py"]
CONSTRAINING = [*DRIVING, "state.py", "masks.py"]
SCHEDULING = [path.name for path in (ENGINE / "scheduling").glob("*.py")]
PLAIN = SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=4, ignore_eos=True, stop=["zq"], logprobs=1)
OTHER = SamplingParams(
    temperature=0, max_tokens=4, ignore_eos=True, cache_salt="x", prompt_logprobs=1, tenant="b"
)
PROMPTS: list[Any] = ["ab", [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 9]]
THOUGHT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<t>so"}]
MARKERS = "<t>...</t>"
BEAMS = BeamSearchParams(2, 3, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """So little memory that sequences are swapped and cached blocks offloaded, under a policy that counts."""
    llm = LLM(
        TINY,
        num_blocks=14,
        block_size=2,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        preemption="swap",
        num_swap_blocks=30,
        enable_hierarchical_cache=True,
        policy="fair",
        reasoning_markers=MARKERS,
        show_progress=False,
    )
    yield llm
    assert llm.engine.block_manager.stats.offloads > 0
    llm.close()


def generate(llm: LLM) -> object:
    outputs = llm.generate(PROMPTS, [PLAIN, OTHER, OTHER])
    return [
        ([(c.token_ids, c.text, c.logprobs) for c in output.outputs], output.prompt_logprobs)
        for output in outputs
    ]


def stream(llm: LLM) -> object:
    return [["".join(piece) for piece in request] for request in llm.stream_all(PROMPTS, PLAIN)]


def beam_search(llm: LLM) -> object:
    return [[c.token_ids for c in output.outputs] for output in llm.beam_search(PROMPTS[:2], BEAMS)]


def logits(llm: LLM) -> object:
    return llm.logits(PROMPTS[1]).tobytes()


def chat(llm: LLM) -> object:
    return llm.chat([{"role": "user", "content": "hi"}], OTHER)[0].token_ids


def constrain(llm: LLM) -> object:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["bc", "d"]}}, "required": ["a"]}
    forms = [{"json": schema}, {"regex": "[a-c]{3,9}"}, {"choice": ["yes", "no"]}]
    params = [replace(PLAIN, max_tokens=12, logprobs=None, structured=form) for form in forms]
    return [[(c.token_ids, c.text) for c in output.outputs] for output in llm.generate(PROMPTS, params)]


def think(llm: LLM) -> object:
    params = replace(PLAIN, max_tokens=9, thinking_token_budget=2)
    streams = llm.chat_stream_all([THOUGHT], params, continue_final_message=True)
    return [["".join(part) for part in zip(*stream, strict=True)] for stream in streams[0]]


CALLS = [generate, stream, beam_search, logits, chat, think, constrain]


def assert_nothing_is_left(llm: LLM) -> None:
    engine = llm.engine
    assert not engine.has_unfinished
    engine.scheduler.check()
    assert not engine.scheduler.has_unfinished
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    assert engine.block_manager.num_free_swap_blocks == engine.block_manager.num_swap_blocks


Place = tuple[str, int]
TAKES_OVER = dis.opmap["PUSH_EXC_INFO"]


def traced(call: Callable[[], object], at_line: Callable[[Place], None], files: list[str]) -> object:
    """What a call gives, if `at_line` is called before each line of the files and raises nothing."""

    def in_frame(frame: FrameType, event: str, _: object) -> Any:
        # Where a handler has not yet taken its exception over, CPython loses track of what is handled if the
        # trace function raises another; a signal never comes there.
        if event == "line" and frame.f_code.co_code[frame.f_lasti] != TAKES_OVER:
            at_line((Path(frame.f_code.co_filename).name, frame.f_lineno))
        return in_frame

    def enter(frame: FrameType, _: str, __: object) -> Any:
        path = Path(frame.f_code.co_filename)
        return in_frame if path.name in files and "engine" in path.parts else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        return call()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize(
    ("files", "call"),
    [
        (SCHEDULING, generate),
        (SCHEDULING, beam_search),
        (DRIVING, generate),
        (DRIVING, stream),
        (DRIVING, beam_search),
        (THINKING, think),
        (CONSTRAINING, constrain),
    ],
    ids=lambda value: value.__name__ if callable(value) else "driving" if value is DRIVING else "scheduling",
)
def test_an_exception_at_every_line_leaves_nothing_behind(
    llm: LLM, files: list[str], call: Callable[[LLM], object]
) -> None:
    """At one execution of each, the first or any other."""
    expected = call(llm)
    places: Counter[Place] = Counter()
    assert traced(lambda: call(llm), lambda place: places.update([place]), files) == expected
    assert len(places) > 200
    rng = random.Random(0)
    for index, (place, num_times) in enumerate(places.items()):
        raise_at(llm, call, files, place, rng.choice([0, rng.randrange(num_times)]))
        if index % 10 == 0:
            assert call(llm) == expected, place
    assert call(llm) == expected


def raise_at(llm: LLM, call: Callable[[LLM], object], files: list[str], place: Place, number: int) -> None:
    left = number
    raised = False

    def at_line(where: Place) -> None:
        nonlocal left, raised
        if where == place and not raised:
            left -= 1
            if left < 0:
                raised = True
                raise KeyboardInterrupt

    try:
        traced(lambda: call(llm), at_line, files)
        arrived = not raised  # what comes first may differ: then this line is not reached so often
    except KeyboardInterrupt:
        arrived = True
    assert arrived, f"{place}: the caller did not get the exception"
    assert_nothing_is_left(llm)


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Raises a KeyboardInterrupt after so many seconds, in the midst of whatever is done then."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(call: Callable[[], object], alarm: Callable[[float], None], seconds: float) -> bool:
    """Whether a signal came before the call had ended."""
    try:
        try:
            alarm(seconds)
            call()
        finally:
            alarm(0)
    except KeyboardInterrupt:
        return True
    return False


def test_what_a_signal_raises_is_the_callers_also_where_a_requests_own_data_is_dealt_with(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of any class, as of a time limit: it is not taken for a failure of the request."""
    expected = generate(llm)

    def time_is_up(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError("time is up")

    before = signal.signal(signal.SIGALRM, time_is_up)
    try:
        for owner, name in [
            (llm.engine.block_manager, "cached_prefix"),
            (llm.engine.block_manager, "register"),
            (Completion, "append"),
            (Request, "collect_prompt"),
            (SchedulingPolicy, "order"),
        ]:
            original = getattr(owner, name)

            def late(*arguments: Any, original: Any = original) -> Any:
                signal.raise_signal(signal.SIGALRM)
                return original(*arguments)

            monkeypatch.setattr(owner, name, late)
            # First come, first served is not asked for its order unless it is a class of somebody's own.
            monkeypatch.setattr(llm.engine.scheduler.policies, "_is_fcfs", False)
            with pytest.raises(TimeoutError, match="time is up"):
                generate(llm)
            monkeypatch.undo()
            assert_nothing_is_left(llm)
            assert generate(llm) == expected, name
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("call", CALLS)
def test_a_signal_at_a_random_moment_leaves_nothing_behind(
    llm: LLM, alarm: Callable[[float], None], call: Callable[[LLM], object]
) -> None:
    expected = call(llm)
    start = time.perf_counter()
    call(llm)
    longest = time.perf_counter() - start
    rng = random.Random(1)
    num_interrupts = 0
    for _ in range(60):
        num_interrupts += interrupted(lambda: call(llm), alarm, max(1e-6, rng.random() * longest))
        assert_nothing_is_left(llm)
    assert num_interrupts > 0
    assert call(llm) == expected


def test_signals_interrupt_none_but_the_calls_of_their_thread(
    llm: LLM, alarm: Callable[[float], None]
) -> None:
    """Another thread's requests go on, whatever happens to the steps that they are in."""
    expected = generate(llm)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.extend(generate(llm) for _ in range(15)))
    thread.start()
    rng = random.Random(2)
    while thread.is_alive():
        interrupted(lambda: beam_search(llm), alarm, max(1e-5, rng.random() * 0.02))
    thread.join()
    assert results == [expected] * 15
    assert_nothing_is_left(llm)


def test_an_interrupted_step_costs_no_token_of_those_that_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether the step was scheduled, computed, committed or given out in part."""
    engine = LLMEngine(TINY, EngineConfig(reasoning_markers=MARKERS))
    whole = run_out(engine)
    for owner, name in [
        (engine.scheduler, "schedule"),
        (engine.runner, "run"),
        (engine.scheduler, "commit"),
        (engine, "_outputs"),
    ]:
        for after in (False, True):
            original, calls = getattr(owner, name), iter(range(10**9))

            def cut(
                *arguments: Any, original: Any = original, calls: Any = calls, after: bool = after
            ) -> Any:
                comes = next(calls) == 4
                if comes and not after:
                    raise KeyboardInterrupt
                result = original(*arguments)
                if comes:
                    raise KeyboardInterrupt
                return result

            monkeypatch.setattr(owner, name, cut)
            assert run_out(engine) == whole, (name, after)
            monkeypatch.undo()
    engine.close()


def run_out(engine: LLMEngine) -> object:
    """Three requests to their ends, whatever comes in between."""
    outputs = [engine.add_request(str(i), [1, 2, 3 + i], PLAIN) for i in range(2)]
    outputs.append(engine.add_request("2", "ab<t>", replace(PLAIN, max_tokens=7, thinking_token_budget=1)))
    num_interrupts = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except KeyboardInterrupt:
            num_interrupts += 1
    assert num_interrupts <= 1
    engine.scheduler.check()
    return [[(c.token_ids, c.text, c.logprobs, c.finish_reason) for c in o.outputs] for o in outputs]


def test_an_interrupted_recovery_is_done_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(llm)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.engine.scheduler, "commit", interrupt)
    monkeypatch.setattr(llm.engine.scheduler, "recover", interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(llm)
    monkeypatch.undo()
    assert generate(llm) == expected
    assert_nothing_is_left(llm)


def test_a_refused_request_costs_nobody_the_cache(llm: LLM) -> None:
    """It is no interrupt: nothing has to be computed again."""
    prompt = list(range(40, 49))
    llm.generate([prompt], OTHER.of_completion(0))
    cached = llm.engine.block_manager.num_cached_blocks
    assert cached > 0
    with pytest.raises(ValueError, match="prompt"):
        llm.generate([[1] * 200])
    assert llm.engine.block_manager.num_cached_blocks == cached


def test_calls_in_the_midst_of_another_are_refused_before_anything_is_touched(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a handler of signals, or a policy; the call that goes on is none the worse for it."""
    expected, run = generate(llm), llm.engine.runner.run
    refused: list[str] = []
    calls = {
        "add_request": lambda: llm.generate("ab", PLAIN),
        "step": llm.engine.step,
        "close": llm.close,
        "reset_prefix_cache": llm.engine.reset_prefix_cache,
    }

    def reentrant(*arguments: Any) -> Any:
        for name, call in calls.items():
            with pytest.raises(EngineError, match=f"{name}: found a call in the midst of another one"):
                call()
            refused.append(name)
        assert llm.engine.has_unfinished
        return run(*arguments)

    monkeypatch.setattr(llm.engine.runner, "run", reentrant)
    assert generate(llm) == expected
    assert set(refused) == set(calls)
    monkeypatch.undo()
    assert_nothing_is_left(llm)


def test_an_abort_in_the_midst_of_a_step_follows_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.engine.runner.run
    output = llm.engine.add_request("mine", [1, 2, 3], PLAIN)

    def aborting(*arguments: Any) -> Any:
        assert llm.engine.abort("mine") is output
        return run(*arguments)

    monkeypatch.setattr(llm.engine.runner, "run", aborting)
    llm.engine.step()
    assert not llm.engine.has_unfinished
    assert [c.finish_reason for c in output.outputs] == [FinishReason.ABORT] * 2
    monkeypatch.undo()
    assert_nothing_is_left(llm)


def test_a_stream_that_the_collector_finds_in_the_midst_of_a_step_is_given_up_after_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run = generate(llm), llm.engine.runner.run

    def abandon() -> None:
        cycle: list[Any] = [llm.stream("abandoned", OTHER)]
        cycle.append(cycle)

    def collecting(*arguments: Any) -> Any:
        running = list(llm.engine.scheduler.running)
        gc.collect()
        assert llm.engine.scheduler.running == running
        return run(*arguments)

    gc.disable()
    try:
        for _ in range(3):
            abandon()
        monkeypatch.setattr(llm.engine.runner, "run", collecting)
        assert generate(llm) == expected
    finally:
        gc.enable()
    monkeypatch.undo()
    assert_nothing_is_left(llm)
