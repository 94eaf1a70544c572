"""The tensors of a directory by the module that they belong to, while quantized ones are joined."""

import re
from collections.abc import Callable, Collection
from pathlib import Path

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.quantized.matrix import QuantizedTensor
from pagellm.engine.checkpoints.quantized.section import Section
from pagellm.engine.errors import CheckpointError, found, named

# Matrices of a decoder's layers that quantizers pass over without saying so.
_ROUTER = re.compile(r".*\.(gate|router|router\.layer|shared_expert_gate)")
_OF_LAYER = re.compile(r"(?!.*(vision|visual|multi_modal)).*\.\d+\..*")


class Modules:
    """Tensors by module and by their own name in it; a whole takes the place of what is joined."""

    def __init__(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        self.directory = directory
        self.tensors = tensors
        self.quantized: set[str] = set()

    def with_tensor(self, suffix: str, *dtypes: str) -> list[str]:
        """The modules that have a tensor of this name, and of one of these types if any are named."""
        return [
            name.removesuffix(f".{suffix}")
            for name, tensor in self.tensors.items()
            if name.endswith(f".{suffix}") and (not dtypes or tensor.dtype in dtypes)
        ]

    def take(self, module: str, suffix: str, dtypes: Collection[str]) -> Tensor:
        """A tensor that a module must have, of one of these types."""
        tensor = self.take_any(module, (suffix,), dtypes)
        if tensor is None:
            raise CheckpointError(
                f"{self.directory}: tensor {named(f'{module}.{suffix}')} is missing, expected beside the "
                "others of its quantized module"
            )
        return tensor

    def take_any(self, module: str, suffixes: Collection[str], dtypes: Collection[str]) -> Tensor | None:
        """The first of these tensors that a module has."""
        for suffix in suffixes:
            tensor = self.tensors.pop(f"{module}.{suffix}", None)
            if tensor is not None:
                if tensor.dtype not in dtypes:
                    raise CheckpointError(
                        f"{tensor.file.path}: tensor {named(tensor.name)} has type {tensor.dtype}, expected "
                        f"{' or '.join(dtypes)}"
                    )
                return tensor
        return None

    def take_whole(self, name: str, dtypes: Collection[str]) -> Tensor:
        """A tensor by its whole name, which must be there, of one of these types."""
        module, _, last = name.rpartition(".")
        return self.take(module, last, dtypes)

    def put_whole(self, tensor: Tensor) -> None:
        """Stacked matrices, in the place of their parts."""
        self.tensors[tensor.name] = tensor
        self.quantized.add(tensor.name)

    def put(self, module: str, tensor: QuantizedTensor) -> None:
        """The whole, in the place of its parts."""
        self.tensors[f"{module}.weight"] = tensor
        self.quantized.add(module)

    def check(
        self,
        section: Section,
        key: str,
        excluded: Callable[[str], bool],
        maybe_excluded: Callable[[str], bool] = lambda module: False,
    ) -> None:
        """What the configuration excludes is not quantized, and what it does not exclude is.

        maybe_excluded: what some library takes the configuration to exclude besides.
        Raises `CheckpointError` for the first module of which that is not true, and if none is quantized.
        """
        if not self.quantized:
            place = section.prefix.removesuffix(".") or "quant_method"
            method = found(section.get("quant_method", "bitsandbytes"))
            raise CheckpointError(
                f"{section.path}: {place}: found {method}, expected weights that it has quantized: "
                f"{self.directory} has none"
            )
        for module in sorted(self.quantized):
            if excluded(module):
                raise CheckpointError(
                    f"{self.directory}: {named(module)}: found quantized weights, expected others: "
                    f"{section.prefix}{key} excludes it"
                )
        for name, tensor in self.tensors.items():
            module = name.removesuffix(".weight")
            if (
                name.endswith(".weight")
                and len(tensor.shape) == 2
                and not isinstance(tensor, QuantizedTensor)
                and _OF_LAYER.fullmatch(module)
                and not _ROUTER.fullmatch(module)
                and not excluded(module)
                and not maybe_excluded(module)
            ):
                raise CheckpointError(
                    f"{self.directory}: {named(module)}: found weights of type {tensor.dtype}, expected "
                    f"quantized ones: {section.prefix}{key} does not exclude it"
                )


def misshapen(tensor: Tensor, *expected: tuple[int, ...]) -> CheckpointError:
    """The error for a tensor of another shape than expected."""
    shapes = " or ".join(map(str, expected))
    return CheckpointError(
        f"{tensor.file.path}: tensor {named(tensor.name)} has shape {tensor.shape}, expected {shapes}"
    )
