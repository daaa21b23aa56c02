"""The harnesses of `nox -s chaos`: each holds in one try, notices a fault, and names the command that repeats it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.harnesses import HARNESSES
from tests.chaos.outcome import Budget, Outcome
from tests.test_house_rules import ROOT

NAMES = ("build", "publish", "disk", "clock", "at-once", "recipes", "models", "folders", "hub", "git", "texts")


@pytest.mark.crash
@pytest.mark.slow
# Of those that build, two, which kill and fill the disk: each has to import torch first.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in ("clock", "at-once") else name for name in NAMES]
)
def test_a_try_of_each_harness_holds(tmp_path: Path, name: str) -> None:
    figures = tmp_path / "figures.json"
    options = {"--seed": "7", "--only": name, "--most": "1", "--minutes": "5", "--json": str(figures)}
    command = [sys.executable, "-m", "tests.chaos", *(word for option in options.items() for word in option)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(figures.read_text(encoding="utf-8"))
    assert report["seed"] == 7
    assert [each["name"] for each in report["harnesses"]] == [name]


def test_the_harnesses_are_known() -> None:
    assert tuple(HARNESSES) == NAMES


def test_a_failure_names_the_command_that_repeats_it() -> None:
    outcome = Outcome(name="build", seed=7)
    outcome.check(17, False, "the bytes differ")
    assert outcome.failures == ["the bytes differ; repeat: nox -s chaos -- --seed 7 --only build --kill 17"]


def test_a_try_depends_on_its_seed_and_number_only() -> None:
    first, again, other = (Outcome(name="build", seed=seed).dice(17).random() for seed in (7, 7, 8))
    assert first == again != other
    assert list(Budget(seconds=60, most=9, only=17).numbers()) == [17]
    assert list(Budget(seconds=60, most=3).numbers()) == [1, 2, 3]
