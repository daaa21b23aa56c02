"""The processes of tasks behind one slow link: what fleet_check.py starts, and forks the process of each task from.

    python benchmarks/linked_tasks.py SOCKET BYTES_PER_S WORK PACE

What a task fetches, what it moves to and from the store and what it publishes passes the link. What it computes takes
at least the time of PACE.
"""

import fcntl
import json
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # tests/fork_server.py: a process of a task without five seconds of imports

from packager.cli import task_process  # noqa: E402
from packager.fleet import worker  # noqa: E402
from packager.fleet.open_store import open_store  # noqa: E402
from packager.fleet.store import Store  # noqa: E402
from packager.fleet.tasks import TASK_STAGES  # noqa: E402
from packager.inputs import base_model  # noqa: E402
from packager.pipeline.build_options import Options  # noqa: E402
from packager.pipeline.build_state import BuildState  # noqa: E402
from packager.publish.targets.git_process import GitProcess  # noqa: E402
from packager.recipe.file import RecipeFile  # noqa: E402
from packager.system.terminal import Terminal  # noqa: E402
from tests import fork_server  # noqa: E402

# Seconds of the stages that compute, with a model of hidden size 128, and the functions of packager.fleet.worker.
PACE = {"sweep": ("quantize_and_pack", 6.0), "evaluate": ("evaluate", 3.0), "verify": ("run_loaders", 3.0)}
_PACED_SIZE = 128
_CHUNKS_PER_S = 50  # of a link: who shares it waits for no more than the chunks of the others
Direction = Literal["down", "up"]


@dataclass
class Link:
    """The link of a machine, for all processes that know its file; counts what this process moves.

    A chunk has its place in time after the last one of anybody, so concurrent transfers share the link evenly. Who
    comes late because the machine was busy does not lose the time: only the first chunk of a transfer begins now.

    Args:
        path: a file with the time until which each direction is taken.
        bytes_per_s: in each direction.
    """

    path: Path
    bytes_per_s: float
    moved: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, direction: Direction, size: int, kind: str = "") -> None:
        """Let so many bytes through, and return when they have passed."""
        with self._lock:
            self.moved[f"{direction} {kind}".strip()] += size
        chunk, at = max(1, round(self.bytes_per_s / _CHUNKS_PER_S)), None
        for start in range(0, size, chunk):
            at = self._take(
                direction, min(chunk, size - start) / self.bytes_per_s, time.monotonic() if at is None else at
            )
            time.sleep(max(0.0, at - time.monotonic()))

    def _take(self, direction: Direction, seconds: float, earliest: float) -> float:
        """Take a share of time, and return its end."""
        offset = 8 * ("down", "up").index(direction)
        with self.path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(offset)
            (taken_until,) = struct.unpack("d", file.read(8))
            until: float = max(taken_until, earliest) + seconds
            file.seek(offset)
            file.write(struct.pack("d", until))
        return until


class LinkedStore:
    """A store behind a link: a file passes it, whichever way it goes. To ask whether a file is there weighs nothing."""

    def __init__(self, inner: Store, link: Link) -> None:
        self._inner, self._link, self.url, self.without_looking = inner, link, inner.url, inner.without_looking
        self.create, self.size_bytes, self.names, self.delete = (
            inner.create, inner.size_bytes, inner.names, inner.delete
        )  # fmt: skip

    def read(self, name: str, *, large: bool = False) -> bytes | None:
        """Bring a file."""
        data = self._inner.read(name, large=large)
        self._link.carry("down", len(data or b""), "store")
        return data

    def write(self, name: str, data: bytes) -> None:
        """Send a file, or a block."""
        self._link.carry("up", len(data), "blocks" if "/blocks/" in name else "store")
        self._inner.write(name, data)

    def put(self, path: Path, name: str) -> None:
        """Send a local file."""
        self._link.carry("up", path.stat().st_size, "store")
        self._inner.put(path, name)

    def get(self, name: str, path: Path) -> None:
        """Bring a file to a local path."""
        self._inner.get(name, path)
        self._link.carry("down", path.stat().st_size, "store")


def serve(socket: str, link: Link, work: Path, pace: float) -> None:
    """Serve the processes of tasks, which pass what they move through a link and note what they moved."""
    warm_up(worker.TaskOrder.model_validate_json((work / "warm.json").read_bytes()), work / "warm")
    open_source, store_files, run = base_model.open_source, GitProcess.store, task_process.run_one_task
    stage: list[str] = []

    def open_over_link(file: RecipeFile, *rest: Any) -> Any:
        if stage == ["fetch"]:
            folder = file.base_folder(str(file.recipe.base_model.path))
            link.carry("down", sum(path.stat().st_size for path in folder.iterdir()), "base model")
        return open_source(file, *rest)

    def store_over_link(git: Any, files: Mapping[str, Any]) -> None:
        link.carry("up", sum(file.size_bytes for file in files.values()), "branches")
        store_files(git, files)

    def run_and_note() -> None:
        order = json.loads(sys.argv[-1])["order"]
        stage.append(order["stage"])
        run()
        line = {"recipe": order["repository"], "stage": order["stage"], "moved": link.moved}
        with (work / "notes").open("a") as file:  # one write, which appends as a whole
            file.write(json.dumps(line) + "\n")

    vars(base_model)["open_source"] = open_over_link
    vars(worker)["open_store"] = lambda url, log: LinkedStore(open_store(url, log), link)
    setattr(GitProcess, "store", store_over_link)  # noqa: B010 - a method
    vars(task_process)["run_one_task"] = run_and_note
    for own, (name, seconds) in PACE.items():
        vars(worker)[name] = paced(vars(worker)[name], seconds * pace, partial(stage.__eq__, [own]))
    fork_server.serve(socket)


def paced(
    work: Callable[[BuildState], Any], seconds: float, in_its_stage: Callable[[], bool]
) -> Callable[[BuildState], Any]:
    """Return work that takes at least so long for a model of hidden size 128; in later stages there is none left."""

    def longer(run: BuildState) -> Any:
        if not in_its_stage():
            return work(run)
        ends = time.monotonic() + seconds * run.plan.architecture.hidden_size / _PACED_SIZE
        done = work(run)
        time.sleep(max(0.0, ends - time.monotonic()))
        return done

    return longer


def warm_up(order: worker.TaskOrder, folder: Path) -> None:
    """Do each stage once in this process: what Python imports and libraries prepare, the forked processes have."""
    options = Options(dist=folder, cache=folder / "cache", device="cpu", environ={})
    for stage in TASK_STAGES:
        worker.run_task(order.model_copy(update={"stage": stage}), options, Terminal(quiet=True))


if __name__ == "__main__":
    serve(sys.argv[1], Link(Path(sys.argv[3]) / "link", float(sys.argv[2])), Path(sys.argv[3]), float(sys.argv[4]))
