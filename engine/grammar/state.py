"""How far one completion has come in its grammar: what may follow, what must, and whether it is complete.

All of it follows from the completion's tokens: whoever begins again with the same ones comes to the same
state.
"""

from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Any

from pagellm.engine.errors import PagellmError
from pagellm.engine.grammar.compiler import Grammar
from pagellm.engine.grammar.masks import Mask, MaskJob, MaskWorker, allows, mask_of, with_token, without
from pagellm.engine.grammar.trial import first_line


class GrammarError(PagellmError):
    """A grammar that cannot be followed any further, because of what it costs."""


class GrammarState:
    """The state of one completion, which `append` takes further.

    never: tokens that do not come although the grammar allows them: end-of-text tokens, say. banned: tokens
    that the request itself forbids, for which the grammar does not force them.
    opening: tokens that may come before everything else, all of them or none.

    forced: the tokens that come next whatever would be sampled, because no others can; they are found when
    the ones before are spent, so it does not matter how many of them are taken at a time.
    """

    def __init__(
        self, grammar: Grammar, never: Iterable[int] = (), banned: Container[int] = (),
        opening: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._grammar = grammar
        self._matcher: Any = grammar.new_matcher()
        self._never = tuple(never)
        self._opening = tuple(opening)
        self._mask: Mask | None = without(grammar.first_mask, self._never)
        if opening and not allows(self._mask, opening[0]):
            self._mask = with_token(self._mask, opening[0])
        else:
            self._opening = ()
        self._banned = banned
        self.forced: deque[int] = deque()
        if not self._opening:
            self._force(grammar.first_forced)
        self._job: tuple[MaskJob, int] | None = None
        self.has_begun = False
        self.is_complete = False

    @property
    def all_but_end(self) -> Mask:
        """The mask of all tokens but those that end a text."""
        return self._grammar.all_but_end

    @property
    def needs_mask(self) -> bool:
        """Whether the next token is sampled, from tokens that have not been looked for yet."""
        return not self.forced and not self.is_complete and self._mask is None and self._job is None

    def mask(self) -> Mask:
        """The tokens that may come next. Raises `GrammarError`."""
        if self._mask is None:
            mask = None if self._job is None else self._job[0].wait(self._job[1])
            if mask is None:
                mask = mask_of(self._matcher, self._grammar.vocab_size)
            self._check()
            self._mask = without(mask, self._never)
            self._job = None
        return self._mask

    def append(self, token_id: int) -> None:
        """Takes the next token. Raises `GrammarError` for one that cannot come."""
        self.has_begun = True
        if self._opening and token_id == self._opening[0]:
            self._opening = self._opening[1:]
            self.forced = deque(self._opening)
            if not self._opening:  # all that was is still to come
                self.has_begun = False
                self._mask = without(self._grammar.first_mask, self._never)
                self._force(self._grammar.first_forced)
            return
        self._opening = ()
        self._mask = self._job = None
        if self.forced:
            self.forced.popleft()
        if not self._matcher.consume_token(token_id):
            self._check()
            raise GrammarError(f"structured: found token {token_id}, which cannot come here")
        if not self.forced:
            self.is_complete = self._matcher.is_stopped()
            self._check()
            if not self.is_complete:
                self._force(self._matcher.compute_ff_tokens())

    def _force(self, token_ids: Sequence[int]) -> None:
        if not any(token_id in self._banned for token_id in token_ids):
            self.forced.extend(token_ids)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"structured: {first_line(self._matcher.get_error())}")


def begin_masks(worker: MaskWorker, states: Sequence[GrammarState]) -> None:
    """Begins to look for what may come next in each of these, where that is to be known."""
    needing = [state for state in states if state.needs_mask]
    if needing:
        job = worker.begin([state._matcher for state in needing])
        for row, state in enumerate(needing):
            state._job = job, row
