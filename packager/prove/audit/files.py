"""The folder itself: which files there are, which must be, and reading them without trusting them.

Links are followed only inside the folder, or from a snapshot of the Hub's cache to its blobs. `.git` and `.cache` at
the top belong to the tools that fetched the folder and are ignored.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from packager.model.checkpoint import MOST_INDEX_BYTES, MOST_RECORD_BYTES
from packager.model.contract_files import CONTENT_RULES
from packager.model.model_folder import link_problem, read_inside
from packager.model.strict_json import MOST_JSON_VALUES, most_values_in, parse_json
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
    TOKENIZER_CONFIG: "it holds the special tokens and the chat template",
}
CARD_FILES: Mapping[str, str] = {
    README: "the model card",
    PROVENANCE: "it records the inputs and the files of the build",
}

WEIGHTS_SUFFIX = ".safetensors"
OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".pkl", ".h5", ".msgpack")
_WEIGHTS_SUFFIXES = (WEIGHTS_SUFFIX, INDEX_SUFFIX, *OTHER_WEIGHTS)
_MODEL_FILES = frozenset({CONFIG, QUANTIZE_CONFIG, PROVENANCE})
_MOST_FOLDERS, _MOST_NAMED = 1000, 3
_FETCHERS_FOLDERS = (".git", ".cache")
_OBJECT_FILES = frozenset(
    {*REQUIRED_FILES, QUANTIZE_CONFIG, GENERATION_CONFIG, PROVENANCE, TOKENIZER, "special_tokens_map.json"}
)
# Documents whose content is used by several checks; others are parsed once more where they are needed.
_SHARED_DOCUMENTS = _OBJECT_FILES | {"added_tokens.json"}
_MOST_FILES = 10_000
_MOST_JSON_BYTES = 16_000_000
_MOST_TEXT_BYTES = 8_000_000
_MOST_README_BYTES = 2_000_000
# Of all documents that are kept: their memory is bounded together.
_MOST_VALUES = 4_000_000
# Of provenance.json, where a linear has up to 9.
MOST_RECORD_VALUES = 750_000
_POINTER = b"version https://git-lfs.github.com/spec/v1\n"
_MAX_POINTER_BYTES = 1024  # git-lfs looks no further

JsonObject = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class JsonDocument:
    """A JSON file's content, which may be null, and its number of values as `most_values_in` counts them."""

    value: object
    num_values: int


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of a folder: relative names with '/', in sorted order.

    Attributes:
        folder: the folder.
        sizes: bytes of every file that may be read.
        unread: names that exist but are not followed or not readable; already reported.
        stated: of files whose content is not, or not whole, in the folder, the sha256 that a repository states; "" if
            it states none.
    """

    folder: Path
    sizes: Mapping[str, int]
    unread: frozenset[str]
    stated: Mapping[str, str] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Return whether the name exists, readable or not."""
        return name in self.sizes or name in self.unread

    def path(self, name: str) -> Path:
        """Return the path of a listed file."""
        return self.folder / name

    def top_level(self, suffix: str) -> list[str]:
        """Return the names directly in the folder that end in `suffix`, in any case of letters."""
        return [name for name in self.sizes if "/" not in name and name.lower().endswith(suffix)]


def is_of_model(name: str) -> bool:
    """Return whether a file of this name makes a folder one that may be a model's."""
    return name in _MODEL_FILES or name.lower().endswith(_WEIGHTS_SUFFIXES)


def model_problem(folder: Path) -> str:
    """Return why a folder is certainly not that of a model, or "": it has neither config.json nor weights.

    Only names are read, and of folders inside at most 1,000: the folder may be a home or a whole disk.
    """
    inside: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in islice(entries, _MOST_FILES):
                if is_of_model(entry.name):
                    return ""
                if len(inside) < _MOST_FOLDERS and entry.is_dir(follow_symlinks=False):
                    inside.append(entry.name)
        models = [name for name in sorted(inside) if (folder / name / CONFIG).is_file()][:_MOST_NAMED]
    except OSError as error:
        return f"the folder cannot be read: {error.strerror or error}"
    named = f"; there is one in {', '.join(map(shown, models))}" if models else ""
    return f"there is neither {CONFIG} nor a weights file{named}"


def list_folder(folder: Path, findings: Findings) -> Listing:
    """List a folder and report leftovers, links that leave it, special files and empty files."""
    sizes: dict[str, int] = {}
    unread: set[str] = set()
    for number, path in enumerate(_walk(folder, findings)):
        if number == _MOST_FILES:
            findings.add("folder-overfull", ".", f"more than {_MOST_FILES:,} files; only these were looked at")
            break
        name = path.relative_to(folder).as_posix()
        try:
            problem = link_problem(folder, path) if path.is_symlink() else ""
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
        elif _is_lfs_pointer(folder, name, status.st_size):
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


def _is_lfs_pointer(folder: Path, name: str, size_bytes: int) -> bool:
    if size_bytes > _MAX_POINTER_BYTES:
        return False
    try:
        return read_inside(folder, name, _MAX_POINTER_BYTES).startswith(_POINTER)
    except OSError:  # the check that needs the file reports it
        return False


def check_file_set(listing: Listing, findings: Findings, *, complete: bool) -> None:
    """Report the files that a branch must have and this folder lacks."""
    required = {**REQUIRED_FILES, **CARD_FILES} if complete else REQUIRED_FILES
    for name, reason in required.items():
        if not listing.has(name):
            findings.add("file-missing", name, f"there is no {name}: {reason}")
    if not listing.has(QUANTIZE_CONFIG):
        why = "AutoGPTQ does not open a local folder without it"
        findings.add("quantize-config-missing", QUANTIZE_CONFIG, f"there is no {QUANTIZE_CONFIG}: {why}")
    if not listing.has(GENERATION_CONFIG):
        why = "runtimes may use other stop tokens and sampling than the base model"
        findings.add("generation-config-missing", GENERATION_CONFIG, f"there is no {GENERATION_CONFIG}: {why}")
    if listing.has(TOKENIZER):
        return
    if listing.has(TOKENIZER_MODEL):
        findings.add(
            "tokenizer-json-missing", TOKENIZER, "only tokenizer.model is here; ExLlamaV2 needs tokenizer.json"
        )
    else:
        findings.add("file-missing", TOKENIZER, "there is neither tokenizer.json nor tokenizer.model")


def most_bytes(name: str) -> int:
    """Return how large a text or JSON file of this name may be."""
    if name in CONTENT_RULES:
        return CONTENT_RULES[name].most_bytes
    if name == README:
        return _MOST_README_BYTES
    if name.endswith(INDEX_SUFFIX):
        return MOST_INDEX_BYTES
    if name == PROVENANCE:
        return MOST_RECORD_BYTES
    return _MOST_JSON_BYTES if name.endswith(".json") else _MOST_TEXT_BYTES


def _read(listing: Listing, name: str, findings: Findings) -> bytes | None:
    """Return a file's content, or None after reporting that it is too large or cannot be read."""
    if listing.sizes[name] > most_bytes(name):
        message = f"{listing.sizes[name]} bytes are too many, such a file may have {most_bytes(name)}"
        findings.add("text-damaged", name, message)
        return None
    try:
        return read_inside(listing.folder, name, most_bytes(name))
    except OSError as error:
        findings.add("file-unreadable", name, f"it cannot be read: {error.strerror or error}")
        return None


def read_text(listing: Listing, name: str, findings: Findings) -> str | None:
    """Return a file's text, or None after reporting why it is not UTF-8 text of a normal size."""
    data = _read(listing, name, findings)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        findings.add("text-damaged", name, f"it is not UTF-8 text: {error.reason} at byte {error.start}")
        return None


def read_document(
    listing: Listing, name: str, findings: Findings, *, most_values: int = MOST_JSON_VALUES
) -> JsonDocument | None:
    """Return a parsed .json file, or None after reporting why it cannot be parsed."""
    data = _read(listing, name, findings)
    try:
        if data is not None:
            return JsonDocument(value=parse_json(data, most_values=most_values), num_values=most_values_in(data))
    except UnicodeDecodeError as error:
        findings.add("text-damaged", name, f"it is not UTF-8 text: {error.reason} at byte {error.start}")
    except ValueError as error:
        findings.add("json-damaged", name, f"it is not JSON: {error}")
    return None


def read_documents(listing: Listing, findings: Findings, *, complete: bool) -> dict[str, object]:
    """Parse every .json file and report those that are damaged or not the object that loaders expect.

    Returns:
        Those that other checks use.
    """
    documents: dict[str, object] = {}
    left = _MOST_VALUES
    for name in listing.sizes:
        if not name.endswith(".json") or (name == PROVENANCE and not complete):
            continue
        is_index = name.endswith(INDEX_SUFFIX)
        most = MOST_RECORD_VALUES if name == PROVENANCE else MOST_JSON_VALUES
        document = read_document(listing, name, findings, most_values=min(left, most))
        if document is None:
            continue
        if name in _SHARED_DOCUMENTS or (is_index and "/" not in name):
            documents[name] = document.value
            left -= document.num_values
        if (name in _OBJECT_FILES or is_index) and not isinstance(document.value, dict):
            findings.add("json-damaged", name, f"it must be a JSON object, found {shown(document.value)}")
    return documents


def as_object(value: object) -> JsonObject | None:
    """Return a JSON object, or None for anything else."""
    return value if isinstance(value, dict) else None
