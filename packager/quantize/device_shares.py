"""Which thread makes which variants on which device, so that memory suffices and devices are busy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from packager.quantize.memory import USABLE, SweepPlan, Workload, choose_sweep
from packager.variant import Variant

if TYPE_CHECKING:
    from packager.quantize.sweep import QuantizeJob


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

    Raises:
        MachineError: it does not fit.
    """
    variants = list(job.stores)
    shares = [variants[number :: len(job.devices)] for number in range(len(job.devices))]
    return [
        Lane(device=device, variants=tuple(share), plan=sweep_plan(job, share, device))
        for device, share in zip(job.devices, shares, strict=True)
        if share
    ]


def sweep_plan(job: "QuantizeJob", variants: Sequence[Variant], device: torch.device) -> SweepPlan:
    """Choose how many variants ride one sweep on a device, and where their activations live.

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
    host_limit = job.host_limit // len(job.devices)
    return choose_sweep(work, "cuda", device_limit=int(limit * USABLE), host_limit=host_limit)


def prepare(device: torch.device, limit: int | None) -> None:
    """Make a GPU ready for a thread; to be called by one thread for all devices.

    Args:
        device: a CPU needs nothing.
        limit: bytes that torch may use of it; None for all.
    """
    if device.type != "cuda":
        return
    # torch loads its linear algebra when it is first used, and fails when two threads are first at the same time.
    torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float32, device=device))
    if limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
