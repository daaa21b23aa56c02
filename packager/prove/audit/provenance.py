"""provenance.json against the folder: the same files, the same bytes, the same parameters."""

from collections.abc import Mapping

from pydantic import ValidationError

from packager.prove.audit.config import Declared, bits_of
from packager.prove.audit.files import JsonObject, Listing
from packager.prove.audit.finding import Findings
from packager.prove.audit.weights import Weights
from packager.receipt import PROVENANCE, UNLISTED_FILES, FileRecord, Provenance
from packager.system.files import sha256_file
from packager.system.text import shown

_MAX_PROBLEMS = 5


def check_provenance(
    listing: Listing,
    document: JsonObject,
    findings: Findings,
    *,
    declared: Declared,
    weights: Weights,
    num_linears: int,
) -> None:
    """Check provenance.json, and by its digests every byte of the folder."""
    try:
        provenance = Provenance.model_validate(document)
    except ValidationError as error:
        for problem in error.errors()[:_MAX_PROBLEMS]:
            place = ".".join(str(part) for part in problem["loc"])
            findings.add("provenance-invalid", f"{PROVENANCE}: {place}", problem["msg"])
        return
    _check_files(listing, provenance.files, findings)
    for name in ("bits", "group_size", "desc_act", "sym"):
        found, recorded = getattr(declared, name), provenance.parameters.get(name)
        if found is not None and recorded != found:
            message = f"{shown(recorded)}, declared is {shown(found)}"
            findings.add("provenance-disagrees", f"{PROVENANCE}: {name}", message)
    order, desc_act = provenance.parameters.get("act_order"), provenance.parameters.get("desc_act")
    if order is not None and (order == "full") is not desc_act:  # records of earlier versions have desc_act alone
        message = f"{shown(order)}, with desc_act {shown(desc_act)}"
        findings.add("provenance-disagrees", f"{PROVENANCE}: act_order", message)
    if weights.is_all_read and provenance.weights_bytes != weights.size_bytes:
        message = f"{provenance.weights_bytes}, the weights files have {weights.size_bytes}"
        findings.add("provenance-disagrees", f"{PROVENANCE}: weights_bytes", message)
    _check_bits(provenance, weights, findings)
    if weights.is_all_read and len(provenance.linears) != num_linears:
        message = f"{len(provenance.linears)} linears, the weights have {num_linears}"
        findings.add("provenance-disagrees", f"{PROVENANCE}: linears", message)


def _check_bits(provenance: Provenance, weights: Weights, findings: Findings) -> None:
    """Check the bits of linears, which the record of a mix has, by the shapes of their tensors."""
    for record in provenance.linears:
        held = bits_of(weights, f"{record.name}.qweight") if f"{record.name}.qweight" in weights.tensors else None
        if record.bits is not None and held is not None and record.bits != held:
            message = f"{record.bits} bits, the tensors have {held}"
            findings.add("provenance-disagrees", f"{PROVENANCE}: linears: {record.name}", message)


def _check_files(listing: Listing, records: Mapping[str, FileRecord], findings: Findings) -> None:
    for name in sorted(listing.sizes.keys() - records.keys() - UNLISTED_FILES):
        findings.add("provenance-file-unlisted", name, "provenance.json does not list this file")
    for name, record in sorted(records.items()):
        if not listing.has(name):
            findings.add("provenance-file-missing", name, "provenance.json lists this file, the folder lacks it")
        elif listing.stated.get(name) == "":
            findings.add("file-unhashed", name, "only a part of the file was read")
        elif name in listing.sizes and (problem := _file_problem(listing, name, record)):
            findings.add("provenance-file-changed", name, problem)


def _file_problem(listing: Listing, name: str, record: FileRecord) -> str:
    if listing.sizes[name] != record.size_bytes:
        return f"it has {listing.sizes[name]} bytes, provenance.json has {record.size_bytes}"
    try:
        digest = listing.stated.get(name) or sha256_file(listing.path(name))
    except OSError as error:
        return f"it cannot be read: {error}"
    return "" if digest == record.sha256 else f"its sha256 is {digest}, provenance.json has {shown(record.sha256)}"
