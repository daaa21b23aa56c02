"""Quantized tensors that an earlier build made from the same inputs: they are packed again, not quantized again.

That build had another repository id, branch name, weights name or shard size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from packager.model.safetensors_file import StoredTensor, stored_tensors
from packager.pipeline.build_state import BuildState
from packager.pipeline.variant_plan import VariantPlan
from packager.quantize.engines.protocol import EngineResult
from packager.receipt import Receipt

if TYPE_CHECKING:
    from packager.quantize.block_store import BlockStore
    from packager.variant import Variant


@dataclass(frozen=True, kw_only=True)
class EarlierBuild:
    """A finished variant in the output folder, whose weights files are as its receipt states."""

    folder: Path
    receipt: Receipt

    def result(self, branch: str) -> EngineResult:
        """Return what the engine returned then, for the variant's present branch."""
        made = self.receipt.provenance
        return EngineResult(records={branch: made.linears}, made_with=made.made_with, versions=made.versions)


def find_earlier(run: BuildState, missing: Sequence[VariantPlan]) -> dict[str, EarlierBuild]:
    """Return, by branch, the variants of `missing` whose tensors lie in the output folder already."""
    linears = {linear.name for linear in run.plan.architecture.linears}
    found = {}
    for variant_plan in missing:
        branch = variant_plan.variant.branch
        # The key is computed, and a local base model hashed, only if there is such a receipt.
        key = partial(_quantize_key, run, branch)
        for folder, receipt in run.workspace.receipts_with(variant_plan.digest, key, run.terminal.log):
            if {record.name for record in receipt.provenance.linears} == linears:
                run.terminal.log(f"{branch}: its quantized tensors are taken from {folder}")
                found[branch] = EarlierBuild(folder=folder, receipt=receipt)
                break
            run.terminal.log(f"{folder} is not used: its receipt does not have the model's linears")
    return found


def _quantize_key(run: BuildState, branch: str) -> str:
    return run.keys[branch]["quantize"]


def copy_blocks(earlier: Mapping[str, EarlierBuild], stores: "Mapping[Variant, BlockStore]") -> None:
    """Copy the blocks of earlier builds into the stores of their variants."""
    for variant, store in stores.items():
        if variant.branch not in earlier:
            continue
        build = earlier[variant.branch]
        tensors: dict[str, StoredTensor] = {}
        for name in build.receipt.provenance.weights_files:
            tensors |= stored_tensors(build.folder / name)
        store.write_from(tensors, build.receipt.provenance.linears)


def with_earlier_facts(run: BuildState, receipt: Receipt, earlier: Receipt) -> Receipt:
    """Return a receipt with what an earlier build recorded of the same quantized tensors."""
    made, branch = earlier.provenance, receipt.provenance.branch
    changes: dict[str, object] = {"device": made.device}
    stages, seconds = dict(receipt.stages), {**receipt.seconds, "quantize": earlier.seconds["quantize"]}
    if earlier.stages.get("evaluate") == run.keys[branch]["evaluate"]:
        changes |= {"quality": made.quality, "evaluation": made.evaluation}
        stages["evaluate"], seconds["evaluate"] = earlier.stages["evaluate"], earlier.seconds["evaluate"]
    changes = {
        "provenance": receipt.provenance.model_copy(update=changes),
        "stages": stages,
        "seconds": seconds,
        "peak_memory_bytes": max(receipt.peak_memory_bytes, earlier.peak_memory_bytes),
        "fused_modules": earlier.fused_modules,
    }
    return receipt.model_copy(update=changes)
