"""What SGLang 0.5.23 reads on CUDA, read in its wheel and run nowhere: all of it is predicted.

A checkpoint of the method "gptq" runs if it can be computed by Marlin. The other kernel was removed, and with it 2 and
3 bits, asymmetric checkpoints, and other groups.
"""

from packager.model.architecture import Architecture
from packager.model.kernel_shapes import fits_marlin_tile, fused_alike, kernel_linears, tensor_parallel
from packager.model.rules import (
    QUANTIZE_ALL_OR_NONE,
    TAKE_OTHER_RUNTIME,
    TAKE_SYMMETRIC,
    TRY_IT,
    RulesOf,
    bits_check,
    group_sizes_check,
    patterns_check,
    symmetric_only,
    take_bits,
    take_group_sizes,
    types_check,
    whole_groups,
)
from packager.variant import Variant

# sglang.srt.layers.quantization.gptq.gptq, GPTQMarlinConfig.TYPE_MAP.
SGLANG_BITS = (4, 8)
# sglang.srt.layers.quantization.marlin_utils, MARLIN_SUPPORTED_GROUP_SIZES.
SGLANG_GROUP_SIZES = (-1, 32, 64, 128)
# Families whose models were read: sglang.srt.models.llama, mistral, qwen2, qwen3.
_READ_FOR = ("llama", "mistral", "qwen2", "qwen3")


def sglang_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter: `create_weights` has no scales for it."""
    return whole_groups(variant, architecture) if variant.group_size in SGLANG_GROUP_SIZES else ""


def sglang_tiles(_: Variant, architecture: Architecture) -> str:
    """Return a linear that no thread tile divides; nothing is padded, and linears computed as one are one."""
    for linear in kernel_linears(architecture):
        if not fits_marlin_tile(linear.out_features, linear.in_features):
            shape = f"{linear.module}, {linear.out_features} x {linear.in_features}"
            return f"pads no linear, and no tile (64 x 128, 128 x 64) divides {shape}"
    return ""


def sglang_one_group(variant: Variant, architecture: Architecture) -> str:
    """Return a linear of one group in act order: the kernel wants more groups than one where there is a g_idx."""
    if not variant.desc_act or variant.group_size == -1:
        return ""
    one = next((each for each in architecture.example_linears if each.in_features == variant.group_size), None)
    return f"reads no act order of one group, and {one.module} has {one.in_features} columns" if one else ""


_QUANTIZATION = "sglang.srt.layers.quantization"
_METHOD = (
    f"{_QUANTIZATION}.gptq.gptq, GPTQMarlinConfig.is_gptq_marlin_compatible; {_QUANTIZATION}, BASE_QUANTIZATION_METHODS"
)
_KERNEL = "sglang/kernels/jit/csrc/gemm/marlin/gptq_marlin.cuh"
_SGLANG = RulesOf(project="SGLang", version="0.5.23", read="2026-11-30")

SGLANG_RULES = (
    _SGLANG.refuses(bits_check(*SGLANG_BITS), _METHOD, take_bits(SGLANG_BITS)),
    _SGLANG.refuses(group_sizes_check(*SGLANG_GROUP_SIZES), _METHOD, take_group_sizes(SGLANG_GROUP_SIZES)),
    _SGLANG.refuses(symmetric_only, _METHOD, TAKE_SYMMETRIC),
    _SGLANG.unknown(types_check(_READ_FOR, "its code was read for"), "sglang.srt.models", TRY_IT),
    _SGLANG.unknown(
        patterns_check("qkv_proj and gate_up_proj", _READ_FOR), f"{_QUANTIZATION}.utils, get_dynamic_override", TRY_IT
    ),
    _SGLANG.refuses(fused_alike, f"{_QUANTIZATION}.utils, get_dynamic_override", QUANTIZE_ALL_OR_NONE),
    _SGLANG.refuses(
        sglang_whole_groups,
        f"{_QUANTIZATION}.gptq.schemes.gptq_marlin, create_weights",
        "take a group size that divides all of them",
    ),
    _SGLANG.refuses(sglang_tiles, f"{_KERNEL}, is_valid_config", TAKE_OTHER_RUNTIME),
    _SGLANG.refuses(sglang_one_group, _KERNEL, "take a branch with smaller groups, or without act order"),
    _SGLANG.note("needs CUDA with compute capability 8.0", f"{_QUANTIZATION}.gptq.gptq, get_min_capability"),
    _SGLANG.limits(
        tensor_parallel,
        "sglang.srt.models.llama, LlamaAttention",
        "use another number of GPUs, or a branch with smaller groups",
    ),
)
