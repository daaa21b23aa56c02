"""The harnesses by their names, each run in an interpreter of its own."""

import importlib
import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.chaos.outcome import Budget, Outcome

# Module and function: the module is imported by the process of its harness alone.
HARNESSES = {
    "build": "kills:kill_builds",
    "publish": "kills:kill_publishes",
    "disk": "faults:full_disk",
    "clock": "faults:jumping_clock",
    "at-once": "faults:at_once",
    "recipes": "hostile:hostile_recipes",
    "models": "hostile:hostile_models",
    "folders": "hostile:hostile_folders",
    "hub": "hostile:hostile_hub",
    "git": "hostile:hostile_git",
    "texts": "hostile:hostile_texts",
}


def in_a_fresh_process(name: str, folder: Path, seed: int, budget: Budget) -> Outcome:
    """Run a harness in an interpreter of its own, which is no larger than this harness makes it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, name, folder, seed, budget).result()


def run(name: str, folder: Path, seed: int, budget: Budget) -> Outcome:
    """Run a harness in this process."""
    warnings.simplefilter("error")
    # The Hub client's own upload of raw bytes.
    warnings.filterwarnings("ignore", "Use .content=", DeprecationWarning)
    module, function = HARNESSES[name].split(":")
    outcome: Outcome = getattr(importlib.import_module(f"tests.chaos.{module}"), function)(folder, seed, budget)
    return outcome
