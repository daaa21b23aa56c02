"""Kill or interrupt builds at chosen moments, many times in one process start: run by test_build_crash.py.

Reads jobs from standard input, one JSON object per line, and answers each with a line. A job has a folder to start from
(null: nothing), steps, and perhaps a folder to keep the end in. A step names a recipe, a command and when it ends:
{"kill": n} before the n-th effect (a file opened for writing, a rename, a removal, a folder made), {"kill": pattern}
before the first effect described by it ("os.rename SOURCE TARGET"), {"interrupt": n} before the n-th by Ctrl-C,
{"seconds": s} killed after s seconds, {} never. "signal" names another signal than SIGKILL. {"fill": n} fills the disk
before the n-th effect with the file "filler", but for "leave" bytes. "clock_s" lets the clock jump by as many seconds,
there and back, each time after "readings" of it. {"after_s": s} begins later. A step is a fork of this process, which
has built once and has no other thread; it reports the blocks that it has finished.
"""

import errno
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from packager.cli.main import main as packager
from packager.quantize.block_store import BlockStore
from packager.receipt import LinearRecord
from packager.system.files import sha256_file
from tests.effects import FILES, FILES_AND_PROCESSES, EffectCounter
from tests.publish_fixtures import git, trees
from tests.tiny_recipe import BRANCHES, RECIPE, build, hub_folder, leftovers, workspace, write_all

WARM = (
    "packager.prove.verify", "packager.pipeline.flow", "packager.cli.status_view", "packager.cli.publish_view",
    "packager.publish.targets.git_process",
    "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers", "git",
)  # fmt: skip
MOST_FILLED_BYTES = 1 << 30


def child(step: dict[str, Any], dist: Path, count: int, words: Path) -> None:
    """Run the command of a step as the command line would, and end this process with its exit code."""
    code: object = 1
    try:
        code = run_command(step, dist, count, words)
    except BaseException:  # noqa: BLE001 - a traceback is a finding
        traceback.print_exc()
    finally:
        os._exit(code if isinstance(code, int) else 0)  # whatever happens: a fork must not go on as its parent


def run_command(step: dict[str, Any], dist: Path, count: int, words: Path) -> object:
    """Run the command of a step with its disturbance; return its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's jobs ignore it
    stream = os.open(words, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(stream, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    command = step.get("command", "build")
    number = signal.Signals["SIGINT" if "interrupt" in step else step.get("signal", "SIGKILL")]
    fatal = step.get("fill") or step.get("kill") or step.get("interrupt") or 0
    act = partial(fill_disk, Path(step["filler"]), step["leave"]) if "fill" in step else None
    counter = EffectCounter(fatal, number, FILES_AND_PROCESSES if command == "publish" else FILES, act=act)
    if "clock_s" in step:
        jump_clock(step["clock_s"], step["readings"])
    quiet, place = ["--quiet"] if command != "status" else [], ["--dist", str(dist)] if command != "lock" else []
    sys.argv = ["packager", command, step["recipe"], *place, *quiet]
    sys.addaudithook(counter)
    report_finished_blocks(count)
    code: object = 0
    try:
        packager()
    except SystemExit as end:
        code = end.code
    os.write(count, f"effects {counter.count}\n".encode())
    sys.stderr.flush()
    return code


def fill_disk(filler: Path, leave: int) -> None:
    """Take the space of a file's disk, but for some bytes."""
    disk = os.statvfs(filler.parent)
    if disk.f_blocks * disk.f_frsize > MOST_FILLED_BYTES:
        raise RuntimeError(f"{filler} lies on a disk of others")
    with filler.open("wb", buffering=0) as stream:
        for block in (bytes(1 << 20), bytes(4096)):
            try:
                while True:
                    stream.write(block)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
        stream.truncate(max(0, stream.tell() - leave))


def jump_clock(by_s: float, every: int) -> None:
    """Let the clock of this process jump after some readings, back after as many more, and so on."""
    real, real_ns, readings = time.time, time.time_ns, 0

    def off_s() -> float:
        nonlocal readings
        readings += 1
        return by_s if readings // every % 2 else 0.0

    time.time = lambda: max(0.0, real() + off_s())
    time.time_ns = lambda: max(0, real_ns() + int(off_s() * 1e9))


def report_finished_blocks(stream: int) -> None:
    """Let this process write a line once a block is finished."""
    write = BlockStore.write

    def write_and_tell(
        self: BlockStore, block: int, tensors: Mapping[str, torch.Tensor], records: Sequence[LinearRecord]
    ) -> None:
        write(self, block, tensors, records)
        os.write(stream, f"{self.checkpoint.parent.name} {block}\n".encode())

    BlockStore.write = write_and_tell  # type: ignore[method-assign]  # a driver has no monkeypatch


class Running:
    """A step in a fork of this process."""

    def __init__(self, step: dict[str, Any], dist: Path, words: Path) -> None:
        self.step, self.dist, self.words = step, dist, words
        self.started = time.monotonic()
        self.reader, writer = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            time.sleep(step.get("after_s", 0.0))
            child(step, dist, writer, words)
        os.close(writer)

    def end(self) -> dict[str, Any]:
        """Return its exit code, its blocks, its effects if it came to its end, and its output."""
        if "seconds" in self.step:
            time.sleep(self.step["seconds"])
            os.kill(self.process, signal.Signals[self.step.get("signal", "SIGKILL")])
        _, status = os.waitpid(self.process, 0)
        with os.fdopen(self.reader, "rb") as stream:
            *blocks, last = stream.read().decode().split("\n")[:-1] or [""]
        ended = last.startswith("effects ")
        return {
            "code": os.waitstatus_to_exitcode(status),
            "blocks": blocks if ended or not last else [*blocks, last],
            "effects": int(last.removeprefix("effects ")) if ended else -1,
            "seconds": time.monotonic() - self.started,
            "printed": self.words.read_text() if self.words.exists() else "",
            "visible": visible(self.dist),
        }


def run_step(step: dict[str, Any], dist: Path, words: Path) -> dict[str, Any]:
    """Run a step in a fork of this process; see `Running.end`."""
    return Running(step, dist, words).end()


def visible(dist: Path) -> dict[str, dict[str, str]]:
    """Return the sha256 of each file in the folders that a person sees."""
    folders = {branch: workspace(dist).folder(branch) for branch in BRANCHES}
    return {
        branch: {path.name: sha256_file(path) for path in folder.iterdir() if not path.name.startswith(".tmp-")}
        for branch, folder in folders.items()
        if folder.exists()
    }


def run_job(job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run the steps of a job one after the other in a fresh output folder."""
    dist = scratch / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    if job["start"]:
        shutil.copytree(job["start"], dist, symlinks=True)
    steps = [run_step(step, dist, scratch / "words") for step in job["steps"]]
    if "keep" in job:
        shutil.copytree(dist, job["keep"], symlinks=True)
    repository = hub_folder(dist)
    published = repository.exists()
    return {
        "steps": steps,
        "trees": trees(repository) if published else {},
        "status": git("status", "--porcelain", "--ignored", cwd=repository) if published else "",
        "leftovers": leftovers(dist),
        "unfinished": [path.name for path in dist.rglob("unfinished/*")],
    }


def warm_up(folder: Path) -> None:
    """Build once: a fork need not import, trace the model and compile the templates again."""
    torch.set_num_threads(1)
    for name in WARM:
        importlib.import_module(name)
    recipe = write_all(folder / "warm", {"variants": RECIPE["variants"][:1]})
    build(recipe, folder / "warm" / "dist")
    shutil.rmtree(folder / "warm")
    gc.collect()
    gc.freeze()  # a fork would copy the pages of all these modules to look for garbage


def main() -> None:
    """Run the jobs; the argument is a scratch folder."""
    warnings.simplefilter("error")
    vars(os).update(fsync=lambda _: None, fdatasync=lambda _: None)  # a kill is no loss of power
    scratch = Path(sys.argv[1])
    warm_up(scratch)
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line), scratch)), flush=True)


if __name__ == "__main__":
    main()
