"""The shapes that kernels see: linears that a runtime computes as one, tiles, and the shares of several GPUs."""

from dataclasses import dataclass

from packager.model.architecture import Architecture
from packager.model.runtime_architectures import FUSED_LINEARS
from packager.variant import Variant

TENSOR_PARALLEL_SIZES = (2, 4, 8)
# Linears whose input columns are divided among the GPUs.
ROW_PARALLEL = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class KernelLinear:
    """A matrix as a kernel computes it.

    Attributes:
        module: its name inside the block; of linears that are computed as one, the one name.
        in_features, out_features: of all of them together.
    """

    module: str
    in_features: int
    out_features: int


def kernel_linears(architecture: Architecture) -> tuple[KernelLinear, ...]:
    """Return the linears of a block of each kind, with those of `FUSED_LINEARS` as one."""
    found: dict[tuple[int, str], KernelLinear] = {}
    for linear in architecture.example_linears:
        parent, dot, name = linear.module.rpartition(".")
        fused = next((whole for whole, parts in FUSED_LINEARS.items() if name in parts), name)
        key = linear.block, f"{parent}{dot}{fused}"
        before = found[key].out_features if key in found else 0
        found[key] = KernelLinear(
            module=key[1], in_features=linear.in_features, out_features=before + linear.out_features
        )
    return tuple(found.values())


def fits_marlin_tile(out_features: int, in_features: int) -> bool:
    """Return whether one of Marlin's two thread tiles, 64 x 128 and 128 x 64, divides a matrix.

    Source: GPTQModel 7.7.0, gptqmodel.utils.marlin, marlin_is_tile_aligned; the kernels of vLLM 0.32 and SGLang 0.5.23
    have the same tiles.
    """
    return (out_features % 64 == 0 and in_features % 128 == 0) or (out_features % 128 == 0 and in_features % 64 == 0)


def fused_alike(_: Variant, architecture: Architecture) -> str:
    """Return a model that leaves a part of what the runtime computes as one linear."""
    for kind in architecture.kinds:
        quantized = {module for group in kind.groups for module in group.modules}
        for left in kind.left:
            parent, _dot, name = left.rpartition(".")
            members = next((members for members in FUSED_LINEARS.values() if name in members), ())
            partner = next((each for each in members if f"{parent}.{each}" in quantized), None)
            if partner is not None:
                return f"computes {' and '.join(members)} as one linear, {name} is not quantized, {partner} is"
    return ""


def tensor_parallel(variant: Variant, architecture: Architecture) -> str:
    """Return the smallest number of GPUs over which heads, or a linear's groups, cannot be spread evenly.

    Source: vLLM 0.32, config.model, verify_with_parallel_config; SGLang 0.5.23, sglang.srt.models.llama,
    LlamaAttention; the groups: `create_weights` of both.
    """
    group = max(variant.group_size, 1)
    heads = architecture.text_config.get("num_attention_heads")
    for size in TENSOR_PARALLEL_SIZES:
        if isinstance(heads, int) and heads % size:
            return f"tensor parallel {size} fails: {heads} attention heads"
        for linear in architecture.example_linears:
            if linear.module in ROW_PARALLEL and linear.in_features % (size * group):
                return (
                    f"tensor parallel {size} fails: {linear.module} has {linear.in_features} / {size} = "
                    f"{linear.in_features / size:g} columns on each GPU, not a multiple of {group}"
                )
    return ""
