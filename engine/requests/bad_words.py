"""Bad words: texts that an output is not to contain, each kept out by its last token.

The rule is vLLM's (`SamplingParams.update_from_tokenizer`, `v1/sample/ops/bad_words.py`; version 0.33), but
for one thing: a word with a space before it counts, however many tokens it has then.
"""

from collections.abc import Sequence

from pagellm.engine.errors import RequestError, found
from pagellm.engine.tokenizer import Tokenizer


class BadWords:
    """The tokens of a request's bad words: as they stand alone, and behind a space.

    Where an output ends with all tokens of one of these but the last, that one is forbidden. What the prompt
    ends with does not count, nor do other tokens that say the same. Raises `RequestError` for a word that has
    no tokens. last_ids: the tokens that may be forbidden.
    """

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str]) -> None:
        # By the number of tokens before the last one: these tokens, and which may be the last.
        self._last_after: dict[int, dict[tuple[int, ...], list[int]]] = {}
        last_ids = set()
        for word in words:
            start = word.lstrip() or word
            for text in (start, f" {start}"):
                ids = tokenizer.encode(text, add_special_tokens=False)
                if not ids:
                    raise RequestError(f"bad_words: found {found(word)}, expected a text that has tokens")
                *before, last = ids
                lasts = self._last_after.setdefault(len(before), {}).setdefault(tuple(before), [])
                if last not in lasts:
                    lasts.append(last)
                last_ids.add(last)
        self.last_ids = frozenset(last_ids)

    def forbidden(self, output: Sequence[int]) -> list[int]:
        """The tokens that must not come next."""
        forbidden: list[int] = []
        for size, last_after in self._last_after.items():
            if size <= len(output):
                forbidden += last_after.get(tuple(output[len(output) - size :]), ())
        return forbidden
