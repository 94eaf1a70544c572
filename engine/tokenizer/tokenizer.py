"""The tokenizer: text to token ids and back.

The order of `encode` is the reference's: added tokens are cut out, the stretches between them are normalised
and cut into words, each word becomes ids. It knows no family: which files the vocabulary came from is the
readers' business, and what becomes of a word that of its model (`bpe`, `sentencepiece`).
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import chain, islice
from typing import Any

from pagellm.engine.checks import flag
from pagellm.engine.checks import text as checked_text
from pagellm.engine.errors import CheckpointError, RequestError, found
from pagellm.engine.tokenizer.added_tokens import AddedToken, AddedVocabulary
from pagellm.engine.tokenizer.bpe import Bpe
from pagellm.engine.tokenizer.chat_template import ChatTemplate
from pagellm.engine.tokenizer.control_tokens import ControlTokens, MarkInUseError
from pagellm.engine.tokenizer.decoders import Invalid, TextStream, byte_of_token
from pagellm.engine.tokenizer.normalization import Start
from pagellm.engine.tokenizer.spec import MAX_ID, TokenizerSpec
from pagellm.engine.tokenizer.thinking import effort_variables, switch_variables
from pagellm.engine.tokenizer.word_cache import WordCache

_MARK_ATTEMPTS = 8
_AT_ONCE = 1 << 15  # ids that are gathered without giving other threads a turn


class Tokenizer:
    """The tokenizer of one model, of whichever family.

    `decode(encode(text)) == text` for every valid Unicode text, if the tokenizer has no normaliser, adds no
    prefix space or BOS, and has an entry for each byte. Safe to use from several threads.

    vocab_size: the highest id plus one, added tokens included.
    model_vocab_size: the number of ids that the model can produce, at least `vocab_size`. An id that no token
    has (padding of the model's vocabulary) stands for no bytes.
    bos_token_id, eos_token_ids: the ids that begin a text, and all that end a turn (its own end token first).
    special_ids: the ids of all special tokens.
    prefix_ids, suffix_ids: what `encode` puts around a text, such as the BOS.
    decoder: how ids become text.
    chat_template: the model's chat template, if it has one.
    absence: why there is no tokenizer, where `vocab_size` is 0.

    Raises `CheckpointError` if the parts of the description contradict each other.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self._model = spec.model
        self._normalize = spec.normalizer
        self._added = AddedVocabulary(spec.added_tokens, self._normalize)
        self._pretokenizer = spec.pretokenizer
        self._words = WordCache(spec.model.encode_word)
        self.decoder = spec.decoder
        self._vocab = spec.vocab
        added_ids = [token.id for token in spec.added_tokens]
        self.vocab_size = max(chain(spec.vocab.values(), added_ids), default=-1) + 1
        self.model_vocab_size = max(self.vocab_size, spec.model_vocab_size or 0)
        if self.model_vocab_size > MAX_ID + 1:
            raise CheckpointError(
                f"vocab_size: found {found(spec.model_vocab_size)}, expected at most {MAX_ID + 1}"
            )
        self.absence = spec.absence
        self.special_ids = frozenset(token.id for token in spec.added_tokens if token.special)
        self.bos_token_id = self._known(spec.bos_token_id, "bos_token_id")
        self.eos_token_ids = tuple(dict.fromkeys(spec.eos_token_ids))
        for token_id in self.eos_token_ids:
            self._known(token_id, "eos_token_id")
        self.prefix_ids, self.suffix_ids = spec.prefix_ids, spec.suffix_ids
        self.chat_template = None
        if spec.chat_templates:
            ids = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_id}
            tokens = {role: self.decode([token_id]) for role, token_id in ids.items() if token_id is not None}
            named = tokens if spec.template_tokens is None else spec.template_tokens
            self.chat_template = ChatTemplate(spec.chat_templates, named)

    @property
    def added_tokens(self) -> list[str]:
        """What its added tokens say."""
        return [token.content for token in self._added.tokens]

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """What its special tokens say in the midst of a text, by id."""
        return {token_id: self.decode([token_id], continues=True) for token_id in sorted(self.special_ids)}

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end token."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def add_bos_token(self) -> bool:
        """Whether `encode` puts the BOS first."""
        return self.bos_token_id is not None and self.prefix_ids[:1] == (self.bos_token_id,)

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """The ids of the text.

        add_special_tokens: put `prefix_ids` and `suffix_ids` around it.
        parse_special: recognise special tokens that are written out in the text. Without it a user's text
        cannot forge an end of turn.

        Raises `RequestError` for what is not a string, a text with a lone surrogate (which has no UTF-8), and
        any text where the checkpoint brought no tokenizer.
        """
        if not isinstance(text, str):
            raise RequestError(f"text: found {found(text)}, expected a string")
        if text and self.vocab_size == 0:
            raise RequestError(f"text: found {found(text)}, expected token ids: {self.absence}")
        ids = self._encode(text, Start.TEXT, parse_special=parse_special)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def fewest_tokens(self, text: str) -> int:
        """A number that the text's tokens do not fall below, found at once.

        It is 0 where a tokenizer may leave some of a text out, or makes one token of all that it lacks.
        """
        return -(-len(text) // self._most_characters) if self._most_characters else 0

    def check_length(self, name: str, text: str, most_tokens: int | None) -> None:
        """Raises `RequestError` for a text that is found at once to have more tokens."""
        fewest = 0 if most_tokens is None else self.fewest_tokens(text)
        if most_tokens is not None and fewest > most_tokens:
            raise RequestError(
                f"{name}: found {len(text)} characters, which are {fewest} tokens at least, expected at most"
                f" {most_tokens}"
            )

    @cached_property
    def _most_characters(self) -> int | None:
        """So many characters of a text one token may stand for at most; None if that is not known."""
        most_to_one = self._normalize.most_to_one
        swallows = any(token.lstrip or token.rstrip for token in self._added.tokens)
        if most_to_one is None or swallows:
            return None
        is_whole = isinstance(self._model, Bpe) and self._model.drops_nothing
        if not (is_whole and self._pretokenizer.drops_nothing):
            return None
        return most_to_one * max(map(len, self._bytes_of_id), default=1)

    def encode_within(self, text: str) -> list[int]:
        """The ids of a text that stands in the midst of another one: nothing is put before or behind it.

        Special tokens that are written out in it are plain text. Raises `RequestError` as `encode`.
        """
        return self._encode(text, Start.WITHIN, parse_special=False)

    def _encode(self, text: str, start: Start, *, parse_special: bool = True) -> list[int]:
        """The ids of a text that begins at `start`."""
        ids: list[int] = []
        try:
            for piece in self._added.split(text, parse_special=parse_special, start=start):
                if isinstance(piece, AddedToken):
                    ids.append(piece.id)
                else:
                    words = iter(self._encode_words(*piece))
                    while more := list(islice(words, _AT_ONCE)):
                        ids += more
        except UnicodeEncodeError:
            at, char = next((at, char) for at, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise RequestError(
                f"text: found the lone surrogate U+{ord(char):04X} at character {at}, expected valid Unicode"
            ) from None
        return ids

    def _encode_words(self, text: str, start: Start) -> Iterable[int]:
        """The ids of a normalised text without added tokens."""
        return chain.from_iterable(map(self._words.__getitem__, self._pretokenizer(text, start)))

    def decode(
        self, ids: Iterable[int], *, skip_special_tokens: bool = False, continues: bool = False
    ) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        continues: the ids go on with a text: the space at its beginning that some tokenizers put there, and
        take away again, is one between words then.

        Raises `RequestError` for an id outside `0 .. model_vocab_size - 1`.
        """
        ids = list(ids)
        if self._is_plain:
            table = self._bytes_without_special if skip_special_tokens else self._bytes_of_id
            try:
                if ids and min(ids) >= 0:
                    return b"".join(map(table.__getitem__, ids)).decode("utf-8", "replace")
            except (IndexError, TypeError):
                pass
        # Empty, or one that is no id: that one is named.
        stream = self.text_stream(continues=continues)
        skipped = self.special_ids if skip_special_tokens else frozenset()
        pieces = [self.stream_piece(token_id) for token_id in ids]
        kept = [piece for piece, id_ in zip(pieces, ids, strict=True) if id_ not in skipped]
        return "".join([stream.append(*piece) for piece in kept]) + stream.finish()

    def text_stream(self, *, continues: bool = False) -> TextStream:
        """What puts a text together from `stream_piece`."""
        return TextStream(self.decoder, continues=continues)

    def stream_piece(self, token_id: int) -> tuple[bytes, str | None]:
        """A token as `TextStream.append` takes it.

        Raises `RequestError` for an id outside `0 .. model_vocab_size - 1`.
        """
        return self.token_bytes(token_id), self._text_of_id[token_id]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: often a part of a character only.

        Raises `RequestError` for an id outside `0 .. model_vocab_size - 1`.
        """
        try:
            if token_id >= 0:
                return self._bytes_of_id[token_id]
        except (IndexError, TypeError):
            pass
        raise RequestError(
            f"token id: found {found(token_id)}, expected one from 0 to {self.model_vocab_size - 1}"
        )

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        """The bytes of every id that the model can produce."""
        bytes_of = self.decoder.bytes_of
        table = [b""] * self.model_vocab_size
        for token, token_id in self._vocab.items():
            table[token_id] = bytes_of(token)
        # The library decodes an added token like any other: letters such as "é" in it are bytes, too.
        for token_id, text in self._added.texts.items():
            table[token_id] = bytes_of(text)
        return table

    @cached_property
    def _text_of_id(self) -> list[str | None]:
        """The token of every id as the vocabulary has it; None for a byte token."""
        table: list[str | None] = [""] * self.model_vocab_size
        added = [(text, token_id) for token_id, text in self._added.texts.items()]
        byte_tokens = self.decoder.byte_tokens
        for token, token_id in chain(self._vocab.items(), added):
            table[token_id] = None if byte_tokens and byte_of_token(token) is not None else token
        return table

    @property
    def _is_plain(self) -> bool:
        """Whether a text is its tokens' bytes, put together."""
        decoder = self.decoder
        return decoder.strip[1] == 0 and decoder.lead_bytes is None and decoder.invalid is Invalid.SEQUENCE

    @cached_property
    def _bytes_without_special(self) -> list[bytes]:
        table = self._bytes_of_id.copy()
        for token_id in self.special_ids:
            table[token_id] = b""
        return table

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The conversation as the text that the model was trained on.

        The template writes every special token itself, so encode the result with `add_special_tokens=False`.

        messages, options: as `ChatTemplate.render` takes them.

        Raises `RequestError` if the model has no chat template, or the template refuses the messages, and
        `CheckpointError` if the template itself is broken or hostile.
        """
        return self._own_chat_template.render(messages, **options)

    def thinking_variables(
        self, chat_template: str | None, is_on: bool | None, effort: str | None
    ) -> dict[str, Any]:
        """The chat template's variables that say whether to think, and how much. None leaves it open.

        chat_template: as in `ChatTemplate.render`. Raises `RequestError` where the template has none.
        """
        template, variables = self._own_chat_template, dict[str, Any]()
        if is_on is not None:
            variables |= switch_variables(template, chat_template, flag("thinking", is_on))
        if effort is not None:
            efforts = effort_variables(template, chat_template, checked_text("reasoning_effort", effort))
            for name in variables.keys() & efforts.keys():
                raise RequestError(
                    f"reasoning_effort: found {found(effort)} beside thinking, which sets {name}"
                )
            variables |= efforts
        return variables

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        sanitize_control_tokens: bool = False,
        most_tokens: int | None = None,
        **options: Any,
    ) -> list[int]:
        """The ids of a conversation as `apply_chat_template` lays it out, up to where the answer begins.

        sanitize_control_tokens: control tokens that messages, tools or variables write out are text, so that
        nobody can forge an end of turn. What has none in it gets the same ids either way. They are the
        special tokens, and those other added ones that the template itself writes.
        most_tokens: so many are of use; of what is found to have more at once the ids are not looked for.
        messages, options: as `ChatTemplate.render` takes them.

        Raises `RequestError` and `CheckpointError` as `apply_chat_template`. With sanitize_control_tokens
        also for a role that is not one of the usual ones.
        """
        if not flag("sanitize_control_tokens", sanitize_control_tokens):
            text = self.apply_chat_template(messages, **options)
            self.check_length("messages", text, most_tokens)
            return self.encode(text, add_special_tokens=False)
        return self._encode_sanitized(messages, most_tokens, options)

    def _encode_sanitized(
        self, messages: Sequence[Mapping[str, Any]], most_tokens: int | None, options: dict[str, Any]
    ) -> list[int]:
        chat_template = self._own_chat_template
        written = chat_template.template(options.get("chat_template"), options.get("tools")).literals
        contents = [
            token.content
            for token in self._added.tokens
            if token.special or (token.content in written and not token.content.isspace())
        ]
        for attempt in range(_MARK_ATTEMPTS):
            control_tokens = ControlTokens(contents, attempt)
            with suppress(MarkInUseError):
                rendered = chat_template.render(messages, **options, control_tokens=control_tokens)
                break
        else:
            raise RequestError("messages: found code points of plane 16, which mean nothing, expected text")
        pieces = list(control_tokens.pieces(rendered))
        self.check_length("messages", "".join(piece.text for piece in pieces), most_tokens)
        ids: list[int] = []
        start = Start.TEXT
        for piece in pieces:
            if not piece.text:
                continue
            if piece.is_forged:
                ids += self._encode_words(self._normalize(piece.text, start), start)
            else:
                ids += self._encode(piece.text, start)
            start = Start.WITHIN
        return ids

    @property
    def _own_chat_template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RequestError(
                "chat: this model has no chat template; send it a plain prompt instead of messages"
            )
        return self.chat_template

    def _known(self, token_id: int | None, field: str) -> int | None:
        if token_id is not None and not 0 <= token_id < self.model_vocab_size:
            raise CheckpointError(
                f"{field}: found {token_id}, expected an id from 0 to {self.model_vocab_size - 1}"
            )
        return token_id
