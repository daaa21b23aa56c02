"""The lock file beside a recipe, `<recipe>.lock.json`: read and write it, and compare it with the recipe."""

import json
from pathlib import Path

from pydantic import ValidationError

from packager.errors import RecipeError
from packager.model.lock import Lock
from packager.model.strict_json import parse_json_object
from packager.system.text import printable

_MOST_BYTES = 32_000_000
_MOST_SHOWN = 300


def lock_path(recipe: Path) -> Path:
    """Return the path of a recipe's lock."""
    return recipe.with_name(f"{recipe.stem}.lock.json")


def read_recipe_lock(path: Path, recipe: Path) -> Lock:
    """Read the lock of a recipe.

    Raises:
        RecipeError: there is none, or it is damaged or of another version; says how to make one.
    """
    make = f"make it: packager lock {recipe}"
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        return Lock.model_validate_json(json.dumps(parse_json_object(data, most_values=_MOST_BYTES)))
    except FileNotFoundError as error:
        raise RecipeError(f"there is no lock {path.name} beside the recipe", hint=make) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"the lock {path} is not valid: {where}: {first['msg']}", hint=make) from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"the lock {path} cannot be read: {printable(str(error))[:_MOST_SHOWN]}", hint=make
        ) from error


def lock_text(lock: Lock) -> str:
    """Return a lock as it is written to its file: the same lock always gives the same bytes."""
    content = lock.model_dump(mode="json")
    if not lock.model.own:  # hardly any model has one
        del content["model"]["own"]
    for key in ("kv_cache", "resolved"):  # which an older lock lacks
        if content["model"][key] is None:
            del content["model"][key]
    return _written(content, "") + "\n"


def _written(value: object, indent: str) -> str:
    """Return JSON; what holds no object and no array of objects stays on one line, so that diffs are readable."""
    inner = indent + " "
    if isinstance(value, dict) and any(isinstance(item, dict | list) and item for item in value.values()):
        lines = [
            f"{inner}{json.dumps(key, ensure_ascii=False)}: {_written(item, inner)}" for key, item in value.items()
        ]
        return (
            "{\n" + ",\n".join(lines) + f"\n{indent}}}"
            if not _is_flat(value)
            else json.dumps(value, ensure_ascii=False)
        )
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _written(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False)


def _is_flat(value: dict[str, object]) -> bool:
    """Return whether an object holds at most lists of numbers or words."""
    lists = [item for item in value.values() if isinstance(item, list)]
    return (
        len(lists) <= 1
        and not any(isinstance(item, dict) and item for item in value.values())
        and not any(isinstance(item, dict | list) for items in lists for item in items)
    )
