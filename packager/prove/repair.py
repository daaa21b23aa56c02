"""Repair a checkpoint folder where the repair is certain, into a new folder.

Certain is what the tensors or the files themselves decide: no value is guessed, and no weight changes. What needs a
choice or another file is left, and named by its finding. Decision 30.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packager.errors import AuditError, SourceError, UsageError
from packager.model.branch_config import json_bytes
from packager.model.model_folder import open_inside
from packager.model.safetensors_file import read_header
from packager.prove.audit import AuditReport, Finding, audit
from packager.prove.audit.config import Declared, check_declared
from packager.prove.audit.files import JsonObject, Listing, as_object, list_folder, read_documents
from packager.prove.audit.finding import Findings
from packager.prove.audit.model import Describe
from packager.prove.audit.values import V1, V2, OpenFiles, read_rows
from packager.prove.audit.weights import DEFAULT_STEM, SUFFIX, Weights, read_weights, shard_stem
from packager.prove.held_parameters import Held, read_held
from packager.prove.repair_configs import Change, repaired_configs
from packager.prove.repair_weights import WeightsEdits, new_tensors, require_same_weights, write_repaired
from packager.receipt import INDEX_SUFFIX, PROVENANCE, STATEMENTS
from packager.system.files import TEMPORARY_PREFIX, atomic_file, check_disk, disk_errors, replace_folder, write_atomic

_INDEX = f"{DEFAULT_STEM}{INDEX_SUFFIX}"
_REFUSED = ("folder-missing", "folder-not-a-model", "folder-overfull")


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was repaired, or would be.

    Attributes:
        folder: the checkpoint.
        output: the new folder, None if nothing was written.
        changes: in the order of the files.
        left: findings that remain: of the new folder, or, if nothing was written, those that no change ends.
        num_compared: linears whose weights were dequantized before and after, and are equal.
    """

    folder: Path
    output: Path | None
    changes: tuple[Change, ...]
    left: tuple[Finding, ...]
    num_compared: int = 0

    @property
    def passed(self) -> bool:
        """Whether no error is left."""
        return not any(finding.severity == "error" for finding in self.left)


@dataclass(kw_only=True)
class _Plan:
    """The repairs of a folder: changed configs, new names of weights files, removed files, edits of weights."""

    listing: Listing
    weights: Weights
    stored_format: str
    documents: dict[str, JsonObject] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    edits: WeightsEdits = field(default_factory=WeightsEdits)
    changes: list[Change] = field(default_factory=list)

    def change(self, code: str, where: str, what: str, why: str) -> None:
        self.changes.append(Change(code=code, where=where, what=what, why=why))


def repair(
    folder: Path, output: Path, log: Callable[[str], None], *, dry_run: bool = False, describe: Describe | None = None
) -> RepairReport:
    """Write a repaired copy of a checkpoint folder.

    Args:
        folder: the checkpoint; nothing in it is changed.
        output: the new folder, which must not exist.
        log: gets a line per weights file.
        dry_run: write nothing.
        describe: see `audit`.

    Returns:
        The changes. Without any, and in a dry run, nothing is written.

    Raises:
        UsageError: the new folder exists, or one folder lies in the other.
        AuditError: the folder is not that of a model; or a repair would have changed a weight, and nothing was written.
        SourceError: a weights file cannot be read.
        MachineError: the disk is full.
    """
    _require_apart(folder, output)
    before = audit(folder, complete=False, describe=describe)
    for finding in before.findings:
        if finding.code in _REFUSED:
            raise AuditError(finding.message, where=str(folder), hint=finding.hint)
    plan = _planned(folder, before)
    ended = {change.code for change in plan.changes}
    left = tuple(finding for finding in before.findings if finding.code not in ended)
    if dry_run or not plan.changes:
        return RepairReport(folder=folder, output=None, changes=tuple(plan.changes), left=left)
    num_compared = _write(plan, output, log)
    after = audit(output, complete=False, describe=describe)
    return RepairReport(
        folder=folder, output=output, changes=tuple(plan.changes), left=after.findings, num_compared=num_compared
    )


def _require_apart(folder: Path, output: Path) -> None:
    inner, outer = folder.resolve(), output.resolve()
    if output.exists() or output.is_symlink():
        raise UsageError("the new folder exists", where=str(output), hint="name one that does not, beside the old one")
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UsageError("one folder lies in the other", where=str(output), hint="name a folder beside the old one")


def _planned(folder: Path, before: AuditReport) -> _Plan:
    quiet = Findings()  # the audit has reported all of it
    listing = list_folder(folder, quiet)
    documents = read_documents(listing, quiet, complete=False)
    weights = read_weights(listing, documents, quiet)
    declared = check_declared(documents, weights, quiet)
    held = read_held(weights, declared)
    plan = _Plan(listing=listing, weights=weights, stored_format=_stored_format(held, declared))
    _plan_weights(plan, held, declared, before)
    _plan_names(plan, documents)
    stem = DEFAULT_STEM if plan.names else weights.stem
    configs = repaired_configs(documents, listing, held, stem=stem, converts_zeros=plan.edits.to_v1)
    plan.documents |= configs.documents
    plan.changes += configs.changes
    _plan_index(plan, documents)
    if plan.changes:
        for name in sorted({PROVENANCE, *STATEMENTS} & listing.sizes.keys()):
            plan.removed.add(name)
            plan.change("", name, "the file is left out", "it records other bytes: the new folder is no build's")
    return plan


def _stored_format(held: Held, declared: Declared) -> str:
    """Return the format of the zeros: as the tensors show it, else as declared."""
    if held.checkpoint_format is not None and declared.sym is not False:
        return held.checkpoint_format
    return declared.checkpoint_format or V1


def _plan_weights(plan: _Plan, held: Held, declared: Declared, before: AuditReport) -> None:
    linears = {linear.name: linear for linear in held.linears}
    to_v1 = bool(linears) and plan.stored_format == V2 and not held.holds_zero_0
    renumbered = held.renumbered if held.order("natural", "renumbered") else {}
    dropped = frozenset(_zero_biases(plan.weights, before))
    files = plan.weights.files if plan.weights.is_all_read else ()
    unnamed = frozenset(name for name in files if "format" not in read_header(plan.listing.path(name)).metadata)
    plan.edits = WeightsEdits(linears=linears, to_v1=to_v1, renumbered=renumbered, dropped=dropped, metadata=unnamed)
    if to_v1:
        code = "checkpoint-format" if declared.checkpoint_format == V2 else "zeros-format"
        what = f"qzeros of {len(linears)} linears are stored as zero - 1"
        plan.change(code, "weights", what, "AutoGPTQ and ExLlama read no other format")
    if renumbered:
        what = f"the groups of {len(renumbered)} linears are numbered in the order of the columns"
        plan.change(
            "g-idx-order", "weights", what, "the same groups: rows of scales and qzeros move with their numbers"
        )
    if dropped:
        why = "all their values are 0, and the architecture has no bias there: strict loaders refuse them"
        plan.change("bias-needless", "weights", f"{len(dropped)} biases are left out", why)
    for name in sorted(unnamed):
        plan.change("safetensors-metadata", name, 'metadata {"format": "pt"}', "transformers refuses the file without")


def _zero_biases(weights: Weights, before: AuditReport) -> list[str]:
    """Return the biases that the architecture does not have, and that are zero."""
    found = [finding for finding in before.findings if finding.code == "bias-needless"]
    names = [f"{place}.bias" for finding in found for place in (finding.where, *finding.also)]
    with OpenFiles() as files:
        return [
            name
            for name in names
            if (tensor := weights.tensors.get(name)) is not None
            and tensor.info.dtype == "F16"
            and len(tensor.info.shape) == 1
            and not any((rows & 0x7FFF).any() for rows in read_rows(tensor, files))
        ]


def _plan_names(plan: _Plan, documents: Mapping[str, object]) -> None:
    """Name the weights as transformers and vLLM look for them."""
    if plan.weights.stem in ("", DEFAULT_STEM) or not plan.weights.is_all_read:
        return
    files = plan.weights.files
    new = {name: DEFAULT_STEM + name.removeprefix(plan.weights.stem) for name in files}
    if any(plan.listing.has(target) for target in new.values()) or len({shard_stem(name) for name in files}) > 1:
        return
    plan.names = new
    for name, target in new.items():
        plan.change("weights-name", name, f"it is called {target}", "transformers looks for no other name")
    for index in (name for name in documents if name.endswith(INDEX_SUFFIX) and name != _INDEX):
        if len(files) > 1:
            plan.removed.add(index)


def _plan_index(plan: _Plan, documents: Mapping[str, object]) -> None:
    """Write the index of shards as their headers have it."""
    weights = plan.weights
    if len(weights.files) < 2 or not weights.is_all_read:
        return
    held = {name: len(read_header(plan.listing.path(name)).tensors) for name in weights.files}
    if sum(held.values()) != len(weights.tensors):
        return  # two shards hold the same tensor
    kept = {name: tensor for name, tensor in sorted(weights.tensors.items()) if name not in plan.edits.dropped}
    total = sum(tensor.info.size_bytes for tensor in kept.values())
    old = next((as_object(documents[name]) for name in sorted(documents) if name.endswith(INDEX_SUFFIX)), None) or {}
    metadata = as_object(old.get("metadata")) or {}
    index: JsonObject = {
        "metadata": {**metadata, "total_size": total},
        "weight_map": {name: plan.names.get(tensor.path.name, tensor.path.name) for name, tensor in kept.items()},
    }
    if index != old:
        code = "index-missing" if not old else "index-disagrees"
        if old.get("weight_map") == index["weight_map"]:
            code = "index-total-size"
        elif plan.names:
            code = "weights-name"
        plan.documents[_INDEX] = index
        plan.change(code, _INDEX, "the index is written anew", "the headers of the shards say where each tensor is")


def _write(plan: _Plan, output: Path, log: Callable[[str], None]) -> int:
    """Write the new folder under a temporary name, compare its weights, and rename it; return the linears compared."""
    check_disk(output.parent, sum(plan.listing.sizes.values()))
    temporary = output.with_name(f"{TEMPORARY_PREFIX}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(temporary):
        temporary.mkdir(parents=True)
    try:
        _write_files(plan, temporary, log)
        compared = plan.edits.edited_linears
        if compared:
            log(f"comparing the weights of {len(compared)} linears before and after")
            paths = [temporary / plan.names.get(name, name) for name in plan.weights.files]
            require_same_weights(compared, new_tensors(paths), stored_format=plan.stored_format)
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(compared)


def _write_files(plan: _Plan, folder: Path, log: Callable[[str], None]) -> None:
    by_file: dict[str, list[str]] = {name: [] for name in plan.weights.files}
    for name, tensor in plan.weights.tensors.items():
        by_file[tensor.path.relative_to(plan.listing.folder).as_posix()].append(name)
    with OpenFiles() as files:
        for name in plan.listing.sizes:
            target = folder / plan.names.get(name, name)
            if name in plan.removed or name in plan.documents:
                continue
            with disk_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(SUFFIX):
                log(f"writing {target.name}")
            if name in by_file and plan.edits.touches(name, by_file[name]):
                write_repaired(plan.listing.path(name), target, plan.edits, files)
            else:
                _copy(plan.listing.folder, name, target)
    for name, document in plan.documents.items():
        write_atomic(folder / name, json_bytes(document))


def _copy(folder: Path, name: str, target: Path) -> None:
    try:
        with open_inside(folder, name) as reader, atomic_file(target) as stream:
            shutil.copyfileobj(reader, stream, 1 << 22)
    except OSError as error:
        raise SourceError("the file cannot be read", where=str(folder / name), why=str(error)) from error
