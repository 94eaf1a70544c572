"""Text to tokens and back: BPE on bytes and SentencePiece, incremental detokenization, chat templates.

In the order in which data flows: `directory`, `tokenizer_json` (with a file for each of its sections),
`tokenizer_model` (with `protobuf` and `charsmap`) and `gguf_metadata` read a description (`spec`), with added
tokens numbered by `added_token_table` and patterns translated by `oniguruma`; `tokenizer` encodes with
`added_tokens`, `normalization`, `pretokenizers` (of `families`) and one of the models `bpe`, `sentencepiece`
and `unigram`; `decoders` and `detokenizer` stream text out; `chat_template` makes prompts of conversations.
"""

from pagellm.engine.tokenizer.chat_template import ChatTemplate
from pagellm.engine.tokenizer.detokenizer import IncrementalDetokenizer
from pagellm.engine.tokenizer.loading import load_tokenizer
from pagellm.engine.tokenizer.spec import TokenizerSpec
from pagellm.engine.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Tokenizer", "TokenizerSpec", "load_tokenizer"]
