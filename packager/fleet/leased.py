"""An executor that starts tasks only of recipes whose lease in the store it has."""

from collections.abc import Callable, Sequence

from packager.errors import MachineError, StateError
from packager.fleet.leases import SILENT_S, Lease
from packager.fleet.store import Store
from packager.fleet.tasks import Executor, Machine, Start, TaskEnd

_BEATS = 4  # within the time after which a lease is taken over


class LeasedExecutor:
    """Claims the lease of a recipe before its first task, and refuses tasks of recipes that another run has.

    A store that cannot be used now ends nothing: what runs goes on, and the next beat tries again. After `silent_s`
    another run may take the recipes over; the next beat that reaches the store says so.

    Args:
        inner: runs the tasks.
        store: has the leases.
        holder: names this run.
        log: gets a line when another run has taken a recipe over.
        silent_s: see `Lease`.
    """

    def __init__(
        self, inner: Executor, store: Store, holder: str, log: Callable[[str], None], silent_s: float = SILENT_S
    ) -> None:
        self._inner, self._store, self._holder, self._log, self._silent_s = inner, store, holder, log, silent_s
        self._leases: dict[str, Lease] = {}
        self._held: set[str] = set()
        self._taken_over: dict[str, str] = {}
        self._refused: list[TaskEnd] = []
        self._beaten_at = inner.now()
        self._away = ""  # why the store could not be used by the last beat
        self.turn_s = silent_s / _BEATS

    def now(self) -> float:
        """Return the time of the executor inside."""
        return self._inner.now()

    def machines(self) -> Sequence[Machine]:
        """Return the machines of the executor inside."""
        return self._inner.machines()

    def start(self, order: Start) -> None:
        """Start a task, or refuse it: for good if the recipe was taken over, for now if another run has it."""
        task = order.task
        if why := self._taken_over.get(task.recipe, ""):
            self._refused.append(TaskEnd(task=task, result="held", why=why, final=True))
            return
        try:
            holder = self._other_holder(task.recipe)
        except MachineError as error:
            self._refused.append(TaskEnd(task=task, result="failed", why=error.brief, exit_code=error.exit_code))
            return
        if holder is None:
            self._inner.start(order)
        else:
            self._refused.append(TaskEnd(task=task, result="held", why=f"another run has it: {holder}"))

    def _other_holder(self, repository: str) -> str | None:
        """Claim the lease of a recipe unless this run has it; return who has it instead, None for this run."""
        if repository in self._held:
            return None
        lease = self._leases.get(repository)
        if lease is None:
            lease = self._leases[repository] = Lease(self._store, repository, self._holder, self._silent_s)
        if not lease.claim(self._inner.now()):
            return lease.held_by()
        self._held.add(repository)
        self._beat_one(repository)
        return None

    def wait(self, until: float | None) -> Sequence[TaskEnd]:
        """Return refused tasks at once; otherwise wait, and let the leases live."""
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        self._beat()
        due = self._beaten_at + self.turn_s
        return self._inner.wait(due if until is None else min(until, due))

    def has(self, repository: str) -> bool:
        """Return whether this run has the lease of a recipe."""
        return repository in self._held

    def release(self, repository: str) -> None:
        """Give a lease up, if this run has it: nothing more of the recipe is started."""
        if repository in self._held:
            self._held.discard(repository)
            try:
                self._leases.pop(repository).release()
            except MachineError as error:
                self._log(f"{repository}: its lease ends in {self._silent_s:.0f} s, not now: {error.brief}")

    def release_all(self) -> None:
        """Give all leases up."""
        for repository in list(self._held):
            self.release(repository)

    def _beat(self) -> None:
        if self._inner.now() < self._beaten_at + self.turn_s:
            return
        self._beaten_at = self._inner.now()
        missed = [why for repository in list(self._held) if (why := self._beat_one(repository))]
        if missed and not self._away:
            self._log(f"{missed[0]}; what runs goes on, and the store is tried again")
        if self._away and not missed:
            self._log("the store can be used again")
        self._away = missed[0] if missed else ""

    def _beat_one(self, repository: str) -> str:
        """Let a lease live; return why the store could not be used, "" if it could."""
        try:
            self._leases[repository].beat()
        except StateError as error:
            self._held.discard(repository)
            self._taken_over[repository] = error.brief
            self._log(f"{repository}: {error.what}; what runs of it ends by itself")
        except MachineError as error:
            return error.brief
        return ""
