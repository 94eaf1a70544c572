"""What a checkpoint says about its tokenizer, whichever files it was read from.

The readers (`tokenizer_json`, `directory`, `gguf_metadata`) make a `TokenizerSpec`; `Tokenizer` is built
from one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from pagellm.engine.tokenizer.added_tokens import AddedToken
from pagellm.engine.tokenizer.bpe import Bpe
from pagellm.engine.tokenizer.decoders import BYTE_LEVEL, Decoder
from pagellm.engine.tokenizer.normalization import NO_NORMALIZER, Normalizer
from pagellm.engine.tokenizer.pretokenizers import Pretokenizer

# Far above any vocabulary; tables are as long as the highest id.
MAX_ID = (1 << 24) - 1


class WordModel(Protocol):
    """Turns a word that the pre-tokenizer cut out into ids."""

    def encode_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word; raises `UnicodeEncodeError` if it has a lone surrogate."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """A tokenizer, described.

    A text is normalised by `normalizer`, cut by `pretokenizer`, and its words become ids by `model`, between
    `prefix_ids` and `suffix_ids`; `decoder` says how ids become text. `eos_token_ids` has the tokenizer's own
    end token first, then every other id that ends a turn. `model_vocab_size` is the number of rows of the
    model's output, which padding often makes larger than the vocabulary. `absence` says why there is no
    vocabulary, where there is none. `chat_templates` are by name; the only one of a model is its "default".
    `template_tokens` are the tokens that they see by role, such as `bos_token`; None: the BOS and the first
    EOS.
    """

    vocab: Mapping[str, int]
    model: WordModel
    pretokenizer: Pretokenizer
    added_tokens: tuple[AddedToken, ...] = ()
    normalizer: Normalizer = NO_NORMALIZER
    decoder: Decoder = BYTE_LEVEL
    bos_token_id: int | None = None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    template_tokens: Mapping[str, str] | None = None
    model_vocab_size: int | None = None
    absence: str = "this model came without a tokenizer"


# Of a checkpoint that brings no tokenizer: it serves token ids, and they decode to nothing.
NO_TOKENIZER = TokenizerSpec({}, Bpe({}, ()), Pretokenizer([]))
