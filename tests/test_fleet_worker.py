"""Tasks of one recipe on several machines that share a store."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from packager.errors import MachineError, PlanError, QuantizeError, StateError
from packager.fleet import worker
from packager.fleet.store import FolderStore

if TYPE_CHECKING:
    from packager.fleet.worker import TaskOrder
    from tests.tiny_recipe import Builds

REPOSITORY = "tester/tiny-GPTQ"


class Fleet:
    """Machines with a folder each, a store, and a recipe."""

    def __init__(self, root: Path, recipe: Path) -> None:
        from packager.fleet.worker import inputs_digest
        from packager.pipeline.build_state import BuildState
        from packager.recipe.file import RecipeFile
        from packager.system.terminal import Terminal
        from tests.tiny_recipe import options

        self.root, self.recipe = root, recipe
        self.inputs = inputs_digest(BuildState(RecipeFile.load(recipe), options(root), Terminal(quiet=True)))
        self.store = FolderStore(root / "store")

    def order(self, stage: str, *branches: str) -> "TaskOrder":
        from packager.fleet.worker import TaskOrder

        return TaskOrder.model_validate(
            {"recipe": str(self.recipe), "repository": REPOSITORY, "inputs": self.inputs,
             "store": str(self.root / "store"), "stage": stage, "branches": branches}
        )  # fmt: skip

    def run(self, machine: str, stage: str, *branches: str) -> None:
        from packager.fleet.worker import run_task
        from packager.system.terminal import Terminal
        from tests.tiny_recipe import options

        run_task(self.order(stage, *branches), options(self.root / machine), Terminal(quiet=True))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    from tests.tiny_recipe import write_all

    return Fleet(tmp_path, write_all(tmp_path / "recipe"))


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_machines_that_share_a_recipe_make_the_bytes_of_one(fleet: Fleet, tmp_path: Path) -> None:
    from packager.pipeline import flow
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal
    from tests.tiny_recipe import ACT_ORDER, MAIN, THREE_BITS, options

    flow.build(RecipeFile.load(fleet.recipe), options(tmp_path / "alone"), Terminal(quiet=True))
    fleet.run("one", "fetch")
    fleet.run("one", "sweep", MAIN)
    fleet.run("two", "sweep", ACT_ORDER, THREE_BITS)
    fleet.run("three", "evaluate")
    fleet.run("one", "verify")
    fleet.run("two", "card")
    fleet.run("publisher", "publish")
    alone, together = (files_below(tmp_path / name / "builds") for name in ("alone", "publisher"))
    assert together == alone
    assert (tmp_path / "publisher" / "hub" / "models" / REPOSITORY / "README.md").is_file()
    before = files_below(tmp_path / "publisher" / "hub")
    fleet.run("publisher", "publish")  # again, as after a lost answer: nothing is doubled
    heads = [name for name in before if "/refs/heads/" in name]
    assert heads
    assert {name: before[name] for name in heads} == {
        name: data for name, data in files_below(tmp_path / "publisher" / "hub").items() if name in heads
    }


class MachineLost(BaseException):
    """The end of a machine, which nothing catches."""


@pytest.mark.slow
def test_a_lost_task_goes_on_after_its_last_block_elsewhere(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.fleet.shared_work import SharedBlocks
    from tests.tiny_recipe import MAIN

    save: Callable[..., None] = SharedBlocks.save
    saved: list[int] = []

    def lose(self: SharedBlocks, block: int, journal: bytes, data: bytes) -> None:
        save(self, block, journal, data)
        saved.append(block)
        raise MachineLost

    monkeypatch.setattr(SharedBlocks, "save", lose)
    with pytest.raises(MachineLost):
        fleet.run("lost", "sweep", MAIN)
    assert saved == [0]
    monkeypatch.setattr(SharedBlocks, "save", lambda self, *rest: (save(self, *rest), saved.append(rest[0])))
    fleet.run("other", "sweep", MAIN)
    assert saved[1:] == list(range(1, saved[-1] + 1)), "block 0 is not computed again"
    fleet.run("third", "evaluate", MAIN)  # the other one was lost, too, before it had sent what it made
    assert saved[-1] == len(saved) - 1, "nothing is computed again"
    assert fleet.store.names(f"{REPOSITORY}/blocks/{MAIN}") == []
    fleet.store.delete(REPOSITORY)
    fleet.run("alone", "sweep", MAIN)
    alone, *others = (files_below(tmp_path / name / "builds") for name in ("alone", "other", "third"))
    assert others == [alone, alone]


def test_branches_are_sent_while_they_are_evaluated(
    builds: "Builds", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.fleet.shared_work import SharedWork
    from tests.tiny_recipe import BRANCHES

    fleet = Fleet(tmp_path, builds.copy(tmp_path / "recipe"))
    (tmp_path / "recipe" / "dist").rename(tmp_path / "one")
    shared = SharedWork(fleet.store, REPOSITORY)
    fleet.run("one", "sweep")
    assert fleet.store.names(REPOSITORY) == [], "a GPU would wait for it"

    def evaluate(_: object) -> None:
        deadline = time.monotonic() + 30
        while not all(map(shared.receipt, BRANCHES)):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    monkeypatch.setattr("packager.fleet.worker.evaluate", evaluate)
    fleet.run("one", "evaluate")


def test_blocks_of_a_branch_that_is_finished_while_others_are_sent_stay() -> None:
    from packager.fleet.worker import _send

    done: list[object] = []
    finished = {"main": None}

    def push(_: object, branches: list[str]) -> None:
        done.append(branches)
        finished["other"] = None  # a sweep beside it ends now

    variants = [SimpleNamespace(variant=SimpleNamespace(branch=branch)) for branch in ("main", "other")]
    run: Any = SimpleNamespace(
        wanted=variants, receipts=finished, workspace=None,
        missing=lambda _, **__: [each for each in variants if each.variant.branch not in finished],
    )  # fmt: skip
    shared: Any = SimpleNamespace(push=push, drop_blocks=lambda: done.append("dropped"))
    _send(run, shared)
    assert done == [["main"]]
    _send(run, shared)
    assert done[1:] == [["main", "other"], "dropped"]


def test_a_machine_with_another_recipe_refuses_the_task(fleet: Fleet) -> None:
    text = fleet.recipe.read_text()
    fleet.recipe.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PlanError, match="would build something else"):
        fleet.run("one", "fetch")


FILES_OF_A_CARD = {
    "header.md": "card.header", "footer.md": "card.footer", "original.md": "card.original_card",
    "templates/_banner.md.j2": "card.templates", "LICENSE.txt": "card.license.files",
    "model/NOTICE": "card.license.base_files",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe_with_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that names a file of each kind that its cards are made of."""
    from tests.tiny_recipe import write_inputs, write_recipe

    folder = write_inputs(tmp_path_factory.mktemp("texts"))
    (folder / "templates").mkdir()
    for name in FILES_OF_A_CARD:
        (folder / name).write_text("Before.\n")
    texts = {key: name for name, key in FILES_OF_A_CARD.items() if name.endswith(".md")}
    licenses = {"card.license.files": ["LICENSE.txt"], "card.license.base_files": ["NOTICE"]}
    return write_recipe(folder, {**texts, **licenses, "card.templates": "templates"})


@pytest.mark.parametrize("name", FILES_OF_A_CARD)
def test_a_changed_file_of_the_card_is_another_release(name: str, recipe_with_texts: Path, tmp_path: Path) -> None:
    """What was published from other texts is not taken for what would be published now."""
    from packager.fleet.worker import inputs_digest
    from packager.pipeline.build_state import BuildState
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal
    from tests.tiny_recipe import options

    def digest() -> str:
        return inputs_digest(BuildState(RecipeFile.load(recipe_with_texts), options(tmp_path), Terminal(quiet=True)))

    path, before = recipe_with_texts.parent / name, digest()
    path.write_text("After.\n")
    changed = digest()
    path.write_text("Before.\n")
    assert (changed != before, digest()) == (True, before)


def test_what_is_left_is_decided_from_folders_too(tmp_path: Path, builds: "Builds") -> None:
    """Receipts whose folders were deleted are no builds: neither without a store, nor where a store has them."""
    from packager.fleet.build_requests import Needs, fleet_recipe
    from packager.fleet.shared_work import SharedWork
    from packager.pipeline.build_state import BuildState
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal
    from tests.tiny_recipe import BRANCHES, MAIN, options, workspace

    recipe, dist, here = builds.copy(tmp_path), tmp_path / "dist", workspace(tmp_path / "dist")

    def stages() -> list[str]:
        run = BuildState(RecipeFile.load(recipe), options(dist), Terminal(quiet=True))
        needs = Needs(gpus=0, publishing=True, local_target=dist)
        return [task.stage for task in fleet_recipe(run, needs).request.tasks]

    shared = SharedWork(FolderStore(tmp_path / "store"), REPOSITORY)
    shared.push(here, BRANCHES)
    assert stages() == ["fetch", "card", "publish"]
    before = files_below(dist / "builds")
    shutil.rmtree(here.folder(MAIN).parent)
    assert stages() == ["fetch", "sweep", "evaluate", "verify", "card", "publish"]
    shared.pull(here, BRANCHES)
    assert files_below(dist / "builds") == before
    # A receipt says where it is written: only that of the branch that was asked for is taken.
    name = f"{REPOSITORY}/receipts/{MAIN}.json"
    receipt = json.loads((tmp_path / "store" / name).read_bytes())
    for key, value in (("branch", "../../../outside"), ("repository", "another/one")):
        changed = {**receipt, "provenance": {**receipt["provenance"], key: value}}
        (tmp_path / "store" / name).write_text(json.dumps(changed))
        with pytest.raises(StateError, match="another branch's"):
            shared.pull(workspace(tmp_path / "other"), [MAIN])
    assert not list(tmp_path.rglob("*outside*"))


def test_what_is_quantized_for_losses_takes_disk_and_the_blocks_a_store(tmp_path: Path) -> None:
    from packager.fleet.build_requests import Needs, fleet_recipe
    from packager.pipeline.build_state import BuildState
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal
    from tests.tiny_recipe import options, write_all

    mix = {"branch": "mixed", "mix": {"bits": [4, 8], "mean": 4.5}}
    recipe = write_all(tmp_path, {"variants": [{"branch": "main", "bits": 3}, mix]})
    run = BuildState(RecipeFile.load(recipe), options(tmp_path), Terminal(quiet=True))
    request = fleet_recipe(run, Needs(gpus=0, publishing=True, local_target=tmp_path)).request
    main, mixed = run.plan.variants
    builds = main.weights_bytes + mixed.weights_bytes
    losses = sum(width.weights_bytes for width in mixed.widths)
    assert losses > builds
    assert request.disk_bytes == builds + losses
    assert request.store_bytes == builds + losses + mixed.weights_bytes


def test_blocks_leave_the_store_when_they_are_part_of_a_branch(tmp_path: Path, builds: "Builds") -> None:
    """Those that were made for losses alone leave it when no branch is unfinished; a branch's files stay."""
    from packager.fleet.shared_work import SharedWork
    from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, workspace

    fleet = Fleet(tmp_path, builds.copy(tmp_path / "recipe"))
    (tmp_path / "recipe" / "dist").rename(tmp_path / "one")
    shared, here = SharedWork(fleet.store, REPOSITORY), workspace(tmp_path / "one")
    for branch in (MAIN, ACT_ORDER, "mixed at 4 bits"):
        shared.blocks(branch).save(0, b"{}", branch.encode())
    assert shared.blocks(MAIN).journal(0) == b"{}"
    assert shared.blocks(MAIN).data(hashlib.sha256(MAIN.encode()).hexdigest()) == MAIN.encode()
    shared.push(here, [MAIN])
    left = {name.split("/")[3] for name in fleet.store.names(f"{REPOSITORY}/blocks")}
    assert left == {ACT_ORDER, "mixed at 4 bits"}
    fleet.run("one", "evaluate")
    assert fleet.store.names(f"{REPOSITORY}/blocks") == []
    receipts = [shared.receipt(branch) for branch in BRANCHES]
    named = {record.sha256 for receipt in receipts if receipt for record in receipt.provenance.files.values()}
    assert {name.split("/")[3] for name in fleet.store.names(f"{REPOSITORY}/objects")} == named


@pytest.mark.parametrize("stage", ["evaluate", "verify"])
def test_the_error_of_a_stage_is_told_where_the_store_fails_too(monkeypatch: pytest.MonkeyPatch, stage: Any) -> None:
    def fail(error: Exception) -> Any:
        def failing(*_: object) -> None:
            raise error

        return failing

    said: list[str] = []
    run: Any = SimpleNamespace(block_copies=None, terminal=SimpleNamespace(log=said.append))
    monkeypatch.setattr(worker, "_send", fail(MachineError("the store is away")))
    monkeypatch.setattr(worker, "_do_stage", fail(QuantizeError("the model is broken")))
    with pytest.raises(QuantizeError, match="the model is broken"):
        worker._do(run, stage, SimpleNamespace(blocks=None))  # type: ignore[arg-type]
    assert said == ["what was finished did not get to the store: the store is away"]
    monkeypatch.setattr(worker, "_do_stage", lambda *_: None)
    with pytest.raises(MachineError, match="the store is away"):
        worker._do(run, stage, SimpleNamespace(blocks=None))  # type: ignore[arg-type]
