"""The command line: its commands, and the only code that catches errors and sets exit codes.

Results go to standard output (`--format json` for machines), progress and errors to standard error. Each command
imports what it needs in its body: `--help` imports nothing heavier than typer.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from packager import __version__
from packager.cli.consent import ask_for_consent
from packager.cli.doctor import doctor_command
from packager.cli.init import init_command
from packager.cli.locking import lock_command
from packager.cli.options import (
    DIST,
    CacheOption,
    Device,
    DeviceOption,
    DistOption,
    Format,
    FormatOption,
    GpuMemoryOption,
    QuietOption,
    RecipePath,
    YesOption,
    open_recipe,
    options_of,
    terminal_of,
)
from packager.cli.publishing import publish_command, rollback_command, verify_published_command
from packager.cli.signals import end_command, raise_on_signals
from packager.cli.signing import SignKeyOption, TrustedKeyOption, signing_keys
from packager.errors import PATH_REFUSALS, AuditError, LoaderError, PackagerError, path_refusal
from packager.inputs.hub_endpoint import require_endpoint

# pydantic's search for plugins reads the metadata of every installed package: 25 of 500 ms of `plan`, for no plugin.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Quantizing allocates and frees tensors of many sizes: without this, fragmentation loses a fifth of a GPU's memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Servers other than the Hub's own do not know the Xet protocol, and the client uses it without asking.
if os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") != "https://huggingface.co":
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
# The Hub client draws progress bars even where output is not a terminal.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_EPILOG = """
\b
Exit codes:
  0   success
  1   `lock --check`: a lock is not what would be written
  2   the command line or the recipe is wrong
  3   the base model cannot be read, or is not the one in the recipe
  4   the calibration or evaluation text cannot be used
  5   a linear cannot be quantized
  6   a checkpoint folder cannot be written
  7   a checkpoint folder or a published branch fails its audit
  8   a loader failed, or computed other values
  9   the model card cannot be rendered
  10  the publishing target refused, or a variant is not ready for it
  11  a file in the output folder was edited, or another run is in progress
  12  this machine lacks something: a GPU, memory, disk space, git, a package
  129 ended by SIGHUP: the terminal was closed
  130 interrupted by Ctrl-C
  143 ended by SIGTERM: a CI job was cancelled, for example

A first run, on any machine: packager release recipes/demo-llama.yaml
"""


class _Commands(TyperGroup):
    """Turn the errors of commands into messages and exit codes."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the command line."""
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt as error:  # typer would take every signal for Ctrl-C, and say nothing
            raise typer.Exit(end_command(error)) from None

    def invoke(self, ctx: Any) -> Any:  # typer's releases disagree on the module of Context
        """Run the command."""
        try:
            require_endpoint(os.environ)
            return super().invoke(ctx)
        except PackagerError as error:
            raise _reported(error) from error
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # typer shows the library's own words
            raise
        except PATH_REFUSALS as error:
            refusal = path_refusal(error)
            if refusal is None:
                raise
            raise _reported(refusal) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(end_command(error)) from None


def _reported(error: PackagerError) -> typer.Exit:
    terminal_of().error(error)
    return typer.Exit(error.exit_code)


app = typer.Typer(
    name="packager",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the time of boxes, and the same text at every width
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


def _version(wanted: bool) -> None:
    if wanted:
        terminal_of().write(f"packager {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn an fp16 language model into a published repository of GPTQ variants, one branch per variant.

    A recipe, a YAML file, names the base model, the calibration text and the variants. `init` writes the first one of a
    model, `lock` writes down what the base model is, `plan` shows what a recipe means, `build` quantizes, measures and
    verifies the variants and writes their model cards, `publish` makes the branches; `release` builds and publishes.
    Every command can be interrupted and run again.
    """


app.command("init")(init_command)
app.command("lock")(lock_command)


@app.command("plan")
def plan_command(recipe: RecipePath, format: FormatOption = Format.text) -> None:  # noqa: A002 - the option's name
    """Show what a recipe means: sizes, memory, disk, loaders.

    Reads only the recipe, its lock and a local base model's small files, so it works offline and without torch. Exits
    with 2 if the recipe is wrong or cannot be built from this model; every problem is printed with its line and column.
    """
    from packager.cli.plan_view import build_plan_json, print_build_plan
    from packager.pipeline.plan import make_plan

    gc.disable()  # a plan of 30,000 tensors makes many objects and no circles: looking for them took a fifth of it
    try:
        terminal, recipe_file = open_recipe(recipe)
        plan = make_plan(recipe_file)
    finally:
        gc.enable()
    if format is Format.json:
        terminal.result(build_plan_json(plan))
    else:
        print_build_plan(plan, terminal.out)


@app.command("build")
def build_command(
    recipe: RecipePath,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Quantize, measure and verify every variant.

    Writes the model cards, too. Publishes nothing. Finished work is not done again: an interrupted build continues
    after its last finished block. Exits with 8 if a loader failed or computed other values than our own forward pass;
    a loader that cannot run on this machine is reported and is no error.
    """
    from packager.cli.status_view import print_status
    from packager.pipeline.flow import build
    from packager.pipeline.status import status_json

    terminal, recipe_file = open_recipe(recipe, quiet=quiet)
    options = options_of(dist, device, cache, gpu_memory)
    build(recipe_file, options, terminal)
    if format is Format.json:
        terminal.result(status_json(recipe_file, options))
    else:
        print_status(recipe_file, options, terminal.out)


@app.command("audit")
def audit_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A GPTQ checkpoint folder, made by any program.",
            exists=True,
            file_okay=False,
            readable=False,
        ),
    ],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not require README.md and provenance.json.")
    ] = False,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Check a GPTQ folder for everything that runtimes refuse.

    It reads the headers of the weights and the small tensors, and hashes the files that provenance.json lists. A branch
    of packager describes its model; the tensors of any other folder are compared with what transformers builds from
    its config.json, if the build extra is installed. Exits with 0 if there is no error (there may be warnings), with 7
    if there is one.
    """
    from packager.cli.audit_view import audit_json, print_audit
    from packager.inputs.describe_in_child import description_by_transformers
    from packager.prove.audit import audit

    terminal = terminal_of()
    report = audit(folder, complete=not weights_only, describe=description_by_transformers())
    if format is Format.json:
        terminal.result(audit_json(report))
    else:
        print_audit(report, terminal.out)
    if not report.passed:
        raise typer.Exit(AuditError.exit_code)


@app.command("verify")
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
        terminal.result(
            {
                receipt.provenance.branch: [record.model_dump() for record in receipt.provenance.loaders]
                for receipt in receipts
            }
        )
    else:
        print_loaders(receipts, terminal.out)
    records = [record for receipt in receipts for record in receipt.provenance.loaders]
    if any(record.status == "failed" or (record.required and record.status != "passed") for record in records):
        raise typer.Exit(LoaderError.exit_code)


@app.command("card")
def card_command(
    recipe: RecipePath,
    branch: Annotated[str, typer.Option(help="The branch whose card is printed.")] = "main",
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Render the cards of built variants again and print one.

    Use it after a change of the recipe's texts or of the templates. All figures come from the receipts: no figure
    changes. Exits with 10 if a variant is not built and verified, with 11 if a card was edited by hand.
    """
    from packager.pipeline.flow import render

    terminal, recipe_file = open_recipe(recipe)
    text = render(recipe_file, options_of(dist, Device.cpu, None), terminal, branch=branch)
    if format is Format.json:
        terminal.result({"branch": branch, "card": text})
    else:
        terminal.write(text)


app.command("publish")(publish_command)
app.command("verify-published")(verify_published_command)
app.command("rollback")(rollback_command)


@app.command("status")
def status_command(
    recipe: RecipePath,
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

    terminal, recipe_file = open_recipe(recipe)
    options = options_of(dist, Device.cpu, None)
    if format is Format.json:
        if watch:
            raise typer.BadParameter("--watch shows text: give it without --format json")
        terminal.result(status_json(recipe_file, options))
    else:
        (watch_status if watch else print_status)(recipe_file, options, terminal.out)


@app.command("release")
def release_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="The recipes to build and publish.")],
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Build nothing if a recipe is wrong or this machine cannot build one.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with the first recipe that fails.")] = False,
    yes: YesOption = False,
    sign_key: SignKeyOption = None,
    trusted_key: TrustedKeyOption = None,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Build and publish what this machine can build.

    All recipes are read and planned first: nothing is built before that. A recipe that this machine cannot build is
    left out, and the reason is printed. A recipe that fails does not stop the others; the run ends with a table of all
    recipes, and exits with the highest exit code of those that failed. Exits with 0 even if recipes were left out. With
    `--strict` each of the recipes must be right, and one that this machine cannot build is an error (12).
    """
    from packager.cli.publish_view import print_publish_plan
    from packager.cli.release_view import print_results, results_json
    from packager.cli.status_view import print_status
    from packager.pipeline.release import release

    terminal, keys, as_json = terminal_of(), signing_keys(sign_key, trusted_key), format is Format.json
    results = release(
        list(dict.fromkeys(recipes)),
        options_of(dist, device, cache, gpu_memory),
        terminal,
        strict=strict,
        fail_fast=fail_fast,
        attended=yes or sys.stdin.isatty(),
        show_plan=lambda plan: print_publish_plan(plan, terminal.err),
        show_status=lambda file, options: None if as_json else print_status(file, options, terminal.out),
        show_results=lambda found: (
            terminal.result(results_json(found)) if as_json else print_results(found, terminal.out)
        ),
        consent=ask_for_consent("publish", assume_yes=yes),
        keys=keys,
    )
    if code := max(result.exit_code for result in results):
        raise typer.Exit(code)


app.command("doctor")(doctor_command)


def main() -> None:
    """Entry point of the `packager` command."""
    try:
        raise_on_signals()
        app()
    except KeyboardInterrupt as error:  # while typer reads the options of the commands
        sys.exit(end_command(error))
