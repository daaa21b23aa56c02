"""Limits of so many units in so many seconds: commits of a repository, bytes from the Hub and to it."""

from dataclasses import dataclass, field

from packager.fleet.tasks import Task

_INSTANT_S = 1e-6  # now + (then - now) may be a little less than then


@dataclass
class LimitWindow:
    """At most `amount` units in any `seconds`.

    What alone is larger than `amount` is let in when nothing else is, and counts for as much longer, so that the mean
    holds.
    """

    amount: float
    seconds: float
    _taken: list[tuple[float, float]] = field(default_factory=list)  # when it is over, and units

    def copy(self) -> "LimitWindow":
        """Return a new window of the same size in which nothing is taken."""
        return LimitWindow(self.amount, self.seconds)

    def wait_s(self, now: float, units: float) -> float:
        """Return how long to wait until so many units may be taken: 0 for now."""
        self._taken = sorted(entry for entry in self._taken if entry[0] > now + _INSTANT_S)
        room, wanted, free_at = self.amount - sum(amount for _, amount in self._taken), min(units, self.amount), now
        for until, amount in self._taken:
            if wanted <= room:
                break
            room, free_at = room + amount, until
        return free_at - now

    def take(self, now: float, units: float) -> None:
        """Take units, which `wait_s` has allowed."""
        longer = max(1.0, units / self.amount)
        self._taken.append((now + self.seconds * longer, min(units, self.amount)))


@dataclass
class Limits:
    """The limits of a fleet; None is no limit.

    Attributes:
        commits: of each repository.
        account_commits: of all repositories together.
        fetched: bytes of base models.
        published: bytes of branches.
    """

    commits: LimitWindow | None = None
    account_commits: LimitWindow | None = None
    fetched: LimitWindow | None = None
    published: LimitWindow | None = None
    _repositories: dict[str, LimitWindow] = field(default_factory=dict)

    def wait_s(self, task: Task, now: float) -> float:
        """Return how long a task has to wait for the limits that all share: 0 for now."""
        return max((window.wait_s(now, units) for window, units in self._shared(task)), default=0.0)

    def own_wait_s(self, task: Task, now: float) -> float:
        """Return how long a task has to wait for the limit of its repository: 0 for now."""
        return max((window.wait_s(now, units) for window, units in self._own(task)), default=0.0)

    def take(self, task: Task, now: float) -> None:
        """Count a task that starts."""
        for window, units in (*self._shared(task), *self._own(task)):
            window.take(now, units)

    def _shared(self, task: Task) -> list[tuple[LimitWindow, int]]:
        if task.stage == "fetch":
            found = [(self.fetched, task.download_bytes)]
        elif task.stage == "publish":
            found = [(self.account_commits, task.commits), (self.published, task.upload_bytes)]
        else:
            found = []
        return [(window, units) for window, units in found if window is not None]

    def _own(self, task: Task) -> list[tuple[LimitWindow, int]]:
        if self.commits is None or task.stage != "publish":
            return []
        return [(self._repositories.setdefault(task.recipe, self.commits.copy()), task.commits)]
