"""What becomes of a character that the vocabulary lacks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from pagellm.engine.tokenizer.decoders import byte_token


class Fallback:
    """The ids of characters that the vocabulary lacks.

    byte_ids: the ids of the 256 bytes' tokens, None where one is missing; they are used where a character has
    all of its bytes. Else the unknown token, one for a whole run of such characters; else nothing.
    """

    def __init__(self, byte_ids: Sequence[int | None], unk_id: int | None) -> None:
        self._byte_ids = byte_ids
        self.unk_id = unk_id

    @property
    def all_ids(self) -> set[int]:
        """Every id that can stand for a character here."""
        return {id_ for id_ in (*self._byte_ids, self.unk_id) if id_ is not None}

    def ids(self, char: str) -> list[int]:
        """The ids of one character."""
        ids = [id_ for byte in char.encode() if (id_ := self._byte_ids[byte]) is not None]
        if len(ids) == len(char.encode()):
            return ids
        return [] if self.unk_id is None else [self.unk_id]

    def fused(self, ids: list[int]) -> list[int]:
        """The ids of a text with one unknown token where several follow each other."""
        unk_id = self.unk_id
        if unk_id is None or ids.count(unk_id) < 2:
            return ids
        return [id_ for before, id_ in pairwise([-1, *ids]) if id_ != unk_id or before != unk_id]


def byte_ids_of(vocab: Mapping[str, int]) -> list[int | None]:
    """The ids of the 256 bytes' tokens such as "<0x0A>", None where the vocabulary has none."""
    return [vocab.get(byte_token(byte)) for byte in range(256)]


NO_BYTES: tuple[int | None, ...] = (None,) * 256
