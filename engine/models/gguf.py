"""What GGUF files of most architectures have in common: keys under the architecture's prefix, tensor names.

Defaults and meanings are llama.cpp's (`llama_model_base::load_hparams`).
"""

import re
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError
from pagellm.engine.models import gguf_rope
from pagellm.engine.models.decoder import Decoder, Differences, Names
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.names import count_layers
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels.activation import SILU
from pagellm.kernels.architecture import SOFTMAX

# Of llama.cpp's keys, those that change no logits of these architectures.
HARMLESS = re.compile(
    r"vocab_size|tensor_data_layout|pooling_type|rope\.scaling\.(finetuned|original_context_length)"
)
# Keys of what only some architectures have, and these not always.
_NEUTRAL = dict.fromkeys(("expert_count", "expert_used_count", "expert_group_count"), 0)
_NEUTRAL["nextn_predict_layers"] = 0
# The least sum that the scores of a token's experts are divided by.
_LEAST_SCORE = 6.103515625e-5
NAMES: Names = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "layer": "blk.{}.",
    "attention_norm": "attn_norm",
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attention_sub_norm": "attn_sub_norm",
    "output": "attn_output",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "up": ("ffn_gate", "ffn_up"),
    "mlp_sub_norm": "ffn_sub_norm",
    "down": "ffn_down",
    "sinks": "attn_sinks.weight",
    "router": "ffn_gate_inp",
    "selection_bias": "exp_probs_b.bias",
    "expert_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "expert_up_b": ("ffn_gate_exps.bias", "ffn_up_exps.bias"),
    "expert_down": "ffn_down_exps.weight",
    "expert_down_b": "ffn_down_exps.bias",
    "shared_up": ("ffn_gate_shexp", "ffn_up_shexp"),
    "shared_down": "ffn_down_shexp",
    "mlp_post_norm": "post_ffw_norm",
}


class GgufModel:
    """A GGUF file, read by what its architecture shares with llama."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture = str(checkpoint.config["general.architecture"])
        self.fields = fields = read_metadata(checkpoint)
        self.hidden_size = fields.integer("embedding_length")
        self.num_heads = fields.integer("attention.head_count")
        self.head_dim = fields.integer("attention.key_length", self.hidden_size // self.num_heads)
        self.num_layers = count_layers(fields, "block_count", checkpoint)
        self.max_positions = fields.integer("context_length", maximum=1 << 30)
        latent = "attention.kv_lora_rank" in fields.values  # then `gguf_latent` reads the values' size
        for name, expected in (
            *([] if latent else [("attention.value_length", self.head_dim)]),
            ("embedding_length_out", self.hidden_size),
        ):
            if fields.integer(name, expected) != expected:
                raise fields.error(name, fields.get(name), str(expected))

    def rope_table(self, **how: Any) -> RopeTable:
        """The rotary embeddings of layers without a window; see `gguf_rope.table`."""
        return gguf_rope.table(self.checkpoint, self.fields, self.head_dim, self.max_positions, **how)

    def window(self) -> int:
        """The tokens that a layer with a window sees; 0: all."""
        name = "attention.sliding_window"
        value = self.fields.get(name)
        is_none = value is None or (type(value) is int and value == 0)
        return 0 if is_none else self.fields.integer(name, maximum=1 << 30)

    def windows(self, period: int, default: int = 0) -> list[int]:
        """The window of each layer: of a list, or of all but every `period`-th; default: without the key."""
        size = self.window() or default
        name = "attention.sliding_window_pattern"
        pattern = self.fields.get(name)
        if isinstance(pattern, np.ndarray):
            if pattern.shape != (self.num_layers,):
                raise self.fields.error(name, pattern, f"{self.num_layers} of them")
            return [size if slides else 0 for slides in pattern.tolist()]
        period = self.fields.integer(name, period)
        return [size if index % period < period - 1 else 0 for index in range(self.num_layers)]

    def has_experts(self) -> bool:
        """Whether layers have experts, in an architecture that also has models without."""
        count = self.fields.get("expert_count")
        return count is not None and not (type(count) is int and count == 0)

    def experts(self, **features: Any) -> dict[str, Any]:
        """The features of a mixture of experts in every layer, with these besides or instead."""
        fields, own = self.fields, "expert_feed_forward_length"
        fields.get("feed_forward_length")  # known where no layer has one, too
        return {
            "num_experts": fields.integer("expert_count"),
            "experts_per_token": fields.integer("expert_used_count"),
            "expert_size": fields.integer(own if fields.has(own) else "feed_forward_length"),
            "intermediate_size": 0,
            "router": SOFTMAX,
            "score_floor": _LEAST_SCORE,
            **features,
        }

    def spec(
        self,
        features: Mapping[str, Any] | None = None,
        names: Names | None = None,
        harmless: str = "(?!)",
        **how: Unpack[Differences],
    ) -> ModelSpec:
        """The model with llama's features, names and layout but for these; biases: those that are there.

        Q, K and V may be one tensor, and the gate and the linear half, too. harmless: keys that change
        nothing, beside those of every architecture, as a regular expression.

        Raises `CheckpointError` for a key that nobody asked for and that may change what is computed.
        """
        fields, tensors = self.fields, self.checkpoint.tensors
        features = features or {}
        names = {**NAMES, **self._fused(), **(names or {})}
        if "rope_tables" not in how:
            how["rope_tables"] = (self.rope_table(),)
        if "biases" not in how:
            how["biases"] = [part for part in names if part != "layer" and self._has_bias(names, part)]
        decoder = Decoder(
            architecture=self.architecture,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=self.vocabulary(f"{names['embedding']}.weight"),
            max_positions=self.max_positions,
            norm_epsilon=fields.number(
                "attention.layer_norm_epsilon"
                if how.get("layer_norm")
                else "attention.layer_norm_rms_epsilon"
            ),
            names=names,
            tied=f"{names['lm_head']}.weight" not in tensors,
            repeated=gguf_rope.TENSORS if how["rope_tables"] else (),
            features={
                "num_heads": self.num_heads,
                "num_kv_heads": self._num_kv_heads(),
                "head_dim": self.head_dim,
                "attention_scale": self.head_dim**-0.5,
                "rope_table": 0,
                "intermediate_size": features["intermediate_size"]
                if "intermediate_size" in features
                else fields.integer("feed_forward_length"),
                "activation": SILU,
                "gated": True,
                **features,
            },
            **how,
        )
        spec = decoder.spec()
        fields.expect_unasked(_NEUTRAL)
        also = re.compile(f"{HARMLESS.pattern}|{harmless}")
        fields.refuse_others(also, f"architecture {self.architecture}")
        return spec

    def _fused(self) -> dict[str, str]:
        """The parts of layers that are one tensor where most files have several."""
        names = {"qkv": "attn_qkv"} if "blk.0.attn_qkv.weight" in self.checkpoint.tensors else {}
        return names if "blk.0.ffn_gate.weight" in self.checkpoint.tensors else {**names, "up": "ffn_up"}

    def _num_kv_heads(self) -> int | list[int]:
        """Of all layers, or of each."""
        name = "attention.head_count_kv"
        value = self.fields.get(name)
        if not isinstance(value, np.ndarray):
            return self.fields.integer(name, self.num_heads)
        if value.shape != (self.num_layers,) or not (value > 0).all():
            expected = f"a number above 0 for each of {self.num_layers} layers; all need attention"
            raise self.fields.error(name, value, expected)
        return [int(number) for number in value]

    def _has_bias(self, names: Names, part: str) -> bool:
        """Whether a part has a bias, in any layer if it belongs to layers."""
        of_part = names.get(f"{part}_b", names[part])
        tensor = of_part if isinstance(of_part, str) else of_part[0]
        tensor = tensor if f"{part}_b" in names else f"{tensor}.bias"
        prefixes = ("", *(str(names["layer"]).format(index) for index in range(self.num_layers)))
        return any(f"{prefix}{tensor}" in self.checkpoint.tensors for prefix in prefixes)

    def vocabulary(self, embedding: str) -> int:
        """The rows of the embedding, which is what decides."""
        tensor = self.checkpoint.tensors.get(embedding)
        if tensor is None:
            raise CheckpointError(f"{self.checkpoint.path}: tensor {embedding} is missing")
        return tensor.shape[0]


def read_metadata(checkpoint: Checkpoint) -> Fields:
    """The fields under the architecture's prefix, once the file is known to be a whole model of a usual kind.

    Raises `CheckpointError` for a vocabulary without weights and attention that is not causal.
    """
    if not checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.path}: a GGUF file of metadata alone (a vocabulary), expected one with the weights"
        )
    prefix = f"{checkpoint.config['general.architecture']}."
    values = {
        key.removeprefix(prefix): value for key, value in checkpoint.config.items() if key.startswith(prefix)
    }
    fields = Fields(checkpoint.path, values, prefix)
    fields.expect("attention.causal", True)
    return fields
