"""What the terminal shows while variants are quantized, and the seconds that a receipt keeps."""

import io

import pytest
import torch
from rich.console import Console

from packager.model.fused_blocks import FusedModules
from packager.pipeline.quantize_progress import QuantizeView, share_line
from packager.quantize.job import BlockDone, DeviceShare, LinearsDone, ModulesFused
from packager.quantize.memory import Placement, SweepPlan
from packager.receipt import LinearRecord
from packager.system.terminal import Terminal
from tests.tiny_models import variant

NAMES = ("main", "gptq-4bit-32g-actorder_True")


@pytest.fixture
def terminal() -> Terminal:
    terminal = Terminal()
    terminal.err = Console(file=io.StringIO(), width=300)
    return terminal


def shown(terminal: Terminal) -> str:
    assert isinstance(terminal.err.file, io.StringIO)
    return terminal.err.file.getvalue()


def block_done(branch: str, block: int, seconds: float, *, resumed: bool = False) -> BlockDone:
    return BlockDone(branch=branch, block=block, num_blocks=2, loss=0.0123456, seconds=seconds, resumed=resumed)


def test_the_seconds_of_a_variant_are_those_of_its_blocks(terminal: Terminal) -> None:
    with terminal.bar(4) as bar:
        view = QuantizeView(terminal, bar, NAMES)
        for event in (
            block_done(NAMES[0], 0, 1.5),
            block_done(NAMES[1], 0, 100.0),
            block_done(NAMES[0], 1, 2.25),
            block_done(NAMES[1], 1, 0.0, resumed=True),
        ):
            view.report(event)
    assert view.seconds == {NAMES[0]: 3.75, NAMES[1]: 100.0}
    lines = shown(terminal).splitlines()
    assert "main block 1/2 loss 0.01235 1.5 s" in lines[0]
    assert "main block 2/2 loss 0.01235 2.2 s" in lines[2]
    assert f"{NAMES[1]} block 2/2 resumed 0.0 s" in lines[3]


def test_the_time_that_is_left_follows_from_whole_blocks(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start, which compiles kernels, and blocks that were there already say nothing about the blocks to come."""
    now = iter([60.0, 60.5, 62.5, 64.5, 68.5])
    monkeypatch.setattr("packager.system.terminal.time.monotonic", lambda: next(now))
    blocks = [block_done(NAMES[0], block, 1.0, resumed=block < 2) for block in range(5)]
    steps: list[float | None] = []
    terminal.observe = lambda step: steps.append(step.seconds_left)
    with terminal.bar(10) as bar:
        view = QuantizeView(terminal, bar, NAMES)
        for event in blocks:
            view.report(event)
    assert steps == [None, None, 2.0 * 7, 2.0 * 6, (8.0 / 3) * 5]
    assert [", " in line.partition(" 1.0 s")[2] for line in shown(terminal).splitlines()] == [False, False, *[True] * 3]


@pytest.mark.parametrize(
    ("placement", "suspended", "sweeps", "parts"),
    [
        ("device", 16, 1, "activations on cpu, about 1.50 GB of cpu"),
        ("host", 0, 2, "2 sweeps, activations in pinned host memory, about 1.50 GB of cpu"),
        (
            "disk", 10, 2,
            "2 sweeps, activations on disk, about 1.50 GB of cpu, "
            "6 of 16 batches run again for each group of linears",
        ),
    ],
)  # fmt: skip
def test_how_a_device_quantizes_its_share(
    terminal: Terminal, placement: Placement, suspended: int, sweeps: int, parts: str
) -> None:
    variants = tuple(variant(branch=name) for name in NAMES)
    plan = SweepPlan(
        num_variants=2 // sweeps, placement=placement, num_batches=16, suspended_batches=suspended,
        device_bytes=1_500_000_000, host_bytes=0,
    )  # fmt: skip
    with terminal.bar(4) as bar:
        view = QuantizeView(terminal, bar, NAMES)
        view.report(DeviceShare(devices=(torch.device("cpu"),), variants=variants, plan=plan))
    assert shown(terminal) == f"  {NAMES[0]}, {NAMES[1]}: {parts}\n"


def test_weights_that_wait_on_the_host_are_mentioned(terminal: Terminal) -> None:
    plan = SweepPlan(
        num_variants=2, placement="device", num_batches=16, suspended_batches=16, weights="host",
        device_bytes=1_500_000_000, host_bytes=0,
    )  # fmt: skip
    variants = tuple(variant(branch=name) for name in NAMES)
    line = share_line(DeviceShare(devices=(torch.device("cpu"),), variants=variants, plan=plan))
    assert line.endswith(": activations on cpu, about 1.50 GB of cpu, weights wait in host memory")


def test_devices_that_share_the_rows_are_named() -> None:
    plan = SweepPlan(
        num_variants=1, placement="device", num_batches=8, suspended_batches=8, device_bytes=1_500_000_000, host_bytes=0
    )
    devices = tuple(torch.device("cuda", number) for number in range(3))
    line = share_line(DeviceShare(devices=devices, variants=(variant(branch="a"),), plan=plan))
    assert line == "  a: rows shared, activations on cuda, about 1.50 GB of each of cuda:0, cuda:1, cuda:2"


def test_what_runs_fused_kernels_is_kept_and_what_does_not_is_named(terminal: Terminal) -> None:
    modules = FusedModules(fused=("a", "b"), candidates=("a", "b", "c", "d", "e", "f"), triton_installed=True)
    with terminal.bar(1) as bar:
        view = QuantizeView(terminal, bar, NAMES)
        view.report(ModulesFused(device=torch.device("cuda:1"), modules=modules))
    assert view.fused is modules
    assert shown(terminal).startswith("  cuda:1: ")
    assert shown(terminal).endswith("; transformers' own code: c, d, e and 1 more\n")


def test_the_losses_of_linears_are_shown_by_their_last_name(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    with terminal.bar(1) as bar:
        monkeypatch.setattr(type(bar), "note", lambda _, text: notes.append(text))
        linears = tuple(
            LinearRecord(name=f"model.layers.0.self_attn.{name}", loss=loss, damp_percent=0.01)
            for name, loss in (("q_proj", 0.00123456), ("k_proj", 0.5))
        )
        QuantizeView(terminal, bar, NAMES).report(LinearsDone(branch="main", block=0, linears=linears))
    assert notes == ["main block 1: q_proj 0.00123, k_proj 0.5"]
