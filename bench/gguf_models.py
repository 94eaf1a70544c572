"""The default model's weights as GGUF files of several types, so that every engine reads the same numbers.

The published file is Q4_1 with a Q8_0 embedding. The others are made from it, once, and kept in pagellm's
cache directory: its matrices dequantized and stored again in another type, norms and metadata as they are.
"""

import os
import tempfile
from math import prod
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from pagellm.engine.cache import cache_dir
from pagellm.engine.checkpoints import open_checkpoint, resolve_model
from pagellm.engine.config import DEFAULT_MODEL

# What general.file_type calls each, and the type of the embedding.
FILE_TYPES = {
    "F32": (LlamaFileType.ALL_F32, "F32"),
    "F16": (LlamaFileType.MOSTLY_F16, "F16"),
    "BF16": (LlamaFileType.MOSTLY_BF16, "BF16"),
    "Q8_0": (LlamaFileType.MOSTLY_Q8_0, "Q8_0"),
    "Q4_0": (LlamaFileType.MOSTLY_Q4_0, "Q8_0"),
}
PUBLISHED = "Q4_1"
EMBEDDING = "token_embd.weight"
OUTPUT = "output.weight"  # where there is none, the embedding is it


def model_file(file_type: str) -> Path:
    """The default model with its matrices in one of `FILE_TYPES`, or as it was published, `PUBLISHED`."""
    source = resolve_model(DEFAULT_MODEL)
    if file_type == PUBLISHED:
        return source
    target = cache_dir() / "bench" / f"{DEFAULT_MODEL}.{file_type}.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, suffix=".partial")
        os.close(descriptor)
        try:
            _convert(source, Path(temporary), file_type)
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    return target


def matrix_sizes(path: Path) -> tuple[int, int, int]:
    """Bytes of the weights that a step reads, and the multiply-adds of one token in layers and output matrix.

    Of an embedding that is not the output matrix, too, a step reads a few rows.
    """
    with open_checkpoint(path) as checkpoint:
        tensors = checkpoint.tensors
        output = OUTPUT if OUTPUT in tensors else EMBEDDING
        read = [tensor for tensor in tensors.values() if output == EMBEDDING or tensor.name != EMBEDDING]
        in_layers = [prod(t.shape) for t in read if len(t.shape) == 2 and t.name != output]
        return sum(tensor.num_bytes for tensor in read), sum(in_layers), prod(tensors[output].shape)


def _convert(source: Path, target: Path, file_type: str) -> None:
    reader = GGUFReader(source)
    number, embedding_type = FILE_TYPES[file_type]
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = int(number) if name == "general.file_type" else field.contents()
        element_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], element_type)
    for tensor in reader.tensors:
        is_matrix = len(tensor.shape) == 2
        wanted = embedding_type if tensor.name == EMBEDDING else file_type
        new_type = GGMLQuantizationType[wanted] if is_matrix else tensor.tensor_type
        data = tensor.data
        if new_type != tensor.tensor_type:
            data = quantize(dequantize(data, tensor.tensor_type), new_type)
        writer.add_tensor(tensor.name, data, raw_dtype=new_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
