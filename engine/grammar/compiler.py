"""Forms of requests compiled to grammars for one model's tokens, and remembered."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from pagellm.engine.errors import RequestError
from pagellm.engine.grammar.masks import MaskWorker, mask_of, without
from pagellm.engine.grammar.trial import Trial, first_line, parser_limits
from pagellm.engine.grammar.vocabulary import ll_tokenizer, token_bytes
from pagellm.engine.requests.structured import StructuredOutputs
from pagellm.engine.tokenizer import Tokenizer

_MOST_REMEMBERED = 128  # forms


class Grammar:
    """A compiled form. No array here is to be changed.

    first_mask, first_forced: the tokens that an output may begin with, and those that it must.
    all_but_end: the mask of all tokens but those that end a text.
    """

    def __init__(self, matcher: Any, vocab_size: int, eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self.vocab_size = vocab_size
        self.first_mask = mask_of(matcher, vocab_size)
        self.first_forced = tuple(matcher.compute_ff_tokens())
        self.all_but_end = without(np.full_like(self.first_mask, 0xFFFFFFFF), eos_ids)
        self.first_mask.flags.writeable = self.all_but_end.flags.writeable = False

    def new_matcher(self) -> Any:
        """Where an output begins, for one completion alone."""
        return self._matcher.deep_copy()


class GrammarCompiler:
    """Compiles forms; safe to use from several threads.

    vocab_size: the ids that the model takes.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, num_threads: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._grammars: OrderedDict[StructuredOutputs, Grammar] = OrderedDict()
        self.masks = MaskWorker(vocab_size, num_threads)
        self._trial: Trial | None = None

    def compile(self, form: StructuredOutputs) -> Grammar:
        """The form's grammar. Raises `RequestError` for one that there is none of."""
        with self._lock:
            if form in self._grammars:
                self._grammars.move_to_end(form)
                return self._grammars[form]
        grammar = self._compiled(form)
        with self._lock:
            self._grammars[form] = grammar
            if len(self._grammars) > _MOST_REMEMBERED:
                self._grammars.popitem(last=False)
        return grammar

    def close(self) -> None:
        """Ends what it has begun."""
        self.masks.close()
        if self._trial is not None:
            self._trial.close()

    def _compiled(self, form: StructuredOutputs) -> Grammar:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RequestError(
                f"structured: found {form.form}, expected none: llguidance is not installed "
                "(pip install 'pagellm[structured]')"
            ) from None
        if self._tokenizer.vocab_size == 0:
            raise RequestError(f"structured: found {form.form}, expected none: {self._tokenizer.absence}")
        if not self._eos_ids:
            raise RequestError(
                f"structured: found {form.form}, expected none: this model has no end-of-text token"
            )
        with self._lock:
            if self._trial is None:
                self._trial = Trial(self._tokens, self._special_ids, self._eos_ids)
        grammar = self._trial.grammar_of(form)
        matcher = LLMatcher(self._ll_tokenizer, grammar, log_level=0, limits=parser_limits())
        compiled = None if matcher.is_error() else Grammar(matcher, self._vocab_size, self._eos_ids)
        if compiled is None or matcher.is_error():
            raise RequestError(f"structured.{form.form}: {first_line(matcher.get_error())}")
        if not compiled.first_mask.any():
            raise RequestError(f"structured.{form.form}: found one that no text has")
        return compiled

    @cached_property
    def _tokens(self) -> list[bytes]:
        return token_bytes(self._tokenizer, self._vocab_size)

    @cached_property
    def _special_ids(self) -> list[int]:
        return sorted(token_id for token_id in self._tokenizer.special_ids if token_id < self._vocab_size)

    @cached_property
    def _eos_ids(self) -> list[int]:
        return [token_id for token_id in self._tokenizer.eos_token_ids if token_id < self._vocab_size]

    @cached_property
    def _ll_tokenizer(self) -> Any:
        return ll_tokenizer(self._tokens, self._special_ids, self._eos_ids, self._tokenizer.encode_within)
