"""The stages of a build, each bringing the variants that lack it up to date and writing their receipts.

Order and meaning are `pipeline.py`'s; torch is imported only when there is work to do.
"""

import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING

from packager.card import CardTexts, render_card
from packager.errors import AuditError, CardError, PackError, StateError
from packager.model.devices import device_name
from packager.pipeline.build_state import Build, StageName, require_build_extra
from packager.pipeline.pack import is_packed
from packager.pipeline.plan import VariantPlan
from packager.pipeline.workspace import check_folder
from packager.prove.audit import audit
from packager.quantize.engines import ENGINE_VERSION, engine_named, require_engines
from packager.quantize.engines.protocol import EngineResult, Site
from packager.receipt import PROVENANCE, README, FileRecord, Provenance, Receipt
from packager.recipe.file import RecipeFile
from packager.system.files import bytes_record, disk_errors, file_record, replace_folder, write_atomic
from packager.system.parallel import in_parallel

if TYPE_CHECKING:
    from packager.quantize.block_store import BlockStore
    from packager.quantize.job import Report
    from packager.variant import EngineName, Variant


def quantize_and_pack(run: Build) -> tuple[str, ...]:
    """Stages 3 to 6 for the variants whose weights are missing."""
    missing = run.missing("weights")
    if not missing:
        return ()
    require_build_extra()
    from packager.inputs.base_model import check_disk
    from packager.pipeline.quantize_progress import QuantizeView

    require_engines((plan.variant.engine for plan in missing), run.device.type)
    for plan in missing:
        _refuse_edited(run, plan)
    check_disk(run.workspace.dist, _needed_bytes(run, missing))
    source = run.source
    _check_licenses(run)
    stores = _open_stores(run, missing)
    branches = [plan.variant.branch for plan in missing]
    with run.terminal.stage("quantize"), run.terminal.bar(len(missing) * source.architecture.num_blocks) as bar:
        view = QuantizeView(run.terminal, bar, branches)
        made = _quantize(run, stores, view.report)
    for plan, files, pack_s in _packed(run, missing, stores):
        branch = plan.variant.branch
        seconds = {"quantize": round(view.seconds[branch], 3), "pack": round(pack_s, 3)}
        receipt = Receipt(
            provenance=_provenance(run, plan, files, made[plan.variant.engine]),
            stages={"weights": run.keys[branch]["weights"]},
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
        )
        # Announced, so that a run killed before the receipt is kept finds its own folder and takes it over.
        run.workspace.announce(receipt)
        replace_folder(stores[plan.variant].checkpoint, run.workspace.folder(branch))
        run.keep(receipt)
    return tuple(plan.variant.branch for plan in missing)


def _quantize(run: Build, stores: "Mapping[Variant, BlockStore]", report: "Report") -> "dict[EngineName, EngineResult]":
    """Stage 5: let each engine make its variants, one engine after the other."""
    from packager.quantize.job import QuantizeJob

    site = Site(cache=run.options.cache, scratch=run.workspace.work, environ=run.options.environ, log=run.terminal.log)
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
        made[name] = engine_named(name, site).quantize(job, report)
    return made


def _open_stores(run: Build, missing: Sequence[VariantPlan]) -> "dict[Variant, BlockStore]":
    """Make room for the blocks of every variant, or find those that a killed run finished."""
    from packager.quantize.block_store import BlockStore
    from packager.quantize.sweep import fingerprint

    stores = {}
    for plan in missing:
        parts = fingerprint(plan.digest, run.source, run.texts.calibration, run.device, engine_version=ENGINE_VERSION)
        folder = run.workspace.work / plan.variant.branch
        stores[plan.variant] = BlockStore(folder, plan.shards, parts, run.terminal.log)
        stores[plan.variant].open()
    return stores


def _packed(
    run: Build, missing: Sequence[VariantPlan], stores: "Mapping[Variant, BlockStore]"
) -> list[tuple[VariantPlan, dict[str, FileRecord], float]]:
    """Stage 6 for all variants at once: complete and audit their folders; return the files and the time of each."""
    from packager.pipeline.pack import PackJob, pack_checkpoint

    def pack(plan: VariantPlan) -> tuple[VariantPlan, dict[str, FileRecord], float]:
        started, store = time.monotonic(), stores[plan.variant]
        files = pack_checkpoint(PackJob(source=run.source, recipe_file=run.recipe_file, variant_plan=plan, store=store))
        audit_or_raise([store.checkpoint], complete=False)
        pack_s = time.monotonic() - started
        run.terminal.log(f"pack       {pack_s:6.1f} s  {plan.variant.branch}")
        return plan, files, pack_s

    return in_parallel(pack, missing)


def _needed_bytes(run: Build, missing: Sequence[VariantPlan]) -> int:
    """Return the disk space that building `missing` takes besides what a killed run reserved for it."""
    folders = [run.workspace.work / plan.variant.branch for plan in missing]
    held = sum(path.stat().st_blocks * 512 for folder in folders for path in folder.rglob("*.safetensors"))
    whole = run.plan.disk
    shares = sum(plan.weights_bytes for plan in missing) / sum(plan.weights_bytes for plan in run.plan.variants)
    return whole.source_bytes + round(whole.builds_bytes * shares) - held


def _check_licenses(run: Build) -> None:
    """Raise PackError before anything is computed if the base model lacks a licence file that the recipe wants."""
    for name in run.recipe.card.license.base_files:
        if name not in run.source.record.files:
            raise PackError(
                f"the base model has no file {name}, which its licence wants in every branch",
                where=str(run.source.folder),
                hint="correct card.license.base_files, or ship the file with the recipe and name it in files",
            )


def _refuse_edited(run: Build, plan: VariantPlan) -> None:
    """Do not replace a folder that somebody made or changed: an outdated receipt still says what we left there."""
    branch = plan.variant.branch
    folder, receipt = run.workspace.folder(branch), run.workspace.read_receipt(branch)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return
    if receipt is None:
        raise StateError(
            "there is a folder that we did not make where a variant shall go",
            where=str(folder),
            hint="move it elsewhere, or choose another --dist",
        )
    card_files = run.card_files(receipt)
    check_folder(folder, receipt, ignore=card_files)
    for name in sorted(card_files):
        _refuse_edited_card(run, branch, name)


def evaluate(run: Build) -> tuple[str, ...]:
    """Stage 8: measure the variants whose quality is not known."""
    missing = run.missing("evaluate")
    if not missing:
        return ()
    require_build_extra()
    from packager.prove.evaluate import compare, measure_base, measure_checkpoint

    source, texts, device = run.source, run.texts, run.device
    with run.terminal.stage("evaluate"), run.terminal.bar(len(missing) + 1) as bar:
        base = measure_base(source, texts, device)
        bar.step("fp16 base model")
        for plan in missing:
            branch, started = plan.variant.branch, time.monotonic()
            folder = run.workspace.folder(branch)
            quantized = measure_checkpoint(folder, plan.variant.bits, source, texts, device)
            quality = compare(base, quantized, texts)
            fields = {"quality": quality, "evaluation": texts.evaluation.record}
            _update(run, branch, "evaluate", time.monotonic() - started, fields)
            bar.step(f"{branch} perplexity {quality.perplexity:.4f}, KL {quality.kl_divergence:.5f}")
    return tuple(plan.variant.branch for plan in missing)


def verify(run: Build, *, again: bool = False) -> tuple[str, ...]:
    """Stage 7: let the recipe's loaders open the variants, unless they have already proven every one of them.

    All variants take part even if only one is new: each must be told apart from the others.
    """
    if not run.missing("verify") and not again:
        return ()
    require_build_extra()
    from packager.prove.verify import VerifyJob, checkpoint_of
    from packager.prove.verify import verify as run_loaders

    texts, device = run.texts, run.device
    branches = [plan.variant.branch for plan in run.plan.variants]
    job = VerifyJob(
        checkpoints=[checkpoint_of(run.receipts[name].provenance, run.workspace.folder(name)) for name in branches],
        ids=texts.evaluation.ids,
        prompts=texts.prompts,
        loaders=run.recipe.loaders,
        device=device,
        cache=run.options.cache,
        scratch=run.workspace.work / "verify",
        environ=run.options.environ,
    )
    with run.terminal.stage("verify"):
        records = run_loaders(job, run.terminal.log)
    for branch in branches:
        _update(run, branch, "verify", run.terminal.seconds["verify"] / len(branches), {"loaders": records[branch]})
    return tuple(branches)


def _update(run: Build, branch: str, stage: StageName, seconds: float, fields: Mapping[str, object]) -> None:
    """Write a stage's results into a variant's receipt."""
    receipt = run.receipts[branch]
    provenance = receipt.provenance.model_copy(update=fields)
    stages = {**receipt.stages, stage: run.keys[branch][stage]}
    spent = {**receipt.seconds, stage: round(seconds, 3)}
    run.keep(receipt.model_copy(update={"provenance": provenance, "stages": stages, "seconds": spent}))


def render_cards(run: Build) -> None:
    """Stage 9: README.md, licence files and provenance.json of every variant; then the whole folder is audited.

    Raises:
        StateError: somebody edited one by hand; what it says belongs into the recipe or the templates.
        AuditError: the folder does not keep the contract.
    """
    card = run.recipe.card
    texts = CardTexts(
        header=_text(run.recipe_file, card.header),
        footer=_text(run.recipe_file, card.footer),
        original_card=_text(run.recipe_file, card.original_card),
    )
    present = _present(run)
    provenances = [receipt.provenance.model_copy(update=present) for receipt in run.ordered_receipts()]
    expectations = {plan.variant.branch: plan.verdicts for plan in run.plan.variants}
    model_type = run.plan.architecture.model_type
    rendered = {}
    for branch in run.keys:
        readme = render_card(run.recipe, texts, provenances, model_type, branch, expectations=expectations)
        rendered[branch] = {README: readme.encode(), **_licenses(run, branch)}
    cards = {branch: _with_provenance(run, branch, files) for branch, files in rendered.items()}
    refuse_edited_cards(run, {branch: files for branch, (files, _) in cards.items()})
    for branch, (files, receipt) in cards.items():
        _write_card(run, branch, files, receipt)
    audit_or_raise([run.workspace.folder(branch) for branch in cards], complete=True)


def _present(run: Build) -> dict[str, object]:
    """Return what a record says of the recipe and may change without the weights."""
    return {"recipe_digest": run.recipe.digest(), "layout": run.recipe.repository.layout}


def _licenses(run: Build, branch: str) -> dict[str, bytes]:
    """Return the licence files by name; the base model's are read from it only where the branch lacks them."""
    license_, provenance = run.recipe.card.license, run.receipts[branch].provenance
    found = {PurePosixPath(name).name: run.recipe_file.resolve(name).read_bytes() for name in license_.files}
    for name in license_.base_files:
        path, record = run.workspace.folder(branch) / name, provenance.base_model.files.get(name)
        if record is None or not path.is_file() or file_record(path) != record:
            path = run.source.folder / name
        found[name] = path.read_bytes()
    return found


def _with_provenance(run: Build, branch: str, files: dict[str, bytes]) -> tuple[dict[str, bytes], Receipt]:
    """Add provenance.json, and return the receipt to be: its provenance also lists provenance.json itself."""
    receipt = run.receipts[branch]
    packed = {name: record for name, record in receipt.provenance.files.items() if is_packed(name)}
    records = packed | {name: bytes_record(content) for name, content in files.items()}
    changes = {"files": dict(sorted(records.items())), **_present(run)}
    provenance = receipt.provenance.model_copy(update=changes)
    content = provenance.model_dump_json(indent=2).encode() + b"\n"
    records[PROVENANCE] = bytes_record(content)
    listed = provenance.model_copy(update={"files": dict(sorted(records.items()))})
    return {**files, PROVENANCE: content}, receipt.model_copy(update={"provenance": listed})


def refuse_edited_cards(run: Build, contents: Mapping[str, Mapping[str, bytes]] = MappingProxyType({})) -> None:
    """Check every file that comes with a card, before any is written.

    Args:
        run: with its receipts read.
        contents: by branch and name, what is about to be written, and so may be there already.

    Raises:
        StateError: a file was edited by hand.
    """
    for branch, receipt in run.receipts.items():
        files = contents.get(branch, {})
        for name in sorted(run.card_files(receipt) | files.keys()):
            _refuse_edited_card(run, branch, name, files.get(name))


def _refuse_edited_card(run: Build, branch: str, name: str, content: bytes | None = None) -> None:
    """Do not replace a file of the card unless it is as we left it, as a killed run left it, or already `content`."""
    path = run.workspace.folder(branch) / name
    if not os.path.lexists(path):
        return
    receipts = (run.workspace.read_receipt(branch), run.workspace.announced(branch))
    known = {receipt.provenance.files.get(name) for receipt in receipts if receipt is not None}
    if content is not None:
        known.add(bytes_record(content))
    if not path.is_file() or file_record(path) not in known:
        raise StateError(
            f"{name} was edited by hand",
            where=str(path),
            why="it follows from the recipe, the templates and the receipts, and would be overwritten",
            hint="put the change into the recipe or templates/, then delete the file and run the command again",
        )


def _write_card(run: Build, branch: str, files: Mapping[str, bytes], receipt: Receipt) -> None:
    folder = run.workspace.folder(branch)
    changed = [name for name, content in files.items() if not _holds(folder / name, content)]
    removed = [name for name in run.card_files(run.receipts[branch]) - files.keys() if (folder / name).exists()]
    if changed or removed:
        run.workspace.announce(receipt)
    with disk_errors(folder):
        for name in changed:
            write_atomic(folder / name, files[name])
        for name in removed:
            (folder / name).unlink()
    run.keep(receipt)


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _text(recipe_file: RecipeFile, name: str | None) -> str:
    if name is None:
        return ""
    path = recipe_file.resolve(name)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CardError("a text of the card cannot be read", where=str(path), why=str(error)) from error


def audit_or_raise(folders: Sequence[Path], *, complete: bool) -> None:
    """Audit folders of ours, in parallel.

    Raises:
        AuditError: of the first that has findings, with every one.
    """
    reports = in_parallel(lambda folder: audit(folder, complete=complete), folders)
    for folder, report in zip(folders, reports, strict=True):
        if not report.passed:
            raise AuditError(
                f"{len(report.errors)} findings in the checkpoint folder",
                where=str(folder),
                why="; ".join(f"{finding.where}: {finding.message}" for finding in report.errors[:10]),
                hint=f"packager audit {folder} shows them all",
            )


def _provenance(run: Build, plan: VariantPlan, files: Mapping[str, FileRecord], made: EngineResult) -> Provenance:
    variant, linears = plan.variant, made.records[plan.variant.branch]
    return Provenance(
        repository=run.recipe.repository.id,
        branch=variant.branch,
        layout=run.recipe.repository.layout,
        made_with=made.made_with,
        recipe_digest=run.recipe.digest(),
        variant_digest=plan.digest,
        parameters=variant.parameters(),
        effective={
            "damp_percent_max": max(record.damp_percent for record in linears),
            "linears_damped_further": sum(record.damp_percent > variant.damp_percent for record in linears),
        },
        base_model=run.source.record,
        calibration=run.texts.calibration.record,
        evaluation=run.texts.evaluation.record,
        versions=dict(made.versions),
        device=device_name(run.device),
        linears=linears,
        weights_bytes=plan.weights_bytes,
        files=dict(files),
    )


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
