"""What a caller may hand over as prompts and sampling parameters, in every form that is understood.

Text is not tokenized here, and no token id is compared with a vocabulary: that takes a model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pagellm.engine.checks import integers, text
from pagellm.engine.errors import RequestError, found
from pagellm.engine.requests.sampling_params import SamplingParams

# A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; ids may be any integers in a list, a tuple
# or an array.
Prompt = str | Sequence[int] | Mapping[str, Any]

_FORMS = 'a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


class ReadPrompt(NamedTuple):
    """A prompt taken apart: at least one of its text and its token ids is there."""

    text: str | None
    token_ids: list[int] | None


def read_prompt(prompt: Any) -> ReadPrompt:
    """A prompt's text, or a copy of its token ids. Raises `RequestError` for anything else."""
    if isinstance(prompt, str):
        return ReadPrompt(text("prompt", prompt), None)
    if not isinstance(prompt, Mapping):
        return ReadPrompt(None, _token_ids("prompt", prompt))
    unknown = [key for key in prompt if key not in ("prompt", "prompt_token_ids")]
    if unknown or not prompt:
        raise RequestError(f"prompt: found {found(dict(prompt))}, expected {_FORMS}")
    ids = None
    if "prompt_token_ids" in prompt:
        ids = _token_ids("prompt_token_ids", prompt["prompt_token_ids"])
    # Beside ids, a text only says what they were made of.
    words = text("prompt", prompt["prompt"]) if "prompt" in prompt else None
    return ReadPrompt(words, ids)


def as_prompts(prompts: Any) -> list[Any]:
    """One prompt or several, as a list; each is looked into by `read_prompt`."""
    if hasattr(prompts, "tolist") and not isinstance(prompts, memoryview):
        prompts = prompts.tolist()
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise RequestError(f"prompts: found {found(prompts)}, expected a prompt or a list of them: {_FORMS}")
    one = len(prompts) > 0 and hasattr(prompts[0], "__index__") and not hasattr(prompts[0], "__len__")
    return [prompts] if one else list(prompts)


def params_for_each(sampling_params: Any, num_prompts: int) -> list[SamplingParams | None]:
    """The sampling parameters of each prompt, of one for all or one for each; None: the model's defaults."""
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    is_list = isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str | bytes)
    for params in sampling_params if is_list else [sampling_params]:
        if not isinstance(params, SamplingParams | None):
            raise RequestError(f"sampling_params: found {found(params)}, expected a SamplingParams")
    if len(sampling_params) != num_prompts:
        raise RequestError(
            f"sampling_params: found {len(sampling_params)}, expected {num_prompts}, one for each prompt"
        )
    return list(sampling_params)


def _token_ids(name: str, value: Any) -> list[int]:
    is_list = isinstance(value, Sequence) or hasattr(value, "tolist")
    if isinstance(value, str | bytes | bytearray | memoryview) or not is_list:
        raise RequestError(f"{name}: found {found(value)}, expected {_FORMS}")
    return integers(name, value)
