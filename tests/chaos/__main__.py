"""Run the harnesses of this folder; `nox -s chaos` calls this.

    python -m tests.chaos --seed 7 --minutes 30
    python -m tests.chaos --seed 7 --only build --kill 17

Prints one table, writes the same as JSON where `--json` says, and exits with 1 if anything failed.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.chaos.harnesses import HARNESSES, in_a_fresh_process
from tests.chaos.outcome import Budget, Outcome


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="nox -s chaos --", description="Kills, signals, faults and hostile inputs.")
    parser.add_argument("--seed", type=int, default=None, help="repeats a run; printed; default: the time")
    parser.add_argument("--minutes", type=float, default=30.0, help="the time of all harnesses together")
    parser.add_argument("--only", choices=HARNESSES, action="append", help="this harness (may be repeated)")
    parser.add_argument("--kill", type=int, default=None, help="only this try of the harness that --only names")
    parser.add_argument("--most", type=int, default=100_000, help="no more tries of a harness than this")
    parser.add_argument("--json", type=Path, default=None, help="where the figures go, as JSON")
    given = parser.parse_args()
    if given.kill is not None and len(given.only or []) != 1:
        parser.error("--kill needs exactly one --only")
    seed = int(time.time()) if given.seed is None else given.seed
    names = given.only or list(HARNESSES)
    print(f"chaos: --seed {seed} --minutes {given.minutes:g} on {machine()}", flush=True)
    outcomes, left = [], given.minutes * 60
    for place, name in enumerate(names):
        began = time.monotonic()
        budget = Budget(seconds=left / (len(names) - place), most=given.most, only=given.kill)
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            outcomes.append(in_a_fresh_process(name, Path(folder), seed, budget))
        outcomes[-1].peak("seconds", time.monotonic() - began)
        left = max(0.0, left - (time.monotonic() - began))
        print(table([outcomes[-1]]), flush=True)
    report = {"seed": seed, "minutes": given.minutes, "machine": machine(), "harnesses": [vars(o) for o in outcomes]}
    if given.json:
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = sum(len(outcome.failures) for outcome in outcomes)
    print(f"{failed} failures with seed {seed}" if failed else f"all held with seed {seed}")
    return 1 if failed else 0


def machine() -> str:
    """Name the machine and the versions."""
    git = subprocess.run(["git", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    return f"{platform.platform()}, Python {platform.python_version()}, torch {version('torch')}, git {git}"


def table(outcomes: list[Outcome]) -> str:
    """Return a line for each figure."""
    lines = []
    for outcome in outcomes:
        figures: dict[str, Any] = {**outcome.counts, **{key: round(value, 1) for key, value in outcome.peaks.items()}}
        lines += [f"{outcome.name:<16} {key:<40} {value:>10}" for key, value in figures.items()]
        lines += [f"{outcome.name:<16} {'failures':<40} {len(outcome.failures):>10}"]
        lines += [f"  FAILED {text}" for text in outcome.failures]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
