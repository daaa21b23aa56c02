"""The weights set: there is exactly one, it is complete, and its index and shards agree. Only headers are read."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from packager.errors import SourceError
from packager.model.checkpoint import MOST_TENSORS
from packager.model.safetensors_file import METADATA, StoredTensor, read_header, tensors_at
from packager.prove.audit.files import OTHER_WEIGHTS, WEIGHTS_SUFFIX, JsonObject, Listing, as_object
from packager.prove.audit.finding import Findings
from packager.receipt import INDEX_SUFFIX
from packager.system.text import shown

SUFFIX = WEIGHTS_SUFFIX
DEFAULT_STEM = "model"
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors\Z")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The part of the weights set that could be read.

    Attributes:
        files: the names of the set's safetensors files that exist.
        stem: the name without shard number and suffix, "" without a set.
        tensors: every tensor with its file and offset.
        size_bytes: the size of the files.
        is_all_read: every file of the set could be read, so that a tensor not in `tensors` is missing.
    """

    files: tuple[str, ...] = ()
    stem: str = ""
    tensors: Mapping[str, StoredTensor]
    size_bytes: int = 0
    is_all_read: bool = False


def read_weights(listing: Listing, documents: Mapping[str, object], findings: Findings) -> Weights:
    """Choose the weights set, report everything beside it, and read the headers of its files."""
    indexes = sorted(listing.top_level(INDEX_SUFFIX), key=_default_first)
    index = as_object(documents.get(indexes[0])) if indexes else None
    weight_map = _weight_map(indexes[0], index, findings) if index is not None else None
    files = _choose(listing, weight_map, findings)
    _check_strays(listing, {*files, *indexes[:1]}, findings)
    present = [name for name in files if name in listing.sizes]
    for name in files:
        if not listing.has(name):
            findings.add("index-shard-missing", indexes[0], f"it names {shown(name)}, which is not in the folder")
    shards = _read_shards(listing, present, findings)
    is_all_read = bool(files) and len(shards) == len(files)
    if index is not None and weight_map is not None:
        _check_index(indexes[0], index, weight_map, shards, findings, is_all_read=is_all_read)
    tensors = _merged(shards.values(), findings)
    stem = shard_stem(present[0]) if present else ""
    if stem not in ("", DEFAULT_STEM):
        findings.add("weights-name", present[0], f"the weights are not called {DEFAULT_STEM}{SUFFIX}")
    size = sum(listing.sizes[name] for name in present)
    return Weights(files=tuple(present), stem=stem, tensors=tensors, size_bytes=size, is_all_read=is_all_read)


def _merged(shards: Iterable[Mapping[str, StoredTensor]], findings: Findings) -> Mapping[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in sorted(tensors.keys() & shard.keys()):
            findings.add("tensor-duplicate", tensor, "more than one file of the set holds this tensor")
        tensors.update(shard)
    return tensors


def _default_first(name: str) -> tuple[bool, str]:
    return not name.startswith(DEFAULT_STEM + "."), name


def shard_stem(name: str) -> str:
    """Return a weights file's name without the number of its shard and without suffix."""
    shard = _SHARD.match(name)
    return shard[1] if shard else name[: -len(SUFFIX)]


def _choose(listing: Listing, weight_map: Mapping[str, str] | None, findings: Findings) -> Sequence[str]:
    """Return the file names of the set: what the index names, else all shards, else one single file."""
    if weight_map:
        return sorted(set(weight_map.values()))
    candidates = sorted(listing.top_level(SUFFIX), key=_default_first)
    single = [name for name in candidates if not _SHARD.match(name)]
    if single:
        return single[:1]
    if not candidates:
        if not any(name.endswith(SUFFIX) for name in listing.unread):
            findings.add("weights-missing", ".", "there is no safetensors file")
        return ()
    if not any(name.endswith(INDEX_SUFFIX) for name in (*listing.sizes, *listing.unread)):
        findings.add("index-missing", candidates[0], "shards without an index")
    stem = shard_stem(candidates[0])
    return [name for name in candidates if shard_stem(name) == stem]


def _check_strays(listing: Listing, chosen: set[str], findings: Findings) -> None:
    for name in listing.sizes:
        lower = name.lower()
        if name in chosen or not lower.endswith((SUFFIX, INDEX_SUFFIX, *OTHER_WEIGHTS)):
            continue
        findings.add("weights-stray", name, "a weights file that is not part of the branch's one weights set")


def _read_shards(listing: Listing, names: Iterable[str], findings: Findings) -> dict[str, Mapping[str, StoredTensor]]:
    """Return the tensors of every file that can be read, up to a number that no model has."""
    shards: dict[str, Mapping[str, StoredTensor]] = {}
    left = MOST_TENSORS
    for name in names:
        if left < 0:
            findings.add("safetensors-damaged", name, f"the files before hold more than {MOST_TENSORS:,} tensors")
        elif (shard := _read_shard(listing, name, findings)) is not None:
            shards[name] = shard
            left -= len(shard)
    return shards


def _read_shard(listing: Listing, name: str, findings: Findings) -> Mapping[str, StoredTensor] | None:
    """Return a file's tensors, or None after reporting that it is damaged."""
    path = listing.path(name)
    try:
        header = read_header(path)
    except SourceError as error:
        findings.add("safetensors-damaged", name, error.brief)
        return None
    found = header.metadata.get("format")
    if found != METADATA["format"]:
        findings.add("safetensors-metadata", name, f"the metadata's format is {shown(found)}")
    return tensors_at(path, header)


def _weight_map(name: str, index: JsonObject, findings: Findings) -> Mapping[str, str] | None:
    """Return the index's weight_map, or None after reporting that it has none."""
    weight_map = as_object(index.get("weight_map"))
    if not weight_map:
        findings.add("index-damaged", name, f"weight_map must be an object with tensors, found {shown(weight_map)}")
        return None
    valid = {tensor: file for tensor, file in weight_map.items() if isinstance(file, str)}
    if len(valid) < len(weight_map):
        findings.add("index-damaged", name, "weight_map has values that are not file names")
        return None
    return valid


def _check_index(
    name: str,
    index: JsonObject,
    weight_map: Mapping[str, str],
    shards: Mapping[str, Mapping[str, StoredTensor]],
    findings: Findings,
    *,
    is_all_read: bool,
) -> None:
    for tensor, file in weight_map.items():
        if file in shards and tensor not in shards[file]:
            findings.add("index-disagrees", tensor, "the index names a shard that does not hold this tensor")
    for file, shard in shards.items():
        for tensor in shard:
            if tensor not in weight_map:
                findings.add("index-disagrees", tensor, f"{file} holds this tensor, the index does not name it")
    metadata = as_object(index.get("metadata")) or {}
    sizes = {tensor: stored.info.size_bytes for shard in shards.values() for tensor, stored in shard.items()}
    total = sum(sizes.values())
    if is_all_read and "total_size" in metadata and metadata["total_size"] != total:
        findings.add(
            "index-total-size", name, f"total_size is {shown(metadata['total_size'])}, the tensors have {total} bytes"
        )
