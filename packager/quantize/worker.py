"""The worker of one device: it quantizes a share of the variants block by block, in one or several sweeps.

Devices that share the rows of a share have a worker each. The first of them reads and writes the variant's store.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from threading import Event
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from packager.model.architecture import LinearSpec
from packager.model.batches import rows_per_batch
from packager.model.contexts import Context, own_contexts
from packager.model.decoder import Decoder, compute_dtype
from packager.model.fused_blocks import FusedModules
from packager.model.lock import LockedGroup
from packager.model.stored_names import ReadTensor
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.block import BlockJob, ExpertLinears, quantize_block
from packager.quantize.block_store import BlockStore
from packager.quantize.gptq.side_by_side import solved_together
from packager.quantize.host_copies import HostCopies
from packager.quantize.job import BlockDone, DeviceShare, LinearsDone, QuantizeJob, Report
from packager.quantize.memory import SweepPlan, slice_sizes
from packager.quantize.ranks import SweepRank, merged
from packager.quantize.restore_block import restore_block
from packager.quantize.suspended_forward import Reference, run_forward
from packager.quantize.variant_rules import order_of, rules_of
from packager.receipt import LinearRecord
from packager.variant import Variant

if TYPE_CHECKING:
    from packager.quantize.gptq.compile_kernels import KernelShape


class Worker:
    """Quantizes one device's share, in a thread of its own.

    Args:
        job: the whole job.
        share: of this device.
        rank: the device, and its place among those that share the rows.
        read: returns a named tensor of the base model.
        report: called with progress.
        stop: when it is set, the worker returns before the next block.

    Attributes:
        device: where it computes.
        records: for each branch of the share, one record per linear in model order; only the first rank has them.
    """

    def __init__(
        self, job: QuantizeJob, share: DeviceShare, rank: SweepRank, read: ReadTensor, report: Report, stop: Event
    ) -> None:
        self._job, self._share, self._rank, self._report, self._stop = job, share, rank, report, stop
        self.device = rank.device
        dtype = compute_dtype(job.source.dtype, self.device)
        self._decoder = Decoder(job.source.folder, read, names=job.source.tensors, device=self.device, dtype=dtype)
        self._names: dict[int, dict[str, str]] = {index: {} for index in range(len(self._decoder))}
        self._experts: dict[int, dict[str, list[tuple[LinearSpec, ...]]]] = {index: {} for index in self._names}
        for (block, parameter, _), linears in groupby(job.source.architecture.linears, key=_owner):
            if parameter:
                self._experts[block].setdefault(parameter, []).append(tuple(linears))
            else:
                self._names[block] |= {linear.module: linear.name for linear in linears}
        self.records: dict[str, list[LinearRecord]] = {}

    @property
    def fused(self) -> FusedModules:
        """The modules that run fused kernels where the device is CUDA."""
        return self._decoder.fused

    @torch.no_grad()
    def run(self) -> None:
        """Quantize every variant of the share.

        Raises:
            QuantizeError: a linear cannot be quantized.
            SourceError: the base model is damaged.
            RankStopped: another rank failed.
        """
        with (
            self._rank.ending_others(),
            ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool,
            torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext(),
        ):
            # Compile kernels while the first weights are read, and check the head when the embeddings are gone.
            self._prepared = [pool.submit(self._compile)]
            for number, variants in enumerate(self._share.sweeps):
                self._sweep(variants, pool if number == 0 else None)

    def _compile(self) -> None:
        if self.device.type == "cuda":
            from packager.quantize.gptq.compile_kernels import compile_for_shapes

            compile_for_shapes(self._kernel_shapes(corrected=False), self.device, self._decoder.dtype)
            compile_for_shapes(self._kernel_shapes(corrected=True), self.device, torch.float32)

    def _kernel_shapes(self, *, corrected: bool) -> "Iterator[KernelShape]":
        """Yield the shapes of linears that are solved with their own weights, or with corrected ones, in float32."""
        from packager.quantize.gptq.compile_kernels import KernelShape

        groups = (group for kind in self._job.source.architecture.kinds for group in kind.groups)
        shapes = dict.fromkeys(shape for group in groups for shape in _solved_shapes(group, corrected=corrected))
        widths = [(variant, bits) for variant in self._share.variants for bits in variant.all_bits]
        for (variant, bits), (in_features, out_features, num_experts) in product(widths, shapes):
            if (variant.target_correction > 0 and not num_experts) != corrected:
                continue
            for experts in slice_sizes(in_features, out_features, num_experts, "cuda") if num_experts else (0,):
                yield KernelShape(
                    in_features=in_features,
                    out_features=out_features,
                    rules=rules_of(variant, bits),
                    order=order_of(variant),
                    experts=experts,
                    refine=variant.refine,
                )

    def _sweep(self, variants: Sequence[Variant], check_head_in: ThreadPoolExecutor | None) -> None:
        job, plan, decoder = self._job, self._share.plan, self._decoder
        blocks = decoder.stream(on_host=plan.weights == "host")
        num_samples, seq_len = job.rows.ids.shape
        rows = rows_per_batch(seq_len, decoder.device.type)
        num_batches = -(-num_samples // rows)
        mine, parts = self._rank.batches(num_batches), self._rank.parts(num_batches)
        batches = decoder.embed(job.rows.ids[mine.start * rows : mine.stop * rows], rows=rows)
        decoder.drop_outside_blocks()
        if check_head_in is not None:
            self._prepared.append(check_head_in.submit(decoder.check_head))
        contexts = [batch.contexts for batch in batches]
        folder = job.stores[variants[0]].checkpoint.parent
        hidden = [batch.hidden for batch in batches]
        del batches
        tuned = any(variant.effort == "high" for variant in variants)
        targets = Activations(hidden, plan.placement, folder) if tuned else None
        runs = []
        for variant in variants:
            states = Activations(hidden, plan.placement, folder)
            reference = Activations(hidden, plan.placement, folder) if variant.target_correction else None
            runs.append(
                _VariantRun(variant, job.stores[variant], states, targets, reference, self._report, plan, self._rank)
            )
        del hidden
        # Blocks pass values to later ones through dicts and lists: every variant has its own, and its reference too.
        own, fp16 = ([[own_contexts(batch) for batch in contexts] for _ in runs] for _ in range(2))
        with ThreadPoolExecutor(len(runs), thread_name_prefix="write") as writers:
            for index, weights in enumerate(blocks):
                load = partial(decoder.load_block, index, weights)
                for prepared in self._prepared:
                    prepared.result()
                for number, run in enumerate(runs):
                    if self._rank.any(self._stop.is_set()):
                        return
                    context = BlockContext(
                        index=index, num_blocks=len(decoder), groups=self._groups(index), names=self._names[index],
                        experts=self._experts[index], contexts=[batch[index] for batch in own[number]],
                        reference_contexts=[batch[index] for batch in fp16[number]], parts=parts,
                    )  # fmt: skip
                    following = runs[(number + 1) % len(runs)]
                    run.run(load, context, writers, on_outputs_needed=partial(following.prefetch, run))
                decoder.drop_block(index)
            for run in runs:
                found = run.finish()
                if self._rank.first:
                    self.records[run.variant.branch] = found

    def _groups(self, index: int) -> tuple[Group, ...]:
        """Return the groups of a block that are quantized: of linears, and each parameter of experts by itself."""
        names, experts = self._names[index], self._experts[index]
        found: list[Group] = []
        for group in self._decoder.groups(index):
            found.append(tuple(module for module in group if module in names))
            found += [(parameter,) for parameter in experts if parameter.rpartition(".")[0] in group]
        return tuple(group for group in found if group)


def _owner(linear: LinearSpec) -> tuple[int, str, str]:
    """Return a linear's block and, if it is an expert's, the parameter that holds it and the expert's module."""
    return linear.block, linear.parameter, linear.module.rpartition(".")[0] if linear.parameter else ""


def _solved_shapes(group: LockedGroup, *, corrected: bool) -> list[tuple[int, int, int]]:
    """Return in_features, out_features and the number of experts, or 0, of what is solved at once."""
    if group.experts is not None or corrected:
        return [(group.in_features, group.out_features, group.experts.count if group.experts else 0)]
    widths = [linear.out_features for linear in group.linears]
    return [(group.in_features, sum(widths[together]), 0) for together in solved_together(widths)]


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """The facts about a block for one variant.

    Attributes:
        index: the block's number.
        num_blocks: of the model.
        groups: of its linears, see `BlockJob`.
        names: of its linears, see `BlockJob`.
        experts: likewise.
        contexts: the block's arguments besides the hidden states, one per batch.
        reference_contexts: likewise, for the fp16 model's activations.
        parts: of the batches, see `BlockJob`.
    """

    index: int
    num_blocks: int
    groups: Sequence[Group]
    names: Mapping[str, str]
    experts: ExpertLinears
    contexts: Sequence[Context]
    reference_contexts: Sequence[Context]
    parts: Sequence[int]

    @property
    def last(self) -> bool:
        """Whether this is the model's last block."""
        return self.index + 1 == self.num_blocks


def _with_bits(records: Sequence[LinearRecord], variant: Variant) -> list[LinearRecord]:
    """Return the records of linears, with the bits of each where they are chosen."""
    if variant.mix is None:
        return list(records)
    return [record.model_copy(update={"bits": variant.bits_of(record.name)}) for record in records]


class _VariantRun:
    """One variant in one sweep: its activations, its store, and the block that is being written."""

    def __init__(
        self, variant: Variant, store: BlockStore, states: Activations, targets: Activations | None,
        reference_states: Activations | None, report: Report, plan: SweepPlan, rank: SweepRank,
    ) -> None:  # fmt: skip
        self.variant = variant
        self._store, self._states, self._report, self._plan, self._rank = store, states, report, plan, rank
        self._targets, self._reference_states = targets, reference_states
        self._records: list[LinearRecord] = []
        self._writing: Future[BlockDone] | None = None

    def prefetch(self, previous: "_VariantRun") -> None:
        """Prefetch this variant's activations while the previous variant finishes its block.

        Only where all batches are suspended at once: then the device has room for all of them.
        """
        if previous is not self and self._plan.suspended_batches == self._plan.num_batches:
            self._states.prefetch_all()

    def run(
        self,
        load: Callable[[], nn.Module],
        context: BlockContext,
        writers: ThreadPoolExecutor,
        *,
        on_outputs_needed: Callable[[], None],
    ) -> None:
        """Quantize or restore a block and replace the activations by its outputs; start writing the finished block."""
        started = time.monotonic()
        stored = self._stored(context.index)
        reference = None
        if self._reference_states is not None:
            # Tuning needs the outputs of the last block too.
            last = context.last and self.variant.effort != "high"
            reference = Reference(states=self._reference_states, contexts=context.reference_contexts, last=last)
        records: Sequence[LinearRecord]
        if stored is None:
            job = BlockJob(
                variant=self.variant, index=context.index, groups=context.groups, names=context.names,
                experts=context.experts, states=self._states, targets=self._targets, contexts=context.contexts,
                reference=reference,
                rank=self._rank, parts=context.parts, suspended=self._plan.suspended_batches, last=context.last,
                on_outputs_needed=on_outputs_needed,
            )  # fmt: skip
            quantized = quantize_block(load, job, partial(self._linears_done, context.index))
            everyone = self._rank.exchange((HostCopies(quantized.tensors), quantized.records))
            found = [record for each in merged([found for _, found in everyone]).values() for record in each]
            records = _with_bits(found, self.variant)
            tensors = [copies for copies, _ in everyone]
        else:
            restored, records = stored
            if not context.last:
                block = load()
                if reference is not None:
                    run_forward(block, context.groups, reference.states, reference.contexts)
                restore_block(block, context.names, context.experts, restored, self.variant)
                run_forward(block, context.groups, self._states, context.contexts)
            tensors = []
        if not self._rank.first:
            return
        self._records.extend(records)
        done = BlockDone(
            branch=self.variant.branch, block=context.index, num_blocks=context.num_blocks, resumed=stored is not None,
            loss=sum(record.loss for record in records), seconds=time.monotonic() - started,
        )  # fmt: skip
        self._wait()
        self._writing = writers.submit(self._write, done, tensors, records)

    def _stored(self, index: int) -> tuple[Mapping[str, Tensor], Sequence[LinearRecord]] | None:
        """Return a finished block's tensors and records; the first rank reads them for all."""
        tensors = self._store.read(index) if self._rank.first else None
        records = self._store.records(index) if self._rank.first else None
        found = None if tensors is None or records is None else (tensors, records)
        return self._rank.exchange(found)[0]

    def _linears_done(self, index: int, records: tuple[LinearRecord, ...]) -> None:
        self._report(LinearsDone(branch=self.variant.branch, block=index, linears=records))

    def finish(self) -> list[LinearRecord]:
        """Wait until the last block is written; return the records of all linears."""
        self._wait()
        return self._records

    def _wait(self) -> None:
        """Wait for the block that is being written, and report it; an error of the writer is raised here."""
        if self._writing is not None:
            self._report(self._writing.result())
            self._writing = None

    def _write(self, done: BlockDone, tensors: Sequence[HostCopies], records: Sequence[LinearRecord]) -> BlockDone:
        if not done.resumed:
            self._store.write(done.block, merged([copies.wait() for copies in tensors]), records)
        return done
