"""The policy of a fleet: what people choose of how it schedules."""

from dataclasses import dataclass, field

from packager.fleet.windows import Limits


@dataclass(frozen=True, kw_only=True)
class Policy:
    """The settings of a scheduler.

    Attributes:
        ahead: recipes that a machine fetches ahead for each task that it can compute at a time.
        fetches: base models that a machine fetches at a time.
        store_bytes: that builds may take in the store; None for any number.
        attempts: after so many failures of a task, or refusals because another run has it, its recipe is parked.
        losses: after so many losses of a task's machine its recipe is parked.
        backoff_s: the wait after the first failure; it doubles.
        most_backoff_s: the longest wait.
        limits: of commits and of bytes.
    """

    ahead: float = 1.0
    fetches: int = 2
    store_bytes: int | None = None
    attempts: int = 4
    losses: int = 5
    backoff_s: float = 30.0
    most_backoff_s: float = 3600.0
    limits: Limits = field(default_factory=Limits)
