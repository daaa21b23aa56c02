"""Quantize one random model on one GPU and on several, and compare time, memory and bytes.

    python benchmarks/several_gpus.py --layers 8 --gpus 1,2 --json out.json

Four permutations, which the GPUs share, and one permutation, whose calibration rows they share. Each run is
`speed.py --full` in a process that sees the first N GPUs (CUDA_VISIBLE_DEVICES). Then the run of one permutation on the
most GPUs is killed when half of its blocks are finished, and goes on with the first number of GPUs. The checkpoints
must have the same sha256 on any number of GPUs, and after the kill; otherwise the exit status is 1. Options that are
not listed go to speed.py, such as the shape of the model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import OURS, SCRIPTS, EnginePaths
from rich.console import Console
from rich.table import Table

from packager.system.files import write_atomic

SPEED = Path(__file__).parent / "speed.py"
KINDS = {"four": "four permutations, shared", "one": "one permutation, its rows shared"}
_SOLVING = ("targets", "factor", "columns")  # see peers/rank_times.py
_CHUNK = 1 << 24
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class GpuRun:
    """One run.

    Attributes:
        kind: of `KINDS`.
        gpus: how many GPUs it saw.
        report: of speed.py.
        sha256: of each weights file, by its path below the output folder.
    """

    kind: str
    gpus: int
    report: dict[str, Any]
    sha256: dict[str, str]

    @property
    def seconds(self) -> float:
        """The stage quantize."""
        return float(self.result["seconds"])

    @property
    def layer_seconds(self) -> float:
        """Of a layer after the first; the stage's, divided by the layers, where there is one layer."""
        marks = self.result["marks"]
        return (marks[-1] - marks[0]) / (len(marks) - 1) if len(marks) > 1 else self.seconds

    @property
    def result(self) -> dict[str, Any]:
        """What peers/ours.py measured."""
        found: dict[str, Any] = self.report["results"][0]["result"]
        return found


@dataclass(frozen=True, kw_only=True)
class KilledRun:
    """A run that was killed, and its continuation.

    Attributes:
        gpus: of the run that was killed.
        resumed_on: the GPUs of its continuation.
        blocks: that were finished when it was killed.
        sha256: of each weights file at the end.
    """

    gpus: int
    resumed_on: int
    blocks: int
    sha256: dict[str, str]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a run failed or two runs made other bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default="1,2", help="numbers of GPUs, with commas between them (default 1,2)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"which runs (default {','.join(KINDS)})")
    parser.add_argument("--work", type=Path, default=Path("several-gpus"), help="models and checkpoints (default here)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    given, others = parser.parse_known_args(arguments)
    counts, work = [int(number) for number in given.gpus.split(",")], given.work.absolute()
    runs: list[GpuRun] = []
    killed = None
    for kind in given.kinds.split(","):
        for gpus in counts:
            runs.append(run(kind, gpus, work, others))
            _write(given.json, runs, killed)  # after each run: an interrupted one keeps its results
    if "one" in given.kinds:
        killed = kill_and_resume(max(counts), counts[0], work)
        _write(given.json, runs, killed)
    same = same_bytes(runs, killed)
    show(runs, killed, same=same)
    return int(not same)


def run(kind: str, gpus: int, work: Path, others: Sequence[str]) -> GpuRun:
    """Run speed.py with the first `gpus` GPUs.

    Raises:
        CalledProcessError: it failed.
    """
    dist, report = work / f"dist-{kind}-{gpus}", work / f"report-{kind}-{gpus}.json"
    command = [sys.executable, str(SPEED), "--full", "--peers", "", "--work", str(work / "model"), "--dist", str(dist)]
    command += ["--one"] if kind == "one" else []
    subprocess.run([*command, "--json", str(report), *others], env=_seeing(gpus), check=True)
    return GpuRun(kind=kind, gpus=gpus, report=json.loads(report.read_text()), sha256=digests_of(dist / "model"))


def kill_and_resume(gpus: int, resumed_on: int, work: Path) -> KilledRun:
    """Kill the last job of speed.py when half of its blocks are finished, and go on with another number of GPUs.

    Raises:
        RuntimeError: the run ended before it was killed, or the continuation failed.
    """
    last = sorted((work / "model" / "jobs").glob("ours-*[0-9].json"))[-1]
    job, dist = json.loads(last.read_text()), work / "dist-killed"
    file = work / "killed.json"
    file.write_text(json.dumps({**job, "dist": str(dist), "result": str(work / "killed-result.json")}))
    layers = json.loads((work / "model" / "model" / "model" / "config.json").read_text())["num_hidden_layers"]
    process = _start(file, gpus)
    while (blocks := len(list(dist.rglob("block-*.json")))) < layers // 2:
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it was killed")
        time.sleep(_POLL_S)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if _start(file, resumed_on).wait() != 0:
        raise RuntimeError("the continuation of the killed run failed")
    return KilledRun(gpus=gpus, resumed_on=resumed_on, blocks=blocks, sha256=digests_of(dist))


def _start(job: Path, gpus: int) -> subprocess.Popen[bytes]:
    environ = EnginePaths(pythons={}, paths={}, cache=Path()).environ(OURS, _seeing(gpus))
    return subprocess.Popen([sys.executable, str(SCRIPTS / OURS.script), str(job)], env=environ)


def _seeing(gpus: int) -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus)))}


def digests_of(folder: Path) -> dict[str, str]:
    """Return the sha256 of each weights file below a folder, by its path."""
    files = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): digest_of_file(path) for path in files}


def digest_of_file(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def same_bytes(runs: Sequence[GpuRun], killed: KilledRun | None) -> bool:
    """Return whether all runs of a kind made the same files, and the one that was killed too."""
    made = [(each.kind, each.sha256) for each in runs] + ([("one", killed.sha256)] if killed else [])
    first = dict(reversed(made))
    return all(digests and digests == first[kind] for kind, digests in made)


def _write(path: Path | None, runs: Sequence[GpuRun], killed: KilledRun | None) -> None:
    if path is None:
        return
    content = [{"kind": each.kind, "gpus": each.gpus, "sha256": each.sha256, **each.report} for each in runs]
    whole = {"runs": content, "killed": None if killed is None else vars(killed)}
    write_atomic(path.absolute(), json.dumps(whole, indent=2).encode() + b"\n")


def show(runs: Sequence[GpuRun], killed: KilledRun | None, *, same: bool) -> None:
    """Print a table for each kind of run."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    for kind, title in KINDS.items():
        those = [each for each in runs if each.kind == kind]
        if not those:
            continue
        table = Table("GPUs", "quantize, s", "speed-up", "layer, s", "speed-up", "disk to disk, s",
                      "copying", "solving", "reading", "GPU memory, GB", "host, GB", box=None, title=title)  # fmt: skip
        for each in those:
            table.add_row(*_cells(each, those[0]))
        console.print(table)
    if killed is not None:
        console.print(f"killed on {killed.gpus} after {killed.blocks} blocks, went on with {killed.resumed_on}")
    count = sum(len(each.sha256) for each in runs)
    console.print(f"{count} weights files: {'the same bytes on every number of GPUs' if same else 'OTHER BYTES'}")


def _cells(each: GpuRun, first: GpuRun) -> list[str]:
    result = each.result
    copying, solving, reading = (_share(result, kinds) for kinds in (("copy",), _SOLVING, ("read",)))
    peaks = " ".join(f"{peak / 1e9:.1f}" for peak in result.get("each_gpu_allocated_bytes", []))
    return [
        str(each.gpus), f"{each.seconds:.1f}", f"{first.seconds / each.seconds:.2f}", f"{each.layer_seconds:.3f}",
        f"{first.layer_seconds / each.layer_seconds:.2f}", f"{result['disk_to_disk_s']:.1f}", copying, solving, reading,
        peaks, f"{result.get('host_bytes', 0) / 1e9:.1f}",
    ]  # fmt: skip


def _share(result: dict[str, Any], kinds: Sequence[str]) -> str:
    """Return the share of the stage's time that each GPU spent on something, of the run's own ranks."""
    each = [sum(found.get(kind, 0.0) for kind in kinds) for found in result.get("ranks", {}).values()]
    return " ".join(f"{seconds / result['seconds']:.1%}" for seconds in each)


if __name__ == "__main__":
    sys.exit(main())
