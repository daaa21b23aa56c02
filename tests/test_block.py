"""One block: unchecked on a GPU, checked when that failed; an error names linears and leaves the states alone."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from packager.errors import QuantizeError
from packager.model.contexts import Context
from packager.model.decoder import Decoder
from packager.model.traced_forward import Group
from packager.quantize import block as block_module
from packager.quantize.activations import Activations
from packager.quantize.block import BlockJob, QuantizedBlock, quantize_block
from packager.quantize.ranks import alone
from packager.quantize.suspended_forward import linears_of
from packager.receipt import LinearRecord
from packager.variant import Variant
from tests.sources import open_folder
from tests.tiny_models import save_model, token_rows, variant

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
# Fewer tokens than columns, so that H is singular, and a damping that float32 does not even see beside it.
FEW = token_rows(6, 3).ids
SINGULAR = {"damp_percent": 1e-9, "damp_percent_limit": 0.1}
WAYS = pytest.mark.parametrize(
    ("true_sequential", "suspended"), [(True, 3), (True, 1), (True, 0), (False, 0)],
    ids=["all wait", "one waits", "none waits", "parallel"],
)  # fmt: skip


@dataclass
class BlockCase:
    """The second block of a tiny model, which may be quantized several times."""

    folder: Path
    ids: Tensor = field(default_factory=lambda: FEW)
    change: Callable[[dict[str, Tensor]], None] = lambda _: None

    def __post_init__(self) -> None:
        source = open_folder(save_model(self.folder / "model", "qwen2"))
        self.decoder = Decoder(source.folder, source.read, device=CPU, dtype=torch.float32)
        batches = self.decoder.embed(self.ids, rows=self.ids.shape[0] // 3)
        self.inputs = [batch.hidden for batch in batches]
        self.contexts: Sequence[Context] = [batch.contexts[1] for batch in batches]
        self.weights = list(self.decoder.stream())[1]
        self.change(self.weights)
        self.loads = 0
        self.groups: tuple[Group, ...] = self.decoder.groups(1)
        self.names = {linear.module: linear.name for linear in source.architecture.linears if linear.block == 1}
        self.states = Activations(self.inputs, "host")
        self.reported: list[tuple[LinearRecord, ...]] = []
        self.left = 0

    def load(self) -> nn.Module:
        self.loads += 1
        return self.decoder.load_block(1, self.weights)

    def quantize(self, v: Variant, *, suspended: int = 3, last: bool = False) -> QuantizedBlock:
        self.states, self.reported, self.loads, self.left = Activations(self.inputs, "host"), [], 0, 0

        def on_outputs_needed() -> None:
            assert self.outputs_are(self.inputs)
            self.left += 1

        job = BlockJob(
            variant=v, index=1, groups=self.groups, names=self.names, experts={}, states=self.states,
            contexts=self.contexts, rank=alone(CPU), suspended=suspended, last=last,
            on_outputs_needed=on_outputs_needed,
        )  # fmt: skip
        return quantize_block(self.load, job, self.reported.append)

    def outputs(self) -> list[Tensor]:
        return [self.states.get(index) for index in range(3)]

    def outputs_are(self, expected: Sequence[Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(self.outputs(), expected, strict=True))


def records_of(made: QuantizedBlock) -> tuple[LinearRecord, ...]:
    return tuple(record for group in made.records.values() for record in group)


def suspended_batches() -> int:
    """Return how many batches are suspended inside a block; those of threads that died in other tests stay."""
    gc.collect()
    return sum(type(found) is greenlet and bool(found) and found is not getcurrent() for found in gc.get_objects())


@pytest.fixture
def attempts_checked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Run the first attempt at each block unchecked, as on a GPU; return whether each attempt was checked."""
    attempts: list[bool] = []

    class Attempt(block_module._BlockSolver):
        def __init__(self, block: nn.Module, job: BlockJob, solved: Any, *, checked: bool) -> None:
            attempts.append(bool(attempts) and checked)
            super().__init__(block, job, solved, checked=attempts[-1])

    monkeypatch.setattr(block_module, "_BlockSolver", Attempt)
    return attempts


@WAYS
def test_a_block_that_failed_is_quantized_again_with_checks(tmp_path, attempts_checked, true_sequential, suspended):
    case = BlockCase(tmp_path)
    v = variant(true_sequential=true_sequential, group_size=16, **SINGULAR)
    made = case.quantize(v, suspended=suspended)
    assert (attempts_checked, case.loads, case.left) == ([False, True], 2, 1)
    assert all(v.damp_percent < record.damp_percent <= v.damp_percent_limit for record in records_of(made))
    # Nothing of the first attempt was reported, and what was is what is returned.
    assert tuple(record for group in case.reported for record in group) == records_of(made)
    assert [len(group) for group in case.reported] == [3, 1, 2, 1]
    outputs = case.outputs()
    attempts_checked.append(True)  # checked from the start
    again = case.quantize(v, suspended=suspended)
    assert (attempts_checked[3:], case.loads) == ([True], 1)
    assert records_of(again) == records_of(made)
    assert again.tensors.keys() == made.tensors.keys()
    assert all(torch.equal(again.tensors[name], made.tensors[name]) for name in made.tensors)
    assert case.outputs_are(outputs)
    assert not case.outputs_are(case.inputs)


@WAYS
def test_unchecked_and_checked_attempts_make_the_same_bytes(tmp_path, attempts_checked, true_sequential, suspended):
    case = BlockCase(tmp_path, ids=token_rows(9, 32).ids)
    v = variant(true_sequential=true_sequential, group_size=16)
    made, outputs = case.quantize(v, suspended=suspended), case.outputs()
    assert [record.damp_percent for record in records_of(made)] == [0.01] * 7
    again = case.quantize(v, suspended=suspended)
    assert attempts_checked == [False, True]
    assert records_of(again) == records_of(made)
    assert all(torch.equal(again.tensors[name], made.tensors[name]) for name in made.tensors)
    assert case.outputs_are(outputs)


def test_linears_that_saw_enough_tokens_are_refined(tmp_path: Path) -> None:
    """The block's linears have 64 or 96 columns, and a linear needs two tokens for each: 180 are too few for 96."""
    case = BlockCase(tmp_path, ids=token_rows(6, 30).ids)
    widths = {case.names[name]: linear.in_features for name, linear in linears_of(case.load()).items()}
    plain, refined = (case.quantize(variant(refine=refine)) for refine in (False, True))
    assert all(record.unrefined_loss is None for record in records_of(plain))
    assert {"unrefined_loss"} == {*records_of(refined)[0].model_dump()} - {*records_of(plain)[0].model_dump()}
    assert len(set(widths.values())) > 1
    for record in records_of(refined):
        if widths[record.name] * 2 <= case.ids.numel():
            assert record.unrefined_loss is not None
            assert record.loss < record.unrefined_loss
        else:
            assert record.unrefined_loss is None
    # The first linears see the same inputs in both.
    first, before = records_of(refined)[0], records_of(plain)[0]
    assert first.name == before.name
    assert first.unrefined_loss == before.loss
    name = first.name
    assert not torch.equal(refined.tensors[f"{name}.qweight"], plain.tensors[f"{name}.qweight"])
    assert torch.equal(refined.tensors[f"{name}.qzeros"], plain.tensors[f"{name}.qzeros"])


@pytest.mark.parametrize("checked", [False, True])
@WAYS
def test_a_hessian_beyond_the_limit_names_its_linears(tmp_path, attempts_checked, true_sequential, suspended, checked):
    case = BlockCase(tmp_path)
    attempts_checked += [True] * checked
    v = variant(branch="mine", true_sequential=true_sequential, damp_percent=1e-9, damp_percent_limit=2e-9)
    with pytest.raises(QuantizeError, match="cannot be factored") as caught:
        case.quantize(v, suspended=suspended)
    names = ", ".join(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert caught.value.where == f"mine, {names}"
    assert case.outputs_are(case.inputs)
    assert (case.reported, case.left) == ([], 0)


@WAYS
def test_a_scale_beyond_float16_names_its_linear(tmp_path, attempts_checked, true_sequential, suspended):
    def enlarge(weights: dict[str, Tensor]) -> None:
        weights["self_attn.o_proj.weight"] *= 1e8

    case = BlockCase(tmp_path, ids=token_rows(9, 32).ids, change=enlarge)
    with pytest.raises(QuantizeError, match="a scale does not fit float16") as caught:
        case.quantize(variant(true_sequential=true_sequential), suspended=suspended)
    assert caught.value.where == "main, model.layers.1.self_attn.o_proj"
    assert attempts_checked == [False, True]
    assert case.outputs_are(case.inputs)
    assert [len(group) for group in case.reported] == [3]


@WAYS
def test_activations_that_overflow_name_the_linear_they_reach(tmp_path, attempts_checked, true_sequential, suspended):
    def overflow(weights: dict[str, Tensor]) -> None:
        weights["mlp.up_proj.weight"][:] = 1e38

    case = BlockCase(tmp_path, ids=token_rows(9, 32).ids, change=overflow)
    with pytest.raises(QuantizeError, match=r"NaN or Inf|a scale does not fit") as caught:
        case.quantize(variant(true_sequential=true_sequential), suspended=suspended)
    assert "model.layers.1.mlp." in caught.value.where
    assert case.outputs_are(case.inputs)


def test_an_error_before_the_first_linear_names_the_block(tmp_path, monkeypatch):
    case = BlockCase(tmp_path)

    def fail(*_args: object, **_rest: object) -> None:
        raise QuantizeError("the block reached its linears in another order")

    monkeypatch.setattr(block_module, "sweep_sequential", fail)
    with pytest.raises(QuantizeError) as caught:
        case.quantize(variant())
    assert caught.value.where == "main, block 1"


@WAYS
def test_the_last_block_s_outputs_are_not_computed(tmp_path, true_sequential, suspended):
    case, before = BlockCase(tmp_path, ids=token_rows(9, 32).ids), suspended_batches()
    made = case.quantize(variant(true_sequential=true_sequential), suspended=suspended, last=True)
    assert len(records_of(made)) == 7
    assert case.outputs_are(case.inputs)
    assert suspended_batches() <= before


def test_the_first_attempt_holds_nothing_while_the_second_runs(tmp_path, monkeypatch, attempts_checked):
    """Suspended batches hold their activations: there is no memory for those of two attempts."""
    case, waiting, load, before = BlockCase(tmp_path), [], BlockCase.load, suspended_batches()

    def counted() -> nn.Module:
        waiting.append(suspended_batches() - before)
        return load(case)

    monkeypatch.setattr(case, "load", counted)
    case.quantize(variant(**SINGULAR))
    assert attempts_checked == [False, True]
    assert len(waiting) == 2
    assert max(waiting) <= 0
