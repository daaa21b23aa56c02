"""Batches that are suspended at linears: what a block with data-dependent routing does to them."""

import pytest
import torch
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.contexts import Context
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.suspended_forward import sweep_parallel, sweep_sequential

GROUPS: tuple[Group, ...] = (("first",), ("second",))
POSITIVE, NEGATIVE = torch.ones(2, 4, 8), -torch.ones(2, 4, 8)


class Routed(nn.Module):
    """A block whose second linear is used only by batches of positive inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.first(hidden)
        return out + self.second(out) if bool(hidden.sum() > 0) else out


def sweep(block: nn.Module, batches: list[Tensor], *, suspended: int | None) -> list[Group]:
    solved: list[Group] = []

    def solve(group: Group, *_: object) -> None:
        solved.append(group)

    states = Activations(batches, "device")
    sweep_sequential(block, GROUPS, states, [Context(kwargs={})] * len(batches), solve, suspended=suspended)
    return solved


@pytest.mark.parametrize("suspended", [None, 1, 0])
def test_a_batch_that_skips_a_linear_is_an_error_that_names_it(suspended):
    with pytest.raises(QuantizeError, match="a batch passed through the block without reaching second") as caught:
        sweep(Routed(), [POSITIVE, NEGATIVE], suspended=suspended)
    assert "routing depends on the data" in caught.value.why
    assert sweep(Routed(), [POSITIVE, 2 * POSITIVE], suspended=suspended) == [("first",), ("second",)]


def test_a_skipped_linear_is_an_error_in_parallel_calibration_too():
    batches, block = [POSITIVE, NEGATIVE], Routed()
    states = Activations(batches, "device")
    with pytest.raises(QuantizeError, match="without reaching second"):
        sweep_parallel(block, GROUPS, states, [Context(kwargs={})] * 2, lambda *_: None)


def test_a_linear_that_the_first_batch_skips_is_an_error_that_names_it():
    with pytest.raises(QuantizeError, match="a batch passed through the block without reaching second"):
        sweep(Routed(), [NEGATIVE, POSITIVE], suspended=None)


@pytest.mark.parametrize("suspended", [None, 1, 0])
@pytest.mark.parametrize("last", [False, True])
def test_one_batch_has_gone_on_before_the_check_and_no_state_is_replaced(suspended: int | None, last: bool) -> None:
    block, batches, events = Routed(), [POSITIVE, 2 * POSITIVE, 3 * POSITIVE], []
    states = Activations(batches, "device")
    block.register_forward_hook(lambda *_: events.append("output"))

    def check() -> None:
        assert all(torch.equal(states.get(index), batch) for index, batch in enumerate(batches))
        events.append("check")

    sweep_sequential(
        block, GROUPS, states, [Context(kwargs={})] * 3, lambda *_: None, suspended=suspended, last=last,
        on_solved=lambda: events.append("solved"), check=check,
    )  # fmt: skip
    assert events == (["solved", "check"] if last else ["solved", "output", "check", "output", "output"])
    for index, batch in enumerate(batches):
        assert torch.equal(states.get(index), batch if last else block(batch))


def test_a_check_that_raises_leaves_the_states_as_they_were() -> None:
    def check() -> None:
        raise QuantizeError("not positive definite")

    batches = [POSITIVE, 2 * POSITIVE]
    states = Activations(batches, "device")
    with pytest.raises(QuantizeError, match="not positive definite"):
        sweep_sequential(Routed(), GROUPS, states, [Context(kwargs={})] * 2, lambda *_: None, check=check)
    assert all(states.get(index) is batch for index, batch in enumerate(batches))
