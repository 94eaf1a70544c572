"""Step times by where they come from: what other processes are sent, and results files name by a hash."""

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from pagellm.engine.errors import ConfigError
from pagellm.sim.costs.cost_model import CostModel
from pagellm.sim.costs.roofline import RooflineCostModel


@dataclass(frozen=True)
class CostSource:
    """Step times by where they come from: the file of a profile or step log, or an estimate.

    roofline: hardware, model and number of devices as in `CostModel.roofline`. constants: those that are
    given to it, names and values. costs: a file of fitted ones. pipeline_parallel, data_parallel: of it.
    """

    profile: str | None = None
    roofline: tuple[str, str, int] | None = None
    constants: tuple[tuple[str, float | str], ...] = ()
    costs: str | None = None
    pipeline_parallel: int = 1
    data_parallel: int = 1

    def __post_init__(self) -> None:
        if (self.profile is None) == (self.roofline is None):
            found = "neither" if self.profile is None else "both"
            raise ConfigError(f"cost model: found {found} of profile and roofline, expected one")
        if self.constants and self.roofline is None:
            raise ConfigError(f"set-cost: found {self.constants[0][0]} without --roofline, expected none")
        if self.costs is not None and self.roofline is None:
            raise ConfigError(f"costs: found {self.costs} without --roofline, expected none")
        for name in ("pipeline_parallel", "data_parallel"):
            if getattr(self, name) != 1 and self.roofline is None:
                raise ConfigError(f"{name}: found {getattr(self, name)} without --roofline, expected 1")

    def on(self, hardware: str) -> "CostSource":
        """The same on another device, NAME or NAME*N. Raises `ConfigError`."""
        if self.roofline is None:
            raise ConfigError(f"hardware: found {hardware!r} with a profile, expected --roofline")
        name, times, number = hardware.partition("*")
        if times and not number.isdecimal():
            raise ConfigError(f"hardware: found {hardware!r}, expected NAME or NAME*N devices")
        _, model, num_devices = self.roofline
        devices = int(number) if times else num_devices
        return replace(self, roofline=(name, model, devices))

    def load(self) -> CostModel:
        """Raises `ProfileError` and `ConfigError`."""
        if self.profile is not None:
            return CostModel.load(self.profile)
        return self._estimate

    @cached_property
    def _estimate(self) -> RooflineCostModel:
        """Kept, and taken along to other processes: to read a model's shape takes a second."""
        assert self.roofline is not None
        hardware, model, num_devices = self.roofline
        return CostModel.roofline(
            hardware,
            model,
            num_devices,
            pipeline_parallel=self.pipeline_parallel,
            data_parallel=self.data_parallel,
            costs=self.costs,
            **dict(self.constants),
        )

    def hash(self) -> str:
        """SHA-256 of the file, or of all that an estimate follows from."""
        if self.profile is not None:
            return hash_of(self.profile)
        return sha256(self._estimate.identity().encode()).hexdigest()


def hash_of(path: str) -> str:
    """SHA-256 of a file. Raises `ConfigError`."""
    try:
        with open(path, "rb") as file:
            digest = sha256()
            while piece := file.read(2**20):
                digest.update(piece)
        return digest.hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
