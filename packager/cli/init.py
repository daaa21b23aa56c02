"""The command `init`."""

import getpass
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import Format, FormatOption, terminal_of
from packager.errors import SourceError

if TYPE_CHECKING:
    from packager.inputs.named_model import NamedModel
    from packager.pipeline.init_recipe import InitResult


class VariantSetName(StrEnum):
    """The sets of variants that a first recipe can have."""

    classic = "classic"
    modern = "modern"
    wide = "wide"


class InitTarget(StrEnum):
    """The targets that need no address."""

    local = "local"
    hub = "hub"


_ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="ORG/NAME or ORG/NAME@REVISION on the Hub, or the folder of an fp16 model."),
]
_OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="The recipe's file.", show_default="the name of the model, here"
    ),
]
_SetOption = Annotated[
    VariantSetName,
    typer.Option(
        "--set",
        help="classic: 128g, and 32g, 64g, 128g with full act order, which vLLM refuses since 0.30. modern: 128g, 64g, "
        "32g with group-aware order, which loads wherever no act order does. wide: classic, 8 and 3 bits.",
    ),
]
_OwnerOption = Annotated[
    str,
    typer.Option(
        "--owner", metavar="NAME", help="The account that publishes.", show_default="of the Hub login, or yours"
    ),
]
_LicenseOption = Annotated[
    str, typer.Option("--license", metavar="ID", help="The model's licence.", show_default="the one on its card")
]
_CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="A text, or conversations, in the recipe's folder to calibrate on.",
        show_default="UltraChat for a model with a chat template, else wikitext-2, train",
    ),
]
_EvaluationOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="A held-out text in the recipe's folder to measure on.",
        show_default="wikitext-2, test",
    ),
]


_ExtendsOption = Annotated[
    str,
    typer.Option(
        "--extends",
        metavar="FILE",
        help="A file in the recipe's folder, such as defaults.yaml; what it gives is not in the recipe.",
    ),
]


def init_command(
    model: _ModelArgument,
    output: _OutputOption = None,
    variant_set: _SetOption = VariantSetName.classic,
    owner: _OwnerOption = "",
    target: Annotated[InitTarget, typer.Option("--target", help="Where the variants go.")] = InitTarget.local,
    model_id: Annotated[
        str, typer.Option("--id", metavar="ORG/NAME", help="The name of a model in a folder, as on the Hub.")
    ] = "",
    license_id: _LicenseOption = "",
    calibration: _CalibrationOption = None,
    evaluation: _EvaluationOption = None,
    extends: _ExtendsOption = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing, as where input is no terminal.")] = False,
    format: FormatOption = Format.text,  # noqa: A002 - the option's name
) -> None:
    """Write a recipe for a model, and show its plan.

    Writes the recipe and its lock, and recipe.schema.json for editors where there is none. The licence and its files,
    the language, the prompt template, the group sizes, the row lengths and the loaders are those of the model. Reads
    config.json, small files and the headers of the weights, never the weights. Needs the build extra, and the network
    for a model on the Hub that is not in the cache (HF_HUB_OFFLINE=1 reads the cache alone). Nothing is written if
    something is missing.
    """
    from packager.inputs.named_model import find_model
    from packager.pipeline.draft_recipe import Wishes
    from packager.pipeline.init_recipe import init_recipe

    terminal = terminal_of()
    found = find_model(model, terminal.log)
    if sys.stdin.isatty() and not yes:
        model_id, license_id = _ask(found, model_id, license_id)
    name = (model_id or found.id or "/").partition("/")[2]
    owner, owner_notes = (owner, []) if owner else _owner()
    wishes = Wishes(
        path=output or Path(f"{name.lower() or 'recipe'}.yaml"),
        owner=owner,
        variant_set=variant_set.value,
        target=target.value,
        model_id=model_id,
        license_id=license_id,
        calibration=calibration,
        evaluation=evaluation,
        extends=extends,
    )
    result = init_recipe(found, wishes, terminal.log, replace=force)
    for path in result.written:
        terminal.log(f"wrote {path}")
    notes = [*owner_notes, *result.notes]
    for note in notes:
        terminal.log(f"note: {note}")
    _show_plan(result, notes, format)


def _show_plan(result: "InitResult", notes: list[str], format: Format) -> None:  # noqa: A002
    """Print the plan of what was written, as JSON with the files and notes beside it."""
    from packager.cli.plan_view import build_plan_json, print_build_plan

    terminal, recipe = terminal_of(), result.recipe
    if format is Format.json:
        answer = {"recipe": str(recipe), "written": list(map(str, result.written)), "notes": notes}
        terminal.result({**answer, "plan": build_plan_json(result.plan)})
        return
    print_build_plan(result.plan, terminal.out)
    terminal.write(f"Next: packager build {recipe}, and then packager publish {recipe}\n")


def _ask(model: "NamedModel", model_id: str, license_id: str) -> tuple[str, str]:
    """Ask a person for the name and the licence that neither the model nor an option gives."""
    if model.id is None and not model_id:
        model_id = typer.prompt("The model's name on the Hub, ORG/NAME", err=True)
    if not (license_id or model.text("license")):
        license_id = typer.prompt("The model's licence, such as apache-2.0", err=True)
    return model_id, license_id


def _owner() -> tuple[str, list[str]]:
    """Return the account that is logged in to the Hub; else the user's name on this machine, with a note."""
    from packager.inputs.hub_account import has_token, hub_account
    from packager.inputs.hub_cache import is_offline

    if is_offline():
        why = "HF_HUB_OFFLINE is set"
    elif not has_token():
        why = "nobody is logged in to the Hub"
    else:
        try:
            return hub_account().name, []
        except SourceError as error:
            why = error.brief
    try:
        user = getpass.getuser()
    except (ImportError, KeyError, OSError):  # a user without an entry, in a container
        user = ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", user).strip("-._") or "owner"
    return name, [f"the owner is {name}, the user's name on this machine ({why}): --owner NAME gives another"]
