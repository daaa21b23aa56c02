"""Tune a quantized block (effort: high): integers and scales of all its linears, for outputs nearer to the original's.

The solver quantizes one linear after the other, each for its own output. Here the linears of a block are tuned together
against the error of the block's output. Its target is what the original block makes of the same inputs, which are those
of the quantized model; with a target correction, so much of the way from there to the fp16 model's own output. Batches
take turns. The parameters with the least error over all batches are kept, and the solver's are
among them, so the error of no block rises.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.contexts import Context
from packager.model.decoder import run_block
from packager.quantize.activations import Activations
from packager.quantize.gptq.solve import Solution
from packager.quantize.gptq.tuned_linear import TunedLinear, tuned_solution
from packager.quantize.repeatable_attention import RepeatableAttention
from packager.quantize.suspended_forward import linears_of
from packager.quantize.tuning_schedule import SCHEDULE, TuningSchedule

# The root mean square of the gradient that enters a block from behind, in float16: large against its smallest number,
# and far from its largest when it is multiplied by the inputs of many tokens.
_GRADIENT_SIZE = 2.0**-6


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """A block to be tuned.

    Attributes:
        states: the block's inputs in the quantized model.
        targets: overwritten with what the block's outputs are compared with.
        contexts: the block's other arguments, one per batch.
        bits: of the solutions, by linear.
        target_correction: how far the targets lie from the outputs of the original block for these inputs (0) towards
            the outputs of the fp16 model (1).
        fp16_outputs: of the block; None without a target correction.
    """

    states: Activations
    targets: Activations
    contexts: Sequence[Context]
    bits: Mapping[str, int]
    target_correction: float = 0.0
    fp16_outputs: Activations | None = None

    def put_targets(self, block: nn.Module) -> None:
        """Run the original block, and keep what its outputs shall be."""
        for batch, context in enumerate(self.contexts):
            target = run_block(block, self.states.get(batch), context)
            if self.fp16_outputs is not None:
                target = torch.lerp(target, self.fp16_outputs.get(batch), self.target_correction)
            self.targets.put(batch, target)


@dataclass(frozen=True, kw_only=True)
class TunedBlock:
    """The result of tuning a block.

    Attributes:
        solutions: by linear.
        error: mean squared error of the block's outputs, over all batches.
        untuned_error: likewise, before.
    """

    solutions: Mapping[str, Solution]
    error: float
    untuned_error: float


def tune_block(
    block: nn.Module, solutions: Mapping[str, Solution], tuning: Tuning, schedule: TuningSchedule | None = None
) -> TunedBlock:
    """Tune the linears of a block, and overwrite their weights with what a loader reads.

    Args:
        block: with its original weights.
        solutions: where the tuning starts, by linear.
        tuning: the block's inputs.
        schedule: how many steps, and how large; None for `SCHEDULE`.

    Raises:
        QuantizeError: the error of the block's outputs is NaN or infinite.
    """
    tuner = _Tuner(block, solutions, tuning)
    with RepeatableAttention():
        tuner.take_steps(schedule or SCHEDULE)
    return TunedBlock(solutions=tuner.best, error=tuner.error, untuned_error=tuner.untuned_error)


class _Tuner:
    """The linears of one block.

    Attributes:
        best: solutions with the least error so far; the block's weights are others meanwhile.
        error: of these, mean squared over all batches.
        untuned_error: of the solutions at the start.
    """

    def __init__(self, block: nn.Module, solutions: Mapping[str, Solution], tuning: Tuning) -> None:
        self._block, self._tuning, self._linears = block, tuning, linears_of(block)
        tuning.put_targets(block)
        self._original = {name: self._linears[name].weight.detach() for name in solutions}
        for name, weight in self._original.items():
            self._linears[name].weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
        self.best = dict(solutions)
        self._write(self.best)
        self.untuned_error = self.error = self._measured()

    def take_steps(self, schedule: TuningSchedule) -> None:
        """Tune all linears by their gradients, one batch after the other."""
        tuned = {
            name: TunedLinear(weight, self.best[name], 2 ** self._tuning.bits[name] - 1)
            for name, weight in self._original.items()
        }
        weights = {name: self._linears[name].weight for name in tuned}
        for step in range(schedule.steps if self.untuned_error else 0):
            gradients = self._gradients(step % len(self._tuning.states), list(weights.values()))
            rates = schedule.rates(step)
            for linear, weight, gradient in zip(tuned.values(), weights.values(), gradients, strict=True):
                linear.step(gradient, *rates)
                linear.write(weight)
            if schedule.is_checked(step):
                self._keep_if_better(tuned)
        self._write(self.best)

    def _gradients(self, batch: int, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients by weights of a batch's sum of squared errors, times a constant."""
        tuning = self._tuning
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            output = run_block(self._block, tuning.states.get(batch), tuning.contexts[batch])
            error = output.detach().float().sub_(tuning.targets.get(batch))
            scaled = error.mul_(_GRADIENT_SIZE / math.sqrt(self.untuned_error)).to(output.dtype)
            gradients = torch.autograd.grad(output, weights, scaled)
        # Frozen again, because autograd refuses changes in place of what it records.
        for weight in weights:
            weight.requires_grad_(False)
        return gradients

    def _write(self, solutions: Mapping[str, Solution]) -> None:
        for name, solution in solutions.items():
            solution.dequantize_into(self._linears[name].weight)

    def _keep_if_better(self, tuned: Mapping[str, TunedLinear]) -> None:
        """Keep the solutions of the present weights if their error is the least so far."""
        error = self._measured()
        if error < self.error:
            self.error = error
            self.best = {name: tuned_solution(self.best[name], linear.grid()) for name, linear in tuned.items()}

    def _measured(self) -> float:
        """Return the mean squared error of the present weights over all batches.

        Raises:
            QuantizeError: it is NaN or infinite.
        """
        tuning, sums, count = self._tuning, [], 0
        for batch in range(len(tuning.states)):
            target = tuning.targets.get(batch)
            output = run_block(self._block, tuning.states.get(batch), tuning.contexts[batch])
            sums.append((output.float() - target).square_().sum(dtype=torch.float64))
            count += target.numel()
        error = float(torch.stack(sums).sum()) / count
        if not math.isfinite(error):
            raise QuantizeError("the outputs of the block contain NaN or Inf", why="so their error cannot be lowered")
        return error
