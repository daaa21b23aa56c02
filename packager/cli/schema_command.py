"""The command `schema`."""

from enum import StrEnum
from typing import Annotated

import typer

from packager.cli.options import Format, FormatOption, terminal_of


class SchemaName(StrEnum):
    """What has a JSON schema."""

    recipe = "recipe"
    defaults = "defaults"
    events = "events"


def schema_command(
    name: Annotated[
        SchemaName,
        typer.Argument(
            metavar="NAME",
            help="recipe, defaults (a file that recipes extend), or events (of --log-format json).",
        ),
    ] = SchemaName.recipe,
    format: FormatOption = Format.json,  # noqa: A002, ARG001 - as every command has it; a schema is JSON
) -> None:
    """Print the JSON schema of recipes, their base, or events.

    The schema of recipes is that of this version, for editors and checkers (JSON Schema 2020-12, with patterns of
    ECMA-262). YAML language servers take it from a file: packager schema > recipe.schema.json.
    """
    import json

    from packager.recipe.schema import defaults_schema, recipe_schema
    from packager.system.events import event_schema

    schema = {"recipe": recipe_schema, "defaults": defaults_schema, "events": event_schema}[name.value]()
    terminal_of().write(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")
