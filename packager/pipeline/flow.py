"""The flow, top-down: `build` turns a recipe into proven folders with cards, `publish` turns folders into branches.

`build` never publishes and `publish` never builds; each reads the other's files, so both can be killed at any point
and run again, on this machine or another.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

from packager.card.floor import far_lines, floor_lines
from packager.errors import LoaderError, MachineError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.cards import render_cards
from packager.pipeline.commit_messages import CommitMessages
from packager.pipeline.evaluate_stage import evaluate
from packager.pipeline.keep_sections import refuse_lost_sections
from packager.pipeline.plan import chosen_variants
from packager.pipeline.publish_checks import checked_contents, require_key, require_stages
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.pipeline.running import shown_while_running
from packager.pipeline.saved_publish import PlanFile, PlannedPublish
from packager.pipeline.stage_keys import STAGES
from packager.pipeline.task_stage import check_task_files, run_tasks
from packager.pipeline.verify_stage import run_loaders
from packager.publish.after_publish import FinalStep, ReleaseTag
from packager.publish.branches import PublishReport, publish_branches
from packager.publish.hub_collection import HubCollection
from packager.publish.plan import PublishPlan
from packager.publish.sign_release import ReleaseSigner, SigningKeys
from packager.publish.targets import Target
from packager.publish.targets.resolve_target import target_of
from packager.receipt import README, Receipt
from packager.recipe.file import RecipeFile
from packager.system.posix import require_posix
from packager.system.scratch import ScratchFolder
from packager.system.terminal import Terminal
from packager.system.text import gigabytes
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
    for text in _floor_report(recipe_file, result.receipts):
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
        require_stages(run, "weights", "evaluate")
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
        require_stages(run, *STAGES)
        render_cards(run)
    return (run.workspace.folder(branch) / README).read_text(encoding="utf-8")


def _floor_report(recipe_file: RecipeFile, receipts: Sequence[Receipt]) -> list[str]:
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
            why=f"it is planned to need {gigabytes(needed)} GB, the limit is {gigabytes(limit)} GB",
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
        contents = checked_contents(run)
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


def _final_steps(run: BuildState, target: Target, tag: str) -> list[FinalStep]:
    """Return the steps after the last branch: the tag, and the collection of variants with their own repositories."""
    steps: list[FinalStep] = [ReleaseTag(target, tag)] if tag else []
    repository = run.recipe.repository
    if repository.target == "hub" and repository.layout == "repos":
        places = [repository.place(branch).repository for branch in sorted(run.keys, key=lambda name: name != MAIN)]
        title, private = f"{run.recipe.card.title} GPTQ", repository.visibility == "private"
        steps.append(HubCollection(title, places, private=private, log=run.terminal.log))
    return steps
