"""Reading weights: both formats give the same rows lazily, and a broken safetensors model is refused."""

import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pagellm.engine.checkpoints import Checkpoint, open_checkpoint
from pagellm.engine.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def header_of(tensors: dict[str, tuple[str, list[int], int]]) -> dict[str, Any]:
    """A header of tensors that follow each other, from (type, shape, bytes)."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape, num_bytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    return header


def file_bytes(header: Any, data: bytes, header_length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if header_length is None else header_length) + raw + data


def model_directory(path: Path, weights: bytes | None = None, config: str = "{}") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(config)
    if weights is not None:
        (path / WEIGHTS).write_bytes(weights)
    return path


def refusal(path: Path) -> str:
    """The message with which opening the path is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: tensor.rows(0, tensor.shape[0]) for name, tensor in checkpoint.tensors.items()}


# Whole models


def test_reads_what_the_safetensors_library_reads() -> None:
    expected = load_file(FIXTURES / "llama_gqa" / WEIGHTS)
    with open_checkpoint(FIXTURES / "llama_gqa") as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.config["num_key_value_heads"] == 2
        assert checkpoint.tensors.keys() == expected.keys()
        for name, values in read_all(checkpoint).items():
            assert values.dtype == np.float32
            assert values.flags.c_contiguous
            np.testing.assert_array_equal(values, expected[name])


def test_every_fixture_opens_and_reads_to_finite_values() -> None:
    cases = sorted(path.parent for path in FIXTURES.glob("*/expected.npz"))
    assert len(cases) >= 20
    for case in cases:
        gguf_file = case / "model.gguf"
        with open_checkpoint(gguf_file if gguf_file.exists() else case) as checkpoint:
            assert checkpoint.tensors
            for name, values in read_all(checkpoint).items():
                assert values.shape == checkpoint.tensors[name].shape
                assert np.isfinite(values).all(), f"{case.name}: {name}"


def test_shards_are_one_checkpoint() -> None:
    with open_checkpoint(FIXTURES / "llama_sharded") as checkpoint:
        assert len(checkpoint.files) > 1
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= checkpoint.tensors.keys()
        assert checkpoint.tensors["lm_head.weight"].dtype == "BF16"


def test_rows_are_the_same_in_any_cut() -> None:
    with open_checkpoint(FIXTURES / "llama_bf16") as checkpoint:
        tensor = checkpoint.tensors["model.embed_tokens.weight"]
        whole = tensor.rows(0, tensor.shape[0])
        pieces = [tensor.rows(row, min(row + 5, tensor.shape[0])) for row in range(0, tensor.shape[0], 5)]
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
        assert tensor.rows(7, 7).shape == (0, tensor.shape[1])


def test_bfloat16_is_the_upper_half_of_float32(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, math.inf, 3.0e38, 1e-40], dtype=np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2")
    directory = model_directory(
        tmp_path / "m", file_bytes(header_of({"a": ("BF16", [5], 10)}), halves.tobytes())
    )
    expected = (halves.astype(np.uint32) << 16).view(np.float32)
    with open_checkpoint(directory) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(0, 5), expected)
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(1, 3), [-2.5, math.inf])


def test_float16_keeps_every_value(tmp_path: Path) -> None:
    halves = np.arange(1 << 16, dtype="<u2")
    directory = model_directory(
        tmp_path / "m", file_bytes(header_of({"a": ("F16", [256, 256], 1 << 17)}), halves.tobytes())
    )
    with open_checkpoint(directory) as checkpoint:
        values = checkpoint.tensors["a"].rows(0, 256).ravel()
    np.testing.assert_array_equal(values, halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("rows", [(-1, 2), (0, 4), (2, 1)])
def test_rows_outside_the_tensor_are_an_index_error(tmp_path: Path, rows: tuple[int, int]) -> None:
    directory = model_directory(tmp_path / "m", file_bytes(header_of({"a": ("F32", [3], 12)}), bytes(12)))
    with open_checkpoint(directory) as checkpoint, pytest.raises(IndexError, match="which has 3"):
        checkpoint.tensors["a"].rows(*rows)


def test_a_tensor_that_nobody_reads_may_have_any_type(tmp_path: Path) -> None:
    header = header_of({"mask": ("BOOL", [4], 4), "scalar": ("F32", [], 4), "a": ("F32", [2], 8)})
    directory = model_directory(tmp_path / "m", file_bytes(header, bytes(16)))
    with open_checkpoint(directory) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(0, 2), [0, 0])
        with pytest.raises(CheckpointError, match=r"'mask' has type BOOL, expected one of F32, F16, BF16"):
            checkpoint.tensors["mask"].rows(0, 4)
        with pytest.raises(CheckpointError, match=r"'scalar' has shape \[\], expected rows"):
            checkpoint.tensors["scalar"].rows(0, 1)


def test_a_file_cut_after_opening_is_reported(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "m", file_bytes(header_of({"a": ("F32", [4], 16)}), bytes(16)))
    with open_checkpoint(directory) as checkpoint:
        with (directory / WEIGHTS).open("r+b") as file:
            file.truncate(80)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ended at byte 80, expected at least"):
            checkpoint.tensors["a"].rows(0, 4)


PEAK_MEMORY = """
import re, sys
import numpy as np
from pagellm.engine.checkpoints import open_checkpoint

def peak_kib():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

with open_checkpoint(sys.argv[1]) as checkpoint:
    tensor = checkpoint.tensors["a"]
    tensor.rows(0, 1024)
    before = peak_kib()
    for row in range(0, tensor.shape[0], 1024):
        tensor.rows(row, row + 1024)
    print(peak_kib() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak memory")
def test_reading_holds_one_slice_in_memory(tmp_path: Path) -> None:
    num_bytes = 64 << 20
    header = header_of({"a": ("F32", [num_bytes // 4096, 1024], num_bytes)})
    directory = model_directory(tmp_path / "m", file_bytes(header, b""))
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate((directory / WEIGHTS).stat().st_size + num_bytes)
    command = [sys.executable, "-c", PEAK_MEMORY, str(directory)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12 << 10


# Broken safetensors files


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN_FILES = {
    "empty": (b"", "0 bytes"),
    "shorter than the length": (b"abc", "in a file of 3"),
    "huge header": (file_bytes({}, bytes(16), header_length=1 << 62), str(1 << 62)),
    "header of nothing": (file_bytes(b"", b""), "header of 0 bytes"),
    "header not JSON": (file_bytes(b"garbage{", b""), "not a valid safetensors file"),
    "header deeply nested": (file_bytes(b"[" * 100_000, b""), "not a valid safetensors file"),
    "header a list": (file_bytes([], b""), "not a valid safetensors file"),
    "entry a number": (file_bytes({"a": 5}, b""), "not a valid safetensors file"),
    "cut short": (file_bytes({"a": entry("F32", [4], 0, 16)}, bytes(12)), "'a' ends at byte 16"),
    "bytes left over": (file_bytes({"a": entry("F32", [4], 0, 16)}, bytes(20)), "not fully covered"),
    "offsets unlike the shape": (
        file_bytes({"a": entry("F32", [4], 0, 12)}, bytes(12)),
        "'a' has 12 bytes, expected 16 for F32 [4]",
    ),
    "offsets overlap": (
        file_bytes({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, bytes(12)),
        "invalid offset for tensor `b`",
    ),
    "offsets reversed": (file_bytes({"a": entry("F32", [2], 8, 0)}, bytes(8)), "'a' has -8 bytes"),
    "offset negative": (file_bytes({"a": entry("F32", [2], -8, 0)}, bytes(8)), "-8"),
    "shape negative": (file_bytes({"a": entry("F32", [-2, -2], 0, 16)}, bytes(16)), "-2"),
    "shape huge": (file_bytes({"a": entry("F32", [1 << 62, 1 << 62], 0, 16)}, bytes(16)), "'a' has 16 bytes"),
    "shape of fractions": (file_bytes({"a": entry("F32", [1.5], 0, 6)}, bytes(6)), "1.5"),
    "unknown type": (file_bytes({"a": entry("F99", [2], 0, 8)}, bytes(8)), "F99"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    message = refusal(model_directory(tmp_path / "m", content))
    assert message.startswith(str(tmp_path / "m" / WEIGHTS))
    assert reason in message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = file_bytes(header_of({"a": ("F32", [2, 2], 16), "b": ("BF16", [3], 6)}), bytes(22))
    for length in range(len(whole)):
        refusal(model_directory(tmp_path / "m", whole[:length]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(file_bytes(header_of({"a": ("F32", [2, 2], 16), "b": ("BF16", [3], 6)}), bytes(22)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        with open_checkpoint(model_directory(tmp_path / "m", bytes(content))) as checkpoint:
            read_all(checkpoint)
    except CheckpointError:
        pass


# Broken directories


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ("[" * 100_000, "not JSON"),
        ("", "not JSON"),
    ],
)
def test_config_must_be_a_json_object(tmp_path: Path, config: str, reason: str) -> None:
    message = refusal(model_directory(tmp_path / "m", config=config))
    assert message.startswith(f"{tmp_path / 'm' / 'config.json'}: {reason}")


def test_config_must_be_text(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "m")
    (directory / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    assert "config.json: not JSON" in refusal(directory)


def test_config_must_exist(tmp_path: Path) -> None:
    assert "config.json: not found" in refusal(tmp_path)


def test_a_path_must_exist(tmp_path: Path) -> None:
    assert "nothing: not found" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("pytorch_model.bin", "weights only as pytorch_model.bin, expected model.safetensors"),
        ("model.Q8_0.gguf", "model.Q8_0.gguf: 0 bytes, too short for a GGUF file"),
        ("README.md", "no weights, expected model.safetensors"),
    ],
)
def test_a_directory_without_safetensors_says_what_is_there(tmp_path: Path, other: str, reason: str) -> None:
    directory = model_directory(tmp_path / "m")
    (directory / other).touch()
    assert reason in refusal(directory)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 5])
def test_a_shard_stays_in_the_directory(tmp_path: Path, shard: Any) -> None:
    directory = model_directory(tmp_path / "m")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    assert f"tensor 'a' is in {shard!r}, expected a file name" in refusal(directory)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_must_map_tensors(tmp_path: Path, index: dict[str, Any]) -> None:
    directory = model_directory(tmp_path / "m")
    (directory / INDEX).write_text(json.dumps(index))
    assert "weight_map: found" in refusal(directory)


def sharded_copy(path: Path) -> tuple[Path, str]:
    """A copy of the sharded fixture and the name of its first shard."""
    shutil.copytree(FIXTURES / "llama_sharded", path)
    return path, min(json.loads((path / INDEX).read_text())["weight_map"].values())


def test_every_shard_must_exist(tmp_path: Path) -> None:
    directory, shard = sharded_copy(tmp_path / "m")
    (directory / shard).unlink()
    assert refusal(directory).startswith(f"{directory / shard}: not found, but {INDEX} has")


def test_a_tensor_must_be_in_its_shard(tmp_path: Path) -> None:
    directory, shard = sharded_copy(tmp_path / "m")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"]["ghost.weight"] = shard
    (directory / INDEX).write_text(json.dumps(index))
    assert refusal(directory).startswith(f"{directory / shard}: no tensor 'ghost.weight'")


# What lies beside the model, and files that are none


def test_a_file_beside_the_index_that_lacks_its_tensors_is_not_the_model(tmp_path: Path) -> None:
    directory, _ = sharded_copy(tmp_path / "m")
    (directory / WEIGHTS).write_bytes(file_bytes(header_of({"other": ("F32", [2], 8)}), bytes(8)))
    with open_checkpoint(directory) as checkpoint, open_checkpoint(FIXTURES / "llama_sharded") as expected:
        assert checkpoint.tensors == expected.tensors


def merged_copy(path: Path) -> tuple[Path, str]:
    """The sharded fixture with all of its tensors in one file, too, and the name of a shard."""
    directory, shard = sharded_copy(path)
    with open_checkpoint(directory) as checkpoint:
        tensors = {
            name: (tensor.dtype, list(tensor.shape), 2 * math.prod(tensor.shape))
            for name, tensor in checkpoint.tensors.items()
        }
        data = b"".join(
            tensor.file.read(tensor.offset, 2 * math.prod(tensor.shape)).tobytes()
            for tensor in checkpoint.tensors.values()
        )
    (directory / WEIGHTS).write_bytes(file_bytes(header_of(tensors), data))
    return directory, shard


def test_two_whole_models_in_a_directory_are_both_named(tmp_path: Path) -> None:
    directory, _ = merged_copy(tmp_path / "m")
    assert f"found both {WEIGHTS} and {INDEX} with its shards" in refusal(directory)


def test_an_index_whose_shards_are_gone_is_no_model(tmp_path: Path) -> None:
    directory, shard = merged_copy(tmp_path / "m")
    (directory / shard).unlink()
    with open_checkpoint(directory) as checkpoint:
        assert [file.path.name for file in checkpoint.files] == [WEIGHTS]


@pytest.mark.parametrize("shard", ["s" * 256, "é" * 128, "a\0b", "\ud800"])
def test_a_shard_has_a_name_that_a_file_can_have(tmp_path: Path, shard: str) -> None:
    directory = model_directory(tmp_path / "m")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    message = refusal(directory)
    assert "tensor 'a' is in" in message
    assert len(message) < 400


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX, "shard.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    directory = model_directory(tmp_path / "m")
    if name != WEIGHTS:
        (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "shard.safetensors"}}))
    path = directory / name
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    message = refusal(directory)
    assert message.startswith(f"{path}: cannot be ")
    assert message.endswith(("no plain file", "Is a directory"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_a_path_to_no_plain_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert "neither a directory nor a plain file" in refusal(tmp_path / "fifo")


def test_a_configuration_is_of_some_megabytes_at_most(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "m")
    with (directory / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "config.json: cannot be read: more than 16777216 bytes" in refusal(directory)


def test_an_integer_of_thousands_of_digits_is_one_short_line(tmp_path: Path) -> None:
    message = refusal(model_directory(tmp_path / "m", config=f'{{"vocab_size": {"9" * 5000}}}'))
    assert "config.json: not JSON: JSON beyond limits (" in message
    assert len(message) < 400


def test_a_megabyte_in_a_file_is_a_short_line_in_the_message(tmp_path: Path) -> None:
    long = "x" * (1 << 20)
    directory = model_directory(tmp_path / "m")
    for weight_map in ({long: "../x"}, {"a": f"../{long}"}, {"a": [long]}, [long], {long: "absent"}):
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert len(refusal(directory)) < 500
    (directory / INDEX).unlink()
    for header in ({long: entry("F32", [4], 0, 12)}, {long: entry(long, [4], 0, 12)}, {"a": long}, {long: 1}):
        (directory / WEIGHTS).write_bytes(file_bytes(header, bytes(12)))
        assert len(refusal(directory)) < 500
