"""Compare one published branch with its own record.

The record, provenance.json, is compared with its repository and branch, every file with the record, and the headers of
the weights with config.json and the record. The audit checks the headers: a temporary folder gets the small documents
and the weights files, which are sparse after their headers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packager.inputs.describe_in_child import description_by_transformers
from packager.model.checkpoint import MOST_HEADERS_BYTES, MOST_INDEX_BYTES
from packager.model.devices import DeviceChoice
from packager.prove import audit
from packager.prove.audit.files import Listing
from packager.prove.audit.weights import SUFFIX
from packager.prove.environments import RuntimeContext
from packager.publish.published.finding import Collector, PublishedFinding
from packager.publish.published.loaders import check_with_loaders
from packager.publish.published.reading import Branch, bounded, download, put_header
from packager.publish.published.record import (
    MAX_DOCUMENT_BYTES,
    check_place,
    compare_listing,
    has_digest,
    open_branch,
    read_record,
)
from packager.publish.published.signatures import SignedStatement, Trust, check_branch_statement
from packager.publish.targets import Target
from packager.receipt import (
    CONFIG,
    INDEX_SUFFIX,
    QUANTIZE_CONFIG,
    README,
    LoaderRecord,
    Provenance,
)
from packager.system.files import sha256_file
from packager.system.parallel import in_parallel
from packager.system.scratch import ScratchFolder
from packager.system.text import format_bytes

# Of a branch, without --full. Files without a sha256 on the Hub have less than 10 MB: a tokenizer, texts.
_MAX_READ_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class Depth:
    """The depth of the checks of a branch.

    Attributes:
        full: download and audit every file.
        address_names_repository: the repository's address ends with its name, so the record must have the same name.
        loaders: the context of loaders that open the downloaded branch, None to run no loaders; it needs `full`.
        device: the device of the loaders and of our own forward.
        trust: the keys to check signatures with, None to check no signature.
    """

    full: bool = False
    address_names_repository: bool = True
    loaders: RuntimeContext | None = None
    device: DeviceChoice = "auto"
    trust: Trust | None = None


@dataclass(frozen=True, kw_only=True)
class BranchReport:
    """The checks of one branch and their findings.

    Attributes:
        branch: the branch's name.
        commit: the head that was checked.
        num_files: files of the branch.
        total_bytes: size of the files.
        num_stated: files whose sha256, as the repository states it, equals the record.
        num_read: files whose content was read and has the sha256 of the record.
        num_tensors: tensors whose name, dtype and shape were checked.
        audited: whether the whole audit was run on the downloaded files.
        loaders: one record per loader, if loaders were requested.
        signed: the trusted key that signed the branch, None if signatures were not checked or do not fit.
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
    loaders: tuple[LoaderRecord, ...] = ()
    signed: SignedStatement | None = None
    findings: tuple[PublishedFinding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


def verify_branch(
    target: Target, report: BranchReport, found: Collector, log: Callable[[str], None], depth: Depth
) -> tuple[BranchReport, Provenance | None]:
    """Check one branch; return its report and its record, None if it has no valid record.

    Raises:
        PublishError: the repository could not be read.
        MachineError: there is no space for the download, or this machine cannot run a loader.
    """
    stored = {name: bounded(file) for name, file in target.read_back(report.commit).items()}
    report = replace(
        report, num_files=len(stored), total_bytes=sum(max(0, file.size_bytes) for file in stored.values())
    )
    branch = open_branch(target, report.branch, report.commit, stored, found)
    record = read_record(branch, found) if branch else None
    if branch is None or record is None:
        return report, None
    provenance, sha256 = record
    check_place(branch, provenance, found, address_names_repository=depth.address_names_repository)
    compare_listing(branch, provenance, found)
    if depth.trust:
        report = replace(report, signed=check_branch_statement(branch, provenance, sha256, depth.trust, found))
    with ScratchFolder("published") as scratch:
        folder = scratch.path / "branch"
        folder.mkdir()
        if depth.full:
            report = _verify_content(branch, report, provenance, folder, found, log)
        else:
            report = _verify_headers(branch, report, provenance, folder, found)
        if depth.loaders:
            records = check_with_loaders(depth.loaders, depth.device, folder, report.branch, provenance, found, log)
            report = replace(report, loaders=records)
    return report, provenance


def _verify_content(
    branch: Branch,
    report: BranchReport,
    provenance: Provenance,
    folder: Path,
    found: Collector,
    log: Callable[[str], None],
) -> BranchReport:
    """Download every file, compare its content with the record, and run the whole audit."""
    there = download(branch, sorted(branch.safe), folder, found, log)
    num_read = _compare_read(branch, provenance, folder, there, found)
    # A record of before has no description of the model.
    audited = audit.audit(folder, complete=True, describe=description_by_transformers())
    # The comparison above has reported the files that differ from the record.
    found.take(finding for finding in audited.findings if not finding.code.startswith("provenance-file-"))
    return replace(report, num_read=num_read, num_tensors=audited.facts.tensors_checked, audited=True)


def _verify_headers(
    branch: Branch, report: BranchReport, provenance: Provenance, folder: Path, found: Collector
) -> BranchReport:
    """Compare the sha256 values that the repository states; read all other files, the documents and the headers."""
    num_stated, wanted = _compare_stated(branch, provenance, found)
    there = download(branch, wanted, folder, found, lambda _: None)
    num_read = _compare_read(branch, provenance, folder, there, found)
    num_tensors = _check_headers(branch, provenance, folder, there, found)
    return replace(report, num_stated=num_stated, num_read=num_read, num_tensors=num_tensors)


def _compare_stated(branch: Branch, provenance: Provenance, found: Collector) -> tuple[int, list[str]]:
    """Compare the sha256 values that the repository states with the record.

    Returns:
        The number of equal files, and the names of the files to read: those without a stated sha256, and the documents
        that are parsed, whose content must be the recorded one.
    """
    num_stated, left_bytes, wanted = 0, _MAX_READ_BYTES, []
    for name in sorted(branch.safe & provenance.files.keys()):
        file, record = branch.stored[name], provenance.files[name]
        if file.size_bytes != record.size_bytes:
            continue  # `_compare_listing` has reported it
        most_bytes = MOST_INDEX_BYTES if name.endswith(INDEX_SUFFIX) else MAX_DOCUMENT_BYTES
        if _is_document(name) and file.size_bytes > most_bytes:
            found.add("text-damaged", name, f"{file.size_bytes:,} bytes are too many for such a file")
        elif file.sha256 and not _is_document(name):
            num_stated += has_digest(name, file.sha256, record, found, "the repository states the sha256")
        elif file.size_bytes > left_bytes:
            size = format_bytes(file.size_bytes)
            found.add("digest-unknown", name, f"the repository states no sha256, and {size} more are not read")
        else:
            left_bytes -= file.size_bytes
            wanted.append(name)
    return num_stated, wanted


def _is_document(name: str) -> bool:
    return name in (CONFIG, QUANTIZE_CONFIG, README) or name.endswith(INDEX_SUFFIX)


def _compare_read(branch: Branch, provenance: Provenance, folder: Path, names: Sequence[str], found: Collector) -> int:
    """Compare the content of downloaded files with the record; return the number of equal files.

    Files with another size than in the record are skipped: `_compare_listing` has reported them.
    """
    records = provenance.files
    listed = [name for name in names if name in records and branch.stored[name].size_bytes == records[name].size_bytes]
    digests = in_parallel(lambda name: sha256_file(folder / name), listed)
    equal = [
        has_digest(name, digest, records[name], found, "its content has the sha256")
        for name, digest in zip(listed, digests, strict=True)
    ]
    return sum(equal)


def _check_headers(
    branch: Branch, provenance: Provenance, folder: Path, documents: Sequence[str], found: Collector
) -> int:
    """Check config.json, the index and the headers of the weights; return the number of tensors.

    Args:
        branch: the branch whose headers are read.
        provenance: the branch's record.
        folder: holds the branch's documents and gets the headers of its weights files.
        documents: names of the files in `folder`.
        found: gets the findings.
    """
    weights_files = {name for name in branch.safe if name.endswith(SUFFIX)}
    listed = weights_files & provenance.files.keys()  # other weights files were reported
    left_bytes, unread = MOST_HEADERS_BYTES, (set(branch.stored) - branch.safe) | (weights_files - listed)
    for name in sorted(listed):
        num_read = put_header(branch, name, folder, left_bytes, found)
        if num_read is None:
            unread.add(name)
        left_bytes -= num_read or 0
    sizes = {name: branch.stored[name].size_bytes for name in sorted(branch.safe - unread)}
    listing = Listing(folder=folder, sizes=sizes, unread=frozenset(unread))
    present = [name for name in documents if _is_document(name)]
    report = audit.audit_headers(listing, present=present, provenance=provenance)
    found.take(report.findings)
    return report.facts.tensors_checked
