"""Stages 3 to 6: open the base model, tokenize, quantize and pack the variants whose weights are missing.

torch is imported only when there is work to do.
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from packager.errors import PackError, StateError
from packager.model.devices import device_name
from packager.pipeline.base_model_origin import BaseOrigin
from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.build_state import BuildState
from packager.pipeline.cards import refuse_edited_card
from packager.pipeline.earlier_builds import EarlierBuild, copy_blocks, find_earlier, with_earlier_facts
from packager.pipeline.mixed_bits import block_fingerprint, keep_losses, widths_to_measure, with_bits
from packager.pipeline.variant_plan import VariantPlan
from packager.pipeline.workspace import audit_or_raise, check_folder
from packager.quantize.engines import engine_named, require_engines
from packager.quantize.engines.protocol import EngineResult
from packager.receipt import FileRecord, FusedRecord, Provenance, Receipt
from packager.system.files import check_disk, replace_folder
from packager.system.heap import return_large_blocks
from packager.system.host_memory import peak_memory_bytes
from packager.system.parallel import in_parallel

if TYPE_CHECKING:
    from packager.model.fused_blocks import FusedModules
    from packager.quantize.block_store import BlockStore
    from packager.quantize.job import Event, Report
    from packager.variant import EngineName, Variant


def quantize_and_pack(run: BuildState) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stages 3 to 6 for the variants whose weights are missing; mixes come last, when their bits can be chosen.

    Returns:
        The branches that were quantized, and those that were packed: also the ones that an earlier build quantized.
    """
    missing = run.missing("weights")
    if not missing:
        return (), ()
    require_build_extra()
    from packager.inputs.description_check import check_description

    for variant_plan in missing:
        _refuse_edited(run, variant_plan)
    earlier = find_earlier(run, missing)
    new = [variant_plan for variant_plan in missing if variant_plan.variant.branch not in earlier]
    if new:
        require_engines((variant_plan.variant.engine for variant_plan in new), run.device.type)
    check_disk(run.workspace.dist, _needed_bytes(run, missing))
    if run.device.type == "cpu":
        return_large_blocks()  # so that the host needs the memory that the plan states
    source = run.source
    check_description(source, run.recipe_file.lock)
    _check_licenses(run)
    origin = BaseOrigin(run.workspace.work, source, run.terminal.log)
    plain = [variant_plan for variant_plan in missing if variant_plan.variant.mix is None]
    mixed = [variant_plan for variant_plan in missing if variant_plan.variant.mix is not None]
    measured = widths_to_measure(run, [each for each in mixed if each in new], plain)
    _make(run, plain, earlier, origin, measured)
    if mixed:
        _make(run, [with_bits(run, each, earlier.get(each.variant.branch)) for each in mixed], earlier, origin)
    return tuple(each.variant.branch for each in new), tuple(each.variant.branch for each in missing)


def _make(
    run: BuildState,
    variants: Sequence[VariantPlan],
    earlier: Mapping[str, EarlierBuild],
    origin: BaseOrigin,
    measured: Sequence[VariantPlan] = (),
) -> None:
    """Quantize and pack variants; `measured` are quantized beside them, for their losses alone."""
    from packager.pipeline.quantize_progress import QuantizeView

    if not (variants or measured):
        return
    source = run.source
    stores = _open_stores(run, [*variants, *measured], origin.token)
    copy_blocks(earlier, stores)
    new = [*(variant_plan for variant_plan in variants if variant_plan.variant.branch not in earlier), *measured]
    bar = run.terminal.bar(len(new) * source.architecture.num_blocks)
    with run.terminal.stage("quantize"), bar as blocks, source.weights.hashed_beside():
        view = QuantizeView(run.terminal, blocks, [variant_plan.variant.branch for variant_plan in new])

        def report(event: "Event") -> None:
            origin.watch()
            view.report(event)

        made = _quantize(run, {variant_plan.variant: stores[variant_plan.variant] for variant_plan in new}, report)
        origin.wait()
    for variant_plan in measured:
        keep_losses(run, variant_plan, made[variant_plan.variant.engine].records[variant_plan.variant.branch])
    for variant_plan, files, pack_s in _packed(run, variants, stores):
        branch = variant_plan.variant.branch
        before = earlier.get(branch)
        result = before.result(branch) if before else made[variant_plan.variant.engine]
        seconds = {"quantize": round(view.seconds.get(branch, 0.0), 3), "pack": round(pack_s, 3)}
        receipt = Receipt(
            provenance=_provenance(run, variant_plan, files, result),
            stages={stage: run.keys[branch][stage] for stage in ("quantize", "weights")},
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            # auto-gptq quantizes in a process of its own, without our kernels.
            fused_modules=_fused_record(view.fused) if variant_plan.variant.engine == "native" else None,
            trial=run.recipe_file.trial,
        )
        if before:
            receipt = with_earlier_facts(run, receipt, before.receipt)
        # If this run is killed before `keep`, the next run recognises the folder by the announced receipt.
        run.workspace.announce(receipt)
        replace_folder(stores[variant_plan.variant].checkpoint, run.workspace.folder(branch))
        run.keep(receipt)


def _quantize(
    run: BuildState, stores: "Mapping[Variant, BlockStore]", report: "Report"
) -> "dict[EngineName, EngineResult]":
    """Stage 5: let each engine make its variants, one engine after the other."""
    from packager.quantize.job import QuantizeJob

    context = run.runtime_context(run.workspace.work)
    made = {}
    for name in dict.fromkeys(variant.engine for variant in stores):
        own = {variant: store for variant, store in stores.items() if variant.engine == name}
        job = QuantizeJob(
            source=run.source,
            rows=run.texts.calibration,
            stores=own,
            devices=run.devices,
            device_limit=run.options.gpu_memory_bytes,
        )
        made[name] = engine_named(name, context).quantize(job, report)
    return made


def _open_stores(run: BuildState, missing: Sequence[VariantPlan], base_model: str) -> "dict[Variant, BlockStore]":
    """Open a store for the blocks of every variant, with the blocks that a killed run finished.

    `base_model` is the token of the base model.
    """
    from packager.quantize.block_store import BlockStore

    stores = {}
    for variant_plan in missing:
        parts = block_fingerprint(run, variant_plan, base_model)
        branch = variant_plan.variant.branch
        stores[variant_plan.variant] = BlockStore(
            run.workspace.work / branch, variant_plan.shards, run.plan.architecture, parts, run.terminal.log,
            run.block_copies(branch) if run.block_copies else None,
        )  # fmt: skip
        stores[variant_plan.variant].open()
    return stores


def _fused_record(modules: "FusedModules | None") -> FusedRecord | None:
    if modules is None:
        return None
    return FusedRecord(fused=len(modules.fused), candidates=len(modules.candidates), missed=modules.missed)


def _provenance(
    run: BuildState, variant_plan: VariantPlan, files: Mapping[str, FileRecord], made: EngineResult
) -> Provenance:
    variant, linears = variant_plan.variant, made.records[variant_plan.variant.branch]
    return Provenance(
        repository=run.recipe.repository.id,
        branch=variant.branch,
        layout=run.recipe.repository.layout,
        made_with=made.made_with,
        recipe_digest=run.recipe.digest(),
        variant_digest=variant_plan.digest,
        parameters=variant.parameters(),
        effective={
            "damp_percent_max": max(record.damp_percent for record in linears),
            "linears_damped_further": sum(record.damp_percent > variant.damp_percent for record in linears),
        },
        base_model=run.source.record,
        model=run.recipe_file.lock.model.model_dump(mode="json", exclude={"config"}),
        calibration=run.texts.calibration.record,
        evaluation=run.texts.evaluation.record,
        versions=dict(made.versions),
        device=device_name(run.device),
        linears=linears,
        not_quantized=dict(run.plan.architecture.left),
        weights_bytes=variant_plan.weights_bytes,
        files=dict(files),
    )


def _packed(
    run: BuildState, missing: Sequence[VariantPlan], stores: "Mapping[Variant, BlockStore]"
) -> list[tuple[VariantPlan, dict[str, FileRecord], float]]:
    """Stage 6 for all variants at once: complete and audit their folders; return the files and the time of each."""
    from packager.pipeline.pack import PackJob, pack_checkpoint

    def pack(variant_plan: VariantPlan) -> tuple[VariantPlan, dict[str, FileRecord], float]:
        started, store = time.monotonic(), stores[variant_plan.variant]
        job = PackJob(
            source=run.source,
            tokenizer_files={name: file.data for name, file in run.texts.tokenizer_files.items()},
            variant=variant_plan.variant,
            shards=variant_plan.shards,
            repository=run.recipe.repository.id,
            weights_name=run.recipe.checkpoint.weights_name,
            store=store,
        )
        files = pack_checkpoint(job)
        audit_or_raise([store.checkpoint], run.plan.architecture, complete=False)
        pack_s = time.monotonic() - started
        run.terminal.log(f"pack       {pack_s:6.1f} s  {variant_plan.variant.branch}")
        return variant_plan, files, pack_s

    return in_parallel(pack, missing)


def _needed_bytes(run: BuildState, missing: Sequence[VariantPlan]) -> int:
    """Return the disk space that building `missing` takes, less the space that a killed run has reserved."""
    folders = [run.workspace.work / variant_plan.variant.branch for variant_plan in missing]
    held = sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*.safetensors"))
    whole = run.plan.disk
    # Losses that are kept are not measured again, unless they are of other texts: that space is not counted.
    wanted = {width.digest for each in missing for width in each.widths}
    held -= sum(
        width.weights_bytes
        for width in run.plan.only_measured
        if width.digest in wanted and not run.workspace.losses_path(width.digest).exists()
    )
    shares = sum(variant_plan.weights_bytes for variant_plan in missing) / sum(
        variant_plan.weights_bytes for variant_plan in run.plan.variants
    )
    return whole.source_bytes + round(whole.builds_bytes * shares) - held


def _check_licenses(run: BuildState) -> None:
    """Raise PackError before anything is computed if the base model lacks a licence file that the recipe names."""
    for name in run.recipe.card.license.base_files:
        if name not in run.source.small:
            raise PackError(
                f"the base model has no file {name}, which the recipe names for every branch",
                where=str(run.source.folder),
                hint="correct card.license.base_files, or ship the file with the recipe and name it in files",
            )


def _refuse_edited(run: BuildState, variant_plan: VariantPlan) -> None:
    """Refuse to replace a folder that was made or edited by hand: an outdated receipt still lists our files."""
    branch = variant_plan.variant.branch
    folder, receipt = run.workspace.folder(branch), run.workspace.read_receipt(branch)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if receipt is None:
        raise StateError(
            "the folder of a variant exists, and packager did not make it",
            where=str(folder),
            hint="move it elsewhere, or choose another --dist",
        )
    card_files = run.card_files(receipt)
    check_folder(folder, receipt, ignore=card_files)
    for name in sorted(card_files):
        refuse_edited_card(run, branch, name)
