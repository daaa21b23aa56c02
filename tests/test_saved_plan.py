"""A saved publish plan: what it holds, what is compared with it, and what a killed publish of it leaves to do."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from markdown_it import MarkdownIt
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.cli.publish_markdown import publish_report_markdown
from packager.errors import PublishError
from packager.publish.branches import BranchContent, BranchOutcome, PublishReport, publish_branches
from packager.publish.compare_plan import StalePlanError, require_as_planned
from packager.publish.plan import BranchPlan, FileChange, PublishPlan
from packager.publish.saved_plan import PublishSubject, SavedPlan, read_plan, saved_plan, write_plan
from packager.publish.sign_release import Files, ReleaseSigner, SigningKeys
from packager.publish.signing_keys import PlanningSigner, Signer
from packager.publish.statements import envelope, pre_authentication_encoding, read_envelope
from packager.publish.targets.local import LocalTarget
from packager.receipt import ATTESTATION
from tests.publish_fixtures import REPOSITORY, SHORT_WAITS, VARIANT, git, heads, hub_folder, make_content
from tests.samples import sampled
from tests.tiny_recipe import ACT_ORDER

if TYPE_CHECKING:
    from tests.tiny_recipe import Builds

MAIN = "main"
KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32) for seed in (1, 2))
SUBJECT = PublishSubject(repository=REPOSITORY, target="local", address="", recipe="1" * 64, templates="2" * 64, tag="")


class PlanFixture:
    """A local repository, folders to publish to it, and the plan of publishing them."""

    def __init__(self, tmp_path: Path) -> None:
        self.scratch, self.root, self.path = tmp_path, tmp_path / "hub", tmp_path / "plan.json"
        self.contents = self.build(b"1")
        self.signer: ReleaseSigner | None = None
        self.lines: list[str] = []

    def build(self, number: bytes) -> list[BranchContent]:
        dist = self.scratch / f"dist-{number.decode()}"
        return [
            make_content(dist, branch, {"README.md": number + branch.encode(), "w.bin": number * 1000, "same": b"s"})
            for branch in (VARIANT, MAIN)
        ]

    @property
    def target(self) -> LocalTarget:
        return LocalTarget(self.root, REPOSITORY, waits=SHORT_WAITS)

    @property
    def repository(self) -> Path:
        return hub_folder(self.root)

    def signed_by(self, key: Signer | PlanningSigner) -> None:
        self.signer = ReleaseSigner(REPOSITORY, SigningKeys(signer=key), self.scratch / "statements")

    def plan(self) -> SavedPlan:
        """Save the plan and read it again."""

        def save(plan: PublishPlan, files: Files) -> None:
            write_plan(saved_plan(SUBJECT, plan, files), self.path)

        publish_branches(
            self.contents, self.target, self.lines.append, signer=self.signer, dry_run=True, compare=save,
            may_write=False,
        )  # fmt: skip
        return read_plan(self.path)

    def publish(self, saved: SavedPlan | None = None) -> PublishReport:
        """Publish, exactly as planned if a plan is given."""
        target = self.target

        def compare(plan: PublishPlan, files: Files) -> None:
            if saved:
                require_as_planned(saved, saved_plan(SUBJECT, plan, files), plan, target)

        return publish_branches(self.contents, target, self.lines.append, signer=self.signer, compare=compare)

    def refused(self, saved: SavedPlan) -> str:
        before = heads(self.repository) if self.repository.exists() else None
        with pytest.raises(StalePlanError, match="nothing was written") as caught:
            self.publish(saved)
        assert (heads(self.repository) if self.repository.exists() else None) == before
        return str(caught.value)

    def somebody_commits(self, branch: str) -> str:
        """Let a person put a commit with the same files on a branch."""
        commit = git("commit-tree", f"{branch}^{{tree}}", "-p", branch, "-m", "By hand", cwd=self.repository).strip()
        git("update-ref", f"refs/heads/{branch}", commit, cwd=self.repository)
        return commit

    def somebody_writes(self, branch: str, name: str, data: bytes) -> None:
        """Let a person change a file of a branch."""
        git("checkout", "--quiet", branch, cwd=self.repository)
        (self.repository / name).write_bytes(data)
        git("add", name, cwd=self.repository)
        git("commit", "--quiet", "-m", "By hand", cwd=self.repository)
        git("checkout", "--quiet", MAIN, cwd=self.repository)


@pytest.fixture
def fixture(tmp_path: Path) -> PlanFixture:
    return PlanFixture(tmp_path)


def test_a_plan_holds_every_digest_and_no_path(fixture: PlanFixture) -> None:
    fixture.publish()
    present = heads(fixture.repository)
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    assert [(each.branch, each.action, each.parent) for each in saved.branches] == [
        (VARIANT, "update", present[VARIANT]),
        (MAIN, "update", present[MAIN]),
    ]
    for planned, content in zip(saved.branches, fixture.contents, strict=True):
        assert {name: file.sha256 for name, file in planned.files.items()} == {
            name: record.sha256 for name, record in content.files.items()
        }
    assert str(fixture.scratch) not in fixture.path.read_text()
    assert heads(fixture.repository) == present


def test_exactly_the_plan_is_published_and_again_changes_nothing(fixture: PlanFixture) -> None:
    saved = fixture.plan()
    assert not fixture.root.exists(), "a plan makes no repository"
    assert fixture.publish(saved).plan.changing == (VARIANT, MAIN)
    before = heads(fixture.repository)
    assert fixture.publish(saved).plan.changing == ()
    assert heads(fixture.repository) == before


@pytest.mark.parametrize("update", sampled([False, True], False), ids=["create", "update"])
def test_a_publish_that_ended_after_one_branch_is_finished(fixture: PlanFixture, update: bool) -> None:
    if update:
        fixture.publish()
        fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    both, fixture.contents = fixture.contents, fixture.contents[:1]
    if update:
        fixture.publish()
    else:  # main must be among the branches of a new repository: it is deleted again
        fixture.contents = both
        fixture.publish()
        git("rm", "--quiet", "-r", ".", cwd=fixture.repository)
        git("update-ref", "-d", "refs/heads/main", cwd=fixture.repository)
    fixture.contents = both
    assert fixture.publish(saved).plan.changing == (MAIN,)
    assert fixture.publish(saved).plan.changing == ()


def test_a_changed_file_of_the_build_is_named(fixture: PlanFixture) -> None:
    saved = fixture.plan()
    fixture.contents = [
        make_content(fixture.scratch / "other", VARIANT, {"README.md": b"1" + VARIANT.encode(), "new": b"n"}),
        fixture.contents[1],
    ]
    text = fixture.refused(saved)
    assert f"{VARIANT}: new: 1 bytes, sha256" in text
    assert f"{VARIANT}: same: no file, planned: 1 bytes" in text
    assert "README.md" not in text
    assert not fixture.root.exists(), "no repository is made for a plan that does not fit"


def test_other_branches_of_the_build_are_named(fixture: PlanFixture) -> None:
    saved = fixture.plan()
    fixture.contents = fixture.contents[1:]
    assert f"{VARIANT}: planned, and not in the build" in fixture.refused(saved)
    saved = fixture.plan()
    fixture.contents = fixture.build(b"1")
    assert f"{VARIANT}: in the build, and not planned" in fixture.refused(saved)


def test_a_moved_head_is_named_with_its_author(fixture: PlanFixture) -> None:
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    planned = heads(fixture.repository)[VARIANT]
    commit = fixture.somebody_commits(VARIANT)
    text = fixture.refused(saved)
    assert f"{VARIANT}: its head: {commit[:12]} by A Person <person@example.org>, planned: {planned[:12]}" in text
    assert f"{MAIN}:" not in text.partition("why:")[2]


def test_a_head_that_moves_while_the_lock_is_waited_for_is_found(
    fixture: PlanFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved, exclusive = fixture.plan(), LocalTarget.exclusive
    commits = []

    def late(target: LocalTarget) -> AbstractContextManager[Sequence[str]]:
        commits.append(fixture.somebody_commits(VARIANT))
        return exclusive(target)

    monkeypatch.setattr(LocalTarget, "exclusive", late)
    with pytest.raises(StalePlanError, match="its head"):
        fixture.publish(saved)
    assert heads(fixture.repository)[VARIANT] == commits[0]


def test_a_branch_that_was_made_or_deleted_is_named(fixture: PlanFixture) -> None:
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    git("update-ref", "-d", f"refs/heads/{VARIANT}", cwd=fixture.repository)
    assert f"{VARIANT}: it does not exist any more" in fixture.refused(saved)
    saved = fixture.plan()
    git("update-ref", f"refs/heads/{VARIANT}", MAIN, cwd=fixture.repository)
    assert "planned: no such branch" in fixture.refused(saved)


def test_another_branch_of_the_repository_is_named(fixture: PlanFixture) -> None:
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    git("branch", "another", MAIN, cwd=fixture.repository)
    assert "the other branches of the repository are another, planned: none" in fixture.refused(saved)


def test_a_deleted_repository_is_not_made_again(fixture: PlanFixture) -> None:
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    shutil.rmtree(fixture.repository)
    assert f"{MAIN}: it does not exist any more" in fixture.refused(saved)
    assert not fixture.repository.exists()


def test_files_that_somebody_else_published_are_not_taken_for_ours(fixture: PlanFixture) -> None:
    """The same files, on top of another commit than the planned head."""
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    saved = fixture.plan()
    fixture.somebody_commits(VARIANT)
    fixture.publish()
    assert fixture.publish().plan.changing == ()
    assert f"{VARIANT}: its head:" in fixture.refused(saved)


def test_a_commit_of_a_person_with_the_planned_files_is_refused(fixture: PlanFixture) -> None:
    saved = fixture.plan()
    fixture.publish()
    fixture.somebody_commits(MAIN)
    assert "by A Person" in fixture.refused(saved)


# signed releases


def test_a_plan_needs_the_public_key_only(fixture: PlanFixture) -> None:
    private, public = Signer(KEY), PlanningSigner(Signer(KEY).public)
    fixture.signed_by(private)
    by_private = fixture.plan()
    fixture.signed_by(public)
    assert fixture.plan() == by_private
    assert by_private.release
    assert (by_private.release.number, by_private.release.keyid) == (1, private.keyid)
    fixture.signed_by(private)
    fixture.publish(by_private)
    assert ATTESTATION in git("ls-tree", "-r", "--name-only", VARIANT, cwd=fixture.repository)
    # An unchanged branch is planned as unchanged, though the plan cannot sign.
    fixture.contents = [fixture.contents[0], fixture.build(b"2")[1]]
    fixture.signed_by(public)
    saved = fixture.plan()
    assert [each.action for each in saved.branches] == ["unchanged", "update"]
    assert saved.release
    assert saved.release.number == 2
    fixture.signed_by(private)
    assert fixture.publish(saved).plan.changing == (MAIN,)
    assert fixture.publish(saved).plan.changing == ()


@pytest.mark.slow
def test_a_second_signature_on_a_stored_statement_is_planned_as_a_change(fixture: PlanFixture) -> None:
    """The private key signs alone, so the bytes will be others."""
    private, public = Signer(KEY), PlanningSigner(Signer(KEY).public)
    fixture.signed_by(private)
    fixture.publish()
    data = git("show", f"{VARIANT}:{ATTESTATION}", cwd=fixture.repository).encode()
    payload, (own,) = read_envelope(data)
    foreign = (Signer(OTHER).keyid, OTHER.sign(pre_authentication_encoding(payload)))
    fixture.somebody_writes(VARIANT, ATTESTATION, envelope(payload, [own, foreign]))
    fixture.signed_by(public)
    saved = fixture.plan()
    assert [each.action for each in saved.branches] == ["update", "unchanged"]
    fixture.signed_by(private)
    assert fixture.publish(saved).plan.changing == (VARIANT,)


def test_another_key_no_key_and_another_number_are_named(fixture: PlanFixture) -> None:
    fixture.signed_by(Signer(KEY))
    saved = fixture.plan()
    fixture.signed_by(Signer(OTHER))
    assert f"the signing key: {Signer(OTHER).keyid}, planned: {Signer(KEY).keyid}" in fixture.refused(saved)
    fixture.signer = None
    assert "the signing key: none, planned" in fixture.refused(saved)
    unsigned = fixture.plan()
    fixture.signed_by(Signer(KEY))
    assert "planned: none" in fixture.refused(unsigned)
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    second = fixture.plan()
    fixture.contents = fixture.build(b"3")
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    assert "the number of the release: 3, planned: 2" in fixture.refused(second)


def test_an_envelope_of_a_plan_is_never_published(fixture: PlanFixture) -> None:
    fixture.signed_by(PlanningSigner(Signer(KEY).public))
    saved = fixture.plan()
    with pytest.raises(PublishError, match="a public key cannot sign"):
        fixture.publish(saved)
    assert not fixture.root.exists()


# hostile files


def saved_text(fixture: PlanFixture) -> dict[str, Any]:
    fixture.plan()
    value: dict[str, Any] = json.loads(fixture.path.read_text())
    return value


def in_branch(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    return lambda value: change(value["branches"][0])


def named(name: str) -> Callable[[dict[str, Any]], object]:
    return in_branch(lambda branch: branch["files"].update({name: branch["files"]["same"]}))


HOSTILE: Mapping[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no plan": (lambda value: value.update(kind="another"), "it is no publish plan"),
    "version": (lambda value: value.update(version=2), "another version than 1"),
    "version true": (lambda value: value.update(version=True), "another version than 1"),
    "unknown key": (lambda value: value.update(run="rm"), "run: Extra inputs"),
    "missing key": (lambda value: value.pop("left_alone"), "left_alone: Field required"),
    "no branches": (lambda value: value.update(branches=[]), "branches"),
    "path upwards": (named("../../etc/passwd"), "no part of it is empty"),
    "absolute path": (named("/etc/passwd"), "no part of it is empty"),
    "git folder": (named(".git/hooks/pre-push"), "git keeps its own files"),
    "control character": (named("a\nb"), "do not survive a clone"),
    "statement": (named(ATTESTATION), "a signed statement is no file of a build"),
    "branch name": (in_branch(lambda branch: branch.update(branch="--force")), "letters, digits"),
    "branch twice": (lambda value: value["branches"].append(value["branches"][0]), "twice"),
    "main not last": (lambda value: value["branches"].reverse(), "not the last"),
    "left alone twice": (lambda value: value.update(left_alone=[MAIN]), "twice"),
    "action": (in_branch(lambda branch: branch.update(action="delete")), "action"),
    "created on a head": (in_branch(lambda branch: branch.update(parent="0" * 40)), "exactly if it has no head"),
    "parent": (in_branch(lambda branch: branch.update(action="update", parent="main")), "parent"),
    "digest": (in_branch(lambda branch: branch["files"]["same"].update(sha256="0" * 63)), "sha256"),
    "digest with a line end": (in_branch(lambda branch: branch["files"]["same"].update(sha256="0" * 64 + "\n")), "sha"),
    "size as text": (in_branch(lambda branch: branch["files"]["same"].update(size_bytes="1")), "size_bytes"),
    "negative size": (in_branch(lambda branch: branch["files"]["same"].update(size_bytes=-1)), "size_bytes"),
    "half signed": (in_branch(lambda branch: branch.update(statement="0" * 64)), "signs every branch"),
    "a token": (lambda value: value["subject"].update(token="hf_x"), "token: Extra inputs"),  # noqa: S106
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_plan_that_packager_did_not_write_is_one_error(fixture: PlanFixture, name: str) -> None:
    change, words = HOSTILE[name]
    value = saved_text(fixture)
    change(value)
    fixture.path.write_text(json.dumps(value))
    with pytest.raises(PublishError, match="the plan cannot be read") as caught:
        read_plan(fixture.path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"kind": 1, "kind": 2}', b'{"kind": NaN}', b'{"a": "\\ud800"}'],
)
def test_a_file_that_is_no_plan_is_one_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PublishError, match="the plan cannot be read"):
        read_plan(path)


def test_a_link_a_pipe_and_a_huge_file_are_no_plans(fixture: PlanFixture, tmp_path: Path) -> None:
    fixture.plan()
    (tmp_path / "link").symlink_to(fixture.path)
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(1 << 40)
    for name in ("link", "pipe", "huge", "missing"):
        with pytest.raises(PublishError, match="the plan cannot be read"):
            read_plan(tmp_path / name)


@pytest.mark.slow
def test_a_forged_plan_publishes_nothing_else(fixture: PlanFixture) -> None:
    """The plan only says what may happen: forged digests and heads fit neither the build nor the repository."""
    fixture.publish()
    fixture.contents = fixture.build(b"2")
    for change in (
        in_branch(lambda branch: branch["files"]["same"].update(sha256="0" * 64)),
        in_branch(lambda branch: branch["files"].pop("same")),
        in_branch(lambda branch: branch.update(parent="0" * 40)),
        in_branch(lambda branch: branch.update(action="unchanged")),
        lambda value: value["subject"].update(repository="another/Model-GPTQ"),
        lambda value: value["subject"].update(address="https://example.org/x"),
        lambda value: value["subject"].update(recipe="0" * 64),
        lambda value: value["subject"].update(tag="v9"),
        lambda value: value.update(left_alone=["another"]),
        in_branch(lambda branch: branch.update(message="x\n\nRollback-to: " + "0" * 40)),
        lambda value: value["branches"].pop(0),
    ):
        value = saved_text(fixture)
        change(value)
        fixture.path.write_text(json.dumps(value))
        fixture.refused(read_plan(fixture.path))


# the summary


def test_the_summary_shows_hostile_names_as_text() -> None:
    hostile = "a|b<script>`x`\n# *bold* [x](https://example.org)\u202e"
    entry = BranchPlan(
        branch=MAIN, action="update", parent="a" * 40, foreign_author=hostile,
        added=(FileChange(name=hostile, size_bytes=5),), changed=(), removed=(), num_files=1, total_bytes=5,
        present_bytes=0,
    )  # fmt: skip
    plan = PublishPlan(where=hostile, branches=(entry,), left_alone=(hostile,), final_steps=(hostile,))
    outcome = BranchOutcome(plan=entry, commit="a" * 40, seconds=0.0)
    report = PublishReport(plan=plan, outcomes=(outcome,), notes=(), dry_run=True)
    text = publish_report_markdown(report, None)
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    for forbidden in ("<script", "<em>", "<strong>", "<a ", "<code>", "\u202e", "<h1"):
        assert forbidden not in page
    assert page.count("<table>") == 2
    assert all(row.count("<td") == 7 for row in page.split("<tr>")[2:3])


def test_a_summary_of_many_files_is_short() -> None:
    added = tuple(FileChange(name=f"{number}.bin", size_bytes=1) for number in range(5000))
    entry = BranchPlan(
        branch=MAIN, action="create", parent=None, foreign_author="", added=added, changed=(), removed=(),
        num_files=5000, total_bytes=5000, present_bytes=0,
    )  # fmt: skip
    outcome = BranchOutcome(plan=entry, commit=None, seconds=0.0)
    plan = PublishPlan(where="x", branches=(entry,), left_alone=())
    text = publish_report_markdown(PublishReport(plan=plan, outcomes=(outcome,), notes=(), dry_run=True), None)
    assert len(text) < 20_000
    assert "and 4,800 more" in text


# the commands


class CommandFixture:
    """A tiny recipe that is built, and a key pair."""

    def __init__(self, folder: Path, recipe: Path) -> None:
        self.folder, self.recipe, self.path = folder, recipe, folder / "plan.json"
        self.private, self.public = folder / "sign.key", folder / "sign.pub"
        self.private.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.private.chmod(0o600)
        self.public.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        self.repository = folder / "dist" / "hub" / "models" / "tester" / "tiny-GPTQ"

    def publish(self, *options: str | Path) -> Result:
        command = ["publish", str(self.recipe), "--dist", str(self.folder / "dist"), *map(str, options)]
        return CliRunner().invoke(app, command)

    def save(self, *options: str | Path) -> Result:
        result = self.publish("--dry-run", "--save-plan", self.path, *options)
        assert result.exit_code == 0, result.output
        return result


@pytest.fixture
def command(builds: "Builds", tmp_path: Path) -> CommandFixture:
    return CommandFixture(tmp_path, builds.copy(tmp_path))


@pytest.mark.slow
def test_the_commands_plan_show_and_publish(command: CommandFixture) -> None:
    saved = command.save("--sign-key", command.public, "--tag", "v1", "--format", "markdown")
    digest = read_plan(command.path).subject.recipe
    assert "## Publish plan for" in saved.stdout
    assert f"recipe `{digest}`" in saved.stdout
    assert "release 1, to be signed by the key" in saved.stdout
    assert not command.repository.exists()
    shown = command.publish("--plan", command.path, "--dry-run", "--sign-key", command.public)
    assert shown.exit_code == 0, shown.output
    assert "+ provenance.json" in shown.stdout
    assert not command.repository.exists()
    public = command.publish("--plan", command.path, "--sign-key", command.public)
    assert public.exit_code == 10, "a public key cannot sign"
    assert not command.repository.exists()
    for _ in range(2):  # the second has nothing to do
        done = command.publish("--plan", command.path, "--sign-key", command.private)
        assert done.exit_code == 0, done.output
    assert git("rev-parse", "v1^{commit}", cwd=command.repository) == git("rev-parse", MAIN, cwd=command.repository)
    for arguments in (["--trusted-key", str(command.public)], []):
        checked = CliRunner().invoke(app, ["verify-published", str(command.repository), *arguments])
        assert checked.exit_code == 0, checked.output


def test_a_plan_of_another_recipe_template_or_repository_is_refused(
    command: CommandFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command.save()
    text = command.recipe.read_text()
    command.recipe.write_text(text.replace('"title": "Tiny"', '"title": "Tinier"'))
    refused = command.publish("--plan", command.path)
    assert refused.exit_code == 10
    assert "the digest of the recipe" in refused.output
    command.recipe.write_text(text.replace("tester/tiny-GPTQ", "tester/other-GPTQ"))
    assert (
        "the repository: tester/other-GPTQ, planned: tester/tiny-GPTQ" in command.publish("--plan", command.path).output
    )
    command.recipe.write_text(text)
    templates = command.folder / "templates"
    shutil.copytree(Path(__file__).parent.parent / "templates", templates)
    (templates / "_about.md.j2").write_text("changed")
    monkeypatch.setattr("packager.pipeline.saved_publish.templates_dir", lambda: templates)
    assert "the digest of the card's templates" in command.publish("--plan", command.path).output
    assert not command.repository.exists()


@pytest.mark.slow
def test_a_build_made_again_after_the_plan_is_refused(command: CommandFixture) -> None:
    command.save()
    value = json.loads(command.path.read_text())
    value["branches"][0]["files"]["README.md"]["sha256"] = "0" * 64
    command.path.write_text(json.dumps(value))
    refused = command.publish("--plan", command.path)
    assert refused.exit_code == 10
    assert f"{ACT_ORDER}: README.md:" in refused.output
    assert not command.repository.exists()


def test_options_that_contradict_each_other_are_refused(command: CommandFixture) -> None:
    command.save()
    for options in (
        ("--save-plan", command.path),
        ("--save-plan", command.path, "--dry-run", "--plan", command.path),
        ("--plan", command.path, "--tag", "v2"),
    ):
        assert command.publish(*options).exit_code == 2
