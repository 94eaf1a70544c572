"""How those who made a model want it sampled where a request says nothing.

That is `generation_config.json` beside safetensors, and the keys `general.sampling.*` in a GGUF file.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.requests.sampling_params import SamplingParams
from pagellm.engine.tokenizer.checks import read_json_object_if_present

# The names of `transformers`, and ours.
_NAMES = {
    "temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens", "stop_strings": "stop",
}  # fmt: skip
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# What else changes the tokens there, with the value that changes nothing.
_UNSUPPORTED = {
    "typical_p": 1, "top_h": None, "epsilon_cutoff": 0, "eta_cutoff": 0, "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_beams": 1,
    "penalty_alpha": None, "guidance_scale": 1, "sequence_bias": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None, "watermarking_config": None, "dola_layers": None,
    "min_length": 0,
}  # fmt: skip

_GGUF_PREFIX = "general.sampling."
_GGUF_NAMES = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_GGUF_UNSUPPORTED = {"sequence": "", "xtc_probability": 0, "mirostat": 0}


def read_generation_defaults(path: Path) -> dict[str, Any]:
    """The sampling parameters that the file sets, by our names; none where there is no file.

    A file whose `do_sample` is false is greedy, whatever filters it has. Warns of what is not supported.

    Raises `CheckpointError` if the file cannot be read, or has a value that no request could have.
    """
    values = read_json_object_if_present(path)
    defaults = {ours: values[theirs] for theirs, ours in _NAMES.items() if values.get(theirs) is not None}
    if values.get("do_sample") is False:
        defaults = {name: value for name, value in defaults.items() if name not in _FILTERS}
        defaults["temperature"] = 0.0
    elif not isinstance(values.get("do_sample"), bool | None):
        raise CheckpointError(
            f"{path}: do_sample: found {found(values['do_sample'])}, expected true or false"
        )
    if defaults.get("min_tokens") == 0:
        del defaults["min_tokens"]
    left_out = [name for name, neutral in _UNSUPPORTED.items() if values.get(name) not in (None, neutral)]
    return _checked(path, defaults, left_out)


def gguf_generation_defaults(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a GGUF file, as llama.cpp has it (`common_init_sampler_from_model`).

    There a temperature or top_k below 0 is 0, and a repetition penalty looks at the last `penalty_last_n`
    tokens, 64 if that is absent. Here it looks at all of them, which is -1 there; another one is left out.
    """
    values = {
        key.removeprefix(_GGUF_PREFIX): _as_written(value)
        for key, value in metadata.items()
        if key.startswith(_GGUF_PREFIX)
    }
    left_out = [key for key, neutral in _GGUF_UNSUPPORTED.items() if values.get(key, neutral) != neutral]
    if values.get("penalty_repeat", 1) != 1 and values.get("penalty_last_n", 64) != -1:
        if values.get("penalty_last_n") != 0:
            left_out.append("penalty_repeat")
        del values["penalty_repeat"]
    defaults = {ours: values[theirs] for theirs, ours in _GGUF_NAMES.items() if theirs in values}
    for name in ("temperature", "top_k"):
        if isinstance(defaults.get(name), int | float) and defaults[name] < 0:
            defaults[name] = 0
    return _checked(path, defaults, [_GGUF_PREFIX + key for key in left_out])


def _as_written(value: Any) -> Any:
    """A float32 as the shortest number that it is of; an array, which no key of these has, as a list."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _checked(path: Path, defaults: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    if left_out:
        warnings.warn(f"{path}: {', '.join(left_out)}: not supported, and left out", stacklevel=3)
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}; generation_config none leaves it out") from error
    return defaults
