"""The history of a branch, in which a rollback counts as the commit whose files it has."""

import re
from collections.abc import Mapping, Sequence

from packager.publish.targets import CommitRecord

_TRAILER = re.compile(r"(?m)^Rollback-(of|to|release): ([0-9a-f]{40})$")


def trailers(head: CommitRecord, to: CommitRecord, release: CommitRecord | None) -> str:
    """Return the last lines of a rollback's message.

    Args:
        head: the commit that the rollback replaces as head.
        to: the commit whose files the rollback has.
        release: the commit of main that the whole release goes back to, None for a branch given by name.
    """
    lines = [f"Rollback-of: {head.commit}", f"Rollback-to: {to.commit}"]
    return "\n".join([*lines, f"Rollback-release: {release.commit}"] if release else lines)


class BranchHistory:
    """A branch's commits, newest first; a rollback counts as the commit whose files it has."""

    def __init__(self, branch: str, records: Sequence[CommitRecord]) -> None:
        self.branch, self.records = branch, records
        self._indices = {record.commit: index for index, record in enumerate(records)}

    @property
    def head(self) -> CommitRecord:
        """The branch's head."""
        return self.records[0]

    @property
    def shown(self) -> CommitRecord:
        """The commit whose files the head has."""
        return self.resolved(self.head)

    def release_goal(self) -> str:
        """Return the commit of main that a rollback of the release went back to, "" if the head is none."""
        return _trailers(self.head).get("release", "")

    def is_rollback(self) -> bool:
        """Return whether the head is a rollback."""
        return self.shown is not self.changed

    @property
    def changed(self) -> CommitRecord:
        """The newest commit that is more than a new signature: such a commit names its parent as of and to."""
        for record in self.records[:-1]:
            names = _trailers(record)
            if "to" not in names or names["to"] != names.get("of"):
                return record
        return self.records[-1]

    def resolved(self, record: CommitRecord) -> CommitRecord:
        """Return the commit that a rollback went back to; any other commit is returned unchanged."""
        while (index := self._indices.get(_trailers(record).get("to", ""), -1)) > self._indices[record.commit]:
            record = self.records[index]
        return record  # a trailer that names no earlier commit is ignored

    def before(self, record: CommitRecord) -> CommitRecord | None:
        """Return the commit whose files the branch had before `record`; None for the first commit."""
        index = self._indices[record.commit] + 1
        return self.resolved(self.records[index]) if index < len(self.records) else None

    def at(self, time_s: int) -> CommitRecord | None:
        """Return the commit whose files the branch had at a time; None before the first commit."""
        for record in self.records:
            if record.time_s <= time_s:
                return self.resolved(record)
        return None

    def find(self, commit: str) -> list[CommitRecord]:
        """Return the commits whose ids begin with `commit`."""
        return [record for record in self.records if record.commit.startswith(commit)]


def _trailers(record: CommitRecord) -> Mapping[str, str]:
    """Return the rollback trailers of a commit, none if this program did not make it."""
    return {} if record.author else dict(_TRAILER.findall(record.message))
