"""Rollbacks of signed repositories: the restored state is a new signed release."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import PublishError
from packager.publish.published.signatures import Trust
from packager.publish.rollback import RollbackReport, RollbackRequest, RollbackSigner, rollback
from packager.publish.sign_release import SigningKeys
from packager.publish.signing_keys import PlanningSigner, Signer, TrustedKeys
from packager.publish.statements import ReleaseStatement, read_envelope, read_release_statement
from packager.publish.targets.git import GitTarget
from packager.publish.targets.git_process import AUTHOR_EMAIL, AUTHOR_NAME
from packager.publish.targets.local import LocalTarget
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION
from tests.publish_fixtures import IDENTITY, SHORT_WAITS, Prepared, git, heads
from tests.samples import sampled
from tests.test_published import MAIN, REPOSITORY, VARIANT, reseal
from tests.test_rollback import Killable, KilledError
from tests.test_signatures import OTHER_SIGNER, PEM, PUBLIC_PEM, SIGNER, TRUST, SignedFixture, drop, write_key

NOON, HOUR = 1_700_000_000, 3600
BOTH = SIGNER.public.with_keys(OTHER_SIGNER.public)


class SignedRollbackFixture(SignedFixture):
    """Three signed releases, an hour apart: the second changes the variant, the third both branches."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(tmp_path)
        self.now = NOON + 2 * HOUR
        clock = SimpleNamespace(time=lambda: self.now, sleep=time.sleep, monotonic=time.monotonic)
        monkeypatch.setattr("packager.publish.targets.git_process.time", clock)
        self.second_files = tmp_path / "second.json"  # what `files` returned after the second release

    def publish_all(self) -> None:
        self.now = NOON
        self.publish_signed()
        self.release(VARIANT)
        self.second_files.write_text(json.dumps(self.files()))
        self.release(MAIN, VARIANT)

    def release(self, *branches: str) -> None:
        """Publish a signed release with another card on these branches."""
        self.now += HOUR
        for branch in branches:
            reseal_with_words(self, branch)
        self.publish_signed()

    def files(self) -> dict[str, str]:
        """Return the ids of all files but the release statement, by branch and name."""
        found = {}
        for branch in heads(self.repository):
            for line in git("ls-tree", "-r", branch, cwd=self.repository).splitlines():
                facts, name = line.split("\t")
                if name != RELEASE_ATTESTATION:
                    found[f"{branch}/{name}"] = facts
        return found

    def back(
        self,
        *branches: str,
        signer: Signer | PlanningSigner = SIGNER,
        trusted: TrustedKeys = TRUST.keys,
        again: bool = False,
        dry_run: bool = False,
        target: LocalTarget | GitTarget | None = None,
    ) -> RollbackReport:
        self.now += HOUR
        signing = RollbackSigner(signer, SigningKeys(signer=signer, trusted=trusted), self.scratch / "rollback")
        request = RollbackRequest(branches=branches, further_back=again)
        return rollback(target or self.target, request, self.lines.append, signer=signing, dry_run=dry_run)

    def current(self) -> ReleaseStatement:
        return read_release_statement(read_envelope(self.read(MAIN, RELEASE_ATTESTATION))[0])


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Prepared) -> SignedRollbackFixture:
    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            SignedRollbackFixture(folder, patch).publish_all()

    prepared.copy("signed releases", make, tmp_path)
    return SignedRollbackFixture(tmp_path, monkeypatch)


def reseal_with_words(fixture: SignedRollbackFixture, branch: str) -> None:
    """Change the card of a branch in its folder."""
    with (fixture.folders[branch] / "README.md").open("a") as readme:
        readme.write(f"\nWords of {fixture.now}.\n")
    reseal(fixture.folders[branch], branch)


def actions(report: RollbackReport) -> dict[str, str]:
    return {entry.branch: entry.action for entry in report.plan.branches}


def test_the_restored_state_is_a_new_release_that_names_the_replaced_one(fixture: SignedRollbackFixture) -> None:
    replaced, _ = read_envelope(fixture.read(MAIN, RELEASE_ATTESTATION))
    report = fixture.back()
    assert actions(report) == {VARIANT: "restore", MAIN: "restore"}
    assert report.plan.signs == 4
    assert fixture.files() == json.loads(fixture.second_files.read_text())
    statement = fixture.current()
    assert (statement.release, statement.previous) == (4, hashlib.sha256(replaced).hexdigest())
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


@pytest.mark.slow
def test_a_branch_that_is_set_back_after_the_rollback_is_found(fixture: SignedRollbackFixture) -> None:
    before = heads(fixture.repository)
    fixture.back()
    git("update-ref", f"refs/heads/{VARIANT}", before[VARIANT], cwd=fixture.repository)
    assert fixture.rules() == {"release-differs"}


@pytest.mark.slow
def test_a_second_run_changes_nothing_and_again_goes_further_back(fixture: SignedRollbackFixture) -> None:
    fixture.back()
    before = heads(fixture.repository)
    report = fixture.back()
    assert (actions(report), report.plan.signs) == ({VARIANT: "done", MAIN: "done"}, 0)
    assert heads(fixture.repository) == before
    report = fixture.back(again=True)
    # The first release differs from the second in the variant only.
    assert actions(report) == {VARIANT: "restore", MAIN: "sign"}
    assert fixture.current().release == 5
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=5)) == set()
    assert actions(fixture.back()) == {VARIANT: "done", MAIN: "done"}


@pytest.mark.slow
def test_one_branch_back_signs_main_too(fixture: SignedRollbackFixture) -> None:
    report = fixture.back(VARIANT)
    assert actions(report) == {VARIANT: "restore", MAIN: "sign"}
    sign = report.plan.branches[-1]
    assert [change.name for change in (*sign.added, *sign.changed, *sign.removed)] == [RELEASE_ATTESTATION]
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()
    assert actions(fixture.back(VARIANT)) == {VARIANT: "done"}
    # The commit that signs counts as the commit that it signs: main goes back to the one before that.
    assert actions(fixture.back(MAIN)) == {MAIN: "restore"}
    assert fixture.files() == json.loads(fixture.second_files.read_text())
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=5)) == set()


@pytest.mark.parametrize("lives", sampled([0, 1], 1))
def test_killed_and_run_again_it_signs_the_same_release(fixture: SignedRollbackFixture, lives: int) -> None:
    target = Killable(fixture.root, REPOSITORY)
    target.lives = lives
    with pytest.raises(KilledError):
        fixture.back(target=target)
    fixture.back()
    assert fixture.files() == json.loads(fixture.second_files.read_text())
    assert fixture.current().release == 4
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()


@pytest.mark.slow
def test_a_new_key_signs_the_restored_statements_again(fixture: SignedRollbackFixture) -> None:
    fixture.back(signer=OTHER_SIGNER)
    assert fixture.rules(Trust(keys=OTHER_SIGNER.public, min_release=4)) == set()
    before = heads(fixture.repository)
    assert actions(fixture.back(signer=OTHER_SIGNER)) == {VARIANT: "done", MAIN: "done"}
    assert heads(fixture.repository) == before


@pytest.mark.slow
def test_a_publish_that_did_not_reach_main_is_undone_without_a_new_release(fixture: SignedRollbackFixture) -> None:
    present, release = heads(fixture.repository), fixture.current()
    fixture.release(MAIN, VARIANT)
    git("update-ref", "refs/heads/main", present[MAIN], cwd=fixture.repository)
    git("reset", "--quiet", "--hard", cwd=fixture.repository)
    report = fixture.back()
    assert (actions(report), report.plan.signs) == ({VARIANT: "restore", MAIN: "done"}, 0)
    assert fixture.current() == release
    assert fixture.rules() == set()


@pytest.mark.slow
def test_the_next_publish_and_the_next_rollback_have_the_next_numbers(fixture: SignedRollbackFixture) -> None:
    fixture.back()
    fixture.release(MAIN)
    assert fixture.current().release == 5
    fixture.back()
    assert fixture.current().release == 6
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=6)) == set()


def test_an_unsigned_rollback_is_signed_afterwards(fixture: SignedRollbackFixture) -> None:
    fixture.now += 3600
    rollback(fixture.target, RollbackRequest(), print, unsigned=True)
    assert fixture.current().release == 2
    assert actions(fixture.back()) == {VARIANT: "done", MAIN: "sign"}
    assert fixture.current().release == 4
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()


def test_without_a_key_both_ways_out_are_named(fixture: SignedRollbackFixture) -> None:
    before = heads(fixture.repository)
    with pytest.raises(PublishError, match="no key to sign the rollback with") as caught:
        rollback(fixture.target, RollbackRequest(), print)
    assert "--sign-key" in caught.value.hint
    assert "--unsigned" in caught.value.hint
    assert heads(fixture.repository) == before


@pytest.mark.slow
def test_files_that_no_trusted_key_signed_are_not_signed(fixture: SignedRollbackFixture) -> None:
    def refused(words: str, **options: object) -> None:
        before = heads(fixture.repository)
        with pytest.raises(PublishError) as caught:
            fixture.back(VARIANT, **options)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert heads(fixture.repository) == before

    refused("none of the trusted keys signed it", signer=OTHER_SIGNER, trusted=OTHER_SIGNER.public)
    good = fixture.read(VARIANT, ATTESTATION)
    for files, words in (
        ({"README.md": b"forged"}, "other files were signed"),
        ({"README.md": b"x", ATTESTATION: fixture.read(MAIN, ATTESTATION)}, "branch main"),
        ({"README.md": b"y", ATTESTATION: b"{}"}, "can be signed again"),
    ):
        # Somebody commits, and the next publish is on top: the commit before the head is the foreign one.
        fixture.replace(VARIANT, files)
        fixture.release(VARIANT)
        refused(words)
    assert good != fixture.read(VARIANT, ATTESTATION)


def test_a_rollback_from_an_unsigned_release_is_signed_with_the_next_number(fixture: SignedRollbackFixture) -> None:
    before = fixture.files()
    fixture.now += 3600
    fixture.publish_signed(SigningKeys(unsigned=True))
    report = fixture.back()
    assert (actions(report), report.plan.signs) == ({VARIANT: "restore", MAIN: "restore"}, 4)
    assert fixture.files() == before
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()
    assert actions(fixture.back()) == {VARIANT: "done", MAIN: "done"}


def test_a_repository_that_was_never_signed_has_nothing_to_sign_a_rollback_from(fixture: SignedRollbackFixture) -> None:
    with pytest.raises(PublishError, match="none of the trusted keys signed it"):
        fixture.back(signer=OTHER_SIGNER, trusted=OTHER_SIGNER.public)
    shutil.rmtree(fixture.root)
    fixture.publish_signed(SigningKeys())
    fixture.now += 3600
    reseal_with_words(fixture, VARIANT)
    fixture.publish_signed(SigningKeys())
    with pytest.raises(PublishError, match="no commit has a signed release"):
        fixture.back()


def test_main_cannot_stay_unsigned_beside_a_signed_rollback(fixture: SignedRollbackFixture) -> None:
    fixture.now += 3600
    reseal_with_words(fixture, VARIANT)
    fixture.publish_signed(SigningKeys(unsigned=True))
    head = heads(fixture.repository)[MAIN]
    with pytest.raises(PublishError, match=f"the head of {MAIN} is not signed") as caught:
        fixture.back(VARIANT)
    assert head[:12] in caught.value.why
    assert f"--branch {MAIN}" in caught.value.hint


def test_an_unsigned_branch_that_a_rollback_leaves_is_named(fixture: SignedRollbackFixture) -> None:
    fixture.now += 3600
    git("rm", "--quiet", ATTESTATION, cwd=fixture.repository)
    git("commit", "--quiet", "-m", "unsigned", cwd=fixture.repository)
    head = heads(fixture.repository)[MAIN]
    with pytest.raises(PublishError, match=f"the head of {MAIN} is not signed"):
        fixture.back(VARIANT)
    git("update-ref", f"refs/heads/{MAIN}", f"{head}^", cwd=fixture.repository)
    git("reset", "--quiet", "--hard", cwd=fixture.repository)
    fixture.replace(VARIANT, {"README.md": b"another's"})
    head = heads(fixture.repository)[VARIANT]
    (line,) = fixture.back(MAIN).plan.warnings
    for words in (VARIANT, head[:12], "A Person", "was changed after it was signed", f"rollback --branch {VARIANT}"):
        assert words in line
    fixture.back(VARIANT)
    assert fixture.rules() == set()


def test_a_branch_that_goes_back_to_what_the_release_names_needs_no_key(fixture: SignedRollbackFixture) -> None:
    before = fixture.files()
    fixture.now += 3600
    fixture.replace(VARIANT, {"README.md": b"another's"})
    report = rollback(fixture.target, RollbackRequest(branches=(VARIANT,)), print)
    assert report.plan.warnings == ()
    assert fixture.files() == before
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=3)) == set()
    with pytest.raises(PublishError, match="no key to sign the rollback with"):
        rollback(fixture.target, RollbackRequest(branches=(VARIANT,), further_back=True), print)


def test_a_branch_of_no_release_does_not_stop_a_signed_rollback(fixture: SignedRollbackFixture) -> None:
    git("branch", "older", VARIANT, cwd=fixture.repository)
    head = drop(fixture, "older", ATTESTATION)
    report = fixture.back()
    (line,) = report.plan.warnings
    assert line.startswith(f"older stays at {head[:12]} by A Person")
    assert fixture.current().branches.keys() == {MAIN, VARIANT}


def test_a_rollback_that_brings_signatures_back_beside_an_unsigned_branch_says_so(
    fixture: SignedRollbackFixture,
) -> None:
    fixture.now += 3600
    drop(fixture, VARIANT, ATTESTATION)
    fixture.publish_signed(SigningKeys(unsigned=True))
    fixture.now += 3600
    (line,) = rollback(fixture.target, RollbackRequest(branches=(MAIN,)), print).plan.warnings
    assert f"{VARIANT} has no {ATTESTATION}" in line


@pytest.mark.parametrize("damaged", [b"{}", OTHER_SIGNER.sign(b"{}")])
def test_a_damaged_release_statement_stops_neither_the_rollback_nor_what_follows(
    fixture: SignedRollbackFixture, monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    """Also if somebody commits under this program's name: anybody who may write to a git repository can."""
    for name in ("COMMITTER", "AUTHOR"):
        monkeypatch.setitem(IDENTITY, f"GIT_{name}_NAME", AUTHOR_NAME)
        monkeypatch.setitem(IDENTITY, f"GIT_{name}_EMAIL", AUTHOR_EMAIL)
    fixture.now += 3600
    fixture.replace(MAIN, {RELEASE_ATTESTATION: damaged})
    assert not fixture.target.read_branches()[MAIN].foreign_author
    with pytest.raises(PublishError, match="release statement is not accepted"):
        fixture.publish_signed()
    report = fixture.back(MAIN)
    assert (actions(report), report.plan.signs) == ({MAIN: "sign"}, 4)
    fixture.release(VARIANT)
    assert fixture.current().release == 5
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=5)) == set()


def test_an_unsigned_rollback_names_the_branches_that_lose_their_statements(fixture: SignedRollbackFixture) -> None:
    fixture.now += 3600
    fixture.publish_signed(SigningKeys(unsigned=True))
    unsigned = heads(fixture.repository)
    fixture.release(VARIANT)
    fixture.now += 3600
    with pytest.raises(PublishError) as caught:
        rollback(fixture.target, RollbackRequest(branches=(VARIANT,)), print)
    assert heads(fixture.repository)[VARIANT][:12] in caught.value.why
    report = rollback(fixture.target, RollbackRequest(branches=(VARIANT,)), print, unsigned=True)
    assert any(f"{VARIANT} has no {ATTESTATION}" in line for line in report.plan.warnings)
    assert (
        git("rev-parse", f"{VARIANT}^{{tree}}", f"{unsigned[VARIANT]}^{{tree}}", cwd=fixture.repository).split()
        == [git("rev-parse", f"{VARIANT}^{{tree}}", cwd=fixture.repository).strip()] * 2
    )


def test_a_plan_of_a_rollback_needs_the_public_key_only(fixture: SignedRollbackFixture) -> None:
    before = heads(fixture.repository)
    report = fixture.back(signer=PlanningSigner(SIGNER.public), dry_run=True)
    assert (actions(report), report.plan.signs) == ({VARIANT: "restore", MAIN: "restore"}, 4)
    assert heads(fixture.repository) == before


@pytest.mark.slow
def test_a_rollback_on_a_git_remote_is_signed(fixture: SignedRollbackFixture, tmp_path: Path) -> None:
    bare = tmp_path / "remote.git"
    git("clone", "--quiet", "--bare", str(fixture.repository), str(bare))
    target = GitTarget(str(bare), tmp_path / "staging", waits=SHORT_WAITS)
    fixture.back(target=target)
    git("fetch", "--quiet", str(bare), f"+{VARIANT}:{VARIANT}", "+main:fetched", cwd=fixture.repository)
    git("reset", "--quiet", "--hard", "fetched", cwd=fixture.repository)
    git("branch", "-D", "fetched", cwd=fixture.repository)
    assert fixture.files() == json.loads(fixture.second_files.read_text())
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()


def test_the_command_signs_and_shows_it(fixture: SignedRollbackFixture, tmp_path: Path) -> None:
    private, public = write_key(tmp_path / "sign.key", PEM), write_key(tmp_path / "sign.pub", PUBLIC_PEM)

    def run(*options: str) -> str:
        result = CliRunner().invoke(app, ["rollback", str(fixture.repository), *options])
        assert result.exit_code == 0, result.output
        return result.output

    assert "the restored state is signed as release 4" in run("--dry-run", "--sign-key", str(public))
    assert "signed" in run("--branch", VARIANT, "--sign-key", str(private))
    assert '"signs": 0' in run("--branch", VARIANT, "--sign-key", str(private), "--format", "json")
    assert CliRunner().invoke(app, ["rollback", str(fixture.repository), "--sign-key", str(public)]).exit_code == 10
    assert fixture.rules(Trust(keys=SIGNER.public, min_release=4)) == set()
    assert {SIGNER.keyid} == {each.signed.keyid for each in fixture.checked().branches if each.signed}
