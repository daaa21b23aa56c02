"""Pack the solutions of linears as the checkpoint format has them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packager.model.packing import pack, pack_zeros
from packager.quantize.gptq.solve import Solution


def packed_linear(name: str, solution: Solution, bits: int, bias: Tensor | None) -> dict[str, Tensor]:
    """Return the packed tensors of a linear by their full names, on the device of the solution.

    Args:
        name: of the linear.
        solution: of the linear alone.
        bits: of its integers.
        bias: of the linear, stored as float16.
    """
    tensors = {
        f"{name}.qweight": pack(solution.q, bits),
        f"{name}.qzeros": pack_zeros(solution.zeros, bits),
        f"{name}.scales": solution.scales.contiguous(),
        f"{name}.g_idx": solution.g_idx.clone(),
    }
    return tensors if bias is None else {**tensors, f"{name}.bias": bias.to(torch.float16)}


def packed_experts(names: Sequence[str], solution: Solution, bits: int) -> dict[str, Tensor]:
    """Return the packed tensors of the linears of several experts, which have one shape and are packed side by side.

    Args:
        names: of the linears, one for each expert.
        solution: of the batch.
        bits: of the integers.
    """
    q = solution.q.transpose(0, 1).reshape(solution.q.shape[1], -1)
    zeros = solution.zeros.transpose(0, 1).reshape(solution.zeros.shape[1], -1)
    count = len(names)
    qweights, qzeros = pack(q, bits).chunk(count, dim=1), pack_zeros(zeros, bits).chunk(count, dim=1)
    tensors: dict[str, Tensor] = {}
    for expert, name in enumerate(names):
        tensors |= {
            f"{name}.qweight": qweights[expert].contiguous(),
            f"{name}.qzeros": qzeros[expert].contiguous(),
            f"{name}.scales": solution.scales[expert].contiguous(),
            f"{name}.g_idx": solution.g_idx[expert].clone(),
        }
    return tensors
