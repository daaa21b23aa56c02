"""An executor with a simulated clock: the scheduler's decisions for a fleet that nobody has.

A task receives, then computes, then sends. A part of what it sends goes while it computes: copies of finished blocks.
Transfers share the link of their machine evenly, each direction by itself. Tasks fail and machines go away by chance,
with a seed.
"""

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from packager.fleet.tasks import Machine, Start, Task, TaskEnd

_Direction = Literal["down", "up"]
_ENOUGH: Final = 1.0  # bytes: a transfer with less left is done; after a day, a float of seconds resolves 0.01 bytes


@dataclass(frozen=True, kw_only=True)
class World:
    """What is simulated.

    Attributes:
        machines: of the fleet.
        seconds: the time of a task without its transfers.
        bytes_per_s: of a machine's link, in each direction.
        beside_bytes: of what a task sends, the part that it sends while it computes.
        failing: the share of tasks that fail.
        machine_life_s: the mean time until a machine goes away; it is replaced. None for never.
        replaced_s: after which a machine is replaced.
        seed: of chance.
    """

    machines: tuple[Machine, ...]
    seconds: Callable[[Task], float]
    bytes_per_s: float
    beside_bytes: Callable[[Task], int] = lambda _: 0
    failing: float = 0.0
    machine_life_s: float | None = None
    replaced_s: float = 300.0
    seed: int = 0


@dataclass
class _Transfer:
    run: "_Run"
    left: float


@dataclass
class _Run:
    """A task that runs: the time at which it began to compute, -1 before, and what it has done since.

    `sent` is of what it sends now, `to_send` the bytes that it sends when it has computed.
    """

    order: Start
    began: float = -1.0
    computed: bool = False
    sent: bool = False
    to_send: int = 0


@dataclass
class _Link:
    """One direction of a machine's link."""

    updated: float = 0.0
    transfers: list[_Transfer] = field(default_factory=list)
    version: int = 0


class SimulatedFleet:
    """Runs tasks in simulated time.

    Attributes:
        busy_s: GPU seconds of computing, that included which failed or was lost. Waiting for a transfer is none.
        useful_s: GPU seconds of computing that came to its end.
        existing_s: GPU seconds for which machines were there.
        started: how many tasks were.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = random.Random(world.seed)  # noqa: S311 - a simulation
        self._now = 0.0
        self._machines = world.machines
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._links: dict[tuple[str, _Direction], _Link] = {}
        self._running: dict[Task, _Run] = {}
        self._homes: dict[str, str] = {}
        self._outcomes: list[TaskEnd] = []
        self.busy_s = 0.0
        self.useful_s = 0.0
        self._existing = (0.0, 0.0)  # GPU seconds until a time
        self.started = 0
        for machine in world.machines:
            self._let_die(machine)

    @property
    def existing_s(self) -> float:
        """GPU seconds for which machines were there, until now."""
        seconds, until = self._existing
        return seconds + (self._now - until) * sum(machine.gpus for machine in self._machines)

    def now(self) -> float:
        """Return the simulated time."""
        return self._now

    def machines(self) -> Sequence[Machine]:
        """Return the machines that are there."""
        return self._machines

    def start(self, order: Start) -> None:
        """Start a task: first it receives."""
        self.started += 1
        task, run = order.task, _Run(order)
        self._running[task] = run
        if task.stage == "fetch":
            self._homes[task.recipe] = order.machine
        # What a machine made is on its disk still: only others get it from the store.
        local = task.stage == "publish" and self._homes.get(task.recipe) == order.machine
        self._transfer(run, "down", 0 if local else task.download_bytes)

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Let time pass until something happens to a task or a machine."""
        machines = self._machines
        while not self._outcomes and self._machines is machines:
            if not self._events or (until is not None and self._events[0][0] > until):
                if until is None:
                    raise RuntimeError("nothing will ever happen: the scheduler waits for nothing")
                self._now = max(self._now, until)
                break
            at, _, happen = heapq.heappop(self._events)
            self._now = max(self._now, at)
            happen()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, happen))

    def _is_running(self, run: _Run) -> bool:
        return self._running.get(run.order.task) is run

    def _transfer(self, run: _Run, direction: _Direction, size: int) -> None:
        if not size:
            self._transferred(run, direction)
            return
        link = self._links.setdefault((run.order.machine, direction), _Link())
        self._advance(link)
        link.transfers.append(_Transfer(run, float(size)))
        self._plan(run.order.machine, direction)

    def _advance(self, link: _Link) -> None:
        """Let the bytes flow until now."""
        if link.transfers:
            each = (self._now - link.updated) * self._world.bytes_per_s / len(link.transfers)
            for transfer in link.transfers:
                transfer.left -= each
        link.updated = self._now

    def _plan(self, machine: str, direction: _Direction) -> None:
        """Foresee the end of the next transfer of a link; the plans of before are void."""
        link = self._links[machine, direction]
        link.version += 1
        if not link.transfers:
            return
        version, least = link.version, max(0.0, min(transfer.left for transfer in link.transfers))

        def arrive() -> None:
            if link.version != version:
                return  # another transfer came or ended
            self._advance(link)
            done = [transfer for transfer in link.transfers if transfer.left <= _ENOUGH]
            link.transfers = [transfer for transfer in link.transfers if transfer.left > _ENOUGH]
            self._plan(machine, direction)
            for transfer in done:
                if self._is_running(transfer.run):
                    self._transferred(transfer.run, direction)

        self._at(self._now + least * len(link.transfers) / self._world.bytes_per_s, arrive)

    def _transferred(self, run: _Run, direction: _Direction) -> None:
        if direction == "up":
            run.sent = True
            self._go_on(run)
            return
        run.began = self._now
        seconds = self._world.seconds(run.order.task)
        if self._chance.random() < self._world.failing:
            self._at(self._now + seconds * self._chance.random(), lambda: self._fail(run))
            return
        self._at(self._now + seconds, lambda: self._compute(run, seconds))
        beside = self._world.beside_bytes(run.order.task)
        run.to_send = run.order.task.upload_bytes - beside
        self._transfer(run, "up", beside)

    def _compute(self, run: _Run, seconds: float) -> None:
        if self._is_running(run):
            run.computed = True
            self.busy_s += seconds * run.order.task.gpus
            self.useful_s += seconds * run.order.task.gpus
            self._go_on(run)

    def _go_on(self, run: _Run) -> None:
        """Let a task that has computed send the rest, or end."""
        if not (run.computed and run.sent and self._is_running(run)):
            return
        if run.to_send:
            size, run.to_send, run.sent = run.to_send, 0, False
            self._transfer(run, "up", size)
        else:
            del self._running[run.order.task]
            self._outcomes.append(TaskEnd(task=run.order.task, result="done"))

    def _fail(self, run: _Run) -> None:
        if self._is_running(run):
            self._waste(run)
            self._outcomes.append(TaskEnd(task=run.order.task, result="failed", why="by chance"))

    def _waste(self, run: _Run) -> None:
        """End a task whose computing is lost."""
        del self._running[run.order.task]
        if run.began >= 0 and not run.computed:
            self.busy_s += (self._now - run.began) * run.order.task.gpus

    def _let_die(self, machine: Machine) -> None:
        if self._world.machine_life_s is not None:
            life_s = self._chance.expovariate(1 / self._world.machine_life_s)
            self._at(self._now + life_s, lambda: self._die(machine))

    def _die(self, machine: Machine) -> None:
        self._existing = (self.existing_s, self._now)
        self._machines = tuple(each for each in self._machines if each is not machine)
        for run in list(self._running.values()):
            if run.order.machine == machine.name:
                self._waste(run)
        for direction in ("down", "up"):
            if link := self._links.pop((machine.name, direction), None):
                link.version += 1
        name, _, count = machine.name.partition("/")
        self._at(self._now + self._world.replaced_s, lambda: self._join(f"{name}/{int(count or 0) + 1}", machine))

    def _join(self, name: str, before: Machine) -> None:
        self._existing = (self.existing_s, self._now)
        machine = replace(before, name=name)
        self._machines = (*self._machines, machine)
        self._let_die(machine)
