"""The Hessians of a layer's experts, each drawn towards the one of all its inputs the fewer tokens the expert saw.

An expert that saw fewer tokens than its linear has columns has a singular H, and one that saw a few times as many a
poor estimate of it. All experts of a layer draw their inputs from one space, whose H_all is known well. So

    H_e <- (1 - rho) H_e + rho H_all,    rho = n / (n + tokens_e)

with n columns: half H_all for an expert with as many tokens as columns, H_all alone for one that saw none.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.hessian import Hessian, mirror
from packager.quantize.gptq.panels import panels
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.row_parts import part_of
from packager.quantize.gptq.tensor_ops import TensorOps


@dataclass(frozen=True, kw_only=True)
class ExpertHessians:
    """The Hessians of some of a layer's experts.

    Attributes:
        H: float32 [experts, in_features, in_features].
        tokens: how many tokens each expert saw.
        rhos: the weight of H_all in each H, in (0, 1]; 1 for an expert that saw no token.
    """

    H: Tensor
    tokens: tuple[int, ...]
    rhos: tuple[float, ...]


def pooled_hessian(
    batches: Sequence[RoutedInputs],
    ops: TensorOps | None = None,
    *,
    parts: Sequence[int] | None = None,
    matrix: Callable[[Hessian], Tensor] = Hessian.matrix,
    total: Callable[[Sequence[float]], float] = sum,
) -> Tensor:
    """Return H_all = 2/N sum(x x^T) over all N pairs of a token and an expert that it goes to, float32 [n, n].

    Args:
        batches: inputs of the experts' linears, at least one batch.
        ops: the operations to use; None takes the device's.
        parts: the part of each batch, see `row_parts`; None if these are all batches.
        matrix: returns H of the accumulated sums, and of those that other devices accumulated.
        total: returns the sum of a number of each batch, and of those of other devices.

    Raises:
        QuantizeError: no token goes to any expert.
    """
    hessian = Hessian(batches[0].rows.shape[1], batches[0].rows.device, ops)
    for number, batch in enumerate(batches):
        hessian.add(batch.once(), part_of(number, len(batches)) if parts is None else parts[number])
    num_tokens, weight = total([batch.rows.shape[0] for batch in batches]), total([batch.weight for batch in batches])
    if not weight:
        raise QuantizeError("no token was routed to any expert")
    H = matrix(hessian)
    return H if weight == num_tokens else H.mul_(num_tokens / weight)


def expert_hessians(
    batches: Iterable[RoutedInputs], experts: range, pooled: Tensor, ops: TensorOps | None = None
) -> ExpertHessians:
    """Accumulate the Hessians of some experts, H_e = 2/N_e sum(x x^T), and draw them towards the pooled one.

    Args:
        batches: inputs of the experts' linears.
        experts: which of the layer's experts, without gaps.
        pooled: H_all, from `pooled_hessian`.
        ops: the operations to use; None takes the device's.
    """
    in_features = pooled.shape[0]
    ops = ops or ops_for(pooled.device)
    H = torch.zeros(len(experts), in_features, in_features, dtype=torch.float32, device=pooled.device)
    panel, tokens = panels(in_features)[0].stop, [0] * len(experts)
    for batch in batches:
        ops.add_routed_products(H, batch, experts, panel)
        ends = batch.routing.ends
        tokens = [seen + ends[expert + 1] - ends[expert] for seen, expert in zip(tokens, experts, strict=True)]
    rhos = tuple(in_features / (in_features + seen) for seen in tokens)

    def each(numbers: Iterable[float]) -> Tensor:
        return torch.tensor(list(numbers), dtype=torch.float32, device=H.device)[:, None, None]

    H.mul_(each(2.0 / seen if seen else 0.0 for seen in tokens))
    # lerp is exact where both are equal: the only expert of a layer has the H that a linear of its own has.
    mirror(H).lerp_(pooled, each(rhos))
    return ExpertHessians(H=H, tokens=tuple(tokens), rhos=rhos)
