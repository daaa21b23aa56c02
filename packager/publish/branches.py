"""Stage 10, publish: bring each branch of a repository to exactly the files that were built.

`publish` compares the folders with their records, reads the target and shows the plan before it writes the first byte.
Variants go first and `main` last. Each branch is read back from the repository and compared with its manifest. A branch
that was stored wrongly gets its earlier files back. A branch that already holds its files gets no commit: a second
publish changes nothing, and a killed publish is run again.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from packager.errors import PublishError, StateError
from packager.publish.after_publish import FinalStep, apply_final_steps
from packager.publish.plan import BranchPlan, PublishPlan, plan_line, plan_publish
from packager.publish.sign_release import Files, ReleaseSigner
from packager.publish.take_back import take_back
from packager.publish.targets import (
    BranchState,
    HeadMovedError,
    LocalFile,
    StoredFile,
    Target,
    file_name_problem,
    read_local_file,
)
from packager.receipt import FileRecord
from packager.system.files import list_files
from packager.system.parallel import in_parallel
from packager.system.text import format_bytes
from packager.variant import MAIN, branch_problem

Compare = Callable[[PublishPlan, Files], None]
Inspect = Callable[["BranchContent", BranchState], None]
DescribeCommit = Callable[["BranchContent", BranchState | None], str]


@dataclass(frozen=True, kw_only=True)
class BranchContent:
    """The content that a branch gets.

    Attributes:
        branch: the branch's name.
        folder: the folder of the files.
        files: the manifest: every file of the folder, by name with '/' between folders.
        message: the message of the commit that makes the branch.
    """

    branch: str
    folder: Path
    files: Mapping[str, FileRecord]
    message: str


@dataclass(frozen=True, kw_only=True)
class BranchOutcome:
    """The result for one branch: its head (None after a dry run for a missing branch) and the time in seconds."""

    plan: BranchPlan
    commit: str | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """The result for a repository: the branches in order, and notes about repairs after a killed publish."""

    plan: PublishPlan
    outcomes: tuple[BranchOutcome, ...]
    notes: tuple[str, ...]
    dry_run: bool

    def head(self, branch: str) -> str:
        """Return a branch's head commit after publishing.

        Raises:
            KeyError: the branch was not published, or has no head after a dry run.
        """
        return {outcome.plan.branch: outcome.commit for outcome in self.outcomes if outcome.commit}[branch]


def publish_branches(
    branches: Sequence[BranchContent],
    target: Target,
    log: Callable[[str], None],
    *,
    signer: ReleaseSigner | None = None,
    final_steps: Sequence[FinalStep] = (),
    dry_run: bool = False,
    show_plan: Callable[[PublishPlan], None] = lambda _: None,
    confirm: Callable[[PublishPlan], None] = lambda _: None,
    compare: Compare | None = None,
    describe: DescribeCommit = lambda content, _: content.message,
    inspect: Inspect = lambda *_: None,
    may_write: bool = True,
) -> PublishReport:
    """Publish `branches` to `target`.

    Args:
        branches: the content of each branch.
        target: the repository.
        log: gets one line for the plan, one per branch, and one per repair after a killed publish.
        signer: adds the signed statements; None publishes the files as they are.
        final_steps: the steps after the last branch.
        dry_run: plan and check, write nothing.
        show_plan: gets the plan before the first effect; not called in a dry run, whose report holds the plan.
        confirm: called if anything would change, after `show_plan` and before the first effect; raises to stop.
        compare: gets the plan and the files, before anything is made and again before the first effect; raises to stop.
        describe: gets a branch that changes and its present state, and returns the commit's message.
        inspect: gets a branch that changes and its present state before; raises to stop.
        may_write: whether a dry run checks that the target can be written to now.

    Raises:
        StateError: a folder, or the worktree of a published repository, was edited.
        PublishError: the target cannot be published to now, or does not hold the files that it was given, or a final
            step failed after every branch was published.
        MachineError: git or disk space is missing.
    """
    files = check_folders(branches, blob_ids=target.identifies_by_blob)
    planned = partial(_planned, files, branches, target, signer, final_steps, describe, inspect, compare)
    if dry_run:
        plan, _ = planned()
        if may_write:
            _check_target(plan, target)
        log(plan_line(plan))
        return _report_of(plan)
    if signer:
        signer.require_private_key()
    if compare or MAIN not in files:
        planned()  # raises before a repository is made
    with target.exclusive() as notes:
        for note in notes:
            log(note)
        plan, files = planned()
        show_plan(plan)
        _check_target(plan, target)
        log(plan_line(plan))
        if plan.effects:
            confirm(plan)
        outcomes = _publish_each(plan, files, target, final_steps, log)
    return PublishReport(plan=plan, outcomes=tuple(outcomes), notes=tuple(notes), dry_run=False)


def _report_of(plan: PublishPlan) -> PublishReport:
    """Return the report of a dry run."""
    outcomes = tuple(BranchOutcome(plan=entry, commit=entry.parent, seconds=0.0) for entry in plan.branches)
    return PublishReport(plan=plan, outcomes=outcomes, notes=(), dry_run=True)


def check_folders(branches: Sequence[BranchContent], *, blob_ids: bool = True) -> Mapping[str, Mapping[str, LocalFile]]:
    """Read every branch's files, in parallel, and compare them with their records.

    Args:
        branches: the content of each branch.
        blob_ids: whether to compute the blob ids of large files, too.

    Returns:
        The files by branch and name.

    Raises:
        PublishError: a branch or file name cannot be published; a branch has no files or is given twice.
        StateError: a folder does not hold exactly the files of its manifest.
    """
    _check_names(branches)
    files: dict[str, dict[str, LocalFile]] = {}
    findings: list[str] = []
    listings = {content.branch: set(list_files(content.folder)) for content in branches}
    wanted = [
        (content, name) for content in branches for name in sorted(listings[content.branch] & content.files.keys())
    ]
    wanted.sort(key=lambda entry: -entry[0].files[entry[1]].size_bytes)
    read = in_parallel(lambda entry: _read_file(*entry, blob_ids=blob_ids), wanted)
    by_name = {(content.branch, name): file for (content, name), file in zip(wanted, read, strict=True)}
    for content in branches:
        present, manifest = listings[content.branch], content.files
        found = {name: by_name[content.branch, name] for name in sorted(present & manifest.keys())}
        extra = sorted(present - manifest.keys())
        findings.extend(f"{content.folder / name}: {text}" for name, text in _differences(found, manifest))
        findings.extend(f"{content.folder / name}: not in the manifest" for name in extra)
        files[content.branch] = found
    if findings:
        raise StateError(
            "the output folder was changed after the build",
            why="\n    ".join(["these files differ from their records:", *findings]),
            hint="build the branch again; to publish an edit, make it in the recipe, where the next build keeps it",
        )
    return files


def outcome_line(outcome: BranchOutcome) -> str:
    """Return one line with a branch's result."""
    plan = outcome.plan
    if plan.action == "unchanged" or outcome.commit is None:
        return f"{plan.branch}: {plan.action}"
    changes = f"{len(plan.added)} added, {len(plan.changed)} changed, {len(plan.removed)} removed"
    done = "created" if plan.action == "create" else "updated"
    size = format_bytes(plan.written_bytes)
    return f"{plan.branch}: {done} at {outcome.commit[:12]}, files: {changes}, {size}, {outcome.seconds:.1f} s"


def _planned(
    files: Files,
    branches: Sequence[BranchContent],
    target: Target,
    signer: ReleaseSigner | None,
    final_steps: Sequence[FinalStep],
    describe: DescribeCommit,
    inspect: Inspect,
    compare: Compare | None,
) -> tuple[PublishPlan, Files]:
    """Return the plan with the commits' messages, and the files with their signed statements."""
    remote = target.read_branches()
    warnings: tuple[str, ...] = ()
    if signer:
        signed = signer.signed(files, target, remote)
        files, warnings = signed.files, signed.warnings
    plan = plan_publish(files, remote, where=target.where)
    contents = {content.branch: content for content in branches}
    for branch in plan.changing:
        if branch in remote:
            inspect(contents[branch], remote[branch])
    messages = {branch: describe(contents[branch], remote.get(branch)) for branch in plan.changing}
    described = (replace(entry, message=messages.get(entry.branch, "")) for entry in plan.branches)
    plan = replace(plan, branches=tuple(described))
    plan = replace(plan, warnings=warnings, final_steps=tuple(line for step in final_steps for line in step.plan(plan)))
    if compare:
        compare(plan, files)
    return plan, files


def _check_target(plan: PublishPlan, target: Target) -> None:
    target.check(plan.changing or ((MAIN,) if plan.final_steps else ()))


def _publish_each(
    plan: PublishPlan, files: Files, target: Target, final_steps: Sequence[FinalStep], log: Callable[[str], None]
) -> list[BranchOutcome]:
    outcomes = []
    for entry in plan.branches:
        outcomes.append(_publish_branch(entry, files[entry.branch], target))
        log(outcome_line(outcomes[-1]))
    apply_final_steps(final_steps, {each.plan.branch: each.commit or "" for each in outcomes}, target.where)
    for line in plan.final_steps:
        log(f"done: {line}")
    return outcomes


def _publish_branch(plan: BranchPlan, files: Mapping[str, LocalFile], target: Target) -> BranchOutcome:
    if plan.action == "unchanged":
        return BranchOutcome(plan=plan, commit=plan.parent, seconds=0.0)
    started = time.monotonic()
    try:
        commit = target.commit(plan.branch, files, parent=plan.parent, message=plan.message)
    except HeadMovedError as error:
        raise _moved(plan, target, error) from error
    if wrong := list(_not_as_built(target.read_back(commit), files)):
        raise PublishError(
            f"{plan.branch} was published and does not hold the files that were built",
            where=target.where,
            why="; ".join([*wrong, take_back(target, plan.branch, commit, plan.parent)]),
            hint="publish again; if that does not help, check the repository (git fsck, if it is a folder)",
        )
    return BranchOutcome(plan=plan, commit=commit, seconds=time.monotonic() - started)


def _not_as_built(stored: Mapping[str, StoredFile], files: Mapping[str, LocalFile]) -> Iterator[str]:
    for name in sorted(stored.keys() | files.keys()):
        if name not in stored:
            yield f"{name}: missing"
        elif name not in files:
            yield f"{name}: not in the manifest"
        elif not stored[name].holds(files[name]):
            yield f"{name}: {stored[name].size_bytes:,} bytes of other content"


def _moved(plan: BranchPlan, target: Target, error: HeadMovedError) -> HeadMovedError:
    """Return the error with the files that differ between the planned parent and the present head."""
    before = target.read_back(plan.parent) if plan.parent else {}
    now = target.read_branches().get(plan.branch)
    changes = ["the branch was deleted"] if now is None else _changes(before, now)
    return HeadMovedError(
        f"{plan.branch} moved while it was being published",
        where=target.where,
        why=", ".join([*filter(None, [error.why]), *changes]),
        hint="look at the branch, then publish again: uploaded files are not uploaded twice",
    )


def _changes(before: Mapping[str, StoredFile], now: BranchState) -> list[str]:
    """Describe the changes that another publisher made to a branch."""
    author = f" by {now.foreign_author}" if now.foreign_author else ""
    kinds = {name: _change_kind(before.get(name), now.files.get(name)) for name in before.keys() | now.files.keys()}
    changed = [f"{name} was {kinds[name]}" for name in sorted(kinds) if kinds[name]]
    return [f"its head is now {now.commit[:12]}{author}", *changed]


def _change_kind(before: StoredFile | None, now: StoredFile | None) -> str:
    if before is None or now is None:
        return "added" if before is None else "removed"
    return "" if before.holds(now) else "changed"


def _read_file(content: BranchContent, name: str, *, blob_ids: bool) -> LocalFile:
    """Hash a file, unless its size is not that of its record: a sparse file can have any size."""
    path = content.folder / name
    size_bytes = path.stat().st_size
    if size_bytes != content.files[name].size_bytes:
        return LocalFile(path=path, size_bytes=size_bytes, sha256="", blob_id="")
    return read_local_file(path, blob_id=blob_ids)


def _differences(found: Mapping[str, LocalFile], manifest: Mapping[str, FileRecord]) -> Iterator[tuple[str, str]]:
    """Yield each file that differs from the manifest, and the difference."""
    for name in sorted(found.keys() | manifest.keys()):
        file, record = found.get(name), manifest.get(name)
        if file is None:
            yield name, "missing"
        elif record is None:
            yield name, "not in the manifest"
        elif file.size_bytes != record.size_bytes:
            yield name, f"changed: {file.size_bytes:,} bytes instead of {record.size_bytes:,}"
        elif file.sha256 != record.sha256:
            yield name, f"changed: sha256 {file.sha256} instead of {record.sha256}"


def _check_names(branches: Sequence[BranchContent]) -> None:
    problems = []
    seen: set[str] = set()
    for content in branches:
        where = repr(content.branch)
        if problem := branch_problem(content.branch):
            problems.append(f"{where}: {problem}")
        if content.branch in seen:
            problems.append(f"{where}: given twice")
        if not content.files:
            problems.append(f"{where}: has no files")
        seen.add(content.branch)
        named = ((name, file_name_problem(name)) for name in content.files)
        problems.extend(f"{where}: {name!r}: {problem}" for name, problem in named if problem)
    if problems:
        raise PublishError("these branches cannot be published", why="\n    ".join(problems))
