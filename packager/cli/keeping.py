"""`packager card --keep`: take hand-written sections of a card into the recipe's files, and say what to do next."""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from packager.cli.over_recipes import Chosen, over_recipes
from packager.cli.tables import print_line
from packager.errors import UsageError

if TYPE_CHECKING:
    from packager.pipeline.build_options import Options
    from packager.pipeline.keep_sections import KeptSections


def keep_card(chosen: Chosen, options: "Options", source: str, branch: str, *, dry_run: bool) -> None:
    """Keep the sections of one card.

    Raises:
        UsageError: several recipes are named.
    """
    from packager.pipeline.keep_sections import keep_sections

    if chosen.several:
        raise UsageError("--keep reads one card", hint="name one recipe")
    (path,) = chosen.paths
    over_recipes(
        chosen,
        lambda recipe_file, terminal: keep_sections(
            recipe_file, options, terminal, source=source, branch=branch, dry_run=dry_run
        ),
        show=lambda kept, terminal: _print_kept(kept, str(path), terminal.out, dry_run=dry_run),
        as_json=lambda kept: _as_json(kept, dry_run=dry_run),
    )


def _print_kept(kept: "KeptSections", recipe: str, console: Console, *, dry_run: bool) -> None:
    for name in kept.unchanged:
        print_line(console, f"{name}: {kept.path(name)} has these words already")
    if not kept.texts:
        print_line(console, f"nothing to keep of the card of {kept.branch}")
        return
    for name, text in kept.texts.items():
        lines = text.count("\n") + 1
        what = f"{lines} line{'s' * (lines != 1)}" if text else "emptied on the page, the file is removed"
        print_line(console, f"{name}: {kept.path(name)}, {what}{' (not written)' * dry_run}")
    if kept.is_new:
        print_line(console, f"Set in {recipe}, below card:  templates: {kept.folder}")
    print_line(console, f"The card of every branch will have them: packager card {recipe}")


def _as_json(kept: "KeptSections", *, dry_run: bool) -> dict[str, Any]:
    return {
        "branch": kept.branch,
        "written": not dry_run and bool(kept.texts),
        "sections": [{"name": name, "file": kept.path(name), "text": text} for name, text in kept.texts.items()],
        "unchanged": list(kept.unchanged),
        "set_card_templates": kept.folder if kept.is_new and kept.texts else None,
    }
