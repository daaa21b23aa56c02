"""What a harness finds: counts, and failures with the command that repeats each."""

import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Outcome:
    """The figures of one harness.

    Attributes:
        name: of the harness, as `--only` takes it.
        seed: of the whole run.
        counts: how often what happened.
        peaks: the largest value of each measurement.
        failures: one text each; empty if all is well.
    """

    name: str
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def dice(self, number: int) -> random.Random:
        """Return the source of every choice of try `number`, which depends on no other try."""
        return random.Random(f"{self.seed}/{self.name}/{number}")

    def check(self, number: int, holds: bool, story: object) -> None:
        """Add a failure unless a statement holds."""
        if not holds:
            repeat = f"nox -s chaos -- --seed {self.seed} --only {self.name} --kill {number}"
            self.failures.append(f"{story}; repeat: {repeat}")

    def peak(self, name: str, value: float) -> None:
        """Keep the largest value of a measurement."""
        self.peaks[name] = max(value, self.peaks.get(name, 0.0))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long a harness may take, and what it tries.

    Attributes:
        seconds: no try begins later than this.
        most: no more tries than this.
        only: this try alone; None is all of them.
    """

    seconds: float
    most: int
    only: int | None = None

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the tries, from 1 on, until the time or the number is used up."""
        if self.only is not None:
            yield self.only
            return
        started = time.monotonic()
        for number in range(1, self.most + 1):
            if time.monotonic() - started > self.seconds:
                return
            yield number
