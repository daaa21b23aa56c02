"""Base models and branches that were made to hurt: refused within seconds, in bounded memory, without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hostile_models import ROOT, hostile_cases, some_cases

EXIT_CODES = {0, 2, 3, 4, 7}


def results(folder: Path, step: int, first: int = 0, *more: str) -> list[dict[str, Any]]:
    """Run every `step`-th case, from the `first` on, in a process of its own."""
    command = [sys.executable, "-m", "tests.hostile_models", str(folder), str(step), str(first), *more]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in ended.stdout.splitlines()]


def check_results(found: list[dict[str, Any]]) -> None:
    by_name = {result["case"]: result for result in found if result["command"] == "plan"}
    assert by_name["sound"]["status"] == 0, by_name["sound"]["output"]
    wrong = [
        (result["case"], result["command"], result["status"], result["overstepped"], result["output"][-300:])
        for result in found
        if result["status"] not in EXIT_CODES
        or "Traceback" in result["output"]
        or result["secret"]
        or result["overstepped"]
        or (result["refused"] and result["command"] == "plan" and result["status"] == 0)
    ]
    assert wrong == []
    beyond, cpu_s = (max(result[key] for result in found) for key in ("beyond", "cpu_s"))
    print(f"{len(by_name) - 1} hostile inputs: at most {cpu_s:.1f} s and {beyond / 1e6:.0f} MB beyond a sound one")


def test_the_corpus_has_hundreds_of_distinct_cases() -> None:
    names = [case.name for case in hostile_cases()]
    assert len(set(names)) == len(names) >= 500


def test_the_sample_has_every_damage_and_every_file_but_slow_ones() -> None:
    sample = {case.name for case in some_cases()}
    every = [case.name for case in hostile_cases() if not case.slow]
    for part in (0, -1):
        assert {name.split(": ")[part] for name in sample} == {name.split(": ")[part] for name in every}
    assert len(sample) < 220


def test_a_few_hostile_models_and_branches(tmp_path: Path) -> None:
    check_results(results(tmp_path, 106))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(2))  # so that workers share them
def test_some_hostile_models_and_branches(tmp_path: Path, first: int) -> None:
    check_results(results(tmp_path, 2, first, "sample"))


@pytest.mark.long
@pytest.mark.parametrize("first", range(8))  # so that workers share them
def test_all_hostile_models_and_branches(tmp_path: Path, first: int) -> None:
    check_results(results(tmp_path, 8, first))
