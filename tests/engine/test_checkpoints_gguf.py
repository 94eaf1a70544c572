"""GGUF: the reader agrees with the gguf library on whole files and refuses broken ones."""

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagellm.engine.checkpoints import BLOCK_SIZES, open_checkpoint
from pagellm.engine.errors import CheckpointError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
GGUF_FIXTURES = sorted(path.parent.name for path in FIXTURES.glob("*/model.gguf"))
UINT32, STRING, ARRAY, BOOL = 4, 8, 9, 7
HUGE = 1 << 62


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + value


def array(element_type: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", element_type, count) + values


def tensor(
    name: str | bytes, dims: list[int], kind: int = 0, offset: int = 0, num_dims: int | None = None
) -> bytes:
    num_dims = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", num_dims, *dims, kind, offset)


def gguf_bytes(
    metadata: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
    alignment: int = 32,
) -> bytes:
    num_tensors = len(tensors) if num_tensors is None else num_tensors
    num_entries = len(metadata) if num_entries is None else num_entries
    header = magic + struct.pack("<IQQ", version, num_tensors, num_entries) + b"".join([*metadata, *tensors])
    return header + bytes(-len(header) % alignment) + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", GGUF_FIXTURES)
def test_reads_what_the_gguf_library_reads(name: str) -> None:
    path = FIXTURES / name / "model.gguf"
    reader = gguf.GGUFReader(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gguf"
        fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert checkpoint.config.keys() == fields.keys()
        for key, field in fields.items():
            value = checkpoint.config[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
        assert list(checkpoint.tensors) == [tensor.name for tensor in reader.tensors]
        for expected in reader.tensors:
            found = checkpoint.tensors[expected.name]
            assert found.dtype == expected.tensor_type.name
            assert found.shape == tuple(expected.shape.tolist()[::-1])
            values = gguf.dequantize(expected.data, expected.tensor_type).reshape(found.shape)
            np.testing.assert_array_equal(found.rows(0, found.shape[0]), values)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "BF16", "F16"])
def test_any_rows_are_the_rows_of_the_whole(tmp_path: Path, kind: str) -> None:
    weights = np.random.default_rng(0).normal(size=(70, 96)).astype(np.float32)
    stored = gguf.quantize(weights, GGMLQuantizationType[kind])
    content = gguf_bytes((), [tensor("a", [96, 70], GGMLQuantizationType[kind])], stored.tobytes())
    with open_checkpoint(write(tmp_path / "m.gguf", content)) as checkpoint:
        whole = checkpoint.tensors["a"].rows(0, 70)
        np.testing.assert_array_equal(whole, gguf.dequantize(stored, GGMLQuantizationType[kind]))
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(13, 29), whole[13:29])


@pytest.mark.parametrize(("kind", "name"), [(15, "Q8_K"), (24, "I8"), (255, "255")])
def test_a_type_that_is_not_read_is_refused_where_the_tensor_is(tmp_path: Path, kind: int, name: str) -> None:
    """So that what else the file has can still be told."""
    content = gguf_bytes((), [tensor("a", [256, 1], kind)], bytes(292))
    with open_checkpoint(write(tmp_path / "m.gguf", content)) as checkpoint:
        [a] = checkpoint.tensors.values()
        assert a.dtype == name
        for read in (a.rows, a.quantized_rows):
            with pytest.raises(CheckpointError, match=f"'a' has type {name}, expected one of F32"):
                read(0, 1)


def test_the_sizes_of_blocks_are_those_of_the_library() -> None:
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: sizes[name] for name in BLOCK_SIZES} == BLOCK_SIZES


# What gguf can dequantize.
QUANTIZED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
]


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_quantized_type_is_read_as_the_gguf_library_reads_it(tmp_path: Path, name: str) -> None:
    if name not in GGMLQuantizationType.__members__:
        pytest.skip(f"this version of gguf does not know {name}")
    kind = GGMLQuantizationType[name]
    elements, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (3, 512 // elements * num_bytes), np.uint8)
    content = gguf_bytes((), [tensor("a", [512, 3], kind)], raw.tobytes())
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, kind)
    with open_checkpoint(write(tmp_path / "m.gguf", content)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(0, 3), expected)
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(1, 2), expected[1:2])


def test_elements_of_a_quantized_vector_may_begin_inside_a_block(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=96).astype(np.float32)
    stored = gguf.quantize(weights, GGMLQuantizationType.Q8_0)
    content = gguf_bytes((), [tensor("a", [96], GGMLQuantizationType.Q8_0)], stored.tobytes())
    with open_checkpoint(write(tmp_path / "m.gguf", content)) as checkpoint:
        whole = checkpoint.tensors["a"].rows(0, 96)
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(30, 65), whole[30:65])


def test_every_kind_of_metadata(tmp_path: Path) -> None:
    metadata = [
        entry("u8", 0, b"\xff"),
        entry("i8", 1, b"\xff"),
        entry("u16", 2, struct.pack("<H", 65535)),
        entry("i16", 3, struct.pack("<h", -2)),
        entry("u32", 4, struct.pack("<I", 1 << 31)),
        entry("i32", 5, struct.pack("<i", -3)),
        entry("f32", 6, struct.pack("<f", 0.5)),
        entry("bool", BOOL, b"\x01"),
        entry("text", STRING, string("é")),
        entry("u64", 10, struct.pack("<Q", 1 << 63)),
        entry("i64", 11, struct.pack("<q", -4)),
        entry("f64", 12, struct.pack("<d", 0.25)),
        entry("texts", ARRAY, array(STRING, 2, string("a") + string(""))),
        entry("numbers", ARRAY, array(5, 2, struct.pack("<2i", 7, -8))),
        entry("flags", ARRAY, array(BOOL, 2, b"\x01\x00")),
        entry("none", ARRAY, array(6, 0, b"")),
    ]
    with open_checkpoint(write(tmp_path / "m.gguf", gguf_bytes(metadata, version=2))) as checkpoint:
        config = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in checkpoint.config.items()}
    assert config == {
        "u8": 255, "i8": -1, "u16": 65535, "i16": -2, "u32": 1 << 31, "i32": -3, "f32": 0.5, "bool": True,
        "text": "é", "u64": 1 << 63, "i64": -4, "f64": 0.25, "texts": ["a", ""], "numbers": [7, -8],
        "flags": [True, False], "none": [],
    }  # fmt: skip


def test_alignment_places_the_data(tmp_path: Path) -> None:
    metadata = [entry("general.alignment", UINT32, struct.pack("<I", 256))]
    tensors = [tensor("a", [2], offset=0), tensor("b", [2], offset=256)]
    data = struct.pack("<2f", 1, 2) + bytes(248) + struct.pack("<2f", 3, 4)
    content = gguf_bytes(metadata, tensors, data, alignment=256)
    with open_checkpoint(write(tmp_path / "m.gguf", content)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensors["a"].rows(0, 2), [1, 2])
        np.testing.assert_array_equal(checkpoint.tensors["b"].rows(0, 2), [3, 4])


def alignment_of(value: int, value_type: int = UINT32) -> bytes:
    return gguf_bytes([entry("general.alignment", value_type, struct.pack("<I", value))])


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, too short"),
    "not GGUF": (b"PK\x03\x04" + bytes(60), r"begins with b'PK\x03\x04', expected b'GGUF'"),
    "version 1": (gguf_bytes(version=1), "GGUF version 1, expected little-endian version 2 or 3"),
    "version 4": (gguf_bytes(version=4), "GGUF version 4"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian GGUF version 3"),
    "too many tensors": (gguf_bytes(num_tensors=HUGE), f"{HUGE} tensors cannot fit"),
    "too many entries": (gguf_bytes(num_entries=HUGE), f"{HUGE} metadata entries cannot fit"),
    "long key": (gguf_bytes([struct.pack("<Q", HUGE) + bytes(40)]), "the key of metadata entry 0"),
    "key not UTF-8": (gguf_bytes([entry(b"\xff", 0, b"\0")]), r"is b'\xff', expected UTF-8"),
    "long string": (gguf_bytes([entry("k", STRING, struct.pack("<Q", HUGE))]), "metadata 'k'"),
    "string not UTF-8": (gguf_bytes([entry("k", STRING, string(b"\xc3"))]), r"metadata 'k' is b'\xc3'"),
    "same key twice": (gguf_bytes([entry("k", 0, b"\0")] * 2), "metadata key 'k' is there twice"),
    "value type": (gguf_bytes([entry("k", 13, bytes(8))]), "'k' has value type 13, expected 0 to 12"),
    "boolean": (gguf_bytes([entry("k", BOOL, b"\x02")]), "'k' is the boolean 2, expected 0 or 1"),
    "booleans": (gguf_bytes([entry("k", ARRAY, array(BOOL, 2, b"\x01\x07"))]), "'k' is the boolean 7"),
    "many numbers": (gguf_bytes([entry("k", ARRAY, array(5, HUGE, b""))]), f"{HUGE} elements of 'k'"),
    "many strings": (gguf_bytes([entry("k", ARRAY, array(STRING, HUGE, b""))]), f"{HUGE} strings of 'k'"),
    "long string in an array": (
        gguf_bytes([entry("k", ARRAY, array(STRING, 2, string("a") + struct.pack("<Q", HUGE)))]),
        "string 1 of 'k' runs to byte",
    ),
    "string in an array not UTF-8": (
        gguf_bytes([entry("k", ARRAY, array(STRING, 1, string(b"\xf0")))]),
        r"string 0 of 'k' is b'\xf0', expected UTF-8",
    ),
    "array of arrays": (gguf_bytes([entry("k", ARRAY, array(ARRAY, 1, bytes(20)))]), "an array of arrays"),
    "element type": (gguf_bytes([entry("k", ARRAY, array(99, 1, bytes(20)))]), "'k' has element type 99"),
    "alignment 0": (alignment_of(0), "general.alignment is 0, expected a power of two"),
    "alignment 48": (alignment_of(48), "general.alignment is 48, expected a power of two"),
    "alignment a float": (alignment_of(32, 6), "general.alignment has value type 6, expected 4"),
    "more tensors than anybody has": (
        gguf_bytes(num_tensors=1 << 18, data=bytes(1 << 23)),
        "262144 tensors, expected at most 65536",
    ),
    "more metadata than anybody has": (
        gguf_bytes(num_entries=1 << 17, data=bytes(1 << 21)),
        "131072 metadata entries, expected at most 65536",
    ),
    "a key of a megabyte twice": (gguf_bytes([entry("k" * (1 << 20), 0, b"\0")] * 2), "is there twice"),
    "a name of a megabyte": (gguf_bytes((), [tensor("a" * (1 << 20), [])], bytes(32)), "has 0 dimensions"),
    "no dimensions": (gguf_bytes((), [tensor("a", [])], bytes(32)), "'a' has 0 dimensions, expected 1 to 4"),
    "five dimensions": (gguf_bytes((), [tensor("a", [1] * 5)], bytes(32)), "'a' has 5 dimensions"),
    "many dimensions": (gguf_bytes((), [tensor("a", [1], num_dims=1 << 31)], bytes(32)), "dimensions"),
    "zero dimension": (gguf_bytes((), [tensor("a", [4, 0])], bytes(32)), "'a' has shape [0, 4]"),
    "huge dimension": (gguf_bytes((), [tensor("a", [HUGE, HUGE])], bytes(32)), "'a' ends at byte"),
    "part of a block": (
        gguf_bytes((), [tensor("a", [33, 2], 8)], bytes(128)),
        "rows of 33, expected a multiple of 32",
    ),
    "unaligned offset": (
        gguf_bytes((), [tensor("a", [4], offset=8)], bytes(64)),
        "offset 8, expected a multiple of 32",
    ),
    "offset outside": (gguf_bytes((), [tensor("a", [4], offset=1 << 40)], bytes(64)), "'a' ends at byte"),
    "cut short": (
        gguf_bytes((), [tensor("a", [16])], bytes(60)),
        "ends at byte 64 of the data, expected at most 60",
    ),
    "same tensor twice": (gguf_bytes((), [tensor("a", [4])] * 2, bytes(64)), "tensor 'a' is there twice"),
    "overlap": (
        gguf_bytes((), [tensor("a", [16]), tensor("b", [8], offset=32)], bytes(64)),
        "tensor 'b' begins at byte 32 of the data, inside tensor 'a' that ends at byte 64",
    ),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN_FILES.values(), ids=BROKEN_FILES.keys())
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path / "m.gguf", content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_header_is_read_up_to_a_bound(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", gguf_bytes([entry("k", STRING, struct.pack("<Q", 1 << 30))]))
    with path.open("r+b") as file:
        file.truncate(1 << 31)
    with pytest.raises(CheckpointError, match="before the longest header that is read ends"):
        open_checkpoint(path)


SMALL_FILE = gguf_bytes(
    [
        entry("general.alignment", UINT32, struct.pack("<I", 32)),
        entry("texts", ARRAY, array(STRING, 2, string("ab") + string("c"))),
        entry("flag", BOOL, b"\x01"),
    ],
    [tensor("a", [4, 2]), tensor("b", [32, 2], GGMLQuantizationType.Q4_1, 32)],
    bytes(32 + 40),
)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL_FILE)):
        with pytest.raises(CheckpointError):
            open_checkpoint(write(tmp_path / "m.gguf", SMALL_FILE[:length]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_changed_bytes_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(SMALL_FILE)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        with open_checkpoint(write(tmp_path / "m.gguf", bytes(content))) as checkpoint:
            for found in checkpoint.tensors.values():
                values: Any = found.rows(0, found.shape[0])
                assert values.shape == found.shape
    except CheckpointError:
        pass
