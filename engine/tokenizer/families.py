"""The pre-tokenizers of model families: their patterns by name, and what GGUF files call them.

Patterns are in the dialect that `oniguruma` translates.
"""

from typing import NamedTuple

from pagellm.engine.tokenizer.oniguruma import translate

_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370"
    "-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-"
    "\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-"
    "\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-"
    "\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4"
    "\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a"
    "-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-"
    "\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-"
    "\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-"
    "\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
)

_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_BLOOM_WORDS = r" ?[^(\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_QWEN2_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_LLAMA3_WORDS = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
)
_DEEPSEEK_WORDS = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
_CJK = r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_KIMI_LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]%s"
)

# Digits in threes, counted from the right: a run of them, wherever it ends, and one that ends a word only.
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
THREES_AT_END = r"\d{1,3}(?=(?:\d{3})*\b)"
# The places between them.
BETWEEN_THREES = r"(?=(\d{3})+(?!\d))"

# The patterns of a family, each cutting the pieces of the one before.
PATTERNS: dict[str, tuple[str, ...]] = {
    "gpt2": (_GPT2_WORDS,),
    "smollm": (
        r"\p{N}",
        _GPT2_WORDS,
    ),
    "llama3": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "qwen2": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "qwen35": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "o200k": (
        _O200K_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
        + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
    "tekken": (_O200K_WORDS % ("", "") + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",),
    "bailingmoe": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "seed-coder": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}",
    ),
    "deepseek-v3": (
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "newlines": (r"[^\n]+|\n+",),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "deepseek-llm": (
        r"[\r\n]",
        rf"\s?[{_DEEPSEEK_LETTERS}]+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}+",
    ),
    "spark": (
        r"\p{N}{1,3}",
        _CJK,
        rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
        r"\p{N}",
    ),
    "afmoe": (
        THREES,
        r"[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
        r"\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
        r"\u1100-\u11ff]+",
        rf"{_DEEPSEEK_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    ),
    "youtu": (
        r"[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
        r"\ufe30-\ufe4f]+|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        _O200K_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
        + rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2_WORDS, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "bloom": (_BLOOM_WORDS,),
    "viking": (_BLOOM_WORDS, r"\p{N}"),
    "chameleon": (
        r"<sentinel:[0-9]+>",
        r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
        r"([\t\n]|    |  )",
        r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]",
        _GPT2_WORDS,
    ),
    "jais-2": (
        rf"{_LLAMA3_WORDS}|\s*[\r\n]+|"
        + "".join([rf"\s{{{size}}}(?!\S)|" for size in (512, 256, 128, 64, 32, 16, 8, 4)])
        + r"\s{1,2}(?!\S)|\s{1}",
    ),
    "tiny-aya": (
        THREES_AT_END,
        _O200K_WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?")
        + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    ),
    "kimi-k2": (
        r"\p{Han}+|"
        + _KIMI_LETTERS % ("*", f"+{_CONTRACTIONS}?")
        + "|"
        + _KIMI_LETTERS % ("+", f"*{_CONTRACTIONS}?")
        + rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "superbpe": (r"\p{N}+", BETWEEN_THREES),
    "ufakzeka": (rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",),
    "laguna": (r"[^\n]+|[\n]+", _QWEN2_WORDS),
    "exaone-moe": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    "minicpm5": (
        r"\p{N}{1,3}",
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    ),
    "whitespace": (r"\S+",),
}

# Patterns that match every character, and any text in linear time.
COMPLETE = {
    translate(patterns[0]).quick
    for name, patterns in PATTERNS.items()
    if len(patterns) == 1 and name not in ("bloom", "whitespace")
} | {translate(_GPT2_WORDS).quick, translate(_QWEN2_WORDS).quick, translate(r"[^\n]+|[\n]+").quick}


class GgufPretokenizer(NamedTuple):
    """What llama.cpp takes a name in `tokenizer.ggml.pre` to mean.

    GGUF has no field for `ignore_merges` and `normalize_nfc` (the latter as the model's tokenizer.json has
    it); `add_bos` holds where the file does not say otherwise. `characters`: the vocabulary is not written in
    the byte-level alphabet; `visible_spaces`: nor are its spaces spaces.
    """

    family: str
    ignore_merges: bool = False
    add_bos: bool = False
    normalize_nfc: bool = False
    characters: bool = False
    visible_spaces: bool = False


# All names of llama.cpp's llama-vocab.cpp. (Where its own pattern only approximates the one in the model's
# tokenizer.json, the latter stands above.)
_GPT2 = (
    "gpt-2 phi-2 jina-es jina-de jina-v2-es jina-v2-de gigachat a.x-4.0 mellum modern-bert mpt olmo jais"
    " trillion granite-docling exaone4 jina-v1-en jina-v2-code roberta-bpe"
)
_SMOLLM = "smollm starcoder refact codeshell exaone minerva-7b mellum2"
_LLAMA3 = "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
_QWEN2 = "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"
_OWN = "deepseek-coder deepseek-llm falcon default viking jais-2 kimi-k2 superbpe ufakzeka laguna exaone-moe"
GGUF_PRETOKENIZERS: dict[str, GgufPretokenizer] = {
    **dict.fromkeys(_GPT2.split(), GgufPretokenizer("gpt2")),
    **dict.fromkeys(_SMOLLM.split(), GgufPretokenizer("smollm")),
    **dict.fromkeys(_LLAMA3.split(), GgufPretokenizer("llama3", ignore_merges=True, add_bos=True)),
    **dict.fromkeys(["dbrx", "smaug-bpe", "chatglm-bpe"], GgufPretokenizer("llama3")),
    **dict.fromkeys(["glm4", "glm5"], GgufPretokenizer("llama3", ignore_merges=True)),
    **dict.fromkeys(_QWEN2.split(), GgufPretokenizer("qwen2")),
    "command-r": GgufPretokenizer("smollm", normalize_nfc=True),
    "qwen2": GgufPretokenizer("qwen2", normalize_nfc=True),
    "qwen35": GgufPretokenizer("qwen35"),
    **dict.fromkeys(["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], GgufPretokenizer("o200k")),
    "granite-embed-multi-97m": GgufPretokenizer("o200k", ignore_merges=True),
    **dict.fromkeys(["tiny_aya", "cohere2moe"], GgufPretokenizer("tiny-aya")),
    "tekken": GgufPretokenizer("tekken", ignore_merges=True, add_bos=True),
    **dict.fromkeys(["bailingmoe", "bailingmoe2", "llada-moe"], GgufPretokenizer("bailingmoe")),
    "seed-coder": GgufPretokenizer("seed-coder"),
    **dict.fromkeys(["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], GgufPretokenizer("deepseek-v3")),
    **dict.fromkeys(["bloom", "poro-chat", "gpt3-finnish"], GgufPretokenizer("bloom")),
    "spark2_5": GgufPretokenizer("spark"),
    "youtu": GgufPretokenizer("youtu", ignore_merges=True),
    "minicpm5": GgufPretokenizer("minicpm5", ignore_merges=True),
    "chameleon": GgufPretokenizer("chameleon", add_bos=True),
    "afmoe": GgufPretokenizer("afmoe"),
    **{name: GgufPretokenizer(name) for name in _OWN.split()},
    **dict.fromkeys(
        ["gemma4", "granite-embed-multi-311m"],
        GgufPretokenizer("newlines", add_bos=True, characters=True, visible_spaces=True),
    ),
    "sarvam-moe": GgufPretokenizer("newlines", characters=True, visible_spaces=True),
    "whitespace": GgufPretokenizer("whitespace", characters=True),
}
