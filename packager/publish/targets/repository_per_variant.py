"""A target for the layout with one repository per variant: it presents the repositories as branches.

Each variant is the branch `main` of its repository. Publishing plans, orders and reads variants back like branches.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from packager.publish.targets import NO_FILES, BranchState, CommitRecord, LocalFile, StoredFile, Target
from packager.system.parallel import in_parallel
from packager.variant import MAIN


class RepositoryPerVariant:
    """One target per variant.

    Args:
        targets: by variant, `main` among them.
    """

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = dict(targets)
        self._holders: dict[str, Target] = {}  # by commit

    @property
    def where(self) -> str:
        """The repository of `main`; the other repositories have its name followed by the variant's."""
        return self._targets[MAIN].where

    @property
    def is_public(self) -> bool:
        """Whether one of the repositories is public."""
        return any(target.is_public for target in self._targets.values())

    @property
    def identifies_by_blob(self) -> bool:
        """Whether one of the repositories identifies large files by blob ids."""
        return any(target.identifies_by_blob for target in self._targets.values())

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every variant whose repository exists."""
        found = in_parallel(lambda branch: self._targets[branch].read_branches().get(MAIN), list(self._targets))
        states = {
            branch: replace(state, repository=self._targets[branch].where)
            for branch, state in zip(self._targets, found, strict=True)
            if state is not None
        }
        self._holders |= {state.commit: self._targets[branch] for branch, state in states.items()}
        return states

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files."""
        return self._holders[commit].read_back(commit)

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a stored file's content, or a part of it."""
        return self._holders[commit].read_bytes(commit, name, start=start, size=size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a stored file's content to `path`."""
        self._holders[commit].export(commit, name, path)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return the commits of a variant's repository."""
        records = self._targets[branch].history(MAIN)
        self._holders |= {record.commit: self._targets[branch] for record in records}
        return records

    def check(self, changing: Collection[str]) -> None:
        """Raise unless these variants could be written now."""
        for branch, target in self._targets.items():
            target.check([MAIN] if branch in changing else [])

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock out other publishers from every repository."""
        with ExitStack() as stack:
            yield [note for target in self._targets.values() for note in stack.enter_context(target.exclusive())]

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Make `files` the whole content of a variant's repository."""
        return self._remember(branch, self._targets[branch].commit(MAIN, files, parent=parent, message=message))

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        """Make an earlier commit's files the whole content of a variant's repository."""
        made = self._targets[branch].restore(MAIN, commit, parent=parent, message=message, replacing=replacing)
        return self._remember(branch, made)

    def remove(self, branch: str, *, head: str) -> str:
        """Remove the files of a variant's repository that was just made."""
        return self._targets[branch].remove(MAIN, head=head)

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names in each repository."""
        return {branch: target.read_tag(name)[MAIN] for branch, target in self._targets.items()}

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        """Tag repositories."""
        for branch, commit in commits.items():
            self._targets[branch].tag(name, {MAIN: commit}, notes)

    def _remember(self, branch: str, commit: str) -> str:
        self._holders[commit] = self._targets[branch]
        return commit
