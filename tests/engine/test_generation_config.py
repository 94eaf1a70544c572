"""The sampling parameters that a model brings, by the names of `transformers`: for requests without any."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from pagellm.__main__ import main
from pagellm.engine import LLM, CheckpointError, ConfigError, SamplingParams
from pagellm.engine.requests.generation_config import gguf_generation_defaults, read_generation_defaults
from tests.conftest import model_path


def written(directory: Path, **values: Any) -> Path:
    path = directory / "generation_config.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose configuration says how to sample."""
    directory = tmp_path / "model"
    shutil.copytree(model_path("llama_tiny"), directory)
    written(directory, do_sample=True, temperature=0.25, top_k=5, max_new_tokens=3, eos_token_id=271)
    return directory


def test_the_file_is_read_by_our_names(tmp_path: Path) -> None:
    path = written(
        tmp_path, do_sample=True, temperature=0.6, top_p=0.9, top_k=50, min_p=None, repetition_penalty=1.1,
        max_new_tokens=2048, min_new_tokens=0, stop_strings=["\n\n"], eos_token_id=[1, 2], num_beams=1,
    )  # fmt: skip
    assert read_generation_defaults(path) == {
        "temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1, "max_tokens": 2048,
        "stop": ["\n\n"],
    }  # fmt: skip


def test_a_file_that_says_nothing_of_sampling_sets_nothing(tmp_path: Path) -> None:
    assert read_generation_defaults(written(tmp_path, eos_token_id=2, transformers_version="5")) == {}
    assert read_generation_defaults(tmp_path / "none.json") == {}


def test_without_do_sample_it_is_greedy(tmp_path: Path) -> None:
    path = written(tmp_path, do_sample=False, temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    assert read_generation_defaults(path) == {"temperature": 0.0, "repetition_penalty": 1.1}


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    path = written(tmp_path, temperature=0.5, no_repeat_ngram_size=3, typical_p=1.0, num_beams=4)
    with pytest.warns(UserWarning, match="json: no_repeat_ngram_size, num_beams: not supported"):
        assert read_generation_defaults(path) == {"temperature": 0.5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": "hot"}, "temperature: found 'hot', expected a number"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"do_sample": "yes"}, "do_sample: found 'yes', expected true or false"),
        ({"max_new_tokens": 0}, "max_tokens: found 0"),
    ],
)
def test_a_bad_value_names_the_file(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {message}"):
        read_generation_defaults(written(tmp_path, **values))


def sampling_keys(**values: Any) -> dict[str, Any]:
    return {f"general.sampling.{name}": value for name, value in values.items()} | {"general.name": "x"}


def test_a_gguf_files_own_keys_are_read(tmp_path: Path) -> None:
    as_float32 = 0.60000002384185791015625
    keys = sampling_keys(temp=as_float32, top_k=20, top_p=0.5, min_p=0.0, mirostat=0, xtc_threshold=0.1)
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.5, "min_p": 0.0}
    assert gguf_generation_defaults(tmp_path, keys) == expected
    assert gguf_generation_defaults(tmp_path, {"general.name": "x"}) == {}
    assert gguf_generation_defaults(tmp_path, sampling_keys(temp=-1.0, top_k=-5)) == {
        "temperature": 0, "top_k": 0,
    }  # fmt: skip


def test_a_gguf_files_repetition_penalty_is_ours_over_all_tokens_alone(tmp_path: Path) -> None:
    keys = sampling_keys(penalty_repeat=1.5, penalty_last_n=-1)
    assert gguf_generation_defaults(tmp_path, keys) == {"repetition_penalty": 1.5}
    assert gguf_generation_defaults(tmp_path, sampling_keys(penalty_repeat=1.5, penalty_last_n=0)) == {}
    for last_n in ({}, {"penalty_last_n": 64}):
        with pytest.warns(UserWarning, match=r"general.sampling.penalty_repeat: not supported, and left out"):
            assert gguf_generation_defaults(tmp_path, sampling_keys(penalty_repeat=1.5, **last_n)) == {}
    with pytest.warns(UserWarning, match=r"sampling.sequence, general.sampling.mirostat: not supported"):
        assert gguf_generation_defaults(tmp_path, sampling_keys(mirostat=2, sequence="top_k;temp")) == {}


def test_a_bad_value_names_the_gguf_file(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"general.sampling.mirostat: not supported"):
        assert gguf_generation_defaults(tmp_path, sampling_keys(mirostat=np.array([1, 2]))) == {}
    for value in ("hot", np.array([1.0, 2.0]), float("nan"), True):
        with pytest.raises(CheckpointError, match=r"model.gguf: temperature: found .*, expected a number"):
            gguf_generation_defaults(tmp_path / "model.gguf", sampling_keys(temp=value))


def test_a_gguf_model_is_sampled_as_it_says(tmp_path: Path) -> None:
    source = GGUFReader(model_path("gguf_llama_f32"))
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for field in source.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if kinds[1:] else None)
    writer.add_float32("general.sampling.temp", 0.25)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for setting, temperature in (("auto", 0.25), ("none", 1.0)):
        with LLM(path, num_blocks=8, generation_config=setting, show_progress=False) as llm:
            assert llm.generate([[5, 6, 7]])[0].sampling_params.temperature == temperature


def test_a_request_without_parameters_is_sampled_as_the_model_says(model: Path) -> None:
    llm = LLM(str(model), show_progress=False)
    [output] = llm.generate("ab")
    served = output.sampling_params
    assert (served.temperature, served.top_k, served.max_tokens) == (0.25, 5, 3)
    assert len(output.token_ids) <= 3
    [output] = llm.generate("ab", SamplingParams(max_tokens=4, seed=1))
    assert output.sampling_params == SamplingParams(max_tokens=4, seed=1)
    llm.close()


def test_none_leaves_the_file_out(model: Path) -> None:
    written(model, temperature="hot")
    llm = LLM(str(model), generation_config="none", show_progress=False)
    [output] = llm.generate("ab")
    assert output.sampling_params.temperature == SamplingParams().temperature
    llm.close()
    with pytest.raises(ConfigError, match="generation_config: found 'vllm', expected one of auto, none"):
        LLM(str(model), generation_config="vllm")


def test_the_command_says_what_it_took_from_the_model(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "ab", "--model", str(model), "--top-k", "7"]
    assert main([*command, "--json"]) == 0
    [output] = json.loads(capsys.readouterr().out)["outputs"]
    served = output["sampling_params"]
    assert (served["temperature"], served["top_k"], served["max_tokens"]) == (0.25, 7, 3)
    assert main(command) == 0
    assert "own configuration says: temperature 0.25, max_tokens 3" in capsys.readouterr().err
    assert main([*command, "--json", "--generation-config", "none"]) == 0
    [output] = json.loads(capsys.readouterr().out)["outputs"]
    assert output["sampling_params"]["temperature"] == 0
