"""Directories that AutoGPTQ, GPTQModel and AutoAWQ wrote."""

from collections.abc import Callable

from pagellm.engine.checkpoints.base import Tensor
from pagellm.engine.checkpoints.quantized.modules import Modules, misshapen
from pagellm.engine.checkpoints.quantized.nibbles import Words, described_groups, integers
from pagellm.engine.checkpoints.quantized.section import Section, by_parts, by_regex
from pagellm.engine.errors import named

# How the weights were found, by whom, and what some kernels want to know.
_HARMLESS = frozenset(
    {
        *(
            "quant_method",
            "method",
            "damp_percent",
            "damp_auto_increment",
            "static_groups",
            "true_sequential",
        ),
        *("model_name_or_path", "model_file_base_name", "quantizer", "meta", "act_group_aware", "tokenizer"),
        *("dataset", "backend", "use_exllama", "disable_exllama", "exllama_config", "max_input_length"),
        *("batch_size", "pad_token_id", "cache_block_outputs", "module_name_preceding_first_block"),
        *(
            "block_name_to_quantize",
            "use_cuda_fp16",
            "model_seqlen",
            "awq_gemm_checkpoint",
            "version_",
            "mse",
        ),
        *("kernel_switch_threshold", "offload_to_disk", "calibration", "uri", "gptaq", "foem", "hessian"),
        *("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "quant_type", "failsafe", "vram_strategy"),
        *(
            "pack_impl",
            "lm_head",
            "compute_device_filter",
            "auto_forward_data_parallel",
            "wait_for_submodule_finalizers",
        ),
    }
)


def read_gptq(section: Section, modules: Modules) -> str:
    """Joins the tensors of each matrix; what the method is called in reports."""
    section.only("bits", 4)
    group_size = section.integer("group_size", 128)
    has_order = section.only("desc_act", True, False, None)
    symmetric = section.only("sym", True, False, None)
    version = section.get("checkpoint_format", section.get("format", "gptq"))
    if version not in ("gptq", "gptq_v2"):
        raise section.error("checkpoint_format", version, "'gptq' or 'gptq_v2'")
    section.only("is_marlin_format", False, default=False)
    section.only("pack_dtype", "int32", default="int32")
    skipped = _skipped(section)
    for key in ("adapter", "rotation"):
        if section.get(key):
            raise section.error(key, section.get(key), "none")
    lists = section.get("modules_in_block_to_quantize", [])
    if not isinstance(lists, list):
        raise section.error("modules_in_block_to_quantize", lists, "lists of names")
    names = {str(one) for part in lists for one in (part if isinstance(part, list) else [part])}
    section.refuse_others(_HARMLESS)
    for module in modules.with_tensor("qweight"):
        words, scales, zeros = _take(module, modules)
        groups = modules.take_any(module, ("g_idx",), ("I32", "I64"))
        inputs, outputs = words.shape[0] * 8, words.shape[1]
        if groups is not None and groups.shape != (inputs,):
            raise misshapen(groups, (inputs,))
        matrix = Words(
            f"{module}.weight",
            (outputs, inputs),
            "gptq",
            words,
            scales,
            zeros,
            group_size,
            zero_offset=1 if version == "gptq" else 0,
            groups=None if groups is None else integers(groups),
            symmetric=symmetric is True,
        )
        tensor = matrix.tensor()
        if tensor.groups is not None and has_order is False:
            raise section.error("desc_act", False, f"true: the g_idx of {named(module)} has an order")
        modules.put(module, tensor)

    def is_excluded(module: str) -> bool:
        return skipped(module) or (bool(names) and not any(module.endswith(f".{name}") for name in names))

    keys = [key for key in ("dynamic", "modules_in_block_to_quantize") if section.get(key)]
    modules.check(section, " or ".join(keys) or "modules_in_block_to_quantize", is_excluded)
    return f"GPTQ, 4 bits, {described_groups(group_size)}"


def _skipped(section: Section) -> Callable[[str], bool]:
    """What GPTQModel leaves as it is: modules whose names match an expression behind "-:".

    Raises `CheckpointError` for modules that are to be quantized otherwise than the others.
    """
    rules = section.section("dynamic")
    names = [] if rules is None else list(rules.values)
    for name in names:
        if not name.startswith("-:"):
            raise section.error("dynamic", name, "'-:' and a regular expression: modules that are left")
    return by_regex([name.replace("-:", "re:", 1) for name in names], section, "dynamic")


def read_awq(section: Section, modules: Modules) -> str:
    """Joins the tensors of each matrix; what the method is called in reports."""
    bits = section.get("bits", section.get("w_bit", 4))
    if bits != 4:
        raise section.error("bits", bits, "4")
    group_size = section.integer("group_size", section.get("q_group_size", 128))
    section.only("zero_point", True, default=True)
    version = section.get("version", section.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise section.error("version", version, "'gemm'")
    section.only("desc_act", False, default=False)
    section.only("checkpoint_format", "gemm", default="gemm")
    section.only("pack_dtype", "int32", default="int32")
    section.get("sym")  # of GPTQ, whose keys transformers writes, too: zero_point says it here
    if section.get("modules_in_block_to_quantize"):
        value = section.get("modules_in_block_to_quantize")
        raise section.error("modules_in_block_to_quantize", value, "none: modules_to_not_convert says it")
    names = section.names("modules_to_not_convert")
    excluded = by_parts(names, section, "modules_to_not_convert")
    section.refuse_others(_HARMLESS)
    for module in modules.with_tensor("qweight"):
        words, scales, zeros = _take(module, modules)
        shape = words.shape[1] * 8, words.shape[0]
        matrix = Words(f"{module}.weight", shape, "awq", words, scales, zeros, group_size)
        modules.put(module, matrix.tensor())

    def maybe_excluded(module: str) -> bool:
        """AutoAWQ goes by any part of a name: gate is one of gate_proj, too."""
        return any(name in module for name in names)

    modules.check(section, "modules_to_not_convert", excluded, maybe_excluded)
    return f"AWQ, 4 bits, {described_groups(group_size)}"


def _take(module: str, modules: Modules) -> tuple[Tensor, Tensor, Tensor]:
    words = modules.take(module, "qweight", ("I32",))
    if len(words.shape) != 2:
        raise misshapen(words, (1, 1))
    scales = modules.take(module, "scales", ("F16", "BF16", "F32"))
    return words, scales, modules.take(module, "qzeros", ("I32",))
