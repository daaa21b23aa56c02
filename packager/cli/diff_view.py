"""The command `diff`: what a publish would change."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packager.cli.options import (
    DIST,
    Device,
    DistOption,
    Format,
    FormatOption,
    GlobOption,
    RecipesArgument,
    options_of,
)
from packager.cli.over_recipes import choose, over_recipes

if TYPE_CHECKING:
    from rich.console import Console

    from packager.pipeline.compare_published import BranchDifference

TextsOption = Annotated[
    bool, typer.Option("--texts", help="Print the changed lines of cards and configs, too; JSON always has them.")
]


def diff_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    texts: TextsOption = False,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002 - the option's name
) -> None:
    """Show what differs between a build and what is published.

    For each branch: whether weights differ, and the values of the records that explain it (parameters, base model,
    texts, versions), the quality before and after, the loaders' results, and the other files. Reads the records and
    small files of the repository, no weights, and changes nothing. Exits with 0 whether there are differences or not,
    with 10 if the repository cannot be read.
    """
    from packager.pipeline.compare_published import compare_published

    options = options_of(dist, Device.cpu, None)
    over_recipes(
        choose(recipes, glob, format),
        lambda recipe_file, terminal: compare_published(recipe_file, options, terminal),
        show=lambda found, terminal: print_differences(found, terminal.out, texts=texts),
        as_json=lambda found: {"branches": [difference_json(each) for each in found]},
    )


def print_differences(found: "Sequence[BranchDifference]", console: "Console", *, texts: bool) -> None:
    """Print one line per branch, and below it what differs."""
    from packager.cli.tables import print_line
    from packager.pipeline.compare_published import quality_lines
    from packager.system.text import printable

    for each in found:
        print_line(console, printable(f"{each.branch}: {_headline(each)}"))
        for change in (*each.values, *each.loaders):
            print_line(console, f"  {change.key}: {change.published or 'nothing'} -> {change.built or 'nothing'}")
        if each.standing == "changed":
            for line in quality_lines(*each.quality):
                print_line(console, f"  {line}")
        for name, lines in each.texts.items() if texts else ():
            for line in (f"{printable(name)}:", *lines):
                print_line(console, f"  {line}")


def _headline(difference: "BranchDifference") -> str:
    from packager.cli.tables import counted

    if difference.standing == "unreadable":
        return f"cannot be compared: {difference.why}"
    if difference.standing != "changed":
        return difference.standing
    others = [name for name in difference.files if not name.endswith(".safetensors")]
    parts = ["other weights"] if difference.weights else ["the same weights"]
    return f"changed, {parts[0]}, {counted(len(others), 'other file')}: {', '.join(others)}"


def difference_json(difference: "BranchDifference") -> Mapping[str, Any]:
    """Return a difference for machines."""
    published, built = difference.quality
    return {
        "branch": difference.branch,
        "standing": difference.standing,
        "why": difference.why,
        "weights_differ": difference.weights,
        "values": [asdict(change) for change in difference.values],
        "loaders": [asdict(change) for change in difference.loaders],
        "quality": {
            "published": published.model_dump(mode="json") if published else None,
            "built": built.model_dump(mode="json") if built else None,
        },
        "files": list(difference.files),
        "texts": {name: list(lines) for name, lines in difference.texts.items()},
    }
