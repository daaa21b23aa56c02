"""Views of repositories that others may have written: their objects and refs, under a configuration of ours.

A repository's own configuration, hooks, attributes and excludes name programs that git runs, other folders and hosts.
Git therefore never opens such a repository. It opens a view: a folder with a configuration of ours and links to the
objects and refs. Only the settings of how objects are stored are read from the repository's configuration, by
`git config --file`, which obeys nothing. docs/decisions/0010-git-through-views.md has the reasons.
"""

import os
import re
import shutil
import stat
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packager.errors import PackagerError, PublishError
from packager.publish.targets.git_process import GitProcess
from packager.system.files import disk_errors
from packager.system.scratch import ScratchFolder
from packager.system.text import printable

# Blobs hold the bytes of the files: no changes of line ends, filters or encodings, whatever a branch's .gitattributes.
ATTRIBUTES = b"* -text -filter -ident -working-tree-encoding\n"
_ALWAYS_LINKED = ("objects", "packed-refs", "refs")
_LINKED = (*_ALWAYS_LINKED, "logs", "shallow", "worktrees")  # the last three only where they exist
# What git or this package opens.
_OPENED = ("HEAD", "config", "index", "info", "lfs", "packager-publishing.json", "packager-pushing", *_LINKED)
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEAD_BYTES = 4096
_SETTINGS = """[core]
\trepositoryFormatVersion = 0
\tattributesFile = /dev/null
\tcommitGraph = false
\texcludesFile = /dev/null
\tfsmonitor = false
\thooksPath = /dev/null
\tmultiPackIndex = false
[gc]
\tauto = 0
[maintenance]
\tauto = false
[protocol]
\tallow = never
[receive]
\tautogc = false
"""
# The settings that a view takes over: who may read new files, and how a push is stored or refused.
_KEPT = {
    "core.bare": r"true|false",
    "core.ignorecase": r"true|false",
    "core.logallrefupdates": r"true|false|always",
    "core.sharedrepository": r"group|true|all|world|everybody|umask|false|0[0-7]{3}",
    "receive.denycurrentbranch": r"refuse|warn|ignore",
    "receive.unpacklimit": r"\d{1,9}",
    "transfer.unpacklimit": r"\d{1,9}",
}
# Extensions that change nothing about objects and refs. A view knows no others.
_EXTENSIONS = {
    "extensions.noop",
    "extensions.noop-v1",
    "extensions.preciousobjects",
    "extensions.relativeworktrees",
    "extensions.submodulepathconfig",
    "extensions.worktreeconfig",
}
# Of the repositories that we make: a push to the branch that is checked out changes its files, or is refused if they
# are not those of its head. The owner's git obeys it; a view, which has no worktree, does not take it over.
PUSHES = b"[receive]\n\tdenyCurrentBranch = updateInstead\n"
# The configuration that `git init` writes, and ours: it needs no process of git's to be read.
_AS_MADE = re.compile(rb"(\[core\]\n(\t[A-Za-z]+ = [a-z0-9]+\n)*)?(" + re.escape(PUSHES) + rb")?")
_PUSH_HOOKS = (
    "pre-receive",
    "update",
    "proc-receive",
    "post-receive",
    "post-update",
    "push-to-checkout",
    "reference-transaction",
)
_MOVE_AWAY = "move it away, or publish under another root or repository id"


@dataclass(frozen=True, kw_only=True)
class _Config:
    """A configuration file's bytes and its entries by key, section and name in lower case."""

    data: bytes
    entries: Mapping[str, str]


class GitView:
    """A git folder of ours for one repository.

    Args:
        repository: the repository's git folder: its `.git`, or the folder itself if it is bare.
        folder: where the view lies; made by `lay`.
    """

    def __init__(self, repository: Path, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self._config = _Config(data=b"", entries={})

    def lay(self, git: GitProcess) -> None:
        """Make the view, or bring it up to date; the repository is not written.

        Args:
            git: runs git in the view; starts one process if the repository's configuration is new.

        Raises:
            PublishError: this is not a repository, or one that cannot be used without its own settings.
        """
        require_plain(self.repository)
        with disk_errors(self.folder):
            self._lay_out()
        data = _read_bounded(self.repository / "config", _MAX_CONFIG_BYTES)
        if data != self._config.data:
            self._config = _Config(data=data, entries=_read_entries(git, self.repository / "config", data))
        _check_format(self._config.entries, str(self.repository))
        with disk_errors(self.folder):
            self._write("config", (_SETTINGS + self._kept()).encode())

    def require_no_hooks(self) -> None:
        """Raise PublishError if a push into the repository would run a hook; a view runs none."""
        hooks = [self.repository / "hooks" / name for name in _PUSH_HOOKS]
        found = [path.name for path in hooks if os.access(path, os.X_OK)]
        found += [key for key in self._config.entries if re.fullmatch(r"core\.hookspath|hook\..*\.command", key)]
        if found:
            raise PublishError(
                f"the repository has a hook, {printable(found[0])}, which packager does not run",
                where=str(self.repository),
                why="a folder may have been unpacked or shared, and its hooks are programs of whoever wrote it",
                hint="publish through a server (ssh or https), which runs the hook itself; or remove the hook",
            )

    def _lay_out(self) -> None:
        """Make the folder, its links and all its files but the final configuration."""
        repository = self.repository.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        links = {name for name in _LINKED if name in _ALWAYS_LINKED or (repository / name).exists()}
        for path in self.folder.iterdir():
            if path.name in links:
                correct = path.is_symlink() and path.readlink() == repository / path.name
            else:
                correct = path.name in ("HEAD", "config", "info") and not path.is_symlink()
            if not correct:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in links:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(repository / name)
        self._write("HEAD", _read_bounded(repository / "HEAD", _MAX_HEAD_BYTES))
        self._write("info/attributes", ATTRIBUTES)
        if not (self.folder / "config").exists():
            self._write("config", _SETTINGS.encode())

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            path.write_bytes(data)

    def _kept(self) -> str:
        bare = "false" if self.repository.name == ".git" else "true"
        found = {"core.bare": bare, **self._config.entries}
        lines = []
        for key, pattern in _KEPT.items():
            if re.fullmatch(pattern, value := found.get(key, "").lower()):
                section, name = key.split(".")
                lines.append(f"[{section}]\n\t{name} = {value}\n")
        return "".join(lines)


class ViewedGit(GitProcess):
    """Runs git for a repository with its worktree, through a view in a temporary folder.

    The first command lays the view; `look` lays it again, after which git sees the repository's present HEAD.
    """

    def __init__(self, worktree: Path) -> None:
        super().__init__(worktree)
        self._view: GitView | None = None

    def look(self) -> None:
        """Lay the view, or bring it up to date.

        Raises:
            PublishError: as `GitView.lay`.
        """
        if self._view is None:
            require_plain(self.git_folder)
            scratch = ScratchFolder("view")
            weakref.finalize(self, scratch.remove)
            self._view, self.git_dir = GitView(self.git_folder, scratch.path), scratch.path
        try:
            self._view.lay(self)
        except PackagerError:
            self._view = None  # the next command lays it, or fails in the same way
            raise

    def _environment(self, **extra: str) -> dict[str, str]:
        if self._view is None:
            self.look()
        return super()._environment(**extra)


def require_plain(repository: Path) -> None:
    """Raise unless a git folder is one, and holds nothing that leads out of it.

    Raises:
        PublishError: the folder is not a git folder; a part that git opens is a link, a pipe or a device; or objects
            come from another folder.
    """
    modes = {name: _mode(repository / name) for name in ("", "HEAD", "objects", "refs")}
    if not all(stat.S_ISLNK(mode) or (stat.S_ISREG if name == "HEAD" else stat.S_ISDIR)(mode)
               for name, mode in modes.items()):  # fmt: skip
        what = "the path holds something that is not a git repository"
        raise PublishError(what, where=str(repository), hint=_MOVE_AWAY)
    opened = {str(repository / name): mode for name in _OPENED if (mode := _mode(repository / name))}
    strange = [path for path, mode in opened.items() if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)]
    waiting = [path for path, mode in opened.items() if stat.S_ISDIR(mode)]
    if stat.S_ISLNK(modes[""]):
        strange.insert(0, str(repository))
    with disk_errors(repository):
        while waiting and not strange:
            folders, strange = _entries(waiting.pop())
            waiting += folders
    if strange:
        raise PublishError(
            "the repository has a link, a pipe or a device where git expects a file or a folder",
            where=printable(strange[0]),
            why="git would follow it to another place, or wait for it",
            hint="put an ordinary file or folder there, or publish to another repository",
        )
    if _mode(alternates := repository / "objects" / "info" / "alternates"):
        raise PublishError(
            "the repository takes objects from another folder",
            where=str(alternates),
            why="what such a folder holds, and who writes it, is not known here",
            hint=f"git -C '{repository}' repack -a -d, then delete that file",
        )


def _entries(folder: str) -> tuple[list[str], list[str]]:
    """Return the folders in a folder, and what is neither a folder nor an ordinary file."""
    folders: list[str] = []
    strange: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False) and os.path.lexists(entry.path):
                    strange.append(entry.path)
    except FileNotFoundError:  # a git process removes its own folders at any time
        pass
    return folders, strange


def _mode(path: Path) -> int:
    """Return a path's type and permissions without following links, 0 if it does not exist."""
    try:
        return path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _read_bounded(path: Path, max_bytes: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except FileNotFoundError:
        return b""
    if len(data) > max_bytes:
        raise PublishError(f"the file has more than {max_bytes:,} bytes", where=str(path), hint=_MOVE_AWAY)
    return data


def _read_entries(git: GitProcess, path: Path, data: bytes) -> Mapping[str, str]:
    """Return the entries of a configuration file; the last one of a key counts, includes are not followed."""
    if _AS_MADE.fullmatch(data):
        lines = data.removesuffix(PUSHES).decode().splitlines()[1:]
        return {f"core.{key.strip().lower()}": value.strip() for key, value in (line.split("=") for line in lines)}
    result = git.attempt("config", "--file", "-", "--no-includes", "--null", "--list", stdin=data)
    if result.status:
        what = "the repository's configuration cannot be read"
        raise PublishError(what, where=str(path), why=result.stderr, hint="git config --list --file shows the line")
    pairs = (entry.partition("\n") for entry in result.output.split("\0") if entry)
    return {key: value if separator else "true" for key, separator, value in pairs}


def _check_format(entries: Mapping[str, str], where: str) -> None:
    """Raise PublishError if the repository's configuration names a format that a view does not read."""
    version = entries.get("core.repositoryformatversion", "0")
    object_format = entries.get("extensions.objectformat", "sha1").lower()
    storage = entries.get("extensions.refstorage", "files").lower()
    what = ""
    if object_format != "sha1":
        what = f"the repository's object format is {printable(object_format)}, not sha1"
    elif storage != "files":
        what = f"the repository keeps its refs in the format {printable(storage)}, not in files"
    elif version not in ("0", "1"):
        what = f"the repository's core.repositoryFormatVersion is {printable(version)}, not 0 or 1"
    known = {"extensions.objectformat", "extensions.refstorage", *_EXTENSIONS}
    unknown = sorted(key for key in entries if key.startswith("extensions.") and key not in known)
    if unknown and not what:
        what = f"the repository needs {printable(unknown[0])}, which packager does not use"
    if what:
        raise PublishError(what, where=where, hint=_MOVE_AWAY)
