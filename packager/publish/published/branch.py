"""One published branch against its own record.

The record, provenance.json, is compared with where it lies, every file with the record, and the headers of the weights
with what config.json and the record declare. Headers are looked at by the audit itself: the branch is laid out in a
temporary folder, its small documents as they are, its weights files as holes of the right size behind their headers.
"""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from packager.prove import audit
from packager.prove.audit.config import check_declared, read_model
from packager.prove.audit.files import Listing, as_object, check_file_set, read_documents
from packager.prove.audit.finding import Findings
from packager.prove.audit.provenance import check_provenance
from packager.prove.audit.tensors import Expected, check_tensors, quantized_modules
from packager.prove.audit.weights import SUFFIX, read_weights
from packager.publish.published.finding import Collector, PublishedFinding
from packager.publish.published.loaders import LoaderSite, check_with_loaders
from packager.publish.published.reading import Branch, bounded, download, put_header, safe_names
from packager.publish.targets import Target, file_name_problem
from packager.receipt import (
    CONFIG,
    INDEX_SUFFIX,
    PROVENANCE,
    QUANTIZE_CONFIG,
    README,
    UNLISTED_FILES,
    FileRecord,
    LoaderRecord,
    Provenance,
)
from packager.system.files import sha256_file
from packager.system.parallel import in_parallel
from packager.system.text import format_bytes, shown

# What is not in the record: the record itself, and what hosts and git-lfs add.
_MAX_FILES = 10_000
# A 405B model has 4,000 tensors, which take half a megabyte of a header; JSON takes many times its size in memory.
_MAX_DOCUMENT_BYTES = 8_000_000
_MAX_HEADERS_BYTES = 16_000_000  # of all weights files of a branch
# Of a branch, without --full. What the Hub states no sha256 of has less than 10 MB: a tokenizer, texts.
_MAX_READ_BYTES = 200_000_000
_MAX_PROBLEMS = 5
_CONVENTIONAL = re.compile(r"gptq-(\d+)bit-(-?\d+)g-actorder_(True|False)\Z")  # `branch_name` of packager.variant


@dataclass(frozen=True, kw_only=True)
class Depth:
    """How deep a branch is looked at.

    Attributes:
        full: every file is downloaded and audited.
        address_names_repository: the repository's address is its name, so the record must name it.
        loaders: where loaders open what was downloaded, None if they do not; it needs `full`.
    """

    full: bool = False
    address_names_repository: bool = True
    loaders: LoaderSite | None = None


@dataclass(frozen=True, kw_only=True)
class BranchReport:
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
        loaders: what the loaders made of it, if they were asked.
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
    findings: tuple[PublishedFinding, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


def verify_branch(
    target: Target, report: BranchReport, found: Collector, log: Callable[[str], None], depth: Depth
) -> tuple[BranchReport, Provenance | None]:
    """Look at one branch; return what was proven and its record, None if it has none that can be used.

    Raises:
        PublishError: the repository could not be read.
        MachineError: there is no space for what is downloaded, or a loader found this machine wanting.
    """
    stored = {name: bounded(file) for name, file in target.read_back(report.commit).items()}
    report = replace(
        report, num_files=len(stored), total_bytes=sum(max(0, file.size_bytes) for file in stored.values())
    )
    if len(stored) > _MAX_FILES:
        found.add("files-too-many", "", f"{len(stored):,} files; nothing on this branch was compared")
        return report, None
    safe = safe_names(stored, found)
    branch = Branch(target=target, name=report.branch, commit=report.commit, stored=stored, safe=safe)
    provenance = _read_provenance(branch, found)
    if provenance is None:
        return report, None
    _check_place(branch, provenance, found, address_names_repository=depth.address_names_repository)
    _compare_listing(branch, provenance, found)
    with tempfile.TemporaryDirectory(prefix="packager-published-") as scratch:
        folder = Path(scratch) / "branch"
        folder.mkdir()
        if depth.full:
            report = _verify_content(branch, report, provenance, folder, found, log)
        else:
            report = _verify_headers(branch, report, provenance, folder, found)
        if depth.loaders:
            records = check_with_loaders(depth.loaders, folder, report.branch, provenance, found, log)
            report = replace(report, loaders=records)
    return report, provenance


def _read_provenance(branch: Branch, found: Collector) -> Provenance | None:
    if PROVENANCE not in branch.stored:
        found.add("provenance-missing", PROVENANCE, "the branch has no record: nothing on it can be proven")
        return None
    size_bytes = branch.stored[PROVENANCE].size_bytes
    if size_bytes > _MAX_DOCUMENT_BYTES:
        found.add("provenance-invalid", PROVENANCE, f"{shown(size_bytes)} bytes are too many for a record")
        return None
    try:
        return Provenance.model_validate_json(branch.read(PROVENANCE, _MAX_DOCUMENT_BYTES))
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]:
            place = ".".join(str(part) for part in problem["loc"])
            found.add("provenance-invalid", f"{PROVENANCE}: {place}" if place else PROVENANCE, problem["msg"])
    return None


def _check_place(branch: Branch, provenance: Provenance, found: Collector, *, address_names_repository: bool) -> None:
    """Compare what the record says of its repository, branch and parameters with where it was found."""
    address, place = branch.target.where.replace("\\", "/").rstrip("/").removesuffix(".git"), provenance.place
    if not address.endswith(f"/{place.repository}"):
        rule = "repository-differs" if address_names_repository else "address-differs"
        found.add(rule, PROVENANCE, f"it was built for {shown(place.repository)}, not {address}")
    if place.revision != branch.name:
        found.add("branch-differs", PROVENANCE, f"it was built as {shown(place.revision)} and lies on {branch.name}")
    used, stated = provenance.parameters, _CONVENTIONAL.match(provenance.branch)
    if stated and list(stated.groups()) != [str(used.get(key)) for key in ("bits", "group_size", "desc_act")]:
        message = f"its parameters are not those that the name {provenance.branch} stands for"
        found.add("branch-differs", f"{PROVENANCE}: parameters", message)


def _compare_listing(branch: Branch, provenance: Provenance, found: Collector) -> None:
    """Compare which files there are, and how large, with the record."""
    stored, records = branch.stored, provenance.files
    for name in sorted(stored.keys() - records.keys() - UNLISTED_FILES):
        found.add("remote-file-unlisted", name, "the record does not list this file")
    for name in sorted(records.keys() - stored.keys()):
        found.add("remote-file-missing", name, file_name_problem(name) or "the record lists this file, it is not here")
    for name in sorted(branch.safe & records.keys()):
        there, recorded = stored[name].size_bytes, records[name].size_bytes
        if there != recorded:
            found.add("remote-file-changed", name, f"{shown(there)} bytes, the record says {shown(recorded)}")


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
    audited = audit.audit(folder, complete=True)
    # Files and record were compared before, as the branch's own findings.
    found.take(finding for finding in audited.findings if not finding.code.startswith("provenance-file-"))
    return replace(report, num_read=num_read, num_tensors=audited.facts.tensors_checked, audited=True)


def _verify_headers(
    branch: Branch, report: BranchReport, provenance: Provenance, folder: Path, found: Collector
) -> BranchReport:
    """Take the repository's word for what it states the sha256 of, and read the rest, what is parsed, and headers."""
    num_stated, wanted = _compare_stated(branch, provenance, found)
    there = download(branch, wanted, folder, found, lambda _: None)
    num_read = _compare_read(branch, provenance, folder, there, found)
    num_tensors = _check_headers(branch, provenance, folder, there, found)
    return replace(report, num_stated=num_stated, num_read=num_read, num_tensors=num_tensors)


def _compare_stated(branch: Branch, provenance: Provenance, found: Collector) -> tuple[int, list[str]]:
    """Compare the sha256 of every file that the repository states one of with the record.

    Returns:
        How many are equal, and the names of those to be read: all that it states none of, and what is parsed, so that
        what is judged is what was recorded.
    """
    num_stated, left_bytes, wanted = 0, _MAX_READ_BYTES, []
    for name in sorted(branch.safe & provenance.files.keys()):
        file, record = branch.stored[name], provenance.files[name]
        if file.size_bytes != record.size_bytes:
            continue  # reported
        if _is_document(name) and file.size_bytes > _MAX_DOCUMENT_BYTES:
            found.add("text-damaged", name, f"{file.size_bytes:,} bytes are too many for such a file")
        elif file.sha256 and not _is_document(name):
            num_stated += _check_digest(name, file.sha256, record, found, "the repository states the sha256")
        elif file.size_bytes > left_bytes:
            size = format_bytes(file.size_bytes)
            found.add("digest-unknown", name, f"the repository states no sha256, and {size} more are not read")
        else:
            left_bytes -= file.size_bytes
            wanted.append(name)
    return num_stated, wanted


def _check_digest(name: str, sha256: str, record: FileRecord, found: Collector, what: str) -> bool:
    if sha256 != record.sha256:
        found.add("remote-file-changed", name, f"{what} {sha256}, the record says {shown(record.sha256)}")
    return sha256 == record.sha256


def _is_document(name: str) -> bool:
    return name in (CONFIG, QUANTIZE_CONFIG, README) or name.endswith(INDEX_SUFFIX)


def _compare_read(branch: Branch, provenance: Provenance, folder: Path, names: Sequence[str], found: Collector) -> int:
    """Compare the content of what was downloaded with the record; return how many files equal it.

    Of a file that has another size than the record says, nothing more is said.
    """
    records = provenance.files
    listed = [name for name in names if name in records and branch.stored[name].size_bytes == records[name].size_bytes]
    digests = in_parallel(lambda name: sha256_file(folder / name), listed)
    equal = [
        _check_digest(name, digest, records[name], found, "its content has the sha256")
        for name, digest in zip(listed, digests, strict=True)
    ]
    return sum(equal)


def _check_headers(
    branch: Branch, provenance: Provenance, folder: Path, documents: Sequence[str], found: Collector
) -> int:
    """Check what config.json, the index and the headers of the weights say; return how many tensors were seen.

    Args:
        branch: whose headers are read.
        provenance: its record.
        folder: where its documents lie and its weights' headers are put.
        documents: names of the files that lie there.
        found: where to report.
    """
    weights_files = {name for name in branch.safe if name.endswith(SUFFIX)}
    listed = weights_files & provenance.files.keys()  # any other was reported, whatever is in it
    left_bytes, unread = _MAX_HEADERS_BYTES, (set(branch.stored) - branch.safe) | (weights_files - listed)
    for name in sorted(listed):
        num_read = put_header(branch, name, folder, left_bytes, found)
        if num_read is None:
            unread.add(name)
        left_bytes -= num_read or 0
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
        provenance.model_copy(update={"files": {}}).model_dump(),  # the files were compared before
        findings,
        declared=declared,
        weights=weights,
        num_linears=len(quantized_modules(weights)),
    )
    found.take(findings.collected())
    return len(weights.tensors)
