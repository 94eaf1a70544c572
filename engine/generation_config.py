"""`generation_config.json`: how those who made a model want it sampled where a request says nothing."""

import warnings
from pathlib import Path
from typing import Any

from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.sampling_params import SamplingParams
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
    if left_out:
        warnings.warn(f"{path}: {', '.join(left_out)}: not supported, and left out", stacklevel=2)
    try:
        SamplingParams(**defaults)
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}; generation_config none leaves the file out") from error
    return defaults
