"""Read what a report is of: the receipts of a recipe's build, or of a folder of receipts, and what is published."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from packager.errors import PublishError, StateError
from packager.pipeline.build_options import Options
from packager.pipeline.compare_published import BranchDifference, compare_published
from packager.receipt import Receipt
from packager.recipe.file import RecipeFile
from packager.system.files import open_regular
from packager.system.terminal import Terminal
from packager.variant import MAIN

_MOST_BYTES = 64_000_000
_MOST_RECEIPTS = 64  # a recipe has no more variants


def recipe_receipts(recipe_file: RecipeFile, dist: Path) -> tuple[Receipt, ...]:
    """Return the receipts of a recipe's variants in its order; those that are not built are left out.

    Raises:
        PublishError: none is built.
        StateError: a receipt was damaged, or another version wrote it.
    """
    folder = dist / "receipts" / recipe_file.recipe.repository.id
    paths = [folder / f"{variant.branch}.json" for variant in recipe_file.recipe.expanded_variants()]
    return _read(folder, [path for path in paths if os.path.lexists(path)])


def folder_receipts(folder: Path) -> tuple[Receipt, ...]:
    """Return the receipts in a folder, main first; raises as `recipe_receipts`."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem != MAIN, path.stem))
    return _read(folder, paths)


def _read(folder: Path, paths: Sequence[Path]) -> tuple[Receipt, ...]:
    if not paths or len(paths) > _MOST_RECEIPTS:
        why = f"{len(paths)} files" if paths else "there is no receipt"
        hint = "run packager build first, or give the folder dist/receipts/NAMESPACE/NAME"
        raise PublishError("there is no build to report on", where=str(folder), why=why, hint=hint)
    receipts = []
    for path in paths:
        try:
            with open_regular(path) as stream:
                receipts.append(Receipt.model_validate_json(stream.read(_MOST_BYTES)))
        except (OSError, ValidationError) as error:
            lines = error.errors(include_url=False, include_input=False) if isinstance(error, ValidationError) else ()
            why = lines[0]["msg"] if lines else str(error)
            raise StateError(
                "a receipt cannot be read", where=str(path), why=why, hint="build the variant again"
            ) from error
    strangers = sorted({receipt.provenance.repository for receipt in receipts})
    if len(strangers) > 1:
        raise StateError("the receipts are of several repositories", where=str(folder), why=", ".join(strangers))
    return tuple(receipts)


def published_changes(recipe_file: RecipeFile, options: Options, terminal: Terminal) -> list[Mapping[str, Any]]:
    """Return what differs from the published release; raises as `compare_published`."""
    return [_change(each) for each in compare_published(recipe_file, options, terminal)]


def _change(each: BranchDifference) -> dict[str, Any]:
    published, built = each.quality
    names = ("perplexity", "kl_divergence", "top1_agreement")
    figures = [
        {"key": name, "published": str(getattr(published, name)), "built": str(getattr(built, name))}
        for name in names
        if published is not None and built is not None and getattr(published, name) != getattr(built, name)
    ]
    return {
        "branch": each.branch,
        "standing": each.standing,
        "why": each.why,
        "weights_differ": each.weights,
        "files": list(each.files),
        "values": [vars(change) for change in each.values],
        "loaders": [vars(change) for change in each.loaders],
        "quality": figures,
    }
