"""How busy the GPUs of a fleet are: packager's scheduler with a simulated clock, and what each quantity changes.

    python benchmarks/fleet.py [--models 10000] [--gpus 100] [--only WORDS]

A day of a fleet takes seconds. Measured are only the times of sweeps and of hashing (docs/explanation/measurements.md,
"A 13B shape on a GPU", one H200, four variants); they are scaled by the size of the base model. The times of measuring
and of the loaders are assumptions, in the constants below; so are the mix of sizes and the links.

A busy GPU is one that computes. One that waits for a transfer, or whose task has only transfers left, is idle.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from packager.fleet.drive import drive
from packager.fleet.policy import Policy
from packager.fleet.scheduler import Scheduler
from packager.fleet.simulated import SimulatedFleet, World
from packager.fleet.tasks import BuildRequest, Machine, Task
from packager.fleet.windows import Limits, LimitWindow

GB = 10**9
# Share of models by size of the base model in GB (fp16): 1.1B, 3B, 8B, 13B, 32B, 70B parameters.
SIZES = ((2.2, 0.15), (6.0, 0.15), (16.0, 0.40), (26.0, 0.15), (64.0, 0.10), (140.0, 0.05))
VARIANTS = 4
BUILDS_PER_BASE = 30 / 26.03  # four 4-bit variants of the 13B shape: 30 GB
SWEEP_S_PER_GB = (84.4 + 10) / 26.03  # quantize and pack four variants: measured
HASH_S_PER_GB = 14.2 / 26.03  # each task that computes opens the base model: measured
START_S = 10.0  # Python, torch, CUDA: assumed
EVALUATE_S_PER_GB = 1.7  # five forward passes over 131,072 tokens at 400 TFLOP/s: computed, not measured
VERIFY_S, VERIFY_S_PER_GB = 80.0, 1.0  # loaders in their environments: assumed
CARD_S, PUBLISH_S = 10.0, 20.0  # assumed


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fleet, its links and its troubles; the defaults are the first line of the table."""

    name: str = "base"
    models: int = 10_000
    gpus: int = 100
    gpus_per_machine: int = 4
    gbit_per_s: float = 10.0
    ahead: float = 1.0
    disk_gb: float = 2_000.0
    failing: float = 0.01
    machine_life_h: float | None = 24.0
    proving: bool = True
    seed: int = 0


def requests(scenario: Scenario) -> list[BuildRequest]:
    """Return the recipes of a scenario; the sizes are drawn."""
    chance = random.Random(scenario.seed)  # noqa: S311 - a simulation
    sizes, shares = zip(*SIZES, strict=True)
    return [
        _request(f"models/{index:05}", size, scenario)
        for index, size in enumerate(chance.choices(sizes, shares, k=scenario.models))
    ]


def _request(name: str, size_gb: float, scenario: Scenario) -> BuildRequest:
    base, builds = round(size_gb * GB), round(size_gb * GB * BUILDS_PER_BASE)
    tasks = [
        Task(recipe=name, stage="fetch", download_bytes=base),
        Task(recipe=name, stage="sweep", gpus=1, upload_bytes=builds),  # the blocks
        Task(recipe=name, stage="card"),
        Task(recipe=name, stage="publish", download_bytes=builds, upload_bytes=builds, commits=VARIANTS),
    ]
    if scenario.proving:
        tasks.append(Task(recipe=name, stage="evaluate", gpus=1, upload_bytes=builds))  # the branches
        tasks.append(Task(recipe=name, stage="verify", gpus=1))
    return BuildRequest(recipe=name, tasks=tuple(tasks), disk_bytes=base + builds, store_bytes=builds)


def seconds_of(task: Task, base_gb: float) -> float:
    """Return how long a task computes."""
    opened = START_S + HASH_S_PER_GB * base_gb
    return {
        "fetch": opened,
        "sweep": opened + SWEEP_S_PER_GB * base_gb,
        "evaluate": opened + EVALUATE_S_PER_GB * base_gb,
        "verify": opened + VERIFY_S + VERIFY_S_PER_GB * base_gb,
        "card": CARD_S,
        "publish": PUBLISH_S,
    }[task.stage]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a scenario: GPUs busy and usefully busy as fractions, for the whole time and without its end.

    `steady` is the fraction until nothing was left to fetch: at the end of a fleet's work GPUs run out of it.
    """

    hours: float
    busy: float
    useful: float
    steady: float
    published: int
    parked: int
    tasks: int
    seconds: float


def simulate(scenario: Scenario) -> Result:
    """Run a scenario to its end."""
    started = time.perf_counter()
    wanted = requests(scenario)
    base_gb = {request.recipe: request.tasks[0].download_bytes / GB for request in wanted}
    count = max(1, scenario.gpus // scenario.gpus_per_machine)
    machines = tuple(
        Machine(
            name=f"m{index}", gpus=scenario.gpus_per_machine, cpus=16.0, disk_bytes=round(scenario.disk_gb * GB)
        )
        for index in range(count)
    )  # fmt: skip
    world = World(
        machines=machines,
        seconds=lambda task: seconds_of(task, base_gb[task.recipe]),
        beside_bytes=lambda task: task.upload_bytes if task.gpus else 0,
        bytes_per_s=scenario.gbit_per_s * 1e9 / 8,
        failing=scenario.failing,
        machine_life_s=scenario.machine_life_h and scenario.machine_life_h * 3600,
        seed=scenario.seed,
    )
    limits = Limits(commits=LimitWindow(100, 3600))
    scheduler, fleet = Scheduler(wanted, Policy(ahead=scenario.ahead, limits=limits)), SimulatedFleet(world)
    steady = [0.0]

    def observe(_: object) -> None:
        if scheduler.next_to_fetch and fleet.existing_s:
            steady[0] = fleet.busy_s / fleet.existing_s

    drive(scheduler, fleet, observe=observe)
    states = [scheduler.state(request.recipe) for request in wanted]
    return Result(
        hours=fleet.now() / 3600,
        busy=fleet.busy_s / fleet.existing_s,
        useful=fleet.useful_s / fleet.existing_s,
        steady=steady[0],
        published=states.count("published"),
        parked=states.count("parked"),
        tasks=fleet.started,
        seconds=time.perf_counter() - started,
    )


def scenarios(base: Scenario) -> list[Scenario]:
    """Return the base scenario, and each with one quantity changed."""
    return [
        base,
        *(replace(base, name=f"{value:g} Gbit/s a machine", gbit_per_s=value) for value in (1.0, 2.5, 5.0, 25.0)),
        *(replace(base, name=f"GPUs of a machine: {count}", gpus_per_machine=count) for count in (1, 2, 5, 10)),
        *(replace(base, name=f"ahead {ahead:g}", ahead=ahead) for ahead in (0.0, 0.5, 2.0)),
        *(replace(base, name=f"{disk:g} GB a machine", disk_gb=disk) for disk in (500.0, 1000.0, 4000.0)),
        replace(base, name="nothing fails", failing=0.0, machine_life_h=None),
        replace(base, name="5 % of tasks fail", failing=0.05),
        replace(base, name="a machine lives 4 h", machine_life_h=4.0),
        replace(base, name="no evaluation, no loaders, no copies of branches", proving=False),
    ]


HEADER = """\
| scenario | GPUs busy | until the last fetch | of it useful | hours | published | parked | tasks started |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def row(scenario: Scenario, result: Result) -> str:
    """Return a line of the table."""
    cells = (
        scenario.name, f"{result.busy:.1%}", f"{result.steady:.1%}", f"{result.useful:.1%}", f"{result.hours:.1f}",
        f"{result.published:,}", f"{result.parked:,}", f"{result.tasks:,}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=100)
    parser.add_argument("--only", metavar="WORDS", help="scenarios whose names have these words")
    options = parser.parse_args(arguments)
    print(HEADER)
    for scenario in scenarios(Scenario(models=options.models, gpus=options.gpus)):
        if options.only is None or options.only in scenario.name:
            result = simulate(scenario)
            print(row(scenario, result), flush=True)
            print(f"{scenario.name}: {result.seconds:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
