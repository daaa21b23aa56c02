"""Generate the JSON schema of recipe files from the models; editors complete, explain and check recipes with it.

A schema describes single values; the rules across fields and files are in `checks.py`. It cannot see what a recipe
inherits: where a recipe extends a file, no section and no key of a section is required. That file has a schema, too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packager.recipe import Recipe
from packager.recipe.parsed_recipe import SCHEMA_VERSION
from packager.system.files import write_atomic

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEFAULTS_ID = f"urn:gptq-packager:defaults-schema:{SCHEMA_VERSION}"
_ID = f"urn:gptq-packager:recipe-schema:{SCHEMA_VERSION}"  # a name, not an address: the file is in the package


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe file (JSON Schema 2020-12)."""
    schema = whole_recipe_schema()
    required = schema.pop("required")
    sections: dict[str, Any] = {}
    for key, field in schema["properties"].items():
        model = schema["$defs"].get(str(field.get("$ref", "")).rpartition("/")[2], {})
        if "required" in model:
            sections[key] = {"required": model.pop("required")}
    extends = {"required": ["extends"], "properties": {"extends": {"type": "string"}}}
    return {
        **schema,
        "required": ["schema_version"],
        "if": extends,
        "else": {"required": required, "properties": sections},
    }


def defaults_schema() -> dict[str, Any]:
    """Return the schema of a file that recipes extend: any of a recipe's sections, or some of their keys."""
    schema = whole_recipe_schema()
    schema["properties"].pop("extends")
    for field in schema["properties"].values():
        schema["$defs"].get(str(field.get("$ref", "")).rpartition("/")[2], {}).pop("required", None)
    return {**schema, "$id": _DEFAULTS_ID, "title": "What GPTQ recipes have in common", "required": ["schema_version"]}


def whole_recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe that inherits nothing."""
    generated = Recipe.model_json_schema()
    schema = {"$schema": _DIALECT, "$id": _ID, **generated, "title": "GPTQ recipe"}
    for model in (schema, *schema["$defs"].values()):
        for field in model.get("properties", {}).values():
            _describe_optional(field)
    return schema


def _describe_optional(field: dict[str, Any]) -> None:
    """Lift the description of an optional field's type to the field, where editors look for it."""
    for choice in field.get("anyOf", ()):
        if "description" in choice:
            field.setdefault("description", choice.pop("description"))


def schema_text() -> str:
    """Return the schema as it is written to a file."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def write_schema(arguments: Sequence[str] | None = None) -> int:
    """Print the schema, or write it, or check that a file equals it."""
    parser = argparse.ArgumentParser(prog="python -m packager.recipe.schema", description=write_schema.__doc__)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--write", metavar="FILE", type=Path, help="write the schema to FILE")
    group.add_argument("--check", metavar="FILE", type=Path, help="exit 1 if FILE is not the schema of the models")
    options = parser.parse_args(arguments)
    if options.write:
        write_atomic(options.write, schema_text().encode())
    elif options.check:
        if not options.check.is_file() or options.check.read_bytes() != schema_text().encode():
            sys.stderr.write(
                f"{options.check} is not in step with the models\n"
                f"  hint: run python -m packager.recipe.schema --write {options.check}\n"
            )
            return 1
    else:
        sys.stdout.write(schema_text())
    return 0


if __name__ == "__main__":
    sys.exit(write_schema())
