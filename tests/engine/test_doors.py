"""What the engine lacks is refused by name at the door: before a weight is read, or a kernel compiled."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from pagellm.engine import loading
from pagellm.engine.checkpoints import open_checkpoint
from pagellm.engine.checkpoints.base import WeightFile
from pagellm.engine.errors import CheckpointError
from pagellm.engine.loading import load_engine

ARCHITECTURES = Path(__file__).parents[1] / "fixtures" / "architectures"
DIRECTORIES = sorted(path.parent.name for path in ARCHITECTURES.glob("*/config.json"))
FILES = sorted(path.parent.name for path in ARCHITECTURES.glob("*/model.gguf"))


@contextmanager
def headers_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails if a byte of a weight is read, or kernels are compiled."""
    with open_checkpoint(path) as checkpoint:
        begins = {file.path: file.num_bytes for file in checkpoint.files}
        for tensor in checkpoint.tensors.values():
            # The factors of RoPE are configuration, which GGUF files keep in tensors.
            if not tensor.name.startswith("rope_"):
                begins[tensor.file.path] = min(begins[tensor.file.path], tensor.offset)
    read = WeightFile.read

    def read_header(self: WeightFile, offset: int, num_bytes: int) -> Any:
        assert offset + num_bytes <= begins[self.path], "a weight was read"
        return read(self, offset, num_bytes)

    def compile_kernels(*_: object) -> None:
        pytest.fail("kernels were compiled")

    monkeypatch.setattr(WeightFile, "read", read_header)
    monkeypatch.setattr(loading, "compile_kernels", compile_kernels)
    yield


def with_keys(tmp_path: Path, name: str, keys: dict[str, Any]) -> Path:
    """A copy of a fixture's directory with these keys in its config.json."""
    directory = tmp_path / name
    shutil.copytree(ARCHITECTURES / name, directory, ignore=shutil.ignore_patterns("*.gguf", "*.npz"))
    config = json.loads((directory / "config.json").read_text())
    # What stands in a larger model's configuration describes the part that is served.
    (config["text_config"] if isinstance(config.get("text_config"), dict) else config).update(keys)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def with_metadata(tmp_path: Path, name: str, keys: dict[str, Any], architecture: str | None = None) -> Path:
    """A copy of a fixture's GGUF file with these keys, under its architecture's prefix."""
    reader = gguf.GGUFReader(ARCHITECTURES / name / "model.gguf")
    old = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture or old)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        key = key.replace(f"{old}.", f"{architecture or old}.", 1) if key.startswith(f"{old}.") else key
        if key.partition(".")[2] not in keys:
            writer.add_key_value(key, field.contents(), field.types[0], element)
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for key, value in keys.items():
        kind = kinds.get(type(value), gguf.GGUFValueType.STRING)
        writer.add_key_value(f"{architecture or old}.{key}", value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(CheckpointError) as caught, headers_alone(path, monkeypatch):
        load_engine(path)
    return str(caught.value)


# Of a config.json: keys of features that nobody here knows, and values of known keys that ask for one.
UNKNOWN_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"attention_window_pattern_v2": 512}, "attention_window_pattern_v2"),
    ({"router_logit_softcapping": 30.0}, "router_logit_softcapping"),
    ({"use_differential_attention": True}, "use_differential_attention"),
    # Which mixtures know: they have not so many.
    (
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        r"num_|(router(\.layer)?|gate)\.weight (has|is missing)",
    ),
    ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: found 'gptq'"),
]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_every_architecture_refuses_a_config_that_asks_for_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index, (keys, expected) in enumerate(UNKNOWN_KEYS):
        path = with_keys(tmp_path / str(index), name, keys)
        with monkeypatch.context() as patch:
            message = refusal(path, patch)
        assert str(path) in message
        assert re.search(expected, message), f"{keys}: {message}"


UNKNOWN_METADATA: list[tuple[dict[str, Any], str]] = [
    ({"attention.window_pattern_v2": 512}, r"attention\.window_pattern_v2: found 512"),
    ({"router_logit_softcapping": 30.5}, r"router_logit_softcapping: found 30\.5"),
    ({"expert_count": 8}, r"expert_count: found 8|expert_used_count|ffn_gate_inp\.weight has|8 experts"),
    ({"rope.scaling.type": "spiral"}, r"rope\.scaling\.type: found 'spiral'"),
    ({"attention.causal": False}, r"attention\.causal: found False"),
]


@pytest.mark.parametrize("name", FILES)
def test_every_architecture_refuses_metadata_that_asks_for_more(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keys, expected in UNKNOWN_METADATA:
        path = with_metadata(tmp_path, name, keys)
        with monkeypatch.context() as patch:
            message = refusal(path, patch)
        assert re.search(expected, message), f"{keys}: {message}"


def test_an_unknown_architecture_is_refused_with_what_is_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never computed as if it were Llama, although all its tensors are named so."""
    directory = with_keys(tmp_path, "qwen3", {"model_type": "qwen9"})
    file = with_metadata(tmp_path, "qwen3", {}, architecture="qwen9")
    for path in (directory, file):
        with monkeypatch.context() as patch:
            message = refusal(path, patch)
        assert "found 'qwen9', expected an architecture that is supported: " in message
        assert "qwen3" in message
        assert "llama" in message


def test_an_unknown_type_of_tensor_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_metadata(tmp_path, "qwen3", {})
    with open_checkpoint(path) as checkpoint:
        name = next(name for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2)
        kind = checkpoint.tensors[name].dtype
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    assert int.from_bytes(data[at : at + 4], "little") == gguf.GGMLQuantizationType[kind]
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    message = refusal(path, monkeypatch)
    assert f"tensor {name} has type 99, expected one of F32" in message


def test_tensors_of_a_feature_are_refused_where_the_configuration_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention sinks, say, which only a tensor tells of."""
    source = with_metadata(tmp_path, "qwen3", {})
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(tmp_path / "sinks.gguf", "qwen3")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.0.attn_sinks.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "tensor blk.0.attn_sinks.weight has no place" in refusal(tmp_path / "sinks.gguf", monkeypatch)
