"""Publish the same folders to a loopback Hub with ours and with `hf upload`, in turn, and compare.

    python benchmarks/publishing.py --size 256MB --rounds 3 --json publishing.json

Both send every byte. `hf upload` gets its repository and branches beforehand; ours creates them, reads every branch
back and compares it. The Hub is the tests' loopback server on this machine: the figures compare two clients, no
networks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from speed import _bytes

from packager.system.files import write_atomic

ROOT = Path(__file__).parents[1]
BRANCHES = ("main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True", "gptq-4bit-128g-actorder_True")
ORDER = ("first", "second")
TOKEN = "hf_writes_0123456789"  # noqa: S105 - the loopback Hub's
OURS = """
import sys, time
from pathlib import Path
from packager.system.files import file_records, list_files
from packager.publish.branches import BranchContent, publish_branches
from packager.receipt import FileRecord
from packager.publish.targets.hub import HubTarget
import json
folder, repository = Path(sys.argv[1]), sys.argv[2]
manifests = json.loads((folder / "manifests.json").read_text())
contents = [
    BranchContent(branch=branch, folder=folder / branch, message=branch,
                  files={name: FileRecord(**record) for name, record in files.items()})
    for branch, files in manifests.items()
]
publish_branches(contents, HubTarget(repository), lambda line: print(line, file=sys.stderr))
"""


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=_bytes, default=256_000_000, help="of each branch's weights (default 256MB)")
    parser.add_argument("--rounds", type=int, default=4, help="at least 2 (default 4)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make(folder / "branches", given.size)
        with loopback(folder) as environ:
            results = [measure(folder, environ, number) for number in range(given.rounds)]
    total = given.size * len(BRANCHES)
    found = {name: [each[name] for each in results if name in each] for name in sorted({*results[0], *results[-1]})}
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratio = statistics.geometric_mean(medians[f"hf upload, {order}"] / medians[f"ours, {order}"] for order in ORDER)
    table = Table(title=f"Four branches of {given.size / 1e6:.0f} MB, {given.rounds} rounds")
    for heading in ("", "seconds", "MB/s"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, seconds in found.items():
        rate = "" if name == "ours, nothing to do" else f"{total / 1e6 / medians[name]:.0f}"
        table.add_row(name, ", ".join(f"{each:.2f}" for each in seconds), rate)
    console = Console()
    console.print(table)
    console.print(f"throughput of ours over hf upload's, in the same place: {ratio:.2f}")
    if given.json:
        report = {"size_bytes": given.size, "seconds": found, "throughput_ratio": ratio}
        write_atomic(given.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    return 0


def make(folder: Path, size: int) -> None:
    """Write the branches' folders and their manifests, as a build leaves them."""
    from packager.system.files import file_records, list_files

    manifests = {}
    for number, branch in enumerate(BRANCHES):
        (folder / branch).mkdir(parents=True)
        (folder / branch / "README.md").write_text("---\nlicense: mit\n---\n# A card\n", encoding="utf-8")
        dice = random.Random(number)  # noqa: S311 - weights, not secrets
        with (folder / branch / "model.safetensors").open("wb") as stream:
            for start in range(0, size, 1 << 24):
                stream.write(dice.randbytes(min(1 << 24, size - start)))
        records = file_records(folder / branch / name for name in list_files(folder / branch))
        manifests[branch] = {path.name: record.model_dump() for path, record in records.items()}
    (folder / "manifests.json").write_text(json.dumps(manifests), encoding="utf-8")


def measure(folder: Path, environ: dict[str, str], number: int) -> dict[str, float]:
    """Publish to one repository per client; the second client finds a busier disk, so the order alternates."""
    seconds: dict[str, float] = {}
    clients = [("hf upload", bare, "Bare"), ("ours", ours, "Ours")]
    ordered = clients if number % 2 else clients[::-1]
    for order, (name, client, prefix) in zip(ORDER, ordered, strict=True):
        os.sync()
        seconds[f"{name}, {order}"] = client(folder, environ, f"somebody/{prefix}-{number}")
    seconds["ours, nothing to do"] = ours(folder, environ, f"somebody/Ours-{number}")
    for name in ("Bare", "Ours"):
        shutil.rmtree(folder / "hub" / f"somebody/{name}-{number}.git")
    return dict(sorted(seconds.items()))


def bare(folder: Path, environ: dict[str, str], repository: str) -> float:
    """Upload each folder to its branch with `hf upload`; return the seconds of the uploads."""
    hf = str(Path(sys.executable).with_name("hf"))
    run([hf, "repos", "create", repository], environ)
    for branch in BRANCHES[1:]:
        run([hf, "repos", "branch", "create", repository, branch], environ)
    return sum(
        run([hf, "upload", repository, str(folder / "branches" / branch), "--revision", branch], environ)
        for branch in BRANCHES
    )


def ours(folder: Path, environ: dict[str, str], repository: str) -> float:
    """Publish all folders with packager; return the seconds."""
    return run([sys.executable, "-c", OURS, str(folder / "branches"), repository], environ)


def run(command: Sequence[str], environ: dict[str, str]) -> float:
    """Run a command; return its wall time, start-up included."""
    started = time.perf_counter()
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return time.perf_counter() - started


@contextmanager
def loopback(folder: Path) -> Iterator[dict[str, str]]:
    """Start the loopback Hub; yield the environment by which clients find it."""
    command = [sys.executable, "-m", "tests.loopback_hub", "--root", str(folder / "hub"), "--token", TOKEN]
    server = subprocess.Popen([*command, "--user", "somebody"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None  # noqa: S101 - it was asked for
        endpoint = server.stdout.readline().strip()
        own = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
        yield {**os.environ, **own, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
