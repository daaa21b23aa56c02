"""Kill or interrupt builds at chosen moments, many times in one process start: run by test_build_crash.py.

Reads jobs from standard input, one JSON object per line, and answers each with a line. A job has a folder to start from
(null: nothing), steps, and perhaps a folder to keep the end in. A step names a recipe, a command and when it ends:
{"kill": n} before the n-th effect (a file opened for writing, a rename, a removal, a folder made), {"kill": pattern}
before the first effect described by it ("os.rename SOURCE TARGET"), {"interrupt": n} before the n-th by Ctrl-C,
{"seconds": s} killed after s seconds, {} never. "signal" names another signal than SIGKILL. {"full": n} fails from the
n-th effect on as on a full disk. "clock_s" lets the clock jump by as many seconds. A step is a fork of this process,
which has built once and has no other thread; it reports the blocks that it has finished.
"""

import gc
import importlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from packager.cli.main import main as packager
from packager.quantize.block_store import BlockStore
from packager.receipt import LinearRecord
from packager.system.files import sha256_file
from tests.effects import EffectCounter
from tests.publish_fixtures import git, trees
from tests.tiny_recipe import BRANCHES, RECIPE, build, hub_folder, leftovers, workspace, write_all

WARM = (
    "packager.prove.verify", "packager.pipeline.stages", "packager.cli.status_view", "packager.cli.publish_view",
    "packager.publish.targets.git_process",
    "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers", "git",
)  # fmt: skip


def child(step: dict[str, Any], dist: Path, count: int, words: Path) -> None:
    """Run the command of a step as the command line would."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    stream = os.open(words, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(stream, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    number = "SIGINT" if "interrupt" in step else step.get("signal", "SIGKILL")
    fatal = step.get("full") or step.get("kill") or step.get("interrupt") or 0
    counter = EffectCounter(fatal, None if "full" in step else signal.Signals[number])
    if "clock_s" in step:
        jump_clock(step["clock_s"])
    command = step.get("command", "build")
    sys.argv = ["packager", command, step["recipe"], "--dist", str(dist), *(["--quiet"] if command != "status" else [])]
    sys.addaudithook(counter)
    report_finished_blocks(count)
    code: object = 1
    try:
        packager()
    except SystemExit as end:
        code = end.code
    os.write(count, f"effects {counter.count}\n".encode())
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


def jump_clock(by_s: float) -> None:
    """Let the clock of this process jump at its twentieth reading, and again, back, at each twentieth after it."""
    real, readings = time.time, 0

    def jumping() -> float:
        nonlocal readings
        readings += 1
        return real() + (by_s if readings // 20 % 2 else 0.0)

    time.time = jumping


def report_finished_blocks(stream: int) -> None:
    """Let this process write a line once a block is finished."""
    write = BlockStore.write

    def write_and_tell(
        self: BlockStore, block: int, tensors: Mapping[str, torch.Tensor], records: Sequence[LinearRecord]
    ) -> None:
        write(self, block, tensors, records)
        os.write(stream, f"{self.checkpoint.parent.name} {block}\n".encode())

    BlockStore.write = write_and_tell  # type: ignore[method-assign]  # a driver has no monkeypatch


def run_step(step: dict[str, Any], dist: Path, words: Path) -> dict[str, object]:
    """Run a step in a fork; return its exit code, its blocks, its effects if it came to its end, and its output."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        child(step, dist, writer, words)
    os.close(writer)
    if "seconds" in step:
        time.sleep(step["seconds"])
        os.kill(process, signal.Signals[step.get("signal", "SIGKILL")])
    _, status = os.waitpid(process, 0)
    with os.fdopen(reader, "rb") as stream:
        *blocks, last = stream.read().decode().split("\n")[:-1] or [""]
    ended = last.startswith("effects ")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "blocks": blocks if ended or not last else [*blocks, last],
        "effects": int(last.removeprefix("effects ")) if ended else -1,
        "printed": words.read_text() if words.exists() else "",
        "visible": visible(dist),
    }


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
    for name in WARM:
        importlib.import_module(name)
    recipe = write_all(folder / "warm", {"variants": RECIPE["variants"][:1]})
    build(recipe, folder / "warm" / "dist")
    shutil.rmtree(folder / "warm")


def main() -> None:
    """Run the jobs; the argument is a scratch folder."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    vars(os).update(fsync=lambda _: None, fdatasync=lambda _: None)  # a kill is no loss of power
    scratch = Path(sys.argv[1])
    warm_up(scratch)
    gc.collect()
    gc.freeze()  # a fork would copy the pages of all these modules to look for garbage
    for line in sys.stdin:
        print(json.dumps(run_job(json.loads(line), scratch)), flush=True)


if __name__ == "__main__":
    main()
