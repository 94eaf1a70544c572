"""Rotary embeddings as a config.json describes them, by the rules of transformers' `modeling_rope_utils`.

Its rules: a `rope_scaling` that is not empty replaces `rope_parameters`; what a section does not say, the
top level says; for scalings with an original context the top level's `original_max_position_embeddings` goes
first. Where one section would drop what the other says, both are named instead.
"""

import re
from collections.abc import Mapping

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import rope
from pagellm.engine.models.fields import NOTHING, Fields
from pagellm.engine.models.rope import RopeTable

# Every rope_type that is supported, and what it is.
KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3")}
# The layer types of models of which some layers have windows.
FULL, SLIDING = "full_attention", "sliding_attention"
# The names that Phi-3's class takes: its older files call LongRoPE otherwise.
PHI3_KINDS = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}

# Keys of a section that belong to other scalings than its own; transformers passes over them.
_OTHER_SCALINGS = re.compile(
    "type|rope_type|factor|original_max_position_embeddings|attention_factor|beta_fast|beta_slow|short_factor"
    "|long_factor|low_freq_factor|high_freq_factor|mscale|mscale_all_dim|truncate|mrope_section|finetuned"
)


def table(
    fields: Fields,
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
    kinds: Mapping[str, str] = KINDS,
    scales_queries: bool = False,
) -> RopeTable:
    """The rotary embeddings of a model all of whose rotated layers have the same.

    fields: with what the class takes for absent keys: rope_theta, partial_rotary_factor and
    original_max_position_embeddings may have other defaults than none. max_positions: the config's
    max_position_embeddings. partial: whether the class obeys `partial_rotary_factor`; others rotate whole
    heads whatever it says. kinds: the rope_types that the class knows. scales_queries: whether it obeys
    `llama_4_scaling_beta`. Raises `CheckpointError`.
    """
    current, legacy = fields.section("rope_parameters"), fields.section("rope_scaling")
    fields.get("rope_theta")  # known, even where the section's goes first
    if current is not None and legacy is not None:
        _check_agreement(current, legacy, fields)
    section = legacy or current or Fields(fields.path, {}, "rope_parameters.")
    original = fields.integer_or_none("original_max_position_embeddings", maximum=1 << 30)
    asked = _Section(fields, section, head_dim, max_positions, kinds, partial, scales_queries)
    return asked.table("rope_theta", original)


def score_factor(fields: Fields) -> float:
    """What DeepSeek's classes multiply the scores of a model with scaled rotary embeddings by: 1 without.

    It is YaRN's magnitude of `mscale_all_dim`, squared, whatever the kind of scaling. Raises
    `CheckpointError`.
    """
    section = fields.section("rope_scaling") or fields.section("rope_parameters")
    if section is None or section.get("rope_type", section.get("type", "default")) == "default":
        return 1.0
    weight = section.number_or_zero("mscale_all_dim")
    return rope.yarn_magnitude(section.number("factor"), weight) ** 2 if weight else 1.0


def tables_by_layer_type(
    fields: Fields, head_dim: int, max_positions: int, thetas: Mapping[str, str | float]
) -> dict[str, RopeTable]:
    """The rotary embeddings of each layer type of a class that has a section for each (Gemma 3, OLMo 3).

    thetas: of each type the top level's key of what its section does not say, or that number. The first type
    is the one that a `rope_scaling` is about. Raises `CheckpointError`.
    """
    sections, legacy = fields.section("rope_parameters"), fields.section("rope_scaling")
    sections = sections or Fields(fields.path, {}, "rope_parameters.")
    tables = {}
    for index, (layer_type, theta) in enumerate(thetas.items()):
        own = sections.section(layer_type) or Fields(
            fields.path, {"rope_type": "default"}, "rope_parameters."
        )
        section = own
        if legacy is not None and index == 0:
            for name in own.values.keys() & legacy.values.keys() - {"rope_type"}:
                if own.values[name] != legacy.values[name]:
                    raise own.error(name, own.values[name], _as_scaling_has(legacy.values[name]))
            section = Fields(fields.path, {**own.values, **legacy.values}, legacy.prefix)
        if isinstance(theta, str):
            fields.get(theta)
        asked = _Section(fields, section, head_dim, max_positions, KINDS)
        if section.get("truncate", True) is not True:
            # transformers reads this key beside the sections, where it cannot be.
            raise section.error("truncate", section.get("truncate"), "true in a section of a layer type")
        tables[layer_type] = asked.table(theta, None)
    sections.refuse_others(NOTHING, "a model with rope_parameters for each layer type")
    return tables


def tables_by_head_dim(fields: Fields, head_dims: Mapping[str, int]) -> tuple[RopeTable, ...]:
    """The rotary embeddings of each of these layer types, whose heads differ in size, too (Gemma 4).

    Every type has a section of its own, plain or "proportional". Raises `CheckpointError`.
    """
    sections = fields.section("rope_parameters") or Fields(fields.path, {}, "rope_parameters.")
    kinds = {kind: kind for kind in ("default", "proportional")}
    tables = []
    for layer_type, head_dim in head_dims.items():
        section = sections.section(layer_type)
        if section is None:
            raise sections.error(layer_type, sections.get(layer_type), "an object with a rope_theta")
        theta, kind = section.number("rope_theta"), section.choice("rope_type", kinds, "default")
        share, factor = section.number("partial_rotary_factor", 1.0), section.number("factor", 1.0)
        if head_dim % 2:
            raise CheckpointError(f"rotary embeddings: found {head_dim} dimensions, expected an even number")
        if kind == "proportional":
            tables.append(RopeTable(rope.proportional(head_dim, theta, share, factor)))
        else:  # which passes over the other keys
            tables.append(rope.plain(head_dim, theta))
        section.refuse_others(_OTHER_SCALINGS, f"rope_type {kind}")
    for layer_type in (FULL, SLIDING):
        sections.get(layer_type)  # known where no layer is of this type, too
    sections.refuse_others(NOTHING, "a model with rope_parameters for each layer type")
    return tuple(tables)


class _Section:
    """One section of rotary parameters, and what stands around it."""

    def __init__(
        self,
        fields: Fields,
        section: Fields,
        head_dim: int,
        max_positions: int,
        kinds: Mapping[str, str],
        partial: bool = False,
        scales_queries: bool = False,
    ) -> None:
        self._fields = fields
        self._section = section
        self._head_dim = head_dim
        self._max_positions = max_positions
        self._key = "rope_type" if "rope_type" in section.values else "type"
        self._kind = section.choice(self._key, kinds, "default")
        other = section.get("type")
        if other is not None and section.choice("type", kinds) != self._kind:
            raise section.error("type", other, f"{found(section.get('rope_type'))}, as rope_type is")
        self._partial = partial
        self._scales_queries = scales_queries

    def table(self, theta: str | float, original: int | None) -> RopeTable:
        """The table; theta: see `tables_by_layer_type`; original: of the top level, which goes first."""
        section, kind = self._section, self._kind
        base = self._theta(theta)
        dim = self._rotary_dim()
        plain = rope.frequencies(dim, base)
        result = RopeTable(plain)
        if kind == "linear":
            result = RopeTable(rope.linear(plain, section.number("factor")))
        elif kind == "dynamic":
            result = self._dynamic(dim, base)
        elif kind in ("llama3", "yarn", "longrope"):
            own = section.integer("original_max_position_embeddings", self._max_positions, 1 << 30)
            make = {"llama3": self._llama3, "yarn": self._yarn, "longrope": self._longrope}[kind]
            result = make(dim, base, own if original is None else original)
        if self._scales_queries:
            length = section.integer("original_max_position_embeddings", maximum=1 << 30)
            section.get("max_position_embeddings")  # the class repeats it here
            result = RopeTable(
                result.frequencies,
                result.attention_factor,
                (section.number("llama_4_scaling_beta"), length),
                result.max_positions,
            )
        section.refuse_others(_OTHER_SCALINGS, f"rope_type {kind}")
        return result

    def _theta(self, theta: str | float) -> float:
        if "rope_theta" in self._section.values:
            return self._section.number("rope_theta")
        return self._fields.number(theta, rope.DEFAULT_THETA) if isinstance(theta, str) else theta

    def _rotary_dim(self) -> int:
        section, name = self._section, "partial_rotary_factor"
        where = section if section.has(name) else self._fields
        share = where.number_or_none(name)
        self._fields.get(name)
        if not self._partial:  # a whole head, which a scaling would not know of
            if self._kind != "default" and share not in (None, 1):
                raise where.error(name, share, f"none beside {self._key} {self._kind}")
            share = 1.0
        dim = int(self._head_dim * (1.0 if share is None else share))
        if not 1 <= dim <= self._head_dim:
            raise where.error(name, share, f"a share of the {self._head_dim} dimensions of a head")
        if dim % 2 and (dim == self._head_dim or self._kind in ("dynamic", "yarn", "longrope")):
            raise CheckpointError(f"rotary embeddings: found {dim} dimensions, expected an even number")
        return dim

    def _dynamic(self, dim: int, base: float) -> RopeTable:
        factor = self._section.number("factor")
        if dim < 4:
            raise self._section.error(
                self._key, "dynamic", f"another one for heads of {dim} rotated dimensions"
            )
        return rope.DynamicRope(
            rope.frequencies(dim, base),
            max_positions=int(factor * self._max_positions),
            theta=base,
            original=self._max_positions,
            factor=factor,
        )

    def _llama3(self, dim: int, base: float, original: int) -> RopeTable:
        section = self._section
        factor = section.number("factor")
        low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
        if high <= low:
            raise section.error("high_freq_factor", high, f"more than low_freq_factor, {low}")
        return RopeTable(rope.llama3(rope.frequencies(dim, base), factor, low, high, original))

    def _yarn(self, dim: int, base: float, original: int) -> RopeTable:
        section = self._section
        for name in ("attn_factor", "extrapolation_factor"):
            section.get(name)  # other code's: transformers warns of such a key and passes over it
        ratio = self._max_positions / original
        is_null = "factor" in section.values and not section.has("factor")
        factor = ratio if is_null else section.number("factor")
        magnitude = section.number_or_none("attention_factor")
        mscale, of_all = (self._number_or_zero(name) for name in ("mscale", "mscale_all_dim"))
        if magnitude is None and mscale and of_all:
            magnitude = rope.yarn_magnitude(factor, mscale) / rope.yarn_magnitude(factor, of_all)
        elif magnitude is None:
            magnitude = rope.yarn_magnitude(factor)
        turned = rope.yarn(
            dim,
            base,
            factor,
            original,
            self._number_or_zero("beta_fast") or rope.BETA_FAST,
            self._number_or_zero("beta_slow") or rope.BETA_SLOW,
            section.boolean("truncate", True),
        )
        return RopeTable(turned, magnitude, max_positions=int(factor * original))

    def _longrope(self, dim: int, base: float, original: int) -> RopeTable:
        section = self._section
        short, long = (self._factors(name, dim // 2) for name in ("short_factor", "long_factor"))
        factor = section.number("factor") if section.has("factor") else self._max_positions / original
        magnitude = section.number_or_none("attention_factor")
        if magnitude is None:
            magnitude = rope.longrope_magnitude(factor, original)
        plain = rope.frequencies(dim, base)
        return rope.LongRope(
            rope.divided(plain, short),
            magnitude,
            long_frequencies=rope.divided(plain, long),
            original=original,
        )

    def _number_or_zero(self, name: str) -> float:
        """A positive number, or 0 where it is null, absent or zero: then transformers takes its own."""
        value = self._section.get(name)
        return (
            0.0
            if value is None or (type(value) in (int, float) and value == 0)
            else self._section.number(name)
        )

    def _factors(self, name: str, count: int) -> list[float]:
        value = self._section.get(name)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(type(one) in (int, float) and 0 < one < 1e30 for one in value)
        ):
            raise self._section.error(name, value, f"a list of {count} positive numbers")
        return value


def _check_agreement(current: Fields, legacy: Fields, fields: Fields) -> None:
    """Refuses `rope_parameters` that say anything but the default where `rope_scaling` replaces them."""
    base = fields.get("rope_theta", rope.DEFAULT_THETA)
    replaced = {"rope_type": legacy.get("type", "default"), "rope_theta": base} | dict(legacy.values)
    for name, value in current.values.items():
        if value is not None and value != "default" and value != replaced.get(name):
            raise current.error(
                name,
                value,
                _as_scaling_has(replaced.get(name)),
            )


def _as_scaling_has(value: object) -> str:
    return f"{found(value)}, as rope_scaling has it, which is there, too"
