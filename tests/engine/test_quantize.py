"""`pagellm quantize`: what is written is what llama.cpp's converter writes, and what the engine reads back.

The oracles: GGUF files of llama.cpp's converter beside the checkpoints that they are of
(tests/fixtures/architectures), and transformers' logits of these.
"""

import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pagellm.__main__ import main
from pagellm.engine import LLM, CheckpointError, ConfigError, EngineConfig, PagellmError, SamplingParams
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.models import read_spec
from pagellm.engine.quantization import pieces, safetensors_form, writing
from pagellm.engine.quantization.gguf_architectures import FORMS
from pagellm.engine.quantization.mixes import Matrices, type_of
from pagellm.engine.quantization.model import Settings, quantize_model
from pagellm.engine.tokenizer import load_tokenizer
from tests.conftest import ARCHITECTURES, MODELS, QUANTIZED, model_path

DIRECTORIES = sorted(
    path.parent.name for top in (ARCHITECTURES, MODELS) for path in top.glob("*/config.json")
)
# Why GGUF, or llama.cpp's reader of it, has no place for a checkpoint.
REFUSED = {
    "bitnet": "an output matrix that is not the embedding",
    "cohere2_layers": "a bias of output",
    "deepseek_v2_groups": "a bias of down",
    "ernie4_5_bias": "a bias of down",
    "ernie4_5_moe_bias": "a bias of down",
    "falcon_sequential": "a bias of down",
    "gemma2_scalar": "attention_scale",
    "gemma3": "RoPE",
    "gemma3_text_old": "attention_scale",
    "gemma4_text_dense": "a bias of output",
    "glm4_moe_lite_layers": "a bias of output",
    "glm_epsilon": "48 wide beside a hidden state of 32",
    "gpt2_original_names": "activation",
    "gpt2_relu": "activation",
    "gpt_neox_sequential": "no bias of output",
    "llama_rope_dynamic": "rope_type: found 'dynamic'",
    "llama_rope_longrope": "rope_type: found 'longrope'",
    "llama_rope_yarn_attention_factor": "RoPE",
    "llama_rope_yarn_mscale": "RoPE",
    "minicpm3": "logits_scale",
    "minicpm3_bias": "a bias of output",
    "minicpm3_plain": "a bias of down",
    "olmoe_clip": "attention.clamp_kqv",
    "qwen2_moe_dense": "attention.sliding_window",
    "qwen3_moe_dense": "tensor blk.1.ffn_gate_inp.weight is missing",
    "starcoder2": "sliding_window: found 9",
}
WITH_GGUF = sorted(path.parent.name for path in ARCHITECTURES.glob("*/model.gguf"))


def refusal(name: str) -> str | None:
    """Why a directory is refused, or None; architectures without a form are by their names."""
    with open_checkpoint(model_path(name)) as checkpoint:
        spec = read_spec(checkpoint)
    return REFUSED.get(name) if spec.architecture in FORMS else "has no GGUF form here, .* of safetensors"


def has_experts(name: str) -> bool:
    with open_checkpoint(model_path(name)) as checkpoint:
        return bool((read_spec(checkpoint).arch.layers["num_experts"] > 0).any())


CONVERTED = [name for name in WITH_GGUF if refusal(name) is None]
MIXTURES = [name for name in WITH_GGUF if has_experts(name)]
PREDICTING = {"glm4_moe_lite": "blk.3."}
UNCOMPARED = Settings(text_tokens=0)


def written(name: str, out: Path, mix: str, **options: Any) -> writing.Written:
    with open_checkpoint(model_path(name)) as checkpoint:
        spec = read_spec(checkpoint)
        with pieces.whole_file(out) as (file, path):
            return writing.write_gguf(checkpoint, spec, file, path, mix, **options)


def logits(path: Path, token_ids: list[int], **settings: Any) -> np.ndarray:
    with LLM(path, config=EngineConfig(num_blocks=16, **settings), show_progress=False) as llm:
        return llm.logits(token_ids)


@pytest.mark.parametrize("name", CONVERTED)
def test_tensors_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    written(name, tmp_path / "out.gguf", "BF16")
    ours = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    theirs = {tensor.name: tensor for tensor in GGUFReader(ARCHITECTURES / name / "model.gguf").tensors}
    # A layer that predicts tokens further on is not written.
    theirs = {
        tensor: one for tensor, one in theirs.items() if not tensor.startswith(PREDICTING.get(name, "-"))
    }
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        # Of a layer without RoPE the converter reorders queries and keys, too, which changes nothing.
        if name == "smollm3" and tensor in ("blk.3.attn_q.weight", "blk.3.attn_k.weight"):
            continue
        own = ours[tensor]
        # DBRX's router, which the converter rounds like any other matrix.
        if "ffn_gate_inp" in tensor and own.tensor_type != expected.tensor_type:
            values = [dequantize(one.data, one.tensor_type) for one in (own, expected)]
            assert np.array_equal(*values), tensor
            continue
        assert own.tensor_type == expected.tensor_type, tensor
        assert np.array_equal(np.squeeze(own.data), np.squeeze(expected.data)), tensor


@pytest.mark.parametrize("name", CONVERTED)
def test_metadata_says_what_llama_cpps_converter_says(name: str, tmp_path: Path) -> None:
    written(name, tmp_path / "out.gguf", "BF16")
    theirs_path = ARCHITECTURES / name / "model.gguf"
    with open_checkpoint(tmp_path / "out.gguf") as ours, open_checkpoint(theirs_path) as theirs:
        assert ours.config["general.architecture"] == theirs.config["general.architecture"]
        for key, value in theirs.config.items():
            if name in PREDICTING and key in ("deepseek2.block_count",):
                continue
            # The converter does not read Falcon's context. What it lists by layer may be one number here.
            if key in ours.config and key not in ("general.name", "falcon.context_length"):
                assert np.all(np.asarray(ours.config[key]) == np.asarray(value)), key


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_becomes_a_file_with_its_logits_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    if (reason := refusal(name)) is not None:
        with pytest.raises(CheckpointError, match=reason):
            written(name, out, "F32")
        assert list(tmp_path.iterdir()) == []
        return
    written(name, out, "F32")
    expected = np.load(model_path(name) / "expected.npz")
    length = {"max_model_len": int(expected["max_model_len"])} if "max_model_len" in expected else {}
    found = logits(out, expected["input_ids"].tolist(), quantization="none", **length)
    assert np.abs(found - expected["logits"]).max() < 1e-4 * np.ptp(expected["logits"])


@pytest.mark.parametrize("mix", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K_M"])
def test_a_gguf_file_keeps_its_metadata_and_what_is_of_the_type_already(mix: str, tmp_path: Path) -> None:
    source, out = MODELS / "gguf_llama_q8_0" / "model.gguf", tmp_path / "out.gguf"
    report = written("gguf_llama_q8_0", out, mix)
    with open_checkpoint(source) as one, open_checkpoint(out) as other:
        changed = {"general.file_type", "general.quantization_version"}
        assert {key: str(value) for key, value in one.config.items() if key not in changed} == {
            key: str(value) for key, value in other.config.items() if key not in changed
        }
        assert one.tensors.keys() == other.tensors.keys()
        assert report.num_bytes == out.stat().st_size
        for name, tensor in one.tensors.items():
            kept = other.tensors[name]
            if kept.dtype == tensor.dtype:
                data = [each.file.read(each.offset, each.num_bytes) for each in (tensor, kept)]
                assert np.array_equal(*data), name
    # The gguf package reads it, too.
    for tensor in GGUFReader(out).tensors:
        assert np.isfinite(dequantize(tensor.data, tensor.tensor_type)).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_keeps_its_logits_from_file_to_file(name: str, tmp_path: Path) -> None:
    source, out = ARCHITECTURES / name / "model.gguf", tmp_path / "out.gguf"
    quantize_model(str(source), out, Settings("F32", text_tokens=0, allow_requantize=True))
    token_ids = np.load(ARCHITECTURES / name / "expected.npz")["input_ids"].tolist()
    exact, found = (logits(path, token_ids, quantization="none") for path in (source, out))
    assert np.array_equal(exact, found)
    settings = Settings("Q8_0", text_tokens=0, allow_requantize=True)
    quantize_model(str(source), tmp_path / "small.gguf", settings)
    for tensor in GGUFReader(tmp_path / "small.gguf").tensors:
        if "ffn_gate_inp" in tensor.name:
            assert tensor.tensor_type.name in ("F32", "BF16")  # as it was


def test_a_mix_gives_more_bits_where_llama_cpp_does() -> None:
    llama = Matrices("llama", num_layers=32, tied=False)
    types = [type_of("Q4_K_M", False, llama, f"blk.{layer}.ffn_down.weight", 4096) for layer in range(32)]
    more = [layer for layer, dtype in enumerate(types) if dtype == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert type_of("Q4_K_M", False, llama, "output.weight", 4096) == "Q6_K"
    assert type_of("Q4_K_M", True, llama, "output.weight", 4096) == "Q4_K"
    assert type_of("Q4_K_M", False, llama, "token_embd.weight", 4096) == "Q4_K"
    assert type_of("Q4_K_M", False, Matrices("llama", 32, tied=True), "token_embd.weight", 576) == "Q8_0"
    assert type_of("Q4_K_M", False, llama, "blk.3.attn_q.weight", 576) == "Q5_0"
    assert type_of("Q4_K_M", False, llama, "blk.3.attn_q.weight", 36) == "F16"
    assert type_of("Q4_0", False, llama, "blk.3.attn_v.weight", 4096) == "Q4_0"


LLAMA_CPP_TYPES = json.loads((ARCHITECTURES.parent / "quantizers" / "types.json").read_text())


@pytest.mark.parametrize("name", LLAMA_CPP_TYPES)
def test_a_mix_is_that_of_llama_cpps_quantizer(name: str) -> None:
    case = LLAMA_CPP_TYPES[name]
    model = Matrices(case["architecture"], 9, case["tied"], case["num_experts"])
    for mix, by_part in case["types"].items():
        for part, types in by_part.items():
            for layer, dtype in enumerate(types):
                tensor = part if "." in part else f"blk.{layer}.{part}.weight"
                assert dtype in ("", type_of(mix, False, model, tensor, 256)), (mix, tensor)


def test_a_tokenizer_and_its_chat_template_come_along(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(model_path("llama_tiny"), directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    quantize_model(str(directory), tmp_path / "out.gguf", Settings("Q8_0", text_tokens=0))
    with LLM(tmp_path / "out.gguf", num_blocks=16, show_progress=False) as llm:
        own, other = load_tokenizer(directory), llm.tokenizer
        for text in ("Hello, world! 123", "\n\t naïve  日本語 \U0001f680", ""):
            assert own.encode(text) == other.encode(text)
        assert own.eos_token_ids[0] == other.eos_token_ids[0]
        assert set(own.eos_token_ids) <= set(other.eos_token_ids)
        [answer] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=1))
        assert answer.prompt_token_ids == own.encode("Hello")


def test_few_bits_are_not_rounded_again_unless_that_is_asked_for(tmp_path: Path) -> None:
    model = str(MODELS / "gguf_llama_q4_1")
    with pytest.raises(ConfigError, match=r"matrices of type Q4_1, expected .* --allow-requantize"):
        quantize_model(model, tmp_path / "out.gguf", UNCOMPARED)
    quantize_model(model, tmp_path / "out.gguf", Settings(text_tokens=0, allow_requantize=True))
    assert (tmp_path / "out.gguf").exists()


def test_a_file_that_is_there_is_replaced_only_by_force(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(ConfigError, match="found a file, expected a name that is free, or --force"):
        quantize_model(str(MODELS / "gguf_llama_f32"), out, UNCOMPARED)
    assert out.read_bytes() == b"precious"
    quantize_model(str(MODELS / "gguf_llama_f32"), out, Settings(text_tokens=0, force=True))
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(ConfigError, match="no plain file"):
        quantize_model(str(MODELS / "gguf_llama_f32"), tmp_path, Settings(text_tokens=0, force=True))


def test_the_model_itself_is_never_replaced(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(MODELS / "gguf_llama_f32" / "model.gguf", model)
    link = tmp_path / "link.gguf"
    os.link(model, link)
    for out in (model, link):
        with pytest.raises(ConfigError, match="a file of the model itself"):
            quantize_model(str(model), out, Settings(text_tokens=0, force=True))
    assert model.read_bytes() == (MODELS / "gguf_llama_f32" / "model.gguf").read_bytes()


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    for out in (tmp_path / "no" / "such" / "place.gguf", tmp_path / ("a" * 300)):
        with pytest.raises(ConfigError, match=r"cannot be written"):
            quantize_model(str(MODELS / "gguf_llama_f32"), out, UNCOMPARED)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if not os.access(tmp_path, os.W_OK):
            with pytest.raises(ConfigError, match="Permission denied"):
                quantize_model(str(MODELS / "gguf_llama_f32"), tmp_path / "out.gguf", UNCOMPARED)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_file_that_is_not_whole_goes_away(
    fault: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fails(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 5:
            raise fault
        return quantize(*arguments)

    quantize = pieces.quantize
    monkeypatch.setattr(pieces, "quantize", fails)
    expected = KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else ConfigError
    with pytest.raises(expected):
        quantize_model(str(MODELS / "gguf_llama_f32"), tmp_path / "out.gguf", Settings("Q8_0", text_tokens=0))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_has_too_little_room_says_so_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(ConfigError, match="No space left on device"):
        quantize_model(str(MODELS / "gguf_llama_f32"), tmp_path / "out.gguf", UNCOMPARED)
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_type_cannot_hold_are_refused_by_tensor(tmp_path: Path) -> None:
    source = tmp_path / "model.gguf"
    shutil.copy(MODELS / "gguf_llama_f32" / "model.gguf", source)
    with open_checkpoint(source) as checkpoint:
        tensor = checkpoint.tensors["blk.0.ffn_up.weight"]
    with source.open("r+b") as file:
        file.seek(tensor.offset + 4 * tensor.shape[1] * 3)
        file.write(np.float32(np.inf).tobytes())
    with pytest.raises(CheckpointError, match=r"tensor blk.0.ffn_up.weight: found values that are infinite"):
        quantize_model(str(source), tmp_path / "out.gguf", Settings("Q8_0", text_tokens=0))


def test_the_cost_is_the_divergence_of_what_is_predicted(tmp_path: Path) -> None:
    model, text = MODELS / "llama_tiny", tmp_path / "text.txt"
    text.write_text("Once upon a time there was a tiny model. " * 9)
    report = quantize_model(str(model), tmp_path / "out.gguf", Settings("Q4_0", text=text, text_tokens=40))
    cost = report.divergence
    assert cost is not None
    token_ids = load_tokenizer(model).encode(text.read_text())[:40]
    rows = [
        logits(path, token_ids, quantization=kind).astype(np.float64)
        for path, kind in ((model, "none"), (tmp_path / "out.gguf", "auto"))
    ]
    p, q = (row - np.log(np.exp(row).sum(axis=1, keepdims=True)) for row in rows)
    each = (np.exp(p) * (p - q)).sum(axis=1)
    assert cost.num_tokens == 40
    assert cost.mean == pytest.approx(each.mean(), rel=1e-9)
    assert cost.standard_error == pytest.approx(each.std(ddof=1) / np.sqrt(40), rel=1e-9)
    assert cost.same_top_token == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_the_command_prints_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(MODELS / "llama_tiny")
    assert main(["quantize", model, "-o", str(tmp_path / "a.gguf"), "--type", "Q4_K", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["type"] == "Q4_K_M"
    assert report["written"]["num_bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert report["divergence"]["mean"] > 0
    assert main(["quantize", model, "-o", str(tmp_path / "b.gguf"), "--kl-tokens", "0"]) == 0
    assert "KL divergence: not measured" in capsys.readouterr().out
    assert main(["quantize", model, "-o", str(tmp_path / "c.gguf"), "--type", "Q9"]) == 2
    assert "type: found 'Q9'" in capsys.readouterr().err
    assert main(["quantize", model, "-o", str(tmp_path / "c.gguf"), "--kl-tokens", "-1"]) == 2
    assert "text_tokens: found -1, expected a number from 0 on (--kl-tokens)" in capsys.readouterr().err


def test_errors_are_the_projects_own(tmp_path: Path) -> None:
    for model in ("nowhere", str(tmp_path)):
        with pytest.raises(PagellmError):
            quantize_model(model, tmp_path / "out.gguf", UNCOMPARED)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", ["llama_tiny", "llama_sharded", "gpt_neox"])
def test_a_directory_becomes_one_of_another_type(name: str, dtype: str, tmp_path: Path) -> None:
    source, out = model_path(name), tmp_path / "out"
    report = quantize_model(str(source), out, Settings(dtype, text_tokens=0))
    with open_checkpoint(source) as one, open_checkpoint(out) as other:
        assert one.tensors.keys() == other.tensors.keys()
        for tensor in one.tensors.values():
            kept = other.tensors[tensor.name]
            is_converted = tensor.shape != () and tensor.dtype != "BOOL"
            assert (kept.shape, kept.dtype) == (tensor.shape, dtype if is_converted else tensor.dtype)
            if is_converted:
                rows = tensor.rows(0, tensor.shape[0])
                expected = torch_like(rows, dtype)
                np.testing.assert_array_equal(kept.rows(0, kept.shape[0]), expected)
    assert report.written.num_bytes == (out / "model.safetensors").stat().st_size
    kept_files = {path.name for path in source.iterdir() if path.suffix == ".json"} - {
        "model.safetensors.index.json"
    }
    assert {path.name for path in out.iterdir()} >= kept_files
    # The library reads it, too.
    with safe_open(out / "model.safetensors", "np") as file:
        assert set(file.keys()) == set(report_names(out))


def torch_like(rows: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the nearest, halves to even."""
    if dtype == "F32":
        return rows
    if dtype == "F16":
        return rows.astype(np.float16).astype(np.float32)
    words = rows.view(np.uint32).astype(np.uint64)
    kept, rest = words >> 16, words & 0xFFFF
    up = (rest > 0x8000) | ((rest == 0x8000) & (kept & 1 == 1))
    return ((kept + up) << 16).astype(np.uint32).view(np.float32)


def report_names(directory: Path) -> list[str]:
    with open_checkpoint(directory) as checkpoint:
        return list(checkpoint.tensors)


def test_a_configuration_may_be_any_json_that_can_be_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(MODELS / "llama_tiny", source)
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": "\ud800"}
    (source / "config.json").write_bytes(json.dumps(config).encode("utf-16"))
    quantize_model(str(source), tmp_path / "out", Settings("F32", text_tokens=0))
    written = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert written["_name_or_path"] == "\ud800"
    with open_checkpoint(tmp_path / "out") as checkpoint:
        read_spec(checkpoint)


@pytest.mark.parametrize("name", [".", "..", "", "inner/.."])
def test_a_directory_without_a_name_of_its_own_is_no_output(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner" if name != "inner/.." else tmp_path)
    assert main(["quantize", str(MODELS / "llama_tiny"), "-o", name, "--kl-tokens", "0"]) == 2
    assert "expected a name that is free" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["inner"]


def test_a_directory_is_not_made_of_or_over_what_it_cannot_be(tmp_path: Path) -> None:
    tiny = str(MODELS / "llama_tiny")
    with pytest.raises(ConfigError, match="type: found 'Q4_0', expected one of F32, F16, BF16"):
        quantize_model(tiny, tmp_path / "out", Settings("Q4_0", text_tokens=0))
    with pytest.raises(CheckpointError, match="found a GGUF file"):
        quantize_model(str(MODELS / "gguf_llama_f32"), tmp_path / "out", Settings(text_tokens=0))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("precious")
    with pytest.raises(ConfigError, match="expected a name that is free"):
        quantize_model(tiny, tmp_path / "full", Settings(text_tokens=0, force=True))
    assert (tmp_path / "full" / "file").read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"full"}
    (tmp_path / "empty").mkdir()
    report = quantize_model(tiny, tmp_path / "empty", Settings(text_tokens=20))
    assert report.divergence is not None
    config = json.loads((tmp_path / "empty" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


QUANTIZED_DIRECTORIES = sorted(path.parent.name for path in QUANTIZED.glob("*/config.json"))


def all_rows(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("name", QUANTIZED_DIRECTORIES)
def test_what_a_quantizer_wrote_becomes_plain_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the values that its levels stand for, which are those of its own library (test_quantized.py)."""
    for module in (writing, safetensors_form):
        monkeypatch.setattr(module, "PIECE_BYTES", 5000)  # a few rows
    source, settings = QUANTIZED / name, Settings("F32", text_tokens=0)
    own = all_rows(source)
    quantize_model(str(source), tmp_path / "plain", settings)
    found = all_rows(tmp_path / "plain")
    assert own.keys() == found.keys()
    for tensor, values in own.items():
        np.testing.assert_array_equal(found[tensor], values, err_msg=tensor)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    paths = [source, tmp_path / "plain", tmp_path / "out.gguf"]
    if name.startswith("qwen3_moe"):  # whose first layer has no experts
        with pytest.raises(CheckpointError, match=r"blk.0.ffn_gate_inp.weight is missing"):
            quantize_model(str(source), paths.pop(), settings)
    else:
        quantize_model(str(source), paths[2], settings)
    token_ids = np.load(source / "expected.npz")["input_ids"].tolist()
    expected, *others = (logits(path, token_ids, quantization="none") for path in paths)
    for values in others:
        np.testing.assert_array_equal(values, expected)


def test_zero_biases_of_quantized_matrices_do_not_come_along(tmp_path: Path) -> None:
    shutil.copytree(QUANTIZED / "gptq", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(256, np.float16)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    quantize_model(str(tmp_path / "model"), tmp_path / "out", Settings(text_tokens=20))
    assert "model.layers.0.mlp.up_proj.bias" not in report_names(tmp_path / "out")


@pytest.mark.parametrize("mix", ["BF16", "Q8_0", "Q4_K_M"])
def test_experts_in_mxfp4_stay_so_unless_that_is_asked_for(mix: str, tmp_path: Path) -> None:
    directory, file = ARCHITECTURES / "gpt_oss_mxfp4", ARCHITECTURES / "gpt_oss_mxfp4" / "model.gguf"
    expected = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    (tmp_path / "directory").mkdir()
    for file_name in ("config.json", "model.safetensors"):
        shutil.copy(directory / file_name, tmp_path / "directory")
    for number, source in enumerate((tmp_path / "directory", file)):
        out = tmp_path / f"{number}.gguf"
        quantize_model(str(source), out, Settings(mix, text_tokens=0))
        experts = [tensor for tensor in GGUFReader(out).tensors if "_exps.weight" in tensor.name]
        assert len(experts) == sum("_exps.weight" in name for name in expected)
        for tensor in experts:
            assert tensor.tensor_type.name == "MXFP4"
            np.testing.assert_array_equal(tensor.data, expected[tensor.name].data)
        again = tmp_path / f"again{number}.gguf"
        quantize_model(str(source), again, Settings(mix, text_tokens=0, allow_requantize=True))
        types = {t.tensor_type.name for t in GGUFReader(again).tensors if "_exps.weight" in t.name}
        assert "MXFP4" not in types
        with pytest.raises(ConfigError, match="matrices of type MXFP4"):
            quantize_model(str(source), again, Settings("Q4_0", pure=True, text_tokens=0, force=True))
    plain = tmp_path / "plain"
    quantize_model(str(tmp_path / "directory"), plain, Settings("F32", text_tokens=0))
    token_ids = np.load(directory / "expected.npz")["input_ids"].tolist()
    outs = [logits(path, token_ids, quantization="none") for path in (tmp_path / "directory", plain)]
    np.testing.assert_array_equal(*outs)


def edited(tmp_path: Path, name: str, **keys: Any) -> Path:
    """A copy of a checkpoint with other keys in its config.json."""
    shutil.copytree(model_path(name), tmp_path / name)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return tmp_path / name


def test_what_llama_cpp_has_otherwise_is_told(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 15e4, "factor": 4.0, "original_max_position_embeddings": 16}
    yarn |= {"beta_fast": 1.7, "beta_slow": 0.3}
    models = [
        edited(tmp_path / str(truncate), "gpt_oss", rope_scaling=None, rope_parameters=yarn | truncate)
        for truncate in ({"truncate": False}, {"truncate": True})
    ]
    report = quantize_model(str(models[0]), tmp_path / "out.gguf", Settings("F32", text_tokens=0))
    assert report.written.notes == (
        "GGUF's gpt-oss rounds the ends of YaRN's ramp to whole dimensions, which this model does not",
    )
    token_ids = list(range(40))
    outs = [logits(path, token_ids, quantization="none") for path in (*models, tmp_path / "out.gguf")]
    assert np.abs(outs[0] - outs[2]).max() > 1e-3 * np.ptp(outs[0])
    assert np.abs(outs[1] - outs[2]).max() < 1e-5 * np.ptp(outs[0])

    model = edited(tmp_path, "glm4_moe_lite", rms_norm_eps=1e-5)
    report = quantize_model(str(model), tmp_path / "glm.gguf", Settings("F32", text_tokens=0))
    notes = " ".join(report.written.notes)
    assert "one epsilon for all norms: 1e-05, not 1e-06, for those of compressed queries and keys" in notes
    assert "divides the scores of a token's experts by 6.10352e-05 at least, not 1e-20" in notes
    assert "not written: the layers that predict tokens further on are left alone" in notes
    report = quantize_model(
        str(model_path("deepseek_v3_halves")), tmp_path / "v3.gguf", Settings("F32", text_tokens=0)
    )
    assert "llama.cpp does not read deepseek2 with 2 layers" in report.written.notes[0]


def test_experts_whose_scores_a_file_cannot_say_are_refused(tmp_path: Path) -> None:
    model = edited(tmp_path, "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(CheckpointError, match="renormalize: found 0, which GGUF's qwen3moe has no place for"):
        quantize_model(str(model), tmp_path / "out.gguf", UNCOMPARED)


@pytest.mark.parametrize("name", ["gptj", "opt"])
def test_what_has_no_form_in_gguf_becomes_a_directory(name: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("never read")
    with pytest.raises(CheckpointError, match=r"which has no GGUF form here, .* a directory of safetensors"):
        # Before the text is computed with, for which there is no tokenizer.
        quantize_model(str(model_path(name)), tmp_path / "out.gguf", Settings("Q4_0", imatrix=text))
    quantize_model(str(model_path(name)), tmp_path / "out", Settings("F32", text_tokens=0))
    token_ids = np.load(model_path(name) / "expected.npz")["input_ids"].tolist()
    outs = [logits(path, token_ids, quantization="none") for path in (model_path(name), tmp_path / "out")]
    np.testing.assert_array_equal(*outs)


def test_gemma_4_without_experts_is_written_too(tmp_path: Path) -> None:
    model = edited(tmp_path, "gemma4_text_dense", attention_bias=False)
    plain = {name: values for name, values in all_rows(model).items() if not name.endswith("_proj.bias")}
    save_file(plain, model / "model.safetensors")
    quantize_model(str(model), tmp_path / "out.gguf", Settings("F32", text_tokens=0))
    outs = [logits(path, list(range(40)), quantization="none") for path in (model, tmp_path / "out.gguf")]
    assert np.abs(outs[0] - outs[1]).max() < 1e-5 * np.ptp(outs[0])


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "olmo2"])
def test_an_output_matrix_is_copied_where_a_form_must_have_one(name: str, tmp_path: Path) -> None:
    model = edited(tmp_path, name, tie_word_embeddings=True)
    tensors = {key: values for key, values in all_rows(model).items() if key != "lm_head.weight"}
    save_file(tensors, model / "model.safetensors")
    report = quantize_model(str(model), tmp_path / "out.gguf", Settings("F32", text_tokens=0))
    assert "the output matrix is a copy of the embedding" in report.written.notes
    assert "output.weight" in {tensor.name for tensor in GGUFReader(tmp_path / "out.gguf").tensors}
    outs = [logits(path, list(range(40)), quantization="none") for path in (model, tmp_path / "out.gguf")]
    assert np.abs(outs[0] - outs[1]).max() < 1e-5 * np.ptp(outs[0])
