"""One task of a recipe on one machine: bring what the store has, do what is left of the stage, give the store the rest.

A stage is what `build` and `publish` do; whether there is something left of it is decided from receipts and keys.
"""

from collections.abc import Mapping
from pathlib import Path

from packager.errors import PlanError
from packager.fleet.shared_work import SharedWork
from packager.fleet.store import open_store
from packager.fleet.tasks import TaskStage
from packager.pipeline.build_state import BuildState, Options, stage_keys
from packager.pipeline.cards import render_cards
from packager.pipeline.flow import publish, raise_failed
from packager.pipeline.plan import make_plan
from packager.pipeline.running import shown_while_running
from packager.pipeline.stages import evaluate, quantize_and_pack, run_loaders
from packager.publish.sign_release import SigningKeys
from packager.receipt import digest_of
from packager.recipe.file import RecipeFile
from packager.records import Record
from packager.system.terminal import Terminal


class TaskOrder(Record):
    """What a machine is told: paths and digests, nothing secret.

    Attributes:
        recipe: the path of the recipe, the same on every machine.
        inputs: the digest of everything that determines the recipe's results, see `inputs_digest`.
        store: the URL of the store.
        stage: what is done.
        branches: of a sweep; none are all.
    """

    recipe: str
    inputs: str
    store: str
    stage: TaskStage
    branches: tuple[str, ...] = ()


def inputs_digest(recipe_file: RecipeFile) -> str:
    """Return the digest of everything that determines what is made of a recipe: its stage keys and its texts."""
    keys: dict[str, Mapping[str, str]] = {
        variant_plan.variant.branch: stage_keys(recipe_file, variant_plan)
        for variant_plan in make_plan(recipe_file).variants
    }
    return digest_of([recipe_file.recipe.digest(), keys])


def run_task(order: TaskOrder, options: Options, terminal: Terminal, *, keys: SigningKeys | None = None) -> None:
    """Do a task.

    Args:
        order: the task.
        options: `dist` is the output folder of this machine, or for a local target the one with the published folder.
        terminal: gets all messages.
        keys: see `flow.publish`.

    Raises:
        PlanError: this machine has another recipe, other local inputs or another version of packager.
        PackagerError: of the stage.
    """
    recipe_file = RecipeFile.load(Path(order.recipe))
    if inputs_digest(recipe_file) != order.inputs:
        raise PlanError(
            "this machine would build something else",
            where=order.recipe,
            why="its recipe, its local model or texts, or its version of packager is another one",
            hint="give all machines the same files and the same version",
        )
    run = BuildState(recipe_file, options, terminal, order.branches)
    shared = SharedWork(open_store(order.store), run.recipe.repository.id)
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        shared.pull(run.workspace, run.keys)
        if order.stage != "publish":
            run.read_receipts()
            _do(run, order.stage, shared)
            raise_failed(tuple(run.receipts.values()) if order.stage in ("verify", "card") else ())
    if order.stage == "publish":
        publish(recipe_file, options, terminal, dry_run=False, keys=keys)


def _do(run: BuildState, stage: TaskStage, shared: SharedWork) -> None:
    """Do what is left of a stage; what is finished goes to the store even if the stage fails."""
    try:
        if stage == "fetch":
            _ = run.texts  # opens the base model, too
        elif stage == "sweep":
            run.block_copies = shared.blocks
            quantize_and_pack(run)
        elif stage == "evaluate":
            evaluate(run)
        elif stage == "verify":
            run_loaders(run)
        else:
            render_cards(run)
    finally:
        shared.push(run.workspace, [each.variant.branch for each in run.wanted if each.variant.branch in run.receipts])
