"""The folder itself: which files there are, which must be, and reading them without trusting them.

Links are followed only inside the folder, or from a snapshot of the Hub's cache to its blobs. `.git` and `.cache` at
the top belong to the tools that fetched the folder and are ignored.
"""

import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from packager.prove.audit.finding import Findings
from packager.receipt import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX_SUFFIX,
    PROVENANCE,
    QUANTIZE_CONFIG,
    README,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_MODEL,
)
from packager.system.files import TEMPORARY_PREFIX
from packager.system.text import shown

REQUIRED_FILES: Mapping[str, str] = {
    CONFIG: "every loader reads the architecture and quantization_config from it",
    QUANTIZE_CONFIG: "AutoGPTQ does not open a local folder without it",
    GENERATION_CONFIG: "without it runtimes use other stop tokens and sampling than the base model",
    TOKENIZER_CONFIG: "it holds the special tokens and the chat template",
}
CARD_FILES: Mapping[str, str] = {
    README: "the model card",
    PROVENANCE: "it records the inputs and the files of the build",
}

_FETCHERS_FOLDERS = (".git", ".cache")
_OBJECT_FILES = frozenset({*REQUIRED_FILES, PROVENANCE, TOKENIZER, "special_tokens_map.json"})
_MAX_TEXT_BYTES = 200_000_000
_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
_MAX_POINTER_BYTES = 1024  # git-lfs looks no further

JsonObject = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a folder: relative names with '/', in sorted order.

    Attributes:
        folder: the folder.
        sizes: bytes of every file that may be read.
        unread: names that exist but are not followed or not readable; already reported.
    """

    folder: Path
    sizes: Mapping[str, int]
    unread: frozenset[str]

    def has(self, name: str) -> bool:
        """Return whether the name exists, readable or not."""
        return name in self.sizes or name in self.unread

    def path(self, name: str) -> Path:
        """Return the path of a listed file."""
        return self.folder / name

    def top_level(self, suffix: str) -> list[str]:
        """Return the names directly in the folder that end in `suffix`, in any case of letters."""
        return [name for name in self.sizes if "/" not in name and name.lower().endswith(suffix)]


def list_folder(folder: Path, findings: Findings) -> Listing:
    """List a folder and report leftovers, links that leave it, special files and empty files."""
    sizes: dict[str, int] = {}
    unread: set[str] = set()
    for path in _walk(folder, findings):
        name = path.relative_to(folder).as_posix()
        try:
            problem = _link_problem(folder, path) if path.is_symlink() else ""
            status = path.lstat() if problem else path.stat()
        except OSError as error:
            findings.add("file-unreadable", name, f"it cannot be read: {error}")
            unread.add(name)
            continue
        if problem:
            findings.add("link-leaves-folder", name, problem)
            unread.add(name)
        elif not stat.S_ISREG(status.st_mode):
            findings.add("not-a-regular-file", name, "it is neither a file nor a folder")
            unread.add(name)
        elif status.st_size == 0:
            findings.add("empty-file", name, "the file has no content")
            unread.add(name)
        elif _is_lfs_pointer(path, status.st_size):
            findings.add("lfs-pointer", name, "this is a git-lfs pointer: the file itself was not fetched")
            unread.add(name)
        else:
            sizes[name] = status.st_size
    return Listing(folder=folder, sizes=dict(sorted(sizes.items())), unread=frozenset(unread))


def _walk(folder: Path, findings: Findings) -> Iterator[Path]:
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            entries = sorted(current.iterdir())
            folders = {entry for entry in entries if entry.is_dir() and not entry.is_symlink()}
        except OSError as error:
            place = current.relative_to(folder).as_posix()
            findings.add("file-unreadable", place, f"the folder cannot be read: {error}")
            continue
        for entry in entries:
            if current == folder and entry.name in _FETCHERS_FOLDERS:
                continue
            if entry.name.startswith(TEMPORARY_PREFIX):
                findings.add("leftover-file", entry.relative_to(folder).as_posix(), "a temporary name")
            elif entry in folders:
                pending.append(entry)
            else:
                yield entry


def _link_problem(folder: Path, link: Path) -> str:
    """Return why a link is not followed, or ""."""
    root = folder.resolve()
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop is a RuntimeError before Python 3.13
        return "the link leads nowhere"
    if target.is_dir():
        return "the link leads to a folder"
    if target.is_relative_to(root):
        return ""
    # The Hub client's cache: blobs of the repository, or, since huggingface_hub 2, of all repositories together.
    model = root.parent.parent
    blobs = (target.parent == model / "blobs", target.parent.parent == model.parent / "blobs")
    if root.parent.name == "snapshots" and any(blobs):
        return ""
    return "the link leads out of the folder"


def _is_lfs_pointer(path: Path, size_bytes: int) -> bool:
    if size_bytes > _MAX_POINTER_BYTES:
        return False
    try:
        return path.read_bytes().startswith(_POINTER)
    except OSError:  # the check that needs the file reports it
        return False


def check_file_set(listing: Listing, findings: Findings, *, complete: bool) -> None:
    """Report the files that a branch must have and this folder lacks."""
    required = {**REQUIRED_FILES, **CARD_FILES} if complete else REQUIRED_FILES
    for name, reason in required.items():
        if not listing.has(name):
            findings.add("file-missing", name, f"there is no {name}: {reason}")
    if listing.has(TOKENIZER):
        return
    if listing.has(TOKENIZER_MODEL):
        findings.add(
            "tokenizer-json-missing", TOKENIZER, "only tokenizer.model is here; ExLlamaV2 needs tokenizer.json"
        )
    else:
        findings.add("file-missing", TOKENIZER, "there is neither tokenizer.json nor tokenizer.model")


def read_text(listing: Listing, name: str, findings: Findings) -> str | None:
    """Return a file's text, or None after reporting why it is not UTF-8 text."""
    if listing.sizes[name] > _MAX_TEXT_BYTES:
        findings.add("text-damaged", name, f"{listing.sizes[name]} bytes are too many for a text file")
        return None
    try:
        return listing.path(name).read_text(encoding="utf-8")
    except OSError as error:
        findings.add("file-unreadable", name, f"it cannot be read: {error}")
    except UnicodeDecodeError as error:
        findings.add("text-damaged", name, f"it is not UTF-8 text: {error.reason} at byte {error.start}")
    return None


def read_documents(listing: Listing, findings: Findings, *, complete: bool) -> dict[str, object]:
    """Parse every .json file and report those that are damaged or not the object that loaders expect."""
    documents: dict[str, object] = {}
    for name in listing.sizes:
        if not name.endswith(".json") or (name == PROVENANCE and not complete):
            continue
        text = read_text(listing, name, findings)
        if text is None:
            continue
        try:
            value = json.loads(text, parse_constant=_refuse_constant)
        except ValueError as error:
            findings.add("json-damaged", name, f"it is not JSON: {error}")
            continue
        except RecursionError:
            findings.add("json-damaged", name, "it is nested too deeply")
            continue
        documents[name] = value
        if (name in _OBJECT_FILES or name.endswith(INDEX_SUFFIX)) and not isinstance(value, dict):
            findings.add("json-damaged", name, f"it must be a JSON object, found {shown(value)}")
    return documents


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def as_object(value: object) -> JsonObject | None:
    """Return a JSON object, or None for anything else."""
    return value if isinstance(value, dict) else None
