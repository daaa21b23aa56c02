"""How far a recipe is, and what a machine does: the records that the scheduler keeps."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from packager.fleet.tasks import TASK_STAGES, BuildRequest, Machine, QueueState, Task, TaskStage

Entry = tuple[int, int, int, Task]  # minus priority, age, share: the smallest goes first
# What a machine starts of the recipes at home there, nearest to the end first: that bounds what is unfinished.
LOCAL_ORDER: Final[tuple[TaskStage, ...]] = ("card", "verify", "evaluate", "sweep")


@dataclass
class RecipeProgress:
    """A recipe in the scheduler.

    Attributes:
        request: the recipe.
        age: counts the recipes.
        left: the tasks that are not done.
        home: the machine that has its base model.
        running: its tasks that run, with their machines.
        attempts: failures by task.
        refusals: by task, how often another run had the recipe.
        losses: of machines by task.
        began: a task was started.
        why: it is parked or waits, or how the last task failed.
        parked: nothing of it is started any more.
    """

    request: BuildRequest
    age: int
    left: dict[Task, None]
    home: str | None = None
    running: dict[Task, str] = field(default_factory=dict)
    attempts: dict[Task, int] = field(default_factory=dict)
    refusals: dict[Task, int] = field(default_factory=dict)
    losses: dict[Task, int] = field(default_factory=dict)
    began: bool = False
    why: str = ""
    parked: bool = False

    @property
    def stage(self) -> TaskStage | None:
        """The first stage with a task that is left."""
        return min((task.stage for task in self.left), key=TASK_STAGES.index, default=None)

    @property
    def state(self) -> QueueState:
        """The state that people see."""
        if self.parked:
            return "parked"
        if not self.left:
            return "published" if any(task.stage == "publish" for task in self.request.tasks) else "built"
        if self.stage == "publish":
            return "built"
        return "building" if self.began else "requested"

    def entry(self, task: Task) -> Entry:
        """Return the place of a task in a queue."""
        return (-self.request.priority, self.age, task.share, task)

    def waits_for(self, task: Task) -> bool:
        """Return whether a task may start: the recipe is in this stage, and the task does not run."""
        return not self.parked and task in self.left and task not in self.running and self.stage == task.stage


@dataclass
class MachineLoad:
    """A machine in the scheduler.

    Attributes:
        machine: the machine.
        free_gpus: that no task has.
        free_cpus: that no task has.
        held: the recipes whose files it has, with the bytes that are kept for them.
        fetching: how many base models it fetches.
        computing: recipes at home here with something left to compute.
        ready: what waits for it, by stage.
    """

    machine: Machine
    free_gpus: int
    free_cpus: float
    held: dict[str, int] = field(default_factory=dict)
    fetching: int = 0
    computing: set[str] = field(default_factory=set)
    ready: dict[TaskStage, list[Entry]] = field(default_factory=lambda: {stage: [] for stage in LOCAL_ORDER})

    def slots(self, request: BuildRequest) -> float:
        """Return how many such recipes it can compute at a time: 0 if its disk is too small for one."""
        if self.machine.disk_bytes is not None and self.machine.disk_bytes < request.disk_bytes:
            return 0.0
        if request.most_gpus:
            return self.machine.gpus / request.most_gpus
        return self.machine.cpus / max(request.most_cpus, 0.001)

    def fits(self, task: Task) -> bool:
        """Return whether a task can start now."""
        return task.gpus <= self.free_gpus and task.cpus <= self.free_cpus + 1e-9

    def occupy(self, task: Task, sign: int = 1) -> None:
        """Give a task what it needs; sign -1 takes it back."""
        self.free_gpus -= sign * task.gpus
        self.free_cpus -= sign * task.cpus
        self.fetching += sign * (task.stage == "fetch")

    def to_drop(self, wanted: int, recipes: Mapping[str, RecipeProgress]) -> list[str] | None:
        """Return what it deletes to have room for so many bytes, published recipes first; None if it has no room."""
        limit = self.machine.disk_bytes
        if limit is None:
            return []
        excess, drop = sum(self.held.values()) + wanted - limit, list[str]()
        if excess <= 0:
            return drop
        order = ("moved", "published", "parked", "built")
        unneeded: list[tuple[int, str]] = []
        for name in self.held:
            recipe = recipes[name]
            state = recipe.state if recipe.home == self.machine.name else "moved"
            if state in order and not recipe.running:
                unneeded.append((order.index(state), name))
        for _, name in sorted(unneeded, key=lambda each: each[0]):  # stable: the oldest first
            drop.append(name)
            excess -= self.held[name]
            if excess <= 0:
                return drop
        return None
