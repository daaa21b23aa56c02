"""The flow, top-down: `build` turns a recipe into proven folders with cards, `publish` turns folders into branches.

`build` never publishes and `publish` never builds; each reads the other's files, so both can be killed at any point
and run again, on this machine or another.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from packager.card.floor import allowed_below, far_lines, floor_lines, floor_problems
from packager.errors import LoaderError, MachineError, PublishError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.cards import refuse_edited_cards, render_cards
from packager.pipeline.commit_messages import CommitMessages
from packager.pipeline.evaluate_stage import evaluate
from packager.pipeline.keep_sections import refuse_lost_sections
from packager.pipeline.plan import chosen_variants
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.pipeline.running import shown_while_running
from packager.pipeline.saved_publish import PlanFile, PlannedPublish
from packager.pipeline.stage_keys import STAGES, StageName
from packager.pipeline.task_stage import check_task_files, run_tasks
from packager.pipeline.verify_stage import run_loaders
from packager.pipeline.workspace import audit_or_raise
from packager.publish.after_publish import FinalStep, ReleaseTag
from packager.publish.branches import BranchContent, PublishReport, publish_branches
from packager.publish.hub_collection import HubCollection
from packager.publish.plan import PublishPlan
from packager.publish.sign_release import ReleaseSigner, SigningKeys
from packager.publish.targets import Target
from packager.publish.targets.resolve_target import target_of
from packager.receipt import PROVENANCE, README, Receipt
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile
from packager.system.posix import require_posix
from packager.system.scratch import ScratchFolder
from packager.system.terminal import Terminal
from packager.system.text import gibibytes
from packager.variant import MAIN


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """The receipts in the recipe's order, and the branches that each stage worked on."""

    receipts: tuple[Receipt, ...]
    quantized: tuple[str, ...]
    packed: tuple[str, ...]
    measured: tuple[str, ...]
    verified: tuple[str, ...]
    scored: tuple[str, ...]

    @property
    def nothing_to_do(self) -> bool:
        """Whether every stage was already done."""
        return not (self.packed or self.measured or self.verified or self.scored)


def build(recipe_file: RecipeFile, options: Options, terminal: Terminal, *, only: Collection[str] = ()) -> BuildResult:
    """Run every stage up to the card for each variant that needs it.

    Args:
        recipe_file: what is built.
        options: where and how.
        terminal: gets all messages.
        only: work on these branches alone. Cards name all variants, so they wait until every variant is there, and
            `publish` refuses what is not complete.

    Raises:
        PackagerError: of the stage that failed; everything finished before it is kept.
    """
    require_posix("build")
    run = BuildState(recipe_file, options, terminal, only)
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        run.read_receipts()
        check_task_files(run)
        _check_measuring_memory(run)
        quantized, packed = quantize_and_pack(run)
        measured = evaluate(run)
        verified = run_loaders(run)
        scored = run_tasks(run)
        receipts = run.ordered_receipts()
        _finish(run)
    result = BuildResult(
        receipts=receipts,
        quantized=quantized,
        packed=packed,
        measured=measured,
        verified=verified,
        scored=scored,
    )
    for text in floor_report(recipe_file, result.receipts):
        terminal.log(text)
    lacking = _loaders_not_run(result.receipts)
    if result.nothing_to_do:
        proven = not lacking and all(map(_is_proven, result.receipts))
        done = "built, measured and proven" if proven else "built and measured"
        terminal.log(f"{recipe_file.recipe.repository.id}: nothing to do, every variant is {done}")
    if lacking:
        terminal.log(f"not proven, required loaders did not run: {'; '.join(lacking)}")
    raise_failed(result.receipts)
    return result


def _finish(run: BuildState) -> None:
    """Render the cards if every variant is there, and delete the files of this run's work, not those of other runs."""
    unfinished = {each.variant.branch: None for stage in STAGES for each in run.missing(stage, anywhere=True)}
    if unfinished:
        run.terminal.log(f"no cards and nothing to publish until these are built: {', '.join(unfinished)}")
        for name in ("verify", "tasks", *(each.variant.branch for each in run.wanted)):
            shutil.rmtree(run.workspace.work / name, ignore_errors=True)
        return
    run.wanted = run.plan.variants  # a card names every variant
    render_cards(run)
    shutil.rmtree(run.workspace.work, ignore_errors=True)


def reverify(recipe_file: RecipeFile, options: Options, terminal: Terminal) -> tuple[Receipt, ...]:
    """Run the loaders again over every built variant and bring receipts and cards up to date.

    Raises:
        PublishError: a variant is not built.
    """
    run = BuildState(recipe_file, options, terminal)
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        run.read_receipts()
        _require_stages(run, "weights", "evaluate")
        run_loaders(run, again=True)
        render_cards(run)
    return run.ordered_receipts()


def render(recipe_file: RecipeFile, options: Options, terminal: Terminal, *, branch: str) -> str:
    """Render the cards of every built variant again and return one of them.

    Raises:
        PlanError: there is no such branch.
        PublishError: a variant is not built, measured and proven.
    """
    run = BuildState(recipe_file, options, terminal)
    chosen_variants(run.plan.variants, [branch], str(recipe_file.path))
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        run.read_receipts()
        _require_stages(run, *STAGES)
        render_cards(run)
    return (run.workspace.folder(branch) / README).read_text(encoding="utf-8")


def floor_report(recipe_file: RecipeFile, receipts: Sequence[Receipt]) -> list[str]:
    """Return a line for each variant that misses the recipe's floor, and a warning of a `main` far from fp16."""
    made = [receipt.provenance for receipt in receipts]
    return [*floor_lines(recipe_file.recipe, made), *far_lines(made, MAIN)]


def _is_proven(receipt: Receipt) -> bool:
    """Return whether a loader opened a variant and computed the right values."""
    return any(record.status == "passed" for record in receipt.provenance.loaders)


def _check_measuring_memory(run: BuildState) -> None:
    """Refuse, before anything is quantized, a limit of GPU memory that measuring is planned to exceed.

    Raises:
        MachineError: it is.
    """
    limit = run.options.gpu_memory_bytes
    if limit is None or not run.missing("evaluate") or run.device.type == "cpu":
        return
    if (needed := run.plan.evaluation.gpu.device_bytes) > limit:
        raise MachineError(
            "measuring does not fit into --gpu-memory",
            why=f"it is planned to need {gibibytes(needed)} GiB, the limit is {gibibytes(limit)} GiB",
            hint="give a higher --gpu-memory, or none",
        )


def _loaders_not_run(receipts: Sequence[Receipt]) -> list[str]:
    """Return each required loader that did not run on some variant, with the reason."""
    found = {
        f"{record.loader}: {record.reason}": None
        for receipt in receipts
        for record in receipt.provenance.loaders
        if record.required and record.status == "not run"
    }
    return list(found)


def raise_failed(receipts: Sequence[Receipt]) -> None:
    """Raise LoaderError if a loader failed to open a checkpoint or computed other values."""
    failed = [
        f"{receipt.provenance.branch}: {record.loader}: {record.reason}"
        for receipt in receipts
        for record in receipt.provenance.loaders
        if record.status == "failed"
    ]
    if failed:
        raise LoaderError(
            "a loader failed, or computed other values than our own forward pass",
            why="; ".join(failed),
            hint="the card shows it, too; packager verify runs the loaders again",
        )


def publish(
    recipe_file: RecipeFile,
    options: Options,
    terminal: Terminal,
    *,
    dry_run: bool,
    show_plan: Callable[[PublishPlan], None] = lambda _: None,
    consent: Callable[[PublishPlan], None] = lambda _: None,
    tag: str = "",
    keys: SigningKeys | None = None,
    plan_file: PlanFile | None = None,
) -> PublishReport:
    """Stage 10: bring the built folders to the target, one branch each, `main` last.

    Args:
        recipe_file: what was built.
        options: where the built folders are.
        terminal: gets a line per branch.
        dry_run: plan and check, write nothing.
        show_plan: gets the plan before the first effect; not called for a dry run, whose report holds it.
        consent: called with the plan before a change that others can see; raises to stop.
        tag: names main's commit at the end; "" for none.
        keys: the keys that sign the release; None publishes unsigned.
        plan_file: the approved plan, which must fit and names the tag; or where a dry run saves its plan, without
            checking that the target can be written to.

    Raises:
        PublishError: a variant is not built from this recipe, or a required loader has not passed.
        StalePlanError: the approved plan does not fit the build or the repository any more.
        AuditError, StateError: a folder is not fit to be published.
    """
    run, keys = BuildState(recipe_file, options, terminal), keys or SigningKeys()
    require_key(recipe_file, keys)
    target = target_of(run.recipe, options.local_target or options.dist, options.environ, terminal.log)
    approved = plan_file.approved if plan_file else None
    tag = approved.subject.tag if approved else tag
    planned = PlannedPublish(run, target, tag, plan_file) if plan_file else None
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        run.read_receipts()
        contents = _contents(run)
        with terminal.stage("publish"), ScratchFolder("signed") as scratch:
            return publish_branches(
                contents,
                target,
                terminal.log,
                signer=ReleaseSigner(run.recipe.repository.id, keys, scratch.path),
                final_steps=_final_steps(run, target, tag),
                dry_run=dry_run,
                show_plan=show_plan,
                confirm=consent if target.is_public and not approved else lambda _: None,
                compare=planned.compare if planned else None,
                describe=CommitMessages(run, target),
                inspect=partial(refuse_lost_sections, run, target),
                may_write=plan_file is None,
            )


def _contents(run: BuildState) -> list[BranchContent]:
    """Return the content of each branch; a variant that is not ready, or not fit to be published, is an error."""
    _require_stages(run, *STAGES)
    _refuse_trials(run.ordered_receipts())
    _require_cards(run)
    refuse_edited_cards(run)
    receipts = run.ordered_receipts()
    require_loaders(receipts, run.recipe.loaders.required)
    require_floor(run.recipe, receipts)
    folders = [run.workspace.folder(receipt.provenance.branch) for receipt in receipts]
    audit_or_raise(folders, run.plan.architecture, complete=True)
    return [_branch_content(receipt, folder) for receipt, folder in zip(receipts, folders, strict=True)]


def require_key(recipe_file: RecipeFile, keys: SigningKeys) -> None:
    """Raise PublishError if a recipe must be signed and there is no key, or has a layout that cannot be signed."""
    repository, where = recipe_file.recipe.repository, str(recipe_file.path)
    if repository.signed and keys.signer is None:
        why = "the recipe has repository.signed: true, and there is no key"
        raise PublishError("the release must be signed", where=where, why=why, hint="give the key with --sign-key")
    if keys.signer and repository.layout == "repos":
        why = "with layout: repos no branch holds a statement over all variants"
        raise PublishError("the release cannot be signed", where=where, why=why, hint="leave out --sign-key")


def _final_steps(run: BuildState, target: Target, tag: str) -> list[FinalStep]:
    """Return the steps after the last branch: the tag, and the collection of variants with their own repositories."""
    steps: list[FinalStep] = [ReleaseTag(target, tag)] if tag else []
    repository = run.recipe.repository
    if repository.target == "hub" and repository.layout == "repos":
        places = [repository.place(branch).repository for branch in sorted(run.keys, key=lambda name: name != MAIN)]
        title, private = f"{run.recipe.card.title} GPTQ", repository.visibility == "private"
        steps.append(HubCollection(title, places, private=private, log=run.terminal.log))
    return steps


def _require_stages(run: BuildState, *stages: StageName) -> None:
    for stage in stages:
        if outdated := run.missing(stage):
            raise PublishError(
                f"not every variant is ready: {', '.join(variant_plan.variant.branch for variant_plan in outdated)}",
                where=str(run.recipe_file.path),
                why=f"the stage {stage!r} has not been done with the present recipe and files",
                hint="run packager build first",
            )


def _refuse_trials(receipts: Sequence[Receipt]) -> None:
    """Raise PublishError for what was built with settings of the command line, whatever the recipe says now."""
    if tried := {receipt.provenance.branch: receipt.trial for receipt in receipts if receipt.trial}:
        raise PublishError(
            f"built for a trial: {', '.join(tried)}",
            why=" ".join(f"--set {setting}" for setting in next(iter(tried.values()))),
            hint="write the settings into the recipe and run packager build without --set; what has the same inputs is "
            "not built again",
        )


def _require_cards(run: BuildState) -> None:
    digest, lacking = run.recipe.digest(), []
    for branch, receipt in run.receipts.items():
        files, folder = receipt.provenance.files, run.workspace.folder(branch)
        rendered = PROVENANCE in files and all((folder / name).exists() for name in files)
        if not rendered or receipt.provenance.recipe_digest != digest:
            lacking.append(branch)
    if lacking:
        raise PublishError(
            f"the cards are not the present recipe's: {', '.join(lacking)}",
            where=str(run.recipe_file.path),
            hint="run packager card first",
        )


def _branch_content(receipt: Receipt, folder: Path) -> BranchContent:
    provenance = receipt.provenance
    return BranchContent(
        branch=provenance.branch,
        folder=folder,
        files=provenance.files,
        message=f"{provenance.branch}: GPTQ {provenance.parameters['bits']}-bit, made with {provenance.made_with}",
    )


def require_floor(recipe: Recipe, receipts: Sequence[Receipt]) -> None:
    """Raise PublishError if a variant misses the recipe's floor and the recipe does not publish it all the same."""
    held = [
        f"{made.branch}: {'; '.join(found)}"
        for made in (receipt.provenance for receipt in receipts)
        if made.quality is not None and made.branch not in allowed_below(recipe)
        if (found := floor_problems(made.quality, recipe.quality))
    ]
    if held:
        raise PublishError(
            "a variant misses the floor of the recipe's section quality",
            why="\n       ".join(held),
            hint="take it out of the recipe (nothing else is built again), change its parameters, or write "
            "publish_below_floor: true into the variant, which its record and card then say",
        )


def require_loaders(receipts: Sequence[Receipt], required: Sequence[str]) -> None:
    """Raise PublishError unless every required loader passed on every variant."""
    lacking = []
    for receipt in receipts:
        results = {record.loader: record for record in receipt.provenance.loaders}
        for name in required:
            record = results.get(name)
            if record is None:
                lacking.append(f"{receipt.provenance.branch}: {name} has no result")
            elif record.status != "passed":
                lacking.append(f"{receipt.provenance.branch}: {name} {record.status}: {record.reason}")
    if lacking:
        raise PublishError(
            "a required loader has not passed",
            why="; ".join(lacking),
            hint="run packager build with this output folder on a machine where the loader runs, or move the loader to "
            "loaders.if_available in the recipe",
        )
