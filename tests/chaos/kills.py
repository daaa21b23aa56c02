"""Kill builds and publishes at random moments, run them again, and compare with runs that were never interrupted."""

import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tests import build_crash_driver, publish_crash_driver
from tests.chaos.outcome import Budget, Outcome
from tests.publish_fixtures import files_in, git, hub_folder
from tests.test_publish_crash import CrashFixture
from tests.tiny_recipe import RECIPE, write_inputs, write_recipe

SIGNALS = ("SIGKILL", "SIGTERM", "SIGHUP")
ENDED = {name: {-signal.Signals[name], 128 + signal.Signals[name]} for name in SIGNALS}


def kill_builds(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Kill builds of the tiny recipe; every second one replaces a finished build of another seed."""
    outcome, dist = Outcome(name="build", seed=seed), folder / "builds"
    dist.mkdir()
    build_crash_driver.warm_up(folder)
    inputs = write_inputs(folder / "recipe")
    two = {"variants": RECIPE["variants"][:2]}
    recipes = [
        str(write_recipe(inputs, two | {"calibration.seed": number}, name=f"{number}.yaml")) for number in range(2)
    ]
    began = time.monotonic()
    whole = build_crash_driver.run_job({"start": None, "steps": [{"recipe": recipes[0]}], "keep": folder / "0"}, dist)
    lasts = time.monotonic() - began
    wholes = [whole, build_crash_driver.run_job({"start": None, "steps": [{"recipe": recipes[1]}]}, dist)]
    files = [each["steps"][-1]["visible"] for each in wholes]
    effects = [each["steps"][-1]["effects"] for each in wholes]
    for number in budget.numbers():
        dice = outcome.dice(number)
        replaces, name = number % 2 == 0, dice.choice(SIGNALS)
        step: dict[str, Any] = {"recipe": recipes[replaces], "signal": name}
        if dice.random() < 0.5:
            step["seconds"] = dice.uniform(0.0, 1.1) * lasts
        else:
            step["kill"] = dice.randrange(1, max(2, effects[replaces]))
        job = {"start": folder / "0" if replaces else None, "steps": [step, {"recipe": recipes[replaces]}]}
        found = build_crash_driver.run_job(job, dist)
        check_build(outcome, number, step, found, files[replaces])
    return outcome


def check_build(outcome: Outcome, number: int, step: dict[str, Any], found: Any, files: object) -> None:
    """Compare what a killed build and the next one left with the files of an undisturbed build."""
    killed, again = found["steps"]
    if killed["code"] in ENDED[step["signal"]]:
        outcome.counts[f"killed by {step['signal']}"] += 1
    else:
        outcome.counts["ended before the signal"] += 1
        outcome.check(number, killed["code"] == 0, f"{step} ended with {killed['code']}: {killed['printed'][-500:]}")
    same = again["code"] == 0 and again["visible"] == files
    outcome.counts["resumed with the same bytes"] += same and killed["code"] != 0
    outcome.check(number, same, f"{step}: the next build differs, {again['code']}: {again['printed'][-500:]}")
    printed = killed["printed"] + again["printed"]
    outcome.check(number, "Traceback" not in printed, f"{step}: {printed[-500:]}")
    blocks = killed["blocks"] + again["blocks"]
    outcome.check(number, len(blocks) == len(set(blocks)), f"{step}: a finished block was made again")
    left = [*found["leftovers"], *found["unfinished"]]
    outcome.check(number, not left, f"{step}: left behind {left}")


def kill_publishes(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Kill publishes of two branches, of a new repository and of one with an earlier release, signed and unsigned."""
    outcome = Outcome(name="publish", seed=seed)
    scenes = {}
    for update in (False, True):
        (folder / f"publish-{update}").mkdir()
        scenes[update] = CrashFixture(folder / f"publish-{update}", update=update)
    # The first one is slower: it imports.
    last = [count_publish(scene) for scene in (*scenes.values(), *scenes.values())][2:]
    for number in budget.numbers():
        dice = outcome.dice(number)
        update, name = number % 2 == 0, dice.choice(SIGNALS)
        effects, lasts = last[update]
        kill: dict[str, Any] = {"signal": name}
        if dice.random() < 0.5:
            kill["seconds"] = dice.uniform(0.0, 1.1) * lasts
        else:
            kill["effect"] = dice.randrange(1, effects + 1)
        scene = scenes[update]
        try:
            found: Any = publish_crash_driver.run_chain(scene.before, scene.root, scene.contents, [kill])
        except (SystemExit, Exception) as error:  # noqa: BLE001 - a failure is a finding
            outcome.check(number, False, f"{kill}: {type(error).__name__}: {error}")
            continue
        check_publish(outcome, number, kill, found, scene)
    return outcome


def count_publish(scene: CrashFixture) -> tuple[int, float]:
    """Return the effects and the seconds of a publish that nobody interrupts."""
    began = time.monotonic()
    found: Any = publish_crash_driver.run_chain(scene.before, scene.root, scene.contents, [0])
    return found["counts"][0], (time.monotonic() - began) / 2


def check_publish(outcome: Outcome, number: int, kill: dict[str, Any], found: Any, scene: CrashFixture) -> None:
    """Compare, by plain git, each branch after the kill and after the next publish with whole ones."""
    killed = found["counts"] == [-1]
    outcome.counts[f"killed by {kill['signal']}" if killed else "ended before the signal"] += 1
    for seen in found["between"]:
        half = [
            branch for branch, tree in seen.items()
            if tree not in (scene.trees_before.get(branch), scene.trees_after[branch])
        ]  # fmt: skip
        early = seen.get("main") == scene.trees_after["main"] and seen != scene.trees_after
        outcome.counts["half-published branches"] += len(half) + early
        outcome.check(number, not half and not early, f"{kill}: half-published {half or 'main before the others'}")
    repository = hub_folder(scene.root)
    fsck = subprocess.run(
        ["git", "fsck", "--full", "--strict"], cwd=repository, capture_output=True, text=True, check=False
    )
    served = {
        content.branch: set(git("ls-tree", "-r", "--name-only", content.branch, cwd=repository).split())
        == set(content.files)
        for content in scene.contents
    }
    whole = (
        found["trees"] == scene.trees_after and all(served.values()) and not found["status"] and not found["leftovers"]
        and fsck.returncode == 0
        and files_in(repository) == files_in(scene.contents[0].folder)
    )  # fmt: skip
    outcome.counts["finished by the next publish"] += whole and killed
    outcome.check(number, whole, f"{kill}: the next publish differs: {found} {served} {fsck.stderr[-300:]}")
