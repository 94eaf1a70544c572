"""Mean squares of the inputs of matrices, held against transformers (tests/fixtures/quantizers)."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import save_file

from pagellm.engine import LLM, CheckpointError, ConfigError
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.models import read_spec
from pagellm.engine.quantization.divergence import engine_settings, windows
from pagellm.engine.quantization.importance import by_tensor, mean_squares, read_importance
from pagellm.engine.quantization.model import Settings, quantize_model
from pagellm.kernels.quantizers import quantize
from tests.conftest import ARCHITECTURES, MODELS, model_path

EXPECTED = np.load(Path(__file__).parents[1] / "fixtures" / "quantizers" / "importance.npz")
CASES = sorted({name.partition("/")[0] for name in EXPECTED})


@pytest.mark.parametrize("name", CASES)
def test_mean_squares_are_those_of_transformers(name: str) -> None:
    token_ids = np.load(ARCHITECTURES / name / "expected.npz")["input_ids"].tolist()
    with open_checkpoint(model_path(name)) as checkpoint:
        spec = read_spec(checkpoint)
    with LLM(model_path(name), config=engine_settings("none", 64), show_progress=False) as llm:
        before = llm.logits(token_ids)
        means = by_tensor(mean_squares(llm, [token_ids]), spec)
        assert np.array_equal(llm.logits(token_ids), before)
        again = by_tensor(mean_squares(llm, [token_ids, token_ids]), spec)
    expected = {key.partition("/")[2]: EXPECTED[key] for key in EXPECTED if key.startswith(f"{name}/")}
    [head] = spec.rest["embedding" if spec.arch.tied else "lm_head"]
    expected[head.tensor] = expected.pop("lm_head.weight")
    for layer, parts in enumerate(spec.layers):
        for part in ("up", "down"):
            sources = parts.get(f"expert_{part}", ())
            each = expected.pop(f"experts.{layer}.{part}", None)
            assert (each is not None) == bool(sources)
            for index, source in enumerate(sources):
                expected[source.tensor] = each[index * len(each) // len(sources)]
        for source in parts.get("router", ())[:1]:  # which is no linear layer of transformers
            assert means.pop(source.tensor).shape == (spec.arch.hidden_size,)
        # In a directory one tensor has the matrices of keys and values.
        for source in parts.get("key_up", ())[:1]:
            del expected[source.tensor]
    expected = {tensor: mean for tensor, mean in expected.items() if not tensor.startswith("heads.")}
    assert means.keys() == expected.keys()
    for tensor, mean in expected.items():
        np.testing.assert_allclose(means[tensor], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(again[tensor], means[tensor])


@pytest.mark.parametrize("name", ["deepseek_v2", "glm4_moe_lite", "qwen3_moe"])
def test_stacked_matrices_have_the_means_of_each_head_or_expert(name: str) -> None:
    token_ids = np.load(ARCHITECTURES / name / "expected.npz")["input_ids"].tolist()
    with open_checkpoint(ARCHITECTURES / name / "model.gguf") as checkpoint:
        spec = read_spec(checkpoint)
    path = ARCHITECTURES / name / "model.gguf"
    with LLM(path, config=engine_settings("none", 64), show_progress=False) as llm:
        means = by_tensor(mean_squares(llm, [token_ids]), spec)
    tensors = {
        "experts": {"up": ("ffn_gate_exps", "ffn_up_exps"), "down": ("ffn_down_exps",)},
        "heads": {"key": ("attn_k_b",), "value": ("attn_v_b",)},
    }
    compared = 0
    for key in EXPECTED:
        case, _, rest = key.partition("/")
        kind, layer, part = (*rest.split("."), "", "")[:3]
        if case == name and kind in tensors:
            for tensor in tensors[kind][part]:
                found = means[f"blk.{layer}.{tensor}.weight"]
                np.testing.assert_allclose(found, EXPECTED[key], rtol=1e-4, atol=1e-6)
                compared += 1
    assert compared >= 6


def test_an_expert_that_no_token_reached_has_the_mean_of_the_others() -> None:
    path = ARCHITECTURES / "qwen3_moe" / "model.gguf"
    with LLM(path, config=engine_settings("none", 64), show_progress=False) as llm:
        means, row = mean_squares(llm, [[5]]), llm.engine.spec.arch.layers[0]
    ups, downs = means[0, "expert_up"], means[0, "expert_down"]
    assert len(ups) == len(downs) == row["num_experts"] == 7
    np.testing.assert_array_equal(ups, np.broadcast_to(ups[0], ups.shape))
    others = [index for index in range(7) if (downs == downs[index]).all(axis=1).sum() > 1]
    reached = [index for index in range(7) if index not in others]
    assert len(reached) == row["experts_per_token"] == 3
    np.testing.assert_allclose(downs[others[0]], downs[reached].mean(axis=0), rtol=1e-6)


def new_mixture(directory: Path) -> Path:
    """Random weights in the place of those of a mixture, with a tokenizer."""
    rng = np.random.default_rng(1)
    shutil.copytree(MODELS / "llama_tiny", directory)
    tiny = json.loads((directory / "config.json").read_text())
    config = {
        "model_type": "qwen3_moe", "vocab_size": tiny["vocab_size"], "hidden_size": 64, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "intermediate_size": 64,
        "norm_topk_prob": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (tiny["vocab_size"], 64), "lm_head": (tiny["vocab_size"], 64)}
    norms = ["model.norm"]
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.{name}_proj": shape
            for name, shape in (("q", (64, 64)), ("k", (32, 64)), ("v", (32, 64)), ("o", (64, 64)))
        }
        shapes[f"{prefix}.mlp.gate"] = 6, 64
        for expert in range(6):
            for name, shape in (("gate", (32, 64)), ("up", (32, 64)), ("down", (64, 32))):
                shapes[f"{prefix}.mlp.experts.{expert}.{name}_proj"] = shape
        norms += [f"{prefix}.input_layernorm", f"{prefix}.post_attention_layernorm"]
        norms += [f"{prefix}.self_attn.{name}_norm" for name in "qk"]
    tensors = {name: rng.normal(0, shape[-1] ** -0.5, shape) for name, shape in shapes.items()}
    sizes = {name: 16 if name.endswith(("q_norm", "k_norm")) else 64 for name in norms}
    # Inputs of very different sizes, so that it matters which of them count.
    tensors |= {name: np.exp(rng.normal(0, 1.5, size)) for name, size in sizes.items()}
    weights = {f"{name}.weight": values.astype(np.float32) for name, values in tensors.items()}
    save_file(weights, directory / "model.safetensors")
    return directory


def test_a_text_makes_experts_better_by_the_tokens_that_each_has(tmp_path: Path) -> None:
    model, text = new_mixture(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog looked at the cat. " * 30)
    costs = []
    for number, imatrix in enumerate((None, text, text)):
        settings = Settings("Q4_0", pure=True, imatrix=imatrix, text=text, text_tokens=200)
        report = quantize_model(str(model), tmp_path / f"{number}.gguf", settings)
        # Of an embedding rows are looked up.
        assert report.written.without_importance == ("token_embd.weight",) * (imatrix is not None)
        assert report.written.tensors["Q4_0"] >= 2 * 7
        costs.append(report.divergence.mean if report.divergence else np.nan)
    assert costs[1] < costs[0]
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    # Each expert is rounded by its own means: those of all of them make others.
    with LLM(model, config=engine_settings("none", 256), show_progress=False) as llm:
        means = mean_squares(llm, windows(llm, text.read_text(), None))
    with open_checkpoint(tmp_path / "1.gguf") as checkpoint, open_checkpoint(model) as source:
        tensor = checkpoint.tensors["blk.1.ffn_down_exps.weight"]
        for expert in range(6):
            own = source.tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"]
            rows, written = own.rows(0, 64), tensor.part((64, 32), expert).quantized_rows(0, 64)
            expected = quantize("Q4_0", rows, means[1, "expert_down"][expert])
            np.testing.assert_array_equal(written.reshape(64, -1), expected)
            other = quantize("Q4_0", rows, means[1, "expert_down"][(expert + 1) % 6])
            assert not np.array_equal(expected, other)


def test_a_text_makes_matrices_better_where_inputs_are_large(tmp_path: Path) -> None:
    model, text = str(MODELS / "llama_tiny"), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat, and the dog looked at the cat. " * 30)
    costs = []
    for number, imatrix in enumerate((None, text, text)):
        settings = Settings("Q4_0", imatrix=imatrix, text=text, text_tokens=200)
        report = quantize_model(model, tmp_path / f"{number}.gguf", settings)
        assert report.written.without_importance == ()
        costs.append(report.divergence.mean if report.divergence else np.nan)
    assert costs[1] < costs[0]
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "2.gguf").read_bytes()
    with open_checkpoint(tmp_path / "1.gguf") as checkpoint:
        assert checkpoint.config["quantize.imatrix.file"] == "text.txt"


def write_imatrix(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> None:
    writer = GGUFWriter(path, "")
    writer.add_type("imatrix")
    for name, values in sums.items():
        writer.add_tensor(f"{name}.in_sum2", values.astype(np.float32))
        if name in counts:
            writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_importance_matrix_of_llama_cpps_is_read(tmp_path: Path) -> None:
    sums = {"blk.0.ffn_down.weight": np.array([[2.0, 4.0]]), "experts": np.array([[1.0, 2.0], [0.0, 0.0]])}
    counts = {"blk.0.ffn_down.weight": np.array([[2.0]]), "experts": np.array([[4.0], [0.0]])}
    write_imatrix(tmp_path / "imatrix.gguf", sums, counts)
    found = read_importance(tmp_path / "imatrix.gguf")
    np.testing.assert_array_equal(found["blk.0.ffn_down.weight"], [1, 2])
    # One that no token reached has the mean of the others.
    np.testing.assert_array_equal(found["experts"], [[0.25, 0.5], [0.25, 0.5]])
    del counts["experts"]
    write_imatrix(tmp_path / "broken.gguf", sums, counts)
    with pytest.raises(CheckpointError, match="no float32 sums with counts"):
        read_importance(tmp_path / "broken.gguf")


def test_what_it_lacks_is_said_and_what_is_none_is_refused(tmp_path: Path) -> None:
    model, out = str(MODELS / "llama_tiny"), tmp_path / "out.gguf"
    write_imatrix(tmp_path / "i.gguf", {"other": np.ones((1, 2))}, {"other": np.ones((1, 1))})
    report = quantize_model(model, out, Settings("Q4_0", imatrix=tmp_path / "i.gguf", text_tokens=0))
    assert "blk.0.attn_q.weight" in report.written.without_importance
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for bad in (tmp_path / "latin.txt", tmp_path / "nowhere.txt"):
        with pytest.raises(ConfigError, match="cannot be read"):
            quantize_model(model, tmp_path / "b.gguf", Settings("Q4_0", imatrix=bad, text_tokens=0))
    wrong = MODELS / "gguf_llama_f32" / "model.gguf"
    with pytest.raises(CheckpointError, match="expected 'imatrix'"):
        quantize_model(model, tmp_path / "b.gguf", Settings("Q4_0", imatrix=wrong, text_tokens=0))
    name = "blk.0.attn_q.weight"
    write_imatrix(tmp_path / "short.gguf", {name: np.ones((1, 2))}, {name: np.ones((1, 1))})
    settings = Settings("Q4_0", imatrix=tmp_path / "short.gguf", text_tokens=0)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight: found an importance of \[2\]"):
        quantize_model(model, tmp_path / "b.gguf", settings)
    assert not (tmp_path / "b.gguf").exists()
