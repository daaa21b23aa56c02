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
from packager.errors import PackagerError
from tests import test_card_hostile, test_git_foreign, test_hub_answers, test_raw_text, test_recipe_hostile
from tests.card_page import structure
from tests.chaos.outcome import Budget, Outcome
from tests.hostile_models import (
    MOST_BYTES_BEYOND,
    MOST_S,
    HostileCase,
    Scene,
    call_limited,
    commands,
    hostile_cases,
    run_limited,
)
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import git, log_in
from tests.test_hub_target import TOKEN, HubFixture

EXIT_CODES = {0, 2, 3, 4, 7}


def check_limits(
    outcome: Outcome, number: int, name: str, found: dict[str, Any], codes: frozenset[int] = frozenset({0})
) -> None:
    """Check how a process ended, what it printed, and what it took."""
    outcome.counts["inputs"] += 1
    outcome.peak("slowest, seconds", found["seconds"])
    outcome.peak("most memory, MB", found["beyond"] / 1e6)
    ended = found["status"] in codes and "Traceback" not in found["output"] and not found["secret"]
    limits = found["seconds"] <= MOST_S and found["beyond"] <= MOST_BYTES_BEYOND
    outcome.check(number, ended and limits, f"{name}: {found}")


def hostile_recipes(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Plan recipes with pieces of YAML, of other recipes and of themselves in odd places."""
    outcome, scene = Outcome(name="recipes", seed=seed), Scene(folder=folder / "scene")
    scene.folder.mkdir()
    scene.make()
    sound = (scene.folder / "recipe.yaml").read_text(encoding="utf-8")
    for number in budget.numbers():
        dice = outcome.dice(number)
        text = sound if dice.random() < 0.7 else dice.choice(test_recipe_hostile.TEXTS)
        for _ in range(dice.randint(1, 4)):
            start = dice.randint(0, len(text))
            end = start + dice.choice((0, 0, 1, 2, 5, 30))
            piece = dice.choice(
                (*test_recipe_hostile.TOKENS, text[end : end + dice.randint(0, 80)], chr(dice.randrange(0x3000)))
            )
            text = text[:start] + piece + text[end:]
        path = scene.folder / "hostile.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        found = run_limited(["plan", str(path)], folder / "output.txt")
        outcome.counts["refused"] += found["status"] != 0
        check_limits(outcome, number, "recipe", found, frozenset(EXIT_CODES))
    return outcome


def hostile_models(folder: Path, seed: int, budget: Budget) -> Outcome:
    """Plan base models, and audit branches, of which a file is damaged."""
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
    for number in budget.numbers():
        if number > len(cases):
            break
        case: HostileCase = cases[number - 1]
        copy = scene.copy(str(number))
        case.damage(Scene.model(copy) if command == "plan" else copy / "branches" / "branch")
        found = run_limited(dict(commands(copy))[command], folder / "output.txt")
        check_limits(outcome, number, case.name, found, frozenset(EXIT_CODES))
        outcome.counts["refused"] += found["status"] != 0
        missed = command == "plan" and case.refused and found["status"] == 0
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
    for number in budget.numbers():
        if number > len(cases):
            break
        scratch = folder / str(number)
        scratch.mkdir()
        found = call_limited(partial(publish_to_hub, scratch, *cases[number - 1]), folder / "out")
        outcome.counts["refused"] += "refused: " in found["output"]
        check_limits(outcome, number, f"{cases[number - 1]}", found)
        shutil.rmtree(scratch)
    return outcome


def use_repository(foreign: Any) -> None:
    """Use a foreign repository as commands do, and print how often that was refused."""
    print("refused: ", len(foreign.use()))


def publish_to_hub(folder: Path, endpoint: str, name: str) -> None:
    """Publish while one request is answered badly, then again."""
    stranger, patch = test_hub_answers.Stranger(), pytest.MonkeyPatch()
    with LoopbackHub(folder / "hub", tokens={TOKEN: Account("somebody")}) as hub:
        log_in(hub, TOKEN, patch)
        patch.setattr("time.sleep", lambda _: None)
        fixture = HubFixture(folder, hub)
        damage = test_hub_answers.damages(hub, stranger)[name]
        hub.fault(test_hub_answers.ENDPOINTS[endpoint], times=9999, **damage)
        try:
            test_hub_answers.exercise(fixture, "somebody/R")
        except PackagerError as error:
            print("refused: ", error)
            if TOKEN in str(error):
                raise RuntimeError("the error names the token") from None
        except AssertionError:
            assert endpoint == "content"  # a file's bytes are compared by whoever reads it
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
        found = call_limited(partial(use_repository, foreign), folder / "out")
        outcome.counts["refused"] += "refused:  0" not in found["output"]
        check_limits(outcome, number, story, found)
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
    for number in budget.numbers():
        dice = outcome.dice(number)
        text = dice.choice(("\n", "\n\n", "", " ")).join(dice.choices(pieces, k=dice.randint(1, 4)))
        if dice.random() < 0.3:
            text *= dice.randint(2, 50)
        found = call_limited(partial(judge_text, text), folder / "out")
        outcome.counts["refused"] += "refused" in found["output"]
        check_limits(outcome, number, json.dumps(text[:300]), found)
    return outcome


def judge_text(text: str) -> None:
    """Refuse a text, or compare the page around it with the page without it."""
    if text_problems(text):
        print("refused")
        return
    plain = structure(test_raw_text.card())
    assert structure(test_raw_text.card(header=text))[-len(plain) :] == plain


SURFACES: dict[str, Callable[[Path, int, Budget], Outcome]] = {
    "recipes": hostile_recipes,
    "models": hostile_models,
    "folders": hostile_folders,
    "hub": hostile_hub,
    "git": hostile_git,
    "texts": hostile_texts,
}
