"""A finished block: its weights from its packed tensors."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from packager.model.experts import experts_of
from packager.model.packing import dequantize_linear
from packager.quantize.block import ExpertLinears
from packager.quantize.suspended_forward import linears_of
from packager.variant import Variant


def restore_block(
    block: nn.Module,
    names: Mapping[str, str],
    experts: ExpertLinears,
    tensors: Mapping[str, Tensor],
    variant: Variant,
) -> None:
    """Overwrite a block's weights with those that its packed tensors represent.

    `names` and `experts` are those of `BlockJob`.
    """
    device = next(block.parameters()).device

    def dequantized(name: str) -> Tensor:
        return dequantize_linear(lambda part: tensors[f"{name}.{part}"].to(device), variant.bits_of(name))

    linears = linears_of(block)
    for module, name in names.items():
        linears[module].weight.copy_(dequantized(name))
    modules = experts_of(block) if experts else {}
    for parameter, each in experts.items():
        module, _, name = parameter.rpartition(".")
        for weight, specs in zip(modules[module].weight(name), each, strict=True):
            weight.copy_(torch.cat([dequantized(spec.name) for spec in specs]))
