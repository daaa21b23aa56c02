"""Full disks, clocks that jump, and two runs at once: one clear error at most, and the next run is whole."""

import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packager.errors import PackagerError
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS
from tests import build_crash_driver, publish_crash_driver
from tests.chaos.outcome import Budget, Outcome
from tests.publish_fixtures import git, hub_folder, trees
from tests.test_publish_crash import CrashFixture
from tests.tiny_recipe import write_all

YEAR_S = 365 * 86400.0


class TinyDisk:
    """A folder on a disk of few bytes; on a machine where one may not be mounted, `mounted` is False."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.mounted = self._mount(f"size={size_bytes}")

    def _mount(self, options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(self.folder)]
        if shutil.which("mount") is None:
            return False
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def grow(self) -> None:
        """Give the disk space."""
        self._mount("remount,size=512m")

    def close(self) -> None:
        """Take the disk away."""
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def full_disk(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Build, publish and make an environment on a disk that gets full; then again, with space.

    The full disk is one error, and the run after it makes what an undisturbed run makes.
    """
    outcome = Outcome(name="disk", seed=seed)
    recipe, dist = str(write_all(folder / "recipe")), folder / "builds"
    dist.mkdir()
    whole = build_crash_driver.run_job({"start": None, "steps": [{"recipe": recipe}], "keep": folder / "whole"}, dist)
    used = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    (folder / "publish").mkdir()
    scene = CrashFixture(folder / "publish", update=False)
    for number in budget.numbers():
        dice = outcome.dice(number)
        disk = TinyDisk(folder / "disk", dice.randrange(4096, used if number % 2 else 300_000))
        if number % 5 == 0 and disk.mounted:
            cache_on(outcome, number, disk)
        elif number % 2 == 0 and disk.mounted:
            publish_on(outcome, number, disk, scene)
        else:
            first = {"recipe": recipe} if disk.mounted else {"recipe": recipe, "full": dice.randrange(1, 200)}
            place = disk.folder / "dist" if disk.mounted else folder / "injected"
            build_on(outcome, number, disk, place, (first, {"recipe": recipe}), whole["steps"][-1]["visible"])
            shutil.rmtree(place, ignore_errors=True)
        disk.close()
    return outcome


def cache_on(outcome: Outcome, number: int, disk: TinyDisk) -> None:
    """Make a loader's environment in a cache without space."""
    context = RuntimeContext(
        cache=disk.folder / "cache", scratch=disk.folder, environ={"PATH": os.environ["PATH"]}, log=lambda _: None,
        confinement="none",
    )  # fmt: skip
    outcome.counts["environments"] += 1
    try:
        ensure_environment(LOADERS["transformers"], context)
    except PackagerError as error:
        outcome.counts["environments refused"] += 1
        outcome.check(number, "space" in str(error) or "full" in str(error), f"the cause is not named: {error}")
    except Exception as error:  # noqa: BLE001 - a failure is a finding
        outcome.check(number, False, f"environment: {type(error).__name__}: {error}")
    finally:
        left = list((disk.folder / "cache").rglob("*.json")) if (disk.folder / "cache").exists() else []
        outcome.check(number, not left, f"an environment counts as finished: {left}")


def build_on(
    outcome: Outcome, number: int, disk: TinyDisk, dist: Path, steps: tuple[dict[str, Any], ...], files: object
) -> None:
    """Build on a full disk and then with space."""
    words = disk.folder.with_name("words")
    first = build_crash_driver.run_step(steps[0], dist, words)
    disk.grow()
    again = build_crash_driver.run_step(steps[1], dist, words)
    outcome.counts["builds"] += 1
    outcome.counts["builds refused"] += first["code"] != 0
    story = (
        f"build: {first['code']} {str(first['printed'])[-800:]}; then {again['code']} {str(again['printed'])[-500:]}"
    )
    outcome.check(number, "Traceback" not in str(first["printed"]), story)
    outcome.check(number, first["code"] == 0 or "hint: " in str(first["printed"]), story)
    outcome.check(number, again["code"] == 0 and again["visible"] == files, f"the next build differs: {story}")


def publish_on(outcome: Outcome, number: int, disk: TinyDisk, scene: CrashFixture) -> None:
    """Publish on a full disk and then with space."""
    root, said = disk.folder / "hub", ""
    try:
        publish_crash_driver.publish(scene.contents, root)
    except PackagerError as error:
        said = str(error)
    except Exception as error:  # noqa: BLE001 - a failure is a finding
        outcome.check(number, False, f"publish: {type(error).__name__}: {error}")
    outcome.counts["publishes"] += 1
    outcome.counts["publishes refused"] += bool(said)
    seen = trees(hub_folder(root)) if (hub_folder(root) / ".git").exists() else {}
    half = [branch for branch, tree in seen.items() if tree != scene.trees_after[branch]]
    outcome.counts["half-published branches"] += len(half)
    outcome.check(number, not half, f"half-published: {half}")
    disk.grow()
    try:
        publish_crash_driver.publish(scene.contents, root)
    except Exception as error:  # noqa: BLE001 - a failure is a finding
        outcome.check(number, False, f"publish after {said!r}: {type(error).__name__}: {error}")
        return
    outcome.check(number, trees(hub_folder(root)) == scene.trees_after, f"the next publish differs: {said}")


def jumping_clock(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Build and publish while the clock jumps by years, to the past and the future, and again with the true time."""
    outcome = Outcome(name="clock", seed=seed)
    recipe, dist = str(write_all(folder / "recipe")), folder / "builds"
    dist.mkdir()
    whole = build_crash_driver.run_job({"start": None, "steps": [{"recipe": recipe}]}, dist)
    files = whole["steps"][-1]["visible"]
    (folder / "publish").mkdir()
    scene, real = CrashFixture(folder / "publish", update=True), time.time
    for number in budget.numbers():
        dice = outcome.dice(number)
        by_s = dice.choice((-1, 1)) * dice.uniform(1, 50) * YEAR_S
        if number % 4 == 0:
            step = {"recipe": recipe, "clock_s": by_s}
            found = build_crash_driver.run_job({"start": None, "steps": [step, {"recipe": recipe}]}, dist)
            same = all(each["code"] == 0 and each["visible"] == files for each in found["steps"])
            outcome.counts["builds with the same bytes"] += same
            outcome.check(number, same, f"{step}: {[each['printed'][-300:] for each in found['steps']]}")
            continue
        time.time = jumping(by_s)
        try:
            found = publish_crash_driver.run_chain(scene.before, scene.root, scene.contents, [{"signal": "SIGKILL"}])
            same = found["trees"] == scene.trees_after and found["fsck"] == found["status"] == ""
        except (SystemExit, Exception) as error:  # noqa: BLE001 - a failure is a finding
            same, found = False, {"error": f"{type(error).__name__}: {error}"}
        finally:
            time.time = real
        outcome.counts["publishes with the same trees"] += same
        outcome.check(number, same, f"publish, {by_s:.0f} s: {found}")
    return outcome


def jumping(by_s: float) -> Callable[[], float]:
    """Return a clock of which every second reading is off by some seconds, but not before 1970."""
    real, readings = time.time, itertools.count()
    return lambda: max(0.0, real() + by_s * (next(readings) % 2))


def at_once(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Build one recipe twice at the same time, and publish one repository twice: each ends whole or with one error."""
    outcome = Outcome(name="at-once", seed=seed)
    recipe, scratch = str(write_all(folder / "recipe")), folder / "builds"
    scratch.mkdir()
    whole = build_crash_driver.run_job({"start": None, "steps": [{"recipe": recipe}]}, scratch)
    files = whole["steps"][-1]["visible"]
    (folder / "publish").mkdir()
    scene = CrashFixture(folder / "publish", update=False)
    for number in budget.numbers():
        delay = outcome.dice(number).uniform(0.0, 0.6)
        if number % 2:
            dist = folder / "dist"
            shutil.rmtree(dist, ignore_errors=True)
            first, second = pair(recipe, dist, folder, delay)
            last = build_crash_driver.run_step({"recipe": recipe}, dist, folder / "words")
            outcome.counts["pairs of builds"] += 1
            outcome.counts["pairs of builds with one refused"] += first[0] != 0 or second[0] != 0
            story = f"{first} {second} {last['code']} {str(last['printed'])[-500:]}"
            outcome.check(number, "Traceback" not in story and 0 in (first[0], second[0]), story)
            outcome.check(number, last["code"] == 0 and last["visible"] == files, f"the bytes differ: {story}")
        else:
            publish_pair(outcome, number, scene, delay)
    return outcome


def pair(recipe: str, dist: Path, folder: Path, delay: float) -> tuple[tuple[int, str], tuple[int, str]]:
    """Run two builds at once as programs of their own; return their exit codes and the ends of what they printed."""
    program = "from packager.cli.main import main; main()"
    command = [sys.executable, "-c", program, "build", recipe, "--dist", str(dist), "--quiet"]
    processes = []
    for _ in range(2):
        processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
        time.sleep(delay)
    ends = [(process.communicate(timeout=300)[1][-600:], process.returncode) for process in processes]
    return (ends[0][1], ends[0][0]), (ends[1][1], ends[1][0])


def publish_pair(outcome: Outcome, number: int, scene: CrashFixture, delay: float) -> None:
    """Publish twice at once, from two forks."""
    shutil.rmtree(scene.root, ignore_errors=True)
    codes: list[int] = []

    def publish() -> None:
        codes.append(publish_crash_driver.publish_in_child(scene.contents, scene.root, {"signal": "SIGKILL"}))

    def guarded() -> None:
        try:
            publish()
        except SystemExit:  # one error, of a publisher that waited in vain
            codes.append(-2)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(delay / 4)
    for thread in threads:
        thread.join()
    seen = trees(hub_folder(scene.root))
    outcome.counts["pairs of publishes"] += 1
    outcome.counts["pairs of publishes with one refused"] += -2 in codes
    half = [branch for branch, tree in seen.items() if tree != scene.trees_after[branch]]
    outcome.counts["half-published branches"] += len(half)
    fsck = git("fsck", "--full", "--strict", "--no-dangling", cwd=hub_folder(scene.root))
    outcome.check(number, not half and not fsck and any(code > 0 for code in codes), f"{codes} {half} {fsck}")
    publish_crash_driver.publish(scene.contents, scene.root)
    outcome.check(number, trees(hub_folder(scene.root)) == scene.trees_after, f"the next publish differs: {codes}")


FAULTS = {"disk": full_disk, "clock": jumping_clock, "at-once": at_once}
