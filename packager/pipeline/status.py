"""The state of every variant: built, measured, verified and published, as read from `dist/`."""

from dataclasses import dataclass
from typing import Literal

from packager.errors import StateError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.running import RunningBuild, read_running
from packager.pipeline.stage_keys import STAGES, StageName
from packager.pipeline.workspace import Workspace
from packager.publish.targets import BranchState
from packager.publish.targets.resolve_target import target_of
from packager.receipt import Receipt
from packager.recipe.file import RecipeFile
from packager.system.parallel import in_parallel
from packager.system.terminal import Terminal

State = Literal["built", "not built", "unfinished", "outdated", "edited"]


@dataclass(frozen=True, kw_only=True)
class BranchStatus:
    """One variant's state.

    Attributes:
        branch: the variant.
        state: of its folder; an outdated one was made from another recipe or other files, of an unfinished one only
            blocks are there.
        blocks_done: finished blocks of a variant that is not built; a changed recipe may not use them.
        num_blocks: of the base model.
        receipt: of a built folder, else None.
        stages_missing: the stages that have not been done with the present recipe and files.
        commit: the published head, "" if there is none, None if the target was not read.
        problem: why an edited folder or receipt cannot be used, or "".
    """

    branch: str
    state: State
    blocks_done: int
    num_blocks: int
    receipt: Receipt | None
    stages_missing: tuple[StageName, ...]
    commit: str | None
    problem: str


def read_status(recipe_file: RecipeFile, options: Options) -> tuple[BranchStatus, ...]:
    """Return every variant's state, in the recipe's order; nothing is changed."""
    run = BuildState(recipe_file, options, Terminal(quiet=True))
    problems = _read_receipts(run)
    missing = {stage: {variant_plan.variant.branch for variant_plan in run.missing(stage)} for stage in STAGES}
    # A remote target is not read here: `packager verify-published` reads it.
    local = run.recipe.repository.target == "local"
    target = target_of(run.recipe, run.workspace.dist, options.environ, run.terminal.log)
    published = target.read_branches() if local else {}
    return tuple(
        BranchStatus(
            branch=branch,
            state=_state(run, branch, problems),
            blocks_done=run.workspace.blocks_done(branch),
            num_blocks=run.plan.architecture.num_blocks,
            receipt=run.receipts.get(branch),
            stages_missing=tuple(stage for stage in STAGES if branch in missing[stage]),
            commit=_head(published.get(branch)) if local else None,
            problem=problems.get(branch, ""),
        )
        for branch in run.keys
    )


def _head(state: BranchState | None) -> str:
    return state.commit if state else ""


def _read_receipts(run: BuildState) -> dict[str, str]:
    """Read each variant's receipt; return, by branch, why a folder or a receipt cannot be used."""

    def read(branch: str) -> Receipt | StateError | None:
        try:
            return run.read_receipt(branch)
        except StateError as error:
            return error

    problems = {}
    for branch, found in zip(run.keys, in_parallel(read, list(run.keys)), strict=True):
        if isinstance(found, StateError):
            problems[branch] = str(found)
        elif found is not None:
            run.receipts[branch] = found
    return problems


def _state(run: BuildState, branch: str, problems: dict[str, str]) -> State:
    if branch in problems:
        return "edited"
    if branch in run.receipts:
        return "built"
    if run.workspace.blocks_done(branch):
        return "unfinished"
    return "outdated" if run.workspace.folder(branch).exists() else "not built"


def running_build(recipe_file: RecipeFile, options: Options) -> RunningBuild | None:
    """Return what the build of a recipe does now, None if none runs."""
    workspace = Workspace(dist=options.dist, repository=recipe_file.recipe.repository.id)
    return read_running(workspace.running_path) if workspace.is_locked() else None


def status_json(recipe_file: RecipeFile, options: Options) -> dict[str, object]:
    """Return the state of every variant as values that `json` can write."""
    running = running_build(recipe_file, options)
    return {
        "repository": recipe_file.recipe.repository.id,
        "running": running.model_dump(mode="json") if running else None,
        "branches": [
            {
                "branch": status.branch,
                "state": status.state,
                "blocks_done": status.blocks_done,
                "num_blocks": status.num_blocks,
                "commit": status.commit or None,
                "stages_missing": list(status.stages_missing),
                "problem": status.problem or None,
                "receipt": status.receipt.model_dump(mode="json") if status.receipt else None,
            }
            for status in read_status(recipe_file, options)
        ],
    }
