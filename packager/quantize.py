"""Stage 5, quantize: all variants in one sweep over the base model's blocks.

A block's weights are read once; every variant has its own activations, because each sees what its own quantized blocks
make. A finished block is written at once: a killed run picks up after the last finished block, whose weights it reads
back and only runs forward.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor, nn

from packager.block_store import BlockStore
from packager.calibrate import TokenRows
from packager.decoder import BLOCK_PREFIX, Batch, Decoder, rows_per_batch, run_block
from packager.errors import QuantizeError
from packager.gptq.grid import GridRules
from packager.gptq.hessian import factorize
from packager.gptq.layout import pack, pack_zeros, unpack, unpack_zeros
from packager.gptq.solve import Solution, solve
from packager.receipt import LinearRecord
from packager.source import SourceModel
from packager.sweep import Group, linear_groups, linears_of, sweep_parallel, sweep_sequential
from packager.variant import Variant


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """What progress reports after each block of each variant."""

    branch: str
    block: int
    num_blocks: int
    loss: float
    seconds: float
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """Everything that determines the sweep.

    Attributes:
        source: the base model.
        rows: calibration tokens.
        stores: the variants to make, each with the open store of its blocks.
        device: where to compute.
    """

    source: SourceModel
    rows: TokenRows
    stores: Mapping[Variant, BlockStore]
    device: torch.device


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


@torch.no_grad()
def quantize(job: QuantizeJob, report: Callable[[BlockDone], None]) -> dict[str, tuple[LinearRecord, ...]]:
    """Quantize every variant block by block into its store; blocks that are finished there are only run forward.

    Returns:
        For each branch, one record per linear in model order.

    Raises:
        QuantizeError: NaN or Inf, or a factorisation beyond the limit; names block and linear.
    """
    decoder = Decoder(
        job.source.folder, job.source.read, device=job.device, dtype=compute_dtype(job.source, job.device)
    )
    batches = decoder.embed(job.rows.ids, rows=rows_per_batch(job.rows.ids.shape[1], job.device))
    states = {variant: [batch.hidden for batch in batches] for variant in job.stores}
    records: dict[str, list[LinearRecord]] = {variant.branch: [] for variant in job.stores}
    groups: tuple[Group, ...] = ()
    for index in range(len(decoder)):
        weights = decoder.block_weights(index)
        for variant in job.stores:
            started = time.monotonic()
            block = decoder.load_block(index, weights)
            if not groups:
                groups = linear_groups(block, batches[0].hidden, batches[0].contexts[index])
            store = job.stores[variant]
            tensors, stored = store.read(index), store.records(index)
            if tensors is None or stored is None:
                work = _BlockWork(block=block, index=index, variant=variant)
                states[variant] = work.run(groups, states[variant], batches)
                stored = work.records
                store.write(index, {name: tensor.cpu() for name, tensor in work.tensors.items()}, stored)
            else:
                _restore(block, index, tensors, variant)
                states[variant] = _run(block, index, states[variant], batches)
            records[variant.branch].extend(stored)
            report(
                BlockDone(
                    branch=variant.branch, block=index, num_blocks=len(decoder), resumed=tensors is not None,
                    loss=sum(record.loss for record in stored), seconds=time.monotonic() - started,
                )
            )  # fmt: skip
        decoder.drop_block(index)
    return {branch: tuple(found) for branch, found in records.items()}


def _run(block: nn.Module, index: int, states: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    return [run_block(block, hidden, batch.contexts[index]) for hidden, batch in zip(states, batches, strict=True)]


class _BlockWork:
    """One block of one variant: solves its groups and keeps their packed tensors and records."""

    def __init__(self, *, block: nn.Module, index: int, variant: Variant) -> None:
        self._linears = linears_of(block)
        self._block = block
        self._index = index
        self._variant = variant
        self._rules = GridRules(bits=variant.bits, sym=variant.sym, scale_search=variant.scale_search)
        self.tensors: dict[str, Tensor] = {}
        self.records: tuple[LinearRecord, ...] = ()

    def run(self, groups: Sequence[Group], states: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        sweep = sweep_sequential if self._variant.true_sequential else sweep_parallel
        contexts = [batch.contexts[self._index] for batch in batches]
        try:
            return sweep(self._block, groups, states, contexts, self._solve)
        except QuantizeError as error:
            error.where = error.where or f"{self._variant.branch}, {BLOCK_PREFIX}.{self._index}"
            raise

    def _solve(self, group: Group, H: Tensor) -> None:
        variant = self._variant
        try:
            factor = factorize(
                H,
                desc_act=variant.desc_act,
                damp_percent=variant.damp_percent,
                damp_percent_limit=variant.damp_percent_limit,
            )
            weights = [self._linears[name].weight for name in group]
            solution = solve(
                torch.cat([weight.T for weight in weights], dim=1), factor, self._rules,
                group_size=variant.group_size, static_groups=variant.static_groups,
            )  # fmt: skip
            solution.check()
        except QuantizeError as error:
            names = ", ".join(f"{BLOCK_PREFIX}.{self._index}.{name}" for name in group)
            error.where = f"{variant.branch}, {names}"
            raise
        begin = 0
        for name, weight in zip(group, weights, strict=True):
            part = solution.outputs(begin, begin + weight.shape[0])
            begin += weight.shape[0]
            weight.copy_(part.dequantized().T)
            self._keep(f"{BLOCK_PREFIX}.{self._index}.{name}", part, factor.damp_percent)

    def _keep(self, name: str, solution: Solution, damp_percent: float) -> None:
        bits = self._variant.bits
        self.tensors |= {
            f"{name}.qweight": pack(solution.q, bits),
            f"{name}.qzeros": pack_zeros(solution.zeros, bits),
            f"{name}.scales": solution.scales.contiguous(),
            f"{name}.g_idx": solution.g_idx.clone(),
        }
        bias = self._linears[name.removeprefix(f"{BLOCK_PREFIX}.{self._index}.")].bias
        if bias is not None:
            self.tensors[f"{name}.bias"] = bias.to(torch.float16)
        record = LinearRecord(name=name, loss=float(solution.losses.mean()), damp_percent=damp_percent)
        self.records = (*self.records, record)


def _restore(block: nn.Module, index: int, tensors: Mapping[str, Tensor], variant: Variant) -> None:
    """Give a block the weights that its finished tensors stand for."""
    device = next(block.parameters()).device
    for name, linear in linears_of(block).items():
        stored = f"{BLOCK_PREFIX}.{index}.{name}."

        def read(part: str, stored: str = stored) -> Tensor:
            return tensors[stored + part].to(device)

        linear.weight.copy_(dequantize_linear(read, variant.bits))


def dequantize_linear(read: Callable[[str], Tensor], bits: int) -> Tensor:
    """Return the float32 weight [out_features, in_features] that a linear's packed tensors (v1 format) stand for.

    Args:
        read: returns the tensor "qweight", "qzeros", "scales" or "g_idx" of the linear.
        bits: 2, 3, 4 or 8.
    """
    solution = Solution(
        q=unpack(read("qweight"), bits),
        zeros=unpack_zeros(read("qzeros"), bits),
        scales=read("scales"),
        g_idx=read("g_idx"),
        losses=torch.empty(0),
    )
    return solution.dequantized().T.contiguous()
