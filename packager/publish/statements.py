"""Signed statements: an in-toto Statement v1 in a DSSE envelope, as canonical JSON. Pure: no files, no keys.

A branch's statement names the branch, its repository and the sha256 of every file; its predicate is SLSA provenance v1.
The release statement names every branch with the sha256 of its statement, the number of the release, and the sha256 of
the release statement before it. Statements hold no time: the same files and the same key give the same bytes.

Sources: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance,
https://github.com/secure-systems-lab/dsse/blob/master/protocol.md.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from packager.receipt import Provenance

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
SLSA_PREDICATE = "https://slsa.dev/provenance/v1"
RELEASE_PREDICATE = "urn:gptq-packager:release:v1"
BUILD_TYPE = "urn:gptq-packager:build:v1"
# 10,000 files, the most that a verified branch may have, need 2 MB.
MAX_ENVELOPE_BYTES = 8_000_000
_MAX_SIGNATURES = 16
_MAX_RELEASE = (1 << 53) - 1  # what every reader of JSON keeps exactly


_Model = TypeVar("_Model", bound=BaseModel)


class StatementError(ValueError):
    """An envelope or a statement in another form than this program writes; the message names the difference."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Signature(_Strict):
    """One signature of an envelope: the key's id (sha256 of its DER form), and the signature in base64."""

    keyid: str
    sig: str


class Envelope(_Strict):
    """A DSSE envelope."""

    payload: str
    payload_type: str = Field(alias="payloadType")
    signatures: tuple[Signature, ...] = Field(strict=False, min_length=1, max_length=_MAX_SIGNATURES)


class _Digest(_Strict):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _Subject(_Strict):
    name: str
    digest: _Digest


class _Release(_Strict):
    repository: str
    release: int = Field(ge=1, le=_MAX_RELEASE)
    previous: str = Field(pattern=r"^([0-9a-f]{64})?$")


class _Place(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    repository: str
    branch: str


class _BuildDefinition(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    external: _Place = Field(alias="externalParameters")


class _Slsa(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)
    definition: _BuildDefinition = Field(alias="buildDefinition")


class _Statement(_Strict):
    type: Literal["https://in-toto.io/Statement/v1"] = Field(alias="_type")
    predicate_type: str = Field(alias="predicateType")
    subject: tuple[_Subject, ...] = Field(strict=False, min_length=1)
    predicate: dict[str, Any]

    def digests(self) -> dict[str, str]:
        """Return the sha256 of every subject by name."""
        found = {subject.name: subject.digest.sha256 for subject in self.subject}
        if len(found) != len(self.subject):
            raise StatementError("a name is listed twice")
        return found


class BranchStatement(_Strict):
    """The content of a branch's statement: repository, branch, and the sha256 of every file by name."""

    repository: str
    branch: str
    files: dict[str, str]


class ReleaseStatement(_Strict):
    """The content of a release statement.

    Attributes:
        repository: the repository's id.
        release: its number, from 1 on.
        previous: the sha256 of the release statement before it, "" for the first.
        branches: by branch, the sha256 of its statement.
    """

    repository: str
    release: int
    previous: str
    branches: dict[str, str]


def canonical(value: object) -> bytes:
    """Return `value` as JSON with sorted keys, no spaces and ASCII only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(statement: bytes) -> str:
    """Return the sha256 by which a release names a statement."""
    return hashlib.sha256(statement).hexdigest()


def branch_statement(place: BranchStatement, provenance: Provenance | None) -> bytes:
    """Return the statement over a branch's files, with the build that its record describes, if it has one."""
    external: dict[str, object] = {"repository": place.repository, "branch": place.branch}
    definition: dict[str, object] = {"buildType": BUILD_TYPE, "externalParameters": external}
    builder: dict[str, object] = {"id": "urn:gptq-packager"}
    if provenance:
        base = provenance.base_model
        external |= {"recipe_digest": provenance.recipe_digest, "parameters": provenance.parameters}
        definition["internalParameters"] = {"variant_digest": provenance.variant_digest}
        definition["resolvedDependencies"] = [
            {"name": f"{base.id}@{base.revision or 'local'}/{name}", "digest": {"sha256": record.sha256}}
            for name, record in sorted(base.files.items())
        ]
        builder["version"] = {"packager": provenance.made_with, **provenance.versions}
    predicate = {"buildDefinition": definition, "runDetails": {"builder": builder}}
    return _statement(place.files, SLSA_PREDICATE, predicate)


def release_statement(release: ReleaseStatement) -> bytes:
    """Return the statement over the branches of a release."""
    predicate = release.model_dump(exclude={"branches"})
    return _statement(release.branches, RELEASE_PREDICATE, predicate)


def read_branch_statement(payload: bytes) -> BranchStatement:
    """Parse a branch's statement.

    Raises:
        StatementError: it is not one.
    """
    statement = _parsed(payload, SLSA_PREDICATE)
    place = _validated(_Slsa, statement.predicate).definition.external
    return BranchStatement(repository=place.repository, branch=place.branch, files=statement.digests())


def read_release_statement(payload: bytes) -> ReleaseStatement:
    """Parse a release statement.

    Raises:
        StatementError: it is not one.
    """
    statement = _parsed(payload, RELEASE_PREDICATE)
    release = _validated(_Release, statement.predicate)
    return ReleaseStatement(**release.model_dump(), branches=statement.digests())


def pre_authentication_encoding(payload: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """Return the bytes that a DSSE signature covers."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def envelope(payload: bytes, signatures: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the file that holds a statement and its signatures, given as key id and signature."""
    signed = [{"keyid": keyid, "sig": base64.b64encode(sig).decode()} for keyid, sig in signatures]
    body = {"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD_TYPE, "signatures": signed}
    return canonical(body) + b"\n"


def read_envelope(data: bytes) -> tuple[bytes, Sequence[tuple[str, bytes]]]:
    """Return an envelope's payload, and its signatures as key id and signature; nothing is verified.

    Raises:
        StatementError: it is not an envelope, or differs in any byte from the form that `envelope` writes.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise StatementError(f"more than {MAX_ENVELOPE_BYTES:,} bytes are too many for a signed statement")
    found = _validated(Envelope, _json(data))
    if found.payload_type != PAYLOAD_TYPE:
        raise StatementError(f"its payload type is {found.payload_type[:100]!r}, not {PAYLOAD_TYPE!r}")
    try:
        payload = base64.b64decode(found.payload, validate=True)
        signatures = [(each.keyid, base64.b64decode(each.sig, validate=True)) for each in found.signatures]
    except (binascii.Error, ValueError) as error:
        raise StatementError(f"it holds no base64: {error}") from error
    if envelope(payload, signatures) != data:
        raise StatementError("it is not canonical JSON: its bytes were changed after signing")
    return payload, signatures


def _statement(digests: Mapping[str, str], predicate_type: str, predicate: Mapping[str, object]) -> bytes:
    subject = [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)]
    value = {"_type": STATEMENT_TYPE, "subject": subject, "predicateType": predicate_type, "predicate": predicate}
    return canonical(value)


def _parsed(payload: bytes, predicate_type: str) -> _Statement:
    statement = _validated(_Statement, _json(payload))
    if statement.predicate_type != predicate_type:
        raise StatementError(f"its predicate type is {statement.predicate_type[:100]!r}, not {predicate_type!r}")
    return statement


def _json(data: bytes) -> object:
    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) != len(pairs):
            raise StatementError("a key is there twice")
        return found

    try:
        return json.loads(data.decode(), object_pairs_hook=without_duplicates)
    except StatementError:
        raise
    except (ValueError, RecursionError) as error:
        raise StatementError(f"it is not JSON: {str(error)[:200]}") from error


def _validated(model: type[_Model], value: object) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in problem["loc"])[:200]
        raise StatementError(f"{place}: {problem['msg']}" if place else problem["msg"]) from error
