"""Which task starts where, and when: a pure object without clock, thread, file or network.

The caller tells it the time, the machines and what became of tasks. `docs/decisions/0039-many-machines.md` has the
reasons; `benchmarks/fleet.py` runs it with a simulated clock.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from packager.fleet.placement import Home, choose_home, lacking_machine
from packager.fleet.policy import Policy
from packager.fleet.progress import LOCAL_ORDER, Entry, MachineLoad, RecipeProgress
from packager.fleet.store_quota import StoreQuota
from packager.fleet.tasks import AT_HOME, BuildRequest, Machine, QueueState, Start, Task, TaskEnd

_UNABLE: Final = "waits: "  # begins the reason of a recipe that no machine can take


class Scheduler:
    """Decides which task starts where.

    Args:
        requests: the recipes; those of one priority are served in this order.
        policy: the knobs.
    """

    def __init__(self, requests: Iterable[BuildRequest] = (), policy: Policy | None = None) -> None:
        self._policy = policy or Policy()
        self._recipes: dict[str, RecipeProgress] = {}
        self._machines: dict[str, MachineLoad] = {}
        self._seen: Sequence[Machine] | None = None
        self._to_fetch: list[Entry] = []
        self._unable: list[Entry] = []  # for which there is no machine
        self._dirty: dict[str, None] = {}  # machines with something new
        self._to_publish: list[Entry] = []
        self._delayed: list[tuple[float, int, Task]] = []
        self._store = StoreQuota(self._policy.store_bytes)
        self._publish_at = 0.0  # before, a limit that all share lets nothing be published
        self._fetch_at = 0.0  # when the first recipe of the queue may be fetched, if it waits for a limit
        self._now = 0.0
        self._open = self._running = self._count = 0
        for request in requests:
            self.add(request)

    @property
    def is_finished(self) -> bool:
        """Whether every recipe is published, built (where nothing is to be published) or parked, and nothing runs."""
        return self._open == 0

    def add(self, request: BuildRequest) -> None:
        """Take a recipe in, or one again that is parked or done.

        Raises:
            ValueError: it is in progress.
        """
        known = self._recipes.get(request.recipe)
        if known is not None and (known.running or not (known.parked or not known.left)):
            raise ValueError(f"{request.recipe} is in progress")
        self._count += 1
        recipe = RecipeProgress(request=request, age=self._count, left=dict.fromkeys(request.tasks))
        self._recipes[request.recipe] = recipe
        if recipe.left:
            self._open += 1
            self._enqueue(recipe)

    def state(self, recipe: str) -> QueueState:
        """Return the state of a recipe."""
        return self._recipes[recipe].state

    def why(self, recipe: str) -> str:
        """Return why a recipe is parked or waits, or how its last task failed; "" if there is nothing to say."""
        return self._recipes[recipe].why

    def running(self, recipe: str) -> Mapping[Task, str]:
        """Return the tasks of a recipe that run, with the names of their machines."""
        return MappingProxyType(self._recipes[recipe].running)

    @property
    def next_to_fetch(self) -> str:
        """The recipe that gets a home next; "" if none needs one."""
        return self._to_fetch[0][-1].recipe if self._to_fetch else ""

    def waiting_needs(self) -> list[dict[str, float]]:
        """Return what recipes without a home need of a machine, for whoever starts machines."""
        waiting = [(self._recipes[task.recipe], task) for *_, task in (*self._unable, *self._to_fetch)]
        requests = [recipe.request for recipe, task in waiting if recipe.waits_for(task)]
        return [{"GPU": float(request.most_gpus), "CPU": request.most_cpus} for request in requests]

    def see(self, machines: Sequence[Machine], now: float) -> None:
        """Take in which machines there are: the tasks and the homes of those that went away are given to others."""
        if machines is self._seen:
            return
        self._seen = machines
        present = {machine.name: machine for machine in machines}
        for name in [name for name in self._machines if name not in present]:
            self._lose_machine(name, now)
        for name, each in present.items():
            if name not in self._machines:
                self._machines[name] = MachineLoad(machine=each, free_gpus=each.gpus, free_cpus=each.cpus)
        for entry in self._unable:
            heapq.heappush(self._to_fetch, entry)
        self._unable.clear()

    def assign(self, now: float) -> list[Start]:
        """Return the tasks that start now; the caller starts all of them."""
        self._now = now
        while self._delayed and self._delayed[0][0] <= now:
            _, _, task = heapq.heappop(self._delayed)
            recipe = self._recipes[task.recipe]
            if recipe.waits_for(task):
                self._push(recipe, task)
        starts = self._publishes(now)
        for name in self._dirty:
            if name in self._machines:
                starts += self._at(self._machines[name])
        self._dirty.clear()
        return starts + self._fetches(now)

    def next_wake(self) -> float | None:
        """Return when `assign` has something to do although nothing happened; None if never."""
        times = [self._delayed[0][0]] if self._delayed else []
        if self._to_publish and self._publish_at > self._now:
            times.append(self._publish_at)
        if self._to_fetch and self._fetch_at > self._now:
            times.append(self._fetch_at)
        return min(times, default=None)

    def take(self, outcome: TaskEnd, now: float) -> None:
        """Take in what became of a task; of a task that is not known to run, nothing is taken in."""
        task = outcome.task
        recipe = self._recipes[task.recipe]
        machine = recipe.running.pop(task, None)
        if machine is None:
            return
        self._running -= 1
        if machine in self._machines:
            self._machines[machine].occupy(task, -1)
            self._dirty[machine] = None
        if outcome.result == "done":
            self._done(recipe, task)
        elif outcome.result in ("failed", "held"):
            self._failed(recipe, task, outcome, now)
        else:
            self._lost(recipe, task, machine, now)
        if not recipe.running and (recipe.parked or not recipe.left):
            self._open -= 1

    def store_drops(self) -> list[str]:
        """Return the recipes whose builds in the store are deleted now, to make room; they are published."""
        if not self._to_fetch:
            return []
        wanted_bytes = self._recipes[self.next_to_fetch].request.store_bytes
        return self._store.make_room(wanted_bytes, lambda name: self._recipes[name].state == "published")

    @property
    def is_stalled(self) -> bool:
        """Whether nothing runs and nothing waits for a time, but something is left."""
        return self._open > 0 and self._running == 0 and self.next_wake() is None

    def give_up(self) -> None:
        """Park what is left when nothing runs: no machine can take it."""
        for recipe in self._recipes.values():
            if recipe.left and not recipe.parked and not recipe.running:
                self._park(recipe, recipe.why or "no machine has room for it")
                self._open -= 1

    def _enqueue(self, recipe: RecipeProgress) -> None:
        """Let the tasks of the first stage that is left wait for a machine."""
        for task in list(recipe.left):
            if recipe.waits_for(task):
                self._push(recipe, task)

    def _push(self, recipe: RecipeProgress, task: Task) -> None:
        if task.stage == "fetch":
            heapq.heappush(self._to_fetch, recipe.entry(task))
        elif task.stage == "publish":
            heapq.heappush(self._to_publish, recipe.entry(task))
        elif recipe.home in self._machines:
            self._dirty[str(recipe.home)] = None
            heapq.heappush(self._machines[str(recipe.home)].ready[task.stage], recipe.entry(task))

    def _start(self, state: MachineLoad, task: Task, drop: Sequence[str] = ()) -> Start:
        recipe = self._recipes[task.recipe]
        recipe.running[task] = state.machine.name
        self._running += 1
        recipe.began = True
        state.occupy(task)
        attempt = 1 + recipe.attempts.get(task, 0) + recipe.losses.get(task, 0)
        return Start(task=task, machine=state.machine.name, drop=tuple(drop), attempt=attempt)

    def _first(self, queue: list[Entry], home: str | None = None) -> tuple[RecipeProgress, Task] | None:
        """Return the first task of a queue that still waits, with its recipe; None if there is none.

        Args:
            queue: entries before it that do not wait any more are removed.
            home: the machine whose own queue it is: entries at home elsewhere are removed, too; None for all machines.
        """
        while queue:
            task = queue[0][-1]
            recipe = self._recipes[task.recipe]
            if recipe.waits_for(task) and home in (None, recipe.home):
                return recipe, task
            heapq.heappop(queue)
        return None

    def _at(self, state: MachineLoad) -> list[Start]:
        """Start what waits for this machine. What waits for GPUs is not overtaken by later tasks with GPUs."""
        starts: list[Start] = []
        blocked = False
        for stage in LOCAL_ORDER:
            queue = state.ready[stage]
            while (first := self._first(queue, state.machine.name)) is not None:
                _, task = first
                if not state.fits(task) or (blocked and task.gpus):
                    blocked = blocked or task.gpus > 0
                    break
                heapq.heappop(queue)
                starts.append(self._start(state, task))
        return starts

    def _publishes(self, now: float) -> list[Start]:
        if not self._to_publish or now < self._publish_at:
            return []
        starts, limits = [], self._policy.limits
        machines = [state for state in self._machines.values() if state.machine.publishes]
        while (first := self._first(self._to_publish)) is not None:
            recipe, task = first
            home = [state for state in machines if state.machine.name == recipe.home and state.fits(task)]
            free = home or [state for state in machines if state.fits(task)]
            if not free:
                break
            if (wait_s := limits.own_wait_s(task, now)) > 0:
                recipe.why = "waits for its repository's limit of commits"
                heapq.heappop(self._to_publish)
                self._delay(task, now + wait_s)
                continue
            if (wait_s := limits.wait_s(task, now)) > 0:  # for all: the others need not be looked at
                recipe.why = "waits for the limit of commits or of bytes"
                self._publish_at = now + wait_s
                break
            heapq.heappop(self._to_publish)
            limits.take(task, now)
            starts.append(self._start(max(free, key=lambda state: state.free_cpus), task))
        return starts

    def _fetches(self, now: float) -> list[Start]:
        starts: list[Start] = []
        self._fetch_at = 0.0
        while (first := self._first(self._to_fetch)) is not None:
            recipe, task = first
            if recipe.why.startswith(_UNABLE):
                recipe.why = ""
            home = None
            if self._store.has_room(recipe.request):
                home = choose_home(recipe.request, task, self._machines.values(), self._recipes, self._policy)
            if home is None:
                if lacking := self._lacking(recipe.request):
                    recipe.why = f"{_UNABLE}{lacking}"
                    self._unable.append(heapq.heappop(self._to_fetch))
                    continue  # the others need not wait for it
                break  # nothing overtakes it: small recipes would keep a large one waiting for ever
            if (wait_s := self._policy.limits.wait_s(task, now)) > 0:
                self._fetch_at = now + wait_s
                break  # it stays the first: small recipes would use up what is let in
            heapq.heappop(self._to_fetch)
            self._policy.limits.take(task, now)
            starts.append(self._settle(recipe, task, home))
        return starts

    def _settle(self, recipe: RecipeProgress, task: Task, home: Home) -> Start:
        """Make a machine the home of a recipe."""
        state = home.machine
        for name in home.drop:
            del state.held[name]
        self._stop_computing(recipe)
        recipe.home, recipe.why = state.machine.name, ""
        state.held[recipe.request.recipe] = recipe.request.disk_bytes
        state.computing.add(recipe.request.recipe)
        self._store.take(recipe.request)
        return self._start(state, task, home.drop)

    def _lacking(self, request: BuildRequest) -> str:
        """Return what keeps a recipe waiting for ever, "" if nothing does."""
        if self._store.has_room(request):
            return lacking_machine(request, self._machines.values())
        return self._store.lacking(request)

    def _done(self, recipe: RecipeProgress, task: Task) -> None:
        recipe.left.pop(task, None)
        recipe.why = ""
        stage = recipe.stage
        if stage not in ("fetch", "sweep", "evaluate", "verify"):
            self._stop_computing(recipe)
        if stage != task.stage and not recipe.parked:
            self._enqueue(recipe)

    def _stop_computing(self, recipe: RecipeProgress) -> None:
        if recipe.home in self._machines:
            self._machines[str(recipe.home)].computing.discard(recipe.request.recipe)

    def _failed(self, recipe: RecipeProgress, task: Task, outcome: TaskEnd, now: float) -> None:
        counts = recipe.attempts
        if outcome.result == "held":  # which says nothing of the task, and keeps no other recipe waiting
            counts = recipe.refusals
            self._stop_computing(recipe)
        count = counts[task] = counts.get(task, 0) + 1
        recipe.why = f"{task.stage}: {outcome.why}"
        if outcome.final or count >= self._policy.attempts:
            self._park(recipe, recipe.why + ("" if outcome.final else f" ({count} times)"))
            return
        self._delay(task, now + min(self._policy.most_backoff_s, self._policy.backoff_s * 2 ** (count - 1)))

    def _lost(self, recipe: RecipeProgress, task: Task, machine: str, now: float) -> None:
        count = recipe.losses[task] = recipe.losses.get(task, 0) + 1
        if count >= self._policy.losses:
            self._park(recipe, f"{task.stage}: its machine was lost {count} times; it may be what ends them")
            return
        if machine in self._machines or task.stage == "publish":
            self._delay(task, now)
        else:
            self._leave_home(recipe)

    def _lose_machine(self, name: str, now: float) -> None:
        del self._machines[name]
        for recipe in self._recipes.values():
            for task in [task for task, where in recipe.running.items() if where == name]:
                self.take(TaskEnd(task=task, result="lost"), now)
            if recipe.home == name:
                self._leave_home(recipe)

    def _leave_home(self, recipe: RecipeProgress) -> None:
        """Give a recipe up whose home is gone: what is left there begins with a fetch elsewhere."""
        if recipe.home is None:
            return
        recipe.home, tasks = None, recipe.request.tasks
        fetch = next((task for task in tasks if task.stage == "fetch"), None)
        if fetch is not None and not recipe.parked and any(task.stage in AT_HOME for task in recipe.left):
            recipe.left[fetch] = None
            self._push(recipe, fetch)

    def _park(self, recipe: RecipeProgress, why: str) -> None:
        recipe.parked, recipe.why = True, why
        self._stop_computing(recipe)

    def _delay(self, task: Task, until: float) -> None:
        self._count += 1
        heapq.heappush(self._delayed, (until, self._count, task))
