"""Repositories that others wrote run nothing: every way in which git starts a program, tried on every command.

A repository is published, and then gets a setting, hook or file of somebody else that names a program, the canary. All
commands that open the repository must end normally or with one clear error, and the canary must never have run.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from packager.errors import PackagerError, PublishError
from packager.publish.branches import BranchContent, check_folders, publish_branches
from packager.publish.published import verify_published
from packager.publish.rollback import RollbackRequest, rollback
from packager.publish.targets import Target
from packager.publish.targets.git import GitTarget
from packager.publish.targets.git_process import AUTHOR_EMAIL, AUTHOR_NAME
from packager.publish.targets.local import LocalTarget
from tests.publish_fixtures import REPOSITORY, SHORT_WAITS, VARIANT, describe, git, heads, hub_folder, make_content
from tests.samples import sampled

HOOKS = (
    "post-checkout", "post-index-change", "post-receive", "post-update", "pre-auto-gc", "pre-push", "pre-receive",
    "proc-receive", "push-to-checkout", "reference-transaction", "update",
)  # fmt: skip
SIGNATURE = "gpgsig -----BEGIN PGP SIGNATURE-----\n \n iQ==\n -----END PGP SIGNATURE-----\n"


class Foreign:
    """A published repository that somebody else can write, and a program of theirs that leaves a trace."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.traces = folder / "traces"
        self.canary = folder / "canary"
        self.repository = hub_folder(folder / "hub") if kind == "local" else folder / "remote"
        self.staging = folder / "staging"
        self.git_folder = self.repository / ".git" if kind in ("local", "worktree") else self.repository
        self.contents = [
            make_content(folder / "dist", "main", {"README.md": b"card\n", "w.bin": b"weights"}),
            make_content(folder / "dist", VARIANT, {"README.md": b"card\n", "sub/w.bin": b"wei"}),
        ]

    @classmethod
    def made(cls, folder: Path, kind: str) -> "Foreign":
        """Publish two releases, and sign the head of main."""
        made = cls(folder, kind)
        made.canary.write_text(f'#!/bin/sh\necho "$0 $*" >> {made.traces}\nexit 1\n')
        made.canary.chmod(0o755)
        if kind == "worktree":
            git("init", "--quiet", "--initial-branch=trunk", str(made.repository))
        for text in (b"first\n", b"card\n"):
            for content in made.contents:
                (content.folder / "README.md").write_bytes(text)
            made.contents = made.described()
            publish_branches(made.contents, made.target(), print)
        made.sign_head()
        return made

    def described(self) -> list[BranchContent]:
        return [describe(content.folder, content.branch) for content in self.contents]

    def copied(self, folder: Path) -> "Foreign":
        """Return a copy, with a canary of its own."""
        shutil.copytree(self.folder, folder, symlinks=True)
        copy = Foreign(folder, self.kind)
        copy.canary.write_text(f'#!/bin/sh\necho "$0 $*" >> {copy.traces}\nexit 1\n')
        return copy

    def target(self) -> Target:
        if self.kind == "local":
            return LocalTarget(self.folder / "hub", REPOSITORY, waits=SHORT_WAITS)
        return GitTarget(str(self.repository), self.staging, waits=SHORT_WAITS)

    def sign_head(self) -> None:
        """Give main's head a signature, which `git log` shows with a program if log.showSignature says so."""
        tree, parent, time_s = git("log", "-1", "--format=%T %P %ct", "main", cwd=self.repository).split()
        person = f"{AUTHOR_NAME} <{AUTHOR_EMAIL}> {time_s} +0000"
        text = f"tree {tree}\nparent {parent}\nauthor {person}\ncommitter {person}\n{SIGNATURE}\nmain: signed\n"
        (self.folder / "commit").write_text(text)
        commit = git("hash-object", "-t", "commit", "-w", str(self.folder / "commit"), cwd=self.repository).strip()
        git("update-ref", "refs/heads/main", commit, cwd=self.repository)
        (self.folder / "head").write_text(commit)

    def set(self, settings: Mapping[str, str]) -> None:
        """Add settings to the repository's configuration."""
        for key, value in settings.items():
            text = value.format(canary=self.canary, folder=self.folder, repository=self.repository)
            git("config", "--file", str(self.git_folder / "config"), "--add", key.format(canary=self.canary), text)

    def use(self) -> list[str]:
        """Run every command that opens the repository, and return the errors."""
        errors = []

        def attempt(command: Callable[[], object]) -> None:
            try:
                command()
            except PackagerError as error:
                errors.append(str(error))

        head = (self.folder / "head").read_text()
        self.stale()
        attempt(lambda: self.target().read_branches())  # what `packager status` reads
        attempt(lambda: verify_published(self.target(), lambda _: None, full=True))
        attempt(lambda: self.target().read_tag("v1"))
        attempt(lambda: rollback(self.target(), RollbackRequest(branches=("main",)), print, dry_run=True))
        self.stale()
        attempt(lambda: publish_branches(self.contents, self.target(), print, dry_run=True))
        attempt(lambda: rollback(self.target(), RollbackRequest(branches=("main",)), print))
        self.stale()
        attempt(lambda: publish_branches(self.contents, self.target(), print))
        attempt(lambda: self.target().tag("v1", {"main": head}, "notes"))
        return errors

    def stale(self) -> None:
        """Make git compare the content of a file with the index, which it does by filters."""
        if self.kind == "local" and (self.repository / "README.md").exists():
            os.utime(self.repository / "README.md", (1, 1))

    def ran(self) -> str:
        return self.traces.read_text() if self.traces.exists() else ""


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Foreign]:
    made: dict[str, Foreign] = {}

    def template(kind: str) -> Foreign:
        if kind not in made:
            made[kind] = Foreign.made(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return template


@pytest.fixture
def copy(templates: Callable[[str], Foreign], tmp_path: Path) -> Callable[[str], Foreign]:
    return lambda kind: templates(kind).copied(tmp_path / "copy")


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way in which git starts a program.

    Attributes:
        settings: by key.
        control: a plain git command that starts the program in the local repository, where git 2.39 has one.
        error: what the error names if the repository cannot be used at all, "" if it works as before.
        push_error: the same for publishing to a bare repository only.
        attributes: the repository's info/attributes.
    """

    settings: Mapping[str, str]
    control: str = ""
    error: str = ""
    push_error: str = ""
    attributes: str = "* filter=x diff=x merge=x\n"


def setting(key: str, value: str = "{canary}", **more: str) -> Way:
    return Way(settings={key: value}, **more)


EXT = {"protocol.ext.allow": "always", "remote.origin.url": "ext::{canary}"}
OWN_URL = {"remote.origin.url": "{repository}", "remote.origin.fetch": "+refs/heads/*:refs/remotes/origin/*"}
FETCH = "fetch origin"
# Every key of git's documentation (2.56) and git-lfs's that names a program, a transport or a file elsewhere.
WAYS = {
    "alias": setting("alias.rollback", "!{canary}", control="rollback"),
    "browser": setting("browser.x.cmd"),
    "core.alternateRefsCommand": setting("core.alternateRefsCommand"),
    "core.askPass": setting("core.askPass"),
    "core.attributesFile": setting("core.attributesFile", "{folder}/attributes"),
    "core.editor": setting("core.editor", control="commit --amend"),
    "core.excludesFile": setting("core.excludesFile", "{folder}/excludes"),
    "core.fsmonitor": setting("core.fsmonitor", control="status"),
    "core.gitProxy": setting("core.gitProxy", control="ls-remote git://localhost/x"),
    "core.hooksPath": setting("core.hooksPath", "{folder}/hooks", control="branch new", push_error="core.hookspath"),
    "core.pager": setting("core.pager"),
    "core.sshCommand": setting("core.sshCommand", control="ls-remote ssh://localhost/x"),
    "core.worktree": setting("core.worktree", "{folder}/dist"),
    "credential.helper": setting("credential.helper", "!{canary}"),
    "diff.command": setting("diff.x.command", control="diff main~1 main"),
    "diff.external": setting("diff.external", control="diff main~1 main", attributes=""),
    "diff.textconv": setting("diff.x.textconv", control="diff main~1 main"),
    "difftool": setting("difftool.x.cmd"),
    "filter.clean": setting("filter.x.clean", control="status"),
    "filter.process": setting("filter.x.process", control="status"),
    "filter.smudge": setting("filter.x.smudge", control="checkout main~1 -- README.md"),
    "gc.recentObjectsHook": setting("gc.recentObjectsHook"),
    "gpg.program": Way(settings={"log.showSignature": "true", "gpg.program": "{canary}"}, control="log main"),
    "gpg.ssh.program": Way(
        settings={"log.showSignature": "true", "gpg.format": "ssh", "gpg.ssh.program": "{canary}",
                  "gpg.openpgp.program": "{canary}", "gpg.x509.program": "{canary}"}, control="log main"
    ),
    "gpg.ssh.defaultKeyCommand": Way(
        settings={"commit.gpgSign": "true", "gpg.format": "ssh", "gpg.ssh.defaultKeyCommand": "{canary}"},
        control="commit --allow-empty -m x",
    ),
    "guitool": setting("guitool.x.cmd"),
    "hook.command": Way(
        settings={"hook.x.command": "{canary}", "hook.x.event": "reference-transaction"}, push_error="hook.x.command"
    ),
    "hook.command post-receive": Way(
        settings={"hook.x.command": "{canary}", "hook.x.event": "post-receive"}, push_error="hook.x.command"
    ),
    "http": Way(settings={"http.proxy": "http://localhost:1", "http.cookieFile": "{folder}/cookies",
                          "http.saveCookies": "true", "http.sslKey": "{folder}/key"}),
    "imap.tunnel": setting("imap.tunnel"),
    "include.path": setting("include.path", "{folder}/included", control="status"),
    "includeIf": setting("includeIf.gitdir:/**.path", "{folder}/included", control="status"),
    "includeIf.onbranch": setting("includeIf.onbranch:**.path", "{folder}/included", control="status"),
    "includeIf.hasconfig": Way(
        settings={"remote.origin.url": "x", "includeIf.hasconfig:remote.*.url:**.path": "{folder}/included"},
        control="status",
    ),
    "init.templateDir": setting("init.templateDir", "{folder}/template"),
    "instaweb": setting("instaweb.httpd"),
    "interactive.diffFilter": setting("interactive.diffFilter"),
    "lfs.customtransfer": Way(settings={"lfs.standaloneTransferAgent": "x", "lfs.customTransfer.x.path": "{canary}"}),
    "lfs.extension": Way(settings={"lfs.extension.x.clean": "{canary} %f", "lfs.extension.x.smudge": "{canary} %f",
                                   "lfs.extension.x.priority": "0"}),
    "lfs.storage": setting("lfs.storage", "{folder}/elsewhere"),
    "lfs.url": setting("lfs.url", "ssh://localhost/x"),
    "mailmap.file": setting("mailmap.file", "{folder}/mailmap"),
    "maintenance": Way(settings={"maintenance.prefetch.enabled": "true", "maintenance.auto": "true", "gc.auto": "1",
                                 **EXT}),
    "man": setting("man.x.cmd"),
    "merge.driver": setting("merge.x.driver"),
    "mergetool": setting("mergetool.x.cmd"),
    "pager": setting("pager.log"),
    "partial clone": Way(
        settings={"extensions.partialClone": "origin", "remote.origin.promisor": "true", **EXT},
        control=f"cat-file -p {'1' * 40}", error="extensions.partialclone",
    ),
    "promisor": Way(settings={"remote.origin.promisor": "true", "core.repositoryFormatVersion": "1", **EXT}),
    "receive.denyCurrentBranch": setting("receive.denyCurrentBranch", "updateInstead"),
    "receive.procReceiveRefs": setting("receive.procReceiveRefs", "refs"),
    "remote.ext": Way(settings=EXT, control=FETCH),
    "remote.receivepack": Way(
        settings={**OWN_URL, "remote.origin.receivepack": "{canary}"}, control="push origin main"
    ),
    "remote.uploadpack": Way(settings={**OWN_URL, "remote.origin.uploadpack": "{canary}"}, control=FETCH),
    "remote.vcs": Way(settings={"remote.origin.vcs": "ext", **EXT, "remote.origin.url": "{canary}"}, control=FETCH),
    "sendemail": setting("sendemail.toCmd"),
    "sequence.editor": setting("sequence.editor", control="rebase -i --force-rebase main~1"),
    "submodule.update": Way(settings={"submodule.x.update": "!{canary}", "submodule.x.url": "ext::{canary}"}),
    "tar.command": setting("tar.x.command", control="archive --format=x main"),
    "trailer": Way(settings={"trailer.x.command": "{canary}", "trailer.x.cmd": "{canary}", "trailer.x.key": "X"},
                   control="interpret-trailers ../../../../commit"),
    "uploadpack.packObjectsHook": setting("uploadpack.packObjectsHook"),
    "url.insteadOf": Way(settings={"protocol.ext.allow": "always", "url.ext::{canary} .insteadOf": "/"},
                         control="ls-remote /x"),
    "url.pushInsteadOf": Way(settings={"protocol.ext.allow": "always", "url.ext::{canary} .pushInsteadOf": "/"},
                             control="push /x main"),
    "web.browser": setting("web.browser"),
    "worktree config": Way(settings={"extensions.worktreeConfig": "true"}, control="status"),
}  # fmt: skip


def poison(foreign: Foreign, way: Way) -> None:
    """Put a way into a repository, with all that it needs."""
    hooks = foreign.folder / "hooks"
    hooks.mkdir()
    for name in HOOKS:
        (hooks / name).symlink_to(foreign.canary)
    (foreign.folder / "included").write_text(f'[core]\n\tfsmonitor = "{foreign.canary}"\n')
    (foreign.git_folder / "config.worktree").write_text(f'[core]\n\tfsmonitor = "{foreign.canary}"\n')
    (foreign.folder / "attributes").write_text("* filter=x\n")
    (foreign.git_folder / "info").mkdir(exist_ok=True)
    (foreign.git_folder / "info" / "attributes").write_text(way.attributes)
    foreign.set(way.settings)


def test_no_setting_of_all_together_runs_a_program(copy: Callable[[str], Foreign]) -> None:
    foreign = copy("local")
    settings = [way.settings for way in WAYS.values() if not way.error]
    poison(foreign, Way(settings={key: value for some in settings for key, value in some.items()}))
    assert foreign.use() == []
    assert foreign.ran() == ""


@pytest.mark.slow  # each publishes, verifies and goes back
@pytest.mark.parametrize("name", WAYS)
def test_no_setting_of_a_repository_runs_a_program(copy: Callable[[str], Foreign], name: str) -> None:
    way, foreign = WAYS[name], copy("local")
    poison(foreign, way)
    errors = foreign.use()
    assert foreign.ran() == ""
    assert all(way.error in error for error in errors)
    assert bool(errors) == bool(way.error), errors
    if way.control:
        foreign.stale()
        run_plain_git(foreign, way.control)
        assert foreign.ran(), "the setting is without effect on any git: this case shows nothing"


REFUSED = [name for name, way in WAYS.items() if way.error or way.push_error]


@pytest.mark.parametrize("kind", sampled(["bare", "worktree"], "bare"))
@pytest.mark.parametrize("name", sampled([*REFUSED, "all others"], "all others"))
def test_no_setting_of_a_remote_that_is_a_folder_runs_a_program(
    copy: Callable[[str], Foreign], kind: str, name: str
) -> None:
    foreign = copy(kind)
    others = [way.settings for way in WAYS.values() if not (way.error or way.push_error)]
    way = WAYS.get(name, Way(settings={key: value for settings in others for key, value in settings.items()}))
    poison(foreign, way)
    before = heads(foreign.repository)
    errors = foreign.use()
    assert foreign.ran() == ""
    expected = way.error or way.push_error
    assert all(expected in error for error in errors)
    assert bool(errors) == bool(expected), errors
    assert (heads(foreign.repository) == before) == bool(expected)


@pytest.mark.parametrize("kind", ["local", "bare"])
def test_no_hook_of_a_repository_runs(copy: Callable[[str], Foreign], kind: str) -> None:
    foreign = copy(kind)
    shutil.rmtree(foreign.git_folder / "hooks", ignore_errors=True)
    (foreign.git_folder / "hooks").mkdir()
    for name in HOOKS:
        (foreign.git_folder / "hooks" / name).symlink_to(foreign.canary)
    errors = foreign.use()
    assert foreign.ran() == ""
    assert bool(errors) == (kind == "bare")
    assert all("has a hook, pre-receive, which packager does not run" in error for error in errors)
    assert all("publish through a server" in error for error in errors)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bare", "worktree"])
def test_no_setting_of_a_staging_folder_runs_a_program(copy: Callable[[str], Foreign], kind: str) -> None:
    foreign = copy(kind)
    foreign.git_folder = foreign.staging / ".git"
    others = [way.settings for name, way in WAYS.items() if name != "partial clone"]
    poison(foreign, Way(settings={key: value for settings in others for key, value in settings.items()}))
    shutil.rmtree(foreign.staging / ".git" / "hooks", ignore_errors=True)
    shutil.copytree(foreign.folder / "hooks", foreign.staging / ".git" / "hooks", symlinks=True)
    shutil.copytree(foreign.folder / "hooks", foreign.staging / "packager-remote" / "hooks", symlinks=True)
    (foreign.staging / "packager-remote" / "config").write_text(
        f'[core]\n\talternateRefsCommand = "{foreign.canary}"\n'
    )
    (foreign.staging / ".lfsconfig").write_text("[lfs]\n\turl = ssh://localhost/x\n")
    (foreign.staging / ".git" / "HEAD").write_text(heads(foreign.repository)["main"])
    (foreign.staging / ".git" / "packager-pushing").write_text("refs/heads/../../../../victim")
    (foreign.folder / "victim.lock").write_text("somebody's")
    assert foreign.use() == []
    assert foreign.ran() == ""
    assert (foreign.folder / "victim.lock").exists()
    assert not (foreign.staging / ".lfsconfig").exists()
    assert not {"hooks", "info", "config.worktree"} & {path.name for path in (foreign.staging / ".git").iterdir()}


def run_plain_git(foreign: Foreign, command: str) -> None:
    """Run git as a person would who trusts the repository."""
    environment = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_PAGER_IN_USE": "1",
                   "GIT_AUTHOR_NAME": "x", "GIT_AUTHOR_EMAIL": "x", "GIT_COMMITTER_NAME": "x",
                   "GIT_COMMITTER_EMAIL": "x", "HOME": str(foreign.folder)}  # fmt: skip
    subprocess.run(["git", *command.split()], cwd=foreign.repository, env=environment, capture_output=True, check=False)


def test_a_commit_whose_names_lead_out_is_not_checked_out(copy: Callable[[str], Foreign]) -> None:
    foreign = copy("local")
    for name in ("../victim", ".git/hooks/post-checkout", ".GIT/config", "sub/../../victim"):
        with pytest.raises(PublishError, match="cannot be checked out"):
            restore_commit_with(foreign, {name: "100644"})
    assert not (foreign.repository.parent / "victim").exists()
    assert not (foreign.git_folder / "hooks").exists()


@pytest.mark.parametrize("mode", sampled(["120000", "100755", "160000"], "120000"))
def test_a_commit_with_links_or_programs_is_not_checked_out(copy: Callable[[str], Foreign], mode: str) -> None:
    foreign = copy("local")
    with pytest.raises(PublishError, match="is no ordinary file"):
        restore_commit_with(foreign, {"odd": mode})
    assert foreign.use() == []


def test_nothing_is_written_through_a_link_in_the_worktree(copy: Callable[[str], Foreign]) -> None:
    """Ignored files are no edits of the worktree: such a link is clean to `git status`."""
    foreign = copy("local")
    elsewhere = foreign.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "profile").write_text("somebody's")
    (foreign.repository / "sub").symlink_to(elsewhere)
    (foreign.repository / ".gitignore").write_text("sub\n.gitignore\n")
    with pytest.raises(PublishError, match="a folder of main is a link"):
        restore_commit_with(foreign, {"sub/profile": "100644"})
    assert (elsewhere / "profile").read_text() == "somebody's"


def restore_commit_with(foreign: Foreign, files: Mapping[str, str]) -> None:
    """Make a commit before main's head with files of any name and mode, which no git would, and go back to it."""
    tree = None
    for name, mode in files.items():
        parts = name.split("/")
        entry_id = git("rev-parse", "main:README.md", cwd=foreign.repository).strip()
        if mode == "160000":
            entry_id = heads(foreign.repository)["main"]
        for depth, part in enumerate(reversed(parts)):
            data = f"{'40000' if depth else mode} {part}\0".encode() + bytes.fromhex(entry_id)
            (foreign.folder / "tree").write_bytes(data)
            entry_id = git("hash-object", "--literally", "-t", "tree", "-w", str(foreign.folder / "tree"),
                           cwd=foreign.repository).strip()  # fmt: skip
        tree = entry_id
    head = heads(foreign.repository)["main"]
    odd = git("commit-tree", str(tree), "-p", head, "-m", "odd", cwd=foreign.repository).strip()
    above = git("commit-tree", f"{head}^{{tree}}", "-p", odd, "-m", "above", cwd=foreign.repository).strip()
    git("update-ref", "refs/heads/main", above, cwd=foreign.repository)
    try:
        rollback(foreign.target(), RollbackRequest(branches=("main",), to=odd), print)
    finally:
        assert heads(foreign.repository)["main"] == above
        git("update-ref", "refs/heads/main", head, cwd=foreign.repository)


def test_a_branch_that_is_named_like_an_option_is_no_option(copy: Callable[[str], Foreign]) -> None:
    foreign = copy("local")
    victim = foreign.folder / "victim"
    victim.write_text("somebody's")
    git("update-ref", f"refs/heads/--output={victim}", "main", cwd=foreign.repository)
    states = foreign.target().read_branches()
    for branch, state in states.items():
        assert foreign.target().history(branch)[0].commit == state.commit
    assert len(states) == 3
    assert victim.read_text() == "somebody's"


@pytest.mark.parametrize("kind", ["local", "bare"])
@pytest.mark.parametrize("name", ["HEAD", "config", "index", "info", "lfs", "objects", "packed-refs", "refs", "logs"])
@pytest.mark.parametrize("form", ["link", "pipe"])
def test_a_repository_that_leads_elsewhere_is_refused(
    copy: Callable[[str], Foreign], kind: str, name: str, form: str
) -> None:
    foreign = copy(kind)
    path, elsewhere = foreign.git_folder / name, foreign.folder / "elsewhere"
    if path.exists():
        path.rename(elsewhere)
    else:
        elsewhere.mkdir()
    path.symlink_to(elsewhere) if form == "link" else os.mkfifo(path)
    before = sorted(elsewhere.rglob("*"))
    errors = foreign.use()
    assert all("where git expects a file or a folder" in error or "not a git repository" in error for error in errors)
    assert all(str(foreign.git_folder) in error for error in errors)
    assert len(errors) == 8
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize("kind", ["local", "bare"])
def test_objects_of_another_folder_are_refused(copy: Callable[[str], Foreign], kind: str) -> None:
    foreign = copy(kind)
    alternates = foreign.git_folder / "objects" / "info" / "alternates"
    alternates.parent.mkdir(exist_ok=True)
    alternates.write_text("/somebody/objects\n")
    foreign.set({"core.alternateRefsCommand": "{canary}"})
    errors = foreign.use()
    assert len(errors) == 8
    assert all("takes objects from another folder" in error and str(alternates) in error for error in errors)
    assert foreign.ran() == ""


JOURNALS = [
    "", "[]", "{}", "[" * 100_000, '{"checkout": []}', '{"checkout": {"old": "--output=x", "new": "y"}}',
    '{"checkout": {"old": 1, "new": 2}}', '{"checkout": {"new": "", "old": null, "more": 1}}',
]  # fmt: skip


@pytest.mark.parametrize("text", sampled(JOURNALS, JOURNALS[3], JOURNALS[5]), ids=range(8))
def test_a_journal_of_any_content_is_one_error(copy: Callable[[str], Foreign], text: str) -> None:
    foreign = copy("local")
    (foreign.git_folder / "packager-publishing.json").write_text(text)
    errors = foreign.use()
    assert errors
    assert all("the journal of an unfinished publish is damaged" in error for error in errors)


def test_a_nested_repository_runs_nothing(copy: Callable[[str], Foreign]) -> None:
    """`git status` starts git in every submodule, which obeys the submodule's own settings."""
    foreign = copy("local")
    nested = foreign.repository / "nested"
    git("init", "--quiet", str(nested))
    git("commit", "--quiet", "--allow-empty", "--message", "x", cwd=nested)
    git("config", "filter.x.clean", str(foreign.canary), cwd=nested)
    git("config", "core.fsmonitor", str(foreign.canary), cwd=nested)
    (nested / ".git" / "info" / "attributes").write_text("* filter=x\n")
    (nested / "file").write_text("x")
    commit = git("rev-parse", "HEAD", cwd=nested).strip()
    git("update-index", "--add", "--cacheinfo", f"160000,{commit},nested", cwd=foreign.repository)
    git("commit", "--quiet", "--message", "nested", cwd=foreign.repository)
    run_plain_git(foreign, "status")
    assert foreign.ran()
    foreign.traces.unlink()
    foreign.use()
    assert foreign.ran() == ""


@pytest.mark.parametrize(
    "address",
    ["ext::sh -c 'touch x'", "fd::7", "-oProxyCommand=x:y", "-oProxyCommand=x@host:y", "ssh://-oProxyCommand=x/y",
     "ssh://-oProxyCommand=x@host/y", "host::x"],
)  # fmt: skip
def test_an_address_that_is_a_program_or_an_option_is_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(PublishError):
        GitTarget(address, tmp_path / "staging")
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize("kind", sampled(["local", "bare"], "local"))
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[core", "the repository's configuration cannot be read"),
        ("[extensions]\n\trefStorage = reftable\n", "keeps its refs in the format reftable"),
        ("[extensions]\n\tobjectFormat = sha256\n", "object format is sha256"),
        ("[extensions]\n\tcompatObjectFormat = sha256\n", "extensions.compatobjectformat"),
        ("[extensions]\n\tunheardOf\n", "extensions.unheardof"),
        ("[core]\n\trepositoryFormatVersion = 2\n", "core.repositoryFormatVersion is 2"),
        ("#" * (1 << 20) + "\n", "more than 1,048,576 bytes"),
    ],
    ids=["broken", "reftable", "sha256", "two formats", "unknown", "version", "large"],
)
def test_a_format_that_a_view_does_not_read_is_named(
    copy: Callable[[str], Foreign], kind: str, text: str, named: str
) -> None:
    foreign = copy(kind)
    with (foreign.git_folder / "config").open("a") as stream:
        stream.write(text)
    errors = foreign.use()
    assert len(errors) == 8
    assert all(named in error and str(foreign.repository) in error for error in errors), errors[0]


def test_who_may_read_new_files_stays_as_the_repository_says(copy: Callable[[str], Foreign]) -> None:
    foreign = copy("local")
    foreign.set({"core.sharedRepository": "0660", "include.path": "/dev/zero"})
    before = set((foreign.git_folder / "objects").rglob("*"))
    assert foreign.use() == []
    made = [path for path in (foreign.git_folder / "objects").rglob("*") if path not in before and path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o440}


def test_git_s_words_name_the_repository_and_not_the_view(copy: Callable[[str], Foreign]) -> None:
    foreign = copy("local")
    (foreign.git_folder / "refs" / "heads" / "main.lock").touch()
    files = check_folders(foreign.contents)["main"]
    with pytest.raises(PublishError) as caught:
        foreign.target().commit("main", files, parent=heads(foreign.repository)["main"], message="x")
    assert str(foreign.git_folder / "refs" / "heads" / "main.lock") in str(caught.value)
    assert "packager-view" not in str(caught.value)


def test_no_view_is_left(copy: Callable[[str], Foreign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = copy("local")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    target = foreign.target()
    assert len(target.read_branches()) == 2
    assert [path.name[:14] for path in temporary.iterdir()] == ["packager-view-"]
    del target
    assert list(temporary.iterdir()) == []
