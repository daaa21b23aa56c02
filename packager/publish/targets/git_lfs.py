"""Files in git-lfs: pointers in a commit's tree, a `.gitattributes` that names them, and a store of objects."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from packager.publish.targets import LocalFile, StoredFile
from packager.publish.targets.git_process import GitProcess
from packager.receipt import GIT_ATTRIBUTES
from packager.system.files import TEMPORARY_PREFIX, copy_atomic, sha256_file

MARK = b"# Written by gptq-packager: the files of this branch that git-lfs keeps.\n"
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
_POINTER_BYTES = 1024  # git-lfs reads no larger file as a pointer


def git_folder(folder: Path) -> Path:
    """Return git's folder of a repository: the folder itself if bare, else its `.git`."""
    return folder / ".git" if (folder / ".git").is_dir() else folder


def object_path(folder: Path, sha256: str) -> Path:
    """Return the path of a git-lfs object in a repository on this machine."""
    return git_folder(folder) / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256


def read_files(git: GitProcess, commit: str) -> Mapping[str, StoredFile]:
    """Return a commit's files: for git-lfs the sizes and digests of the pointers; without our `.gitattributes`."""
    files = dict(git.files(commit))
    pointers = {}
    for name in by_attributes(git, files):
        stored = files[name]
        text = git.read_blob(stored.blob_id) if stored.blob_id and stored.size_bytes <= _POINTER_BYTES else b""
        if found := _POINTER.fullmatch(text):
            pointers[name] = StoredFile(size_bytes=int(found[2]), sha256=found[1].decode())
    own = files.get(GIT_ATTRIBUTES)
    if pointers and own and own.blob_id and git.read_blob(own.blob_id) == attributes(pointers):
        del files[GIT_ATTRIBUTES]
    return {**files, **pointers}


def by_attributes(git: GitProcess, files: Mapping[str, LocalFile] | Mapping[str, StoredFile]) -> set[str]:
    """Return the files that a `.gitattributes` among them assigns to git-lfs; others stay pointers in a clone."""
    entries = "".join(
        f"100644 {file.blob_id}\t{name}\0"
        for name, file in files.items()
        if name.rpartition("/")[2] == GIT_ATTRIBUTES and file.blob_id
    )
    if not entries:
        return set()
    with git.scratch_index() as index:
        git.run("update-index", "-z", "--index-info", stdin=entries.encode(), index=index)
        names = "".join(f"{name}\0" for name in files).encode("utf-8", "surrogateescape")
        arguments = ("check-attr", "-z", "--cached", "--stdin", "filter")
        answers = git.run(*arguments, stdin=names, index=index).split("\0")
    return {name for name, value in zip(answers[0::3], answers[2::3], strict=False) if value == "lfs"}


def is_pointer(data: bytes) -> bool:
    """Return whether a small file's content is a pointer."""
    return _POINTER.fullmatch(data) is not None


def pointer(sha256: str, size_bytes: int) -> bytes:
    """Return the pointer that a tree has instead of a file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def attributes(names: Iterable[str]) -> bytes:
    """Return a `.gitattributes` that assigns exactly these files to git-lfs."""
    return MARK + "".join(f"{attributes_line(name)}\n" for name in sorted(names)).encode()


def attributes_line(name: str) -> str:
    """Return the line for one file, in the only quoting that both git and git-lfs understand."""
    pattern = re.sub(r"([*?\[\]])", r"\\\1", name).replace(" ", "[[:space:]]")
    return f"/{pattern} filter=lfs diff=lfs merge=lfs -text"


def hashed(path: Path) -> StoredFile:
    """Return a file's size and sha256; a missing file gets neither and equals no other."""
    if not path.is_file():
        return StoredFile(size_bytes=0)
    return StoredFile(size_bytes=path.stat().st_size, sha256=sha256_file(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file systems differ or have no hard links."""
    link = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
    link.unlink(missing_ok=True)
    try:
        link.hardlink_to(source)
    except OSError:
        copy_atomic(source, target)
    else:
        link.replace(target)
