"""What the Hugging Face directories of most architectures have in common: keys of config.json, tensor names.

Knows the keys of transformers' `PreTrainedConfig`, old and new, those that trainers and converters leave
behind, and what most model classes share with Llama's. What a class adds is its own file's business.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.errors import CheckpointError, found
from pagellm.engine.models import hub_rope
from pagellm.engine.models.decoder import Decoder, Differences, Names
from pagellm.engine.models.fields import Fields
from pagellm.engine.models.hub_quantization import refuse_quantized
from pagellm.engine.models.hub_rope import FULL, SLIDING
from pagellm.engine.models.names import count_layers, embedding_and_head, hub_prefixes
from pagellm.engine.models.rope import RopeTable
from pagellm.engine.models.spec import ModelSpec
from pagellm.kernels import activation

# Names of files, classes and versions; how a model is trained, labelled, sampled from or shown.
HARMLESS = re.compile(
    r"""
    _.*                                                 # private to whoever wrote the file
  | architectures | auto_map | base_model.* | model_type | (model_)?name(_or_path)? | license | revision
  | (torch_)?dtype | use_bfloat16 | transformers.* | .*_version | unsloth.* | mlc.* | is_llama_config
  | torchscript | tf_legacy_loss | return_dict | output_(attentions|hidden_states|scores|logits|past)
  | use_cache | use_return_dict | cache_implementation | cache_config | gradient_checkpointing.*
  | attn_implementation | experts_implementation | use_flash_attn | use_flash_attention(_2)?
  | .*_token | .*_token_ids? | .*_token_index | tokenizer.* | .*_tokenizer.* | prefix | chat_template
  | .*dropout.* | .*_pdrop | initializer_.* | init_method | pretraining_tp | neftune_noise_alpha
  | chunk_size_feed_forward | id2label | label2id | num_labels | problem_type | finetuning_task
  | task_specific_params | summary_.*
  | is_decoder | tie_encoder_decoder | reorder_and_upcast_attn | n_ctx | n_special | predict_special_tokens
  | model_max_length | max_sequence_length | max_seq_length | seq_length | max_seq_len
  # Settings of sampling, which old files keep here.
  | max_length | min_length | max_new_tokens | do_sample | early_stopping | temperature | top_k | top_p
  | typical_p | min_p | num_beams | num_beam_groups | diversity_penalty | .*repetition_penalty
  | length_penalty | .*no_repeat_ngram_size | bad_words_ids | num_return_sequences | return_dict_in_generate
  | remove_invalid_values | exponential_decay_length_penalty | (begin_)?suppress_tokens | renormalize_logits
  | epsilon_cutoff | eta_cutoff | assistant_.* | num_assistant_.* | target_lookbehind | penalty_alpha
  | guidance_scale
    """,
    re.VERBOSE,
)

# Keys that several classes have, and that are only supported switched off where a class does not have them.
_NEUTRAL: dict[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "use_bias": False,
    "use_mrope": False,
    "rope_interleaved": False,
}


# Llama's tensors, which the classes of most architectures name so, too. Those outside of layers stand behind
# the decoder's prefix, except for the output matrix.
NAMES: Names = {
    "embedding": "embed_tokens",
    "final_norm": "norm",
    "lm_head": "lm_head",
    "layer": "layers.{}.",
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
# The tensors of experts in most classes, each of which has its own, and of files where they are stacked.
EXPERT_NAMES: Names = {
    "router": "mlp.gate",
    "expert_up": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
    "expert_down": "mlp.experts.{}.down_proj.weight",
}
_STACKED_EXPERTS: Names = {"expert_up": "mlp.experts.gate_up_proj", "expert_down": "mlp.experts.down_proj"}
# What transformers' Llama class takes for a key that config.json lacks.
DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
# Of the configurations of mixtures: how routers are trained.
MIXTURE_HARMLESS = r"output_router_logits | router_aux_loss_coef | router_jitter_noise | aux_loss_alpha"
# What a configuration calls activation functions: SiLU, which most classes are used with, and the others.
SILU = {"silu": "silu", "swish": "silu"}
GELU_OR_RELU = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
# What transformers took for a kind of layer before it agreed on names.
_OLD_LAYER_TYPES = {"attention": FULL, "mamba": "linear_attention"}
# The tensors that have a bias where a key of the configuration says that attention, or the feed-forward part,
# has biases.
ATTENTION, MLP = ("qkv", "output"), ("up", "down")


class HubModel:
    """A checkpoint with a config.json, read by what its class shares with Llama's.

    defaults: what the class takes for absent keys, where that is not what Llama's takes. keys: what it calls
    one of Llama's keys, where Llama's own name is known, too, if it says the same; None: it has no such key.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        defaults: Mapping[str, Any] | None = None,
        keys: Mapping[str, str | None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.model_type = str(checkpoint.config["model_type"])
        self.fields = fields = read_config(checkpoint, {**DEFAULTS, **(defaults or {})}, keys or {})
        self.hidden_size = fields.integer("hidden_size")
        self.num_heads = fields.integer("num_attention_heads")
        self.head_dim = fields.integer_or_none("head_dim") or self.hidden_size // self.num_heads
        if not self.head_dim:
            expected = f"at most hidden_size, {self.hidden_size}"
            raise fields.error("num_attention_heads", self.num_heads, expected)
        self.num_layers = count_layers(fields, "num_hidden_layers", checkpoint)
        self.max_positions = fields.integer("max_position_embeddings", maximum=1 << 30)

    def layer_types(self, *kinds: str) -> Sequence[str] | None:
        """The kind of each layer, one of `kinds`, where the configuration lists them."""
        types = self.fields.get("layer_types")
        if types is None:
            return None
        if isinstance(types, list):
            types = [_OLD_LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in types]
        if not isinstance(types, list) or len(types) != self.num_layers or any(t not in kinds for t in types):
            expected = f"a list of {self.num_layers}, each one of {', '.join(kinds)}"
            raise self.fields.error("layer_types", types, expected)
        return types

    def windows(self, types: Sequence[str] | None = None) -> list[int]:
        """The window of each layer, 0 where it sees everything: `sliding_window` where the layer slides.

        types: the kinds of layers, where `layer_types` lists none; None: all layers slide and no list may say
        otherwise.
        """
        fields = self.fields
        for name in ("use_sliding_window", "max_window_layers"):
            fields.get(name)  # known, also where the class passes over them
        listed = self.layer_types(FULL, SLIDING)
        size = fields.integer_or_none("sliding_window", maximum=1 << 30)
        off = "sliding_window is null" if size is None else "use_sliding_window is false"
        if listed and SLIDING in listed and (size is None or not fields.get("use_sliding_window", True)):
            raise fields.error("layer_types", listed, f"{FULL} alone where {off}")
        if size and types is None and listed and FULL in listed:
            raise fields.error("layer_types", listed, f"{SLIDING} alone, as {self.model_type} has it")
        types = listed or types or [SLIDING] * self.num_layers
        return [size or 0 if kind == SLIDING else 0 for kind in types]

    def rope_table(self, **how: Any) -> RopeTable:
        """The rotary embeddings of all layers; see `hub_rope.table`."""
        return hub_rope.table(self.fields, self.head_dim, self.max_positions, **how)

    def rope_tables_by_type(self, thetas: Mapping[str, str | float]) -> tuple[RopeTable, ...]:
        """The rotary embeddings of each kind of layer, in this order; see `hub_rope.tables_by_layer_type`."""
        tables = hub_rope.tables_by_layer_type(self.fields, self.head_dim, self.max_positions, thetas)
        return tuple(tables[kind] for kind in thetas)

    def num_experts(self, default: int) -> int:
        """What classes call num_experts, and transformers writes as num_local_experts."""
        own, other = "num_experts", "num_local_experts"
        if self.fields.has(own) and self.fields.get(other, self.fields.get(own)) != self.fields.get(own):
            raise self.fields.error(other, self.fields.get(other), f"the same as {own}")
        return self.fields.integer(own if self.fields.has(own) else other, default)

    def expert_names(self, names: Names = EXPERT_NAMES) -> Names:
        """These names, or those of experts that are stacked in one tensor, as transformers keeps them."""
        stacked = any(name.endswith(f".{_STACKED_EXPERTS['expert_up']}") for name in self.checkpoint.tensors)
        return {**names, **_STACKED_EXPERTS} if stacked else names

    def biases(self, **parts: Sequence[str]) -> list[str]:
        """The parts that have a bias, of those whose key says so."""
        return [one for key, of_key in parts.items() if self.fields.boolean(key) for one in of_key]

    def spec(
        self,
        features: Mapping[str, Any] | None = None,
        names: Names | None = None,
        activations: Mapping[str, str] = SILU,
        base: str = "model.",
        harmless: str = "(?!)",
        **how: Unpack[Differences],
    ) -> ModelSpec:
        """The model with Llama's features, names and layout but for these.

        activations: what `hidden_act` may be. base: what a language model puts before its decoder's names.
        harmless: keys that change nothing, beside those of every class, as a regular expression.
        Raises `CheckpointError` for a key that nobody asked for and that may change what is computed.
        """
        fields, features = self.fields, features or {}
        names, tied, repeated = self._names({**NAMES, **(names or {})}, base)
        if "rope_tables" not in how:
            how["rope_tables"] = (self.rope_table(),)
        decoder = Decoder(
            architecture=self.model_type,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            vocab_size=fields.integer("vocab_size", maximum=1 << 30),
            max_positions=self.max_positions,
            norm_epsilon=fields.number("rms_norm_eps"),
            names=names,
            tied=tied,
            repeated=repeated,
            features={
                "num_heads": self.num_heads,
                "num_kv_heads": fields.integer_or_none("num_key_value_heads") or self.num_heads,
                "head_dim": self.head_dim,
                "attention_scale": self.head_dim**-0.5,
                "rope_table": 0,
                "intermediate_size": features["intermediate_size"]
                if "intermediate_size" in features
                else fields.integer("intermediate_size"),
                "activation": activation.KINDS[fields.choice("hidden_act", activations)],
                "gated": True,
                **features,
            },
            **how,
        )
        spec = decoder.spec()
        fields.expect_unasked(_NEUTRAL)
        also = re.compile(f"{HARMLESS.pattern} | {harmless}", re.VERBOSE)
        fields.refuse_others(also, f"model_type {self.model_type}")
        return spec

    def _names(self, names: Names, base: str) -> tuple[Names, bool, tuple[str, ...]]:
        """The full names; whether the output matrix is the embedding; tensors that repeat another one."""
        anchor = str(names["layer"]).format(0) + f"{names['output']}.weight"
        decoder, wrapper = hub_prefixes(self.checkpoint, base, anchor)
        full = {
            part: f"{decoder}{names[part]}"
            for part in ("embedding", "position_embedding", "final_norm", "layer")
            if part in names
        }
        head = f"{wrapper}{names['lm_head']}.weight"
        embedding, lm_head, repeated = embedding_and_head(
            self.checkpoint,
            f"{full['embedding']}.weight",
            head,
            self.fields.boolean("tie_word_embeddings"),
        )
        full["embedding"] = embedding.removesuffix(".weight")
        full["lm_head"] = (lm_head or head).removesuffix(".weight")
        return {**names, **full}, lm_head is None, repeated


def read_config(
    checkpoint: Checkpoint, defaults: Mapping[str, Any], keys: Mapping[str, str | None]
) -> Fields:
    """The fields of a config.json, once nothing in it says that the weights or the model are of another kind.

    Raises `CheckpointError` for quantized weights, encoders and pruned heads.
    """
    config = checkpoint.config
    fields = Fields(checkpoint.path / "config.json", config, defaults=defaults, keys=keys)
    for name, key in keys.items():
        alias = config.get(name)
        if key is not None and alias is not None and alias != fields.get(name):
            expected = f"{key} alone, or the same as {key}"
            raise CheckpointError(f"{fields.path}: {name}: found {found(alias)}, expected {expected}")
    refuse_quantized(fields, checkpoint)
    if fields.get("is_causal", True) is not True:  # null means false there
        raise fields.error("is_causal", fields.get("is_causal"), "true; another value is not supported")
    return fields
