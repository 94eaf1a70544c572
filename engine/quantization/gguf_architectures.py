"""What each model_type is in GGUF, and what llama.cpp asks of models of its architecture."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import ModelSpec, gemma4
from pagellm.engine.models.decoder import Names


@dataclass(frozen=True)
class Form:
    """What a model_type is in GGUF, and what llama.cpp's loader of it asks for.

    names: of tensors that are called otherwise than llama's. biases: the parts that may have one; needed:
    that must. tied: whether the output matrix is the embedding or is there; None: either. square:
    whether a layer's heads together have to be as wide as its hidden state. own_width: whether the width of
    experts has a key of its own; one_width: whether what is beside them has that of a feed-forward alone.
    """

    architecture: str
    names: Names = field(default_factory=dict)
    biases: tuple[str, ...] = ("qkv_b",)
    needed: tuple[str, ...] = ()
    tied: bool | None = None
    square: bool = False
    own_width: bool = False
    one_width: bool = False


_ONE_NORM = {"mlp_norm": "attn_norm"}
_FUSED_QKV = {"qkv": "attn_qkv"}
_FUSED_UP = {"up": "ffn_up"}
_LINEAR = ("qkv_b", "output_b", "up_b", "down_b")
_ATTENTION = _LINEAR[:2]
_OF_GPT2: Any = {"names": _FUSED_QKV, "biases": _LINEAR, "needed": _LINEAR, "square": True}
_DEEPSEEK = Form("deepseek2", biases=(), own_width=True)
_GRANITE_MOE = Form("granitemoe", biases=_ATTENTION)
FORMS = {
    "bitnet": Form("bitnet", biases=(), tied=True, square=True),
    "cohere": Form("command-r", _ONE_NORM, tied=True, square=True),
    "cohere2": Form("cohere2", _ONE_NORM, tied=True, square=True),
    "dbrx": Form("dbrx", {**_FUSED_QKV, "mlp_norm": "attn_output_norm"}, biases=(), tied=False, square=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "ernie4_5": Form("ernie4_5", biases=_ATTENTION),
    "ernie4_5_moe": Form("ernie4_5-moe", biases=_ATTENTION, own_width=True),
    "falcon": Form("falcon", {**_FUSED_QKV, **_ONE_NORM}, biases=(), square=True),
    "gemma2": Form("gemma2", tied=True),
    "gemma3_text": Form("gemma3"),
    "gemma4_text": Form(
        "gemma4", {**gemma4.GGUF_NAMES, "expert_up": gemma4.STACKED}, own_width=True, one_width=True
    ),
    "glm": Form("chatglm", _FUSED_UP, square=True),
    "glm4": Form("glm4", _FUSED_UP),
    "glm4_moe_lite": _DEEPSEEK,
    "gpt2": Form("gpt2", **_OF_GPT2),
    "gpt_bigcode": Form("starcoder", **_OF_GPT2),
    "gpt_neox": Form("gptneox", **_OF_GPT2, tied=False),
    "gpt_oss": Form(
        "gpt-oss", {"mlp_norm": "post_attention_norm"}, _ATTENTION, _ATTENTION, tied=False, own_width=True
    ),
    "granite": Form("granite", biases=_LINEAR),
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "granitemoehybrid": Form("granite", biases=_LINEAR),
    "llama": Form("llama", biases=_LINEAR),
    "minicpm": Form("minicpm", biases=_LINEAR),
    "minicpm3": Form("minicpm3", biases=()),
    "ministral3": Form("mistral3", biases=_LINEAR),
    "mistral": Form("llama", biases=_LINEAR),
    "mixtral": Form("llama", biases=_ATTENTION),
    "olmo2": Form("olmo2", tied=False, square=True),
    "olmo3": Form("olmo2", tied=False, square=True),
    "olmoe": Form("olmoe", tied=False, square=True),
    "phi": Form("phi2", _ONE_NORM, _LINEAR, _LINEAR[1:], tied=False, square=True),
    "phi3": Form("phi3", {**_FUSED_QKV, **_FUSED_UP}, biases=(), square=True),
    "qwen2": Form("qwen2", square=True),
    "qwen2_moe": Form(
        "qwen2moe",
        {"router": ("ffn_gate_inp", "ffn_gate_inp_shexp")},
        tied=False,
        square=True,
        own_width=True,
    ),
    "qwen3": Form("qwen3"),
    "qwen3_moe": Form("qwen3moe", own_width=True),
    "smollm3": Form("smollm3"),
    "starcoder2": Form("starcoder2", {}, _LINEAR, _LINEAR[1:], square=True),
}
# Architectures of which llama.cpp lets every layer see everything, whatever its window.
_WITHOUT_WINDOWS = ("llama", "phi3")
# The numbers of layers of DeepSeek's models that llama.cpp reads without compressed queries, and those alone;
# and one more, with its vocabulary.
_LITE_LAYERS, _OTHER_LITE = (26, 27), (48, 128256)


def form_of(spec: ModelSpec) -> Form | None:
    """The form of a model; None where it has none."""
    if spec.architecture == "granitemoehybrid" and (spec.arch.layers["num_experts"] > 0).any():
        return _GRANITE_MOE
    return FORMS.get(spec.architecture)


def check_form(checkpoint: Checkpoint, form: Form, spec: ModelSpec) -> None:
    """Refuses what this engine would read and llama.cpp would not."""
    refused = []
    biases = {part for parts in spec.layers for part in parts if part in _LINEAR}
    for wrong, what in ((biases - set(form.biases), "a bias of"), (set(form.needed) - biases, "no bias of")):
        refused += [f"{what} {part.removesuffix('_b')}" for part in sorted(wrong)]
    if form.tied is not None and spec.arch.tied != form.tied:
        refused.append(f"an output matrix that is {'' if spec.arch.tied else 'not '}the embedding")
    layers = spec.arch.layers
    widths = layers["num_heads"] * layers["head_dim"]
    if form.square and (widths != spec.arch.hidden_size).any():
        refused.append(f"heads that are {widths.max()} wide beside a hidden state of {spec.arch.hidden_size}")
    if form.architecture == "minicpm3" and not (layers["query_rank"] > 0).all():
        refused.append("queries that are not compressed")
    if refused:
        raise CheckpointError(
            f"{checkpoint.path}: found {refused[0]}, which llama.cpp's {form.architecture} has no place for"
        )


def notes_on(form: Form, spec: ModelSpec) -> Iterator[str]:
    """What there is to say of llama.cpp and this model."""
    name, layers = form.architecture, spec.arch.layers
    if name in _WITHOUT_WINDOWS and (layers["window"] > 0).any():
        yield f"llama.cpp lets every layer of {name} see everything, this engine obeys the window"
    if name == "olmoe" and (layers["num_kv_heads"] != layers["num_heads"]).any():
        yield "llama.cpp reads olmoe with as many KV heads as heads alone, this engine reads others, too"
    if name == "deepseek2":
        sizes, has_rank = (spec.arch.num_layers, spec.arch.vocab_size), (layers["query_rank"] > 0).all()
        if has_rank == (sizes[0] in _LITE_LAYERS or sizes == _OTHER_LITE):
            yield (
                f"llama.cpp does not read deepseek2 with {sizes[0]} layers and queries that are "
                f"{'' if has_rank else 'not '}compressed, this engine does"
            )
