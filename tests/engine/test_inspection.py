"""What `pagellm inspect` says: what an engine then does, whether the model is served or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pagellm.__main__ import main
from pagellm.engine import LLM
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.checkpoints.base import WeightFile
from pagellm.engine.commands.inspection import inspect_model
from tests.conftest import MODELS, model_path

KEYS = {
    *("model", "path", "format", "supported", "refusals", "files", "architecture", "weights"),
    *("kv_cache", "context", "tokenizer", "chat_template", "memory"),
}
SERVED = ["gpt2", "llama_gqa", "llama_tiny", "llama_sharded", "mistral", "gguf_llama_q8_0", "gguf_llama_q5"]


def write_config(tmp_path: Path, name: str = "llama_gqa", **changes: Any) -> Path:
    """A copy of a fixture with other keys in its config.json; None takes a key away."""
    directory = tmp_path / name
    shutil.copytree(MODELS / name, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("quantization", ["auto", "int8"])
def test_an_engine_takes_what_the_report_says(name: str, quantization: str) -> None:
    report = inspect_model(model_path(name), quantization)
    assert report.keys() == KEYS
    assert report["supported"]
    assert not report["refusals"]
    llm = LLM(str(model_path(name)), quantization=quantization, num_blocks=8, show_progress=False)
    runner = llm.engine.runner
    assert report["memory"]["weight_bytes"] == runner.weights.values.nbytes
    kept = sum(entry["bytes"] for entry in report["weights"]["memory"])
    assert 0 <= report["memory"]["weight_bytes"] - kept <= 64  # what no part needs: a vector behind the last
    assert report["kv_cache"]["bytes_a_token"] * llm.engine.config.block_size == llm.engine.block_bytes
    assert report["architecture"]["num_layers"] == runner.arch.num_layers
    blocks = llm.engine.config.most_blocks(report["context"], llm.engine.spec.window)
    assert report["kv_cache"]["bytes_of_context"] == blocks * llm.engine.block_bytes
    assert sorted(i for kind in report["architecture"]["layers"] for i in kind["layers"]) == list(
        range(runner.arch.num_layers)
    )
    assert report["tokenizer"]["vocab_size"] == llm.tokenizer.vocab_size
    llm.close()
    with open_checkpoint(model_path(name)) as checkpoint:
        assert sum(e["bytes"] for e in report["weights"]["file"]) == sum(
            tensor.num_bytes for tensor in checkpoint.tensors.values()
        )


@pytest.mark.parametrize("name", [*SERVED, "llama_tied_other_head"])
def test_no_weights_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_checkpoint(model_path(name)) as checkpoint:
        begins = {file.path: file.num_bytes for file in checkpoint.files}
        for tensor in checkpoint.tensors.values():
            begins[tensor.file.path] = min(begins[tensor.file.path], tensor.offset)
    read = WeightFile.read

    def headers_alone(self: WeightFile, offset: int, num_bytes: int) -> Any:
        assert offset + num_bytes <= begins[self.path]
        return read(self, offset, num_bytes)

    monkeypatch.setattr(WeightFile, "read", headers_alone)
    assert inspect_model(model_path(name))["supported"]


def test_what_is_converted_is_told_with_its_bytes_a_weight() -> None:
    exact = inspect_model(model_path("gguf_llama_q8_0"))["weights"]
    assert exact["converted"] == []
    assert {entry["format"] for entry in exact["memory"]} == {"int8", "float32"}
    rounded = inspect_model(model_path("llama_gqa"), "int8")["weights"]["converted"]
    assert [(entry["type"], entry["format"], entry["rounds"]) for entry in rounded] == [("F32", "int8", True)]
    widened = inspect_model(model_path("llama_f16"))["weights"]["converted"]
    assert [(entry["type"], entry["format"], entry["rounds"]) for entry in widened] == [
        ("F16", "float32", False)
    ]
    assert 4 <= widened[0]["bytes_a_weight"] < 8


def test_the_json_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    path = model_path("llama_tiny")
    assert main(["inspect", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    report["memory"].pop("available_bytes")
    expected = inspect_model(path)
    expected["memory"].pop("available_bytes")
    assert report == json.loads(json.dumps(expected))


def test_the_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    path = model_path("llama_gqa")
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = inspect_model(path)
    [kind] = report["architecture"]["layers"]
    assert lines[0] == f"{path}: supported"
    text = " ".join(" ".join(lines).split())
    for expected in (
        f"{report['architecture']['num_layers']} layers, {report['architecture']['hidden_size']} wide",
        f"{kind['num_heads']} heads of {kind['head_dim']}, {kind['num_kv_heads']} KV heads",
        "full attention, RoPE base 10,000, norms before, SwiGLU",
        "in the file: F32 100.0% in memory: float32 100.0%",
        f"{report['kv_cache']['bytes_a_token']:,} bytes a token",
        f"context {report['context']:,} tokens",
        "chat template none",
    ):
        assert expected in text
    assert max(map(len, lines)) <= 110


ARCHITECTURES = MODELS.parent / "architectures"
FEATURES = {
    "cohere2": ["LayerNorm", "logits times 0.25", "in parallel", "layer 3: full attention, no rotation"],
    "gemma2": [
        "logits softly capped at 4",
        "scores softly capped at 3",
        "norms before and after",
        "GeGLU (tanh)",
    ],
    "gemma3_text": ["a window of", "QK-norm of each head", "embedding times"],
    "gemma4_text": [
        "values normalised",
        "scores times 1,",
        "3 of 6 experts, GeGLU (tanh) 20 wide, chosen by a softmax, each times a number of its own",
        "GeGLU (tanh) 44 wide beside them, each with norms of its own",
        "RoPE base 1,000,000 on 4 of 16 dimensions",
    ],
    "granite": ["residuals times 0.35", "embedding times 12", "scores times"],
    "ministral3": ["queries scaled by position"],
    "olmo2": ["QK-norm of all heads together", "norms after"],
    "bitnet": ["norms inside attention and feed-forward", "relu squared with a gate"],
    "gpt_neox": ["LayerNorm", "on 4 of 16 dimensions"],
    "llama_rope_yarn": ["scaled by frequency (times"],
    "opt": ["learned positions", "ReLU"],
    "minicpm3": [
        "3 heads of 23 (7 + 16 rotated) with values of 11",
        "latent attention that keeps 20 + 16 numbers of a token, queries compressed to 18",
    ],
    "deepseek_v3": ["3 of 6 experts", "the layers that predict tokens further on are left alone"],
}


@pytest.mark.parametrize("name", FEATURES)
def test_the_text_names_what_tells_an_architecture_from_llama(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(ARCHITECTURES / name)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for feature in FEATURES[name]:
        assert feature in text


def test_a_chat_template_says_what_it_knows(tmp_path: Path) -> None:
    directory = write_config(tmp_path, "llama_tiny")
    template = (
        "{% if enable_thinking %}<think></think>{% endif %}{{ tools }}"
        "{% for m in messages %}{{ m }}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template)
    assert inspect_model(directory)["chat_template"] == {
        "names": ["default"],
        "refusal": None,
        "variables": ["enable_thinking", "messages", "tools"],
        "tools": True,
        "thinking": {"variables": ["enable_thinking"], "markers": ["<think>", "</think>"]},
    }
    (directory / "chat_template.jinja").write_text("{% if %}")
    report = inspect_model(directory)
    assert report["supported"]  # texts can be continued
    assert "does not parse" in report["chat_template"]["refusal"]


# Models that are refused


def test_an_unknown_architecture_is_told_with_what_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_config(tmp_path, model_type="perceiver9")
    assert main(["inspect", str(directory), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == KEYS
    assert not report["supported"]
    assert (
        "model_type: found 'perceiver9', expected an architecture that is supported" in report["refusals"][0]
    )
    config = json.loads((directory / "config.json").read_text())
    assert report["architecture"] == {
        "name": "perceiver9",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
    }
    assert report["context"] == config["max_position_embeddings"]
    assert report["weights"]["file"][0]["type"] == "F32"
    assert report["weights"]["memory"] is None
    assert report["kv_cache"] is None
    assert main(["inspect", str(directory)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{directory}: refused\nwhy            model_type: found 'perceiver9'")
    assert "perceiver9" in out


def test_quantized_weights_are_refused_by_their_method(tmp_path: Path) -> None:
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    report = inspect_model(write_config(tmp_path, quantization_config=section))
    assert not report["supported"]
    assert "gptq" in report["refusals"][0]


def test_every_reason_is_told(tmp_path: Path) -> None:
    """An architecture, a type of weights and a tokenizer, each of which would be enough."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "perceiver9")
    writer.add_tokenizer_model("bytes9")
    writer.add_token_list(["a", "b"])
    writer.add_context_length(64)
    writer.add_tensor("a", np.zeros(256, np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = inspect_model(tmp_path / "m.gguf")
    reasons = "\n".join(report["refusals"])
    assert "general.architecture: found 'perceiver9'" in reasons
    assert "1 tensors of type I8, expected one of F32" in reasons
    assert "tokenizer.ggml.model: found 'bytes9'" in reasons
    assert report["context"] == 64
    assert report["tokenizer"] == {"kind": "bytes9"}


def test_a_model_that_does_not_open_is_told_of_by_what_is_left(tmp_path: Path) -> None:
    """Its configuration, where the weights are missing or of another format; one part of several."""
    directory = write_config(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    report = inspect_model(directory)
    assert not report["supported"]
    assert len(report["refusals"]) == 1
    assert "weights only as pytorch_model.bin" in report["refusals"][0]
    assert report["architecture"]["name"] == "llama"
    assert report["context"] == json.loads((directory / "config.json").read_text())["max_position_embeddings"]
    assert report["weights"] is None

    writer = gguf.GGUFWriter(tmp_path / "parts.gguf", "llama", split_max_tensors=1)
    writer.add_context_length(64)
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = sorted(tmp_path.glob("parts-*.gguf"))
    second.unlink()
    report = inspect_model(first)
    assert [f"{second}: not found" in reason for reason in report["refusals"]] == [True]
    assert report["architecture"]["name"] == "llama"
    assert report["context"] == 64


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(model_path("gguf_llama_q8_0").read_bytes()[:-1000])
    report = inspect_model(path)
    assert not report["supported"]
    assert "the file may be cut short" in report["refusals"][0]
    assert report["path"] == str(path)
    assert report["architecture"] is None


@pytest.mark.parametrize("name", ["absent.gguf", "text.gguf", "", "empty"])
def test_where_there_is_no_model_it_is_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "empty").mkdir()
    assert main(["inspect", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
