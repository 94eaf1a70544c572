"""A file of constants that were fitted to a recorded run, with how far they were off on the rest of it.

A JSON object, which `pagellm fit` writes and `--costs` reads:

    {"format": "pagellm-costs", "version": 1,
     "hardware": "rtx-4090", "model": "llama-3.1-8b", "num_devices": 1,      what was estimated
     "constants": {"product_flops": 0.83, ...},                             see constants.py
     "fit": {"run": "requests.jsonl", "num_fitted": 150, "num_scored": 150,
             "throughput": 0.01, "ttft": -0.02, "tpot": 0.0, "e2e": 0.01}}  simulated / measured - 1; or null
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pagellm.engine import checks
from pagellm.engine.errors import ConfigError
from pagellm.sim.costs.constants import Constants
from pagellm.sim.costs.cost_model import FIT_METRICS, FitError
from pagellm.sim.fields import Fields, read_json
from pagellm.sim.outputs import write_whole

FORMAT, VERSION = "pagellm-costs", 1


class FittedCosts(NamedTuple):
    """Constants, how far they were off where they were held against a run, and what they were fitted for."""

    constants: Mapping[str, float | str]
    error: FitError
    hardware: str
    model: str
    num_devices: int

    def to_json(self) -> dict[str, Any]:
        """The object of a file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "hardware": self.hardware,
            "model": self.model,
            "num_devices": self.num_devices,
            "constants": dict(self.constants),
            "fit": self.error,
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes a file, whole or not at all. Raises `ConfigError`."""
        write_whole("costs", path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", ConfigError)


def read_costs(path: str | os.PathLike[str]) -> FittedCosts:
    """What a file has. Raises `ConfigError`."""
    path = checks.path("costs", path, ConfigError)
    fields = Fields(read_json(Path(path), "costs", ConfigError), str(path), ConfigError, name="costs")
    for name, expected in (("format", FORMAT), ("version", VERSION)):
        if fields.get(name) != expected:
            raise fields.bad(name, fields.get(name), repr(expected))
    constants = dict(fields.section("constants").values)
    try:
        Constants(constants)
    except ConfigError as bad:
        raise ConfigError(f"{path}: constants: {bad}") from None
    fit = fields.section("fit")
    error: dict[str, Any] = {
        "run": fit.text("run"),
        "num_fitted": fit.integer("num_fitted"),
        "num_scored": fit.integer("num_scored", 0),
    }
    for name in FIT_METRICS:
        error[name] = fit.number(name, None) if fit.has(name) else None
    names = fields.text("hardware"), fields.text("model")
    return FittedCosts(constants, error, *names, fields.integer("num_devices"))  # type: ignore[arg-type]
