"""Full disks, clocks that jump, and two runs at once: a clear error at most, and the next run makes what it should."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import build_crash_driver
from tests.build_crash_driver import Running, visible
from tests.chaos.outcome import Budget, Outcome
from tests.publish_fixtures import git, trees
from tests.publish_fixtures import leftovers as git_leftovers
from tests.tiny_recipe import RECIPE, hub_folder, leftovers, write_inputs, write_recipe

COMMANDS = ("build", "publish", "lock")
YEAR_S = 365 * 86400.0
DISK_BYTES = 48 << 20
# What a command may end with when a disk is full or another run is at work: docs/reference/exit-codes.md.
ERRORS = frozenset({10, 11, 12})
# The files of a branch that change without its weights.
CARD = frozenset({"README.md", "provenance.json", "LICENSE.txt"})
Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command over nothing, or over what an earlier release left.

    Attributes:
        command: build, publish or lock.
        start: the folder to begin with: a recipe's folder, `recipe`, and the output folder, `dist`.
        before: what `state` returns of the start.
        after: what `state` returns after an undisturbed run.
        effects: how many that run had.
        seconds: how long it took.
    """

    command: str
    start: Path
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    effects: int
    seconds: float


def state(place: Path) -> dict[str, Any]:
    """Return what a person sees: the built files, the published trees, and the lock."""
    repository, lock = hub_folder(place / "dist"), place / "recipe" / "new.lock.json"
    return {
        "build": visible(place / "dist"),
        "publish": trees(repository) if (repository / ".git").exists() else {},
        "lock": {lock.name: lock.read_text(encoding="utf-8")} if lock.exists() else {},
    }


def run(place: Path, command: str, **step: Any) -> Result:
    """Run a command of the new recipe, or of another one."""
    return begin(place, command, **step).end()


def begin(place: Path, command: str, *, recipe: str = "new", words: str = "words", **step: Any) -> Running:
    """Begin a command; what it prints goes to a file beside its place, which may be a small disk."""
    path = str(place / "recipe" / f"{recipe}.yaml")
    return Running({"recipe": path, "command": command, **step}, place / "dist", place.with_name(words))


# What each start is made of: another start, and the commands that are run on it.
STARTS: Mapping[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "nothing built": ("", ()),
    "new built": ("nothing built", (("build", "new"),)),
    "old built": ("nothing built", (("build", "old"),)),
    "old published, new built": ("old built", (("publish", "old"), ("build", "new"))),
    "another lock": ("nothing built", ()),
    "no lock": ("nothing built", ()),
}
# Of ten tries, four are publishes, four builds, and two locks, which take the longest.
CASES = (
    *(("publish", "new built"), ("build", "nothing built")),
    *(("publish", "old published, new built"), ("build", "old built"), ("lock", "no lock")),
    *(("publish", "new built"), ("build", "nothing built")),
    *(("publish", "old published, new built"), ("build", "old built"), ("lock", "another lock")),
)


class Cases:
    """The cases, each made when it is first asked for.

    Args:
        folder: for the starts.
    """

    def __init__(self, folder: Path) -> None:
        build_crash_driver.warm_up(folder)
        self.folder = folder
        self.made: dict[tuple[str, str], Case] = {}

    def of_try(self, number: int) -> Case:
        """Return the case of a try."""
        command, start = CASES[number % len(CASES)]
        if (command, start) not in self.made:
            self.made[command, start] = undisturbed(self.start(start), command)
        return self.made[command, start]

    def start(self, name: str) -> Path:
        """Return a start's folder."""
        place, (source, commands) = self.folder / name, STARTS[name]
        if place.exists():
            return place
        if source:
            shutil.copytree(self.start(source), place, symlinks=True)
        else:
            inputs = write_inputs(place / "recipe")
            two = {"variants": RECIPE["variants"][:2]}
            write_recipe(inputs, two, name="old.yaml")
            write_recipe(inputs, two | {"calibration.seed": 1, "card.title": "Another"}, name="new.yaml")
        for command, recipe in commands:
            result = run(place, command, recipe=recipe)
            assert result["code"] == 0, result["printed"]
        lock = place / "recipe" / "new.lock.json"
        if name == "no lock":
            lock.unlink()
        if name == "another lock":
            lock.write_text("{}", encoding="utf-8")
        return place


def undisturbed(start: Path, command: str) -> Case:
    """Run a command and note what it does."""
    place = start.with_name("undisturbed")
    fresh(start, place)
    before, result = state(place), run(place, command)
    assert result["code"] == 0, result["printed"]
    return Case(
        command=command, start=start, before=before, after=state(place), effects=result["effects"],
        seconds=result["seconds"],
    )  # fmt: skip


def fresh(start: Path, place: Path) -> None:
    """Copy a start."""
    for name in ("recipe", "dist"):
        shutil.rmtree(place / name, ignore_errors=True)
        if (start / name).exists():
            shutil.copytree(start / name, place / name, symlinks=True)


def check(outcome: Outcome, number: int, case: Case, place: Path, results: list[Result], story: str) -> None:
    """Check what disturbed runs printed and left; then run the command again and compare with an undisturbed run."""
    ends = [(each["code"], each["printed"][-600:]) for each in results]
    story = f"{case.command} from {case.start.name}, {story}: {ends}"
    outcome.counts[f"{case.command}: tries"] += 1
    outcome.counts[f"{case.command}: runs refused"] += sum(each["code"] != 0 for each in results)
    for each in results:
        clear = each["code"] in ERRORS and "hint: " in each["printed"]
        outcome.check(number, each["code"] == 0 or clear, f"no clear error: {story}")
        outcome.check(number, "Traceback" not in each["printed"], f"a traceback: {story}")
    seen, wholes = state(place), (case.before, case.after)
    half = [
        f"{kind} {key}"
        for kind, found in seen.items()
        for key, value in found.items()
        if not is_whole(kind, value, [whole[kind].get(key) for whole in wholes])
    ]
    early = (
        seen["publish"].get("main") == case.after["publish"].get("main") and seen["publish"] != case.after["publish"]
    )
    outcome.counts["half-made branches, builds and locks"] += len(half) + early
    outcome.check(number, not half and not early, f"half-made: {half or 'main before the others'}: {story}")
    again = run(place, case.command)
    same = again["code"] == 0 and state(place) == case.after
    outcome.counts[f"{case.command}: the next run makes the same bytes"] += same
    outcome.check(number, same, f"the next run differs: {story}; then {again['code']} {again['printed'][-600:]}")
    repository = hub_folder(place / "dist")
    left = leftovers(place / "dist") + [path.name for path in place.rglob(".tmp-*")]
    if (repository / ".git").exists():
        locks = {f"models/{repository.parent.name}/.{repository.name}.lock"}  # the publishers' own, which stays
        left += set(git_leftovers(place / "dist" / "hub")) - locks
        left += git("fsck", "--full", "--strict", "--no-dangling", cwd=repository).splitlines()
    outcome.check(number, not left, f"left behind {left}: {story}")


def is_whole(kind: str, value: Any, wholes: list[Any]) -> bool:
    """Return whether something is as it was before, or as it will be; a build's card may be older than its weights."""
    if kind != "build":
        return value in wholes
    weights = [{name: digest for name, digest in whole.items() if name not in CARD} for whole in wholes if whole]
    return {name: digest for name, digest in value.items() if name not in CARD} in weights


class SmallDisk:
    """A file system of few megabytes in memory, which only an administrator may mount."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.sudo = [] if os.getuid() == 0 else ["sudo", "--non-interactive"]
        options = f"size={DISK_BYTES},uid={os.getuid()},gid={os.getgid()},mode=700"
        command = [*self.sudo, "mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)]
        try:
            self.mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            self.mounted = False

    def __enter__(self) -> "SmallDisk":
        return self

    def __exit__(self, *_: object) -> None:
        if self.mounted:
            subprocess.run([*self.sudo, "umount", "--lazy", str(self.folder)], check=True)


def full_disk(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Run commands on a disk that others fill before a chosen effect, and again with space."""
    outcome = Outcome(name="disk", seed=seed)
    with SmallDisk(folder / "disk") as disk:
        if not disk.mounted:
            outcome.counts["not run: no disk can be mounted here"] += 1
            return outcome
        (folder / "cases").mkdir()
        known = Cases(folder / "cases")
        for number in budget.numbers():
            dice, case = outcome.dice(number), known.of_try(number)
            fresh(case.start, disk.folder)
            filler = disk.folder / "filler"
            effect, left = dice.randrange(1, case.effects + 1), dice.choice((0, 0, 4096, 20_000, 100_000))
            result = run(disk.folder, case.command, fill=effect, filler=str(filler), leave=left)
            filler.unlink(missing_ok=True)
            check(outcome, number, case, disk.folder, [result], f"full before effect {effect} but for {left} bytes")
    return outcome


def jumping_clock(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Run commands while the clock jumps back, and forward, by up to years; then again with the true time."""
    outcome, known, place = Outcome(name="clock", seed=seed), Cases(folder), folder / "place"
    for number in budget.numbers():
        dice, case = outcome.dice(number), known.of_try(number)
        fresh(case.start, place)
        by_s = dice.choice((-1, -1, 1)) * dice.choice((1.0, 3600.0, YEAR_S, 30 * YEAR_S)) * dice.uniform(0.5, 1.5)
        result = run(place, case.command, clock_s=by_s, readings=dice.randint(1, 20))
        outcome.check(number, result["code"] == 0, f"{case.command} is refused: {result['printed'][-600:]}")
        check(outcome, number, case, place, [result], f"a clock that jumps by {by_s:.0f} s")
    return outcome


def at_once(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Run a command twice at the same time: each makes the whole or ends with a clear error, and one makes it."""
    outcome, known, place = Outcome(name="at-once", seed=seed), Cases(folder), folder / "place"
    for number in budget.numbers():
        dice, case = outcome.dice(number), known.of_try(number)
        fresh(case.start, place)
        delay_s = dice.choice((0.0, dice.uniform(0.0, 0.8) * case.seconds))
        first = begin(place, case.command)
        second = begin(place, case.command, words="words-2", after_s=delay_s)
        results = [first.end(), second.end()]
        outcome.check(number, any(each["code"] == 0 for each in results), f"{case.command}: both are refused")
        check(outcome, number, case, place, results, f"twice, {delay_s:.2f} s apart")
    return outcome
