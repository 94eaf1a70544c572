"""What a row of logits may be asked for, and steps that give a sequence several tokens."""

from collections.abc import Iterator

import numpy as np
import pytest

from pagellm.engine import EngineConfig, LLMEngine, RequestOutput, SamplingParams
from pagellm.engine.execution.model_runner import RunnerOutput, Wishes
from pagellm.engine.requests.outputs import TokenLogprob
from pagellm.engine.scheduling.batch import ScheduledBatch
from tests.conftest import model_path

CONFIG = EngineConfig(num_blocks=16, block_size=4)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)


@pytest.fixture
def engine() -> Iterator[LLMEngine]:
    engine = LLMEngine(str(model_path("llama_tiny")), CONFIG)
    yield engine
    engine.close()


def bits(mask: np.ndarray) -> np.ndarray:
    """The words of a mask that has a bool a token."""
    words = np.zeros((mask.size + 31) // 32, np.uint32)
    for token in np.flatnonzero(mask):
        words[token // 32] |= np.uint32(1 << (token % 32))
    return words


def run(engine: LLMEngine, *masks: np.ndarray | None) -> RunnerOutput:
    """One step of requests that begin alike, each with its mask."""
    for number in range(len(masks)):
        engine.add_request(str(number), [5, 6, 7, number], GREEDY)
    batch = engine.loop.begin(0.0)
    wishes = {number: Wishes(mask=bits(mask)) for number, mask in enumerate(masks) if mask is not None}
    return engine.runner.run(batch, wishes)


def test_a_mask_says_what_may_be_sampled_in_its_own_row_alone(engine: LLMEngine) -> None:
    free = run(engine, None, None, None).token_ids
    for number in range(3):
        engine.abort(str(number))
    mask = np.zeros(engine.spec.vocab_size, np.bool_)
    allowed = [token for token in (3, 9, 11) if token != free[1][0]]
    mask[allowed] = True
    for number in range(3):
        engine.add_request(f"again-{number}", [5, 6, 7, number], GREEDY)
    batch = engine.loop.begin(0.0)
    result = engine.runner.run(batch, {batch.sequences[1].seq_id: Wishes(mask=bits(mask))})
    assert [result.token_ids[0], result.token_ids[2]] == [free[0], free[2]]
    [token] = result.token_ids[1]
    logprobs = {t: logprob_of(t, behind=[5, 6, 7, 1]) for t in allowed}
    assert token == max(logprobs, key=logprobs.__getitem__)


def logprob_of(token: int, behind: list[int]) -> float:
    """What the model itself says of a token behind a prompt."""
    other = LLMEngine(str(model_path("llama_tiny")), CONFIG)
    output = other.add_request("0", [*behind, token], SamplingParams(max_tokens=1, prompt_logprobs=0))
    other.step()
    other.close()
    assert output.prompt_logprobs is not None
    logprob = output.prompt_logprobs[-1]
    assert logprob is not None
    return logprob.logprob


def test_a_mask_that_allows_nothing_gives_no_token(engine: LLMEngine) -> None:
    nothing = np.zeros(engine.spec.vocab_size, np.bool_)
    result = run(engine, None, nothing)
    assert (len(result.token_ids[0]), result.token_ids[1]) == (1, [])


class Several:
    """Runs no model: each sampled sequence gets the next three letters, with their log-probabilities."""

    def __init__(self, letters: list[int]) -> None:
        self.letters = iter(letters)

    def run(self, batch: ScheduledBatch, wishes: dict[int, Wishes]) -> RunnerOutput:
        result = RunnerOutput()
        for sequence in batch.sampled:
            tokens = [next(self.letters) for _ in range(3)]
            result.token_ids.append(tokens)
            result.logprobs[sequence.seq_id] = [TokenLogprob(token, -float(token)) for token in tokens]
        return result

    def close(self) -> None:
        pass


def serve(engine: LLMEngine, params: SamplingParams) -> tuple[RequestOutput, list[int]]:
    """The output when the runner gives a, b, c and so on; and how many tokens it had after each step."""
    letters = [engine.tokenizer.encode(letter)[-1] for letter in "abcdefghijkl"]
    engine.runner.close()
    engine.runner = Several(letters)  # type: ignore[assignment]
    output, lengths = engine.add_request("0", [1, 2], params), []
    while engine.has_unfinished:
        engine.step()
        lengths.append(len(output.token_ids))
    return output, lengths


def test_a_step_may_give_several_tokens_and_each_has_its_log_probability(engine: LLMEngine) -> None:
    output, lengths = serve(engine, SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0))
    assert lengths == [3, 5]
    assert output.text == "abcde"
    assert output.finish_reason == "length"
    assert output.outputs[0].logprobs is not None
    assert [logprob.token_id for logprob in output.outputs[0].logprobs] == output.token_ids
    assert engine.block_manager.num_free_blocks == 16


def test_a_stop_string_ends_an_output_among_several_tokens(engine: LLMEngine) -> None:
    output, lengths = serve(engine, SamplingParams(max_tokens=9, ignore_eos=True, stop="e"))
    assert lengths == [3, 5]
    assert (output.text, output.finish_reason, output.outputs[0].stop_reason) == ("abcd", "stop", "e")
    engine.scheduler.check()


def test_a_stop_token_ends_an_output_among_several_tokens(engine: LLMEngine) -> None:
    stop = engine.tokenizer.encode("b")[-1]
    output, lengths = serve(engine, SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=[stop]))
    assert lengths == [2]
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
