"""Hostile inputs of every surface, each in a process with limits: no traceback, no hang, bounded memory."""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from packager.card.raw_text import text_problems
from packager.cli.main import app
from packager.errors import PackagerError
from packager.recipe.lock_file import lock_path
from tests import test_card_hostile, test_git_foreign, test_hub_answers, test_raw_text, test_recipe_hostile
from tests.card_page import structure
from tests.chaos.outcome import Budget, Outcome
from tests.hostile_models import PRIVATE, HostileCase, Scene, commands, hostile_cases
from tests.limited_calls import Measured, call_limited, overstepped
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import git, log_in
from tests.test_hub_target import TOKEN, HubFixture

EXIT_CODES = frozenset({0, 2, 3, 4, 7})
MOST_PRINTED = 500_000  # JSON names each place of a finding: 11,000 files give 160 kB


class Inputs:
    """The inputs of one surface, each beside a harmless one.

    Args:
        outcome: receives the figures.
        output: a file for what is printed.
        harmless: handles a harmless input.
        codes: the exit codes that an input may end with.
    """

    def __init__(
        self, outcome: Outcome, output: Path, harmless: Callable[[], object], codes: frozenset[int] = frozenset({0})
    ) -> None:
        self.outcome, self._output, self._harmless, self._codes = outcome, output, harmless, codes
        self._clean = self._measure_harmless()
        outcome.peak("harmless: seconds", self._clean.seconds)
        outcome.peak("harmless: seconds of computing", self._clean.cpu_s)
        outcome.peak("harmless: peak, MB", self._clean.peak_bytes / 1e6)

    def _measure_harmless(self) -> Measured:
        found = call_limited(self._harmless, self._output)
        if found.status:
            raise RuntimeError(f"{self.outcome.name}: the harmless input: {found}")
        return found

    def check(self, number: int, name: str, function: Callable[[], object]) -> Measured:
        """Handle an input; check how that ended, what it printed and what it took."""
        found, outcome = call_limited(function, self._output), self.outcome
        outcome.counts["inputs"] += 1
        outcome.peak("slowest, seconds", found.seconds)
        outcome.peak("most seconds of computing", found.cpu_s)
        outcome.peak("most memory beyond harmless, MB", (found.peak_bytes - self._clean.peak_bytes) / 1e6)
        over = overstepped(found, self._clean)
        if over and found.status >= 0:
            over = overstepped(found, self._measure_harmless())  # the machine may be slower now than at first
        ended = found.status in self._codes and "Traceback" not in found.output and PRIVATE not in found.output
        short = f"{name}: {over} {found.status}: {found.output[-2000:]}"
        outcome.check(number, ended and not over and len(found.output) < MOST_PRINTED, short)
        return found


def hostile_recipes(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Plan recipes with pieces of YAML, of other recipes and of themselves in odd places."""
    outcome, scene = Outcome(name="recipes", seed=seed), Scene(folder=folder / "scene")
    scene.folder.mkdir()
    scene.make()
    sound, path = scene.folder / "recipe.yaml", scene.folder / "hostile.yaml"
    shutil.copy(lock_path(sound), lock_path(path))  # without a lock, every recipe is refused
    inputs = Inputs(outcome, folder / "out", partial(app, ["plan", str(sound)]), EXIT_CODES)
    for number in budget.numbers():
        text = hostile_recipe(sound.read_text(encoding="utf-8"), outcome.dice(number))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = inputs.check(number, "recipe", partial(app, ["plan", str(path)]))
        outcome.counts["refused"] += found.status != 0
    return outcome


def hostile_recipe(sound: str, dice: random.Random) -> str:
    """Return a recipe with one to four odd pieces."""
    text = sound if dice.random() < 0.7 else dice.choice(test_recipe_hostile.TEXTS)
    for _ in range(dice.randint(1, 4)):
        start = dice.randint(0, len(text))
        end = start + dice.choice((0, 0, 1, 2, 5, 30))
        piece = dice.choice(
            (*test_recipe_hostile.TOKENS, text[end : end + dice.randint(0, 80)], chr(dice.randrange(0x3000)))
        )
        text = text[:start] + piece + text[end:]
    return text


def hostile_models(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Plan base models of which a file is damaged."""
    return damaged_folders(Outcome(name="models", seed=seed), folder, budget, "plan")


def hostile_folders(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Audit branches of which a file is damaged."""
    return damaged_folders(Outcome(name="folders", seed=seed), folder, budget, "audit")


def damaged_folders(outcome: Outcome, folder: Path, budget: Budget, command: str) -> Outcome:
    """Run one command on each damage, in an order of the seed's."""
    scene, cases = Scene(folder=folder / "scene"), list(hostile_cases())
    scene.folder.mkdir()
    scene.make()
    random.Random(outcome.seed).shuffle(cases)
    run = lambda copy: app(dict(commands(copy))[command])  # noqa: E731
    inputs = Inputs(outcome, folder / "out", partial(run, scene.copy("harmless")), EXIT_CODES)
    for number in budget.numbers():
        if number > len(cases):
            break
        case: HostileCase = cases[number - 1]
        copy = scene.copy(str(number))
        damaged = Scene.model(copy) if command == "plan" else copy / "branches" / "branch"
        # In a process of its own: this one stays small.
        made = call_limited(partial(case.damage, damaged), folder / "damage")
        outcome.check(number, made.status == 0, f"{case.name}: {made.output}")
        found = inputs.check(number, case.name, partial(run, copy))
        outcome.counts["refused"] += found.status != 0
        missed = command == "plan" and case.refused and found.status == 0
        outcome.check(number, not missed, f"{case.name}: accepted")
        shutil.rmtree(copy)
    return outcome


def hostile_hub(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Publish to a Hub of which one answer is damaged, then to the same one whole."""
    outcome = Outcome(name="hub", seed=seed)
    with LoopbackHub(folder / "names", tokens={}) as hub:
        stranger = test_hub_answers.Stranger()
        names = list(test_hub_answers.damages(hub, stranger))
        stranger.close()
    cases = [(endpoint, name) for endpoint in test_hub_answers.ENDPOINTS for name in names]
    random.Random(seed).shuffle(cases)
    inputs = Inputs(outcome, folder / "out", partial(publish_to_hub, folder / "harmless", None))
    for number in budget.numbers():
        if number > len(cases):
            break
        case = cases[number - 1]
        found = inputs.check(number, f"{case}", partial(publish_to_hub, folder / str(number), case))
        outcome.counts["refused"] += "refused: " in found.output
        shutil.rmtree(folder / str(number))
    return outcome


def use_repository(foreign: Any) -> None:
    """Use a foreign repository as commands do, and print how often that was refused."""
    print("refused: ", len(foreign.use()))


def publish_to_hub(folder: Path, case: tuple[str, str] | None) -> None:
    """Publish while one request is answered badly, as an endpoint and a damage say, then again."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stranger, patch = test_hub_answers.Stranger(), pytest.MonkeyPatch()
    with LoopbackHub(folder / "hub", tokens={TOKEN: Account("somebody")}) as hub:
        log_in(hub, TOKEN, patch)
        patch.setattr("time.sleep", lambda _: None)
        fixture = HubFixture(folder, hub)
        if case:
            damage = test_hub_answers.damages(hub, stranger)[case[1]]
            hub.fault(test_hub_answers.ENDPOINTS[case[0]], times=9999, **damage)
        try:
            test_hub_answers.exercise(fixture, "somebody/R")
        except PackagerError as error:
            print("refused: ", error)
            if TOKEN in str(error):
                raise RuntimeError("the error names the token") from None
        except AssertionError:
            assert case is not None
            assert case[0] == "content"  # a file's bytes are compared by whoever reads it
        assert stranger.tokens == []
        hub.faults.clear()
        test_hub_answers.exercise(fixture, "somebody/R")
        for content in fixture.contents:
            listed = git("ls-tree", "-r", "--name-only", content.branch, cwd=hub.repository("somebody/R").path)
            assert set(listed.split()) == {*content.files, ".gitattributes"}


def hostile_git(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Use repositories of which the configuration names programs and of which files are damaged."""
    outcome, made = Outcome(name="git", seed=seed), {}
    for kind in ("local", "bare", "worktree"):
        (folder / kind).mkdir()
        with contextlib.redirect_stdout(io.StringIO()):
            made[kind] = test_git_foreign.Foreign.made(folder / kind, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        harmless = made["local"].copied(folder / "harmless")
    inputs = Inputs(outcome, folder / "out", partial(use_repository, harmless))
    for number in budget.numbers():
        dice = outcome.dice(number)
        with contextlib.redirect_stdout(io.StringIO()):
            foreign = made[dice.choice(tuple(made))].copied(folder / "copy")
        if number % 2:
            chosen = dice.sample(tuple(test_git_foreign.WAYS), dice.randint(1, 6))
            settings = {key: value for name in chosen for key, value in test_git_foreign.WAYS[name].settings.items()}
            test_git_foreign.poison(foreign, test_git_foreign.Way(settings=settings))
            story = f"{foreign.kind}: {chosen}"
        else:
            story = f"{foreign.kind}: {damage_git(foreign.git_folder, dice)}"
        found = inputs.check(number, story, partial(use_repository, foreign))
        outcome.counts["refused"] += "refused:  0" not in found.output
        outcome.check(number, not foreign.ran(), f"{story} ran {foreign.ran()}")
        shutil.rmtree(folder / "copy")
    return outcome


def damage_git(folder: Path, dice: random.Random) -> list[str]:
    """Change, cut, link or remove one to three files of a repository; return their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and "hooks" not in path.parts)
    plain = [path for path in files if "objects" not in path.parts]
    chosen = dice.sample(plain if dice.random() < 0.7 else files, dice.randint(1, 3))
    pieces = (b"\0", b"../../../etc/passwd", b"\xff\xfe", b"[include]\npath=/etc/passwd\n", b"ref: HEAD\n", b"9" * 5000)
    for path in chosen:
        data, way = path.read_bytes(), dice.randrange(5)
        path.chmod(0o644)
        start = dice.randint(0, len(data))
        if way == 0:
            path.write_bytes(data[:start])
        elif way == 1:
            path.write_bytes(data[:start] + dice.choice(pieces) + data[start + dice.randint(0, 8) :])
        elif way == 2:
            path.unlink()
        elif way == 3:
            path.unlink()
            path.symlink_to(dice.choice(("/dev/zero", "/etc/passwd", "HEAD", str(path))))
        else:
            path.write_bytes(dice.randbytes(dice.randint(0, 300)))
    return [path.relative_to(folder).as_posix() for path in chosen]


def hostile_texts(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Judge card texts made of good and bad pieces; one that is accepted changes nothing around it."""
    outcome = Outcome(name="texts", seed=seed)
    pieces = (*test_raw_text.GOOD, *test_raw_text.REFUSED.values(), test_card_hostile.HOSTILE_LINES, "-->", "```", "> ")
    pieces = tuple(piece for piece in pieces if len(piece) < 10_000)
    inputs = Inputs(outcome, folder / "out", partial(judge_text, test_raw_text.GOOD[0]))
    for number in budget.numbers():
        dice = outcome.dice(number)
        text = dice.choice(("\n", "\n\n", "", " ")).join(dice.choices(pieces, k=dice.randint(1, 4)))
        if dice.random() < 0.3:
            text *= dice.randint(2, 50)
        found = inputs.check(number, json.dumps(text[:300]), partial(judge_text, text))
        outcome.counts["refused"] += "refused" in found.output
    return outcome


def judge_text(text: str) -> None:
    """Refuse a text, or compare the page around it with the page without it."""
    if text_problems(text):
        print("refused")
        return
    plain = structure(test_raw_text.card())
    assert structure(test_raw_text.card(header=text))[-len(plain) :] == plain
