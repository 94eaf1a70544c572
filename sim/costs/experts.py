"""How unevenly the tokens of a step choose among experts, and what the busiest device has of that.

Training balances experts over all of its data, not over the requests of a server: some are chosen often.
Where devices have whole experts, the one with the busiest ones is waited for in every layer; where all
devices share each expert, an uneven choice only lets fewer experts be met.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random

from pagellm.engine.errors import ConfigError, found
from pagellm.sim.costs.decoder import Layers
from pagellm.sim.fields import read_json

_MAX_KEPT = 2**14  # numbers of tokens whose seconds are kept


class UnevenExperts:
    """The experts of one kind of layers.

    loads: how often each is chosen, relative to the others, in the order in which devices have them; a list
    for all layers alike, or one for each. num_groups: devices that have whole ones, each the same number of
    them in that order; 1 where all share each.
    """

    def __init__(self, layer: Layers, loads: Sequence[Sequence[float]], num_groups: int = 1) -> None:
        self._num_groups = num_groups
        size = layer.num_experts // num_groups
        chances = [_chances(row, layer.experts_per_token) for row in loads]
        # Of each layer, the chances of each group's experts to be chosen by a token.
        self._layers = [
            [row[begin : begin + size] for begin in range(0, layer.num_experts, size)] for row in chances
        ]
        self._kept: dict[int, float] = {}

    @property
    def imbalance(self) -> float:
        """What the busiest group has to do, relative to what it would have if all had alike."""
        busiest = sum(max(map(sum, groups)) for groups in self._layers) / len(self._layers)
        each = sum(map(sum, self._layers[0])) / self._num_groups
        return busiest / each

    def seconds(self, num_tokens: int, token_s: float, expert_s: float, fill_tokens: float) -> float:
        """Seconds of the products of so many tokens with the experts that they choose.

        token_s, expert_s: of a token and an expert by arithmetic, and of an expert by traffic, if all devices
        share it. fill_tokens: see `constants.CONSTANTS`.
        """
        seconds = self._kept.get(num_tokens)
        if seconds is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            slowest = 0.0
            for groups in self._layers:
                slowest += max(
                    _seconds(group, num_tokens, token_s, expert_s, fill_tokens) for group in groups
                )
            seconds = self._kept[num_tokens] = slowest * self._num_groups / len(self._layers)
        return seconds


def _seconds(
    chances: Sequence[float], num_tokens: int, token_s: float, expert_s: float, fill_tokens: float
) -> float:
    chosen = num_tokens * sum(chances)
    met = sum(1 - (1 - chance) ** num_tokens for chance in chances)
    if not met:
        return 0.0
    filled = 1 + fill_tokens / (chosen / met + fill_tokens)
    return max(chosen * filled * token_s, met * expert_s)


def _chances(loads: Sequence[float], per_token: int) -> list[float]:
    """Each expert's chance to be one of those that a token chooses, of which none is chosen twice."""
    chances, certain = [0.0] * len(loads), set[int]()
    while True:
        rest = sum(load for index, load in enumerate(loads) if index not in certain)
        share = (per_token - len(certain)) / rest if rest else 0.0
        chances = [1.0 if index in certain else load * share for index, load in enumerate(loads)]
        beyond = {index for index, chance in enumerate(chances) if chance > 1}
        if not beyond:
            return chances
        certain |= beyond


def zipf_loads(num_experts: int, exponent: float) -> list[float]:
    """Loads of which the k-th largest is 1 / k ** exponent; which expert has which is drawn, always alike."""
    loads = [1 / rank**exponent for rank in range(1, num_experts + 1)]
    Random(0).shuffle(loads)
    return loads


def read_loads(path: str) -> list[list[float]]:
    """Measured loads: JSON, a list of how often each expert was chosen, or one such list for each layer.

    Raises `ConfigError`.
    """
    values = read_json(Path(path), "loads of experts", ConfigError)
    rows = values if isinstance(values, list) and values and isinstance(values[0], list) else [values]
    for row in rows:
        if not isinstance(row, list) or not row:
            raise ConfigError(
                f"{path}: found {found(row)}, expected a list of how often each expert is chosen"
            )
        for load in row:
            if type(load) not in (int, float) or not 0 <= load < 1e300:
                raise ConfigError(f"{path}: found {found(load)}, expected a number from 0")
        if not sum(row):
            raise ConfigError(f"{path}: found an expert layer of zeros, expected one that is chosen")
    return rows


def check_loads(path: str, rows: Sequence[Sequence[float]], layer: Layers) -> None:
    """Raises `ConfigError` for loads that are not of such layers."""
    if len(rows) not in (1, layer.count):
        expected = f"one for all layers, or one for each of {layer.count}"
        raise ConfigError(f"{path}: found {len(rows)} lists, expected {expected}")
    for row in rows:
        num_chosen = sum(1 for load in row if load)
        if len(row) != layer.num_experts:
            raise ConfigError(f"{path}: found loads of {len(row)} experts, expected {layer.num_experts}")
        if num_chosen < layer.experts_per_token:
            expected = f"at least {layer.experts_per_token}, as many as a token chooses"
            raise ConfigError(f"{path}: found {num_chosen} experts that are chosen, expected {expected}")
