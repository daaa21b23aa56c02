"""Run a recipe from its lock to its published branches, and measure each stage: seconds, and memory beside the plan.

    python benchmarks/real_models.py smollm2-135m-instruct FOLDER
    python benchmarks/real_build.py FOLDER/recipe.yaml --dist FOLDER/dist --json FOLDER/measured.json

The memory of a stage is the most that the process held while it ran (VmHWM, which is reset before), less what it held
before the first stage, with torch and transformers imported: the plan leaves out what these take themselves. Stages
that run in other processes (loaders) are not compared. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packager.pipeline.build_state import Options
from packager.pipeline.flow import build, publish
from packager.pipeline.plan import BuildPlan, make_plan
from packager.recipe.file import RecipeFile
from packager.system.files import write_atomic
from packager.system.terminal import Stage, Terminal
from packager.system.text import format_bytes

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
# The stages whose memory the plan states.
_PLANNED = {
    "quantize": lambda plan: plan.memory.cpu.device_bytes,
    "evaluate": lambda plan: plan.evaluation.cpu.device_bytes,
}


class MeasuringTerminal(Terminal):
    """A terminal that notes the peak memory of each stage.

    Attributes:
        peaks: bytes by the name of the stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run a stage with a fresh peak."""
        _CLEAR.write_text(_RESET_PEAK)
        with super().stage(name) as stage:
            yield stage
        self.peaks[name] = max(self.peaks.get(name, 0), _held("VmHWM"))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--dist", type=Path, required=True, help="the output folder; empty")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "gptq-packager", help="of environments")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    report = measure(given.recipe, given.dist, given.cache)
    if given.json:
        write_atomic(given.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    return 0


def measure(recipe: Path, dist: Path, cache: Path) -> dict[str, Any]:
    """Build and publish a recipe on the CPU; return and print what was measured."""
    import torch
    import transformers  # noqa: F401, as the build does

    torch.ones(64, 64) @ torch.ones(64, 64)  # threads and their buffers
    file, terminal = RecipeFile.load(recipe), MeasuringTerminal()
    plan = make_plan(file)
    before = _held("VmRSS")
    options = Options(dist=dist, cache=cache, device="cpu", environ=dict(os.environ))
    result = build(file, options, terminal)
    with terminal.stage("publish"):
        publish(file, options, terminal, dry_run=False)
    report = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "before_bytes": before,
        "stages": [_stage(name, terminal, plan, before) for name in terminal.seconds],
        "branches": [
            {
                "branch": receipt.provenance.branch,
                "quality": receipt.provenance.quality.model_dump() if receipt.provenance.quality else None,
                "loaders": [record.model_dump(mode="json") for record in receipt.provenance.loaders],
            }
            for receipt in result.receipts
        ],
    }
    _print(report)
    return report


def _stage(name: str, terminal: MeasuringTerminal, plan: BuildPlan, before: int) -> dict[str, Any]:
    planned = _PLANNED[name](plan) if name in _PLANNED else None
    return {
        "stage": name,
        "seconds": round(terminal.seconds[name], 1),
        "used_bytes": terminal.peaks[name] - before,
        "planned_bytes": planned,
    }


def _held(key: str) -> int:
    """Return a size of /proc/self/status in bytes: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['machine']}; before the first stage {format_bytes(report['before_bytes'])}")
    for heading in ("stage", "seconds", "memory used", "planned", "used / planned"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in report["stages"]:
        used, planned = stage["used_bytes"], stage["planned_bytes"]
        beside = (format_bytes(planned), f"{used / planned:.2f}") if planned else ("", "")
        table.add_row(stage["stage"], str(stage["seconds"]), format_bytes(used), *beside)
    console = Console()
    console.print(table)
    for branch in report["branches"]:
        console.print(json.dumps(branch), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
