"""What must hold before anything is published, or a stage runs alone: checked before the first effect."""

from collections.abc import Sequence
from pathlib import Path

from packager.card.floor import allowed_below, floor_problems
from packager.errors import PublishError
from packager.pipeline.build_state import BuildState
from packager.pipeline.cards import refuse_edited_cards
from packager.pipeline.stage_keys import STAGES, StageName
from packager.pipeline.workspace import audit_or_raise
from packager.publish.branches import BranchContent
from packager.publish.sign_release import SigningKeys
from packager.receipt import PROVENANCE, Receipt
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile


def checked_contents(run: BuildState) -> list[BranchContent]:
    """Return the content of each branch.

    Raises:
        PublishError: a variant is not ready, has not passed, or was built for a trial.
        AuditError, StateError: a folder is not fit to be published.
    """
    require_stages(run, *STAGES)
    _refuse_trials(run.ordered_receipts())
    _require_cards(run)
    refuse_edited_cards(run)
    receipts = run.ordered_receipts()
    _require_loaders(receipts, run.recipe.loaders.required)
    _require_floor(run.recipe, receipts)
    folders = [run.workspace.folder(receipt.provenance.branch) for receipt in receipts]
    audit_or_raise(folders, run.plan.architecture, complete=True)
    return [_branch_content(receipt, folder) for receipt, folder in zip(receipts, folders, strict=True)]


def _branch_content(receipt: Receipt, folder: Path) -> BranchContent:
    provenance = receipt.provenance
    return BranchContent(
        branch=provenance.branch,
        folder=folder,
        files=provenance.files,
        message=f"{provenance.branch}: GPTQ {provenance.parameters['bits']}-bit, made with {provenance.made_with}",
    )


def require_key(recipe_file: RecipeFile, keys: SigningKeys) -> None:
    """Raise PublishError if a recipe must be signed and there is no key, or has a layout that cannot be signed."""
    repository, where = recipe_file.recipe.repository, str(recipe_file.path)
    if repository.signed and keys.signer is None:
        why = "the recipe has repository.signed: true, and there is no key"
        raise PublishError("the release must be signed", where=where, why=why, hint="give the key with --sign-key")
    if keys.signer and repository.layout == "repos":
        why = "with layout: repos no branch holds a statement over all variants"
        raise PublishError("the release cannot be signed", where=where, why=why, hint="leave out --sign-key")


def require_stages(run: BuildState, *stages: StageName) -> None:
    """Raise PublishError unless the stages of all wanted variants are done with the present inputs."""
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
    """Raise PublishError unless the cards are there and are those of the present recipe."""
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


def _require_floor(recipe: Recipe, receipts: Sequence[Receipt]) -> None:
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


def _require_loaders(receipts: Sequence[Receipt], required: Sequence[str]) -> None:
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
