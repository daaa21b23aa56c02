"""Stage 5, quantize: all variants in one sweep over the base model's blocks.

A block's weights are read once. Every variant has activations of its own, because its quantized blocks produce other
ones. Reading the next block, computing, and writing the last block overlap. A finished block is written at once: after
a crash, the next run reads finished blocks back, only runs them forward, and continues with the first unfinished one.
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from importlib import metadata
from threading import Event

import torch

from packager.inputs.rows import TokenRows
from packager.model.devices import device_name, gpu_memory_errors, limit_gpu_memory
from packager.quantize.device_shares import load_linear_algebra, share_variants
from packager.quantize.job import BlockDone, ModulesFused, QuantizeJob, Report
from packager.quantize.ranks import RankGroup, RankStopped, connect
from packager.quantize.shared_reader import SharedReader
from packager.quantize.worker import Worker
from packager.receipt import LinearRecord

_SMALLER_LIMIT = "run build again with a smaller --gpu-memory: finished blocks are kept, and the bytes are the same"


def fingerprint(
    variant_digest: str, base_model: str, rows: TokenRows, device: torch.device, *, engine_version: int | str
) -> dict[str, str]:
    """Return everything that determines the bytes of a variant's blocks on this kind of device, by name.

    Args:
        variant_digest: the plan's digest of what the recipe states about the variant.
        base_model: what identifies the base model.
        rows: calibration tokens.
        device: where to compute.
        engine_version: of the code.
    """
    parts = {
        "recipe": variant_digest,
        "base model": base_model,
        "calibration": rows.record.digest,
        "engine": str(engine_version),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": device_name(device),
    }
    return parts | {"threads": str(torch.get_num_threads())} if device.type == "cpu" else parts


def quantize(job: QuantizeJob, report: Report) -> dict[str, tuple[LinearRecord, ...]]:
    """Quantize every variant block by block into its store; blocks that are finished there are only run forward.

    Args:
        job: the variants, their stores, and the devices.
        report: called with each device's share, then with progress, from one thread per device.

    Returns:
        For each branch, one record per linear in model order.

    Raises:
        QuantizeError: NaN or Inf, or a factorisation beyond the limit; names block and linear.
        MachineError: the memory does not suffice.
    """
    records = _finished(job, report)
    left = {variant: store for variant, store in job.stores.items() if variant.branch not in records}
    if left:
        with gpu_memory_errors(_SMALLER_LIMIT), limit_gpu_memory(job.devices, job.device_limit):
            records |= _quantize(replace(job, stores=left), report)
    return {variant.branch: tuple(records[variant.branch]) for variant in job.stores}


def _finished(job: QuantizeJob, report: Report) -> dict[str, Sequence[LinearRecord]]:
    """Return the records of the variants that an earlier run finished: nothing needs to be run for them."""
    num_blocks = job.source.architecture.num_blocks
    found: dict[str, Sequence[LinearRecord]] = {}
    for variant, store in job.stores.items():
        if all(store.read(block) is not None for block in range(num_blocks)):
            blocks = [store.records(block) or () for block in range(num_blocks)]
            found[variant.branch] = [record for block in blocks for record in block]
            for block, records in enumerate(blocks):
                loss = sum(record.loss for record in records)
                report(
                    BlockDone(
                        branch=variant.branch, block=block, num_blocks=num_blocks, loss=loss, seconds=0.0, resumed=True
                    )
                )  # fmt: skip
    return found


def _quantize(job: QuantizeJob, report: Report) -> dict[str, Sequence[LinearRecord]]:
    """Start one worker per device, and stop all of them when one fails."""
    shares = share_variants(job)
    readers = SharedReader(job.source.read, [len(share.sweeps) for share in shares for _ in share.devices])
    stop = Event()
    workers: list[Worker] = []
    for share in shares:
        for device in share.devices:
            load_linear_algebra(device)
        connect(share.devices)
        report(share)
        ranks = RankGroup(share.devices).ranks()
        workers += [Worker(job, share, rank, readers.for_thread(), report, stop) for rank in ranks]
    for worker in workers:
        if worker.device.type == "cuda":
            report(ModulesFused(device=worker.device, modules=worker.fused))
    with ThreadPoolExecutor(len(workers), thread_name_prefix="quantize") as pool:
        runs = [pool.submit(worker.run) for worker in workers]
        try:
            wait(runs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    _raise_first(runs)
    return {branch: found for worker in workers for branch, found in worker.records.items()}


def _raise_first(runs: Sequence[Future[None]]) -> None:
    """Raise the error of a worker: not that of one which ended because another one had failed."""
    errors = [error for error in (run.exception() for run in runs) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, RankStopped)):
        raise error
