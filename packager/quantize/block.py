"""One block of one variant: calibrate, solve and pack its linears, or restore them from their packed tensors."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.contexts import Context
from packager.model.packing import dequantize_linear, pack, pack_zeros
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor, Hessian, factorize, factorize_within
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.suspended_forward import linears_of, sweep_parallel, sweep_sequential
from packager.receipt import LinearRecord
from packager.variant import Variant


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """One block to be quantized for one variant.

    Attributes:
        variant: its parameters.
        index: the block's number.
        groups: names inside the block of linears that see the same input, in the order in which the block reaches them.
        names: for each of these linears, the name under which its tensors are stored.
        states: the block's inputs; replaced by the quantized block's outputs.
        contexts: the block's other arguments, one per batch.
        suspended: how many batches are suspended inside the block at once.
        last: the model's last block, whose outputs are not needed.
        on_outputs_needed: called before the states are replaced, when the block's memory begins to be freed.
    """

    variant: Variant
    index: int
    groups: Sequence[Group]
    names: Mapping[str, str]
    states: Activations
    contexts: Sequence[Context]
    suspended: int
    last: bool
    on_outputs_needed: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """A block's packed tensors, by their full names, on the device that made them, and one record per linear."""

    tensors: Mapping[str, Tensor]
    records: tuple[LinearRecord, ...]


def quantize_block(
    load: Callable[[], nn.Module], job: BlockJob, solved: Callable[[tuple[LinearRecord, ...]], None]
) -> QuantizedBlock:
    """Quantize a block and replace the states by its outputs.

    On a GPU, all work of a block is queued without checks, and one check follows at the end: a check after each
    Cholesky would leave the GPU idle. If the check fails, the block is quantized again with a check per group of
    linears, which raises damping and names the linear that fails.

    Args:
        load: gives the block its original weights and returns it.
        job: which block, for which variant.
        solved: called with the records of linears that were quantized together.

    Raises:
        QuantizeError: NaN or Inf, or a factorisation beyond the limit; names branch and linear.
    """
    try:
        block = load()
        on_gpu = next(block.parameters()).is_cuda
        # Retry after the `except` block: the exception's traceback references the first attempt's activations.
        with suppress(_NeedsChecks):
            return _BlockSolver(block, job, solved, checked=not on_gpu).run()
        return _BlockSolver(load(), job, solved, checked=True).run()
    except QuantizeError as error:
        error.where = error.where or f"{job.variant.branch}, block {job.index}"
        raise


def rules_of(variant: Variant) -> GridRules:
    """Return the rules by which a variant's grids are found."""
    return GridRules(bits=variant.bits, sym=variant.sym, scale_search=variant.scale_search)


class _NeedsChecks(Exception):  # noqa: N818
    """Internal signal: retry this block with per-linear checks, which raise the precise error."""


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """Linears that were quantized together; the device may still be computing `losses` and `succeeded`."""

    names: tuple[str, ...]
    damp_percent: float
    losses: Tensor
    succeeded: Tensor


class _BlockSolver:
    """Quantizes a block once, with checks after each group of linears (`checked`) or with one at the end."""

    def __init__(
        self, block: nn.Module, job: BlockJob, solved: Callable[[tuple[LinearRecord, ...]], None], *, checked: bool
    ) -> None:
        self._block, self._job, self._report, self._checked = block, job, solved, checked
        self._linears = linears_of(block)
        self._ops = ops_for(next(block.parameters()).device)
        self._rules = rules_of(job.variant)
        self._solved: list[_Solved] = []
        self._records: tuple[LinearRecord, ...] = ()
        self._tensors: dict[str, Tensor] = {}

    def run(self) -> QuantizedBlock:
        job = self._job
        if job.variant.true_sequential:
            sweep_sequential(
                self._block, job.groups, job.states, job.contexts, self._solve, suspended=job.suspended, last=job.last,
                on_solved=self._on_solved,
            )  # fmt: skip
        else:
            sweep_parallel(
                self._block, job.groups, job.states, job.contexts, self._solve, last=job.last,
                on_solved=self._on_solved,
            )  # fmt: skip
        return QuantizedBlock(tensors=self._tensors, records=self._records)

    def _solve(self, group: Group, hessian: Hessian) -> None:
        variant = self._job.variant
        names = tuple(self._job.names[module] for module in group)
        weights = [self._linears[name].weight for name in group]
        try:
            factor = self._factor(hessian)
            solution = solve(
                weights, factor, self._rules, group_size=variant.group_size, static_groups=variant.static_groups,
                ops=self._ops,
            )  # fmt: skip
            if self._checked and not bool(solution.scales_are_finite()):
                raise QuantizeError("a scale does not fit float16", why="it would be more than 65504")
        except QuantizeError as error:
            error.where = f"{variant.branch}, {', '.join(names)}"
            raise
        parts = solution.by_linear([weight.shape[0] for weight in weights])
        for module, weight, part in zip(group, weights, parts, strict=True):
            part.dequantize_into(weight, self._ops)
            self._keep(module, part)
        losses = torch.stack([part.losses.mean() for part in parts])
        succeeded = factor.succeeded & solution.scales_are_finite()
        self._solved.append(_Solved(names=names, damp_percent=factor.damp_percent, losses=losses, succeeded=succeeded))
        if self._checked:
            self._check()

    def _factor(self, hessian: Hessian) -> Factor:
        variant = self._job.variant
        if not self._checked:
            return factorize(hessian.matrix(), desc_act=variant.desc_act, damp_percent=variant.damp_percent)
        return factorize_within(
            hessian.matrix(),
            desc_act=variant.desc_act,
            damp_percent=variant.damp_percent,
            damp_percent_limit=variant.damp_percent_limit,
        )

    def _on_solved(self) -> None:
        self._check()
        self._job.on_outputs_needed()

    def _check(self) -> None:
        """Wait for the device, and report the linears that it solved since the last check.

        Raises:
            _NeedsChecks: a factorisation failed, or a scale does not fit float16.
        """
        solved, self._solved = self._solved, []
        if solved and not bool(torch.stack([group.succeeded for group in solved]).all()):
            raise _NeedsChecks
        for group in solved:
            records = tuple(
                LinearRecord(name=name, loss=loss, damp_percent=group.damp_percent)
                for name, loss in zip(group.names, group.losses.tolist(), strict=True)
            )
            self._records = (*self._records, *records)
            self._report(records)

    def _keep(self, module: str, solution: Solution) -> None:
        bits, name = self._job.variant.bits, self._job.names[module]
        self._tensors |= {
            f"{name}.qweight": pack(solution.q, bits),
            f"{name}.qzeros": pack_zeros(solution.zeros, bits),
            f"{name}.scales": solution.scales.contiguous(),
            f"{name}.g_idx": solution.g_idx.clone(),
        }
        bias = self._linears[module].bias
        if isinstance(bias, Tensor):
            self._tensors[f"{name}.bias"] = bias.to(torch.float16)


def restore_block(block: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor], variant: Variant) -> None:
    """Overwrite a block's weights with those that its packed tensors represent; `names` as in `BlockJob`."""
    device = next(block.parameters()).device
    linears = linears_of(block)
    for module, name in names.items():

        def read(part: str, name: str = name) -> Tensor:
            return tensors[f"{name}.{part}"].to(device)

        linears[module].weight.copy_(dequantize_linear(read, variant.bits))
