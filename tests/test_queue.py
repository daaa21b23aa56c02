"""`packager queue`: recipes as requests, their states from a store or from this machine's output folder, the page."""

import errno
import json
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from packager import __version__
from packager.card.report import html_page
from packager.cli.main import app
from packager.cli.queue_view import print_queue, watch_queue
from packager.errors import MachineError, UsageError
from packager.fleet.leases import Lease
from packager.fleet.open_store import open_store
from packager.fleet.queue import STATES, QueueEntry, queue_values, queued_recipes, read_queue
from packager.fleet.recipe_state import RecipeState, write_recipe_state
from packager.fleet.store import Store
from packager.fleet.tasks import QueueState
from packager.pipeline.running import shown_while_running
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.test_card_width import BROWSER
from tests.test_report import HOSTILE, Page, requests_and_messages
from tests.tiny_recipe import REPOSITORY, Builds


def queue(*words: object, exit_code: int = 0) -> str:
    done = CliRunner().invoke(app, ["queue", *map(str, words)], prog_name="packager")
    assert done.exit_code == exit_code, done.stderr
    return done.stdout if exit_code == 0 else done.stderr


def as_json(*words: object) -> list[dict[str, Any]]:
    found = json.loads(queue(*words, "--format", "json"))
    assert found["schema_version"] == 1
    assert sum(found["counts"].values()) == len(found["recipes"])
    return list(found["recipes"])


def states(*words: object) -> dict[str, tuple[str, str]]:
    return {each["name"]: (each["state"], each["why"]) for each in as_json(*words)}


def state_of(recipe: Path, named: QueueState, **changes: Any) -> RecipeState:
    values: dict[str, Any] = {
        "state": named, "stage": "sweep", "machine": "node-3", "why": "", "run": "the run", "updated_at": 1e9,
        "inputs": "", "recipe_digest": RecipeFile.load(recipe).recipe.digest(), "version": __version__,
    }  # fmt: skip
    return RecipeState.model_validate({**values, **changes})


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """A folder with one recipe that can be planned, and its inputs."""
    tiny_recipe.write_all(tmp_path / "requests")
    return tmp_path / "requests"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_every_recipe_of_a_folder_is_a_request(requests: Path, tmp_path: Path) -> None:
    (requests / "more").mkdir()
    (requests / "more" / "broken.yaml").write_text("schema_version: [")
    (requests / "more" / "same.yml").write_text((requests / "recipe.yaml").read_text().replace('"model"', '"../model"'))
    (requests / ".github").mkdir()
    (requests / ".github" / "ci.yaml").write_text("on: push")
    (requests / "notes.md").write_text("none")
    found = {each["name"]: each for each in as_json(requests, "--dist", tmp_path / "dist")}
    assert list(found) == ["more/broken.yaml", "more/same.yml", "recipe.yaml"]
    assert (found["recipe.yaml"]["state"], found["recipe.yaml"]["repository"]) == ("requested", REPOSITORY)
    assert found["recipe.yaml"]["path"] == str(requests / "recipe.yaml")
    assert found["more/broken.yaml"]["state"] == "parked"
    assert "line 1" in found["more/broken.yaml"]["why"] or "broken.yaml:1" in found["more/broken.yaml"]["why"]
    assert found["more/same.yml"]["state"] == "parked"


def test_a_link_out_of_the_folder_is_not_read(requests: Path, tmp_path: Path) -> None:
    """Its text would stand in the reason, on a page that anybody may see."""
    (tmp_path / "token").write_text("a secret: [of this machine")
    (requests / "link.yaml").symlink_to(tmp_path / "token")
    (requests / "inside.yaml").symlink_to(requests / "recipe.yaml")
    page = tmp_path / "page.html"
    found = states(requests, "--dist", tmp_path / "dist", "--page", page)
    assert found["link.yaml"] == ("parked", "it is a link out of the folder, and is not read")
    assert "lock" in found["inside.yaml"][1], "it is read"
    assert "secret" not in page.read_text() + str(found)
    assert "neither a recipe nor a folder" in queue(tmp_path / "nowhere", exit_code=UsageError.exit_code)


def test_what_cannot_be_planned_is_parked_with_a_store_too(requests: Path, tmp_path: Path) -> None:
    tiny_recipe.write_recipe(
        requests, {"loaders": {"required": ["exllamav2"]}, "variants": [{"branch": "main", "bits": 3}]}
    )
    for words in (("--store", tmp_path / "store"), ("--dist", tmp_path / "dist")):
        (found,) = as_json(requests, *words)
        assert (found["state"], found["repository"]) == ("parked", REPOSITORY)
        assert found["why"].endswith("from this model: main: the required loader exllamav2 reads 4 bits only")


def test_of_two_recipes_for_one_repository_the_second_is_parked(requests: Path, tmp_path: Path) -> None:
    (requests / "second.yaml").write_bytes((requests / "recipe.yaml").read_bytes())
    (requests / "second.lock.json").write_bytes((requests / "recipe.lock.json").read_bytes())
    assert states(requests, "--dist", tmp_path / "dist") == {
        "recipe.yaml": ("requested", ""),
        "second.yaml": ("parked", f"recipe.yaml builds {REPOSITORY}, too"),
    }


def test_the_store_says_what_a_fleet_does(requests: Path, tmp_path: Path, store: Store) -> None:
    recipe, words = requests / "recipe.yaml", (requests, "--store", tmp_path / "store")
    assert states(*words) == {"recipe.yaml": ("requested", "")}
    lease = Lease(store, REPOSITORY, "the run")
    assert lease.claim(0.0)
    lease.beat()
    for named in STATES:
        write_recipe_state(store, REPOSITORY, state_of(recipe, named, why="disk full"))
        (found,) = as_json(*words)
        shown = [found[key] for key in ("state", "why", "machine", "stage", "updated_at")]
        assert shown == [named, "disk full", "node-3", "sweep", 1e9]
    lease.release()
    write_recipe_state(store, REPOSITORY, state_of(recipe, "building"))
    (found,) = as_json(*words)
    shown = [found[key] for key in ("state", "why", "machine", "stage", "updated_at")]
    assert shown == ["requested", "begun: its run has ended, and the next one goes on", "", "sweep", 1e9]
    store.write(f"{REPOSITORY}/state.json", b"{}")
    assert states(*words) == {"recipe.yaml": ("requested", "")}


def test_a_store_that_knows_none_of_the_recipes_is_named(requests: Path, store: Store) -> None:
    """It may be another store than that of the release, such as memory://, which nobody else can write."""
    words = ["queue", str(requests), "--store", store.url]
    shown = CliRunner().invoke(app, words, prog_name="packager")
    assert f"the store {store.url} knows none of these recipes" in shown.stderr
    write_recipe_state(store, REPOSITORY, state_of(requests / "recipe.yaml", "building"))
    assert "knows none" not in CliRunner().invoke(app, words, prog_name="packager").stderr


def test_a_store_that_is_away_parks_nothing(requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        assert path == tmp_path / "store" / REPOSITORY / "state.json"
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("packager.fleet.store.open_regular", fail)
    shown = queue(requests, "--store", tmp_path / "store", exit_code=MachineError.exit_code)
    assert "the store cannot be used now" in shown
    assert "Stale file handle" in shown


@pytest.mark.parametrize("named", ["built", "published", "parked"])
def test_what_was_done_of_another_recipe_is_a_request_again(
    named: QueueState, requests: Path, tmp_path: Path, store: Store
) -> None:
    recipe, words = requests / "recipe.yaml", (requests, "--store", tmp_path / "store")
    write_recipe_state(store, REPOSITORY, state_of(recipe, named, version="0.0"))
    again = ("requested", f"its recipe or packager changed since it was {named}")
    assert states(*words) == {"recipe.yaml": again}
    write_recipe_state(store, REPOSITORY, state_of(recipe, named))
    assert states(*words)["recipe.yaml"][0] == named
    tiny_recipe.write_recipe(requests, {"calibration.seed": 7})
    assert states(*words) == {"recipe.yaml": again}


@pytest.mark.parametrize("on_terminal", [False, True])
def test_watch_follows_what_is_building_to_its_end(
    on_terminal: bool, requests: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = requests / "recipe.yaml"
    states = [
        state_of(recipe, "building", stage="sweep"), state_of(recipe, "building", stage="sweep"),
        state_of(recipe, "building", stage="publish", machine="node-4"),
        state_of(recipe, "published", stage="publish", machine=""),
    ]  # fmt: skip
    assert Lease(store, REPOSITORY, "the run").claim(0.0)
    queued = queued_recipes([requests], (), print, dist=requests / "dist")
    options = tiny_recipe.options(requests / "dist")

    def read() -> Sequence[QueueEntry]:
        write_recipe_state(store, REPOSITORY, states.pop(0))
        return read_queue(queued, options, store)

    slept: list[float] = []
    monkeypatch.setattr("packager.cli.queue_view.time.sleep", slept.append)
    out = StringIO()
    console = Console(file=out, width=100, force_terminal=on_terminal, color_system=None)
    watch_queue(read(), read, console)
    shown = out.getvalue()
    assert (states, len(slept)) == ([], 3)
    assert shown.rstrip().endswith("1 recipe: 1 published")
    lines = [f"{REPOSITORY}: building, publish, node-4", f"{REPOSITORY}: published, publish"]
    assert [line for line in shown.splitlines() if line.startswith(f"{REPOSITORY}: ")] == ([] if on_terminal else lines)
    assert "node-4" in shown
    assert ("node-3" in shown) is on_terminal
    assert "published" in shown
    watch_queue([], read, console)
    assert len(slept) == 3, "nothing is building"


def test_a_running_build_of_this_machine_is_seen(requests: Path, tmp_path: Path) -> None:
    workspace, terminal = tiny_recipe.workspace(tmp_path / "dist"), Terminal(quiet=True)
    running = shown_while_running(workspace.running_path, terminal)
    with workspace.locked(), running, terminal.stage("quantize"), terminal.bar(4) as bar:
        bar.step("block 1")
        (found,) = as_json(requests, "--dist", tmp_path / "dist")
    assert (found["state"], found["stage"]) == ("building", "quantize")
    assert found["machine"]
    assert abs(found["updated_at"] - time.time()) < 600


def test_the_output_folder_says_what_is_built_and_published(tmp_path: Path, builds: Builds) -> None:
    """Its branches hold recipes of their own, which are no requests."""
    recipe, dist = builds.copy(tmp_path, published=True), tmp_path / "dist"
    assert list(dist.rglob("recipe.yaml"))
    assert states(tmp_path, "--dist", dist) == {"recipe.yaml": ("published", "")}
    before = recipe.read_bytes()
    tiny_recipe.write_recipe(tmp_path, {"calibration.seed": 7})
    assert states(tmp_path, "--dist", dist) == {"recipe.yaml": ("requested", "")}
    recipe.write_bytes(before)
    (dist / "hub").rename(dist / "moved")
    assert states(tmp_path, "--dist", dist) == {"recipe.yaml": ("built", "")}
    (dist / "receipts" / REPOSITORY / "main.json").unlink()
    assert states(tmp_path, "--dist", dist)["recipe.yaml"] == ("requested", "begun: 2 of 3 branches are done")
    (dist / "receipts" / REPOSITORY / "three-bits.json").write_text("{}")
    assert states(tmp_path, "--dist", dist)["recipe.yaml"][0] == "parked"


def entries(hostile: str = "") -> list[QueueEntry]:
    """Return one entry in each state; a recipe's name, reasons and machines are another's texts."""
    return [
        QueueEntry(
            path=Path(f"/home/someone/requests/{number}{hostile}.yaml"), name=f"{number}{hostile}.yaml",
            repository=f"tester/model-{number}-GPTQ" if named != "parked" else "", state=named, stage=f"sweep{hostile}",
            machine=f"node-{number}{hostile}", why=f"the base model is gated{hostile}" if named == "parked" else "",
            updated_at=1.7e9 + number,
        )
        for number, named in enumerate(STATES)
    ]  # fmt: skip


def page_of(found: list[QueueEntry]) -> str:
    return html_page("queue.html.j2", {**queue_values(found), "made_at": "2026-11-30 08:00 UTC"})


def test_the_page_shows_every_state_and_no_path(tmp_path: Path) -> None:
    page = Page(page_of(entries()))
    assert page.sections == ["parked", "building", "requested", "built", "published"]
    assert "5 recipes on 2026-11-30 08:00 UTC: 1 requested, 1 building, 1 built, 1 published, 1 parked." in page.text
    assert "the base model is gated" in page.text
    assert "2023-11-14 22:13 UTC" in page.text
    assert "/home/someone" not in page.text
    assert "node-" not in page.text


def test_hostile_names_and_reasons_stay_texts() -> None:
    shown = page_of(entries(HOSTILE))
    page = Page(shown)
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert page.text.count("{{ 7 * 7 }}") == 2 * len(STATES) + 1  # names, stages, and one reason
    assert "\u202e" not in shown
    assert "not known" in page_of([QueueEntry(path=Path("a"), name="a", updated_at=1e300)])


@pytest.mark.parametrize("width", [60, 200])
def test_the_table_shows_what_runs_first_and_every_reason(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    print_queue(entries("\u202e\x1b[31m"), 1.7e9 + 3600, Console(width=width))
    shown = capsys.readouterr().out
    assert shown.index("building") < shown.index("parked") < shown.index("requested") < shown.index("published")
    assert "the base model is gated" in shown
    assert "5 recipes: 1 building, 1 parked, 1 requested, 1 built, 1 published" in shown
    assert not set("\u202e\x1b") & set(shown)


def test_the_command_writes_the_page(requests: Path, tmp_path: Path) -> None:
    path = tmp_path / "site" / "index.html"
    shown = queue(requests, "--dist", tmp_path / "dist", "--page", path)
    assert shown.endswith(f"1 recipe: 1 requested\n{path}\n")
    assert REPOSITORY in Page(path.read_text()).text


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "RECIPE or FOLDER is missing"),
        (["{folder}", "--open"], "a page is written by --page alone"),
        (["{folder}"], "has no recipe"),
    ],
)
def test_a_wrong_question_is_refused(words: list[str], what: str, tmp_path: Path) -> None:
    assert what in queue(*(word.format(folder=tmp_path) for word in words), exit_code=2)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
def test_no_request_leaves_the_page(tmp_path: Path) -> None:
    assert requests_and_messages(page_of(entries(HOSTILE)), tmp_path) == ([], [])
