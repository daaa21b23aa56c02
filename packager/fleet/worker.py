"""One task of a recipe on one machine: bring what the store has, do what is left of the stage, give the store the rest.

A stage is what `build` and `publish` do; whether there is something left of it is decided from receipts and keys.
"""

import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from packager.errors import PackagerError, PlanError
from packager.fleet.open_store import open_store
from packager.fleet.shared_work import SharedWork
from packager.fleet.tasks import Task, TaskStage
from packager.inputs.source_files import list_source_files, read_small
from packager.model.devices import DeviceChoice
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.card_texts import read_card_texts, read_own_templates
from packager.pipeline.cards import render_cards
from packager.pipeline.evaluate_stage import evaluate
from packager.pipeline.flow import publish, raise_failed
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.pipeline.running import shown_while_running
from packager.pipeline.stage_keys import STAGES
from packager.pipeline.task_stage import check_task_files, run_tasks
from packager.pipeline.verify_stage import run_loaders
from packager.pipeline.workspace import Workspace
from packager.publish.sign_release import SigningKeys
from packager.receipt import digest_of
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_text
from packager.records import Record
from packager.system.files import bytes_record, sha256_file
from packager.system.terminal import Terminal


class TaskOrder(Record):
    """What a machine is told: paths and digests, nothing secret.

    Attributes:
        recipe: the path of the recipe, the same on every machine.
        repository: its repository's id.
        inputs: the digest of everything that determines the recipe's results, see `inputs_digest`.
        store: the URL of the store; "" for none: then one output folder has all that was made.
        stage: what is done.
        branches: of a sweep; none are all.
        device: where to compute.
        gpu_memory_bytes: see `Options`.
        local_target: the output folder with the local publishing target; "" for that of the machine.
    """

    recipe: str
    repository: str
    inputs: str
    store: str
    stage: TaskStage
    branches: tuple[str, ...] = ()
    device: DeviceChoice = "auto"
    gpu_memory_bytes: int | None = None
    local_target: str = ""

    def of(self, task: Task) -> "TaskOrder":
        """Return the order for a task of the same recipe."""
        return self.model_copy(update={"stage": task.stage, "branches": task.branches})


class TaskCall(Record):
    """What the process of a task is told: the order, and what is this machine's.

    Attributes:
        order: the task.
        folder: the output folder of this machine.
        cache: of the loaders' environments; "" for the usual one.
        drop: recipes whose files are deleted first.
        own_base_models: files of the Hub are kept in the output folder, by recipe, where they can be deleted.
    """

    order: TaskOrder
    folder: str
    cache: str = ""
    drop: tuple[str, ...] = ()
    own_base_models: bool = False


class TaskReport(Record):
    """What became of a task, as its process says on standard output.

    Attributes:
        why: it failed, one line; "" if it did not.
        exit_code: of the error; 0 if it did not fail.
    """

    why: str = ""
    exit_code: int = 0


def inputs_digest(run: BuildState) -> str:
    """Return the digest of everything that determines what is published of a recipe.

    That is what determines the weights and the figures (its stage keys), its lock, and the files that its cards are
    made of: texts, templates and licences, of which no stage key knows.

    Raises:
        CardError, RecipeError, SourceError: a file cannot be read.
    """
    file, card = run.recipe_file, run.recipe.card
    licenses = {name: sha256_file(file.resolve(name)) for name in card.license.files}
    if (base := run.recipe.base_model.path) is not None:
        folder = file.base_folder(base)
        there = list_source_files(folder, card.license.base_files).licenses
        licenses |= {f"of the base model: {name}": bytes_record(read_small(folder, name)).sha256 for name in there}
    own = read_own_templates(file)
    templates = own.files if own is not None else {}
    texts = [asdict(read_card_texts(file)), templates, licenses, lock_text(file.lock)]
    return digest_of([run.recipe.digest(), run.keys, texts])


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
    run = BuildState(recipe_file, options, terminal, order.branches)
    if inputs_digest(run) != order.inputs:
        raise PlanError(
            "this machine would build something else",
            where=order.recipe,
            why="its recipe, its local model or texts, or its version of packager is another one",
            hint="give all machines the same files and the same version",
        )
    shared = SharedWork(open_store(order.store, terminal.log), run.recipe.repository.id) if order.store else None
    with run.workspace.locked(), shown_while_running(run.workspace.running_path, terminal):
        if shared is not None:
            shared.pull(run.workspace, run.keys)
        if order.stage != "publish":
            run.read_receipts()
            _do(run, order.stage, shared)
            raise_failed(tuple(run.receipts.values()) if order.stage in ("verify", "card") else ())
    if order.stage == "publish":
        publish(recipe_file, options, terminal, dry_run=False, keys=keys)


def _do(run: BuildState, stage: TaskStage, shared: SharedWork | None) -> None:
    """Do what is left of a stage; what is finished goes to the store even if the stage fails.

    A sweep leaves only its blocks in the store. The branches are sent while they are evaluated: a GPU that waited for
    them would compute nothing. If the machine is lost before, another one makes them of the blocks.
    """
    run.block_copies = shared.blocks if shared else None
    with ThreadPoolExecutor(1) as sender:
        sent = sender.submit(_send, run, shared) if shared is not None and stage == "evaluate" else None

        def send_rest() -> None:
            if sent is not None:
                sent.result()
            if shared is not None and stage not in ("fetch", "sweep"):
                _send(run, shared)

        try:
            _do_stage(run, stage)
        except BaseException:
            try:
                send_rest()
            except PackagerError as error:  # the stage's own error is the one to tell
                run.terminal.log(f"what was finished did not get to the store: {error}")
            raise
        send_rest()


def _do_stage(run: BuildState, stage: TaskStage) -> None:
    """Do what is left of a stage; where it computes, also what a lost machine had not sent of earlier ones."""
    if stage == "fetch":
        check_task_files(run)
        if any(map(run.missing, STAGES)) or run.loaders_to_run():
            _ = run.texts  # opens the base model, too
    elif stage == "card":
        render_cards(run)
        shutil.rmtree(run.workspace.work, ignore_errors=True)
    else:
        quantize_and_pack(run)
        if stage != "sweep":
            evaluate(run)
        if stage == "verify":
            run_loaders(run)
            run_tasks(run)


def _send(run: BuildState, shared: SharedWork) -> None:
    """Bring to the store what is finished and is not there.

    Beside it a sweep may finish other branches, whose blocks stay until these branches are sent, too.
    """
    none_unfinished = not run.missing("weights", anywhere=True)
    shared.push(run.workspace, [each.variant.branch for each in run.wanted if each.variant.branch in run.receipts])
    if none_unfinished:
        shared.drop_blocks()


def drop_recipes(folder: Path, repositories: Collection[str]) -> None:
    """Delete what a machine has of recipes: their builds and receipts, which the store has, and their base models."""
    for repository in repositories:
        workspace = Workspace(dist=folder, repository=repository)
        builds, receipts = workspace.folder("main").parent, workspace.receipt_path("main").parent
        for path in (builds, receipts, workspace.work, workspace.rows.parent, workspace.base_scores.parent):
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(base_model_folder(folder, repository), ignore_errors=True)


def base_model_folder(folder: Path, repository: str) -> Path:
    """Return where a machine with a bounded disk keeps the Hub's files of one recipe, so that they can be deleted."""
    return folder / "base-models" / repository.replace("/", "--")
