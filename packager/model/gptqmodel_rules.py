"""What GPTQModel 7.7 reads: by its own loader, through transformers and optimum, and in its Marlin kernel.

`tests/test_kernel_rules.py` asks the kernels' own checks; `tests/test_loaders_of_decoders.py` opens checkpoints.
"""

from packager.model.architecture import Architecture
from packager.model.kernel_shapes import fits_marlin_tile
from packager.model.rules import (
    TAKE_ONE_WIDTH,
    TAKE_OTHER_RUNTIME,
    TAKE_SYMMETRIC,
    TRY_IT,
    Check,
    RulesOf,
    bits_check,
    group_sizes_check,
    same_bits,
    symmetric_only,
    take_bits,
    take_group_sizes,
)
from packager.model.runtime_architectures import (
    EXPERTS_BY_NAME,
    GPTQMODEL_DROPS,
    GPTQMODEL_FAILS,
    GPTQMODEL_OPENS,
    GPTQMODEL_TYPES,
    TRANSFORMERS_FAILS,
)
from packager.variant import Variant

# TorchLinear, which reads 5, 6 and 7 bits too.
GPTQMODEL_BITS = (2, 3, 4, 8)
# Of the kernels that transformers and GPTQModel choose on any machine: TorchLinear and TritonV2Linear,
# SUPPORTS_GROUP_SIZE.
GPTQMODEL_GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)
# MarlinLinear, SUPPORTS_BITS and SUPPORTS_GROUP_SIZE.
MARLIN_BITS = (4, 8)
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)


def _types(_: Variant, architecture: Architecture) -> str:
    known = architecture.model_type in GPTQMODEL_TYPES
    return "" if known else f"GPTQModel 7.7 does not list {architecture.model_type}"


def _names(_: Variant, architecture: Architecture) -> str:
    """Return a linear that GPTQModel's own loader does not find, or drops.

    It loads tensors by their stored names, which transformers converts.
    """
    for linear in architecture.example_linears:
        wanted = f"{architecture.blocks_path}.{linear.block}.{linear.module}"
        if linear.name != wanted:
            return f"looks for {wanted}, stored is {linear.name}"
        if linear.module in GPTQMODEL_DROPS.get(architecture.model_type, ()):
            return f"keeps a random {linear.module} in place of the quantized one"
    left = next((module for module in architecture.left if module.rpartition(".")[2] == "experts"), None)
    return "" if left is None else f"looks for quantized experts, {left} is not quantized"


def _fails(variant: Variant, architecture: Architecture) -> str:
    """Return why GPTQModel's own loader did not open a model type, where the names are no reason already."""
    return "" if _names(variant, architecture) else GPTQMODEL_FAILS.get(architecture.model_type, "")


def _untried(variant: Variant, architecture: Architecture) -> str:
    """Return that GPTQModel's own loader was not run with a model type, where nothing else is known against it."""
    model_type = architecture.model_type
    if model_type in GPTQMODEL_OPENS or model_type in GPTQMODEL_FAILS or _names(variant, architecture):
        return ""
    return f"is not proven with {model_type}"


def _symmetric(variant: Variant, _: Architecture) -> str:
    return "" if variant.sym else "reads asymmetric checkpoints only if GPTQModel made them"


def _no_experts(_: Variant, architecture: Architecture) -> str:
    """Refuse quantized experts where the runtime keeps those of a layer in one parameter.

    optimum replaces linears only. The parameter stays random; a log line is all.
    """
    experts = any(linear.parameter for linear in architecture.example_linears)
    return "computes with random experts in place of the quantized ones" if experts else ""


def merged_experts(_: Variant, architecture: Architecture) -> str:
    """Return that experts have names of their own where the base model has none, but for types that were tried."""
    untried = architecture.merges_experts and architecture.model_type not in EXPERTS_BY_NAME
    return "is not proven to read experts one by one that the base model stores as one tensor" if untried else ""


def _transformers_fails(_: Variant, architecture: Architecture) -> str:
    """Return which quantized linear transformers cannot open, and why; one that the recipe skips does not matter."""
    names, reason = TRANSFORMERS_FAILS.get(architecture.model_type, ((), ""))
    for linear in architecture.example_linears:
        name = linear.module.rpartition(".")[2]
        if name in names:
            return reason.format(name)
        # optimum takes names from dir(module), which has none that begin with a digit.
        if name[0].isdigit():
            return f"does not replace {linear.module}, because its name is a number"
    return ""


def _group_sizes(known: tuple[int, ...]) -> Check:
    """Return the check of a kernel's group sizes: one that is not listed is taken where it is the whole row.

    Source: gptqmodel.nn_modules.qlinear, GroupedQuantLinear._validate.
    """
    listed = group_sizes_check(*known)

    def check(variant: Variant, architecture: Architecture) -> str:
        if all(linear.in_features == variant.group_size for linear in architecture.example_linears):
            return ""
        return listed(variant, architecture)

    return check


gptqmodel_group_sizes = _group_sizes(GPTQMODEL_GROUP_SIZES)
marlin_group_sizes = _group_sizes(MARLIN_GROUP_SIZES)


def marlin_whole_groups(variant: Variant, architecture: Architecture) -> str:
    """Return a linear whose last group is shorter; a group size that is not listed was refused already."""
    size = variant.group_size
    if size == -1 or size not in MARLIN_GROUP_SIZES:
        return ""
    odd = next((linear for linear in architecture.example_linears if linear.in_features % size), None)
    return f"{odd.module} has {odd.in_features} columns, not a multiple of {size}" if odd else ""


def marlin_act_order(variant: Variant, architecture: Architecture) -> str:
    """Return a linear in act order that no thread tile divides; g_idx cannot be padded."""
    if not variant.desc_act or variant.group_size == -1:
        return ""
    for linear in architecture.example_linears:
        rows, columns = linear.out_features, linear.in_features
        if variant.group_size != columns and not fits_marlin_tile(rows, columns):
            shape = f"{linear.module}, {rows} x {columns}"
            return f"pads no linear in act order, and no tile (64 x 128, 128 x 64) divides {shape}"
    return ""


def marlin_padding(variant: Variant, architecture: Architecture) -> str:
    """Return a linear that the kernel pads: then it runs only where it is asked for."""
    for linear in architecture.example_linears:
        rows, columns = linear.out_features, linear.in_features
        if not fits_marlin_tile(rows, columns) and not marlin_act_order(variant, architecture):
            return f"pads {linear.module}, {rows} x {columns}, in each forward, and only if backend is gptq_marlin"
    return ""


_SKIP = "skip these linears in the recipe (quantize.skip), or take a runtime that loads them"
_OPTIMUM = RulesOf(project="optimum", version="2.3.0", read="2026-11-29")
_TRANSFORMERS = RulesOf(project="transformers", version="5.23.0", read="2026-11-29")
_GPTQMODEL = RulesOf(project="GPTQModel", version="7.7.0", read="2026-11-30")
_KERNEL_BITS = _GPTQMODEL.refuses(
    bits_check(*GPTQMODEL_BITS), "gptqmodel.nn_modules.qlinear.torch, TorchLinear", take_bits(GPTQMODEL_BITS)
)
_KERNEL_GROUPS = _GPTQMODEL.refuses(
    gptqmodel_group_sizes,
    "gptqmodel.nn_modules.qlinear.torch, TorchLinear",
    take_group_sizes(GPTQMODEL_GROUP_SIZES),
)

TRANSFORMERS_RULES = (
    _KERNEL_BITS,
    _KERNEL_GROUPS,
    _OPTIMUM.refuses(same_bits, "optimum.gptq.quantizer, GPTQQuantizer, _replace_by_quant_layers", TAKE_ONE_WIDTH),
    _OPTIMUM.refuses(_no_experts, "optimum.gptq.quantizer, convert_model", TAKE_OTHER_RUNTIME),
    _TRANSFORMERS.refuses(
        _transformers_fails, "transformers.models, _init_weights; optimum.gptq.utils, get_layers", _SKIP
    ),
    _TRANSFORMERS.note("through gptqmodel and optimum", "transformers.quantizers.quantizer_gptq"),
)
GPTQMODEL_RULES = (
    _KERNEL_BITS,
    _GPTQMODEL.refuses(_names, "gptqmodel.utils.model, load_checkpoint_in_model_then_tie_weights", TAKE_OTHER_RUNTIME),
    _GPTQMODEL.refuses(_fails, "gptqmodel.models.definitions", TAKE_OTHER_RUNTIME),
    _GPTQMODEL.unknown(_untried, "gptqmodel.models.definitions", TRY_IT),
    _GPTQMODEL.unknown(merged_experts, "gptqmodel.models.definitions", TRY_IT),
    _KERNEL_GROUPS,
    _GPTQMODEL.refuses(_symmetric, "gptqmodel.models.loader, from_quantized, MIN_VERSION_WITH_V2", TAKE_SYMMETRIC),
    _GPTQMODEL.note("computes in float16 or bfloat16", "gptqmodel.models.loader, from_quantized"),
)

_MARLIN = "gptqmodel.nn_modules.qlinear.marlin, MarlinLinear"
GPTQMODEL_MARLIN_RULES = (
    _GPTQMODEL.refuses(bits_check(*MARLIN_BITS), _MARLIN, take_bits(MARLIN_BITS)),
    _GPTQMODEL.unknown(_types, "gptqmodel.models.auto, MODEL_MAP", TRY_IT),
    _GPTQMODEL.refuses(marlin_group_sizes, _MARLIN, take_group_sizes(MARLIN_GROUP_SIZES)),
    _GPTQMODEL.refuses(symmetric_only, _MARLIN, TAKE_SYMMETRIC),
    _GPTQMODEL.refuses(marlin_whole_groups, _MARLIN, "take a group size that divides all of them"),
    _GPTQMODEL.refuses(
        marlin_act_order,
        f"{_MARLIN}, _validate",
        "take a branch with act order static, group or none, or another kernel",
    ),
    _GPTQMODEL.note("needs CUDA with compute capability 7.5, there in float16 only", f"{_MARLIN}, validate_device"),
    _GPTQMODEL.limits(marlin_padding, f"{_MARLIN}, __init__", "load it with backend=BACKEND.GPTQ_MARLIN"),
)
