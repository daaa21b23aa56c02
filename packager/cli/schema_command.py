"""The command `schema`."""

from enum import StrEnum
from typing import Annotated

import typer

from packager.cli.options import Format, FormatOption, terminal_of


class SchemaName(StrEnum):
    """What has a JSON schema."""

    recipe = "recipe"
    events = "events"


def schema_command(
    name: Annotated[
        SchemaName, typer.Argument(metavar="NAME", help="recipe, or events: the lines of --log-format json.")
    ] = SchemaName.recipe,
    format: FormatOption = Format.json,  # noqa: A002, ARG001 - as every command has it; a schema is JSON
) -> None:
    """Print the JSON schema of recipes or of events.

    The schema of recipes is that of this version, for editors and checkers (JSON Schema 2020-12, with patterns of
    ECMA-262). YAML language servers take it from a file: packager schema > recipe.schema.json.
    """
    import json

    from packager.recipe.schema import schema_text
    from packager.system.events import event_schema

    text = schema_text() if name is SchemaName.recipe else json.dumps(event_schema(), indent=2) + "\n"
    terminal_of().write(text)
