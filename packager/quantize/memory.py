"""Estimate the GPU and host memory of quantizing, and choose a way that fits. Arithmetic only: no torch.

The choice changes time and memory, never a byte of the result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from packager.errors import MachineError
from packager.model.batches import (
    BLOCK_READERS,
    ELEMENT_BYTES,
    STAGED_BYTES,
    TRACED_BYTES,
    WEIGHT_COPIES,
    converted_bytes,
    embedding_bytes,
    running_bytes,
)
from packager.model.group_widths import GroupWidths
from packager.quantize.gptq.panels import panels_bytes, shift_rows
from packager.quantize.gptq.row_parts import MOST_PARTS
from packager.quantize.gptq.side_by_side import solved_together
from packager.quantize.solving_memory import solving_bytes
from packager.quantize.tuning_memory import tuning_bytes
from packager.quantize.workload import Workload
from packager.system.text import format_bytes

Placement = Literal["device", "host", "disk"]

# The host memory that a plan counts on, and a build where the system does not state what it has.
HOST_LIMIT_BYTES = 16 * 10**9
# Usable fraction of free GPU memory. The rest is for what libraries take, and for gaps in the memory that torch keeps.
# It keeps 1.1 to 1.25 times what is allocated in runs without a limit, but gives it back before it runs out.
USABLE = 0.9

# Experts are solved in slices: in enough for every device that shares the rows, and of as many experts as fit these
# bytes; an expert counts for four float32 matrices [in_features, in_features] and 16 bytes per weight. Products of
# other numbers of experts may round in other ways, so a slice depends on shapes alone: never on the free memory, the
# number of devices, or what solving is found to take (`solving_bytes`).
_SLICE_BYTES = {"cpu": 10**9, "cuda": 6 * 10**9}
_SLICE_SQUARES, _SLICE_WEIGHT_BYTES = 4, 16
# cuBLAS keeps 32 MiB for each stream with products: that of the worker, and the one beside a Cholesky factorisation.
_WORKSPACE_BYTES = {"cpu": 0, "cuda": 2 * 2**25}
# With more batches than this, not every number of suspended ones is tried: a step is under a hundredth of the batches.
_SUSPENDED_STEPS = 128
# Batches on the device (prefetched, in use, or being stored) when activations are stored elsewhere.
_STAGED_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A way to fit one or several sweeps over the blocks into a machine's memory.

    Attributes:
        num_variants: variants quantized in one sweep; further variants need further sweeps.
        placement: where activations are stored between blocks.
        num_batches: of calibration rows.
        suspended_batches: how many of them stay suspended inside a block until its linears are quantized; the others
            run again from the block's beginning for each group of linears, which costs time instead of memory.
        weights: where a block's weights wait until each variant has quantized it. On the host, each variant copies them
            to the device again, and the next block is read into host memory.
        device_bytes: estimated peak of the device that computes, without what Python, torch and CUDA take themselves.
        host_bytes: estimated peak of host memory beside a GPU, likewise; 0 where the host computes.
    """

    num_variants: int
    placement: Placement
    num_batches: int
    suspended_batches: int
    weights: Literal["device", "host"] = "device"
    device_bytes: int
    host_bytes: int


def choose_sweep(work: Workload, device_type: str, *, device_limit: int | None, host_limit: int | None) -> SweepPlan:
    """Choose the fastest way that fits; activations on disk only if nothing else fits.

    Args:
        work: what is to be quantized.
        device_type: "cpu" or "cuda".
        device_limit: bytes of the device; None for any number.
        host_limit: bytes of host memory beside a GPU; None for any number.

    Raises:
        MachineError: the smallest way does not fit either; the message states what that way needs.
    """
    smallest: SweepPlan | None = None
    for plan in sweep_ways(work, device_type):
        if not _exceeds(plan.device_bytes, device_limit) and not _exceeds(plan.host_bytes, host_limit):
            return plan
        smallest = min(smallest or plan, plan, key=lambda way: (way.device_bytes, way.host_bytes))
    assert smallest is not None, "there is always a way"  # noqa: S101
    raise MachineError(
        "quantizing does not fit into this machine's memory",
        why=f"it needs {_gb(smallest.device_bytes)} of the device and {_gb(smallest.host_bytes)} of the host; "
        f"there are {_gb(device_limit)} and {_gb(host_limit)}",
        hint="use a larger GPU, a higher --gpu-memory, or fewer calibration rows",
    )


def sweep_ways(work: Workload, device_type: str) -> Iterator[SweepPlan]:
    """Yield ways to quantize, the fastest first.

    Reading the weights once more is cheap, because it overlaps with computing. On the fastest GPUs, activations stored
    off the device do not always arrive in time. Running a batch again costs more. Weights on the host are for blocks
    that are large themselves, such as those with many experts.
    """
    batches = max(map(len, work.shares(device_type)))
    counts = range(work.num_variants, 0, -1)
    step = max(1, batches // _SUSPENDED_STEPS)
    suspended = (*range(batches, 0, -step), 0) if work.true_sequential else (0,)
    placements: tuple[tuple[Placement, ...], ...] = (("device", "host"), ("disk",))
    weights: tuple[Literal["device", "host"], ...] = ("device", "host")
    if device_type == "cpu":
        placements, suspended, weights = (("device",),), (batches,), ("device",)
    sizes = _Sizes(work, device_type)
    for wheres, waiting in product(placements, weights):
        for kept, where, count in product(suspended, wheres, counts):
            yield _way(
                work, sizes, device_type, num_batches=batches, suspended=kept, count=count, placement=where,
                weights=waiting,
            )  # fmt: skip


def _way(
    work: Workload,
    sizes: "_Sizes",
    device_type: str,
    *,
    num_batches: int,
    suspended: int,
    count: int,
    placement: Placement,
    weights: Literal["device", "host"],
) -> SweepPlan:
    # Of the device that has most batches; `everywhere` counts the rows of all devices.
    everywhere = work.num_samples * work.seq_len
    tokens = min(everywhere, num_batches * work.rows_per_batch(device_type) * work.seq_len)
    once = ELEMENT_BYTES[device_type] * tokens * work.architecture.hidden_size
    # A variant with a target correction has the fp16 model's too.
    states = 2 * once if work.corrected else once
    batch_tokens = min(tokens, work.rows_per_batch(device_type) * work.seq_len)
    staged = min(num_batches, _STAGED_BATCHES) * states * batch_tokens // tokens
    kept_tokens = min(tokens, suspended * batch_tokens)
    # A tuned block is compared with the original one, whose outputs are one more set of activations.
    kept = count * states + work.tuned * once
    held = kept if placement == "device" else staged * (1 + work.tuned)
    # On the device, a suspended batch's input is one of the states already.
    inputs = ELEMENT_BYTES[device_type] * work.architecture.hidden_size if placement == "device" else 0
    # A batch that runs again is beside all that are suspended; else it is one of them.
    beside = kept_tokens if suspended < num_batches else kept_tokens - batch_tokens
    peak = sizes.peak(kept_tokens, beside, batch_tokens, everywhere, inputs_held=inputs)
    # While a batch of the fp16 model runs again, the variant's own waits at the same linears.
    peak += sizes.suspended_reference(min(tokens, kept_tokens + batch_tokens), inputs_held=inputs)
    if work.corrected and suspended < num_batches:  # those that run again need the original weights
        peak += sizes.weights
    if work.tuned:
        peak = max(peak, tuning_bytes(work.architecture, device_type, batch_tokens, work.seq_len))
    blocks = held + sizes.resident(weights) + peak + _WORKSPACE_BYTES[device_type]
    # Wherever activations are stored, all are made on the device; the variants' are the same ones before a block ran.
    device = max(blocks, once + sizes.embedding(weights))
    host = 0 if device_type == "cpu" else sizes.host(count) + (kept if placement == "host" else 0)
    return SweepPlan(
        num_variants=count,
        placement=placement,
        num_batches=num_batches,
        suspended_batches=suspended,
        weights=weights,
        device_bytes=device,
        host_bytes=host,
    )


def slice_sizes(in_features: int, out_features: int, num_experts: int, device_type: str) -> tuple[int, ...]:
    """Return into slices of which sizes the experts of a layer are cut; see `expert_slices`."""
    return tuple(sorted({len(each) for each in expert_slices(in_features, out_features, num_experts, device_type)}))


def expert_slices(in_features: int, out_features: int, num_experts: int, device_type: str) -> list[range]:
    """Return the slices of a layer's experts, each of which is solved as one batch.

    Args:
        in_features: of their linears.
        out_features: of one expert's linears together.
        num_experts: of the layer.
        device_type: "cpu" or "cuda".
    """
    one = _SLICE_SQUARES * 4 * in_features**2 + _SLICE_WEIGHT_BYTES * in_features * out_features
    fitting = _SLICE_BYTES[device_type] // one
    at_once = max(1, min(-(-num_experts // MOST_PARTS), fitting))
    return [range(begin, min(begin + at_once, num_experts)) for begin in range(0, num_experts, at_once)]


class _Sizes:
    """The parts of the estimate: see docs/reference/engine.md, "Memory", and gptq/hessian.py, gptq/solve.py, worker.py.

    Args:
        work: what is to be quantized.
        device_type: "cpu" or "cuda", where blocks are computed.
    """

    def __init__(self, work: Workload, device_type: str) -> None:
        self._work, self._architecture, self._seq_len = work, work.architecture, work.seq_len
        self._sums = work.most_sums(device_type)
        self._device_type, self._element = device_type, ELEMENT_BYTES[device_type]
        self._embedding = embedding_bytes(work.architecture, device_type) + converted_bytes(
            work.architecture, device_type
        )

    @cached_property
    def weights(self) -> int:
        """Bytes of the largest block's weights."""
        return self._element * max(kind.weight_elements for kind in self._architecture.kinds)

    @cached_property
    def packed(self) -> int:
        """Bytes of the largest block when it is packed."""
        most = max(kind.weight_elements for kind in self._architecture.kinds)
        return math.ceil(most * self._work.packed_bits / 8)

    def host(self, num_variants: int) -> int:
        """Return host bytes without activations: blocks being read, packed blocks being written, an embedding."""
        blocks = 2 * self.weights + num_variants * self.packed + BLOCK_READERS * STAGED_BYTES
        return blocks + 2 * self._architecture.largest_tensor_bytes

    def resident(self, waiting: Literal["device", "host"]) -> int:
        """Return the device bytes of a block's weights and of one packed block; weights on the host leave its own.

        The packed block grows while its linears are solved. The one before it is copied to the host meanwhile, which
        has ended before much of the next is packed.
        """
        return (WEIGHT_COPIES if waiting == "device" else 1) * self.weights + self.packed

    def embedding(self, waiting: Literal["device", "host"]) -> int:
        """Return the device bytes of the embeddings, and of the first block, which is read beside."""
        return self._embedding + (self.weights if waiting == "device" else 0)

    def peak(
        self, suspended_tokens: int, beside_tokens: int, batch_tokens: int, tokens: int, *, inputs_held: int
    ) -> int:
        """Return the peak of the device without states and weights: the maximum over the groups of linears.

        Args:
            suspended_tokens: of the batches that stay inside the block.
            beside_tokens: of those that are suspended while a batch runs.
            batch_tokens: of the batch that runs.
            tokens: of all batches of all devices that share the rows.
            inputs_held: bytes of a token's input of the block that are counted elsewhere.
        """
        # What a running batch takes includes what it holds where it is suspended.
        running = batch_tokens * running_bytes(self._architecture, self._device_type, self._seq_len)
        peaks = [running]
        sizes = self._architecture.group_sizes
        for group in sizes:
            each = max(0, self._suspended(group) - inputs_held)
            suspended, beside = suspended_tokens * each, beside_tokens * each
            square = 4 * group.in_features**2
            sums = self._sums * panels_bytes(group.in_features)
            solving = self._solving(group)
            if self._work.corrected and group.experts is None:
                sums += self._sums * 4 * shift_rows(group.in_features, group.out_features) * group.in_features
            if group.experts is None:
                peaks += [suspended + solving, beside + sums + running]
            else:
                experts = group.experts.count
                slices = expert_slices(group.in_features, group.out_features, experts, self._device_type)
                # The inputs of batches that are not suspended are held too, until the last slice is solved; without
                # true_sequential no batch is suspended, and the inputs of both groups of experts are held.
                held = self._routed_inputs(group) if suspended_tokens else self._routed_inputs_of_a_block
                inputs = (tokens - suspended_tokens) * held
                peaks += [suspended + inputs + square + len(slices[0]) * solving, beside + inputs + sums + running]
        return max(*peaks, self._peak_at_once(running, tokens))

    def _solving(self, group: GroupWidths) -> int:
        """Return what solving a group of linears takes, or one of its experts."""
        kind, refined = self._device_type, self._work.refined_group
        if group.experts is not None:
            return solving_bytes(group.in_features, group.out_features, kind, refined_group=refined)
        if self._work.corrected:  # the targets of all linears are found, and then rounded, at once
            return solving_bytes(group.in_features, group.out_features, kind, refined_group=refined, corrected=True)
        together = [sum(group.widths[some]) for some in solved_together(group.widths)]
        # Beside those that are solved, the others' integers.
        return max(
            solving_bytes(group.in_features, features, kind, refined_group=refined)
            + group.in_features * (group.out_features - features)
            for features in together
        )

    def suspended_reference(self, tokens: int, *, inputs_held: int) -> int:
        """Return what batches take for a target correction while they are suspended where that takes most.

        Args:
            tokens: of these batches.
            inputs_held: see `peak`.
        """
        if not self._work.corrected:
            return 0
        return tokens * max(max(0, self._suspended(group) - inputs_held) for group in self._architecture.group_sizes)

    def _peak_at_once(self, running: int, tokens: int) -> int:
        """Return the peak of a variant that calibrates all linears of a block at once, and suspends no batch."""
        if not self._work.all_at_once:
            return 0
        peaks = []
        for kind in self._architecture.kinds:
            groups = list(map(GroupWidths.of, kind.groups))
            linears = [group for group in groups if group.experts is None]
            sums = sum(panels_bytes(group.in_features) for group in linears)
            solving = max(map(self._solving, linears), default=0)
            calibrating = (self._sums - 1) * sums + running
            inputs = tokens * sum(map(self._routed_inputs, groups))
            peaks.append(inputs + sums + max(calibrating, solving))
        return max(peaks)

    @cached_property
    def _routed_inputs_of_a_block(self) -> int:
        """Bytes of a token's inputs of all experts of a block, of the kind of block where they take most."""
        return max(sum(map(self._routed_inputs, map(GroupWidths.of, kind.groups))) for kind in self._architecture.kinds)

    def _routed_inputs(self, group: GroupWidths) -> int:
        """Return the bytes of a token's inputs of experts, with the int64 index that sorts them; 0 for linears."""
        experts = group.experts
        if experts is None:
            return 0
        rows = 1 if experts.per_token else experts.top_k
        return rows * group.in_features * self._element + 8 * experts.top_k

    def _suspended(self, group: GroupWidths) -> int:
        """Return the bytes per token of a batch suspended at a group of linears: the block's input and later values."""
        inputs = self._element * self._architecture.hidden_size
        held = group.held_bytes + self._seq_len * group.held_bytes_per_pair
        return inputs + held * self._element // TRACED_BYTES


def _exceeds(size: int, limit: int | None) -> bool:
    return limit is not None and size > limit


def _gb(size: int | None) -> str:
    return "any number of GB" if size is None else format_bytes(size)
