"""Audit one branch of a repository that any program made, wherever it lies.

Without `full`, the documents, the headers of the weights and a sample of their values are read. A temporary folder gets
them, with the weights files sparse between the parts that were read, and the audit checks that folder.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packager.errors import PublishError
from packager.model.checkpoint import MOST_HEADERS_BYTES
from packager.model.safetensors_file import StoredTensor
from packager.prove import audit
from packager.prove.audit.files import Listing, is_of_model, most_bytes
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import Describe
from packager.prove.audit.weights import SUFFIX
from packager.publish.published.reading import MAX_FILES, Branch, bounded, download, put_header, safe_names
from packager.publish.published.states import published_states
from packager.publish.targets import Target
from packager.publish.targets.git_lfs import is_pointer
from packager.receipt import CONFIG
from packager.system.files import disk_errors
from packager.system.parallel import in_parallel
from packager.system.scratch import ScratchFolder

# Of each weights file; a header of a model with many experts may be larger, and then no values are read.
MOST_WEIGHTS_BYTES = 1_900_000
_MOST_DOCUMENTS_BYTES = 200_000_000
_POINTER_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class AuditedBranch:
    """A branch that was audited where it lies.

    Attributes:
        where: the repository's address.
        branch: the branch's name.
        commit: its head.
        weights_bytes: bytes that were read of all weights files.
        report: of the audit.
    """

    where: str
    branch: str
    commit: str
    weights_bytes: int
    report: audit.AuditReport


def audit_published(
    target: Target,
    branch: str,
    log: Callable[[str], None],
    *,
    full: bool = False,
    complete: bool = True,
    describe: Describe | None = None,
) -> AuditedBranch:
    """Audit a branch.

    Args:
        target: the repository; nothing is written to it.
        branch: the branch's name.
        log: gets a line per file with `full`.
        full: download every file, and check all values and digests.
        complete: see `audit.audit`.
        describe: see `audit.audit`.

    Raises:
        PublishError: the repository cannot be read, or has no such branch.
        MachineError: the temporary folder has no space.
    """
    commit = published_states(target, [branch])[branch].commit
    stored = {name: bounded(file) for name, file in target.read_back(commit).items()}
    findings = Findings()
    read = 0
    if problem := _problem(stored):
        findings.add(*problem)
        report = audit.AuditReport(findings=findings.collected(), facts=audit.Facts())
        return AuditedBranch(where=target.where, branch=branch, commit=commit, weights_bytes=0, report=report)
    safe = safe_names(stored, findings)
    found = Branch(target=target, name=branch, commit=commit, stored=stored, safe=safe)
    with ScratchFolder("audit") as scratch:
        folder = scratch.path / "branch"
        folder.mkdir()
        if full:
            there = download(found, sorted(safe), folder, findings, log)
            read = sum(stored[name].size_bytes for name in there if name.endswith(SUFFIX))
            whole = audit.audit(folder, complete=complete, describe=describe)
            findings.take(whole.findings)
            report = audit.AuditReport(findings=findings.collected(), facts=whole.facts, files=whole.files)
        else:
            part = _Part(branch=found, folder=folder, findings=findings)
            report = part.audit(complete=complete, describe=describe)
            read = sum(part.read_bytes.values())
    return AuditedBranch(where=target.where, branch=branch, commit=commit, weights_bytes=read, report=report)


def _problem(names: Collection[str]) -> tuple[str, str, str] | None:
    """Return the finding for a branch that is not read, None if it is read."""
    if len(names) > MAX_FILES:
        return "folder-overfull", ".", f"{len(names):,} files; nothing of this branch was checked"
    if not any(is_of_model(name) for name in names if "/" not in name):
        return "folder-not-a-model", ".", f"there is neither {CONFIG} nor a weights file"
    return None


@dataclass(kw_only=True)
class _Part:
    """The parts of a branch in a folder; `read_bytes` counts what was read of each weights file."""

    branch: Branch
    folder: Path
    findings: Findings
    read_bytes: dict[str, int] = field(default_factory=dict)

    def audit(self, *, complete: bool, describe: Describe | None) -> audit.AuditReport:
        """Read the documents and headers, and audit them with a sample of the values."""
        stored, unread = self.branch.stored, set(self.branch.stored) - self.branch.safe
        unread |= self._damaged()
        names = sorted(self.branch.safe - unread)
        documents = self._documents(names)
        unread |= {name for name in names if self._is_document(name) and name not in documents}
        download(self.branch, sorted(documents), self.folder, self.findings, lambda _: None)
        unread |= {name for name in documents if not (self.folder / name).is_file()}
        unread |= self._headers([name for name in names if name.endswith(SUFFIX)])
        listing = Listing(
            folder=self.folder,
            sizes={name: stored[name].size_bytes for name in names if name not in unread},
            unread=frozenset(unread),
            stated={name: stored[name].sha256 for name in names if name not in documents},
        )
        left = {self.folder / name: MOST_WEIGHTS_BYTES - size for name, size in self.read_bytes.items()}
        return audit.audit_part(
            listing, self.findings, fetch=self._fetch, left_bytes=left, complete=complete, describe=describe
        )

    def _damaged(self) -> set[str]:
        """Report empty files and pointers of git-lfs without their objects; return their names."""
        damaged = set()
        for name in sorted(self.branch.safe):
            size_bytes = self.branch.stored[name].size_bytes
            if size_bytes == 0:
                self.findings.add("empty-file", name, "the file has no content")
            elif size_bytes <= _POINTER_BYTES and is_pointer(self.branch.read(name, _POINTER_BYTES)):
                self.findings.add(
                    "lfs-pointer", name, "this is a git-lfs pointer: the repository lacks the file itself"
                )
            else:
                continue
            damaged.add(name)
        return damaged

    def _documents(self, names: Sequence[str]) -> set[str]:
        """Return the files to read whole, after reporting what is too much for all of them."""
        left_bytes, documents = _MOST_DOCUMENTS_BYTES, set()
        for name in filter(self._is_document, names):
            size_bytes = self.branch.stored[name].size_bytes
            if size_bytes > left_bytes:
                self.findings.add("text-damaged", name, f"all texts before it have {_MOST_DOCUMENTS_BYTES} bytes")
            else:
                left_bytes -= size_bytes
                documents.add(name)
        return documents

    def _is_document(self, name: str) -> bool:
        """Return whether the audit reads a file whole; it reports larger ones by their sizes."""
        return audit.is_read_whole(name) and self.branch.stored[name].size_bytes <= most_bytes(name)

    def _headers(self, names: Sequence[str]) -> set[str]:
        """Read the headers of weights files; return the names of those that could not be read."""
        left_bytes, unread = MOST_HEADERS_BYTES, set()
        for name in names:
            try:
                read = put_header(self.branch, name, self.folder, left_bytes, self.findings)
            except PublishError as error:
                self.findings.add("weights-unread", name, error.brief)
                read = None
            if read is None:
                unread.add(name)
            else:
                self.read_bytes[name] = read
                left_bytes -= read
        return unread

    def _fetch(self, tensors: Iterable[StoredTensor]) -> bool:
        """Read tensors into the sparse weights files; return whether all could be read."""
        wanted = [(tensor.path.relative_to(self.folder).as_posix(), tensor) for tensor in tensors]

        def read(item: tuple[str, StoredTensor]) -> bytes:
            name, tensor = item
            return self.branch.read_part(name, tensor.offset, tensor.info.size_bytes)

        try:
            parts = in_parallel(read, wanted)
        except PublishError as error:
            self.findings.add("weights-unread", wanted[0][0], f"no values were read: {error.brief}")
            return False
        for (name, tensor), data in zip(wanted, parts, strict=True):
            with disk_errors(tensor.path), tensor.path.open("r+b") as stream:
                stream.seek(tensor.offset)
                stream.write(data)
            self.read_bytes[name] += len(data)
        return True
