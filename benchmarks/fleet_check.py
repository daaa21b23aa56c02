"""Does the simulation of a fleet agree with the pipeline: the same tiny recipes for real and simulated, side by side.

    python benchmarks/fleet_check.py [--recipes 100] [--places 2] [--megabytes-per-s 0.5]

The scheduler, the local processes, the store and the local target are packager's own. The link is not: every process of
a task passes what it fetches, what it moves to and from the store and what it publishes through one link of this
machine (linked_tasks.py), which lets so many bytes a second through in each direction and is shared by chunks. Places
to compute are GPUs that are none: what computes takes at least a time that a model's size sets, so that it does not
depend on who else uses the cores; `--pace 0` lets it take what it takes.

What the simulation is told comes from calibration runs with a few other recipes and a link without a limit: the median
time of each stage, and its bytes. One such run goes before and one after the run that is compared, so that all have the
same neighbours on the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from packager.fleet.build_requests import Needs, fleet_recipe
from packager.fleet.drive import drive
from packager.fleet.fleet_release import FleetSettings, release_by_fleet
from packager.fleet.local_processes import LocalProcesses
from packager.fleet.policy import Policy
from packager.fleet.scheduler import Scheduler
from packager.fleet.simulated import SimulatedFleet, World
from packager.fleet.store import FolderStore
from packager.fleet.tasks import (
    BuildRequest,
    Executor,
    Machine,
    Start,
    Task,
    TaskEnd,
)
from packager.fleet.worker import TaskOrder
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.release import ReleaseChecks
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6
HIDDEN = (64, 128, 192)  # of the models, in turn
VARIANTS = ({"branch": "main", "group_size": 64, "desc_act": True},)  # as little work for the cores as there can be
_ENDLESS = 1e15  # bytes/s of a link without a limit


@dataclass(frozen=True, kw_only=True)
class Span:
    """A task that ran, with its time by its executor's clock."""

    task: Task
    began: float
    ended: float


class Timed:
    """An executor that notes when each task ran."""

    def __init__(self, inner: Executor) -> None:
        self._inner, self._began = inner, dict[Task, float]()
        self.now, self.machines = inner.now, inner.machines
        self.spans: list[Span] = []

    def start(self, order: Start) -> None:
        """Start a task."""
        self._began[order.task] = self.now()
        self._inner.start(order)

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Wait for tasks, all of which must succeed."""
        ends = self._inner.wait(until)
        for end in ends:
            if end.result != "done":
                raise RuntimeError(f"{end.task}: {end.result}: {end.why}")
            self.spans.append(Span(task=end.task, began=self._began.pop(end.task), ended=self.now()))
        return ends


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how recipes are released: the folder of everything, the places, the link, `Policy.ahead`, the pace."""

    work: Path
    places: int
    bytes_per_s: float
    ahead: float = 1.0
    pace: float = 1.0

    @property
    def policy(self) -> Policy:
        """The knobs of the scheduler."""
        return Policy(ahead=self.ahead)


def write_recipes(folder: Path, count: int, prefix: str, first_seed: int) -> list[Path]:
    """Write recipes of models in several sizes, each with calibration rows of its own; models are shared."""
    from make_model import ModelSpec, Shape, make, recipe_of, write_recipe

    from packager.model.describe import describe

    paths = []
    for index in range(count):
        hidden = HIDDEN[index % len(HIDDEN)]
        shape = Shape(hidden=hidden, intermediate=2 * hidden, heads=4, kv_heads=2, layers=3, vocab=1024)
        spec = ModelSpec(shape=shape, rows=64, seq_len=32, seed=hidden, shard_bytes=10**9, on_gpu=False)
        home = folder / f"model-{hidden}"
        make(home, spec)
        recipe = recipe_of(replace(spec, rows=8))
        recipe["repository"]["id"] = f"benchmark/{prefix}-{index:03}-GPTQ"
        recipe["calibration"]["seed"] = first_seed + index
        recipe |= {"variants": list(VARIANTS), "loaders": {"required": [], "if_available": [], "prompts": ["a word"]}}
        paths.append(home / f"{prefix}-{index:03}.yaml")
        write_recipe(paths[-1], recipe, describe(home / "model", None))
    return paths


@contextmanager
def serving(setting: Setting) -> Iterator[Sequence[str]]:
    """Start what forks the processes of tasks, and give the command that asks it for one."""
    work = setting.work
    work.mkdir(parents=True, exist_ok=True)
    (work / "link").write_bytes(bytes(16))
    warm = replace(setting, work=work / "warm")
    (recipe,) = write_recipes(work / "recipes", 1, "warm", 0)
    order = fleet_recipe(BuildState(RecipeFile.load(recipe), _options(warm), Terminal(quiet=True)), _needs(warm)).order
    (work / "warm.json").write_text(order.model_dump_json())
    socket = str(work / "socket")
    program = str(ROOT / "benchmarks" / "linked_tasks.py")
    command = [sys.executable, program, socket, str(setting.bytes_per_s), str(work), str(setting.pace)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        if process.stdin is None or process.stdout is None or process.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of processes did not start")
        yield [sys.executable, str(ROOT / "tests" / "fork_server.py"), socket]
        process.stdin.close()


def release(recipes: Sequence[Path], setting: Setting) -> list[Span]:
    """Release recipes for real, and return what ran when."""
    timed: list[Timed] = []
    with serving(setting) as command:

        @contextmanager
        def open_executor(orders: Mapping[str, TaskOrder], _: object) -> Iterator[Executor]:
            with LocalProcesses(
                name="here", folder=options.dist, cache=options.cache, orders=orders, command=command,
                environ={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, jobs=setting.places,
                gpus=[str(place) for place in range(setting.places)],
            ) as processes:  # fmt: skip
                timed.append(Timed(processes))
                yield timed[0]

        options = _options(setting)
        settings = FleetSettings(
            needs=_needs(setting), policy=setting.policy, name="benchmark", open_executor=open_executor
        )
        results = release_by_fleet(recipes, options, Terminal(quiet=True), ReleaseChecks(), settings)
    if wrong := [f"{each.repository}: {each.outcome} {each.why}" for each in results if each.outcome != "published"]:
        raise RuntimeError("; ".join(wrong))
    return timed[0].spans


def requests_of(recipes: Sequence[Path], setting: Setting) -> list[BuildRequest]:
    """Return the recipes as the scheduler gets them before anything is built."""
    options, needs = _options(setting), _needs(setting)
    return [
        fleet_recipe(BuildState(RecipeFile.load(path), options, Terminal(quiet=True)), needs).request
        for path in recipes
    ]  # fmt: skip


def _options(setting: Setting) -> Options:
    return Options(dist=setting.work / "dist", cache=setting.work / "cache", device="cpu", environ={})


def _needs(setting: Setting) -> Needs:
    store = setting.work / "store"
    return Needs(
        gpus=1, publishing=True, store=FolderStore(store), store_url=str(store), local_target=setting.work / "dist"
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a kind of task takes: seconds without a link, bytes received, sent while it computes, and sent later."""

    seconds: float
    down: int
    beside: int
    after: int


def measured(spans: Sequence[Span], notes: Path, kind: Callable[[Task], str]) -> dict[str, Measured]:
    """Return the medians of what tasks took, by kind."""
    moved = {(line["recipe"], line["stage"]): line["moved"] for line in map(json.loads, notes.read_text().splitlines())}
    found: dict[str, list[Measured]] = defaultdict(list)
    for span in spans:
        sizes: Mapping[str, int] = moved[span.task.recipe, span.task.stage]
        down = sum(size for name, size in sizes.items() if name.startswith("down"))
        up = sum(size for name, size in sizes.items() if name.startswith("up"))
        # Blocks go while others are computed, branches while they are evaluated.
        beside = up if span.task.stage == "evaluate" else sizes.get("up blocks", 0)
        each = Measured(seconds=span.ended - span.began, down=down, beside=beside, after=up - beside)
        found[kind(span.task)].append(each)
    names = ("seconds", "down", "beside", "after")
    return {
        name: Measured(**{key: median(getattr(each, key) for each in group) for key in names})
        for name, group in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How long a release took in seconds, and the share of the time in which places were taken by a task."""

    makespan_s: float
    taken: float

    @classmethod
    def of(cls, spans: Sequence[Span], places: int) -> "Outcome":
        """Return the outcome of tasks on so many places."""
        makespan_s = max(span.ended for span in spans) - min(span.began for span in spans)
        taken_s = sum((span.ended - span.began) * span.task.gpus for span in spans)
        return cls(makespan_s=makespan_s, taken=taken_s / (places * makespan_s))


def simulate(
    requests: Sequence[BuildRequest],
    known: Mapping[str, Measured],
    kind: Callable[[Task], str],
    setting: Setting,
    *,
    all_beside: bool = False,
) -> Outcome:
    """Release the same recipes by the same scheduler with a simulated clock."""

    def with_bytes(task: Task) -> Task:
        values = known[kind(task)]
        return replace(task, download_bytes=values.down, upload_bytes=values.beside + values.after)

    told = [replace(each, tasks=tuple(map(with_bytes, each.tasks))) for each in requests]
    # As LocalProcesses has it: places, and three quarters of a processor for what moves files.
    machine = Machine(name="here", gpus=setting.places, cpus=setting.places + 0.75)
    world = World(
        machines=(machine,),
        seconds=lambda task: known[kind(task)].seconds,
        bytes_per_s=setting.bytes_per_s,
        beside_bytes=lambda task: task.upload_bytes if all_beside else known[kind(task)].beside,
    )
    timed = Timed(SimulatedFleet(world))
    drive(Scheduler(told, setting.policy), timed)
    return Outcome.of(timed.spans, setting.places)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A release for real and simulated, and the same simulation with a mistake in it, by what the mistake is."""

    real: Outcome
    simulated: Outcome
    mistaken: Mapping[str, Outcome]
    known: Mapping[str, Measured]


def compare(work: Path, *, recipes: int, calibrating: int, setting: Setting) -> Comparison:
    """Release recipes for real, between two calibration runs of half as many others each, and simulate it."""
    if calibrating < 2 * len(HIDDEN):
        raise ValueError(f"each size needs a recipe in both calibration runs: {2 * len(HIDDEN)} or more")
    folder = work / "recipes"
    wanted = write_recipes(folder, recipes, "real", 0)
    spans: list[Span] = []
    notes = work / "notes"

    def calibrate(name: str, first_seed: int) -> None:
        free = replace(setting, work=work / name, bytes_per_s=_ENDLESS)
        spans.extend(release(write_recipes(folder, calibrating // 2, name, first_seed), free))
        with notes.open("a") as file:
            file.write((free.work / "notes").read_text())

    calibrate("before", 1000)
    requests = requests_of(wanted, setting)
    real = release(wanted, setting)
    calibrate("after", 2000)

    def kind(task: Task) -> str:
        number = int(task.recipe.rpartition("/")[2].split("-")[1])
        return f"{task.stage} {HIDDEN[number % len(HIDDEN)]}"

    known = measured(spans, notes, kind)
    run = partial(simulate, requests, known, kind)
    return Comparison(
        real=Outcome.of(real, setting.places),
        simulated=run(setting),
        mistaken={
            "twice the bandwidth": run(replace(setting, bytes_per_s=2 * setting.bytes_per_s)),
            "half the bandwidth": run(replace(setting, bytes_per_s=setting.bytes_per_s / 2)),
            "everything sent while tasks compute": run(setting, all_beside=True),
            "nothing fetched ahead": run(replace(setting, ahead=0.0)),
        },
        known=known,
    )


def shown(comparison: Comparison) -> str:
    """Return the tables as Markdown."""
    lines = [
        "| task, hidden size | s | received, MB | sent beside, MB | sent after, MB |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    for name, each in sorted(comparison.known.items()):
        sizes = (f"{size / MB:.2f}" for size in (each.down, each.beside, each.after))
        lines.append(f"| {name} | {each.seconds:.2f} | {' | '.join(sizes)} |")
    lines += ["", "| release | s | of the real one | places taken |", "| --- | ---: | ---: | ---: |"]
    named = {"real": comparison.real, "simulated": comparison.simulated}
    for name, outcome in (named | {f"simulated, {what}": each for what, each in comparison.mistaken.items()}).items():
        ratio = outcome.makespan_s / comparison.real.makespan_s
        lines.append(f"| {name} | {outcome.makespan_s:.1f} | {ratio:.2f} | {outcome.taken:.1%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, default=100)
    parser.add_argument("--calibrating", type=int, default=18, metavar="N", help="recipes of both calibration runs")
    parser.add_argument("--places", type=int, default=2)
    parser.add_argument("--megabytes-per-s", type=float, default=0.5, help="of the link, in each direction")
    parser.add_argument("--pace", type=float, default=1.0, help="of PACE: 2 lets tasks compute twice as long")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        setting = Setting(
            work=Path(folder) / "real",
            places=options.places,
            bytes_per_s=options.megabytes_per_s * MB,
            pace=options.pace,
        )
        comparison = compare(Path(folder), recipes=options.recipes, calibrating=options.calibrating, setting=setting)
    print(shown(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
