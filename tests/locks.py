"""Locks for the recipes of tests, made from config.json alone, without torch; `describe` is tested elsewhere."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from packager.inputs.chat_template import chat_template_digest
from packager.model.describe import describe
from packager.model.lock import Lock, LockedBase, LockedModel
from packager.recipe.lock_file import lock_path, lock_text, read_recipe_lock
from tests.known_models import FAMILIES, known_model


def lock_of(
    config: Mapping[str, object], base_id: str, revision: str | None = None, *, chat_template: str | None = None
) -> Lock:
    return Lock(
        lock_version=1,
        made_with={"transformers": metadata.version("transformers")},
        base_model=LockedBase(id=base_id, revision=revision, files={}),
        chat_template_sha256=chat_template,
        model=_model(config),
    )


def _model(config: Mapping[str, object]) -> LockedModel:
    if config.get("model_type") in FAMILIES:  # without transformers
        return known_model(config, "config.json")
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return describe(Path(folder), None)


def write_lock(
    recipe: Path,
    config: Mapping[str, object],
    base_id: str,
    revision: str | None = None,
    *,
    chat_template: str | None = None,
) -> Path:
    """Write the lock of a recipe file, which need not be there, and return its path."""
    path = lock_path(recipe)
    path.write_text(lock_text(lock_of(config, base_id, revision, chat_template=chat_template)))
    return path


def write_lock_of_folder(recipe: Path, base_id: str, folder: Path) -> Path:
    """Write the lock of a recipe whose base model is a local folder."""
    config = json.loads((folder / "config.json").read_text())
    return write_lock(recipe, config, base_id, chat_template=chat_template_digest(folder))


def read_lock_of(recipe: Path) -> Lock:
    """Read the lock of a recipe file."""
    return read_recipe_lock(lock_path(recipe), recipe)
