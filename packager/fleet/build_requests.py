"""A recipe as the scheduler and the machines see it: which tasks are left, what they need, what machines are told."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packager import __version__
from packager.fleet.recipe_state import read_recipe_state
from packager.fleet.shared_work import SharedWork
from packager.fleet.store import Store
from packager.fleet.tasks import BuildRequest, Task, TaskStage
from packager.fleet.worker import TaskOrder, inputs_digest
from packager.pipeline.build_state import BuildState
from packager.publish.targets.resolve_target import is_local_repository

LIGHT_CPUS = 0.25  # of a task that mostly waits for a network


@dataclass(frozen=True, kw_only=True)
class FleetRecipe:
    """A recipe in a fleet.

    Attributes:
        path: of the recipe.
        request: what the scheduler gets; without tasks if nothing is left.
        order: what machines are told, whatever the stage.
        recipe_digest: of the recipe's keys, without its inputs.
    """

    path: Path
    request: BuildRequest
    order: TaskOrder
    recipe_digest: str


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What tasks take, and where their results go.

    Attributes:
        gpus: of a task that computes; 0 on machines without any.
        publishing: otherwise recipes are built only.
        store: what machines share; None for one machine alone.
        store_url: its URL, "" for none.
        local_target: the output folder with the local publishing target.
        priorities: by recipe; 0 where none is given.
    """

    gpus: int
    publishing: bool
    store: Store | None = None
    store_url: str = ""
    local_target: Path
    priorities: Mapping[Path, int] = field(default_factory=dict)


def fleet_recipe(run: BuildState, needs: Needs) -> FleetRecipe:
    """Return what is left of a recipe, as far as its receipts say; a machine finds out the rest.

    Raises:
        SourceError: a local base model cannot be read.
        CardError: a text of the card cannot be read.
        StateError: a receipt in the store cannot be read; without a store, a built folder differs from its receipt.
    """
    repository, path = run.recipe.repository.id, run.recipe_file.path
    order = TaskOrder(
        recipe=str(path.absolute()),
        repository=repository,
        inputs=inputs_digest(run),
        store=needs.store_url,
        stage="fetch",
        device=run.options.device if needs.gpus or run.options.device != "auto" else "cpu",
        gpu_memory_bytes=run.options.gpu_memory_bytes,
        local_target=str(needs.local_target.absolute()),
    )
    stages = [] if needs.publishing and _is_published(run, needs, order.inputs) else _stages(run, needs)
    plan = run.plan
    builds, losses, download = plan.disk.builds_bytes, plan.disk.losses_bytes, plan.disk.source_bytes
    computing = {"gpus": needs.gpus, "cpus": 1.0}

    def task(stage: TaskStage) -> Task:
        if stage == "fetch":
            return Task(recipe=repository, stage=stage, cpus=LIGHT_CPUS, download_bytes=download)
        if stage == "publish":
            commits = len(plan.variants) + 1
            return Task(recipe=repository, stage=stage, cpus=LIGHT_CPUS, upload_bytes=builds, commits=commits)
        if stage == "card":
            return Task(recipe=repository, stage=stage, cpus=LIGHT_CPUS)
        return Task(recipe=repository, stage=stage, **computing)  # type: ignore[arg-type]

    request = BuildRequest(
        recipe=repository,
        tasks=tuple(map(task, stages)),
        disk_bytes=builds + losses + download,
        # When branches are sent the store has all blocks, and the files of one: the blocks of a branch leave it then.
        store_bytes=builds + losses + max(variant_plan.weights_bytes for variant_plan in plan.variants),
        priority=needs.priorities.get(path, 0),
    )
    return FleetRecipe(path=path, request=request, order=order, recipe_digest=run.recipe.digest())


def _is_published(run: BuildState, needs: Needs, inputs: str) -> bool:
    repository = run.recipe.repository
    state = read_recipe_state(needs.store, repository.id) if needs.store is not None else None
    if state is None or (state.state, state.inputs, state.version) != ("published", inputs, __version__):
        return False
    if repository.target != "local":
        return True
    # The store does not say in which output folder it was published.
    names = {repository.place(each.variant.branch).repository for each in run.plan.variants}
    return all(is_local_repository(needs.local_target / "hub" / "models" / name) for name in names)


def _stages(run: BuildState, needs: Needs) -> list[TaskStage]:
    """Return the stages that are left: those after the last one that every branch has behind it, but for the cards."""
    after: list[TaskStage] = ["card", "publish"] if needs.publishing else ["card"]
    if needs.store is None:
        run.read_receipts()  # only of folders that are there
    else:
        shared = SharedWork(needs.store, run.recipe.repository.id)
        for branch, keys in run.keys.items():
            receipt = shared.receipt(branch)
            if receipt is not None and receipt.stages.get("weights") == keys["weights"]:
                run.receipts[branch] = receipt
    if run.missing("weights"):
        return ["fetch", "sweep", "evaluate", "verify", *after]
    if run.missing("evaluate"):
        return ["fetch", "evaluate", "verify", *after]
    if run.missing("verify") or run.missing("tasks") or run.loaders_to_run():
        return ["fetch", "verify", *after]
    return ["fetch", *after]
