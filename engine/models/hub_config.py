"""What every config.json has in common: keys that change no logits, and formats of weights not supported.

Knows the keys of transformers' `PreTrainedConfig`, old and new, and those that trainers and converters leave
behind. What a model's own class adds is its own file's business.
"""

import re

from pagellm.engine.checkpoints import Checkpoint
from pagellm.engine.models.fields import Fields

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
  | .*dropout.* | .*_pdrop | initializer_.* | pretraining_tp | chunk_size_feed_forward | neftune_noise_alpha
  | id2label | label2id | num_labels | problem_type | finetuning_task | task_specific_params | summary_.*
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
_SUPPORTED_WEIGHTS = (
    "weights in float32, float16 or bfloat16, which the setting quantization converts while loading, "
    "or a GGUF file"
)

# Keys of several classes that are only supported switched off.
_NEUTRAL: dict[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "bias": False,
    "qkv_bias": False,
    "use_bias": False,
    "use_mrope": False,
    "rope_interleaved": False,
}


def read_config(checkpoint: Checkpoint) -> Fields:
    """The fields of a config.json, once nothing in it says that the weights or the model are of another kind.

    Raises `CheckpointError` for quantized weights, encoders and pruned heads.
    """
    config = checkpoint.config
    fields = Fields(checkpoint.path / "config.json", config)
    for name in ("quantization_config", "compression_config", "quantization"):
        if fields.has(name):
            raise fields.error(name, _method_of(config[name]), _SUPPORTED_WEIGHTS)
    if fields.get("is_causal", True) is not True:  # null means false there
        raise fields.error("is_causal", fields.get("is_causal"), "true; another value is not supported")
    for name, neutral in _NEUTRAL.items():
        fields.expect(name, neutral)
    return fields


def _method_of(section: object) -> object:
    """How the weights were quantized, as the section says it, or the section itself."""
    if not isinstance(section, dict):
        return section
    return section.get("quant_method") or section.get("mode") or section
