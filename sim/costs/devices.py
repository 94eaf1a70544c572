"""Hardware whose step times are estimated: by its name in hardware.json, or from a file of the same form.

A file has one JSON object: the fields of `Hardware` (those with a default may be missing), a source if it
likes, and "constants", what is known of this device in the place of the defaults of `constants`.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pagellm.engine import checks
from pagellm.engine.checks import SMALLEST
from pagellm.engine.errors import ConfigError, found
from pagellm.sim.fields import Fields, read_json

_POWERS = ("power_w", "idle_power_w")


@dataclass(frozen=True)
class Hardware:
    """One device: its peak rates and what serves on it by default.

    flops_per_s: of dense arithmetic in bfloat16 and float16; of the other formats None where it has none that
    is faster. memory_bytes: as the card reports them. link_bytes_per_s: to the other devices,
    host_bytes_per_s: to the host's memory; in one direction. link_latency_s: of an exchange among devices,
    however small. max_num_batched_tokens, max_num_seqs: of an engine on it that nobody has set.
    power_w, idle_power_w: while it computes and while it does not; None where that is not known. assumed: of
    these those that nobody has measured or stated, each with where it is from.
    constants: what is known of this device in the place of the defaults.
    """

    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float
    link_latency_s: float = 1e-5
    fp8_flops_per_s: float | None = None
    int8_flops_per_s: float | None = None
    fp4_flops_per_s: float | None = None
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    power_w: float | None = None
    idle_power_w: float | None = None
    assumed: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, float | str] = field(default_factory=dict)

    def flops_of(self, weights: str) -> float:
        """The rate of products with weights in a format; int4 is widened to 16 bits before it multiplies."""
        faster: float | None = getattr(self, f"{weights}_flops_per_s", None)
        return faster or self.flops_per_s


@cache
def known() -> dict[str, Any]:
    """What hardware.json has: "hardware", "links" and "models" by name."""
    data: dict[str, Any] = json.loads(files("pagellm.sim.costs").joinpath("hardware.json").read_text("utf-8"))
    return data


def load_hardware(name: str) -> Hardware:
    """A device by its name, or from the file of that name. Raises `ConfigError`."""
    entries = known()["hardware"]
    if name in entries:
        return _read(Fields(entries[name], name, ConfigError))
    if not checks.is_path(name) or not Path(name).is_file():
        expected = f"one of {', '.join(entries)}, or a file that describes one as hardware.json does"
        raise ConfigError(f"hardware: found {found(name)}, expected {expected}")
    return _read(Fields(read_json(Path(name), "a device", ConfigError), name, ConfigError, name="device"))


def _read(values: Fields) -> Hardware:
    names = [one.name for one in fields(Hardware)]
    for name in values.values:
        if name not in (*names, "source"):
            raise values.bad(str(name), values.get(name), f"no such field: one of {', '.join(names)}, source")
    read: dict[str, Any] = {}
    for one in fields(Hardware):
        required = one.default is MISSING and one.default_factory is MISSING
        if not required and not values.has(one.name):
            continue
        if one.name == "assumed":
            assumed = values.section(one.name)
            for name in assumed.values:
                if name not in _POWERS:
                    raise assumed.bad(str(name), assumed.get(name), f"no such field: {' or '.join(_POWERS)}")
            read[one.name] = {name: assumed.text(name) for name in assumed.values}
        elif one.name == "constants":
            read[one.name] = dict(values.section(one.name).values)
        elif one.type is int:
            read[one.name] = values.integer(one.name)
        else:
            low = 0 if one.name == "link_latency_s" else SMALLEST
            read[one.name] = values.number(one.name, low, f"a number {'from' if low == 0 else 'above'} 0")
    return Hardware(**read)
