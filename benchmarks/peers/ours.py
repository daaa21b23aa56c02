"""Our engine, through the stages of a real build: from a recipe on disk to audited checkpoint folders.

A job has recipe, dist, device, gpu_memory_bytes (null: all) and result. `seconds` is the stage "quantize" alone: it
reads weights from disk, solves, packs, and writes to disk. `stages` has the seconds of every stage, `ranks` what each
device spent on the parts of `rank_times.py`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as packager.cli.main does

from peer import Job, Stopwatch, need, run, versions
from rank_times import RankTimes

if TYPE_CHECKING:
    from packager.pipeline.build_state import BuildState


def quantize(job: Job) -> dict[str, Any]:
    """Build the weights of every variant of the recipe."""
    terminal = need("packager.system.terminal").Terminal()
    watch = Stopwatch(job["device"])
    with watch, RankTimes(job["device"]) as times, _layers(watch) as reached:
        build = build_of(job, terminal)
        stages = {"plan": time.perf_counter() - watch.started}
        with build.workspace.locked():
            build.read_receipts()
            _ = build.source, build.texts  # read now, so that they are stages of their own
            need("packager.pipeline.quantize_stage").quantize_and_pack(build)
    packed = [receipt.seconds["pack"] for receipt in build.ordered_receipts() if "pack" in receipt.seconds]
    stages |= terminal.seconds
    if packed:
        stages["pack and audit"] = sum(packed)
    return {
        **watch.outcome(),
        "seconds": terminal.seconds["quantize"],
        "marks": [reached[block] for block in sorted(reached)],
        "stages": stages,
        "ranks": times.seconds(),
        "disk_to_disk_s": watch.seconds,
        "variants": [plan.variant.branch for plan in build.plan.variants],
        "timed": "the stage quantize: reading, solving, packing and writing",
        "settings": {"gpu_memory_bytes": job["gpu_memory_bytes"]},
        "versions": versions("triton", "numpy", "greenlet", "safetensors"),
    }


def build_of(job: Job, terminal: Any) -> BuildState:
    """Return the build of a job's recipe, nothing of it done or read."""
    state: Any = need("packager.pipeline.build_state")
    recipe_file = need("packager.recipe.file").RecipeFile.load(Path(job["recipe"]))
    limit = {} if job["gpu_memory_bytes"] is None else {"gpu_memory_bytes": job["gpu_memory_bytes"]}
    dist = Path(job["dist"])
    options = need("packager.pipeline.build_options").Options(
        dist=dist, cache=dist / "cache", device=job["device"], environ=dict(os.environ), **limit
    )
    build: BuildState = state.BuildState(recipe_file, options, terminal)
    return build


@contextmanager
def _layers(watch: Stopwatch) -> Iterator[dict[int, float]]:
    """Record when the last variant finished each block: then the block is stored while the next one begins."""
    store: Any = need("packager.quantize.block_store").BlockStore
    write, reached = store.write, {}

    def marked(self: Any, block: int, *rest: Any) -> None:
        reached[block] = time.perf_counter() - watch.started
        write(self, block, *rest)

    store.write = marked
    try:
        yield reached
    finally:
        store.write = write


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], quantize))
