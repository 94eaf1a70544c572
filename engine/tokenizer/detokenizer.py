"""The incremental detokenizer: text as it becomes complete, token by token.

A token is bytes, and a character may be spread over several tokens: what has arrived of it is held back
until the rest comes. It knows nothing of stop strings or of the request.
"""

from pagellm.engine.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes one stream of ids.

    The pieces it returns, joined, with `finish()` at the end, are exactly `tokenizer.decode(ids)` of all the
    ids with the same `skip_special_tokens` and `continues`. Each token costs O(1), however long the stream.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._continues = continues
        self._stream = tokenizer.text_stream(continues=continues)

    def append(self, token_id: int) -> str:
        """The text that this token completes: "" while a character is unfinished.

        Raises `RequestError` for an id that the model cannot produce.
        """
        piece = self._tokenizer.stream_piece(token_id)
        return "" if token_id in self._skipped else self._stream.append(*piece)

    def finish(self) -> str:
        """The rest at the stream's end: U+FFFD for an unfinished character. Ready for another stream then."""
        rest = self._stream.finish()
        self._stream = self._tokenizer.text_stream(continues=self._continues)
        return rest
