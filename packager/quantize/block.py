"""One block of one variant: its linears calibrated, solved and packed, or restored from what was packed before."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.architecture import BLOCK_PREFIX
from packager.model.decoder import Context
from packager.model.packing import pack, pack_zeros, unpack, unpack_zeros
from packager.quantize.activations import Activations
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor, Hessian, factorize, factorize_within
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.suspended_forward import Group, linears_of, sweep_parallel, sweep_sequential
from packager.receipt import LinearRecord
from packager.variant import Variant


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A variant's way through one block.

    Attributes:
        variant: its parameters.
        index: the block's number.
        groups: from `linear_groups`.
        states: the block's inputs; replaced by the quantized block's outputs.
        contexts: the block's other arguments, one per batch.
        suspended: how many batches wait inside the block.
        last: nobody needs the outputs.
        leaving: called when the states are about to be replaced: memory that the block held is being freed.
    """

    variant: Variant
    index: int
    groups: Sequence[Group]
    states: Activations
    contexts: Sequence[Context]
    suspended: int
    last: bool
    leaving: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """A block's packed tensors, by their full names, on the device that made them, and one record per linear."""

    tensors: Mapping[str, Tensor]
    records: tuple[LinearRecord, ...]


def quantize_block(
    load: Callable[[], nn.Module], passage: Passage, solved: Callable[[tuple[LinearRecord, ...]], None]
) -> QuantizedBlock:
    """Quantize a block and move the states through it.

    A GPU is given all the work of a block at once and asked at the end whether all went well: waiting for an answer
    after each Cholesky would leave it idle. If not, the block is done again, this time asking, damping and explaining.

    Args:
        load: gives the block its original weights and returns it.
        passage: which block, of which variant.
        solved: told the records of linears that were quantized together.

    Raises:
        QuantizeError: NaN or Inf, or a factorisation beyond the limit; names branch and linear.
    """
    try:
        block = load()
        on_gpu = next(block.parameters()).is_cuda
        # The second attempt begins outside the handler: an error under way would keep the first one's batches alive.
        with suppress(_SomethingFailed):
            return _Attempt(block, passage, solved, careful=not on_gpu).run()
        return _Attempt(load(), passage, solved, careful=True).run()
    except QuantizeError as error:
        error.where = error.where or f"{passage.variant.branch}, {BLOCK_PREFIX}.{passage.index}"
        raise


def rules_of(variant: Variant) -> GridRules:
    """Return how a variant's grids are found."""
    return GridRules(bits=variant.bits, sym=variant.sym, scale_search=variant.scale_search)


class _SomethingFailed(Exception):  # noqa: N818
    """A factorisation failed, or a scale did not fit: the careful way will say which."""


@dataclass(frozen=True, kw_only=True)
class _Solved:
    """What is known of linears that were quantized together once the device has finished."""

    names: tuple[str, ...]
    damp_percent: float
    losses: Tensor
    succeeded: Tensor


class _Attempt:
    def __init__(
        self, block: nn.Module, passage: Passage, solved: Callable[[tuple[LinearRecord, ...]], None], *, careful: bool
    ) -> None:
        self._block, self._passage, self._report, self._careful = block, passage, solved, careful
        self._linears = linears_of(block)
        self._rules = rules_of(passage.variant)
        self._solved: list[_Solved] = []
        self._records: tuple[LinearRecord, ...] = ()
        self._tensors: dict[str, Tensor] = {}

    def run(self) -> QuantizedBlock:
        way = self._passage
        if way.variant.true_sequential:
            sweep_sequential(
                self._block, way.groups, way.states, way.contexts, self._solve, suspended=way.suspended, last=way.last,
                confirm=self._leave,
            )  # fmt: skip
        else:
            sweep_parallel(
                self._block, way.groups, way.states, way.contexts, self._solve, last=way.last, confirm=self._leave
            )
        return QuantizedBlock(tensors=self._tensors, records=self._records)

    def _solve(self, group: Group, hessian: Hessian) -> None:
        variant = self._passage.variant
        names = tuple(f"{BLOCK_PREFIX}.{self._passage.index}.{name}" for name in group)
        weights = [self._linears[name].weight for name in group]
        try:
            factor = self._factor(hessian)
            solution = solve(
                weights, factor, self._rules, group_size=variant.group_size, static_groups=variant.static_groups
            )
            if self._careful and not bool(solution.fits()):
                raise QuantizeError("a scale does not fit float16", why="it would be more than 65504")
        except QuantizeError as error:
            error.where = f"{variant.branch}, {', '.join(names)}"
            raise
        parts = solution.by_linear([weight.shape[0] for weight in weights])
        for name, weight, part in zip(names, weights, parts, strict=True):
            part.dequantize_into(weight)
            self._keep(name, part)
        losses = torch.stack([part.losses.mean() for part in parts])
        succeeded = factor.succeeded & solution.fits()
        self._solved.append(_Solved(names=names, damp_percent=factor.damp_percent, losses=losses, succeeded=succeeded))
        if self._careful:
            self._confirm()

    def _factor(self, hessian: Hessian) -> Factor:
        variant = self._passage.variant
        if not self._careful:
            return factorize(hessian.matrix(), desc_act=variant.desc_act, damp_percent=variant.damp_percent)
        return factorize_within(
            hessian.matrix(),
            desc_act=variant.desc_act,
            damp_percent=variant.damp_percent,
            damp_percent_limit=variant.damp_percent_limit,
        )

    def _leave(self) -> None:
        self._confirm()
        self._passage.leaving()

    def _confirm(self) -> None:
        """Wait for the device and report what it solved since the last time."""
        solved, self._solved = self._solved, []
        if solved and not bool(torch.stack([group.succeeded for group in solved]).all()):
            raise _SomethingFailed
        for group in solved:
            records = tuple(
                LinearRecord(name=name, loss=loss, damp_percent=group.damp_percent)
                for name, loss in zip(group.names, group.losses.tolist(), strict=True)
            )
            self._records = (*self._records, *records)
            self._report(records)

    def _keep(self, name: str, solution: Solution) -> None:
        bits = self._passage.variant.bits
        self._tensors |= {
            f"{name}.qweight": pack(solution.q, bits),
            f"{name}.qzeros": pack_zeros(solution.zeros, bits),
            f"{name}.scales": solution.scales.contiguous(),
            f"{name}.g_idx": solution.g_idx.clone(),
        }
        bias = self._block.get_submodule(name.removeprefix(f"{BLOCK_PREFIX}.{self._passage.index}.")).bias
        if isinstance(bias, Tensor):
            self._tensors[f"{name}.bias"] = bias.to(torch.float16)


def restore_block(block: nn.Module, index: int, tensors: Mapping[str, Tensor], variant: Variant) -> None:
    """Give a block the weights that its finished tensors stand for."""
    device = next(block.parameters()).device
    for name, linear in linears_of(block).items():
        stored = f"{BLOCK_PREFIX}.{index}.{name}."

        def read(part: str, stored: str = stored) -> Tensor:
            return tensors[stored + part].to(device)

        linear.weight.copy_(dequantize_linear(read, variant.bits))


def dequantize_linear(read: Callable[[str], Tensor], bits: int) -> Tensor:
    """Return the float32 weight [out_features, in_features] that a linear's packed tensors (v1 format) stand for.

    Args:
        read: returns the tensor "qweight", "qzeros", "scales" or "g_idx" of the linear.
        bits: 2, 3, 4 or 8.
    """
    solution = Solution(
        q=unpack(read("qweight"), bits),
        zeros=unpack_zeros(read("qzeros"), bits),
        scales=read("scales"),
        g_idx=read("g_idx"),
        losses=torch.empty(0),
    )
    return solution.dequantized()
