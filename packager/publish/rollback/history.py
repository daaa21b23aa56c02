"""A branch's history, in which a rollback counts as the commit whose files it holds."""

import re
from collections.abc import Mapping, Sequence

from packager.publish.targets import CommitRecord

_TRAILER = re.compile(r"(?m)^Rollback-(to|release): ([0-9a-f]{40})$")


def trailers(head: CommitRecord, to: CommitRecord, release: CommitRecord | None) -> str:
    """Return the last lines of a rollback's message.

    Args:
        head: what the new commit takes the place of.
        to: the commit whose files it holds.
        release: the commit of main that the whole release goes back to, if it does.
    """
    lines = [f"Rollback-of: {head.commit}", f"Rollback-to: {to.commit}"]
    return "\n".join([*lines, f"Rollback-release: {release.commit}"] if release else lines)


class BranchHistory:
    """A branch's history, the newest commit first, in which a rollback counts as the commit whose files it holds."""

    def __init__(self, branch: str, records: Sequence[CommitRecord]) -> None:
        self.branch, self.records = branch, records
        self._places = {record.commit: place for place, record in enumerate(records)}

    @property
    def head(self) -> CommitRecord:
        """The branch's head."""
        return self.records[0]

    @property
    def shown(self) -> CommitRecord:
        """The commit whose files the head holds."""
        return self.resolved(self.head)

    def release_goal(self) -> str:
        """Return which commit of main a whole release went back to when the head was made, "" if it was no such."""
        return _trailers(self.head).get("release", "")

    def is_rollback(self) -> bool:
        """Return whether the head is a rollback."""
        return self.shown is not self.head

    def resolved(self, record: CommitRecord) -> CommitRecord:
        """Return the commit that a rollback led to; any other commit is itself."""
        while (place := self._places.get(_trailers(record).get("to", ""), -1)) > self._places[record.commit]:
            record = self.records[place]
        return record  # a trailer that names no earlier commit means nothing

    def before(self, record: CommitRecord) -> CommitRecord | None:
        """Return what was there before a commit; None if there was nothing."""
        place = self._places[record.commit] + 1
        return self.resolved(self.records[place]) if place < len(self.records) else None

    def at(self, time_s: int) -> CommitRecord | None:
        """Return what was there at a time; None if there was nothing."""
        for record in self.records:
            if record.time_s <= time_s:
                return self.resolved(record)
        return None

    def find(self, commit: str) -> list[CommitRecord]:
        """Return the commits that an abbreviated id may mean."""
        return [record for record in self.records if record.commit.startswith(commit)]


def _trailers(record: CommitRecord) -> Mapping[str, str]:
    """Return the trailers of a commit that this program made."""
    return {} if record.author else dict(_TRAILER.findall(record.message))
