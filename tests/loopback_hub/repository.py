"""A repository of a model or dataset: a bare git repository, its large files, and the settings the Hub keeps beside."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from tests.loopback_hub.messages import RefusedError

NOTHING = "0" * 40  # git's name for "this reference must not exist"
REPO_ID = re.compile(r"(?:datasets/)?[\w-][\w.-]*/[\w-][\w.-]*")
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
_MAX_POINTER_BYTES = 200
_LFS_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx
    *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
    *.wasm *.xz *.zip *.zst *tfevents*
"""
_GITATTRIBUTES = "".join(f"{pattern} {LFS_ATTRIBUTES}\n" for pattern in _LFS_PATTERNS.split()).encode()


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; `sha256` and the bytes' own size for an LFS file."""

    path: str
    kind: Literal["blob", "tree"]
    oid: str
    size: int
    pointer_size: int = 0
    sha256: str = ""

    def described(self) -> dict[str, Any]:
        """Return it as the Hub lists it."""
        kind = "directory" if self.kind == "tree" else "file"
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size} if self.sha256 else None
        return {"type": kind, "oid": self.oid, "size": self.size, **({"lfs": lfs} if lfs else {}), "path": self.path}


class Repository:
    """A bare git repository with an LFS store, and the few settings the Hub keeps beside it (hub.json)."""

    def __init__(self, repo_id: str, path: Path) -> None:
        self.id = repo_id
        self.path = path
        self.lock = threading.Lock()
        # What never changes is asked of git once: a process takes longer than all else in a request.
        self._entries: dict[str, list[Entry]] = {}
        self._commits: set[str] = set()
        self._blobs: dict[str, bytes] = {}
        self._tracked: dict[tuple[bytes, tuple[str, ...]], set[str]] = {}
        self._logs: dict[tuple[str, ...], str] = {}

    @classmethod
    def create(cls, repo_id: str, path: Path, *, user: str, private: bool) -> None:
        """Make a repository whose first commit holds .gitattributes only; it appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = cls(repo_id, path.parent / f".{uuid4().hex}")
        command = ["git", "init", "--quiet", "--bare", "--initial-branch=main", "--template=", str(hidden.path)]
        subprocess.run(command, check=True)
        hidden.settings = {"private": private, "gated": False, "createdAt": date(time.time())}
        with hidden.lock:
            hidden.write(None, "main", [(".gitattributes", _GITATTRIBUTES)], message="initial commit", user=user)
        try:
            hidden.path.rename(path)
        except OSError as error:  # another repository is there, and not empty
            shutil.rmtree(hidden.path)
            raise FileExistsError(path) from error

    @property
    def settings(self) -> dict[str, Any]:
        """The visibility and the gate."""
        return dict(json.loads((self.path / "hub.json").read_text(encoding="utf-8")))

    @settings.setter
    def settings(self, settings: Mapping[str, Any]) -> None:
        write_whole(self.path / "hub.json", json.dumps(settings).encode())

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        """Run git in the repository without the user's settings; return its output."""
        command = ["git", f"--git-dir={self.path}", *arguments]
        alone = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        return subprocess.run(command, input=stdin, env=alone, check=True, capture_output=True).stdout

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, a tag, a reference or a (shortened) commit id."""
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if revision.startswith("refs/") or re.fullmatch("[0-9a-f]{7,40}", revision):
            names = [revision] if len(revision) == len(NOTHING) else [*names, revision]
        for name in names:
            if commit := name if name in self._commits else self._loose_branch(name):
                return commit
            try:
                found = self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
            except subprocess.CalledProcessError:
                continue
            commit = found.decode().strip()
            self._commits.add(commit)
            return commit
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def _loose_branch(self, reference: str) -> str:
        """Return the commit that a branch's own file names, "" where git keeps the branch in another way."""
        if not reference.startswith("refs/heads/") or ".." in reference:
            return ""
        try:
            text = (self.path / reference).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return ""
        return text if re.fullmatch("[0-9a-f]{40}", text) else ""

    def head(self, branch: str) -> str:
        """Return the commit that a branch points to."""
        commit = self.references().get(f"refs/heads/{branch}")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return commit

    def references(self) -> dict[str, str]:
        """Return the commit of each branch and tag by full name."""
        command = ("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", "refs/heads", "refs/tags")
        lines = [line.split() for line in self.git(*command).decode().splitlines()]
        return {name: oids[-1] for name, *oids in lines}

    def point(self, reference: str, commit: str, old: str) -> None:
        """Move a reference from `old`; git refuses if it has moved."""
        self.git("update-ref", reference, commit, old)

    def entries(self, commit: str) -> list[Entry]:
        """List every file and folder of a commit, in git's order."""
        if commit not in self._entries:
            lines = self.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]
            fields = [(*line.split("\t", 1)[0].split(), line.split("\t", 1)[1]) for line in lines]
            small = [oid for _, _, oid, size, _ in fields if size != "-" and int(size) <= _MAX_POINTER_BYTES]
            pointers = self._pointers(small)
            self._entries[commit] = [_entry(path, kind, oid, size, pointers) for _, kind, oid, size, path in fields]
        return self._entries[commit]

    def files(self, commit: str) -> dict[str, Entry]:
        """Return the files of a commit by path."""
        return {entry.path: entry for entry in self.entries(commit) if entry.kind == "blob"}

    def blob(self, oid: str) -> bytes:
        """Return git's object of an id."""
        if oid not in self._blobs:
            self._blobs[oid] = self.git("cat-file", "blob", oid)
        return self._blobs[oid]

    def _pointers(self, oids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return the sha256 and the size that those of the blobs name which are LFS pointers."""
        if new := [oid for oid in oids if oid not in self._blobs]:
            output = self.git("cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in new).encode())
            for oid in new:
                header, _, rest = output.partition(b"\n")
                size = int(header.split()[-1])
                self._blobs[oid] = rest[:size]
                output = rest[size + 1 :]
        matches = {oid: match for oid in oids if (match := _POINTER.fullmatch(self._blobs[oid]))}
        return {oid: (match[1].decode(), int(match[2])) for oid, match in matches.items()}

    def lfs_tracked(self, attributes: bytes, paths: Sequence[str]) -> set[str]:
        """Return the paths that the root's .gitattributes assigns to LFS; those of folders are ignored."""
        key = (attributes, tuple(paths))
        if key not in self._tracked:
            with tempfile.NamedTemporaryFile(dir=self.path) as file:
                file.write(attributes)
                file.flush()
                command = ("-c", f"core.attributesFile={file.name}", "check-attr", "-z", "--stdin", "filter")
                words = self.git(*command, stdin="".join(f"{path}\0" for path in paths).encode()).decode().split("\0")
            self._tracked[key] = {path for path, value in zip(words[::3], words[2::3], strict=False) if value == "lfs"}
        return self._tracked[key]

    def write(
        self, head: str | None, branch: str, changes: Iterable[tuple[str, bytes | None]], *, message: str, user: str
    ) -> str:
        """Commit changes (None deletes) upon `head` and move the branch from there to it; the lock is held."""
        aside = f"refs/loopback/{uuid4().hex}"  # fast-import wants a reference, and would not compare and swap
        who = f"{user} <{user}@users.noreply.loopback> {int(time.time())} +0000"
        text = message.encode()
        stream = [f"commit {aside}\nmark :1\nauthor {who}\ncommitter {who}\ndata {len(text)}\n".encode(), text, b"\n"]
        stream += [f"from {head}\n".encode()] if head else []
        for path, content in changes:
            if content is None:
                stream.append(f"D {path}\n".encode())
            else:
                stream += [f"M 100644 inline {path}\ndata {len(content)}\n".encode(), content, b"\n"]
        stream.append(b"get-mark :1\ndone\n")
        commit = self.git("fast-import", "--quiet", "--done", stdin=b"".join(stream)).decode().strip()
        moves = f"update refs/heads/{branch} {commit} {head or NOTHING}\ndelete {aside}\n"
        self.git("update-ref", "--stdin", stdin=moves.encode())
        return commit

    def log(self, commit: str, *more: str) -> list[tuple[str, str, str, str, str]]:
        """Return id, author, date, title and message of the commits, newest first."""
        if (key := (commit, *more)) not in self._logs:
            self._logs[key] = self.git("log", "-z", "--format=%H%x01%an%x01%ct%x01%s%x01%b", commit, *more).decode()
        lines = self._logs[key]
        commits = (line.split("\x01") for line in lines.split("\0") if line)
        return [(oid, author, date(int(when)), title, text.strip()) for oid, author, when, title, text in commits]

    def lfs_object(self, sha256: str) -> Path:
        """Return the path of an LFS object, stored or not."""
        return self.path / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def store(self, sha256: str, blocks: Iterable[bytes]) -> None:
        """Keep an LFS object if the digest of its bytes is its name."""
        target = self.lfs_object(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        unfinished = target.with_name(f".{uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                for block in blocks:
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != sha256:
                raise RefusedError(400, f"The bytes of {sha256} hash to {digest.hexdigest()}")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def part(self, sha256: str, number: int) -> Path:
        """Return the path of a part of an LFS object, stored or not."""
        return self.path / "lfs" / "incomplete" / sha256 / str(number)


def _entry(path: str, kind: str, oid: str, size: str, pointers: Mapping[str, tuple[str, int]]) -> Entry:
    if kind == "tree":
        return Entry(path, "tree", oid, 0)
    if oid in pointers:
        sha256, stored = pointers[oid]
        return Entry(path, "blob", oid, stored, int(size), sha256)
    return Entry(path, "blob", oid, int(size))


def date(when: float) -> str:
    """Write a time as the Hub does."""
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    unfinished = path.with_name(f".{uuid4().hex}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
