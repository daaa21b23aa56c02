"""Which thread makes which variants on which device, so that memory suffices and devices are busy."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from packager.errors import MachineError
from packager.memory import USABLE, SweepPlan, Workload, choose_sweep
from packager.variant import Variant

if TYPE_CHECKING:
    from packager.quantize import QuantizeJob


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Variants that one thread makes on one device, in one sweep or, where memory is short, in several.

    Attributes:
        device: where.
        variants: which.
        plan: how.
    """

    device: torch.device
    variants: tuple[Variant, ...]
    plan: SweepPlan


def lanes_of(job: "QuantizeJob") -> list[Lane]:
    """Spread the variants over the devices.

    A GPU with enough memory gets two lanes: while one is at a Cholesky or at columns, which leave most of the GPU idle,
    the other keeps it busy with products.

    Raises:
        MachineError: it does not fit.
    """
    variants = list(job.stores)
    lanes: list[Lane] = []
    for number, device in enumerate(job.devices):
        share = variants[number :: len(job.devices)]
        halves = [half for half in (share[::2], share[1::2]) if half]
        pair = [_comfortable(job, half, device) for half in halves] if device.type == "cuda" else []
        if len(pair) > 1 and all(pair):
            lanes += [lane for lane in pair if lane is not None]
        elif share:
            lanes.append(Lane(device=device, variants=tuple(share), plan=sweep_plan(job, share, device)))
    return lanes


def _comfortable(job: "QuantizeJob", variants: Sequence[Variant], device: torch.device) -> Lane | None:
    """Return a lane in half a device's memory, or None if that would need a compromise."""
    with suppress(MachineError):
        plan = sweep_plan(job, variants, device, part=2)
        all_wait = plan.suspended_batches in (0, plan.num_batches)
        if plan.placement == "device" and plan.num_variants == len(variants) and all_wait:
            return Lane(device=device, variants=tuple(variants), plan=plan)
    return None


def sweep_plan(job: "QuantizeJob", variants: Sequence[Variant], device: torch.device, *, part: int = 1) -> SweepPlan:
    """Choose how many variants ride one sweep on a device, or a `part`-th of it, and where their activations live.

    Raises:
        MachineError: it does not fit.
    """
    work = Workload(
        architecture=job.source.architecture,
        num_samples=job.rows.ids.shape[0],
        seq_len=job.rows.ids.shape[1],
        num_variants=len(variants),
        true_sequential=any(variant.true_sequential for variant in variants),
    )
    if device.type == "cpu":
        return choose_sweep(work, "cpu", device_limit=None, host_limit=None)
    limit = job.device_limit or torch.cuda.mem_get_info(device)[0]
    host_limit = job.host_limit // len(job.devices) // part
    return choose_sweep(work, "cuda", device_limit=int(limit * USABLE) // part, host_limit=host_limit)


def limit_memory(device: torch.device, limit: int) -> None:
    """Let torch use no more of a GPU than `limit` bytes."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
