"""Read what the branches of a published repository say of themselves: their records, and the models they describe.

This is for choosing among branches. A branch counts only if its config.json and the list of its weights are those of
its record; `verify_published` checks everything.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pydantic import TypeAdapter, ValidationError

from packager.errors import PublishError
from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict, verdicts
from packager.model.strict_json import parse_json_object
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import read_model
from packager.publish.published.finding import Collector, PublishedFinding
from packager.publish.published.reading import Branch, bounded
from packager.publish.published.record import (
    MAX_DOCUMENT_BYTES,
    check_place,
    compare_listing,
    has_digest,
    open_branch,
    read_record,
)
from packager.publish.published.states import published_states
from packager.publish.targets import BranchState, Target
from packager.publish.targets.git import GitTarget
from packager.receipt import CONFIG, PROVENANCE, SAFETENSORS, TOKENIZER_MODEL, Provenance, QualityRecord
from packager.system.files import bytes_record
from packager.system.text import printable
from packager.variant import Variant, recorded_act_order

# Parameters that no runtime's rule reads, for records of before that lack them.
_OF_NO_RULE: Mapping[str, object] = {
    "damp_percent": 0.01,
    "damp_percent_limit": 0.01,
    "true_sequential": True,
    "scale_search": False,
    "refine": False,
    "target_correction": 0.0,
    "effort": "standard",
    "engine": "native",
}
_VARIANT = TypeAdapter(Variant)


@dataclass(frozen=True, kw_only=True)
class PublishedVariant:
    """A branch that can be chosen.

    Attributes:
        branch: its name in the repository.
        commit: the head that was read.
        provenance: its record.
        architecture: of its model; None where the record, of an earlier version, does not describe the model.
        verdicts: of the runtimes' checks; none where there is no architecture.
    """

    branch: str
    commit: str
    provenance: Provenance
    architecture: Architecture | None
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, kw_only=True)
class PublishedVariants:
    """The branches of a repository that can be chosen, main first, and why others cannot."""

    where: str
    variants: tuple[PublishedVariant, ...]
    findings: tuple[PublishedFinding, ...]


def published_variants(target: Target, log: Callable[[str], None]) -> PublishedVariants:
    """Return the branches of a repository that can be chosen.

    Raises:
        PublishError: the repository has no branches, or no branch could be read.
    """
    states = published_states(target)
    variants: list[PublishedVariant] = []
    findings: list[PublishedFinding] = []
    failures: list[PublishError] = []
    for name in sorted(states, key=lambda name: (name != "main", name)):
        found = Collector(name)
        log(f"reading the record of {printable(name)}")
        try:
            variant = _variant(target, name, states[name], found)
        except PublishError as error:
            failures.append(error)
            found.add("branch-unreadable", "", error.brief)
            variant = None
        findings += found.collected()
        if variant is not None and not found.has_errors:
            variants.append(variant)
    if len(failures) == len(states):
        raise failures[0]
    return PublishedVariants(where=target.where, variants=tuple(variants), findings=tuple(findings))


def _variant(target: Target, name: str, state: BranchState, found: Collector) -> PublishedVariant | None:
    stored = {file_name: bounded(file) for file_name, file in state.files.items()}
    branch = open_branch(target, name, state.commit, stored, found)
    record = read_record(branch, found) if branch else None
    if branch is None or record is None:
        return None
    provenance, _ = record
    check_place(branch, provenance, found, address_names_repository=not isinstance(target, GitTarget))
    _check_weights(branch, provenance, found)
    _check_figures(provenance.quality, found)
    architecture = _architecture(branch, provenance, found)
    variant = None if architecture is None else _recorded_variant(provenance)
    judged: tuple[Verdict, ...] = ()
    if architecture is not None and variant is not None:
        judged = verdicts(variant, architecture, lacks_tokenizer_model=TOKENIZER_MODEL not in stored)
    return PublishedVariant(
        branch=name, commit=state.commit, provenance=provenance, architecture=architecture, verdicts=judged
    )


def _check_weights(branch: Branch, provenance: Provenance, found: Collector) -> None:
    """Compare config.json and the weights with the record; other files, as a card that was edited, choose nothing."""
    records = {**provenance.weights_files}
    records |= {CONFIG: provenance.files[CONFIG]} if CONFIG in provenance.files else {}
    wanted = {name for name in branch.stored if name.endswith(SAFETENSORS)} | records.keys()
    stored = {name: file for name, file in branch.stored.items() if name in wanted}
    part = provenance.model_copy(update={"files": records})
    compare_listing(replace(branch, stored=stored, safe=branch.safe & wanted), part, found)
    for name in sorted(stored.keys() & records.keys()):
        if sha256 := stored[name].sha256:
            has_digest(name, sha256, records[name], found, "the repository states the sha256")
    total = sum(record.size_bytes for record in provenance.weights_files.values())
    if total != provenance.weights_bytes or total <= 0:
        found.add("provenance-disagrees", f"{PROVENANCE}: weights_bytes", "it is not the size of the weights files")


def _check_figures(quality: QualityRecord | None, found: Collector) -> None:
    errors = quality.errors.kl_divergence if quality is not None and quality.errors is not None else 0.0
    if quality is not None and not (math.isfinite(quality.kl_divergence) and math.isfinite(errors)):
        found.add("provenance-invalid", f"{PROVENANCE}: quality", "the KL divergence is not a number")


def _architecture(branch: Branch, provenance: Provenance, found: Collector) -> Architecture | None:
    """Return the model that the record and config.json describe together; None after reporting why there is none."""
    record = provenance.files.get(CONFIG)
    if CONFIG not in branch.safe or record is None:
        found.add("file-missing", CONFIG, "without it, neither memory nor runtimes are known")
        return None
    data = branch.read(CONFIG, MAX_DOCUMENT_BYTES + 1)
    if not has_digest(CONFIG, bytes_record(data).sha256, record, found, "its content has the sha256"):
        return None
    try:
        config = parse_json_object(data)
    except ValueError as error:  # a UnicodeDecodeError is one
        found.add("json-damaged", CONFIG, f"it is not JSON: {error}")
        return None
    findings = Findings()
    known = read_model({CONFIG: config, PROVENANCE: provenance.model_dump(mode="json")}, findings, None, None)
    found.take(findings.collected())
    return known.architecture


def _recorded_variant(provenance: Provenance) -> Variant | None:
    """Return the variant that a record is of, None if its parameters are none that this version knows."""
    used = provenance.parameters
    fields = {**_OF_NO_RULE, **used, "act_order": recorded_act_order(used), "branch": provenance.branch}
    fields.pop("desc_act", None)
    try:
        return _VARIANT.validate_python(fields)
    except ValidationError:
        return None
