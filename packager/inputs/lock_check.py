"""Compare a base model's folder with the lock: its config.json, its files, its chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from packager.errors import SourceError
from packager.inputs.chat_template import chat_template_digest
from packager.model.architecture import Architecture
from packager.model.config_values import shortened, without_paths
from packager.receipt import CONFIG, SAFETENSORS, FileRecord
from packager.recipe.file import RecipeFile

LOCK_ANEW = "if these files of the model are the right ones now, make the lock anew: packager lock RECIPE"
_ABSENT = object()


def check_locked_config(config: Mapping[str, object], folder: Path, architecture: Architecture) -> None:
    """Compare a folder's config.json with the lock's, which has no paths of machines.

    Raises:
        SourceError: they differ; names the keys.
    """
    config, locked = without_paths(config), without_paths(architecture.config)
    keys = sorted({*config, *locked})
    differ = [key for key in keys if config.get(key, _ABSENT) != locked.get(key, _ABSENT)]
    if differ:
        raise SourceError(
            "the base model's config.json is not the one that the lock was made of",
            where=str(folder / CONFIG),
            why="; ".join(f"{key} is {_shown(config, key)}, in the lock {_shown(locked, key)}" for key in differ[:5]),
            hint=LOCK_ANEW,
        )


def _shown(config: Mapping[str, object], key: str) -> str:
    return shortened(config[key]) if key in config else "absent"


def check_locked_files(
    folder: Path, found: Mapping[str, FileRecord], recipe_file: RecipeFile, names: Sequence[str] | None = None
) -> None:
    """Compare the files of a base model on the Hub with those of the lock; a lock without files has the commit only.

    Args:
        folder: of the model.
        found: the records of some of its files.
        recipe_file: with the lock.
        names: of all files that are used, to be compared too; None: those of an earlier call.

    Raises:
        SourceError: a file is another one, is not there any more, or is not in the lock.
    """
    locked, licenses = recipe_file.lock.base_model.files, recipe_file.recipe.card.license.base_files
    if not locked:
        return
    moved = [
        f"{name} has sha256 {record.sha256[:12]} and {record.size_bytes} bytes, "
        f"in the lock {locked[name].sha256[:12]} and {locked[name].size_bytes}"
        for name, record in found.items()
        if name in locked and locked[name] != record
    ]
    if names is not None:
        # A licence may have been added to the recipe since; the commit identifies it.
        moved += [f"{name} is not in the lock" for name in names if name not in (*locked, *licenses)]
        moved += [f"{name} is missing" for name in locked if name.endswith(SAFETENSORS) and name not in names]
    if moved:
        raise SourceError(
            "the base model's files are not those that the lock was made of",
            where=str(folder),
            why="; ".join(moved[:5]),
            hint=LOCK_ANEW,
        )


def check_locked_template(folder: Path, recipe_file: RecipeFile) -> None:
    """Compare the chat template with the lock's. A lock of a commit may have none: the commit identifies the template.

    Raises:
        SourceError: they differ.
    """
    lock = recipe_file.lock
    found, locked = chat_template_digest(folder), lock.chat_template_sha256
    if found == locked or (locked is None and lock.base_model.revision is not None):
        return
    raise SourceError(
        "the base model's chat template is not the one that the lock was made of",
        where=str(folder),
        why=f"its sha256 is {_short(found)}, in the lock {_short(locked)}",
        hint=LOCK_ANEW,
    )


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "absent"
