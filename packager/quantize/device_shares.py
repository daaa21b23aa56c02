"""Share the variants, and where they are few the rows, among the devices; plan the sweeps."""

from collections.abc import Sequence

import torch

from packager.model.batches import rows_per_batch
from packager.quantize.gptq.row_parts import num_parts
from packager.quantize.job import DeviceShare, QuantizeJob
from packager.quantize.memory import HOST_LIMIT_BYTES, USABLE, SweepPlan, choose_sweep
from packager.quantize.workload import Workload
from packager.system.host_memory import available_bytes
from packager.variant import Variant


def share_variants(job: QuantizeJob) -> list[DeviceShare]:
    """Distribute the variants over the devices, in turn; with fewer variants than devices, several share the rows.

    Tuning a block takes one step after the other, each on one batch: a share with a tuned variant has one device.

    Raises:
        MachineError: a share does not fit into memory.
    """
    variants, count = list(job.stores), min(len(job.stores), len(job.devices))
    batches = -(-job.rows.ids.shape[0] // rows_per_batch(job.rows.ids.shape[1], job.devices[0].type))
    shares = []
    for number in range(count):
        share, devices = variants[number::count], job.devices[number::count][: num_parts(batches)]
        if any(variant.effort == "high" for variant in share):
            devices = devices[:1]
        plan = sweep_plan(job, share, devices)
        shares.append(DeviceShare(devices=devices, variants=tuple(share), plan=plan))
    return shares


def sweep_plan(job: QuantizeJob, variants: Sequence[Variant], devices: Sequence[torch.device]) -> SweepPlan:
    """Choose how many variants share one sweep on devices that share the rows, and where activations are stored.

    Raises:
        MachineError: it does not fit into memory.
    """
    num_samples, seq_len = job.rows.ids.shape
    work = Workload.of(job.source.architecture, num_samples, seq_len, variants, ranks=len(devices))
    if devices[0].type == "cpu":
        return choose_sweep(work, "cpu", device_limit=None, host_limit=None)
    limit = job.device_limit or min(torch.cuda.mem_get_info(device)[0] for device in devices)
    host_limit = host_limit_bytes() if job.host_limit is None else job.host_limit
    return choose_sweep(work, "cuda", device_limit=int(limit * USABLE), host_limit=host_limit // len(job.devices))


def host_limit_bytes() -> int:
    """Return the host memory that a build may use beside GPUs; a fifth of what is available is left to others."""
    available = available_bytes()
    return HOST_LIMIT_BYTES if available is None else available * 4 // 5


def load_linear_algebra(device: torch.device) -> None:
    """Have torch load its linear algebra for a GPU; call it from one thread, before the workers start.

    torch loads it at the first use, and fails when two threads are first at the same time.
    """
    if device.type == "cuda":
        torch.linalg.cholesky_ex(torch.eye(2, dtype=torch.float32, device=device))
