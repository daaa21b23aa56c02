"""Git without the user's settings: a commit depends on the files alone.

Every process gets the repository, the identity and the settings through its environment. That overrides the global and
system configuration (autocrlf, signing, hooks, templates, filters) and the GIT_* variables of the caller. GitPython
starts the executable; it is imported on first use (`git_program`).
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from packager.errors import MachineError, PackagerError, PublishError
from packager.publish.targets import CommitRecord, HeadMovedError, LocalFile, StoredFile, changed_error
from packager.publish.targets.git_program import find_git, missing_git
from packager.system.files import TEMPORARY_PREFIX, atomic_file, failed_for_space

if TYPE_CHECKING:
    from git.cmd import Git

AUTHOR_NAME = "gptq-packager"
AUTHOR_EMAIL = "gptq-packager@localhost.invalid"  # RFC 2606: no mailbox can have it
_CHUNK_BYTES = 1 << 20
NO_COMMIT = "0" * 40
_ORDINARY_FILE = "100644"

_SETTINGS = {
    "core.attributesFile": "/dev/null",
    "core.autocrlf": "false",
    "core.bare": "false",
    "core.commitGraph": "false",  # a file beside the objects, whose parents may differ from those of the commits
    # Packed weights do not deflate: 8 MB take 0.45 s at the default level and 0.10 s stored, in the same space.
    "core.compression": "0",
    "core.excludesFile": "/dev/null",
    "core.fileMode": "false",
    "core.fsmonitor": "false",
    "core.fsync": "committed,loose-object,reference",
    "core.hooksPath": "/dev/null",
    "core.multiPackIndex": "false",
    "core.precomposeUnicode": "false",
    "core.quotePath": "false",
    "gc.auto": "0",
}


@dataclass(frozen=True, kw_only=True)
class CommandResult:
    """The result of a git command: exit status, standard output and standard error."""

    status: int
    output: str
    stderr: str


class GitProcess:
    """Runs git for one repository, an ordinary one with its worktree.

    Args:
        worktree: the folder that holds `.git`; it need not exist yet.
        settings: more configuration, which overrides the settings of this module.
        environment: more variables.
        secrets: texts to remove from git's error output.
    """

    def __init__(
        self,
        worktree: Path,
        *,
        settings: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        secrets: Collection[str] = (),
    ) -> None:
        self.worktree = worktree.absolute()
        self.git_folder = self.worktree / ".git"
        self.git_dir = self.git_folder  # what git opens: a subclass puts a view of the folder here
        self._settings = {**_SETTINGS, **(settings or {})}
        self._variables = dict(environment or {})
        self._secrets = sorted(secrets, key=len, reverse=True)
        self._git: Git | None = None
        self._files: dict[str, Mapping[str, StoredFile]] = {}

    def run(self, *arguments: str, stdin: bytes = b"", index: Path | None = None) -> str:
        """Run one git command and return its standard output.

        Args:
            arguments: the subcommand and its arguments.
            stdin: the command's standard input.
            index: an index file to use instead of the repository's own.

        Raises:
            MachineError: no usable git, no space, no permission.
            PublishError: git failed; the message has its error output.
        """
        result = self.attempt(*arguments, stdin=stdin, index=index)
        if result.status:
            raise self._refusal(arguments, result.stderr)
        return result.output

    def attempt(
        self, *arguments: str, stdin: bytes = b"", index: Path | None = None, discard: bool = False
    ) -> CommandResult:
        """Run one git command as `run` does and return its result; `discard` drops its standard output.

        Raises:
            MachineError: no usable git.
        """
        from git.exc import GitCommandNotFound

        git = self._checked()
        extra = {"GIT_INDEX_FILE": str(index)} if index else {}
        with tempfile.TemporaryFile() as reader, Path(os.devnull).open("wb") as nowhere:
            reader.write(stdin)
            reader.seek(0)
            try:
                status, output, stderr = git.execute(
                    [str(git.GIT_PYTHON_GIT_EXECUTABLE), *arguments],
                    istream=reader,
                    env=self._environment(**extra),
                    output_stream=nowhere if discard else None,
                    with_extended_output=True,
                    with_exceptions=False,
                    stdout_as_string=False,
                    strip_newline_in_stdout=False,
                )
            except GitCommandNotFound as error:
                raise missing_git(error) from error
        text = "" if discard else output.decode("utf-8", "backslashreplace")
        return CommandResult(status=status, output=text, stderr=self._scrubbed(stderr))

    def _scrubbed(self, stderr: str | bytes) -> str:
        text = stderr.decode("utf-8", "backslashreplace") if isinstance(stderr, bytes) else stderr
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.replace(str(self.git_dir), str(self.git_folder)).strip()

    def hashed(self, files: Mapping[str, StoredFile]) -> Mapping[str, StoredFile]:
        """Return the files, each that has a blob with the sha256 of that blob's content, computed now.

        Raises:
            PublishError: the repository lacks a blob, or git cannot read it.
        """
        digests = self._digests({file.blob_id for file in files.values() if file.blob_id})
        return {
            name: replace(file, sha256=digests[file.blob_id]) if file.blob_id else file for name, file in files.items()
        }

    def _digests(self, blob_ids: Collection[str]) -> Mapping[str, str]:
        """Return the sha256 of each blob's content."""
        digests: dict[str, str] = {}
        if not blob_ids:
            return digests
        # One process for all files: starting git takes longer than reading a small file.
        requests = "".join(f"{blob_id}\n" for blob_id in blob_ids).encode()
        with self._reader("cat-file", "--batch", "--buffer", stdin=requests) as stream:
            for blob_id in blob_ids:
                # "<blob id> blob <bytes>", the content and a line feed; or "<blob id> missing", or the end.
                header = stream.readline().decode("utf-8", "backslashreplace").split()
                digest = _take_sha256(stream, int(header[2])) if header[:2] == [blob_id, "blob"] else ""
                if not digest:
                    # If git ended with an error, its standard error has the reason.
                    stream.read()
                    break
                digests[blob_id] = digest
        if lacking := [blob_id for blob_id in blob_ids if blob_id not in digests]:
            raise PublishError(f"the repository does not give the blob {lacking[0]}", where=str(self.worktree))
        return digests

    def read_blob(self, blob_id: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a stored file's content, or a part of it."""
        with self._reader("cat-file", "blob", blob_id) as stream:
            stream.read(start)
            part = stream.read() if size is None else stream.read(size)
            while stream.read(_CHUNK_BYTES):
                pass
        return part

    def export_blob(self, blob_id: str, path: Path) -> None:
        """Write a stored file's content to `path`, whole or not at all."""
        # In this order git's exit status is checked before the file appears.
        with atomic_file(path) as writer, self._reader("cat-file", "blob", blob_id) as stream:
            shutil.copyfileobj(stream, writer, _CHUNK_BYTES)

    def heads(self, namespace: str = "refs/heads") -> Mapping[str, tuple[str, str]]:
        """Return each branch's head commit and its committer, "" if this program made the commit."""
        pattern = "--format=%(objectname) %(refname:lstrip=2) %(committername) %(committeremail)"
        heads = {}
        for line in self.run("for-each-ref", pattern, namespace).splitlines():
            commit, branch, committer = line.split(" ", 2)
            heads[branch] = (commit, _foreign(committer))
        return heads

    def files(self, commit: str | None) -> Mapping[str, StoredFile]:
        """Return a commit's files by name, none for None. The files of a commit never change: they are cached.

        Raises:
            PublishError: git cannot read a file's size.
        """
        if commit is None or commit in self._files:
            return self._files[commit] if commit else {}
        files = {}
        for entry in self.run("ls-tree", "-r", "-z", "--long", "--full-tree", commit).split("\0")[:-1]:
            facts, name = entry.split("\t", 1)
            mode, _, blob_id, size = facts.split()
            ordinary = mode == _ORDINARY_FILE
            if ordinary and not size.isdecimal():  # "BAD"
                what, hint = f"git cannot read the object {blob_id}", "check the repository with git fsck"
                raise PublishError(what, where=str(self.worktree), why="it is missing or damaged", hint=hint)
            files[name] = StoredFile(size_bytes=int(size) if ordinary else 0, blob_id=blob_id if ordinary else "")
        self._files[commit] = files
        return files

    def store(self, files: Mapping[str, LocalFile]) -> None:
        """Write the content of every file that the repository does not hold yet.

        Raises:
            PublishError: a file has changed since it was hashed.
        """
        wanted = {file.blob_id: file.path for file in files.values()}
        answers = self.run("cat-file", "--batch-check", stdin="".join(f"{blob_id}\n" for blob_id in wanted).encode())
        if not (missing := [line.split()[0] for line in answers.splitlines() if line.endswith(" missing")]):
            return
        paths = "".join(f"{wanted[blob_id].absolute()}\n" for blob_id in missing)
        stored = self.run("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=paths.encode()).split()
        for blob_id, found in zip(missing, stored, strict=True):
            if blob_id != found:
                raise changed_error(wanted[blob_id])

    def commit(self, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Make a commit that holds exactly `files`, already stored; no branch moves."""
        return self._commit_tree(self._tree(files), ("-p", parent) if parent else (), message)

    def commit_again(self, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile]) -> str:
        """Make a commit with the files of another commit, some of them replaced; no branch moves."""
        self.store(replacing)
        tree = self._tree(replacing, commit) if replacing else f"{commit}^{{tree}}"
        return self._commit_tree(tree, ("-p", parent), message)

    def _tree(self, files: Mapping[str, LocalFile], commit: str = "") -> str:
        """Return a tree with the files, and those of a commit that they do not replace."""
        entries = "".join(f"{_ORDINARY_FILE} {file.blob_id}\t{name}\0" for name, file in sorted(files.items()))
        with self.scratch_index() as index:
            if commit:
                self.run("read-tree", commit, index=index)
            self.run("update-index", "-z", "--index-info", stdin=entries.encode(), index=index)
            return self.run("write-tree", index=index).strip()

    def _commit_tree(self, tree: str, ancestry: tuple[str, ...], message: str) -> str:
        return self.run("commit-tree", tree, *ancestry, "-F", "-", stdin=f"{message}\n".encode()).strip()

    def history(self, revision: str) -> list[CommitRecord]:
        """Return the commits of a revision's history, first parents only, newest first."""
        # `git log` obeys settings that run programs (log.showSignature); `git rev-list` has none.
        listing = self.run("rev-list", "--first-parent", "--format=%ct%n%cn <%ce>%n%B%x00", revision, "--")
        records = []
        for heading, time_s, committer, message in (entry.split("\n", 3) for entry in listing.split("\0\n")[:-1]):
            commit = heading.removeprefix("commit ")
            title, author, body = message.partition("\n")[0], _foreign(committer), message.rstrip("\n")
            records.append(CommitRecord(commit=commit, author=author, title=title, message=body, time_s=int(time_s)))
        return records

    def move_branch(self, branch: str, commit: str, *, parent: str | None) -> None:
        """Move `branch` from `parent` to `commit`; None as parent means that the branch must not exist.

        Raises:
            HeadMovedError: the branch's head is not `parent`.
            MachineError: no space or no permission.
        """
        arguments = ("update-ref", "-m", "publish", f"refs/heads/{branch}", commit, parent or NO_COMMIT)
        result = self.attempt(*arguments)
        if not result.status:
            return
        error = self._refusal(arguments, result.stderr)
        if isinstance(error, MachineError) or self.heads().get(branch, (None,))[0] == parent:
            raise error
        what, hint = f"{branch} moved while it was being published", "look at the branch, then publish again"
        raise HeadMovedError(what, where=str(self.worktree), why=result.stderr, hint=hint)

    @contextmanager
    def scratch_index(self) -> Iterator[Path]:
        """Yield the path of an index file for one use: a killed run's git may still hold the repository's own."""
        with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self.git_folder) as folder:
            yield Path(folder) / "index"

    @contextmanager
    def _reader(self, *arguments: str, stdin: bytes = b"") -> Iterator[IO[bytes]]:
        """Run one git command and yield its standard output; read it to the end.

        Raises:
            PublishError: git failed.
        """
        from git.exc import GitCommandError

        git = self._checked()
        command = [str(git.GIT_PYTHON_GIT_EXECUTABLE), *arguments]
        with tempfile.TemporaryFile() as requests:
            requests.write(stdin)
            requests.seek(0)
            process = git.execute(command, istream=requests, env=self._environment(), as_process=True)
        try:
            yield process.stdout
            process.wait()
        except GitCommandError as error:
            raise self._refusal(arguments, self._scrubbed(str(error.stderr))) from error
        finally:
            process.stdout.close()
            process.stderr.close()

    def _environment(self, **extra: str) -> dict[str, str]:
        settings = dict(enumerate(self._settings.items()))
        now = f"@{int(time.time())} +0000"
        person = {
            f"GIT_{role}_{key}": value
            for role in ("AUTHOR", "COMMITTER")
            for key, value in (("NAME", AUTHOR_NAME), ("EMAIL", AUTHOR_EMAIL), ("DATE", now))
        }
        return {
            **person,
            **{f"GIT_CONFIG_KEY_{number}": key for number, (key, _) in settings.items()},
            **{f"GIT_CONFIG_VALUE_{number}": value for number, (_, value) in settings.items()},
            "GIT_CONFIG_COUNT": str(len(settings)),
            "GIT_CONFIG_PARAMETERS": "",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_SYSTEM": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_DIR": str(self.git_dir),
            "GIT_WORK_TREE": str(self.worktree),
            "GIT_INDEX_FILE": str(self.git_folder / "index"),
            "GIT_OBJECT_DIRECTORY": str(self.git_folder / "objects"),
            "GIT_ALLOW_PROTOCOL": "none",
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": "",
            "GIT_NAMESPACE": "",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_DEFAULT_HASH": "sha1",
            "GIT_DEFAULT_REF_FORMAT": "files",
            "TZ": "UTC",
            **self._variables,
            **extra,
        }

    def check(self) -> None:
        """Raise a MachineError unless git is installed and recent enough."""
        self._checked()

    def _checked(self) -> "Git":
        if self._git is None:
            self._git = find_git()
        return self._git

    def _refusal(self, arguments: tuple[str, ...], stderr: str) -> PackagerError:
        """Return the error for a command that failed with `stderr`."""
        stderr = stderr.strip() or "git printed no error message"
        where, hint = str(self.worktree), "free some space and run the same command again"
        if failed_for_space(stderr, self.worktree):
            return MachineError("the disk is full", where=where, why=stderr, hint=hint)
        if any(text in stderr for text in ("Permission denied", "Read-only file system", "insufficient permission")):
            return MachineError("the repository cannot be written", where=where, why=stderr)
        return PublishError(f"git {arguments[0]} failed", where=where, why=stderr)


def _foreign(committer: str) -> str:
    """Return a commit's committer, "" if this program made it."""
    return "" if committer == f"{AUTHOR_NAME} <{AUTHOR_EMAIL}>" else committer


def _take_sha256(stream: IO[bytes], size: int) -> str:
    """Read `size` bytes and a line feed, and return the sha256 of the bytes; "" if the stream ends before that."""
    digest = hashlib.sha256()
    while size and (chunk := stream.read(min(size, _CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest() if not size and stream.read(1) == b"\n" else ""
