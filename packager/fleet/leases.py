"""Leases in a store: of several runs one has a recipe, and another takes it over when the first has gone silent.

NAMESPACE/NAME/lease/GENERATION        made by `Store.create`, which one of several writers wins
NAMESPACE/NAME/lease/GENERATION.beat   a counter that the holder raises, and its time

A lease is taken over after its beat was seen unchanged for a while by the clock of the one that looks: for that the
clocks of machines are never compared. The holder that was only slow finds a later generation at its next beat, and
stops. Whoever looks only once goes by the time in the beat, see `is_held`.
"""

import re
import time
from dataclasses import dataclass

from packager.errors import StateError
from packager.fleet.store import Store

SILENT_S = 60.0
_GENERATION = re.compile(r"(\d{8,18})")
_BEAT = re.compile(rb"\d+ (\d{1,12})")  # the second is in seconds since 1970, by the holder's clock
_LONG_S = 600.0  # more than clocks differ


@dataclass
class Lease:
    """The lease of one recipe, as one run sees it.

    Args:
        store: the store.
        repository: the recipe's repository id.
        holder: names the run, for people.
        silent_s: after so long without a beat a lease is taken over.
    """

    store: Store
    repository: str
    holder: str
    silent_s: float = SILENT_S
    _generation: int = 0
    _beats: int = 0
    _seen: tuple[int, bytes | None, float] = (0, None, 0.0)

    def claim(self, now: float) -> bool:
        """Take the lease if nobody has it or its holder is silent; call it again later otherwise.

        Args:
            now: seconds of a clock that never goes back, this machine's.
        """
        latest = self._latest()
        if latest and not self._is_silent(latest, now):
            return False
        generation = latest + 1
        if not self.store.create(self._name(generation), self.holder.encode()):
            return False  # another run was faster
        self._generation, self._beats = generation, 0
        return True

    def beat(self) -> None:
        """Say that the holder lives; of a store that was emptied, take the lease again.

        Raises:
            StateError: another run has taken the lease over.
        """
        latest = self._latest()
        if not latest and self.store.create(self._name(self._generation), self.holder.encode()):
            latest = self._generation
        if latest != self._generation:
            raise StateError(
                f"another run has taken over {self.repository}",
                why=f"it saw no sign of this one for {self.silent_s:.0f} s: {self.held_by()}",
                hint="let that run finish",
            )
        self._beats += 1
        self.store.write(f"{self._name(self._generation)}.beat", f"{self._beats} {time.time():.0f}".encode())

    def release(self) -> None:
        """Give the lease up: the next run need not wait."""
        self.store.write(f"{self._name(self._generation)}.beat", b"released")

    def held_by(self) -> str:
        """Return the name of the run that has the lease, "" if nobody ever had it."""
        latest = self._latest()
        return (self.store.read(self._name(latest)) or b"").decode(errors="replace") if latest else ""

    def is_held(self, seen_at: float) -> bool:
        """Return whether a run has the lease and lives, by its last beat: for people, no run goes by it.

        Args:
            seen_at: in seconds since 1970. The holder's clock may be another one: a beat counts for ten minutes.
        """
        latest = self._latest()
        beat = self.store.read(f"{self._name(latest)}.beat") if latest else b"released"
        if beat == b"released":
            return False
        found = _BEAT.fullmatch(beat or b"")
        return found is None or seen_at - int(found[1]) < _LONG_S  # none: it is claimed just now

    def _is_silent(self, latest: int, now: float) -> bool:
        beat = self.store.read(f"{self._name(latest)}.beat")
        if beat == b"released":
            return True
        if self._seen[:2] != (latest, beat):
            self._seen = (latest, beat, now)
        return now - self._seen[2] >= self.silent_s

    def _latest(self) -> int:
        found = (_GENERATION.fullmatch(name.rpartition("/")[2]) for name in self.store.names(self._folder))
        return max((int(match[1]) for match in found if match), default=0)

    @property
    def _folder(self) -> str:
        return f"{self.repository}/lease"

    def _name(self, generation: int) -> str:
        return f"{self._folder}/{generation:08d}"
