"""What AutoGPTQ 0.7.1 reads, which runs with transformers 4.40.2; `tests/test_kernel_rules.py` asks its kernels.

Run on a CPU and on CUDA: `tests/test_loaders_of_decoders.py`, `tests/test_loaders_of_architectures.py`.
"""

from collections.abc import Mapping

from packager.model.architecture import Architecture
from packager.model.rope import gpt_neox_keys_lacking, is_old_scaling
from packager.model.rules import (
    TAKE_ONE_WIDTH,
    TAKE_OTHER_RUNTIME,
    RulesOf,
    all_quantized,
    bits_check,
    same_bits,
    take_bits,
    whole_groups,
)
from packager.variant import Variant

# auto_gptq.nn_modules.qlinear.qlinear_cuda and qlinear_cuda_old.
AUTOGPTQ_BITS = (2, 3, 4, 8)
# auto_gptq.nn_modules.qlinear.qlinear_triton; it takes features that are multiples of 32, as the packed format does.
AUTOGPTQ_TRITON_BITS = (2, 4, 8)
# The families that AutoGPTQ 0.7.1 and transformers 4.40.2 both know, with the types of rotary embedding known there.
LEGACY_ROPE_TYPES: Mapping[str, tuple[str, ...]] = {
    "llama": ("default", "linear", "dynamic"),
    "mistral": ("default",),
    "qwen2": ("default",),
}
AUTOGPTQ_FAMILIES = tuple(LEGACY_ROPE_TYPES)
# Families that AutoGPTQ opens, but that our script for quantizing with it does not know.
AUTOGPTQ_OPENS = (*AUTOGPTQ_FAMILIES, "gpt_neox", "gptj", "codegen")


def _families(_: Variant, architecture: Architecture) -> str:
    """Refuse families that AutoGPTQ lists, or not, but whose checkpoints it never opened here."""
    known = architecture.model_type in AUTOGPTQ_OPENS
    return "" if known else f"is proven with {', '.join(AUTOGPTQ_OPENS)} only"


def _transformers_4_40(_: Variant, architecture: Architecture) -> str:
    """Return which parts of a model transformers 4.40.2 does not know; AutoGPTQ 0.7.1 runs with it."""
    found = []
    known = LEGACY_ROPE_TYPES.get(architecture.model_type, ("default",))
    if architecture.model_type in AUTOGPTQ_OPENS and architecture.rope_type not in known:
        found.append(f"knows no rotary embedding of type {architecture.rope_type} (transformers 4.40)")
    elif architecture.model_type == "llama" and architecture.scaled_rope and not is_old_scaling(architecture.config):
        found.append("takes a rope_scaling of a type and a factor above 1 only (transformers 4.40)")
    if not architecture.head_dim_is_derived:
        found.append("takes head_dim to be hidden_size / num_attention_heads (transformers 4.40)")
    if architecture.model_type == "gpt_neox":
        keys = gpt_neox_keys_lacking(architecture.text_config)
        found += [f"reads {key}, which config.json lacks (transformers 4.40)" for key in keys]
    return "; ".join(found)


def _window(_: Variant, architecture: Architecture) -> str:
    """Return the length from which transformers 4.40 differs.

    Its sliding window is one token too wide; Qwen2's applies even when the config switches it off.
    """
    if architecture.sliding_window is None or architecture.model_type not in ("mistral", "qwen2"):
        return ""
    return f"past {architecture.sliding_window} tokens its sliding window is not the model's (transformers 4.40)"


def _head(_: Variant, architecture: Architecture) -> str:
    return "with tied embeddings it computes with a head that it never loads" if architecture.ties_tensors else ""


def autogptq_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter: without act order its kernels reshape by groups."""
    return "" if variant.desc_act else whole_groups(variant, architecture)


def _exllama_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter, in act order, which the kernel for 4 bits on CUDA refuses."""
    found = whole_groups(variant, architecture) if variant.desc_act and variant.bits == 4 else ""
    return f"only with disable_exllamav2=True: {found}" if found else ""


def autogptq_triton(variant: Variant, architecture: Architecture) -> str:
    """Return why its Triton mode does not take a variant that its other kernels take."""
    found = bits_check(*AUTOGPTQ_TRITON_BITS)(variant, architecture)
    return f"only without use_triton=True, which {found}" if found else ""


_AUTOGPTQ = RulesOf(project="AutoGPTQ", version="0.7.1", read="2026-11-30")
_TRANSFORMERS = RulesOf(project="transformers", version="4.40.2", read="2026-11-23")

AUTOGPTQ_RULES = (
    _AUTOGPTQ.refuses(
        bits_check(*AUTOGPTQ_BITS), "auto_gptq.nn_modules.qlinear.qlinear_cuda, QuantLinear", take_bits(AUTOGPTQ_BITS)
    ),
    _AUTOGPTQ.refuses(same_bits, "auto_gptq.modeling._base, from_quantized, make_quant", TAKE_ONE_WIDTH),
    _AUTOGPTQ.unknown(_families, "auto_gptq.modeling._const, SUPPORTED_MODELS", TAKE_OTHER_RUNTIME),
    _AUTOGPTQ.refuses(
        all_quantized, "auto_gptq.modeling._base, from_quantized", "skip nothing in the recipe (quantize.skip)"
    ),
    _TRANSFORMERS.refuses(_transformers_4_40, "transformers.models, configuration_llama etc.", TAKE_OTHER_RUNTIME),
    _AUTOGPTQ.refuses(_head, "auto_gptq.modeling._base, from_quantized", TAKE_OTHER_RUNTIME),
    _AUTOGPTQ.refuses(
        autogptq_whole_groups,
        "auto_gptq.nn_modules.qlinear.qlinear_cuda_old, forward",
        "take a group size that divides all of them",
    ),
    _AUTOGPTQ.note("needs transformers 4.40; its import breaks on later ones", "auto_gptq.modeling._base"),
    _TRANSFORMERS.limits(_window, "transformers.modeling_attn_mask_utils, AttentionMaskConverter"),
    # PyPI's source lacks the headers, its wheels (Python 3.8 to 3.11) need CUDA 12.1 and what torch 2.2 exports. The
    # sources of the tag v0.7.1, which have the headers, compile unchanged for torch 2.11 and CUDA 13.0.
    _AUTOGPTQ.note(
        "PyPI has its ExLlama kernels for torch 2.2 only; a later torch needs a build from its repository, and without "
        "one it computes slowly",
        "autogptq_extension, in the source distribution",
    ),
    _AUTOGPTQ.limits(autogptq_triton, "auto_gptq.nn_modules.qlinear.qlinear_triton, QuantLinear"),
    _AUTOGPTQ.limits(_exllama_groups, "auto_gptq.nn_modules.qlinear.qlinear_exllamav2, QuantLinear"),
)
