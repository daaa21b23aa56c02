"""A saved publish plan: a file that one job writes, people approve, and another job publishes exactly.

The plan names what is published (recipe, templates, repository, tag), the head of each branch that it was compared
with, and the size and sha256 of every file. The statements of a signed release are named by the sha256 of their
content: the public key is enough to compute it, so a plan needs no secret. The plan holds no path of a machine. A file
that is read may come from anybody: it decides nothing, everything in it is compared with the build and the repository.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from packager.errors import PublishError
from packager.model.strict_json import parse_json_object
from packager.publish.plan import BranchPlan, PublishAction, PublishPlan
from packager.publish.sign_release import Files
from packager.publish.statements import digest, read_envelope, read_release_statement
from packager.publish.targets import LocalFile, file_name_problem
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION, STATEMENTS
from packager.system.files import open_regular, write_atomic
from packager.system.text import printable
from packager.variant import MAIN, branch_problem

_KIND = "gptq-packager publish plan"
_VERSION = 1
_MAX_PLAN_BYTES = 64_000_000  # 10,000 files on 30 branches

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
_Line = Annotated[str, Field(max_length=100_000)]
_Whole = Annotated[int, Field(ge=0, lt=1 << 53)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PublishSubject(_Strict):
    """What is published, and where.

    Attributes:
        repository: the repository's id.
        target: the kind of target.
        address: the target's address; "" for a local repository, whose folder is another one on each machine.
        recipe: the digest of the recipe.
        templates: the digest of the card's templates.
        tag: the name that main's commit gets at the end, "" for none.
    """

    repository: _Line
    target: Literal["hub", "local", "git", "plugin"]
    address: _Line
    recipe: _Sha256
    templates: _Sha256
    tag: _Line


class PlannedFile(_Strict):
    """The content of a file."""

    size_bytes: _Whole
    sha256: _Sha256


class PlannedBranch(_Strict):
    """What happens to a branch.

    Attributes:
        branch: the branch's name.
        action: "create" or "update" make a commit, "unchanged" makes none.
        parent: the head that the build was compared with, None if the branch did not exist.
        message: the message of the commit, "" if none is made.
        files: every file of the branch afterwards, without the signed statements.
        statement: the sha256 of the content of the branch's signed statement, None if the release is not signed.
    """

    branch: str
    action: PublishAction
    parent: _Commit | None
    message: _Line
    files: dict[str, PlannedFile] = Field(min_length=1)
    statement: _Sha256 | None

    @model_validator(mode="after")
    def _names(self) -> "PlannedBranch":
        if problem := branch_problem(self.branch):
            raise ValueError(f"{printable(self.branch)!r}: {problem}")
        for name in self.files:
            problem = "a signed statement is no file of a build" if name in STATEMENTS else file_name_problem(name)
            if problem:
                raise ValueError(f"{self.branch}: {printable(name)!r}: {problem}")
        if (self.action == "create") != (self.parent is None):
            raise ValueError(f"{self.branch}: a branch is created exactly if it has no head")
        return self


class PlannedRelease(_Strict):
    """The signed release: the id of the key, its number, and the sha256 of the content of its statement."""

    keyid: _Sha256
    number: _Whole
    statement: _Sha256


class SavedPlan(_Strict):
    """A publish plan with every digest.

    Attributes:
        subject: what is published, and where.
        release: the signed release, None if nothing is signed.
        branches: in the order of publishing, `main` last.
        left_alone: branches of the repository that the publish does not change.
        final_steps: one line per change after the last branch.
    """

    subject: PublishSubject
    release: PlannedRelease | None
    branches: tuple[PlannedBranch, ...] = Field(strict=False, min_length=1)
    left_alone: tuple[_Line, ...] = Field(strict=False)
    final_steps: tuple[_Line, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _consistent(self) -> "SavedPlan":
        names = [planned.branch for planned in self.branches]
        if len({*names, *self.left_alone}) != len(names) + len(self.left_alone):
            raise ValueError("a branch is there twice")
        if MAIN in names[:-1]:
            raise ValueError(f"{MAIN} is not the last branch")
        if {planned.statement is None for planned in self.branches} != {self.release is None}:
            raise ValueError("a signed release signs every branch")
        return self


def saved_plan(subject: PublishSubject, plan: PublishPlan, files: Files) -> SavedPlan:
    """Return a plan with the digests of the files and the messages of the commits, to be saved or compared."""
    main = files.get(MAIN, {})
    return SavedPlan(
        subject=subject,
        release=_planned_release(main[RELEASE_ATTESTATION]) if RELEASE_ATTESTATION in main else None,
        branches=tuple(_planned_branch(entry, files[entry.branch]) for entry in plan.branches),
        left_alone=plan.left_alone,
        final_steps=plan.final_steps,
    )


def write_plan(plan: SavedPlan, path: Path) -> None:
    """Write a plan as JSON, whole or not at all.

    Raises:
        MachineError: the disk is full or the folder cannot be written.
    """
    value = {"kind": _KIND, "version": _VERSION, **plan.model_dump(mode="json")}
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n")


def read_plan(path: Path) -> SavedPlan:
    """Read a plan that anybody may have written.

    Raises:
        PublishError: it is no plan of this version, or something in it is not as `write_plan` writes it.
    """
    try:
        with open_regular(path) as stream:
            data = stream.read(_MAX_PLAN_BYTES + 1)
        if len(data) > _MAX_PLAN_BYTES:
            raise ValueError(f"it has more than {_MAX_PLAN_BYTES:,} bytes")
        value = parse_json_object(data)
        kind, version = value.pop("kind", None), value.pop("version", None)
        if kind != _KIND:
            raise ValueError("it is no publish plan")
        if type(version) is not int or version != _VERSION:
            raise ValueError(f"it has another version than {_VERSION}, which this packager reads")
        return SavedPlan.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise _unreadable(path, printable(f"{place}: {problem['msg']}")) from None
    except ValueError as error:
        raise _unreadable(path, printable(str(error))) from error
    except OSError as error:
        raise _unreadable(path, error.strerror or "") from error


def _unreadable(path: Path, why: str) -> PublishError:
    return PublishError(
        "the plan cannot be read",
        where=str(path),
        why=why,
        hint="write one with: packager publish RECIPE --dry-run --save-plan FILE",
    )


def _planned_branch(entry: BranchPlan, files: Mapping[str, LocalFile]) -> PlannedBranch:
    planned = {
        name: PlannedFile(size_bytes=file.size_bytes, sha256=file.sha256)
        for name, file in sorted(files.items())
        if name not in STATEMENTS
    }
    statement = digest(_envelope_of(files[ATTESTATION])[0]) if ATTESTATION in files else None
    return PlannedBranch(
        branch=entry.branch,
        action=entry.action,
        parent=entry.parent,
        message=entry.message,
        files=planned,
        statement=statement,
    )


def _planned_release(file: LocalFile) -> PlannedRelease:
    payload, keyid = _envelope_of(file)
    number = read_release_statement(payload).release
    return PlannedRelease(keyid=keyid, number=number, statement=digest(payload))


def _envelope_of(file: LocalFile) -> tuple[bytes, str]:
    """Return the statement of an envelope that this process made, and the id of its key."""
    payload, signatures = read_envelope(file.path.read_bytes())
    return payload, signatures[0][0]
