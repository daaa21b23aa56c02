"""The files of a base model's folder: which of them a build reads, and what must be true of them before it does.

A base model is made by others. Only the files that a branch needs are read, each by its kind and up to a size.
"""

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from packager.errors import SourceError
from packager.inputs.model_names import ADAPTER_PREFIX, check_names, left_out_line
from packager.model.checkpoint import MOST_INDEX_BYTES
from packager.model.contract_files import (
    MOST_LICENSE_BYTES,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    check_content,
    content_rule,
    template_name,
)
from packager.model.model_folder import name_problem, open_inside, read_inside
from packager.model.strict_json import parse_json_object
from packager.receipt import CONFIG, INDEX_SUFFIX, SAFETENSORS, TOKENIZER_FILES, FileRecord
from packager.system.files import bytes_record

INDEX = f"model{INDEX_SUFFIX}"
WEIGHTS = "model.safetensors"
_MOST_ENTRIES = 10_000
_MOST_TEMPLATES = 20
_MOST_NAME = 200  # characters shown of a name
_REPLACE = "replace it by the file itself, or take it out: links are followed only inside the base model's folder"


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """Names of the files in a base model's folder.

    Attributes:
        folder: the folder.
        weights: what transformers loads: model.safetensors, else the files that the index names, else all safetensors.
        copied: those that a branch gets, by the rules for its configs.
        templates: chat templates that a branch gets inside tokenizer_config.json, see `template_files`.
        licenses: those that the recipe wants in every branch, if they are there.
        others: config.json, and the index if it names the weights.
        left_out: everything else; it is neither read nor copied.
    """

    folder: Path
    weights: tuple[str, ...]
    copied: tuple[str, ...]
    templates: tuple[str, ...]
    licenses: tuple[str, ...]
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def paths(self) -> list[Path]:
        """The files that are used, sorted."""
        used = {*self.weights, *self.copied, *self.templates, *self.licenses, *self.others}
        return [self.folder / name for name in sorted(used)]

    @property
    def left_out_line(self) -> str:
        """Which entries are left out, for the log; "" if none."""
        return left_out_line(self.left_out)


def list_source_files(folder: Path, licenses: Iterable[str] = ()) -> SourceFiles:
    """Find the files that a build uses, and check that each is a regular file of the folder; texts are not read.

    Args:
        folder: the base model's.
        licenses: names of licence files that the recipe wants.

    Raises:
        SourceError: the names are those of a model that cannot be built, see `check_names`; a link leads out of the
            folder; a FIFO, a device or a folder has the name of a file; the index
            is damaged or names a file that is missing.
    """
    try:
        entries = sorted(path.name for path in islice(folder.iterdir(), _MOST_ENTRIES + 1))
    except OSError as error:
        raise _unreadable(folder, "", error) from error
    if len(entries) > _MOST_ENTRIES:
        raise SourceError(
            "the base model's folder has too many entries",
            where=str(folder),
            why=f"more than {_MOST_ENTRIES}",
            hint="name the folder that holds one model and nothing else",
        )
    check_names(entries, str(folder))
    there = set(entries)
    indexed = has_index(there)
    others = tuple(name for name in (CONFIG, *([INDEX] if indexed else [])) if name in there)
    weights = _named_by_index(folder) if indexed else safetensors_among(entries)
    found = SourceFiles(
        folder=folder,
        weights=weights,
        copied=copied_names(folder),
        templates=template_files(folder),
        licenses=tuple(name for name in licenses if name in there),
        others=others,
        left_out=(),
    )
    for path in found.paths:
        name = path.relative_to(folder).as_posix()
        try:
            open_inside(folder, name).close()
        except OSError as error:
            raise _unreadable(folder, name, error) from error
    used = {path.relative_to(folder).parts[0] for path in found.paths}
    return replace(found, left_out=tuple(name for name in entries if name not in used))


def template_files(folder: Path) -> tuple[str, ...]:
    """Return the names of a model's chat templates where there are several files of them; () where there are not.

    transformers 5 reads chat_template.jinja and the folder as named templates; older releases and other programs read
    neither, so a branch has them all in tokenizer_config.json.

    Raises:
        SourceError: the folder cannot be listed, or holds too many.
    """
    try:
        entries = sorted(path.name for path in islice((folder / TEMPLATE_FOLDER).iterdir(), _MOST_ENTRIES))
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise _unreadable(folder, TEMPLATE_FOLDER, error) from error
    named = [name for name in (f"{TEMPLATE_FOLDER}/{entry}" for entry in entries) if template_name(name)]
    if len(named) > _MOST_TEMPLATES:
        raise SourceError(
            "the base model has too many chat templates", where=str(folder / TEMPLATE_FOLDER),
            why=f"{len(named)}, and a branch has {_MOST_TEMPLATES} at most",
            hint="take those out that are not used, in a folder of your own, and name it as base_model.path",
        )  # fmt: skip
    return (*([TEMPLATE_FILE] if named and os.path.lexists(folder / TEMPLATE_FILE) else []), *named)


def copied_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that a branch gets of a base model's tokenizer, of those that are there.

    Raises:
        SourceError: see `template_files`.
    """
    merged = template_files(folder)
    return tuple(name for name in TOKENIZER_FILES if name not in merged and os.path.lexists(folder / name))


def has_index(names: Collection[str]) -> bool:
    """Return whether an index names the weights: transformers reads none where there is a model.safetensors.

    Source: transformers 5.23, transformers.modeling_utils, _get_resolved_checkpoint_files.
    """
    return INDEX in names and WEIGHTS not in names


def safetensors_among(entries: Iterable[str]) -> tuple[str, ...]:
    """Return the weights files among the names of a folder that has no index.

    transformers reads model.safetensors where it is there; others beside it are adapters, or the weights once more in
    another format (consolidated.safetensors of Mistral's models).
    """
    entries = list(entries)
    if WEIGHTS in entries:
        return (WEIGHTS,)
    return tuple(name for name in entries if name.endswith(SAFETENSORS) and not name.startswith((".", ADAPTER_PREFIX)))


def _named_by_index(folder: Path) -> tuple[str, ...]:
    names = weights_in_index(folder)
    check_shards(names, [name for name in names if (folder / name).exists()], str(folder))
    return names


def weights_in_index(folder: Path) -> tuple[str, ...]:
    """Return the weights files that a folder's index names; they need not be there.

    Raises:
        SourceError: the index is damaged, or names a file outside the folder.
    """
    where = str(folder / INDEX)
    try:
        data = read_inside(folder, INDEX, MOST_INDEX_BYTES)
        weight_map = parse_json_object(data).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is not an object with tensors")
        if not all(isinstance(name, str) and name.endswith(".safetensors") for name in weight_map.values()):
            raise ValueError("its weight_map has values that are not names of safetensors files")
    except (OSError, ValueError) as error:
        raise SourceError("the index of the weights cannot be read", where=where, why=_reason(error)) from error
    names = sorted(set(weight_map.values()))
    for name in names:
        if problem := name_problem(name):
            raise SourceError(
                "the index of the weights names a file outside the base model's folder",
                where=where,
                why=f"{name[:_MOST_NAME]!r}: {problem}",
                hint="take the index from the same revision as the weights",
            )
    return tuple(names)


def check_shards(names: Sequence[str], there: Collection[str], where: str) -> None:
    """Raise SourceError if weights files are missing that the index names."""
    missing = [name for name in names if name not in there]
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(names)} weights files are missing",
            where=where,
            why=", ".join(name[:_MOST_NAME] for name in missing[:5]),
            hint="copy or download them again",
        )


def check_contents(files: SourceFiles) -> dict[str, FileRecord]:
    """Read every file that a branch gets as it is, and check that its content fits its name.

    Returns:
        Size and sha256 of the bytes that were checked, by name.

    Raises:
        SourceError: of the first file that is too large or holds something else.
    """
    return {name: checked_record(files.folder, name) for name in (*files.copied, *files.templates, *files.licenses)}


def checked_record(folder: Path, name: str) -> FileRecord:
    """Check the content of a file that a branch gets as it is, and return the size and sha256 of what was checked.

    Raises:
        SourceError: see `check_contents`.
    """
    data = read_small(folder, name)
    try:
        check_content(name, data)
    except ValueError as error:
        raise _unreadable(folder, name, error) from error
    return bytes_record(data)


def read_small(folder: Path, name: str) -> bytes:
    """Return the content of a file of a base model that a branch gets as it is; it is not checked.

    Raises:
        SourceError: it cannot be read, or is larger than such a file may be.
    """
    rule = content_rule(name)
    most = rule.most_bytes if rule else MOST_LICENSE_BYTES
    try:
        return read_inside(folder, name, most)
    except OSError as error:
        raise _unreadable(folder, name, error) from error


def _unreadable(folder: Path, name: str, error: OSError | ValueError) -> SourceError:
    return SourceError(
        "a file of the base model cannot be used",
        where=str(folder / name),
        why=_reason(error),
        hint=_REPLACE if "link" in _reason(error) else "take the file from the model's page again",
    )


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
