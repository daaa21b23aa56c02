"""The command `release`: one recipe after the other on this machine, or many at a time by a fleet."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.consent import ask_for_consent
from packager.cli.fleet_options import (
    AttemptsOption,
    DiskOption,
    FleetOptions,
    GpusOption,
    JobsOption,
    PriorityOption,
    RayOption,
    StoreOption,
    StoreSizeOption,
)
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
    RecipesArgument,
    YesOption,
    options_of,
    terminal_of,
)
from packager.cli.over_recipes import choose
from packager.cli.signing import SignKeyOption, TrustedKeyOption, signing_keys

if TYPE_CHECKING:
    from packager.pipeline.many_recipes import RecipeResult


def release_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Build nothing if a recipe is wrong or this machine cannot build one.")
    ] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="End with the first recipe that fails.")] = False,
    no_publish: Annotated[
        bool, typer.Option("--no-publish", help="Build only; `publish` does the rest, here or elsewhere.")
    ] = False,
    jobs: JobsOption = None,
    ray: RayOption = "",
    store: StoreOption = "",
    disk: DiskOption = None,
    store_size: StoreSizeOption = None,
    gpus: GpusOption = None,
    attempts: AttemptsOption = 4,
    priority: PriorityOption = None,
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

    With --jobs recipes do not wait for each other: while some are computed, others are fetched and published. Each
    stage of a recipe is a process, whose log is in --dist/logs. After Ctrl-C or a kill, the same command goes on after
    the last finished block. With --store another machine can go on, too, and no two runs work on the same recipe.

    With --ray the nodes of a Ray cluster do this. Each works in --dist/machines/NAME on its own disk and has the same
    files and version of packager; recipes and a local target lie where all see them. Publishing is for nodes that were
    started with --resources '{"publish": 1}', which hold the token and the key (PACKAGER_SIGN_KEY) in their
    environment; no other task gets them. PACKAGER_READ_TOKEN reads gated models. A cluster that is not of this machine
    must use token authentication (RAY_AUTH_MODE=token). A node or a head that is lost costs what it computed since its
    last finished block.
    """
    from packager.cli.fleet_view import release_side_by_side
    from packager.cli.publish_view import print_publish_plan
    from packager.cli.release_view import print_results, results_json
    from packager.cli.status_view import print_status
    from packager.cli.step_summary import add_step_summary, results_markdown
    from packager.pipeline.release import ReleaseChecks, release

    fleet = FleetOptions(
        jobs=jobs, ray=ray, store=store, disk_bytes=disk, store_bytes=store_size, gpus=gpus, attempts=attempts,
        priorities=tuple(priority or ()),
    )  # fmt: skip
    fleet.check(fail_fast=fail_fast)
    terminal, as_json = terminal_of(), format is Format.json
    environ = dict(os.environ) if fleet.several else {}  # before the passphrase leaves it: the publishing process signs
    if sign_key is not None:
        environ["PACKAGER_SIGN_KEY"] = str(sign_key.absolute())
    keys, options = signing_keys(sign_key, trusted_key), options_of(dist, device, cache, gpu_memory)
    checks = ReleaseChecks(
        strict=strict,
        publishing=not no_publish,
        attended=yes or (not fleet.several and sys.stdin.isatty()),
        keys=keys,
        here=not ray,
    )

    def show_results(results: "Sequence[RecipeResult]") -> None:
        add_step_summary(lambda: results_markdown("Release", results), terminal.log)
        if as_json:
            terminal.result({"recipes": results_json(results)})
        else:
            print_results(results, terminal.out)

    paths = choose(recipes, glob, format).paths
    if fleet.several:
        results = release_side_by_side(paths, options, terminal, checks, fleet, show_results, environ)
    else:
        results = release(
            paths,
            options,
            terminal,
            checks,
            fail_fast=fail_fast,
            show_plan=lambda plan: print_publish_plan(plan, terminal.err),
            show_status=lambda file, options: None if as_json else print_status(file, options, terminal.out),
            show_results=show_results,
            consent=ask_for_consent("publish", assume_yes=yes),
        )
    if code := max(result.exit_code for result in results):
        raise typer.Exit(code)
