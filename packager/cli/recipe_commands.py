"""The commands that work on recipes: `plan`, `build`, `verify`, `card`, `status`."""

import gc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import (
    DIST,
    CacheOption,
    Device,
    DeviceOption,
    DistOption,
    Format,
    FormatOption,
    GlobOption,
    GpuMemoryOption,
    OnlyOption,
    RecipePath,
    RecipesArgument,
    TrialOption,
    open_recipe,
    options_of,
    terminal_of,
    trial_dist,
)
from packager.cli.over_recipes import Chosen, choose, over_recipes
from packager.errors import LoaderError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from packager.pipeline.plan import BuildPlan
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal


def plan_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    only: OnlyOption = None,
    trial: TrialOption = None,
    resolved: Annotated[
        bool,
        typer.Option("--resolved", help="Print the recipe as it holds: with what it inherits, commits and defaults."),
    ] = False,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002 - the option's name
) -> None:
    """Show what a recipe means: sizes, memory, time, loaders.

    Reads only the recipe, its lock and a local base model's small files, so it works offline and without torch. The
    time is that of the builds in --dist, or else of a reference, which the line names. Exits with 2 if the recipe is
    wrong or cannot be built from this model; every problem is printed with its line and column. Of several recipes each
    is planned, whatever the others have; then the exit code is the highest of all.
    """
    from packager.cli.plan_view import (
        build_plan_json,
        durations_json,
        floor_warnings,
        print_build_plan,
        resolved_json,
        resolved_text,
        time_lines,
    )
    from packager.cli.tables import print_line
    from packager.pipeline.durations import durations
    from packager.pipeline.plan import make_plan

    def act(recipe_file: "RecipeFile", _: "Terminal") -> "BuildPlan":
        return make_plan(recipe_file, only or ())

    def show(plan: "BuildPlan", terminal: "Terminal") -> None:
        if resolved:
            terminal.write(resolved_text(plan.recipe))
        else:
            print_build_plan(plan, terminal.out)
            for text in (*time_lines(durations(plan, dist)), *floor_warnings(plan, dist)):
                print_line(terminal.out, text)

    def as_json(plan: "BuildPlan") -> Mapping[str, object]:
        if resolved:
            return resolved_json(plan.recipe)
        times = durations_json(durations(plan, dist))
        return {**build_plan_json(plan), "time": times, "warnings": floor_warnings(plan, dist)}

    gc.disable()  # a plan of 30,000 tensors makes many objects and no circles: looking for them took a fifth of it
    try:
        over_recipes(
            choose(recipes, glob, format, trial),
            act,
            show=show,
            as_json=as_json,
        )
    finally:
        gc.enable()


def build_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    only: OnlyOption = None,
    trial: TrialOption = None,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Quantize, measure and verify every variant.

    Writes the model cards, too. Publishes nothing. Finished work is not done again: an interrupted build continues
    after its last finished block. Exits with 8 if a loader failed or computed other values than our own forward pass;
    a loader that cannot run on this machine is reported and is no error. Several recipes are built one after the other;
    one that fails does not stop the others, and the exit code is the highest of all.

    With --only, some variants are built, and the cards wait for the others: nothing is published before. With --set,
    the recipe is another one for a trial, in a folder of its own below --dist; its receipts hold the settings, and
    publish refuses them.
    """
    from packager.cli.status_view import print_status
    from packager.cli.step_summary import add_step_summary, branches_markdown, results_markdown
    from packager.pipeline.flow import build
    from packager.pipeline.status import read_status, status_json

    options = options_of(trial_dist(dist, trial or ()), device, cache, gpu_memory)

    def act(recipe_file: "RecipeFile", terminal: "Terminal") -> "RecipeFile":
        build(recipe_file, options, terminal, only=only or ())
        heading = f"Built: {recipe_file.recipe.repository.id}"
        add_step_summary(lambda: branches_markdown(heading, read_status(recipe_file, options)), terminal.log)
        return recipe_file

    over_recipes(
        choose(recipes, glob, format, trial),
        act,
        show=lambda recipe_file, terminal: print_status(recipe_file, options, terminal.out),
        as_json=lambda recipe_file: status_json(recipe_file, options),
        outcome="built",
        show_results=lambda results: add_step_summary(lambda: results_markdown("Build", results), terminal_of().log),
    )


def verify_command(
    recipe: RecipePath,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Run the loaders on the built variants again.

    Each loader opens each variant, and its logits are compared with those of our own float32 forward pass. The results
    replace those in the receipts and the cards; the result of a loader that cannot run on this machine stays. Exits
    with 0 if every required loader passed and no other loader failed, otherwise with 8; with 10 if a variant is not
    built.
    """
    from packager.cli.status_view import print_loaders
    from packager.pipeline.flow import reverify

    terminal, recipe_file = open_recipe(recipe)
    receipts = reverify(recipe_file, options_of(dist, device, cache), terminal)
    if format is Format.json:
        records = {receipt.provenance.branch: receipt.provenance.loaders for receipt in receipts}
        branches = {branch: [record.model_dump(mode="json") for record in found] for branch, found in records.items()}
        terminal.result({"repository": recipe_file.recipe.repository.id, "branches": branches})
    else:
        print_loaders(receipts, terminal.out)
    results = [record for receipt in receipts for record in receipt.provenance.loaders]
    if any(record.status == "failed" or (record.required and record.status != "passed") for record in results):
        raise typer.Exit(LoaderError.exit_code)


def card_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    branch: Annotated[str, typer.Option(help="The branch whose card is printed.")] = "main",
    preview: Annotated[
        bool, typer.Option("--preview", help="Before a build: write the card as an HTML page, with planned sizes.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the preview in the browser.")] = False,
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            metavar="published|README.md",
            help="Take the sections that somebody wrote on this card of --branch into the recipe's templates folder.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --keep: only show what would be written.")] = False,
    trial: TrialOption = None,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Render the cards of built variants again and print one.

    Use it after a change of the recipe's texts or of the templates. All figures come from the receipts: no figure
    changes. --preview shows a card before a build, without torch and without a network. --keep renders nothing: it
    reads an edited card (`published`: the one in the recipe's repository), and writes what stands between its section
    markers into files of the recipe. Of several recipes the cards are rendered, and none is printed. Exits with 10 if
    a variant is not built and verified, with 11 if a file of a card was edited by hand, a receipt cannot be read or
    another build of the recipe is running, with 7 if a folder fails the audit. --keep exits with 10 if no card is
    published, with 9 if a line outside of the sections would be lost or a section cannot be part of a card, with 11 if
    a section's file has other words than the page.
    """
    from packager.pipeline.flow import render

    if open_page and not preview:
        raise UsageError("a page is written by --preview alone", hint="give --preview with --open")
    if keep is not None:
        from packager.cli.keeping import keep_card

        if preview or trial:
            raise UsageError("--keep reads one card", hint="leave out --preview and --set")
        keep_card(choose(recipes, glob, format), options_of(dist, Device.cpu, None), keep, branch, dry_run=dry_run)
        return
    if dry_run:
        raise UsageError("--dry-run belongs to --keep", hint="packager card writes the cards of the output folder")
    folder = trial_dist(dist, trial or ())
    options, chosen = options_of(folder, Device.cpu, None), choose(recipes, glob, format, trial)
    if preview:
        _preview(chosen, folder, branch, open_page=open_page)
        return
    over_recipes(
        chosen,
        lambda recipe_file, terminal: render(recipe_file, options, terminal, branch=branch),
        show=lambda text, terminal: None if chosen.several else terminal.write(text),
        as_json=lambda text: {"branch": branch, "card": text},
    )


def _preview(chosen: Chosen, folder: "Path", branch: str, *, open_page: bool) -> None:
    from packager.pipeline.preview import write_preview

    def show_page(path: "Path", terminal: "Terminal") -> None:
        terminal.write(f"{path}\n")
        if open_page:
            typer.launch(path.absolute().as_uri())

    over_recipes(
        chosen,
        lambda recipe_file, _: write_preview(recipe_file, folder, branch),
        show=show_page,
        as_json=lambda path: {"branch": branch, "preview": str(path)},
    )


def status_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    trial: TrialOption = None,
    dist: DistOption = DIST,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the build that is running until it ends.")] = False,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Show what is built, proven and published.

    Changes nothing. Shows the size, the quality, the loaders' results and the published commit of each variant. Of
    an interrupted build it counts the finished blocks, with which the next run continues. Exits with 0 even if
    nothing is built; `--format json` lists the stages that are missing.
    """
    from packager.cli.status_view import print_status, watch_status
    from packager.pipeline.status import status_json

    options, chosen = options_of(trial_dist(dist, trial or ()), Device.cpu, None), choose(recipes, glob, format, trial)
    if watch and (format is Format.json or chosen.several):
        raise UsageError("--watch shows one recipe as text", hint="leave out --format json, and name one recipe")
    over_recipes(
        chosen,
        lambda recipe_file, _: recipe_file,
        show=lambda recipe_file, terminal: (watch_status if watch else print_status)(
            recipe_file, options, terminal.out
        ),
        as_json=lambda recipe_file: status_json(recipe_file, options),
    )
