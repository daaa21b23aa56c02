"""A build killed or interrupted at any moment is simply run again: the result is that of an undisturbed build."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from packager.receipt import PICTURE_FILES
from tests.tiny_recipe import ACT_ORDER, MAIN, RECIPE, write_inputs, write_recipe

pytestmark = pytest.mark.crash
ROOT = Path(__file__).resolve().parent.parent
CARD = {
    *("README.md", "provenance.json", "LICENSE.txt", "questions.jsonl", "recipe.yaml", "recipe.lock.json"),
    *PICTURE_FILES,
}
BLOCKS = 3
INTERRUPTED = "interrupted: finished work is kept, run the same command again to continue\n"

Step = dict[str, Any]
Folders = dict[str, dict[str, str]]


class Driver:
    """The driver's process: importing torch takes longer than a dozen builds."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.build_crash_driver", str(scratch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, start: Path | None, *steps: Step, **more: str) -> dict[str, Any]:
        """Run steps in a copy of `start`; return their results."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"start": start and str(start), "steps": steps, **more}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert len(found["steps"]) == len(steps)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


@dataclass(frozen=True, kw_only=True)
class KilledBuild:
    """Two recipes for one repository that share no weights, and what undisturbed builds of them make.

    Attributes:
        built: an output folder with the old recipe's build.
        effects: of building the old recipe from nothing, and the new one in `built`.
        files: by recipe, the sha256 of each file of each branch.
        trees: by recipe, what is published.
        driver: runs the steps.
    """

    old: str
    new: str
    built: Path
    effects: tuple[int, int]
    files: dict[str, Folders]
    trees: dict[str, dict[str, str]]

    driver: Driver

    def run(self, start: Path | None, *steps: Step) -> list[dict[str, Any]]:
        """Run steps and check the end, and what could be seen before; return the result of each step."""
        outcome = self.driver.run(start, *steps)
        recipe = steps[-1]["recipe"]
        story = f"{steps}: {outcome}"
        for seen in outcome["steps"]:
            self.check_visible(seen["visible"], story)
        for wanted, group in groupby(zip(steps, outcome["steps"], strict=True), key=lambda pair: pair[0]["recipe"]):
            blocks = [block for _, seen in group for block in seen["blocks"]]
            assert len(blocks) == len(set(blocks)), f"{wanted}: a finished block was made again: {story}"
        assert outcome["steps"][-1]["code"] == 0, story
        assert outcome["steps"][-1]["visible"] == self.files[recipe], story
        assert outcome["trees"] == (self.trees[recipe] if "command" in steps[-1] else {}), story
        assert outcome["leftovers"] == outcome["unfinished"] == [], story
        assert outcome["status"] == "", story
        found: list[dict[str, Any]] = outcome["steps"]
        return found

    def check_visible(self, folders: Folders, story: str) -> None:
        """Check that a folder's checkpoint is one recipe's and whole, and each file of its card one recipe's."""
        for branch, files in folders.items():
            wholes = [whole[branch] for whole in self.files.values()]
            packed = [{name: digest for name, digest in whole.items() if name not in CARD} for whole in wholes]
            assert {name: digest for name, digest in files.items() if name not in CARD} in packed, story
            for name in files.keys() & CARD:
                assert files[name] in [whole.get(name) for whole in wholes], story


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KilledBuild]:
    root = tmp_path_factory.mktemp("crash")
    driver = Driver(root / "scratch")
    folder = write_inputs(root / "recipe")
    two = {"variants": RECIPE["variants"][:2]}
    old = str(write_recipe(folder, two))
    changes = {"calibration.seed": 1, "card.title": "Another", "card.license.files": ["questions.jsonl"]}
    new = str(write_recipe(folder, two | changes, name="new.yaml"))
    first = driver.run(None, {"recipe": old}, keep=str(root / "built"))
    publish_old, publish_new = ({"recipe": recipe, "command": "publish"} for recipe in (old, new))
    whole = driver.run(root / "built", publish_old), driver.run(root / "built", {"recipe": new}, publish_new)
    assert [step["code"] for outcome in (first, *whole) for step in outcome["steps"]] == [0, 0, 0, 0]
    yield KilledBuild(
        old=old,
        new=new,
        built=root / "built",
        effects=(first["steps"][0]["effects"], whole[1]["steps"][0]["effects"]),
        files={recipe: outcome["steps"][-1]["visible"] for recipe, outcome in zip((old, new), whole, strict=True)},
        trees={recipe: outcome["trees"] for recipe, outcome in zip((old, new), whole, strict=True)},
        driver=driver,
    )
    driver.close()


def spread(count: int, last: int) -> list[int]:
    return sorted({1 + round(step * (last - 1) / (count - 1)) for step in range(count)})


def test_the_two_recipes_differ_in_weights_card_and_licence(scene: KilledBuild) -> None:
    assert set(scene.files[scene.old]) == {MAIN, ACT_ORDER}
    for branch in (MAIN, ACT_ORDER):
        old, new = (scene.files[recipe][branch] for recipe in (scene.old, scene.new))
        differing = {name for name in old if old[name] != new.get(name)}
        assert differing == {
            "model.safetensors",
            "LICENSE.txt",
            "recipe.yaml",
            "README.md",
            "provenance.json",
            *PICTURE_FILES,
        }


@pytest.mark.parametrize("count", [7, pytest.param(20, marks=pytest.mark.long)])
def test_a_first_build_may_be_killed_anywhere(scene: KilledBuild, count: int) -> None:
    for kill in spread(count, scene.effects[0]):
        again = {"recipe": scene.old}, {"recipe": scene.old, "command": "publish"}
        killed, *_ = scene.run(None, {"recipe": scene.old, "kill": kill}, *again)
        assert killed["code"] == -signal.SIGKILL


@pytest.mark.parametrize("count", [7, pytest.param(20, marks=pytest.mark.long)])
def test_a_build_that_replaces_another_may_be_killed_anywhere(scene: KilledBuild, count: int) -> None:
    for kill in spread(count, scene.effects[1]):
        killed, _ = scene.run(scene.built, {"recipe": scene.new, "kill": kill}, {"recipe": scene.new})
        assert killed["code"] == -signal.SIGKILL


@pytest.mark.parametrize("count", [5, pytest.param(12, marks=pytest.mark.long)])
def test_a_killed_build_may_be_followed_by_one_of_the_old_recipe(scene: KilledBuild, count: int) -> None:
    for kill in spread(count, scene.effects[1])[1:]:
        scene.run(scene.built, {"recipe": scene.new, "kill": kill}, {"recipe": scene.old})


@pytest.mark.parametrize("count", [6, pytest.param(20, marks=pytest.mark.long)])
def test_a_build_may_be_killed_at_random_moments_many_times(scene: KilledBuild, count: int) -> None:
    dice = random.Random(20261123)
    for number in range(count):
        kills: list[Step] = [{"kill": dice.randrange(1, scene.effects[0])} for _ in range(2)]
        kills.insert(dice.randrange(3), {"seconds": dice.uniform(0.05, 1.5)})
        recipe = (scene.old, scene.new)[number % 2]
        steps = [{"recipe": recipe, **kill} for kill in kills]
        scene.run(None if number % 4 < 2 else scene.built, *steps, {"recipe": scene.new})


# Up to the first point the last finished block must count, from the second on the folder itself.
POINTS = {
    "the first weights file is made": r"^open .*/main/checkpoint/model\.safetensors x",
    "a journal is written": r"^open .*/work/.*/main/\.tmp-",
    "a journal is put in place": r"^os.rename .* .*/main/block-00001\.json$",
    "the last journal is put in place": rf"^os.rename .* .*/{ACT_ORDER}/block-00002\.json$",
    "what is not quantized is put in place": r"^open .*/main/checkpoint/\.tmp-",
    "the receipt is announced": r"^os.rename .* .*/unfinished/main\.json$",
    "the folder is put in place": r"^os.rename .*/checkpoint .*/builds/.*/main$",
    "the receipt is written": r"^open .*/receipts/[^/]*/[^/]*/\.tmp-",
    "the receipt is put in place": r"^os.rename .* .*/receipts/[^/]*/[^/]*/main\.json$",
    "the announcement goes": r"^os.remove .*/unfinished/main\.json",
    "the next receipt is announced": rf"^os.rename .* .*/unfinished/{ACT_ORDER}\.json$",
    "the next folder is put in place": rf"^os.rename .*/checkpoint .*/builds/.*/{ACT_ORDER}$",
}


def replacing(point: str) -> Any:
    """Return a point of a build that replaces another; up to the folder's own it is that of a first build."""
    first = list(POINTS).index("the receipt is announced")
    return pytest.param(point, True, marks=pytest.mark.long if list(POINTS).index(point) < first else ())


@pytest.mark.parametrize(("point", "replaces"), [*((point, False) for point in POINTS), *map(replacing, POINTS)])
def test_a_build_may_be_killed_before_a_chosen_effect(scene: KilledBuild, point: str, replaces: bool) -> None:
    recipe = scene.new if replaces else scene.old
    killed, again = scene.run(
        scene.built if replaces else None, {"recipe": recipe, "kill": POINTS[point]}, {"recipe": recipe}
    )
    assert killed["code"] == -signal.SIGKILL
    assert len(killed["blocks"]) + len(again["blocks"]) == len((MAIN, ACT_ORDER)) * BLOCKS


def test_a_folder_without_its_receipt_is_recognised(scene: KilledBuild) -> None:
    kill = {"recipe": scene.old, "kill": POINTS["the receipt is written"]}
    killed, _ = scene.run(None, kill, {"recipe": scene.old})
    assert killed["visible"].keys() == {MAIN}
    assert killed["visible"][MAIN].items() <= scene.files[scene.old][MAIN].items()
    scene.run(None, kill, {"recipe": scene.new})


def test_status_can_read_the_files_of_a_killed_build(scene: KilledBuild) -> None:
    kill, look = {"recipe": scene.new, "kill": scene.effects[1] - 20}, {"recipe": scene.new, "command": "status"}
    _, status, _ = scene.run(scene.built, kill, look, {"recipe": scene.new})
    assert (status["code"], status["printed"]) == (0, "")


@pytest.mark.parametrize("count", [4, pytest.param(12, marks=pytest.mark.long)])
def test_ctrl_c_anywhere_prints_one_line(scene: KilledBuild, count: int) -> None:
    for point in spread(count, scene.effects[1]):
        stopped, _ = scene.run(scene.built, {"recipe": scene.new, "interrupt": point}, {"recipe": scene.new})
        assert (stopped["code"], stopped["printed"]) == (130, INTERRUPTED)


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Let child processes take Ctrl-C even where this one ignores it, as a shell's background job does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_the_command_itself_can_be_interrupted(scene: KilledBuild, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("packager")), "build", scene.old, "--dist", str(tmp_path / "dist")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert any(line.startswith("source") for line in process.stderr)  # after what a branch gets otherwise
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] + "\n" == INTERRUPTED
    assert "Traceback" not in printed
    assert not (tmp_path / "dist" / "receipts").exists()
