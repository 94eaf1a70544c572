"""Mean squares of the inputs of matrices, held against transformers (tests/fixtures/quantizers)."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from pagellm.engine import LLM, CheckpointError, ConfigError
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.models import read_spec
from pagellm.engine.quantization.divergence import engine_settings
from pagellm.engine.quantization.importance import by_tensor, mean_squares, read_importance
from pagellm.engine.quantization.model import Settings, quantize_model
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
    assert means.keys() == expected.keys()
    for tensor, mean in expected.items():
        np.testing.assert_allclose(means[tensor], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(again[tensor], means[tensor])


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
    np.testing.assert_array_equal(found["experts"], [[0.25, 0.5], [0, 0]])
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
