"""The added tokens as the files of a checkpoint list them, numbered as the `tokenizers` library numbers them.

The library takes no id from a file: a token of the vocabulary keeps its id, any other gets the next one. So a
file whose ids are others describes a tokenizer that the library would not make, and is refused.
"""

from collections.abc import Mapping
from dataclasses import replace

from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.tokenizer.added_tokens import AddedToken


class AddedTokenTable:
    """Added tokens by content, in the order in which they were added."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self._vocab = vocab
        self._token_of: dict[str, AddedToken] = {}
        self._highest = -1

    def __contains__(self, content: str) -> bool:
        return content in self._token_of

    @property
    def tokens(self) -> tuple[AddedToken, ...]:
        """All of them, in the order in which they were added."""
        return tuple(self._token_of.values())

    def id_of(self, content: str) -> int:
        """The id that the token has, or would get."""
        if content in self._token_of:
            return self._token_of[content].id
        return self._vocab.get(content, max(len(self._vocab), self._highest + 1))

    def add(self, token: AddedToken, where: str) -> None:
        """Adds a token, or changes how one that is there is recognised.

        Raises `CheckpointError` if it says another id than the library would give it.
        """
        expected = self.id_of(token.content)
        if token.id != expected:
            known = token.content in self._token_of or token.content in self._vocab
            reason = "which it has already" if known else "the next one"
            raise CheckpointError(
                f"{where}: found id {token.id} for {found(token.content)}, expected {expected}, {reason}"
            )
        before = self._token_of.get(token.content)
        if before is not None:
            token = replace(
                token,
                special=token.special or before.special,
                normalized=before.normalized and (token.normalized or before.special),
            )
        self._token_of[token.content] = token
        self._highest = max(self._highest, token.id)
