"""Beam search finds what the definition finds, and its beams share blocks."""

from collections.abc import Iterator

import numpy as np
import pytest

from pagellm.engine import LLM, BeamSearchParams, FinishReason, RequestError, SamplingParams
from tests.conftest import model_path

TINY = str(model_path("llama_tiny"))
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(TINY, num_blocks=64, block_size=4, show_progress=False)
    yield llm
    llm.close()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(llm: LLM) -> Iterator[None]:
    yield
    llm.engine.scheduler.check()
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.num_free_blocks == llm.engine.block_manager.num_blocks


def log_probabilities(llm: LLM, token_ids: list[int]) -> np.ndarray:
    logits = llm.logits(token_ids)[-1].astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def by_definition(
    llm: LLM, prompt: list[int], width: int, max_tokens: int, penalty: float, eos: set[int]
) -> list[tuple[list[int], float]]:
    """All continuations of all beams at every step; the `width` best go on, and those that end are kept."""
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for length in range(1, max_tokens + 1):
        everything = [
            ([*tokens, token], score + logprob)
            for tokens, score in beams
            for token, logprob in enumerate(log_probabilities(llm, [*prompt, *tokens]))
        ]
        everything.sort(key=lambda beam: -beam[1])
        ended += [beam for beam in everything[:width] if beam[0][-1] in eos]
        beams = [beam for beam in everything[: 2 * width] if beam[0][-1] not in eos][:width]
        if length == max_tokens:
            ended += beams
    ended.sort(key=lambda beam: -beam[1] / len(beam[0]) ** penalty)
    return ended[:width]


@pytest.mark.parametrize(("width", "max_tokens"), [(1, 6), (2, 5), (3, 4), (5, 3), (4, 1)])
def test_the_beams_are_those_of_the_definition(llm: LLM, width: int, max_tokens: int) -> None:
    params = BeamSearchParams(width, max_tokens, ignore_eos=True)
    [output] = llm.beam_search(PROMPT, params)
    expected = by_definition(llm, PROMPT, width, max_tokens, 1.0, set())
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in expected]
    scores = [completion.cumulative_logprob for completion in output.outputs]
    assert scores == pytest.approx([score for _, score in expected], abs=1e-4)
    assert [completion.index for completion in output.outputs] == list(range(width))
    assert all(completion.finish_reason is FinishReason.LENGTH for completion in output.outputs)
    assert output.text == llm.tokenizer.decode(output.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beams_that_end_are_ranked_among_the_others(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, penalty: float
) -> None:
    likely = by_definition(llm, PROMPT, 4, 2, 1.0, set())
    eos = {tokens[1] for tokens, _ in likely[1:3]}
    monkeypatch.setattr(llm.tokenizer, "eos_token_ids", tuple(eos))
    [output] = llm.beam_search(PROMPT, BeamSearchParams(3, 5, length_penalty=penalty))
    expected = by_definition(llm, PROMPT, 3, 5, penalty, eos)
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in expected]
    ended = [completion for completion in output.outputs if completion.token_ids[-1] in eos]
    assert all(completion.finish_reason is FinishReason.STOP for completion in ended)
    assert [completion.stop_reason for completion in ended] == [c.token_ids[-1] for c in ended]


def test_a_width_of_one_is_greedy_search(llm: LLM) -> None:
    [beam] = llm.beam_search(PROMPT, BeamSearchParams(1, 8, ignore_eos=True))
    [greedy] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    assert beam.token_ids == greedy.token_ids


def test_several_prompts_are_searched_together_with_the_results_of_each_alone(llm: LLM) -> None:
    params = BeamSearchParams(3, 5, ignore_eos=True)
    together = llm.beam_search([PROMPT, [1, 2], "ab"], params)
    alone = [llm.beam_search(prompt, params)[0] for prompt in (PROMPT, [1, 2], "ab")]
    assert [o.outputs for o in together] == [o.outputs for o in alone]


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_memory_pressure_changes_no_beam(llm: LLM, preemption: str) -> None:
    small = LLM(TINY, num_blocks=12, block_size=2, max_num_seqs=7, preemption=preemption, show_progress=False)
    params = BeamSearchParams(3, 8, ignore_eos=True)
    prompts = [PROMPT, [1, 2, 3, 4, 5, 6], [9, 9, 9]]
    pressed = small.beam_search(prompts, params)
    small.close()
    assert [o.outputs for o in pressed] == [o.outputs for o in llm.beam_search(prompts, params)]


def test_beams_share_the_blocks_of_their_prompt(llm: LLM) -> None:
    blocks = []
    step = llm.engine.step

    def watched_step() -> object:
        outputs = step()
        blocks.append(64 - llm.engine.block_manager.num_free_blocks)
        return outputs

    prompt = [3] * 42  # ten blocks and a half
    llm.engine.step = watched_step  # type: ignore[method-assign, assignment]
    try:
        llm.beam_search(prompt, BeamSearchParams(4, 2, ignore_eos=True))
    finally:
        del llm.engine.step
    assert max(blocks) == 10 + 4, "ten are shared, and each beam has its own copy of the half"


def test_a_prompt_that_leaves_room_for_two_tokens_ends_there(llm: LLM) -> None:
    longest = llm.engine.config.max_model_len
    assert longest is not None
    [output] = llm.beam_search([1] * (longest - 2), BeamSearchParams(2, 10, ignore_eos=True))
    assert [len(completion.token_ids) for completion in output.outputs] == [2, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_width": 0}, "beam_width: found 0"),
        ({"beam_width": 51}, "beam_width: found 51"),
        ({"beam_width": True}, "beam_width: found True"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"max_tokens": None}, "max_tokens: found None"),
        ({"length_penalty": -1.0}, "length_penalty: found -1.0"),
        ({"length_penalty": float("nan")}, "length_penalty: found nan"),
    ],
)
def test_bad_parameters_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        BeamSearchParams(**settings)  # type: ignore[arg-type]


def test_a_bad_prompt_among_others_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="prompt"):
        llm.beam_search([PROMPT, []])


def test_beams_that_all_end_at_once_end_the_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every continuation is an end-of-text token, none goes on."""
    monkeypatch.setattr(llm.tokenizer, "eos_token_ids", tuple(range(llm.engine.spec.vocab_size)))
    [output] = llm.beam_search(PROMPT, BeamSearchParams(2, 5))
    assert [len(completion.token_ids) for completion in output.outputs] == [1, 1]
    assert all(completion.finish_reason is FinishReason.STOP for completion in output.outputs)


def test_a_beam_that_somebody_aborts_ends_the_search(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, engine = llm.engine.step, llm.engine

    def aborting() -> object:
        for request_id in list(engine._requests):
            engine.abort(request_id)
        return step()

    monkeypatch.setattr(engine, "step", aborting)
    [output] = llm.beam_search(PROMPT, BeamSearchParams(2, 5))
    assert [completion.finish_reason for completion in output.outputs] == [FinishReason.ABORT]
    assert output.token_ids == []


def test_an_error_between_a_beam_and_its_successors_leaks_neither(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, calls = llm.engine.add_request, iter(range(10**9))

    def failing(*arguments: object, **named: object) -> object:
        if next(calls) == 2:
            raise MemoryError
        return add(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(llm.engine, "add_request", failing)
    with pytest.raises(MemoryError):
        llm.beam_search(PROMPT, BeamSearchParams(3, 5, ignore_eos=True))
