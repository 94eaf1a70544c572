"""Several threads on one engine, streams that are read in turns, closing and forking: who may call when."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pagellm.engine import LLM, BeamSearchParams, EngineError, FinishReason, LLMEngine, SamplingParams
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, seed=5, n=2, max_tokens=8, ignore_eos=True, logprobs=1)
PROMPTS: list[Any] = ["ab", [1, 2, 3, 4, 5, 6, 7], "hello"]
MANY_TOKENS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)


def new_llm(**settings: Any) -> LLM:
    return LLM(TINY, **({"num_blocks": 64, "block_size": 4, "show_progress": False} | settings))


@pytest.fixture
def llm() -> Iterator[LLM]:
    with new_llm() as llm:
        yield llm
        if not llm.engine.is_closed:
            assert not llm.engine.has_unfinished
            llm.engine.scheduler.check()
            assert llm.engine.block_manager.num_free_blocks == 64


def generate(llm: LLM) -> object:
    return [[(c.token_ids, c.logprobs) for c in output.outputs] for output in llm.generate(PROMPTS, DRAWN)]


def stream(llm: LLM) -> object:
    return [["".join(piece) for piece in request] for request in llm.stream_all(PROMPTS, DRAWN)]


def abandon(llm: LLM) -> object:
    next(llm.stream("ab", GREEDY))
    return None


def beam_search(llm: LLM) -> object:
    return [c.token_ids for c in llm.beam_search("ab", BeamSearchParams(3, 4, ignore_eos=True))[0].outputs]


def logits(llm: LLM) -> object:
    return llm.logits([1, 2, 3, 4, 5]).tobytes()


def chat(llm: LLM) -> object:
    return llm.chat([{"role": "user", "content": "hi"}], GREEDY)[0].text


CALLS = [generate, stream, abandon, beam_search, logits, chat]


def in_threads(works: list[Callable[[], object]]) -> list[object]:
    """What each gives in a thread of its own; the first error of any is raised."""
    results: list[object] = [None] * len(works)
    errors: list[BaseException] = []

    def run(index: int, work: Callable[[], object]) -> None:
        try:
            results[index] = work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "".join(
            "".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()
        )
    if errors:
        raise errors[0]
    return results


def test_each_thread_gets_what_it_gets_alone(llm: LLM) -> None:
    alone = [call(llm) for call in CALLS]
    for _ in range(3):
        assert in_threads([lambda call=call: call(llm) for call in CALLS * 2]) == alone * 2  # type: ignore[misc]


def test_threads_drive_an_engine_directly() -> None:
    """Whoever takes a step takes it for all; some requests are given up on the way by other threads."""
    engine = LLMEngine(TINY)

    def serve(number: int) -> object:
        outputs = []
        for i in range(10):
            request_id = f"{number}-{i}"
            output = engine.add_request(request_id, [1, 2, 3 + i], DRAWN)
            if i % 3 == 2:
                engine.abort(request_id)
            while not output.finished:
                engine.step()
            outputs.append([c.token_ids for c in output.outputs if i % 3 != 2])
        return outputs

    expected = serve(0)
    assert in_threads([lambda n=n: serve(n) for n in range(1, 5)]) == [expected] * 4  # type: ignore[misc]
    engine.scheduler.check()
    assert engine.block_manager.num_free_blocks == engine.block_manager.num_blocks
    engine.close()


def test_streams_that_are_read_in_turns_give_what_each_gives_alone(llm: LLM) -> None:
    alone = ["".join(llm.stream(prompt, GREEDY)) for prompt in PROMPTS]
    streams = {index: llm.stream(prompt, GREEDY) for index, prompt in enumerate(PROMPTS)}
    texts = dict.fromkeys(streams, "")
    while streams:
        for index, one in list(streams.items()):
            piece = next(one, None)
            if piece is None:
                del streams[index]
            else:
                texts[index] += piece
            assert llm.generate("cd", GREEDY)[0].finish_reason is FinishReason.LENGTH
    assert list(texts.values()) == alone


def test_one_stream_that_two_threads_read_gives_each_piece_once(llm: LLM) -> None:
    whole = "".join(llm.stream("ab", MANY_TOKENS))
    pieces: list[str] = []
    one = llm.stream("ab", MANY_TOKENS)
    in_threads([lambda: pieces.extend(one)] * 2)
    assert sorted("".join(pieces)) == sorted(whole)


def test_a_thread_that_waits_does_not_wait_for_the_ends_of_others(llm: LLM) -> None:
    """A short request of one thread ends while the long one of another goes on."""
    long = llm.stream("ab", MANY_TOKENS)
    next(long)
    ended = threading.Event()

    def short() -> None:
        llm.generate("cd", SamplingParams(max_tokens=2, ignore_eos=True))
        ended.set()

    thread = threading.Thread(target=short)
    thread.start()
    num_pieces = 0
    while not ended.is_set():
        if next(long, None) is None:
            long = llm.stream("ab", MANY_TOKENS)
        num_pieces += 1
        assert num_pieces < 5000, "the short one waits for the long ones"
    thread.join()
    long.close()


@pytest.mark.parametrize("call", CALLS)
def test_after_close_every_call_is_one_clear_error(call: Callable[[LLM], object]) -> None:
    llm = new_llm()
    open_stream = llm.stream("ab", GREEDY)
    next(open_stream)
    llm.close()
    llm.close()
    with pytest.raises(EngineError, match="this engine is closed"):
        call(llm)
    with pytest.raises(EngineError, match="step: this engine is closed"):
        llm.engine.step()
    with pytest.raises(EngineError, match="the engine was closed before the completion had ended"):
        next(open_stream)
    open_stream.close()
    assert llm.engine.abort("llm-0") is None
    assert not llm.engine.has_unfinished


def test_a_with_block_closes_at_its_end() -> None:
    with new_llm() as llm:
        assert llm.generate("ab", GREEDY)[0].finished
    with pytest.raises(EngineError, match="this engine is closed"):
        llm.generate("ab", GREEDY)


@pytest.mark.parametrize("call", [generate, stream, beam_search])
def test_closing_from_another_thread_ends_what_is_under_way(call: Callable[[LLM], object]) -> None:
    llm = new_llm()
    done = threading.Event()

    def work() -> object:
        try:
            while True:
                call(llm)
        except EngineError as error:
            return str(error)
        finally:
            done.set()

    def close() -> None:
        time.sleep(0.05)
        llm.close()

    message, _ = in_threads([work, close])
    assert "closed" in str(message)
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.num_free_blocks == 64


def test_closing_says_once_that_the_disk_is_full_and_raises_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    llm = new_llm(step_log="/dev/full")
    log = llm.engine._step_log
    assert log is not None
    log.file._file.write(b"not written yet")
    llm.close()
    llm.close()
    assert capsys.readouterr().err == "pagellm: step_log: /dev/full: No space left on device\n"


def forks(test: Any) -> Any:
    """Marks a test that forks, which needs a platform that can, and a word with those who warn of it."""
    test = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")(test)


def in_child(work: Callable[[], object]) -> str:
    """What a call gives in a forked process, or its error."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # one that waits for a thread that the fork did not copy never ends
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return answer


@forks
def test_a_process_that_is_forked_while_nobody_calls_works_on(llm: LLM) -> None:
    """Also with a stream that is half read."""
    expected = generate(llm)
    half = llm.stream("ab", GREEDY)
    beginning = next(half)
    rest = in_child(lambda: "".join(half))
    assert in_child(lambda: generate(llm)) == str(expected)
    assert generate(llm) == expected
    assert beginning + "".join(half) == beginning + rest


@forks
def test_a_process_that_is_forked_while_another_thread_calls_refuses(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run = generate(llm), llm.engine.runner.run
    inside, go_on = threading.Event(), threading.Event()

    def waiting(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return run(*arguments)

    monkeypatch.setattr(llm.engine.runner, "run", waiting)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(generate(llm)))
    thread.start()
    assert inside.wait(60)
    try:
        for call in (lambda: generate(llm), lambda: llm.engine.step(), lambda: abandon(llm)):
            answer = in_child(call)
            assert answer.startswith("EngineError: ")
            assert "this engine was in use by another thread when this process was forked" in answer
        assert in_child(llm.close) == "None"
    finally:
        go_on.set()
        thread.join()
    assert results == [expected]


@forks
@pytest.mark.parametrize("setting", ["step_log", "swap_dir"])
def test_a_forked_process_does_not_write_to_its_parents_files(setting: str, tmp_path: Any) -> None:
    settings = {
        "step_log": {"step_log": str(tmp_path / "steps.jsonl")},
        "swap_dir": {"preemption": "swap", "swap_dir": str(tmp_path)},
    }
    with new_llm(**settings[setting]) as llm:
        expected = generate(llm)
        answer = in_child(lambda: generate(llm))
        assert answer == (
            f"EngineError: add_request: this engine has a file ({setting}), which a forked process cannot "
            "share, expected another one"
        )
        assert generate(llm) == expected
