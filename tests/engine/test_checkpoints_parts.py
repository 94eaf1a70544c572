"""Models in several GGUF files: what the gguf library splits is one model, and foreign parts are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pagellm.engine.checkpoints import open_checkpoint, resolve_model
from pagellm.engine.errors import CheckpointError

NAMES = [f"model-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]


def write_model(directory: Path, seed: int = 0, num_tensors: int = 5, per_part: int = 2) -> list[Path]:
    """A small model that the gguf library splits into parts, two tensors each; the parts' paths."""
    directory.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama", split_max_tensors=per_part)
    writer.add_context_length(128)
    writer.add_array("tokenizer.ggml.scores", [0.5, float(seed)])
    random = np.random.default_rng(seed)
    for index in range(num_tensors):
        writer.add_tensor(f"t{index}", random.normal(size=(3, 32 + index)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("*.gguf"))


def write_part(path: Path, tensor: str, **keys: int) -> None:
    """One part by hand, with these keys of `split` and one tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        writer.add_uint32(f"split.{key.replace('_', '.')}", value)
    writer.add_tensor(tensor, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("given", [0, 1, 2, None])
def test_any_part_and_the_directory_open_the_whole_model(tmp_path: Path, given: int | None) -> None:
    parts = write_model(tmp_path / "split")
    assert [part.name for part in parts] == NAMES
    path = tmp_path / "split" if given is None else parts[given]
    random = np.random.default_rng(0)
    for opened in (path, resolve_model(path)):
        with open_checkpoint(opened) as checkpoint:
            assert checkpoint.path == parts[0]
            assert checkpoint.config["llama.context_length"] == 128
            assert list(checkpoint.tensors) == ["t0", "t1", "t2", "t3", "t4"]
            random = np.random.default_rng(0)
            for index, tensor in enumerate(checkpoint.tensors.values()):
                expected = random.normal(size=(3, 32 + index)).astype(np.float32)
                np.testing.assert_array_equal(tensor.rows(0, 3), expected)


def test_a_first_part_may_have_no_tensors(tmp_path: Path) -> None:
    """As llama.cpp's tool writes it when asked for metadata alone in front."""
    for number, name in enumerate(NAMES[:2]):
        path = tmp_path / name.replace("00003", "00002")
        if number:
            write_part(path, "t", no=1, count=2, tensors_count=1)
            continue
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 1)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["t"]


def test_a_whole_file_may_say_that_it_is_one_part(tmp_path: Path) -> None:
    """As merging parts leaves it (0), or a converter that had no need to split (1)."""
    for count in (0, 1):
        write_part(tmp_path / "whole.gguf", "t", no=0, count=count, tensors_count=1)
        with open_checkpoint(tmp_path) as checkpoint:
            assert list(checkpoint.tensors) == ["t"]


def rename(parts: list[Path]) -> None:
    parts[0].rename(parts[0].with_name("renamed.gguf"))
    for part in parts[1:]:
        part.unlink()


def swap(parts: list[Path]) -> None:
    second = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    parts[2].write_bytes(second)


def of_other_metadata(parts: list[Path]) -> None:
    writer = gguf.GGUFWriter(parts[1], "llama")
    for key, value in (("no", 1), ("count", 3), ("tensors.count", 5)):
        writer.add_uint32(f"split.{key}", value)
    writer.add_context_length(64)
    writer.add_tensor("other", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


BAD_PARTS: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "missing first": (
        lambda parts: parts[0].unlink(),
        f"{NAMES[0]}: not found; {NAMES[1]} is part 2 of 3, expected all of them in one directory",
    ),
    "missing last": (lambda parts: parts[2].unlink(), f"{NAMES[2]}: not found; {NAMES[0]} is part 1 of 3"),
    "doubled": (
        lambda parts: shutil.copy(parts[1], parts[2]),
        f"{NAMES[2]}: split.no: found 1, expected 2, as the file's name says",
    ),
    "mixed up": (swap, f"{NAMES[1]}: split.no: found 2, expected 1, as the file's name says"),
    "renamed": (
        rename,
        "renamed.gguf: part 1 of 3, expected a file name that ends in -00001-of-00003.gguf",
    ),
    "a whole model in a part's place": (
        lambda parts: write_part(parts[1], "t2"),
        f"{NAMES[1]}: split.no: found None, expected a number, as every part of a model has it",
    ),
    "of a model in more parts": (
        lambda parts: write_part(parts[1], "t2", no=1, count=4, tensors_count=5),
        f"{NAMES[1]}: split.count: found 4, expected 3, as the file's name says",
    ),
    "of a model with more tensors": (
        lambda parts: write_part(parts[1], "t2", no=1, count=3, tensors_count=9),
        f"{NAMES[1]}: split.tensors.count: found 9, expected 5 as in {NAMES[0]}",
    ),
    "of another architecture's model": (
        of_other_metadata,
        f"{NAMES[1]}: llama.context_length: found 64, expected 128 as in {NAMES[0]}",
    ),
    "with a tensor of another part": (
        lambda parts: write_part(parts[1], "t1", no=1, count=3, tensors_count=5),
        f"{NAMES[1]}: tensor 't1' is there, too, but already in {NAMES[0]}, expected it in one part",
    ),
    "with fewer tensors": (
        lambda parts: write_part(parts[1], "t2", no=1, count=3, tensors_count=5),
        f"{NAMES[0]}: split.tensors.count: found 5, expected 4, the tensors in all 3 parts",
    ),
    "with a count that is none": (
        lambda parts: write_part(parts[2], "t4", no=2, count=3),
        f"{NAMES[2]}: split.tensors.count: found None, expected a number",
    ),
    "cut short": (
        lambda parts: parts[2].write_bytes(parts[2].read_bytes()[:-40]),
        f"{NAMES[2]}: tensor 't4' ends at byte",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_belong_together_are_refused_by_name(tmp_path: Path, case: str) -> None:
    spoil, expected = BAD_PARTS[case]
    spoil(write_model(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(resolve_model(tmp_path))
    assert f"{tmp_path}/{expected}" in str(caught.value)


def test_a_part_beyond_the_last_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    extra = tmp_path / "model-00006-of-00003.gguf"
    write_part(extra, "t", no=5, count=3, tensors_count=5)
    with pytest.raises(CheckpointError, match=r"split\.no: found 5, expected less than 3"):
        open_checkpoint(extra)


def test_a_directory_with_several_models_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_part(tmp_path / "other.gguf", "t")
    for opener in (resolve_model, open_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            opener(tmp_path)
        assert str(caught.value).startswith(
            f"{tmp_path}: 2 models in GGUF files ({NAMES[0]}, other.gguf), expected one: name the file itself"
        )
