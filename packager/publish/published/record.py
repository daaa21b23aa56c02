"""Read the record of a published branch, provenance.json, and compare it with the branch it lies in."""

import hashlib
from collections.abc import Mapping

from pydantic import ValidationError

from packager.model.checkpoint import MOST_RECORD_BYTES
from packager.model.strict_json import most_values_in
from packager.prove.audit.files import MOST_RECORD_VALUES
from packager.publish.published.finding import Collector
from packager.publish.published.reading import MAX_FILES, Branch, safe_names
from packager.publish.targets import StoredFile, Target, file_name_problem
from packager.receipt import PROVENANCE, UNLISTED_FILES, FileRecord, Provenance
from packager.system.text import shown
from packager.variant import parsed_branch_name, recorded_act_order

# A 405B model has 4,000 tensors: a header of half a megabyte. Parsed JSON takes many times its size in memory.
MAX_DOCUMENT_BYTES = 8_000_000
_MAX_PROBLEMS = 5


def open_branch(
    target: Target, name: str, commit: str, stored: Mapping[str, StoredFile], found: Collector
) -> Branch | None:
    """Return a branch with the names that are safe to write; report the others, and a branch of too many files."""
    if len(stored) > MAX_FILES:
        found.add("files-too-many", "", f"{len(stored):,} files; nothing on this branch was compared")
        return None
    return Branch(target=target, name=name, commit=commit, stored=stored, safe=safe_names(stored, found))


def read_record(branch: Branch, found: Collector) -> tuple[Provenance, str] | None:
    """Return the record and the sha256 of its file, read once: a server may send other bytes the next time."""
    if PROVENANCE not in branch.stored:
        found.add("provenance-missing", PROVENANCE, "the branch has no record: its files cannot be checked")
        return None
    size_bytes = branch.stored[PROVENANCE].size_bytes
    if size_bytes > MOST_RECORD_BYTES:
        found.add("provenance-invalid", PROVENANCE, f"{shown(size_bytes)} bytes are too many for a record")
        return None
    data = branch.read(PROVENANCE, MOST_RECORD_BYTES)
    if most_values_in(data) > MOST_RECORD_VALUES:
        found.add("provenance-invalid", PROVENANCE, f"it holds more than {MOST_RECORD_VALUES} values")
        return None
    try:
        return Provenance.model_validate_json(data), hashlib.sha256(data).hexdigest()
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]:
            place = ".".join(str(part) for part in problem["loc"])
            found.add("provenance-invalid", f"{PROVENANCE}: {place}" if place else PROVENANCE, problem["msg"])
    return None


def check_place(branch: Branch, provenance: Provenance, found: Collector, *, address_names_repository: bool) -> None:
    """Compare the repository, branch and parameters of the record with those of the published branch."""
    address, place = branch.target.where.replace("\\", "/").rstrip("/").removesuffix(".git"), provenance.place
    if not address.endswith(f"/{place.repository}"):
        rule = "repository-differs" if address_names_repository else "address-differs"
        found.add(rule, PROVENANCE, f"it was built for {shown(place.repository)}, not {address}")
    if place.revision != branch.name:
        found.add("branch-differs", PROVENANCE, f"it was built as {shown(place.revision)}, the branch is {branch.name}")
    used, stated = provenance.parameters, parsed_branch_name(provenance.branch)
    # Earlier records have no act_order, and a name with static or group in it was the recipe's own.
    named_by_hand = stated is not None and stated[2] in ("group", "static") and "act_order" not in used
    if stated and not named_by_hand and stated != (used.get("bits"), used.get("group_size"), recorded_act_order(used)):
        message = f"its parameters differ from those in the name {provenance.branch}"
        found.add("branch-differs", f"{PROVENANCE}: parameters", message)


def compare_listing(branch: Branch, provenance: Provenance, found: Collector) -> None:
    """Compare the names and sizes of the files with the record."""
    stored, records = branch.stored, provenance.files
    for name in sorted(stored.keys() - records.keys() - UNLISTED_FILES):
        found.add("remote-file-unlisted", name, "the record does not list this file")
    for name in sorted(records.keys() - stored.keys()):
        found.add("remote-file-missing", name, file_name_problem(name) or "the branch lacks this file of the record")
    for name in sorted(branch.safe & records.keys()):
        there, recorded = stored[name].size_bytes, records[name].size_bytes
        if there != recorded:
            found.add("remote-file-changed", name, f"{shown(there)} bytes, the record has {shown(recorded)}")


def has_digest(name: str, sha256: str, record: FileRecord, found: Collector, what: str) -> bool:
    """Return whether a file has the sha256 of its record; report one that has not. `what` begins the message."""
    if sha256 != record.sha256:
        found.add("remote-file-changed", name, f"{what} {sha256}, the record has {shown(record.sha256)}")
    return sha256 == record.sha256
