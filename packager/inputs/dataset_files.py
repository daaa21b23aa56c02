"""Datasets on the Hub: which files a split has at a commit, by the Hub's rules, and their download.

Only the Hub is asked, never the working directory, and no program of a dataset is run. The rules for splits are those
of the library datasets (its modules data_files and utils/metadata): the front matter of README.md states the files of
each configuration and split, else their names do.
"""

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from packager.errors import CalibrationError
from packager.inputs.hub_cache import cached_folder, cached_siblings, is_offline, not_cached
from packager.inputs.hub_models import check_digests, hub_errors
from packager.inputs.hub_session import checked_siblings
from packager.inputs.text_files import SUFFIXES, TextFile, kind_of
from packager.receipt import README
from packager.system.files import disk_errors
from packager.system.text import printable, shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_MOST_README_BYTES: Final = 4 << 20
_FRONT_MATTER: Final = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_SHARD: Final = re.compile(r"-(\d{5})-of-(\d{5})(?=[-.])")
_SPLIT_SHARD: Final = re.compile(r"data/(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_KEYWORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_APART: Final = r"[-._ 0-9]"
_MOST_SHOWN: Final = 20

Splits = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class DatasetSplit:
    """A split of a dataset at a commit: its files, and the licence that the dataset's page states."""

    files: tuple[TextFile, ...]
    license: str | None


def download_split(dataset: str, revision: str, config: str | None, split: str) -> DatasetSplit:
    """Download the files of a split into the Hub's cache; without a network, find them there.

    Raises:
        SourceError: the Hub or the network failed, or the cache lacks a file; states the command that fetches it.
        CalibrationError: there is no such configuration or split, or its files are of a format that is not read.
    """
    where = f"{dataset} at {revision[:12]}"
    siblings = _listed(dataset, revision)
    names = [sibling.rfilename for sibling in siblings]
    front = _front_matter(dataset, revision, names)
    found = splits_of(names, front, config, where)
    chosen = sorted(found.get(split, ()))
    if not chosen:
        raise CalibrationError(
            f"the dataset has no split {shown(split)}",
            where=where,
            why=f"its splits are {_list(found)}" if found else "no file of it is a text that is read",
            hint="write the name of a split alone: rows are drawn from it, so a slice is not needed",
        )
    if other := [name for name in chosen if not kind_of(name)]:
        raise CalibrationError(
            "a file of the split is of a format that is not read",
            where=f"{where}: {printable(other[0])}",
            why=f"read are {', '.join(SUFFIXES)}; a program of a dataset is never run",
            hint="the Hub keeps most datasets as parquet on the branch refs/convert/parquet: name a commit of it",
        )
    _check_shards(dataset, revision, chosen)
    folder = _download(dataset, revision, chosen)
    check_digests(folder, [sibling for sibling in siblings if sibling.rfilename in chosen])
    license_name = front.get("license")
    return DatasetSplit(
        files=tuple(TextFile(path=folder / name, shown=f"{dataset}: {printable(name)}") for name in chosen),
        license=printable(license_name)[:100] if isinstance(license_name, str) else None,
    )


def splits_of(names: Sequence[str], front: Mapping[str, Any], config: str | None, where: str) -> Splits:
    """Return the files of each split of a configuration.

    Args:
        names: of all files of the dataset.
        front: the front matter of its README.md.
        config: the configuration, None for the only one or the default one.
        where: the dataset, for messages.

    Raises:
        CalibrationError: there is no such configuration, or several and none is named.
    """
    configs = front.get("configs")
    stated = {
        entry["config_name"]: entry
        for entry in (configs if isinstance(configs, list) else ())
        if isinstance(entry, Mapping) and isinstance(entry.get("config_name"), str)
    }
    if not stated:
        return _splits_by_name(names, config or "", where)
    if config is None:
        marked = [name for name, entry in stated.items() if len(stated) == 1 or name == "default"]
        marked = marked or [name for name, entry in stated.items() if entry.get("default") is True]
        config = marked[0] if len(marked) == 1 else None
    if config not in stated:
        raise CalibrationError(
            "the dataset has several configurations" if config is None
            else f"the dataset has no configuration {shown(config)}",
            where=where,
            why=f"its configurations are {_list(stated)}",
            hint="set config",
        )  # fmt: skip
    entry = stated[config]
    folder = entry.get("data_dir") if isinstance(entry.get("data_dir"), str) else ""
    if entry.get("data_files") is None:
        return _splits_by_name(names, str(folder), where)
    found: Splits = {}
    for split, patterns in _patterns(entry["data_files"]):
        fitting = [name for name in names if any(_fits(name, f"{folder}/{pattern}") for pattern in patterns)]
        found.setdefault(split, []).extend(fitting)
    return found


def _patterns(data_files: object) -> list[tuple[str, list[str]]]:
    """Return the split and the patterns of each entry of `data_files`: a pattern, a list, or {split, path}."""
    found: list[tuple[str, list[str]]] = []
    for entry in data_files if isinstance(data_files, list) else [data_files]:
        split, paths = ("train", entry)
        if isinstance(entry, Mapping):
            split, paths = str(entry.get("split")), entry.get("path")
        found.append(
            (split, [path for path in (paths if isinstance(paths, list) else [paths]) if isinstance(path, str)])
        )
    return found


def _fits(name: str, pattern: str) -> bool:
    """Return whether a file's name fits a pattern, as the library datasets compares them; a wrong pattern fits none."""
    from fsspec.utils import glob_translate

    try:
        expression = glob_translate("/".join(part for part in pattern.split("/") if part not in ("", ".")))
    except ValueError:
        return False
    return re.match(expression, name) is not None


def _splits_by_name(names: Sequence[str], folder: str, where: str) -> Splits:
    """Return the files of each split as their folders and names state them."""
    prefix = f"{folder.strip('/')}/" if folder.strip("/.") else ""
    inside = [name for name in names if name.startswith(prefix) and kind_of(name) and not _is_description(name)]
    if prefix and not inside:
        raise CalibrationError(
            f"the dataset has no configuration {shown(folder)}", where=where,
            why="neither its README.md nor a folder has that name", hint="leave out config, or name another",
        )  # fmt: skip
    found: Splits = {}
    for name in inside:
        if shard := _SPLIT_SHARD.fullmatch(name.removeprefix(prefix)):
            found.setdefault(shard["split"], []).append(name)
    for part_of in (_folders, _file_name):
        if not found:
            for split, keywords in _KEYWORDS.items():
                keyword = rf"(?:.*{_APART})?(?:{'|'.join(keywords)})(?:{_APART}.*)?"
                named = [name for name in inside if any(
                    re.fullmatch(keyword, part) for part in part_of(name.removeprefix(prefix))
                )]  # fmt: skip
                if named:
                    found[split] = named
    return found or ({"train": inside} if inside else {})


def _folders(name: str) -> list[str]:
    return name.split("/")[:-1]


def _file_name(name: str) -> list[str]:
    return name.split("/")[-1:]


def _is_description(name: str) -> bool:
    """Return whether a file describes the dataset; requirements and licences are texts of no split either."""
    last = name.rpartition("/")[2].lower()
    return last in ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "license.txt",
                    "notice.txt", "requirements.txt") or last.startswith(".")  # fmt: skip


def _listed(dataset: str, revision: str) -> "Sequence[RepoSibling]":
    """Return the files of a dataset at a commit; without a network, those that the Hub's cache knows."""
    import huggingface_hub

    if is_offline():
        return cached_siblings("dataset", dataset, revision)
    with hub_errors(f"the dataset {dataset} at {revision[:12]}"):
        found = huggingface_hub.HfApi().dataset_info(dataset, revision=revision, files_metadata=True)
        return checked_siblings(found.siblings)


def _check_shards(dataset: str, revision: str, names: Sequence[str]) -> None:
    """Raise SourceError if a file is `-00000-of-00003` and another of the three is not there."""
    for name in names:
        match = _SHARD.search(name)
        if match is None:
            continue
        begin, end = name[: match.start()], name[match.end() :]
        held = {other[len(begin) :][: len(match[0])] for other in names if other.startswith(begin)}
        for number in range(min(int(match[2]), len(names) + 1)):
            if (part := f"-{number:05}-of-{match[2]}") not in held:
                raise not_cached("dataset", dataset, revision, f"{begin}{part}{end}")


def _front_matter(dataset: str, revision: str, names: Sequence[str]) -> Mapping[str, Any]:
    if README not in names:
        return {}
    path = _download(dataset, revision, [README]) / README
    with path.open("rb") as stream:
        text = stream.read(_MOST_README_BYTES).decode("utf-8", "replace")
    match = _FRONT_MATTER.match(text.removeprefix("\ufeff"))
    return _parsed(match[1], f"{dataset} at {revision[:12]}: {README}") if match else {}


def _parsed(text: str, where: str) -> Mapping[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="safe").load(text)
    except (YAMLError, ValueError, RecursionError) as error:
        raise CalibrationError(
            "the front matter of a dataset cannot be read", where=where, why=printable(str(error).splitlines()[0])
        ) from error
    return value if isinstance(value, Mapping) else {}


def _download(dataset: str, revision: str, names: Sequence[str]) -> Path:
    import huggingface_hub

    if is_offline():
        return cached_folder("dataset", dataset, revision, names)
    patterns = [glob.escape(name) for name in names]
    with hub_errors(f"the dataset {dataset} at {revision[:12]}"), disk_errors(Path("the Hub cache")):
        return Path(
            huggingface_hub.snapshot_download(
                dataset, repo_type="dataset", revision=revision, allow_patterns=patterns
            )
        )  # fmt: skip


def _list(names: Mapping[str, object]) -> str:
    found = [shown(name) for name in names]
    more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
    return ", ".join(found[:_MOST_SHOWN]) + more
