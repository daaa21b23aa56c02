"""The suspended forward: one forward calibrates a block's linears, each on the outputs of the quantized ones before it.

Every batch runs the block in its own greenlet and is suspended when it reaches a linear that is not quantized yet.
Once all batches are suspended there, their inputs give the Hessian, the linear is quantized, and the batches resume.
Other implementations repeat the block's forward once per group of linears; this one runs it once, in the same order,
for any block made of `nn.Linear`. The experts of a layer, which are no modules of their own, are suspended by
`experts.own_forward`: their group is the name of one parameter, and its inputs come with their routing.

The fp16 model's own activations can go through the block at the same time, one group ahead: they pass a linear while it
still has its original weights. So both inputs of a linear are known, and the block's weights are there once. Where not
all batches stay suspended, the original weights are kept for those that run again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.contexts import Context
from packager.model.decoder import run_block
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.experts import own_forward
from packager.quantize.gptq.hessian import Hessian
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.row_parts import part_of
from packager.quantize.gptq.target_correction import InputShift

# Given the Hessian, and S where the fp16 model's activations are known.
SolveGroup = Callable[[Group, Hessian, InputShift | None], None]
SolveExperts = Callable[[str, Sequence[RoutedInputs]], None]
Action = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The activations of the fp16 model, on which no quantized linear had an effect.

    Attributes:
        states: the block's inputs; replaced by the outputs of the block with its original weights.
        contexts: the block's other arguments, one per batch.
        last: the model's last block, whose outputs are not needed.
    """

    states: Activations
    contexts: Sequence[Context]
    last: bool


def _refuse_experts(name: str, _: Sequence[RoutedInputs]) -> None:
    raise QuantizeError("experts cannot be quantized here", where=name)


def _ignore() -> None: ...


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """Return a block's linears by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@contextmanager
def _hooks(modules: Mapping[str, nn.Module], make: Callable[[str], Callable[..., None]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(make(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def linear_groups(block: nn.Module, hidden: Tensor, context: Context) -> tuple[Group, ...]:
    """Return the linears that see the same input, group by group in the order in which the block reaches them.

    A parameter that holds a linear of every expert is a group of its own.

    Args:
        block: with its weights.
        hidden: inputs of one batch.
        context: the block's other arguments.

    Raises:
        QuantizeError: a linear was never reached, e.g. a routed expert: there is no input to calibrate it on.
    """
    seen: list[tuple[str, Tensor]] = []

    def make(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append((name, args[0]))

        return record

    linears = linears_of(block)
    with _hooks(linears, make), own_forward(block, lambda name, inputs: seen.append((name, inputs.rows))):
        run_block(block, hidden, context)
    if missed := set(linears) - {name for name, _ in seen}:
        raise QuantizeError("a linear received no input", where=", ".join(sorted(missed)))
    groups: list[list[str]] = []
    for index, (name, x) in enumerate(seen):
        if index and x is seen[index - 1][1] and {name, seen[index - 1][0]} <= set(linears):
            groups[-1].append(name)
        else:
            groups.append([name])
    return tuple(tuple(group) for group in groups)


@torch.no_grad()
def sweep_sequential(
    block: nn.Module, groups: Sequence[Group], states: Activations, contexts: Sequence[Context], solve: SolveGroup, *,
    solve_experts: SolveExperts = _refuse_experts, parts: Sequence[int] | None = None, suspended: int | None = None,
    reference: Reference | None = None, last: bool = False, on_solved: Action = _ignore, check: Action = _ignore,
) -> None:  # fmt: skip
    """Quantize group after group while the batches are inside the block.

    Args:
        block: with its original weights; `solve` overwrites them.
        groups: from `linear_groups`.
        states: the block's inputs, replaced by the quantized block's outputs.
        contexts: the block's other arguments, one per batch.
        solve: quantizes a group given its Hessian, and S if there is a reference.
        solve_experts: quantizes the experts' linears in a parameter given the inputs of all batches, held until then.
        parts: the part of the rows to which each batch belongs, see `row_parts`; None: these are all batches.
        suspended: how many batches stay suspended inside the block; each of the others runs again from the block's
            beginning for every group, with the same values. None: all of them stay.
        reference: the fp16 model's activations; as many of its batches stay suspended inside the block.
        last: the quantized block's outputs are not needed, and the states stay its inputs.
        on_solved: called when every group is quantized.
        check: called when one more batch runs, so that a GPU has work meanwhile, and no state is replaced; may raise.

    Raises:
        QuantizeError: a batch does not reach the linears, or not in the order of `groups`.
    """
    linears, main, done = linears_of(block), getcurrent(), set[str]()
    paused: dict[int, greenlet] = {}

    def stop(name: str, x: Tensor | RoutedInputs) -> None:
        if name not in done:
            main.switch(name, x)

    def run_of(index: int) -> greenlet:
        return paused.pop(index, None) or greenlet(partial(run_block, block, states.get(index), contexts[index]))

    hooked = {group[0]: linears[group[0]] for group in groups if group[0] in linears}
    with _hooks(hooked, lambda name: lambda _, args: stop(name, args[0])), _experts_forward(block, groups, stop):
        fp16 = _ReferenceRuns(block, reference, groups[-1], suspended)
        for group in groups:
            inputs = _Inputs(group, linears, parts, len(states), shifted=reference is not None)
            for index in range(len(states)):
                run = run_of(index)
                inputs.add(_input_of(group, run, run.switch()), index, fp16.next_input(group, index))
                if suspended is None or index < suspended:
                    paused[index] = run
                else:
                    run.throw()
            fp16.keep_weights(group)
            inputs.solve(solve, solve_experts)
            done.add(group[0])
        on_solved()
        outputs = enumerate(run_of(index).switch() for index in range(0 if last else len(states)))
        output = next(outputs, None)
        check()
        while output is not None:
            states.put(*output)
            output = next(outputs, None)
        for run in paused.values():
            run.throw()
        fp16.finish()


class _ReferenceRuns:
    """The fp16 model's batches inside the block, each suspended at the group of linears that is quantized next.

    Batches that do not stay suspended run again for every group, through the original weights of the groups before it.

    Args:
        block: with its original weights, at first.
        reference: None for none.
        last_group: of the block's groups of linears.
        suspended: how many batches stay suspended; None: all of them.
    """

    def __init__(self, block: nn.Module, reference: Reference | None, last_group: Group, suspended: int | None) -> None:
        self._block, self._reference, self._last_group = block, reference, last_group
        # After the last group the batches need not run on, if the block's outputs are not needed.
        self._outputs_needed = reference is not None and not reference.last
        self._originals: list[tuple[Tensor, Tensor]] = []
        count = len(reference.states) if reference is not None else 0
        self._runs = [self._run_of(index) for index in range(count if suspended is None else min(suspended, count))]
        self._rerun = range(len(self._runs), count)
        self._reached = [run.switch() for run in self._runs]

    def _run_of(self, index: int) -> greenlet:
        reference = self._reference
        assert reference is not None, "there are batches"  # noqa: S101
        return greenlet(partial(run_block, self._block, reference.states.get(index), reference.contexts[index]))

    def next_input(self, group: Group, index: int) -> Tensor | RoutedInputs | None:
        """Return the input of a group's linears for one batch, and run it through them: they are as they were."""
        if self._reference is None:
            return None
        if index in self._rerun:
            with self._original_weights():
                run = self._run_of(index)
                found = _input_of(group, run, run.switch())
                run.throw()
            return found
        found = _input_of(group, self._runs[index], self._reached[index])
        if self._outputs_needed or group != self._last_group:
            self._reached[index] = self._runs[index].switch()
        return found

    def keep_weights(self, group: Group) -> None:
        """Keep the weights of a group before it is quantized, if a batch runs through them again."""
        if not self._rerun or (group == self._last_group and not self._outputs_needed):
            return
        linears = linears_of(self._block)
        for name in group:
            weight = linears[name].weight if name in linears else self._block.get_parameter(name)
            self._originals.append((weight, weight.detach().clone()))

    @contextmanager
    def _original_weights(self) -> Iterator[None]:
        """Give the quantized linears their original weights in the body."""
        quantized = [weight.data for weight, _ in self._originals]
        for weight, original in self._originals:
            weight.data = original
        try:
            yield
        finally:
            for (weight, _), data in zip(self._originals, quantized, strict=True):
                weight.data = data

    def finish(self) -> None:
        """Replace the states by the block's outputs, if they are needed."""
        for index, run in enumerate(self._runs):
            if not self._outputs_needed:
                run.throw()
            elif self._reference is not None:
                self._reference.states.put(index, self._reached[index])
        if self._outputs_needed and self._reference is not None:
            with self._original_weights():
                for index in self._rerun:
                    self._reference.states.put(index, self._run_of(index).switch())
        self._originals.clear()


class _Inputs:
    """What a group is solved with: the Hessian of linears, or the inputs of experts."""

    def __init__(
        self,
        group: Group,
        linears: Mapping[str, nn.Linear],
        parts: Sequence[int] | None,
        num_batches: int,
        *,
        shifted: bool = False,
    ) -> None:
        self._group = group
        self._parts = parts or [part_of(batch, num_batches) for batch in range(num_batches)]
        first = linears.get(group[0])
        self._hessian = None if first is None else Hessian(first.in_features, first.weight.device)
        weights = [linears[name].weight for name in group if name in linears]
        self._shift = InputShift(weights) if weights and shifted else None
        self._routed: list[RoutedInputs] = []

    def add(self, inputs: Tensor | RoutedInputs, batch: int, reference: Tensor | RoutedInputs | None = None) -> None:
        if isinstance(inputs, RoutedInputs):
            self._routed.append(inputs)
        elif self._hessian is not None:
            self._hessian.add(inputs, self._parts[batch])
            if self._shift is not None and isinstance(reference, Tensor):
                self._shift.add(inputs, reference, self._parts[batch])

    def join(self) -> None:
        """Free the memory that only more inputs would need."""
        if self._hessian is not None:
            self._hessian.join()

    def solve(self, solve: SolveGroup, solve_experts: SolveExperts) -> None:
        if self._hessian is None:
            solve_experts(self._group[0], self._routed)
        else:
            solve(self._group, self._hessian, self._shift)


def _input_of(group: Group, run: greenlet, reached: Any) -> Tensor | RoutedInputs:
    """Return the input of a group's linears, which a batch's greenlet passed on when it stopped.

    A suspended greenlet passes on the linear's name and its input, a finished one the block's output.
    """
    if run.dead:
        raise _unreached(group)
    name, x = cast(tuple[str, Tensor | RoutedInputs], reached)
    if name != group[0]:
        raise QuantizeError("the block reached its linears in another order", why=f"{name} before {group[0]}")
    return x


def _unreached(group: Group) -> QuantizeError:
    return QuantizeError(
        f"a batch passed through the block without reaching {', '.join(group)}",
        why="the block's routing depends on the data: these linears cannot be calibrated on every batch",
    )


@torch.no_grad()
def sweep_parallel(
    block: nn.Module,
    groups: Sequence[Group],
    states: Activations,
    contexts: Sequence[Context],
    solve: SolveGroup,
    *,
    solve_experts: SolveExperts = _refuse_experts,
    parts: Sequence[int] | None = None,
    last: bool = False,
    on_solved: Action = _ignore,
    check: Action = _ignore,
) -> None:
    """Quantize all groups on the original block's activations (true_sequential False), in two forwards per batch.

    Arguments, effect and errors are those of `sweep_sequential`; `check` is called before any batch runs on.
    """
    linears = linears_of(block)
    inputs = {group[0]: _Inputs(group, linears, parts, len(states)) for group in groups}

    reached: set[str] = set()
    batch = 0

    def make(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name].add(args[0], batch)
            reached.add(name)

        return add

    def add_experts(name: str, routed: RoutedInputs) -> None:
        inputs[name].add(routed, batch)
        reached.add(name)

    hooked = {name: linears[name] for name in inputs if name in linears}
    with _hooks(hooked, make), _experts_forward(block, groups, add_experts):
        for batch in range(len(states)):  # the hooks read it
            reached.clear()
            run_block(block, states.get(batch), contexts[batch])
            for group in groups:
                if group[0] not in reached:
                    raise _unreached(group)
    for found in inputs.values():
        found.join()
    for group in groups:
        inputs.pop(group[0]).solve(solve, solve_experts)
    on_solved()
    check()
    if not last:
        run_forward(block, groups, states, contexts)


@torch.no_grad()
def run_forward(block: nn.Module, groups: Sequence[Group], states: Activations, contexts: Sequence[Context]) -> None:
    """Replace the states by the outputs of a block whose `groups` are quantized."""
    with _experts_forward(block, groups):
        for index in range(len(states)):
            states.put(index, run_block(block, states.get(index), contexts[index]))


def _experts_forward(
    block: nn.Module, groups: Sequence[Group], on_inputs: Callable[[str, RoutedInputs], None] | None = None
) -> AbstractContextManager[None]:
    """Run experts modules by our own forward if they are quantized; others keep the forward of transformers."""
    linears = linears_of(block)
    modules = {group[0].rpartition(".")[0] for group in groups if group[0] not in linears}
    if not modules:
        return nullcontext()
    return own_forward(block, on_inputs or (lambda *_: None), modules)
