"""A publish that is killed at any moment is simply run again: the end state is that of an undisturbed run."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.publish.branches import BranchContent, publish_branches
from packager.publish.plan import PublishPlan
from packager.publish.saved_plan import PublishSubject, saved_plan, write_plan
from packager.publish.sign_release import Files, ReleaseSigner
from packager.publish.targets.local import LocalTarget
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION
from tests.publish_fixtures import (
    REPOSITORY,
    SHORT_WAITS,
    VARIANT,
    files_in,
    fixed_signer,
    git,
    hub_folder,
    leftovers,
    make_content,
    trees,
)

KillSequence = list[int | dict[str, float]]
ROOT = Path(__file__).resolve().parent.parent


def old_contents(dist: Path) -> list[BranchContent]:
    weights = random.Random(1).randbytes(100_000)
    return [
        make_content(dist, "main", {"README.md": b"old\n", "w.bin": weights, "a": b"a file", "d/x": b"1", "d/y": b"2"}),
        make_content(dist, VARIANT, {"README.md": b"old\n", "w.bin": weights, "gone.json": b"{}"}),
    ]


def new_contents(dist: Path) -> list[BranchContent]:
    """Every kind of change: added, edited, removed, a file that becomes a folder and a folder that becomes a file."""
    weights = random.Random(2).randbytes(100_000)
    return [
        make_content(dist, "main", {"README.md": b"new\n", "w.bin": weights, "a/b": b"deep", "d": b"now a file"}),
        make_content(dist, VARIANT, {"README.md": b"new\n", "w.bin": weights}),
    ]


class CrashFixture:
    """A repository before, the folders to publish, and the trees before and after."""

    def __init__(self, tmp_path: Path, *, update: bool, signed: bool = False, planned: bool = False) -> None:
        self.signed = signed
        self.plan = tmp_path / "plan.json" if planned else None
        signer = fixed_signer(tmp_path / "statements") if signed else None
        undisturbed = tmp_path / "undisturbed"
        self.before, self.root = tmp_path / "before", tmp_path / "hub"
        self.trees_before: dict[str, str] = {}
        if update:
            publish_branches(old_contents(tmp_path / "old"), LocalTarget(self.before, REPOSITORY), print, signer=signer)
            shutil.copytree(self.before, undisturbed, symlinks=True)
            self.trees_before = trees(hub_folder(self.before))
        self.contents = new_contents(tmp_path / "new")
        if planned:
            self.save_plan(LocalTarget(self.before, REPOSITORY), signer, tmp_path / "plan.json")
        publish_branches(self.contents, LocalTarget(undisturbed, REPOSITORY), print, signer=signer)
        self.trees_after = trees(hub_folder(undisturbed))

    def save_plan(self, target: LocalTarget, signer: ReleaseSigner | None, path: Path) -> None:
        """Save the plan of publishing the new contents over the old ones."""
        subject = PublishSubject(
            repository=REPOSITORY, target="local", address="", recipe="1" * 64, templates="2" * 64, tag=""
        )

        def save(plan: PublishPlan, files: Files) -> None:
            write_plan(saved_plan(subject, plan, files), path)

        publish_branches(self.contents, target, print, signer=signer, dry_run=True, compare=save)

    def run(self, chains: list[KillSequence]) -> list[dict[str, Any]]:
        """Run the chains of kills and return what the driver found, checked."""
        folders = [str(content.folder) for content in self.contents]
        result = subprocess.run(
            [sys.executable, "-m", "tests.publish_crash_driver", str(self.before), str(self.root), *folders],
            input=json.dumps(chains),
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
            env={**os.environ, "TEST_SIGNED": "1" if self.signed else "", "TEST_PLAN": str(self.plan or "")},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        found = [json.loads(line) for line in result.stdout.splitlines()]
        assert len(found) == len(chains)
        for chain, outcome in zip(chains, found, strict=True):
            self.check(outcome, f"killed at {chain}: {outcome}")
        return found

    def check(self, outcome: dict[str, Any], story: str) -> None:
        for seen in outcome["between"]:
            for branch, tree in seen.items():
                assert tree in (self.trees_before.get(branch), self.trees_after[branch]), story
            if seen.get("main") == self.trees_after["main"]:
                assert seen == self.trees_after, f"main was not the last: {story}"
        assert outcome["trees"] == self.trees_after, story
        assert outcome["status"] == "", story
        assert outcome["fsck"] == "", story
        assert outcome["leftovers"] == [], story
        statements = [ATTESTATION, RELEASE_ATTESTATION] if self.signed else []
        assert outcome["main"] == sorted([*self.contents[0].files, *statements]), story


def spread(count: int, last: int) -> list[int]:
    return sorted({1 + round(step * (last - 1) / (count - 1)) for step in range(count)})


@pytest.mark.crash
@pytest.mark.parametrize("update", [False, True], ids=["create", "update"])
def test_a_publish_may_be_killed_before_any_effect(tmp_path: Path, update: bool) -> None:
    fixture = CrashFixture(tmp_path, update=update)
    last = fixture.run([[0], [0]])[-1]["counts"][0]  # the first also counts the import of GitPython
    found = fixture.run([[kill] for kill in spread(10, last)])
    assert all(outcome["counts"] == [-1] for outcome in found)
    assert any("an earlier publish did not finish" in outcome["notes"] for outcome in found)


@pytest.mark.crash
@pytest.mark.parametrize("update", [False, True], ids=["create", "update"])
def test_a_signed_publish_may_be_killed_before_any_effect(tmp_path: Path, update: bool) -> None:
    """The run after the kill signs the same release with the same number: `check` compares the trees."""
    fixture = CrashFixture(tmp_path, update=update, signed=True)
    last = fixture.run([[0], [0]])[-1]["counts"][0]
    found = fixture.run([[kill] for kill in spread(10, last)])
    assert all(outcome["counts"] == [-1] for outcome in found)


@pytest.mark.crash
@pytest.mark.parametrize("update", [False, True], ids=["create", "update"])
def test_a_saved_plan_may_be_killed_before_any_effect_and_published_again(tmp_path: Path, update: bool) -> None:
    """The same plan finishes what it has begun: it takes its own commits for planned ones."""
    fixture = CrashFixture(tmp_path, update=update, signed=True, planned=True)
    last = fixture.run([[0], [0]])[-1]["counts"][0]
    found = fixture.run([[kill] for kill in spread(10, last)])
    assert all(outcome["counts"] == [-1] for outcome in found)
    assert {len(outcome["between"][0]) for outcome in found} >= ({2} if update else {1, 2})


@pytest.mark.crash
def test_a_publish_may_be_killed_in_every_step_of_the_checkout(tmp_path: Path) -> None:
    fixture = CrashFixture(tmp_path, update=True)
    last = fixture.run([[0], [0]])[-1]["counts"][0]  # the first also counts the import of GitPython
    found = fixture.run([[kill] for kill in range(last - 32, last, 4)])
    assert sum(any("finished its checkout" in note for note in outcome["notes"]) for outcome in found) > 3


@pytest.mark.crash
@pytest.mark.parametrize("update", [False, True], ids=["create", "update"])
def test_a_publish_and_its_git_may_be_killed_at_random_moments_many_times(tmp_path: Path, update: bool) -> None:
    dice = random.Random(20261123 + update)
    chains: list[KillSequence] = [[{"seconds": dice.uniform(0.0, 0.4)} for _ in range(2)] for _ in range(8)]
    CrashFixture(tmp_path, update=update).run(chains)


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[LocalTarget, list[BranchContent], Path]:
    """A published repository, and new contents for it."""
    root = tmp_path / "hub"
    target = LocalTarget(root, REPOSITORY, waits=SHORT_WAITS)
    publish_branches(old_contents(tmp_path / "old"), target, print)
    return target, new_contents(tmp_path / "new"), hub_folder(root)


def leave_locks(repository: Path) -> None:
    for name in ("index.lock", "HEAD.lock", f"refs/heads/{VARIANT}.lock", "refs/heads/main.lock", "packed-refs.lock"):
        (repository / ".git" / name).write_bytes(b"")
    (repository / ".git" / "objects" / "00").mkdir(exist_ok=True)
    (repository / ".git" / "objects" / "00" / "tmp_obj_xyz").write_bytes(b"half")
    (repository / ".git" / "objects" / "pack" / "tmp_pack_xyz").write_bytes(b"half")


def test_locks_of_a_killed_run_are_removed_and_named(
    interrupted: tuple[LocalTarget, list[BranchContent], Path], tmp_path: Path
) -> None:
    target, contents, repository = interrupted
    leave_locks(repository)
    (repository / ".git" / "packager-publishing.json").write_text('{"checkout": null}')
    lines: list[str] = []
    report = publish_branches(contents, target, lines.append)
    assert report.notes[0] == "an earlier publish did not finish"
    assert "removed its stale lock .git/refs/heads/main.lock" in report.notes
    assert len(report.notes) == 6
    assert lines[:6] == list(report.notes)
    assert leftovers(tmp_path / "hub") == []
    assert git("status", "--porcelain", cwd=repository) == ""


def test_locks_that_no_publish_left_are_not_touched(
    interrupted: tuple[LocalTarget, list[BranchContent], Path], refused: Callable[..., str]
) -> None:
    target, contents, repository = interrupted
    (repository / ".git" / "index.lock").write_bytes(b"")
    before = trees(repository)
    text = refused(contents, target)
    assert "another git process is at work in the repository" in text
    assert "index.lock" in text
    assert (repository / ".git" / "index.lock").exists()
    assert trees(repository) == before


def test_edits_in_a_checkout_that_was_killed_are_not_lost(
    interrupted: tuple[LocalTarget, list[BranchContent], Path], refused: Callable[..., str]
) -> None:
    target, contents, repository = interrupted
    old = git("rev-parse", "main", cwd=repository).strip()
    publish_branches(contents, target, print)
    new = git("rev-parse", "main", cwd=repository).strip()
    git("reset", "--hard", old, cwd=repository)
    git("update-ref", "refs/heads/main", new, cwd=repository)
    journal = repository / ".git" / "packager-publishing.json"
    journal.write_text(json.dumps({"checkout": {"old": old, "new": new}}))
    (repository / "README.md").write_text("a person's words\n")
    text = refused(contents, target)
    assert "README.md (edited)" in text
    assert "w.bin" not in text
    assert (repository / "README.md").read_text() == "a person's words\n"
    git("stash", "--include-untracked", cwd=repository)
    report = publish_branches(contents, target, print)
    assert report.outcomes[-1].plan.action == "unchanged"
    assert sorted(files_in(repository)) == sorted(contents[0].files)
    assert git("status", "--porcelain", cwd=repository) == ""


@pytest.fixture
def refused() -> Callable[..., str]:
    """Publish, and return the error's text."""
    from packager.errors import PackagerError

    def run(contents: list[BranchContent], target: LocalTarget) -> str:
        with pytest.raises(PackagerError) as caught:
            publish_branches(contents, target, print)
        return str(caught.value)

    return run
