"""Stage 8, first part: check a folder against the format's contract without loading the model.

The audit reads any checkpoint folder, ours or not, and reports everything at once: damaged input is a finding, never an
exception. Of the weights it reads headers and the small tensors (qzeros, scales, g_idx, bias), in slices, so that
13 billion parameters need a few megabytes of memory; qweight is only hashed, against provenance.json. Where the weights
are elsewhere, `audit_part` reads a sample of the small tensors.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packager.model.architecture import Architecture
from packager.model.safetensors_file import StoredTensor
from packager.prove.audit.card import check_readme
from packager.prove.audit.config import Declared, check_code, check_declared
from packager.prove.audit.files import (
    JsonObject,
    Listing,
    as_object,
    check_file_set,
    list_folder,
    model_problem,
    read_documents,
)
from packager.prove.audit.finding import AUDIT_RULES, Finding, Findings, Rule, Severity
from packager.prove.audit.generation import check_generation, check_special_ids
from packager.prove.audit.model import Describe, read_model
from packager.prove.audit.pictures import check_pictures
from packager.prove.audit.privacy import check_privacy, is_text
from packager.prove.audit.provenance import check_provenance
from packager.prove.audit.sample import sampled_linears, sampled_tensors
from packager.prove.audit.tensors import Expected, Linear, check_tensors, quantized_modules
from packager.prove.audit.tokenizer import check_tokenizer
from packager.prove.audit.weights import Weights, read_weights
from packager.receipt import PICTURE_FILES, PROVENANCE, Provenance

# Reads the bytes of tensors, which may lie elsewhere, into the weights files of the folder; False if it cannot.
Fetch = Callable[[Iterable[StoredTensor]], bool]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The declared parameters and the contents of a folder; None where nothing is declared.

    Attributes:
        bits, group_size, desc_act, sym, checkpoint_format: as declared.
        num_linears: quantized linears found.
        tensors_checked: tensors whose header was checked.
        weights_bytes: size of the weights files.
        linears_read: quantized linears of which values were read.
    """

    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    sym: bool | None = None
    checkpoint_format: str | None = None
    num_linears: int = 0
    tensors_checked: int = 0
    weights_bytes: int = 0
    linears_read: int = 0


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """The findings of an audit in the order of the checks, the facts about the folder, and the names of its files."""

    findings: tuple[Finding, ...]
    facts: Facts
    files: frozenset[str] = frozenset()

    @property
    def passed(self) -> bool:
        """Return whether no finding is an error."""
        return not self.errors

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Return the findings that break the contract."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Return the findings that do not break the contract."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")


def audit(
    folder: Path,
    *,
    complete: bool = True,
    private_words: Sequence[str] = (),
    architecture: Architecture | None = None,
    describe: Describe | None = None,
) -> AuditReport:
    """Check a checkpoint folder against everything that a published branch must be.

    Args:
        folder: the folder of one branch.
        complete: False leaves out README.md, the licence files it demands, and provenance.json: the state of a
            folder before its card is rendered.
        private_words: distinctive names of this machine or its user, which may not occur in any text.
        architecture: of the base model, from its lock; None takes the description in provenance.json.
        describe: describes the model of a folder that has no description; None checks what holds for any model.

    Returns:
        All findings; an absent or damaged folder is one, never an exception.
    """
    findings = Findings()
    if not folder.is_dir():
        findings.add("folder-missing", str(folder), "there is no such folder")
    elif problem := model_problem(folder):
        findings.add("folder-not-a-model", str(folder), problem)
    else:
        listing = list_folder(folder, findings)
        if not findings.has("folder-overfull"):  # texts of 10,000 files would be searched for an hour
            headers = _check_headers(
                listing, listing.sizes, findings, complete=complete, architecture=architecture, describe=describe
            )
            _check_linears(headers.linears, headers, findings)
            _check_rest(listing, headers, findings, private_words=private_words, complete=complete)
            return _report(listing, headers, findings, linears_read=len(headers.linears))
    return AuditReport(findings=findings.collected(), facts=Facts())


def audit_part(
    listing: Listing,
    findings: Findings,
    *,
    fetch: Fetch,
    left_bytes: Mapping[Path, int],
    complete: bool = True,
    describe: Describe | None = None,
) -> AuditReport:
    """Check a branch that lies elsewhere: its documents, the headers of its weights, and a sample of the values.

    Args:
        listing: every file of the branch by its size. The folder holds what `is_read_whole` names, and the weights
            files up to the ends of their headers, sparse after them; `stated` has the digests of all other files.
        findings: what was found while those files were read.
        fetch: reads the sample's bytes into the weights files.
        left_bytes: how many bytes it may read, by weights file.
        complete: see `audit`.
        describe: see `audit`.
    """
    headers = _check_headers(listing, listing.sizes, findings, complete=complete, describe=describe)
    linears = sampled_linears(headers.linears, left_bytes)
    if linears and not fetch(sampled_tensors(linears)):
        linears = ()
    _check_linears(linears, headers, findings)
    _check_rest(listing, headers, findings, complete=complete)
    return _report(listing, headers, findings, linears_read=len(linears))


def is_read_whole(name: str) -> bool:
    """Return whether the audit parses or searches a file of this name, and so needs all its bytes."""
    return is_text(name) or name in PICTURE_FILES


def audit_small_files(folder: Path, architecture: Architecture) -> AuditReport:
    """Check a branch's files beside the weights, before there are weights and a card.

    Args:
        folder: with those files.
        architecture: of the base model.

    Returns:
        The findings of `audit` that need no weights.
    """
    findings = Findings()
    listing = list_folder(folder, findings)
    documents = read_documents(listing, findings, complete=False)
    read_model(documents, findings, architecture, None)
    check_declared(documents, Weights(tensors={}), findings)
    _check_texts(listing, documents, findings, complete=False)
    return AuditReport(findings=findings.collected(), facts=Facts())


def _check_linears(linears: Sequence[Linear], headers: "_Headers", findings: Findings) -> None:
    """Check the values of linears."""
    from packager.prove.audit.values import check_values  # numpy: 90 ms, which status and card need not wait for

    check_values(linears, headers.declared, findings)


def _check_rest(
    listing: Listing,
    headers: "_Headers",
    findings: Findings,
    *,
    private_words: Sequence[str] = (),
    complete: bool,
) -> None:
    """Run the checks of everything but the weights."""
    documents = headers.documents
    _check_texts(listing, documents, findings, private_words=private_words, complete=complete)
    if complete:
        check_readme(listing, documents, findings)
        check_pictures(listing, findings)
        if (provenance := as_object(documents.get(PROVENANCE))) is not None:
            _check_record(listing, provenance, headers, findings)


def _check_texts(
    listing: Listing,
    documents: Mapping[str, object],
    findings: Findings,
    *,
    private_words: Sequence[str] = (),
    complete: bool,
) -> None:
    """Run the checks of what is neither weights nor card."""
    check_tokenizer(listing, documents, findings)
    check_code(listing, documents, findings)
    check_special_ids(documents, findings)
    check_generation(documents, findings)
    check_privacy(listing, documents, findings, private_words=private_words, complete=complete)


def audit_headers(listing: Listing, *, present: Collection[str], provenance: Provenance) -> AuditReport:
    """Check a branch of which only some documents and the headers of the weights were downloaded.

    Args:
        listing: every file of the branch by its size; the folder holds the documents, and the weights files up to the
            ends of their headers.
        present: names of the documents in the folder.
        provenance: the branch's record; its list of files is not compared.

    Returns:
        The findings of `audit` that need no other bytes than these.
    """
    findings = Findings()
    record = provenance.model_copy(update={"files": {}}).model_dump()
    sizes = {name: listing.sizes[name] for name in present}
    headers = _check_headers(listing, sizes, findings, complete=True, record=record)
    _check_record(replace(listing, sizes={}, unread=frozenset()), record, headers, findings)
    return _report(listing, headers, findings)


@dataclass(frozen=True, kw_only=True)
class _Headers:
    """The parsed documents and headers of a folder, and the quantized linears with correct tensors."""

    documents: Mapping[str, object]
    weights: Weights
    declared: Declared
    linears: tuple[Linear, ...]


def _check_headers(
    listing: Listing,
    document_sizes: Mapping[str, int],
    findings: Findings,
    *,
    complete: bool,
    architecture: Architecture | None = None,
    describe: Describe | None = None,
    record: JsonObject | None = None,
) -> _Headers:
    """Run the checks that need the names of files, the documents, and the headers of the weights.

    `record` is the content of provenance.json where that is no file of the folder.
    """
    check_file_set(listing, findings, complete=complete)
    documents = read_documents(replace(listing, sizes=document_sizes), findings, complete=complete)
    if record is not None:
        documents[PROVENANCE] = record
    weights = read_weights(listing, documents, findings)
    declared = check_declared(documents, weights, findings)
    expected = Expected(declared=declared, model=read_model(documents, findings, architecture, describe))
    linears = check_tensors(weights, expected, findings)
    return _Headers(documents=documents, weights=weights, declared=declared, linears=linears)


def _check_record(listing: Listing, provenance: JsonObject, headers: _Headers, findings: Findings) -> None:
    weights, num_linears = headers.weights, len(quantized_modules(headers.weights))
    check_provenance(listing, provenance, findings, declared=headers.declared, weights=weights, num_linears=num_linears)


def _report(listing: Listing, headers: _Headers, findings: Findings, *, linears_read: int = 0) -> AuditReport:
    declared, weights = headers.declared, headers.weights
    facts = Facts(
        bits=declared.bits,
        group_size=declared.group_size,
        desc_act=declared.desc_act,
        sym=declared.sym,
        checkpoint_format=declared.checkpoint_format,
        num_linears=len(quantized_modules(weights)),
        tensors_checked=len(weights.tensors),
        weights_bytes=weights.size_bytes,
        linears_read=linears_read,
    )
    return AuditReport(findings=findings.collected(), facts=facts, files=frozenset(listing.sizes) | listing.unread)


__all__ = [
    "AUDIT_RULES",
    "AuditReport",
    "Facts",
    "Fetch",
    "Finding",
    "Rule",
    "Severity",
    "audit",
    "audit_headers",
    "audit_part",
    "audit_small_files",
    "is_read_whole",
]
