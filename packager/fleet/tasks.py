"""The vocabulary of the scheduler: recipes as tasks with needs, machines, and what became of a task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

TaskStage = Literal["fetch", "sweep", "evaluate", "verify", "card", "publish"]
# In the order of a recipe's life; all tasks of a stage end before one of the next stage starts.
TASK_STAGES: Final[tuple[TaskStage, ...]] = ("fetch", "sweep", "evaluate", "verify", "card", "publish")
# What runs where the base model was fetched.
AT_HOME: Final = frozenset(TASK_STAGES) - {"publish"}
QueueState = Literal["requested", "building", "built", "published", "parked"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One stage of one recipe, or a share of one.

    Attributes:
        recipe: the id of its repository.
        stage: what is done.
        share: counts the sweeps of a recipe from 0.
        branches: the variants of a sweep; none are all.
        gpus: that it takes.
        cpus: that it takes.
        download_bytes: about how much it receives, for limits and estimates.
        upload_bytes: about how much it sends.
        commits: that it may make in its repository.
    """

    recipe: str
    stage: TaskStage
    share: int = 0
    branches: tuple[str, ...] = ()
    gpus: int = 0
    cpus: float = 1.0
    download_bytes: int = 0
    upload_bytes: int = 0
    commits: int = 0

    def __str__(self) -> str:
        """Return the recipe and the stage, and which share it is where that is not the first."""
        return f"{self.recipe} {self.stage}" + (f" {self.share + 1}" if self.share else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """A recipe that is to be released: the tasks that are left.

    Attributes:
        recipe: the id of its repository.
        tasks: in any order; those before the last one that is done are left out, but the fetch.
        disk_bytes: that its home needs, for the base model, the builds, and what is quantized for its losses alone.
        store_bytes: that its blocks and its builds take in the store at most.
        priority: a higher one goes first.
    """

    recipe: str
    tasks: tuple[Task, ...]
    disk_bytes: int = 0
    store_bytes: int = 0
    priority: int = 0

    @property
    def most_gpus(self) -> int:
        """The largest number of GPUs that a task at home takes."""
        return max((task.gpus for task in self.tasks if task.stage in AT_HOME), default=0)

    @property
    def most_cpus(self) -> float:
        """The largest number of CPUs that a task at home takes."""
        return max((task.cpus for task in self.tasks if task.stage in AT_HOME), default=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A machine of the fleet.

    Attributes:
        name: unique; a machine that comes back after it was lost has another one.
        gpus: that it has.
        cpus: that it has.
        disk_bytes: for base models and builds; None for as much as is asked for.
        publishes: it may hold a token that writes.
    """

    name: str
    gpus: int = 0
    cpus: float = 1.0
    disk_bytes: int | None = None
    publishes: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """An order to an executor: start a task on a machine.

    Attributes:
        task: what is started.
        machine: its name.
        drop: recipes whose files the machine deletes before.
        attempt: counts from 1.
    """

    task: Task
    machine: str
    drop: tuple[str, ...] = ()
    attempt: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskEnd:
    """What became of a task.

    Attributes:
        task: that was started.
        result: lost: its machine went away, or nothing is known of it; held: not started, another run has the recipe.
        why: it failed or is held, one line; "" otherwise.
        final: it would end so again: the recipe or the model is wrong, or another run has taken the recipe over.
        exit_code: of what failed, otherwise 0.
    """

    task: Task
    result: Literal["done", "failed", "lost", "held"]
    why: str = ""
    final: bool = False
    exit_code: int = 0


class Executor(Protocol):
    """Runs tasks on machines, and has the clock that the scheduler is told."""

    def now(self) -> float:
        """Return the time in seconds; it never goes back."""
        ...

    def machines(self) -> Sequence[Machine]:
        """Return the machines that are there now; the same object while they are the same."""
        ...

    def start(self, order: Start) -> None:
        """Start a task, and return at once."""
        ...

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Return what became of tasks, once there is something, or at a time; None waits as long as it takes."""
        ...
