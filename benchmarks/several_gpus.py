"""Quantize one random model's four permutations on one GPU and on several, and compare time, memory and bytes.

    python benchmarks/several_gpus.py --layers 6 --gpus 1,2 --json out.json

Each run is `speed.py --full` in a process that sees the first N GPUs (CUDA_VISIBLE_DEVICES). The checkpoints must have
the same sha256 on any number of GPUs; otherwise the exit status is 1. Options that are not listed go to speed.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packager.system.files import write_atomic

SPEED = Path(__file__).parent / "speed.py"
_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class GpuRun:
    """One run.

    Attributes:
        gpus: how many GPUs it saw.
        report: of speed.py.
        sha256: of each weights file, by its path below the output folder.
    """

    gpus: int
    report: dict[str, Any]
    sha256: dict[str, str]

    @property
    def seconds(self) -> float:
        """The stage quantize."""
        return float(self.result["seconds"])

    @property
    def result(self) -> dict[str, Any]:
        """What peers/ours.py measured."""
        found: dict[str, Any] = self.report["results"][0]["result"]
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a run failed or two runs made other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, with commas between them (default 1,2)")
    parser.add_argument("--work", type=Path, default=Path("several-gpus"), help="models and checkpoints (default here)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given, others = parser.parse_known_args(arguments)
    runs = []
    for gpus in map(int, given.gpus.split(",")):
        runs.append(run(gpus, given.work.absolute(), others))
        if given.json:  # after each run: an interrupted one keeps its results
            content = [{"gpus": each.gpus, "sha256": each.sha256, **each.report} for each in runs]
            write_atomic(given.json.absolute(), json.dumps(content, indent=2).encode() + b"\n")
    same = all(each.sha256 == runs[0].sha256 and each.sha256 for each in runs)
    show(runs, same=same)
    return int(not same)


def run(gpus: int, work: Path, others: Sequence[str]) -> GpuRun:
    """Run speed.py with the first `gpus` GPUs.

    Raises:
        CalledProcessError: it failed.
    """
    dist, report = work / f"dist-{gpus}", work / f"report-{gpus}.json"
    command = [sys.executable, str(SPEED), "--full", "--peers", "", "--work", str(work / "model"), "--dist", str(dist)]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}
    subprocess.run([*command, "--json", str(report), *others], env=environ, check=True)
    files = sorted(dist.rglob("*.safetensors"))
    digests = {path.relative_to(dist).as_posix(): digest_of_file(path) for path in files}
    return GpuRun(gpus=gpus, report=json.loads(report.read_text()), sha256=digests)


def digest_of_file(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def show(runs: Sequence[GpuRun], *, same: bool) -> None:
    """Print a table of the runs."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("GPUs", "quantize, s", "speed-up", "disk to disk, s", "GPU memory, GB", box=None)
    for each in runs:
        memory, whole = (each.result.get("gpu_allocated_bytes") or 0) / 1e9, each.result["disk_to_disk_s"]
        speed_up = f"{runs[0].seconds / each.seconds:.2f}"
        table.add_row(str(each.gpus), f"{each.seconds:.1f}", speed_up, f"{whole:.1f}", f"{memory:.1f}")
    console.print(table)
    count = len(runs[0].sha256)
    console.print(f"{count} weights files: {'the same bytes on every number of GPUs' if same else 'OTHER BYTES'}")


if __name__ == "__main__":
    sys.exit(main())
