"""One published branch against its own record.

The record, provenance.json, is compared with where it lies, every file with the record, and the headers of the weights
with what config.json and the record declare. Headers are looked at by the audit itself: the branch is laid out in a
temporary folder, its small documents as they are, its weights files as holes of the right size behind their headers.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from packager import audit
from packager.audit.config import CONFIG, QUANTIZE_CONFIG, check_declared, read_model
from packager.audit.files import PROVENANCE, README, Listing, as_object, check_file_set, read_documents
from packager.audit.finding import Findings, shown
from packager.audit.provenance import check_provenance
from packager.audit.tensors import Expected, check_tensors, quantized_modules
from packager.audit.weights import INDEX_SUFFIX, SUFFIX, read_weights
from packager.errors import MachineError
from packager.files import disk_errors, sha256_file
from packager.parallel import in_parallel
from packager.published.finding import Collector, PublishedFinding
from packager.receipt import FileRecord, Provenance
from packager.sizes import format_bytes
from packager.targets import LARGE_BYTES, StoredFile, Target, file_name_problem

# What is not in the record: the record itself, and what hosts and git-lfs add.
_UNLISTED = frozenset({PROVENANCE, ".gitattributes"})
_MAX_FILES = 10_000
# A 405B model has 4,000 tensors, which take half a megabyte of a header; JSON takes many times its size in memory.
_MAX_DOCUMENT_BYTES = 8_000_000
_MAX_HEADERS_BYTES = 16_000_000  # of all weights files of a branch
_MAX_WEIGHTS_BYTES = 1 << 43  # of one file: what file systems can have as a hole, ext4 included
_MAX_PROBLEMS = 5


@dataclass(frozen=True, kw_only=True)
class BranchProof:
    """What was proven of a branch, how deep, and what was found.

    Attributes:
        branch: its name.
        commit: the head that was looked at.
        num_files: files there.
        total_bytes: their size.
        num_stated: files that equal the record by the sha256 that the repository states.
        num_read: files that equal it by the sha256 of their content, read now.
        num_tensors: tensors whose name, dtype and shape were checked.
        audited: the whole audit was run on the downloaded files.
        findings: in the order of the checks.
    """

    branch: str
    commit: str
    num_files: int = 0
    total_bytes: int = 0
    num_stated: int = 0
    num_read: int = 0
    num_tensors: int = 0
    audited: bool = False
    findings: tuple[PublishedFinding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True, kw_only=True)
class _Branch:
    """A branch that is being looked at: the head's files, those of them that may be written to disk, the record."""

    target: Target
    name: str
    commit: str
    stored: Mapping[str, StoredFile]
    safe: frozenset[str]
    provenance: Provenance


def prove(
    target: Target, proof: BranchProof, found: Collector, say: Callable[[str], None], *, full: bool
) -> tuple[BranchProof, Provenance | None]:
    """Look at one branch; return what was proven and its record, None if it has none that can be used."""
    stored = target.read_back(proof.commit)
    proof = replace(proof, num_files=len(stored), total_bytes=sum(max(0, file.size_bytes) for file in stored.values()))
    if len(stored) > _MAX_FILES:
        found.add("files-too-many", "", f"{len(stored):,} files; nothing on this branch was compared")
        return proof, None
    provenance = _read_provenance(target, proof.commit, stored, found)
    if provenance is None:
        return proof, None
    _check_place(proof.branch, target.where, provenance, found)
    branch = _Branch(
        target=target,
        name=proof.branch,
        commit=proof.commit,
        stored=stored,
        safe=_safe_names(stored, found),
        provenance=provenance,
    )
    with tempfile.TemporaryDirectory(prefix="packager-published-") as scratch:
        folder = Path(scratch) / "branch"
        folder.mkdir()
        num_stated, wanted = _compare_stated(branch, found, full=full)
        there = _download(branch, wanted, folder, found, say if full else lambda _: None)
        num_read = _compare_read(branch, folder, there, found)
        num_tensors = _audit(folder, found) if full else _check_headers(branch, folder, there, found)
    return (
        replace(proof, num_stated=num_stated, num_read=num_read, num_tensors=num_tensors, audited=full),
        provenance,
    )


def _read_provenance(
    target: Target, commit: str, stored: Mapping[str, StoredFile], found: Collector
) -> Provenance | None:
    if PROVENANCE not in stored:
        found.add("provenance-missing", PROVENANCE, "the branch has no record: nothing on it can be proven")
        return None
    size_bytes = stored[PROVENANCE].size_bytes
    if size_bytes > _MAX_DOCUMENT_BYTES:
        found.add("provenance-invalid", PROVENANCE, f"{shown(size_bytes)} bytes are too many for a record")
        return None
    data = target.read_bytes(commit, PROVENANCE, size=_MAX_DOCUMENT_BYTES)
    try:
        return Provenance.model_validate_json(data)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]:
            place = ".".join(str(part) for part in problem["loc"])
            found.add("provenance-invalid", f"{PROVENANCE}: {place}" if place else PROVENANCE, problem["msg"])
    return None


def _check_place(branch: str, where: str, provenance: Provenance, found: Collector) -> None:
    """Compare what the record says of its repository and branch with where it was found."""
    place = where.replace("\\", "/").rstrip("/").removesuffix(".git")
    if not place.endswith(f"/{provenance.repository}"):
        found.add("repository-differs", PROVENANCE, f"it was built for {shown(provenance.repository)}, not {place}")
    if provenance.branch != branch:
        found.add("branch-differs", PROVENANCE, f"it was built as {shown(provenance.branch)} and lies on {branch}")


def _safe_names(stored: Mapping[str, StoredFile], found: Collector) -> frozenset[str]:
    """Return the ordinary files whose names may be written to disk; report the others."""
    safe = set()
    for name, file in sorted(stored.items()):
        if problem := file_name_problem(name):
            found.add("file-name", name, problem)
        elif any(folder.as_posix() in stored for folder in PurePosixPath(name).parents):
            found.add("file-name", name, "its folder is a file, too")
        elif not (file.sha256 or file.blob_id) or file.size_bytes < 0:
            found.add("not-a-regular-file", name, "a link, a submodule or an executable")
        else:
            safe.add(name)
    return frozenset(safe)


def _compare_stated(branch: _Branch, found: Collector, *, full: bool) -> tuple[int, list[str]]:
    """Compare every file with the record, as far as the repository's word goes.

    Returns:
        How many equal the record by the sha256 that the repository states, and the names of those to be read: all that
        it states none of, and what is parsed, so that what is judged is what was recorded.
    """
    stored, records = branch.stored, branch.provenance.files
    for name in sorted(stored.keys() - records.keys() - _UNLISTED):
        found.add("remote-file-unlisted", name, "the record does not list this file")
    for name in sorted(records.keys() - stored.keys()):
        found.add("remote-file-missing", name, file_name_problem(name) or "the record lists this file, it is not here")
    num_stated, wanted = 0, []
    for name in sorted(branch.safe):
        file, record = stored[name], records.get(name)
        if record is not None and file.size_bytes != record.size_bytes:
            sizes = f"{shown(file.size_bytes)} bytes, the record says {shown(record.size_bytes)}"
            found.add("remote-file-changed", name, sizes)
        elif record is not None and not full and file.sha256 and not _is_document(name):
            num_stated += file.sha256 == record.sha256
            _check_digest(name, file.sha256, record, found, "the repository states the sha256")
        elif record is not None and (full or not file.sha256 or file.size_bytes <= _MAX_DOCUMENT_BYTES):
            wanted.append(name)
        elif record is not None:
            found.add("text-damaged", name, f"{file.size_bytes:,} bytes are too many for such a file")
    return num_stated, sorted(branch.safe) if full else wanted


def _check_digest(name: str, sha256: str, record: FileRecord, found: Collector, what: str) -> bool:
    if sha256 != record.sha256:
        found.add("remote-file-changed", name, f"{what} {sha256}, the record says {shown(record.sha256)}")
    return sha256 == record.sha256


def _is_document(name: str) -> bool:
    return name in (CONFIG, QUANTIZE_CONFIG, README) or name.endswith(INDEX_SUFFIX)


def _download(
    branch: _Branch, names: Sequence[str], folder: Path, found: Collector, say: Callable[[str], None]
) -> list[str]:
    """Write files of the branch into `folder`; return the names of those that could be."""
    needed, free = sum(branch.stored[name].size_bytes for name in names), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"the temporary folder has no space for {branch.name}",
            where=str(folder.parent.parent),
            why=f"{format_bytes(needed)} are needed, {format_bytes(free)} are free",
            hint="set TMPDIR to a folder with more space",
        )

    def download(name: str) -> str:
        size_bytes = branch.stored[name].size_bytes
        say(f"  {branch.name}: {name}, {format_bytes(size_bytes)}")
        if size_bytes < LARGE_BYTES:  # a server that sends more than it has listed sends it in vain
            return _put(folder / name, branch.target.read_bytes(branch.commit, name, size=size_bytes + 1))
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            branch.target.export(branch.commit, name, folder / name)
        except OSError as error:
            return error.strerror or str(error)
        return ""

    problems: dict[str, str] = dict(zip(names, in_parallel(download, names), strict=True))
    for name, problem in problems.items():
        if problem:
            found.add("file-name", name, f"it cannot be written to disk: {problem}")
    return [name for name in names if not problems[name]]


def _put(path: Path, data: bytes, size_bytes: int | None = None) -> str:
    """Write a file, followed by a hole up to `size_bytes`; return why it could not be, or ""."""
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            if size_bytes is not None:
                os.truncate(path, size_bytes)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _compare_read(branch: _Branch, folder: Path, names: Sequence[str], found: Collector) -> int:
    """Compare the content of what was downloaded with the record; return how many files equal it."""
    listed = [name for name in names if name in branch.provenance.files]
    digests = in_parallel(lambda name: sha256_file(folder / name), listed)
    equal = [
        _check_digest(name, digest, branch.provenance.files[name], found, "its content has the sha256")
        for name, digest in zip(listed, digests, strict=True)
    ]
    return sum(equal)


def _audit(folder: Path, found: Collector) -> int:
    """Run the audit on a downloaded branch; return how many tensors it saw."""
    report = audit.audit(folder, complete=True)
    # Files and record were compared before, as the branch's own findings.
    found.take(finding for finding in report.findings if not finding.code.startswith("provenance-file-"))
    return report.facts.tensors_checked


def _check_headers(branch: _Branch, folder: Path, documents: Sequence[str], found: Collector) -> int:
    """Check what config.json, the index and the headers of the weights say; return how many tensors were seen.

    Args:
        branch: whose headers are read.
        folder: where its documents lie and its weights' headers are put.
        documents: names of the files that lie there.
        found: where to report.
    """
    weights_files = {name for name in branch.safe if name.endswith(SUFFIX)}
    listed = weights_files & branch.provenance.files.keys()  # any other was reported, whatever is in it
    left_bytes, unread = _MAX_HEADERS_BYTES, (set(branch.stored) - branch.safe) | (weights_files - listed)
    for name in sorted(listed):
        header = _read_raw_header(branch, name, left_bytes, found)
        if header is None:
            unread.add(name)
        elif problem := _put(folder / name, header, branch.stored[name].size_bytes):
            found.add("file-name", name, f"it cannot be written to disk: {problem}")
            unread.add(name)
        left_bytes -= len(header or b"")
    sizes = {name: branch.stored[name].size_bytes for name in sorted(branch.safe - unread)}
    listing = Listing(folder=folder, sizes=sizes, unread=frozenset(unread))
    parsed = {name: sizes[name] for name in documents if _is_document(name)}
    findings = Findings()
    check_file_set(listing, findings, complete=True)
    texts = read_documents(replace(listing, sizes=parsed), findings, complete=True)
    weights = read_weights(listing, texts, findings)
    declared = check_declared(texts, weights, findings)
    config = as_object(texts.get(CONFIG))
    architecture, dtype = read_model(config, findings) if config is not None else (None, None)
    check_tensors(weights, Expected(declared=declared, architecture=architecture, dtype=dtype), findings)
    check_provenance(
        replace(listing, sizes={}, unread=frozenset()),
        branch.provenance.model_copy(update={"files": {}}).model_dump(),  # the files were compared before
        findings,
        declared=declared,
        weights=weights,
        num_linears=len(quantized_modules(weights)),
    )
    found.take(findings.collected())
    return len(weights.tensors)


def _read_raw_header(branch: _Branch, name: str, left_bytes: int, found: Collector) -> bytes | None:
    """Return the first bytes of a weights file, up to the header's end; None if it is too large to be looked at."""
    size_bytes = branch.stored[name].size_bytes
    prefix = branch.target.read_bytes(branch.commit, name, size=8)
    length = int.from_bytes(prefix[:8], "little")
    if len(prefix) < 8 or length > size_bytes - 8:
        return prefix[:8]  # the parser says what is wrong
    if length > left_bytes or size_bytes > _MAX_WEIGHTS_BYTES:
        found.add("header-too-large", name, f"a header of {shown(length)} bytes in a file of {shown(size_bytes)}")
        return None
    return prefix[:8] + branch.target.read_bytes(branch.commit, name, start=8, size=length)[:length]
