"""Signed releases: statements, keys, publishing with a key, and the offline check with a reader's keys."""

import base64
import hashlib
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import PublishError
from packager.publish.branches import PublishReport, publish_branches
from packager.publish.published import PublishedReport, verify_published
from packager.publish.published.signatures import Trust
from packager.publish.rollback import RollbackRequest, rollback
from packager.publish.sign_release import ReleaseSigner, SigningKeys
from packager.publish.signing_keys import Signer, TrustedKeys, read_signing_key, read_trusted_keys
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    BranchStatement,
    ReleaseStatement,
    StatementError,
    branch_statement,
    canonical,
    envelope,
    pre_authentication_encoding,
    read_branch_statement,
    read_envelope,
    read_release_statement,
    release_statement,
)
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION
from tests.checkpoints import edit_json
from tests.publish_fixtures import Prepared, describe, git, heads
from tests.samples import sampled
from tests.test_published import MAIN, REPOSITORY, VARIANT, PublishedFixture, flip, reseal

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
SIGNER, OTHER_SIGNER = Signer(KEY), Signer(OTHER)
TRUST = Trust(keys=SIGNER.public)
PEM = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
STATEMENT = branch_statement(
    BranchStatement(repository=REPOSITORY, branch=MAIN, files={"a": "0" * 64, "b": "1" * 64}), None
)
ENVELOPE = SIGNER.sign(STATEMENT)


class SignedFixture(PublishedFixture):
    """Two branches, published with a key."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.scratch = tmp_path / "scratch"

    @property
    def repository(self) -> Path:
        return self.root / "models" / REPOSITORY

    def publish_signed(self, keys: SigningKeys | None = None) -> PublishReport:
        contents = [describe(self.folders[branch], branch) for branch in self.folders]
        signer = ReleaseSigner(REPOSITORY, keys or SigningKeys(signer=SIGNER), self.scratch)
        return publish_branches(contents, self.target, self.lines.append, signer=signer)

    def second_release(self) -> None:
        with (self.folders[VARIANT] / "README.md").open("a") as readme:
            readme.write("\nA later release.\n")
        reseal(self.folders[VARIANT], VARIANT)
        self.publish_signed()

    def checked(self, trust: Trust = TRUST, *, full: bool = False) -> PublishedReport:
        return verify_published(self.target, self.lines.append, trust=trust, full=full)

    def rules(self, trust: Trust = TRUST) -> set[str]:
        return {finding.rule for finding in self.checked(trust).findings if finding.severity == "error"}

    def read(self, branch: str, name: str) -> bytes:
        command = ["git", "show", f"{branch}:{name}"]
        return subprocess.run(command, cwd=self.repository, capture_output=True, check=True).stdout

    def replace(self, branch: str, files: dict[str, bytes]) -> None:
        """Commit files to a branch, as another writer of the repository would."""
        git("checkout", "--quiet", branch, cwd=self.repository)
        for name, data in files.items():
            (self.repository / name).write_bytes(data)
        git("add", "--all", cwd=self.repository)
        git("commit", "--quiet", "-m", "an attack", cwd=self.repository)
        git("checkout", "--quiet", MAIN, cwd=self.repository)


@pytest.fixture
def signed(tmp_path: Path, prepared: Prepared) -> SignedFixture:
    prepared.copy("signed", lambda folder: SignedFixture(folder).publish_signed(), tmp_path)
    return SignedFixture(tmp_path)


# publishing


def test_a_signed_release_names_its_key_and_its_number(signed: SignedFixture) -> None:
    for full in (False, True):
        report = signed.checked(full=full)
        assert report.findings == ()
        assert report.release
        assert (report.release.number, report.release.keyid) == (1, SIGNER.keyid)
        assert [each.signed.keyid for each in report.branches if each.signed] == [SIGNER.keyid] * 2


def test_an_independent_reader_of_the_standards_accepts_the_files(signed: SignedFixture) -> None:
    """in-toto Statement v1 in DSSE, read without any code of this program but the test's own."""
    for branch, name in ((MAIN, ATTESTATION), (VARIANT, ATTESTATION), (MAIN, RELEASE_ATTESTATION)):
        body = json.loads(signed.read(branch, name))
        payload = base64.b64decode(body["payload"])
        kind = "application/vnd.in-toto+json"
        assert body["payloadType"] == kind
        signed_bytes = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
        KEY.public_key().verify(base64.b64decode(body["signatures"][0]["sig"]), signed_bytes)
        statement = json.loads(payload)
        assert statement["_type"] == "https://in-toto.io/Statement/v1"
        if name == RELEASE_ATTESTATION:
            continue
        assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
        for subject in statement["subject"]:
            assert hashlib.sha256(signed.read(branch, subject["name"])).hexdigest() == subject["digest"]["sha256"]
        listed = {subject["name"] for subject in statement["subject"]}
        present = set(git("ls-tree", "-r", "--name-only", branch, cwd=signed.repository).split())
        assert present - listed <= {ATTESTATION, RELEASE_ATTESTATION, ".gitattributes"}


def test_the_same_files_again_make_no_commit(signed: SignedFixture) -> None:
    before = heads(signed.repository)
    report = signed.publish_signed()
    assert report.plan.changing == ()
    assert heads(signed.repository) == before


def test_a_changed_branch_raises_the_number_and_names_the_release_before(signed: SignedFixture) -> None:
    first, _ = read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))
    signed.second_release()
    second = read_release_statement(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0])
    assert (second.release, second.previous) == (2, hashlib.sha256(first).hexdigest())
    assert signed.checked().findings == ()


def test_a_signed_repository_is_not_published_to_without_the_key(signed: SignedFixture) -> None:
    before = heads(signed.repository)
    with pytest.raises(PublishError, match="no key to sign with"):
        signed.publish_signed(SigningKeys())
    with pytest.raises(PublishError, match="none of the trusted keys signed it"):
        signed.publish_signed(SigningKeys(signer=OTHER_SIGNER))
    assert heads(signed.repository) == before
    signed.publish_signed(SigningKeys(unsigned=True))
    assert signed.rules() == {"signature-missing"}


def test_a_new_key_follows_the_old_one(signed: SignedFixture) -> None:
    signed.publish_signed(SigningKeys(signer=OTHER_SIGNER, trusted=SIGNER.public))
    assert signed.rules() == {"signature-invalid"}
    report = signed.checked(Trust(keys=OTHER_SIGNER.public))
    assert report.findings == ()
    assert report.release
    assert report.release.number == 2


def test_a_rollback_of_a_signed_repository_must_be_asked_for(signed: SignedFixture) -> None:
    signed.second_release()
    with pytest.raises(PublishError, match="no key to sign the rollback with"):
        rollback(signed.target, RollbackRequest(branches=(MAIN, VARIANT)), print)
    rollback(signed.target, RollbackRequest(branches=(MAIN, VARIANT)), print, unsigned=True)
    assert signed.rules() == set()
    assert signed.rules(Trust(keys=SIGNER.public, min_release=2)) == {"release-old"}


@pytest.mark.slow
def test_the_release_after_a_rollback_has_a_new_number(signed: SignedFixture) -> None:
    signed.second_release()
    second, _ = read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))
    rollback(signed.target, RollbackRequest(branches=(MAIN, VARIANT)), print, unsigned=True)
    signed.second_release()
    third = read_release_statement(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0])
    assert (third.release, third.previous) == (3, hashlib.sha256(second).hexdigest())
    assert signed.rules(Trust(keys=SIGNER.public, min_release=3)) == set()


# unsigned commits beside signed ones


def messages(report: PublishedReport, rule: str) -> list[str]:
    return [f"{each.branch}: {each.message}; {each.hint}" for each in report.findings if each.rule == rule]


def drop(signed: SignedFixture, branch: str, *names: str) -> str:
    """Remove files from a branch by a commit of somebody else, and return the commit."""
    git("checkout", "--quiet", branch, cwd=signed.repository)
    git("rm", "--quiet", *names, cwd=signed.repository)
    git("commit", "--quiet", "-m", "without a key", cwd=signed.repository)
    git("checkout", "--quiet", MAIN, cwd=signed.repository)
    return heads(signed.repository)[branch]


def test_a_branch_with_an_unsigned_head_is_named_with_and_without_a_key(signed: SignedFixture) -> None:
    head = drop(signed, VARIANT, ATTESTATION)
    for report in (signed.checked(), signed.verify()):
        (text,) = messages(report, "signature-missing")
        for words in (VARIANT, head[:12], "is not signed", "packager rollback --branch"):
            assert words in text
        assert not report.passed
    assert "A Person" in messages(signed.verify(), "signature-missing")[0]
    assert signed.verify(MAIN).passed, "--branch leaves the other branches out"


def test_an_unsigned_head_is_replaced_by_the_next_signed_publish_which_says_so(signed: SignedFixture) -> None:
    head = drop(signed, VARIANT, ATTESTATION)
    report = signed.publish_signed()
    (line,) = report.plan.warnings
    for words in (VARIANT, head[:12], "A Person", "is not signed"):
        assert words in line
    assert signed.checked().findings == ()
    assert signed.publish_signed().plan.warnings == ()


def test_an_unsigned_branch_that_the_publish_leaves_alone_is_named(signed: SignedFixture) -> None:
    git("branch", "older", VARIANT, cwd=signed.repository)
    git("branch", "swapped", MAIN, cwd=signed.repository)
    head = drop(signed, "older", ATTESTATION)
    lines = signed.publish_signed().plan.warnings
    assert len(lines) == 2
    for words in ("older", head[:12], "A Person", "is not signed", "readers with the key report it", "delete it"):
        assert words in lines[0]
    assert "swapped stays" in lines[1]
    assert "is not in release 1" in lines[1]


def test_an_unsigned_release_between_two_signed_ones_is_named_and_no_number_is_used_twice(
    signed: SignedFixture,
) -> None:
    first, _ = read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))
    report = signed.publish_signed(SigningKeys(unsigned=True))
    assert any("is not signed" in line and VARIANT in line for line in report.plan.warnings)
    between = heads(signed.repository)[MAIN]
    (text,) = messages(signed.checked(), "release-unsigned")
    assert f"{between[:12]} " in text
    assert signed.rules() == {"signature-missing"}
    assert signed.verify().history is None, "without a key and a signed head, nobody asks for the history"

    line, of_variant = signed.publish_signed().plan.warnings
    assert between[:12] in line
    assert "release 1" in line
    assert of_variant.startswith(f"{VARIANT}: its head ")
    second = read_release_statement(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0])
    assert (second.release, second.previous) == (2, hashlib.sha256(first).hexdigest())
    report2 = signed.checked(Trust(keys=SIGNER.public, min_release=2))
    assert report2.passed
    (without_key,) = messages(signed.verify(), "release-unsigned")
    assert f"{between[:12]} " in without_key
    (text,) = messages(report2, "release-unsigned")
    for words in (f"main: commit {between[:12]} ", "release 1", "no trusted key signed it"):
        assert words in text


def test_a_release_statement_that_others_remove_is_missed_by_everyone(signed: SignedFixture) -> None:
    head = drop(signed, MAIN, RELEASE_ATTESTATION)
    (text,) = messages(signed.verify(), "signature-missing")
    assert head[:12] in text
    assert signed.rules() == {"signature-missing"}
    with pytest.raises(PublishError, match="no key to sign with") as caught:
        signed.publish_signed(SigningKeys())
    assert head[:12] in caught.value.why
    for branch in (MAIN, VARIANT):
        head = drop(signed, branch, ATTESTATION)
    with pytest.raises(PublishError, match="no key to sign with") as caught:
        signed.publish_signed(SigningKeys())
    assert "by A Person <person@example.org> removed the release statement" in caught.value.why
    assert signed.publish_signed().plan.warnings
    assert signed.checked(Trust(keys=SIGNER.public, min_release=2)).passed


def test_a_release_set_back_is_seen_in_the_history_and_its_number_is_not_used_again(signed: SignedFixture) -> None:
    release = signed.read(MAIN, RELEASE_ATTESTATION)
    signed.second_release()
    signed.replace(MAIN, {RELEASE_ATTESTATION: release})
    (text,) = messages(signed.checked(), "release-set-back")
    assert "this is release 1, and main had release 2" in text
    signed.second_release()
    assert read_release_statement(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0]).release == 3
    assert messages(signed.checked(), "release-set-back") == []


def test_a_statement_of_another_key_in_the_history_stops_nothing_once_it_is_replaced(signed: SignedFixture) -> None:
    forged = OTHER_SIGNER.sign(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0])
    signed.replace(MAIN, {RELEASE_ATTESTATION: forged})
    with pytest.raises(PublishError, match="none of the trusted keys signed it"):
        signed.publish_signed()
    drop(signed, MAIN, RELEASE_ATTESTATION)
    signed.publish_signed()
    assert read_release_statement(read_envelope(signed.read(MAIN, RELEASE_ATTESTATION))[0]).release == 2
    assert len(messages(signed.checked(), "release-unsigned")) == 2


def test_a_long_history_is_searched_in_part_and_that_is_said(
    signed: SignedFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for words in ("one", "two"):
        signed.replace(MAIN, {"README.md": words.encode()})
    history = signed.verify().history
    assert history
    assert (history.searched, history.commits) == (3, 3)
    monkeypatch.setattr("packager.publish.published.earlier_releases._SEARCHED", 1)
    run = CliRunner().invoke(app, ["verify-published", str(signed.repository)])
    assert "the newest 1 of 3 commits of main were searched" in " ".join(run.output.split())
    monkeypatch.setattr("packager.publish.published.earlier_releases._SEARCHED", 50)
    monkeypatch.setattr("packager.publish.published.earlier_releases._READ_BYTES", -1)
    history = signed.verify().history
    assert history
    assert history.searched == 0, "the statements are too large"
    monkeypatch.setattr("packager.publish.published.earlier_releases._READ_BYTES", 10_000)
    monkeypatch.setattr("packager.publish.published.earlier_releases._SEARCH_S", -1.0)
    history = signed.verify().history
    assert history
    assert history.searched == 0


def test_an_endless_history_is_read_in_part_and_that_is_said(
    signed: SignedFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(signed, MAIN, RELEASE_ATTESTATION)
    monkeypatch.setattr("packager.publish.release_history._SEARCHED", 1)
    (line,) = signed.publish_signed().plan.warnings
    assert "its 1 oldest commits were not searched" in line
    monkeypatch.setattr("packager.publish.release_history._SEARCHED", 500)
    assert not any("not searched" in line for line in signed.publish_signed().plan.warnings)


def test_a_recipe_that_stops_signing_names_the_signed_heads(signed: SignedFixture) -> None:
    with pytest.raises(PublishError) as caught:
        signed.publish_signed(SigningKeys())
    for branch, head in heads(signed.repository).items():
        assert f"{branch} {head[:12]}" in caught.value.why
    assert "--sign-key" in caught.value.hint
    assert "--unsigned" in caught.value.hint


# attacks on a published repository


def test_one_changed_byte_of_the_weights_is_found(signed: SignedFixture) -> None:
    weights = next(path.name for path in signed.main.iterdir() if path.suffix == ".safetensors")
    data = bytearray(signed.read(MAIN, weights))
    data[-1] ^= 1
    signed.replace(MAIN, {weights: bytes(data)})
    assert "remote-file-changed" in signed.rules()


@pytest.mark.slow
def test_a_changed_byte_with_a_record_that_fits_it_is_found(signed: SignedFixture) -> None:
    """Without signatures, only the author of the head shows this."""
    folder = signed.folders[VARIANT]
    flip(next(path for path in folder.iterdir() if path.suffix == ".safetensors"))
    reseal(folder, VARIANT)
    signed.replace(VARIANT, {path.name: path.read_bytes() for path in folder.iterdir()})
    assert {finding.rule for finding in signed.verify().findings if finding.severity == "error"} == set()
    assert signed.rules() == {"statement-differs"}
    (message,) = [each.message for each in signed.checked().findings if each.rule == "statement-differs"]
    assert "provenance.json" in message


def test_a_branch_swapped_with_another_is_found(signed: SignedFixture) -> None:
    main, variant = (heads(signed.repository)[branch] for branch in (MAIN, VARIANT))
    git("update-ref", f"refs/heads/{VARIANT}", main, cwd=signed.repository)
    assert variant != main
    assert "statement-differs" in signed.rules()
    assert any("of the branch" in each.message for each in signed.checked().findings)


def test_a_branch_set_back_by_a_release_is_found(signed: SignedFixture) -> None:
    old = heads(signed.repository)[VARIANT]
    signed.second_release()
    assert signed.rules() == set()
    git("update-ref", f"refs/heads/{VARIANT}", old, cwd=signed.repository)
    assert signed.rules() == {"release-differs"}
    assert any(VARIANT in each.message and "release 2" in each.message for each in signed.checked().findings)


def test_a_whole_repository_set_back_is_found_by_its_number(signed: SignedFixture) -> None:
    old = heads(signed.repository)
    signed.second_release()
    for branch, commit in old.items():
        git("update-ref", f"refs/heads/{branch}", commit, cwd=signed.repository)
    assert signed.rules() == set(), "a consistent earlier release: only its number shows it"
    assert signed.rules(Trust(keys=SIGNER.public, min_release=2)) == {"release-old"}


def test_an_older_envelope_replayed_is_found(signed: SignedFixture) -> None:
    branch, release = signed.read(VARIANT, ATTESTATION), signed.read(MAIN, RELEASE_ATTESTATION)
    signed.second_release()
    signed.replace(VARIANT, {ATTESTATION: branch})
    assert signed.rules() == {"statement-differs"}
    signed.second_release()
    signed.replace(MAIN, {RELEASE_ATTESTATION: release})
    assert signed.rules() == {"release-differs"}


def test_a_branch_deleted_or_added_is_found(signed: SignedFixture) -> None:
    git("branch", "another", VARIANT, cwd=signed.repository)
    assert {"release-differs", "statement-differs"} <= signed.rules()
    git("branch", "-D", "another", VARIANT, cwd=signed.repository)
    assert "release-differs" in signed.rules()


@pytest.mark.slow
def test_a_statement_of_another_repository_is_found(signed: SignedFixture) -> None:
    for folder in signed.folders.values():
        edit_json(folder, "provenance.json", lambda record: record.update(repository="another/tiny-GPTQ"))
    contents = [describe(folder, branch) for branch, folder in signed.folders.items()]
    target = signed.target
    publish_branches(
        contents,
        target,
        print,
        signer=ReleaseSigner(REPOSITORY, SigningKeys(signer=SIGNER), signed.scratch),
    )
    assert "statement-differs" in signed.rules()


def hostile(data: bytes) -> dict[str, bytes]:
    """Return damaged envelopes by what is wrong with them."""
    body = json.loads(data)
    payload = base64.b64decode(body["payload"])
    foreign = {"keyid": SIGNER.keyid, "sig": base64.b64encode(OTHER.sign(b"x")).decode()}
    return {
        "payload type": canonical({**body, "payloadType": "text/plain"}) + b"\n",
        "twice": data.replace(b'{"payload":', b'{"payload":"","payload":', 1),
        "no signature": canonical({**body, "signatures": []}) + b"\n",
        "forged": canonical({**body, "signatures": [foreign]}) + b"\n",
        "too many": canonical({**body, "signatures": body["signatures"] * 1000}) + b"\n",
        "huge": data + b" " * MAX_ENVELOPE_BYTES,
        "deep": b"[" * 100_000,
        "not text": b"\xff\xfe",
        "empty": b"{}",
        "surrogate": b'{"payload":"\\ud800","payloadType":"application/vnd.in-toto+json","signatures":[]}',
        "spaces": json.dumps(body).encode(),
        "unsigned key": OTHER_SIGNER.sign(payload),
        "not a statement": SIGNER.sign(b"[]"),
        "another predicate": SIGNER.sign(payload.replace(b"slsa.dev", b"slsa.example")),
    }


@pytest.mark.parametrize("name", sampled(hostile(ENVELOPE), "forged", "unsigned key"))
def test_a_hostile_statement_is_one_finding(signed: SignedFixture, name: str) -> None:
    signed.replace(VARIANT, {ATTESTATION: hostile(signed.read(VARIANT, ATTESTATION))[name]})
    assert signed.rules() == {"signature-invalid"}


@pytest.mark.slow
def test_a_second_signature_by_an_unknown_key_does_no_harm(signed: SignedFixture) -> None:
    payload, (own,) = read_envelope(signed.read(VARIANT, ATTESTATION))
    foreign = (OTHER_SIGNER.keyid, OTHER.sign(pre_authentication_encoding(payload)))
    signed.replace(VARIANT, {ATTESTATION: envelope(payload, [foreign, own])})
    assert signed.rules() == set()
    assert signed.rules(Trust(keys=OTHER_SIGNER.public)) == {"signature-invalid"}


# statements


@given(position=st.integers(0, len(ENVELOPE) - 1), value=st.integers(1, 255))
@settings(max_examples=300)
def test_any_changed_byte_of_an_envelope_is_refused(position: int, value: int) -> None:
    data = bytearray(ENVELOPE)
    data[position] ^= value
    with pytest.raises(StatementError):
        SIGNER.public.opened(bytes(data))


def test_every_cut_of_an_envelope_is_refused() -> None:
    for length in range(len(ENVELOPE)):
        with pytest.raises(StatementError):
            SIGNER.public.opened(ENVELOPE[:length])


DIGESTS = st.text("0123456789abcdef", min_size=64, max_size=64)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
FILES = st.dictionaries(NAMES, DIGESTS, min_size=1, max_size=8)


@given(repository=NAMES, branch=NAMES, files=FILES)
def test_a_branch_statement_is_read_as_it_was_written(repository: str, branch: str, files: dict[str, str]) -> None:
    content = BranchStatement(repository=repository, branch=branch, files=files)
    payload = branch_statement(content, None)
    assert read_branch_statement(payload) == content
    assert canonical(json.loads(payload)) == payload
    assert SIGNER.public.opened(SIGNER.sign(payload)) == (payload, SIGNER.keyid)


@given(repository=NAMES, number=st.integers(1, 2**53 - 1), previous=st.one_of(st.just(""), DIGESTS), branches=FILES)
def test_a_release_statement_is_read_as_it_was_written(
    repository: str, number: int, previous: str, branches: dict[str, str]
) -> None:
    content = ReleaseStatement(repository=repository, release=number, previous=previous, branches=branches)
    assert read_release_statement(release_statement(content)) == content
    with pytest.raises(StatementError, match="predicate type"):
        read_branch_statement(release_statement(content))


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_with_one_error(data: bytes) -> None:
    for read in (read_envelope, read_branch_statement, read_release_statement):
        with pytest.raises(StatementError):
            read(data)


# keys


def write_key(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def no_passphrase() -> bytes:
    raise AssertionError("no passphrase is needed")


def test_keys_are_read_from_files(tmp_path: Path) -> None:
    signer = read_signing_key(write_key(tmp_path / "key", PEM), no_passphrase)
    assert signer.sign(STATEMENT) == ENVELOPE
    assert read_trusted_keys([write_key(tmp_path / "pub", PUBLIC_PEM, 0o644)]).opened(ENVELOPE)[0] == STATEMENT
    assert TrustedKeys() == read_trusted_keys([])


def test_an_encrypted_key_needs_its_passphrase(tmp_path: Path) -> None:
    data = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"a secret"))
    path = write_key(tmp_path / "key", data)
    assert read_signing_key(path, lambda: b"a secret").keyid == SIGNER.keyid
    for wrong in (b"", b"wrong"):
        with pytest.raises(PublishError, match="the passphrase is wrong") as caught:
            read_signing_key(path, lambda wrong=wrong: wrong)  # type: ignore[misc]
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: write_key(path, PEM, 0o640), "other users may read it"),
        (lambda path: write_key(path, b"x" * 100_000), "small ordinary file"),
        (lambda path: path.mkdir(), "small ordinary file"),
        (lambda path: __import__("os").mkfifo(path, 0o600), "small ordinary file"),
        (lambda path: write_key(path, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "PEM form"),
        (lambda path: write_key(path, PUBLIC_PEM), "PEM form"),
        (Path.exists, "No such file"),
    ],
)
def test_a_file_that_is_no_safe_key_is_refused(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "key")
    with pytest.raises(PublishError) as caught:
        read_signing_key(tmp_path / "key", no_passphrase)
    assert words in str(caught.value)


def test_the_private_key_is_in_no_text_and_no_published_file(signed: SignedFixture) -> None:
    secret = KEY.private_bytes_raw()
    assert secret.hex() not in f"{SIGNER!r} {vars(SigningKeys(signer=SIGNER))!r}"
    for branch in (MAIN, VARIANT):
        for name in git("ls-tree", "-r", "--name-only", branch, cwd=signed.repository).split():
            data = signed.read(branch, name)
            assert secret not in data
            assert base64.b64encode(secret) not in data


def test_the_command_checks_offline_and_reports_the_key(signed: SignedFixture, tmp_path: Path) -> None:
    public = write_key(tmp_path / "sign.pub", PUBLIC_PEM)
    run = CliRunner().invoke(app, ["verify-published", str(signed.repository), "--trusted-key", str(public)])
    assert run.exit_code == 0, run.output
    assert f"release 1, signed by {SIGNER.keyid[:16]}" in run.output
    run = CliRunner().invoke(
        app, ["verify-published", str(signed.repository), "--trusted-key", str(public), "--min-release", "2"]
    )
    assert run.exit_code == 7
    assert "release-old" in run.output
    run = CliRunner().invoke(app, ["verify-published", str(signed.repository)])
    assert "signatures: not checked" in run.output
    assert stat.S_IMODE(public.stat().st_mode) == 0o600
