"""An executor that starts tasks only of recipes whose lease in the store it has."""

from collections.abc import Callable, Sequence

from packager.errors import StateError
from packager.fleet.leases import SILENT_S, Lease
from packager.fleet.store import Store
from packager.fleet.tasks import Executor, Machine, Start, TaskEnd

_BEATS = 4  # within the time after which a lease is taken over


class LeasedExecutor:
    """Claims the lease of a recipe before its first task, and refuses tasks of recipes that another run has.

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
        self.turn_s = silent_s / _BEATS

    def now(self) -> float:
        """Return the time of the executor inside."""
        return self._inner.now()

    def machines(self) -> Sequence[Machine]:
        """Return the machines of the executor inside."""
        return self._inner.machines()

    def start(self, order: Start) -> None:
        """Start a task, or let it fail: for good if the recipe was taken over, for now if another run has it."""
        repository = order.task.recipe
        why, final = self._taken_over.get(repository, ""), True
        if not why and repository not in self._held:
            lease = self._leases.get(repository)
            if lease is None:
                lease = self._leases[repository] = Lease(self._store, repository, self._holder, self._silent_s)
            if lease.claim(self._inner.now()):
                lease.beat()
                self._held.add(repository)
            else:
                why, final = f"another run has it: {lease.held_by()}", False
        if not why:
            self._inner.start(order)
            return
        code = StateError.exit_code
        self._refused.append(TaskEnd(task=order.task, result="failed", why=why, final=final, exit_code=code))

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
            self._leases.pop(repository).release()

    def release_all(self) -> None:
        """Give all leases up."""
        for repository in list(self._held):
            self.release(repository)

    def _beat(self) -> None:
        if self._inner.now() < self._beaten_at + self.turn_s:
            return
        self._beaten_at = self._inner.now()
        for repository in list(self._held):
            try:
                self._leases[repository].beat()
            except StateError as error:
                self._held.discard(repository)
                self._taken_over[repository] = f"{error.what}: {error.why}"
                self._log(f"{repository}: {error.what}; what runs of it ends by itself")
