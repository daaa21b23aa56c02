"""Run a recipe from its lock to its published branches and their cards' example: seconds, and memory beside the plan.

    python benchmarks/real_models.py smollm2-135m-instruct FOLDER
    python benchmarks/real_build.py FOLDER/recipe.yaml --dist FOLDER/dist --json FOLDER/measured.json

The memory of a stage is the most that the process held while it ran (VmHWM, which is reset before), less what it held
when the stage began, with libraries and tokenizer loaded: the plan leaves out what these take themselves. Stages that
run in other processes (loaders) are not compared. Of the published repository, which must be a local one, each branch
is cloned, and the Python of its card for transformers runs on the clone's folder. Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packager.card.markdown import extract_code_blocks
from packager.errors import PackagerError
from packager.pipeline.build_options import Options
from packager.pipeline.flow import build, publish
from packager.pipeline.plan import BuildPlan, make_plan
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import ISOLATED, LOADERS
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
        peaks: bytes by the name of the stage, beyond those that the process held when it began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Run a stage with a fresh peak."""
        _CLEAR.write_text(_RESET_PEAK)
        before = _held("VmRSS")
        with super().stage(name) as stage:
            yield stage
        self.peaks[name] = max(self.peaks.get(name, 0), _held("VmHWM") - before)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--dist", type=Path, required=True, help="the output folder; empty")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "gptq-packager", help="of environments")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    try:
        report = measure(given.recipe, given.dist, given.cache)
    except PackagerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
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
    options = Options(dist=dist, cache=cache, device="cpu", environ=dict(os.environ))
    result = build(file, options, terminal)
    publish(file, options, terminal, dry_run=False)
    repository = dist / "hub" / "models" / file.recipe.repository.id
    report: dict[str, Any] = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
        },
        "peak_bytes": max(receipt.peak_memory_bytes for receipt in result.receipts),
        "stages": [_stage(name, terminal, plan) for name in terminal.seconds],
        "branches": [
            {
                "branch": receipt.provenance.branch,
                "seconds": receipt.seconds,
                "quality": receipt.provenance.quality.model_dump() if receipt.provenance.quality else None,
                "loaders": [record.model_dump(mode="json") for record in receipt.provenance.loaders],
            }
            for receipt in result.receipts
        ],
    }
    _print(report)
    for branch in report["branches"]:
        branch["example"] = example(repository, branch["branch"], cache)
        print(f"{branch['branch']}: the card's example printed {branch['example']}")
    return report


def example(repository: Path, branch: str, cache: Path) -> str:
    """Clone a branch, run its card's Python for transformers on the clone, and return what it prints last.

    Its environment has no PyPcre: the stand-in is the loader's own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        clone = [
            "git",
            "clone",
            "--quiet",
            "--single-branch",
            "--branch",
            branch,
            str(repository),
            str(folder / "clone"),
        ]
        subprocess.run(clone, check=True)
        card = (folder / "clone" / "README.md").read_text(encoding="utf-8")
        blocks = [block.text for block in extract_code_blocks(card) if block.run == "transformers"]
        code = next(text for text in blocks if "generate(" in text or "pipeline(" in text)
        named = re.search(r'model_id = "([^"]+)"', code)
        assert named, "the example names its model"  # noqa: S101
        (folder / "code.py").write_text(code.replace(named[1], str(folder / "clone")), encoding="utf-8")
        stand_in = f"import runpy\n\nrunpy.run_path({str(ISOLATED)!r})['provide_pcre']()\n"
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(stand_in, encoding="utf-8")
        context = RuntimeContext(cache=cache, scratch=folder, environ=dict(os.environ), log=print)
        python = ensure_environment(LOADERS["transformers"], context)
        environ = {
            "PATH": str(python.parent),
            "PYTHONPATH": str(folder / "site"),
            "HOME": scratch,
            "HF_HUB_OFFLINE": "1",
        }
        ran = subprocess.run(
            [str(python), str(folder / "code.py")], env=environ, cwd=folder, capture_output=True, text=True, check=False
        )
        if ran.returncode:
            raise RuntimeError(f"the card's example failed: {ran.stderr[-3000:]}")
        return ran.stdout.strip()


def _stage(name: str, terminal: MeasuringTerminal, plan: BuildPlan) -> dict[str, Any]:
    planned = _PLANNED[name](plan) if name in _PLANNED else None
    return {
        "stage": name,
        "seconds": round(terminal.seconds[name], 1),
        "used_bytes": terminal.peaks[name],
        "planned_bytes": planned,
    }


def _held(key: str) -> int:
    """Return a size of /proc/self/status in bytes: VmRSS now, VmHWM at most since the last reset."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _print(report: dict[str, Any]) -> None:
    table = Table(title=f"{report['machine']}; the process held {format_bytes(report['peak_bytes'])} at most")
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
