"""A release by a fleet: the scheduler and an executor, run to the end, with the state of every recipe."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from packager import __version__
from packager.errors import MachineError
from packager.fleet.build_requests import FleetRecipe
from packager.fleet.drive import drive
from packager.fleet.leased import LeasedExecutor
from packager.fleet.leases import SILENT_S
from packager.fleet.policy import Policy
from packager.fleet.recipe_state import RecipeState, write_recipe_state
from packager.fleet.scheduler import Scheduler
from packager.fleet.shared_work import SharedWork
from packager.fleet.store import Store
from packager.fleet.tasks import Executor, Machine, QueueState, Start, TaskEnd, TaskStage
from packager.pipeline.many_recipes import Outcome, RecipeResult

_OUTCOMES: Final[dict[QueueState, Outcome]] = {"published": "published", "built": "built", "parked": "failed"}
LOOK_S: Final = 30.0  # recipes of which nothing ran or ended are looked at so often: why they wait, and when seen


@dataclass(frozen=True, kw_only=True)
class FleetRow:
    """What a fleet does with one recipe now.

    Attributes:
        repository: its id.
        state: in the queue.
        stage: of the task that runs, or ran last; None before the first.
        machine: where it runs; "" if nothing does.
        began_at: when that task began, by the executor's clock; None if nothing runs.
        why: it is parked or waits, or how its last task failed.
    """

    repository: str
    state: QueueState
    stage: TaskStage | None = None
    machine: str = ""
    began_at: float | None = None
    why: str = ""


@dataclass
class _Progress:
    """What is known of a recipe beside the scheduler: its row, its last exit code, when it began and when it ended.

    `elsewhere`: its last task was not started, because another run has it.
    """

    recipe: FleetRecipe
    row: FleetRow
    exit_code: int = 0
    elsewhere: bool = False
    began_at: float | None = None
    ended_at: float | None = None


@dataclass
class FleetRun:
    """A release of recipes by a fleet.

    Args:
        recipes: what is released.
        executor: runs the tasks.
        policy: the knobs of the scheduler.
        store: what the machines share, where states and leases are, too; None for one machine alone.
        name: of this run, for people.
        log: gets a line for each task that starts or ends.
        show: gets the rows of all recipes after each change, and every `turn_s`.
        ended: gets a line for each recipe that is published, built or parked.
        patience_s: how long to wait for a machine when nothing can start.
        silent_s: after so long without a sign another run may take a recipe over.
        turn_s: see `show`.
    """

    recipes: Sequence[FleetRecipe]
    executor: Executor
    policy: Policy
    store: Store | None
    name: str
    log: Callable[[str], None]
    show: Callable[[Sequence[FleetRow]], None] = lambda _: None
    ended: Callable[[str], None] = lambda _: None
    patience_s: float = 0.0
    silent_s: float = SILENT_S
    turn_s: float = LOOK_S
    _progress: dict[str, _Progress] = field(default_factory=dict)
    _changed: set[str] = field(default_factory=set)
    _unwritten: set[str] = field(default_factory=set)  # whose states the store did not take
    _to_drop: list[str] = field(default_factory=list)  # whose builds leave the store
    _drops_wait: bool = False
    _looked_at: float = 0.0
    _there: Sequence[Machine] = ()

    def __post_init__(self) -> None:
        """Let the recipes that have something left wait."""
        self._scheduler = Scheduler([each.request for each in self.recipes if each.request.tasks], self.policy)
        self._looked_at = self.executor.now()
        for each in self.recipes:
            name = each.request.recipe
            self._progress[name] = _Progress(each, FleetRow(repository=name, state="requested"))
            if not each.request.tasks:
                done = FleetRow(repository=name, state="published", why="published before, from the same inputs")
                self._progress[name] = _Progress(each, done, ended_at=self._looked_at)
        self._noted = _Noted(self.executor, self._started)
        self._leased = (
            LeasedExecutor(self._noted, self.store, self.name, self.log, self.silent_s) if self.store else None
        )

    def run(self) -> None:
        """Run everything to its end; however this ends, no lease is left."""
        self.show(self.rows)
        for name, progress in self._progress.items():
            if progress.ended_at is not None:
                self.ended(f"{name}: {progress.row.why}")
        try:
            drive(
                self._scheduler,
                self._leased or self._noted,
                observe=self._observe,
                patience_s=self.patience_s,
                turn_s=self.turn_s,
            )
            self._look(self._progress)
        finally:
            self._give_up_leases()

    def waiting_needs(self) -> Sequence[Mapping[str, float]]:
        """Return what recipes without a machine need of one."""
        return self._scheduler.waiting_needs()

    @property
    def rows(self) -> tuple[FleetRow, ...]:
        """The state of all recipes, in their order."""
        return tuple(each.row for each in self._progress.values())

    def results(self) -> dict[Path, RecipeResult]:
        """Return what became of each recipe: of an unfinished one, whether its work had begun."""
        return {each.recipe.path: self._result(each) for each in self._progress.values()}

    def _result(self, progress: _Progress) -> RecipeResult:
        row, began = progress.row, progress.began_at
        outcome: Outcome = "not reached" if began is None else "interrupted"
        ended = progress.ended_at
        if ended is not None:
            outcome = "elsewhere" if progress.elsewhere else _OUTCOMES[row.state]
        return RecipeResult(
            path=progress.recipe.path,
            repository=row.repository,
            outcome=outcome,
            why=row.why,
            exit_code=(progress.exit_code or MachineError.exit_code) if outcome == "failed" else 0,
            seconds=0.0 if began is None else (self.executor.now() if ended is None else ended) - began,
        )

    def _started(self, start: Start) -> None:
        self._note_machines()
        progress, now = self._progress[start.task.recipe], self.executor.now()
        progress.began_at = now if progress.began_at is None else progress.began_at
        progress.elsewhere = False
        progress.row = replace(progress.row, stage=start.task.stage, machine=start.machine, began_at=now)
        self._changed.add(start.task.recipe)
        again = f", attempt {start.attempt}" if start.attempt > 1 else ""
        self.log(f"{start.task}: started on {start.machine}{again}")

    def _observe(self, ends: Sequence[TaskEnd]) -> None:
        for end in ends:
            progress = self._progress[end.task.recipe]
            progress.exit_code, progress.elsewhere = end.exit_code, end.result == "held"
            self._changed.add(end.task.recipe)
            if end.result != "done":
                self.log(f"{end.task}: {end.result}: {end.why or 'its machine went away'}")
        self._note_machines()
        if (now := self.executor.now()) >= self._looked_at + LOOK_S:
            self._looked_at = now
            self._look(self._progress)
        self._look(self._changed)
        self._write_again()
        self.show(self.rows)

    def _note_machines(self) -> None:
        """Say which machines came and went since the last time, each before a task starts on it."""
        if (there := self.executor.machines()) is self._there:
            return
        before, now_there = ({machine.name for machine in found} for found in (self._there, there))
        gone, come = sorted(before - now_there), sorted(now_there - before)
        for names, said in ((gone, "went away: what it ran is done elsewhere"), (come, "is there")):
            for name in names:
                self.log(f"machine {name} {said}")
        self._there = there

    def _write_again(self) -> None:
        """Bring to the store what it did not take before, and delete what it need not have; what fails waits."""
        for name in list(self._unwritten):
            self._keep(self._progress[name])
        if self.store is None:
            return
        self._to_drop += self._scheduler.store_drops()
        while self._to_drop:
            try:
                SharedWork(self.store, self._to_drop[0]).drop_builds()
            except MachineError as error:
                if not self._drops_wait:
                    self.log(f"{self._to_drop[0]}: its builds stay in the store for now: {error.brief}")
                self._drops_wait = True
                return
            self._drops_wait = False
            self.log(f"{self._to_drop.pop(0)}: published, its builds have left the store")

    def _give_up_leases(self) -> None:
        """Say of what this run leaves unfinished that nothing runs, and let another run have it."""
        if self._leased is None:
            return
        for name, progress in self._progress.items():
            if progress.ended_at is None:
                state = "requested" if progress.row.state == "building" else progress.row.state
                progress.row = replace(progress.row, state=state, machine="", began_at=None)
            if progress.ended_at is None or name in self._unwritten:
                self._keep(progress)
        self._leased.release_all()

    def _look(self, names: Collection[str]) -> None:
        """Bring the rows of recipes up to date, and the states in the store."""
        for name in list(names):
            progress = self._progress[name]
            if progress.ended_at is not None:
                continue
            state, running = self._scheduler.state(name), self._scheduler.running(name)
            row = replace(progress.row, state=state, why=self._scheduler.why(name))
            row = row if running else replace(row, machine="", began_at=None)
            if state == "parked" and progress.elsewhere:
                row = replace(row, state="building")
            publishes = any(task.stage == "publish" for task in progress.recipe.request.tasks)
            if not running and (state in ("published", "parked") or (state == "built" and not publishes)):
                progress.ended_at = self.executor.now()
            changed, progress.row = row != progress.row or progress.ended_at is not None or bool(running), row
            if changed and self.store is not None:
                self._keep(progress)
            if progress.ended_at is not None:
                self.ended(f"{name}: {row.state}" + (f": {row.why}" if row.why else ""))
        self._changed.clear()

    def _keep(self, progress: _Progress) -> None:
        """Write the state of a recipe that this run has, or later if the store does not take it.

        With a recipe's end its lease ends.
        """
        row, name = progress.row, progress.row.repository
        if self.store is None or self._leased is None or not self._leased.has(name):
            self._unwritten.discard(name)
            return
        state = RecipeState(
            state=row.state,
            stage=row.stage,
            machine=row.machine,
            why=row.why,
            inputs=progress.recipe.order.inputs,
            recipe_digest=progress.recipe.recipe_digest,
            version=__version__,
            run=self.name,
            updated_at=time.time(),
        )
        try:
            write_recipe_state(self.store, name, state)
        except MachineError as error:
            if name not in self._unwritten:
                self.log(f"{name}: its state is not in the store yet: {error.brief}")
            self._unwritten.add(name)
            return
        self._unwritten.discard(name)
        if progress.ended_at is not None:
            self._leased.release(name)


class _Noted:
    """An executor that says what it starts."""

    def __init__(self, inner: Executor, started: Callable[[Start], None]) -> None:
        self._inner, self._started = inner, started
        self.now = inner.now
        self.wait = inner.wait

    def machines(self) -> Sequence[Machine]:
        return self._inner.machines()

    def start(self, order: Start) -> None:
        self._started(order)
        self._inner.start(order)
