"""One block of one variant: calibrate, solve and pack its linears, or restore them from their packed tensors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.architecture import LinearSpec
from packager.model.contexts import Context
from packager.model.experts import Experts, experts_of
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.expert_hessians import expert_hessians, pooled_hessian
from packager.quantize.gptq.hessian import OVERFLOW_HINT, Factor, Hessian, factorize, factorize_within
from packager.quantize.gptq.refine import TOKENS_PER_COLUMN
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.side_by_side import solved_together
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.target_correction import InputShift, corrected_targets
from packager.quantize.memory import expert_slices
from packager.quantize.pack_solution import packed_experts, packed_linear
from packager.quantize.ranks import Owned, SweepRank
from packager.quantize.solved_linears import SolvedLinears, start_copying
from packager.quantize.suspended_forward import Reference, linears_of, run_forward, sweep_parallel, sweep_sequential
from packager.quantize.tune_block import Tuning, tune_block
from packager.quantize.variant_rules import order_of, rules_of
from packager.receipt import LinearRecord
from packager.variant import Variant

# By the parameter of a block: the linears of each expert, in the order of their rows.
ExpertLinears = Mapping[str, Sequence[Sequence[LinearSpec]]]


@dataclass(frozen=True, kw_only=True)
class BlockJob:
    """One block to be quantized for one variant.

    Attributes:
        variant: its parameters.
        index: the block's number.
        groups: names inside the block of linears that see the same input, in the order in which the block reaches them.
        names: for each of these linears, the name under which its tensors are stored.
        experts: for each parameter that holds linears of experts, a group by itself, the linears of each expert, one
            below another.
        states: the block's inputs; replaced by the quantized block's outputs.
        targets: of a variant that is tuned, overwritten with what its outputs are compared with.
        contexts: the block's other arguments, one per batch.
        reference: the fp16 model's activations, of a variant with a target correction.
        rank: the device's place among those that share the rows.
        parts: the part of the rows to which each batch belongs, see `row_parts`; None: these are all batches.
        suspended: how many batches are suspended inside the block at once.
        last: the model's last block, whose outputs are not needed.
        on_outputs_needed: called before the states are replaced, when the block's memory begins to be freed.
    """

    variant: Variant
    index: int
    groups: Sequence[Group]
    names: Mapping[str, str]
    experts: ExpertLinears
    states: Activations
    targets: Activations | None = None
    contexts: Sequence[Context]
    reference: Reference | None = None
    rank: SweepRank
    parts: Sequence[int] | None = None
    suspended: int
    last: bool
    on_outputs_needed: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class QuantizedBlock:
    """The linears of a block that this rank solved.

    Attributes:
        tensors: packed, by their full names, on the device that made them.
        records: one per linear, by the group's number, and the first expert's of a slice or the place of a wide linear.
    """

    tensors: Mapping[str, Tensor]
    records: Mapping[tuple[int, int], tuple[LinearRecord, ...]]


def quantize_block(
    load: Callable[[], nn.Module], job: BlockJob, solved: Callable[[tuple[LinearRecord, ...]], None]
) -> QuantizedBlock:
    """Quantize a block and replace the states by its outputs.

    Each of the devices that share the rows calls this with its batches: a Hessian is summed over all of them, a group
    of linears or a slice of experts is solved by one of them, and the others copy the weights.

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
            return _BlockSolver(block, job, solved, checked=not on_gpu).run(load)
        return _BlockSolver(load(), job, solved, checked=True).run(load)
    except QuantizeError as error:
        error.where = error.where or f"{job.variant.branch}, block {job.index}"
        raise


class _NeedsChecks(Exception):  # noqa: N818
    """Internal signal: retry this block with per-linear checks, which raise the precise error."""


class _BlockSolver:
    """Quantizes a block once, with checks after each group of linears (`checked`) or with one at the end."""

    def __init__(
        self, block: nn.Module, job: BlockJob, solved: Callable[[tuple[LinearRecord, ...]], None], *, checked: bool
    ) -> None:
        self._block, self._job, self._report, self._checked = block, job, solved, checked
        self._linears = linears_of(block)
        self._experts: Mapping[str, Experts] = experts_of(block) if job.experts else {}
        self._ops = ops_for(next(block.parameters()).device)
        self._order = order_of(job.variant)
        self._number_of = {group: number for number, group in enumerate(job.groups)}
        self._solved: list[SolvedLinears] = []
        self._copied: Callable[[], list[SolvedLinears]] = list
        self._owned: list[Owned] = []
        self._records: dict[tuple[int, int], tuple[LinearRecord, ...]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._untuned: dict[str, Solution] = {}

    def run(self, load: Callable[[], nn.Module]) -> QuantizedBlock:
        """Quantize the block; `load` gives it its original weights again, to be tuned."""
        job, tuned = self._job, self._job.variant.effort == "high"
        last = job.last or tuned
        if job.variant.true_sequential:
            sweep_sequential(
                self._block, job.groups, job.states, job.contexts, self._solve, solve_experts=self._solve_experts,
                parts=job.parts, suspended=job.suspended, reference=job.reference, last=last,
                on_solved=self._on_solved, check=self._check,
            )  # fmt: skip
        else:
            sweep_parallel(
                self._block, job.groups, job.states, job.contexts, self._solve, solve_experts=self._solve_experts,
                parts=job.parts, last=last, on_solved=self._on_solved, check=self._check,
            )  # fmt: skip
        if tuned:
            self._tune(load)
        return QuantizedBlock(tensors=self._tensors, records=self._records)

    def _solve(self, group: Group, hessian: Hessian, shift: InputShift | None) -> None:
        number, rank = self._number_of[group], self._job.rank
        widths = [self._linears[module].weight.shape[0] for module in group]
        # The targets of a correction are found for all linears at once.
        cuts = solved_together(widths) if shift is None else [slice(len(group))]
        owners = {(number, place): (number + place) % rank.size for place in range(len(cuts))}
        mine = {(number, place): group[cut] for place, cut in enumerate(cuts) if owners[number, place] == rank.number}
        try:
            parts = self._solve_linears(mine, hessian, shift, owners.values())
        except QuantizeError as error:
            error.where = f"{self._job.variant.branch}, {', '.join(self._job.names[module] for module in group)}"
            raise
        for cut, owner in zip(cuts, owners.values(), strict=True):
            self._owned += [Owned(tensor=self._linears[module].weight, owner=owner) for module in group[cut]]
        self._share()
        # The other ranks wait for the weights, not for the packed tensors.
        for module, part in parts.items():
            if self._job.variant.effort == "high":
                self._untuned[module] = part
            else:
                self._keep(self._job.names[module], part, self._linears[module].bias)

    def _solve_linears(
        self, mine: Mapping[tuple[int, int], Group], hessian: Hessian, shift: InputShift | None, owners: Collection[int]
    ) -> dict[str, Solution]:
        """Solve a group on the ranks that own a part of it: linears side by side, by their position.

        H and S are variables of this function, so that each is freed when it is used: an argument lives as long as the
        caller keeps it.

        Args:
            mine: the linears that this rank solves.
            hessian: of this rank's inputs; it is empty afterwards.
            shift: likewise.
            owners: the ranks that solve a part.

        Returns:
            The solution of each linear.
        """
        rank = self._job.rank
        tokens = int(rank.total([hessian.num_tokens]))
        H, S = rank.hessian(hessian, owners), rank.shift(shift, owners)
        if H is None:
            return {}
        found: dict[str, Solution] = {}
        refined = self._refined([tokens], H.shape[-1])
        every = [self._linears[module].weight for modules in mine.values() for module in modules]
        targets, finite = self._targets(every, H, S)
        del S
        factor = self._factor(H)
        del H
        for position, modules in mine.items():
            names = tuple(self._job.names[module] for module in modules)
            weights = [self._linears[module].weight for module in modules]
            solution = self._solution(targets[: len(modules)], factor, refined, names[0])
            targets = targets[len(modules) :]
            parts = solution.by_linear([weight.shape[0] for weight in weights])
            for weight, part in zip(weights, parts, strict=True):
                part.dequantize_into(weight, self._ops)
            self._add(
                SolvedLinears(
                    position=position,
                    names=names,
                    damp_percents=(factor.damp_percent,) * len(names),
                    losses=torch.stack([part.losses.mean() for part in parts]),
                    unrefined_losses=torch.stack([part.unrefined_losses.mean() for part in parts]),
                    refined=refined * len(names),
                    succeeded=factor.succeeded & finite & solution.scales_are_finite(),
                )
            )
            found |= zip(modules, parts, strict=True)
        return found

    def _targets(self, weights: Sequence[Tensor], H: Tensor, S: Tensor | None) -> tuple[Sequence[Tensor], Tensor]:
        """Return what is to be quantized, and whether S, if there is one, is finite: bool [] on the device."""
        finite = H.new_ones((), dtype=torch.bool) if S is None else torch.isfinite(S).all()
        if S is None:
            return weights, finite
        if self._checked and not bool(finite):
            raise QuantizeError("the activations of the fp16 model contain NaN or Inf", hint=OVERFLOW_HINT)
        return corrected_targets(weights, H, S, strength=self._job.variant.target_correction), finite

    def _share(self) -> None:
        """Give every rank what the owners of weights made of them: now if later linears of the block need it."""
        if self._job.variant.true_sequential:
            self._share_all()

    def _share_all(self) -> None:
        owned, self._owned = self._owned, []
        self._job.rank.copy_from_owners(owned)

    def _solve_experts(self, parameter: str, inputs: Sequence[RoutedInputs]) -> None:
        """Quantize the linears of all experts in a parameter, slice by slice, each slice where its owner is."""
        job, number = self._job, self._number_of[parameter,]
        linears = job.experts[parameter]
        module, _, name = parameter.rpartition(".")
        weight = self._experts[module].weight(name)
        slices = expert_slices(weight.shape[2], weight.shape[1], weight.shape[0], weight.device.type)
        owners = [slice_number % job.rank.size for slice_number in range(len(slices))]
        pooled = pooled_hessian(
            inputs, self._ops, parts=job.parts, matrix=self._hessian_everywhere, total=job.rank.total
        )
        every = job.rank.every_input(inputs)
        for experts, owner in zip(slices, owners, strict=True):
            if owner != job.rank.number:
                continue
            part = slice(experts.start, experts.stop)
            try:
                self._solve_slice(weight[part], linears[part], every, experts, pooled, number)
            except QuantizeError as error:
                error.where = f"{job.variant.branch}, block {job.index}, {module}, from expert {experts.start} on"
                raise
        self._owned += [
            Owned(tensor=weight[experts.start : experts.stop], owner=owner)
            for experts, owner in zip(slices, owners, strict=True)
        ]
        self._share()

    def _hessian_everywhere(self, hessian: Hessian) -> Tensor:
        H = self._job.rank.hessian(hessian, range(self._job.rank.size))
        assert H is not None, "every rank gets it"  # noqa: S101
        return H

    def _solve_slice(
        self, weight: Tensor, linears: Sequence[Sequence[LinearSpec]], inputs: Sequence[RoutedInputs],
        experts: range, pooled: Tensor, number: int,
    ) -> None:  # fmt: skip
        hessians = expert_hessians(inputs, experts, pooled, self._ops)
        tokens, rhos, H = hessians.tokens, hessians.rhos, hessians.H
        del hessians
        factor = self._factor(H)
        del H
        refined = self._refined(tokens, weight.shape[-1])
        solution = self._solution([weight], factor, refined, linears[0][0].name)
        solution.dequantize_into(weight, self._ops)
        parts = solution.by_linear([linear.out_features for linear in linears[0]])
        for part, specs in zip(parts, zip(*linears, strict=True), strict=True):
            names = [spec.name for spec in specs]
            self._tensors |= packed_experts(names, part, self._job.variant.bits_of(names[0]))
        calibrated = zip(tokens, rhos, factor.damp_percents, strict=True)
        each = [(spec.name, *known) for specs, known in zip(linears, calibrated, strict=True) for spec in specs]
        self._add(
            SolvedLinears(
                position=(number, experts.start),
                names=tuple(name for name, *_ in each),
                damp_percents=tuple(damp for *_, damp in each),
                losses=torch.stack([part.losses.mean(dim=-1) for part in parts], dim=1).reshape(-1),
                unrefined_losses=torch.stack([part.unrefined_losses.mean(dim=-1) for part in parts], dim=1).reshape(-1),
                refined=tuple(each for each in refined for _ in parts),
                succeeded=factor.succeeded.all() & solution.scales_are_finite(),
                calibrated=tuple((tokens, rho) for _, tokens, rho, _ in each),
            )
        )

    def _refined(self, tokens: Sequence[int], in_features: int) -> tuple[bool, ...]:
        """Return whether the variant refines a linear, or each expert, that was calibrated on so many tokens."""
        return tuple(self._job.variant.refine and seen >= TOKENS_PER_COLUMN * in_features for seen in tokens)

    def _solution(self, weights: Sequence[Tensor], factor: Factor, refined: Sequence[bool], linear: str) -> Solution:
        """Solve linears that see the same input, and so have the same bits: those of one of them."""
        rules = rules_of(self._job.variant, self._job.variant.bits_of(linear))
        solution = solve(weights, factor, rules, refined=refined, ops=self._ops)
        if self._checked and not bool(solution.scales_are_finite()):
            raise QuantizeError("a scale does not fit float16", why="it would be more than 65504")
        return solution

    def _add(self, solved: SolvedLinears) -> None:
        # With checks, each step raised an error of its own where it failed.
        if self._checked:
            self._report_all([solved])
        else:
            self._solved.append(solved)

    def _factor(self, H: Tensor) -> Factor:
        variant = self._job.variant
        if not self._checked:
            return factorize(H, self._order, damp_percent=variant.damp_percent)
        return factorize_within(
            H,
            self._order,
            damp_percent=variant.damp_percent,
            damp_percent_limit=variant.damp_percent_limit,
        )

    def _on_solved(self) -> None:
        self._share_all()
        self._copied = start_copying(self._solved)

    def _tune(self, load: Callable[[], nn.Module]) -> None:
        """Tune the linears together, pack them, and replace the states by the outputs of the tuned block."""
        job = self._job
        assert job.targets is not None, "there is a place for them"  # noqa: S101
        tuning = Tuning(
            states=job.states, targets=job.targets, contexts=job.contexts,
            bits={module: job.variant.bits_of(job.names[module]) for module in self._untuned},
            target_correction=job.variant.target_correction,
            fp16_outputs=None if job.reference is None else job.reference.states,
        )  # fmt: skip
        tuned = tune_block(load(), self._untuned, tuning)
        self._untuned.clear()
        for module, solution in tuned.solutions.items():
            self._keep(job.names[module], solution, self._linears[module].bias)
        errors = {"block_error": tuned.error, "untuned_block_error": tuned.untuned_error}
        for position, records in self._records.items():
            self._records[position] = tuple(record.model_copy(update=errors) for record in records)
        job.on_outputs_needed()
        if not job.last:
            run_forward(self._block, job.groups, job.states, job.contexts)

    def _check(self) -> None:
        """Wait for the linears that the device solved, and report them; do so on every rank or on none.

        Raises:
            _NeedsChecks: a factorisation failed, or a scale does not fit float16, on any rank.
        """
        solved = self._copied()
        if self._job.rank.any(not all(bool(group.succeeded) for group in solved)):
            raise _NeedsChecks
        self._report_all(solved)
        if self._job.variant.effort != "high":
            self._job.on_outputs_needed()

    def _report_all(self, solved: Sequence[SolvedLinears]) -> None:
        for group in solved:
            self._records[group.position] = group.records()
            self._report(self._records[group.position])

    def _keep(self, name: str, solution: Solution, bias: Tensor | None) -> None:
        self._tensors |= packed_linear(name, solution, self._job.variant.bits_of(name), bias)
