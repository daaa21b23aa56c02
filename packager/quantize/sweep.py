"""Stage 5, quantize: all variants in one sweep over the base model's blocks.

A block's weights are read once; every variant has its own activations, because each sees what its own quantized blocks
make. Reading the next block, computing and writing the last go on side by side. A finished block is written at once: a
killed run picks up after the last finished block, whose weights it reads back and only runs forward.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from itertools import product
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from packager.errors import MachineError
from packager.inputs.base_model import SourceModel
from packager.inputs.texts import TokenRows
from packager.model.decoder import Context, Decoder
from packager.quantize.activations import Activations
from packager.quantize.block import Passage, quantize_block, restore_block, rules_of
from packager.quantize.block_store import BlockStore
from packager.quantize.device_shares import Lane, lanes_of, prepare
from packager.quantize.host_copies import HostCopies
from packager.quantize.memory import HOST_LIMIT_BYTES, SweepPlan, rows_per_batch
from packager.quantize.shared_reader import SharedReader
from packager.quantize.suspended_forward import Group, linear_groups, run_forward
from packager.receipt import LinearRecord
from packager.variant import Variant

if TYPE_CHECKING:
    from packager.quantize.gptq.compile_kernels import Walk


@dataclass(frozen=True, kw_only=True)
class LinearsDone:
    """What progress reports when linears that see the same input have been quantized."""

    branch: str
    block: int
    linears: tuple[LinearRecord, ...]


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """What progress reports after each block of each variant."""

    branch: str
    block: int
    num_blocks: int
    loss: float
    seconds: float
    resumed: bool


Report = Callable[[Lane | BlockDone | LinearsDone], None]


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """Everything that determines the sweep.

    Attributes:
        source: the base model.
        rows: calibration tokens.
        stores: the variants to make, each with the open store of its blocks.
        devices: where to compute; several share the variants.
        device_limit: bytes of each device that may be used; None for what is free on it.
        host_limit: bytes of host memory beside GPUs, for all of them together.
    """

    source: SourceModel
    rows: TokenRows
    stores: Mapping[Variant, BlockStore]
    devices: tuple[torch.device, ...]
    device_limit: int | None = None
    host_limit: int = HOST_LIMIT_BYTES


def fingerprint(
    variant_digest: str, source: SourceModel, rows: TokenRows, device: torch.device, *, engine_version: int
) -> dict[str, str]:
    """Return everything that determines a variant's blocks, on this kind of device, by the names a person reads.

    Args:
        variant_digest: the plan's, of what the recipe says.
        source: the base model.
        rows: calibration tokens.
        device: where to compute.
        engine_version: of the code.
    """
    parts = {
        "recipe": variant_digest,
        "base model": source.record.digest,
        "calibration": rows.record.digest,
        "engine": str(engine_version),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": device_name(device),
    }
    return parts | {"threads": str(torch.get_num_threads())} if device.type == "cpu" else parts


def device_name(device: torch.device) -> str:
    """Return what a receipt calls the device: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def compute_dtype(source: SourceModel, device: torch.device) -> torch.dtype:
    """Return the dtype of activations: the base model's on a GPU, float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if "BF16" in source.record.dtype else torch.float16


def quantize(job: QuantizeJob, report: Report) -> dict[str, tuple[LinearRecord, ...]]:
    """Quantize every variant block by block into its store; blocks that are finished there are only run forward.

    Args:
        job: what and where.
        report: told how it will go about it, then called from the thread of each lane.

    Returns:
        For each branch, one record per linear in model order.

    Raises:
        QuantizeError: NaN or Inf, or a factorisation beyond the limit; names block and linear.
        MachineError: it does not fit into memory.
    """
    records = _finished(job, report)
    left = {variant: store for variant, store in job.stores.items() if variant.branch not in records}
    if left:
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
    lanes = lanes_of(job)
    read = SharedReader(job.source.read, len(lanes))
    stop = Event()
    for lane in lanes:
        prepare(lane.device, job.device_limit)
        report(lane)
    workers = [_Worker(job, lane, read, report, stop) for lane in lanes]
    with ThreadPoolExecutor(len(workers), thread_name_prefix="quantize") as pool:
        runs = [pool.submit(worker.run) for worker in workers]
        try:
            wait(runs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    _raise_first(runs)
    return {branch: found for worker in workers for branch, found in worker.records.items()}


def _raise_first(runs: Sequence[Future[None]]) -> None:
    """Raise what stopped a thread, if anything did."""
    try:
        for run in runs:
            run.result()
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory is exhausted",
            why=str(error).partition(".")[0],
            hint="run build again with a smaller --gpu-memory: finished blocks are kept, and the bytes are the same",
        ) from error


class _Worker:
    """The thread of a lane.

    Attributes:
        records: for each branch, one record per linear in model order.
    """

    def __init__(self, job: QuantizeJob, lane: Lane, read: SharedReader, report: Report, stop: Event) -> None:
        self._job, self._lane, self._report, self._stop = job, lane, report, stop
        dtype = compute_dtype(job.source, lane.device)
        self._decoder = Decoder(job.source.folder, read, device=lane.device, dtype=dtype)
        self.records: dict[str, list[LinearRecord]] = {variant.branch: [] for variant in lane.variants}

    @torch.no_grad()
    def run(self) -> None:
        """Quantize every variant."""
        device, variants, step = self._lane.device, self._lane.variants, self._lane.plan.num_variants
        with (
            ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool,
            torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
        ):
            # A damaged head is found and kernels are compiled while the first weights are read.
            self._prepared = [pool.submit(self._decoder.check_head), pool.submit(self._compile)]
            for first in range(0, len(variants), step):
                self._sweep(variants[first : first + step])

    def _compile(self) -> None:
        if self._lane.device.type == "cuda":
            from packager.quantize.gptq.compile_kernels import compile_kernels

            compile_kernels(self._walks(), self._lane.device, self._decoder.dtype)

    def _walks(self) -> "Iterator[Walk]":
        from packager.quantize.gptq.compile_kernels import Walk

        shapes = self._job.source.architecture.group_shapes
        for variant, (in_features, out_features) in product(self._lane.variants, shapes):
            yield Walk(
                in_features=in_features,
                out_features=out_features,
                rules=rules_of(variant),
                group_size=variant.group_size,
                static_groups=variant.static_groups,
            )

    def _sweep(self, variants: Sequence[Variant]) -> None:
        job, plan, decoder = self._job, self._lane.plan, self._decoder
        blocks = decoder.stream()
        batches = decoder.embed(job.rows.ids, rows=rows_per_batch(job.rows.ids.shape[1], decoder.device.type))
        decoder.drop_outside_blocks()
        contexts = [batch.contexts for batch in batches]
        folder = job.stores[variants[0]].checkpoint.parent
        hidden = [batch.hidden for batch in batches]
        del batches
        rides = [
            _Ride(variant, job.stores[variant], Activations(hidden, plan.placement, folder), self._report, plan)
            for variant in variants
        ]
        first = hidden[0]
        del hidden
        groups: tuple[Group, ...] = ()
        with ThreadPoolExecutor(len(rides), thread_name_prefix="write") as writers:
            for index, weights in enumerate(blocks):
                load = partial(decoder.load_block, index, weights)
                here = [batch[index] for batch in contexts]
                if not groups:
                    groups = linear_groups(load(), first, here[0])
                    del first
                for prepared in self._prepared:
                    prepared.result()
                place = _Place(index=index, num_blocks=len(decoder), groups=groups, contexts=here)
                for number, ride in enumerate(rides):
                    if self._stop.is_set():
                        return
                    following = rides[(number + 1) % len(rides)]
                    ride.run(load, place, writers, leaving=partial(following.expect, ride))
                decoder.drop_block(index)
            for ride in rides:
                self.records[ride.variant.branch] = ride.finish()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A block, as every variant finds it.

    Attributes:
        index: its number.
        num_blocks: how many there are.
        groups: from `linear_groups`.
        contexts: the block's arguments besides the hidden states, one per batch.
    """

    index: int
    num_blocks: int
    groups: Sequence[Group]
    contexts: Sequence[Context]

    @property
    def last(self) -> bool:
        """Whether no block comes after it."""
        return self.index + 1 == self.num_blocks


class _Ride:
    """One variant on its way through the blocks."""

    def __init__(
        self, variant: Variant, store: BlockStore, states: Activations, report: Report, plan: SweepPlan
    ) -> None:
        self.variant = variant
        self._store, self._states, self._report, self._plan = store, states, report, plan
        self._records: list[LinearRecord] = []
        self._writing: Future[BlockDone] | None = None

    def expect(self, leaving: "_Ride") -> None:
        """Let the states come: this ride's turn is next, and another is leaving its block."""
        if leaving is not self and self._plan.suspended_batches == self._plan.num_batches:
            self._states.expect_all()

    def run(
        self,
        load: Callable[[], nn.Module],
        place: "_Place",
        writers: ThreadPoolExecutor,
        *,
        leaving: Callable[[], None],
    ) -> None:
        """Take the variant through a block; the finished block is written while the caller goes on."""
        started = time.monotonic()
        stored, records = self._store.read(place.index), self._store.records(place.index)
        tensors: Mapping[str, Tensor] = stored or {}
        if stored is None or records is None:
            passage = Passage(
                variant=self.variant, index=place.index, groups=place.groups, states=self._states,
                contexts=place.contexts, suspended=self._plan.suspended_batches, last=place.last,
                leaving=leaving,
            )  # fmt: skip
            made = quantize_block(load, passage, partial(self._linears_done, place.index))
            tensors, records = made.tensors, made.records
        elif not place.last:
            block = load()
            restore_block(block, place.index, tensors, self.variant)
            run_forward(block, self._states, place.contexts)
        self._records.extend(records)
        done = BlockDone(
            branch=self.variant.branch, block=place.index, num_blocks=place.num_blocks, resumed=stored is not None,
            loss=sum(record.loss for record in records), seconds=time.monotonic() - started,
        )  # fmt: skip
        self._wait()
        self._writing = writers.submit(self._write, done, HostCopies(tensors), records)

    def _linears_done(self, index: int, records: tuple[LinearRecord, ...]) -> None:
        self._report(LinearsDone(branch=self.variant.branch, block=index, linears=records))

    def finish(self) -> list[LinearRecord]:
        """Wait until everything is written."""
        self._wait()
        return self._records

    def _wait(self) -> None:
        """Wait for the block being written; what went wrong there is raised here."""
        if self._writing is not None:
            self._report(self._writing.result())
            self._writing = None

    def _write(self, done: BlockDone, tensors: HostCopies, records: Sequence[LinearRecord]) -> BlockDone:
        if not done.resumed:
            self._store.write(done.block, tensors.arrived(), records)
        return done
