"""The command `release`: one recipe after the other on this machine, or many at a time by a fleet."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.consent import ask_for_consent
from packager.cli.fleet_options import (
    AttemptsOption,
    DiskOption,
    FleetOptions,
    GpusOption,
    JobsOption,
    PerHourOption,
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
    from pathlib import Path

    from packager.pipeline.build_options import Options
    from packager.pipeline.many_recipes import RecipeResult
    from packager.pipeline.release import ReleaseChecks
    from packager.system.terminal import Terminal


StrictOption = Annotated[
    bool, typer.Option("--strict", help="Build nothing if a recipe is wrong or this machine cannot build one.")
]
FailFastOption = Annotated[bool, typer.Option("--fail-fast", help="End with the first recipe that fails.")]
NoPublishOption = Annotated[
    bool, typer.Option("--no-publish", help="Build only; `publish` does the rest, here or elsewhere.")
]


def release_command(
    recipes: RecipesArgument = None,
    glob: GlobOption = None,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    strict: StrictOption = False,
    fail_fast: FailFastOption = False,
    no_publish: NoPublishOption = False,
    jobs: JobsOption = None,
    ray: RayOption = "",
    store: StoreOption = None,
    disk: DiskOption = None,
    store_size: StoreSizeOption = None,
    gpus: GpusOption = None,
    attempts: AttemptsOption = 4,
    priority: PriorityOption = None,
    per_hour: PerHourOption = None,
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
    the last finished block. With --store another machine can go on, too, and no two runs work on the same recipe. Only
    processes that publish get what may write; the others read gated models with PACKAGER_READ_TOKEN, not HF_TOKEN.

    With --ray the nodes of a Ray cluster do this, each in --dist/machines/NAME on its own disk, with the same recipes,
    inputs and version of packager. Only nodes started with --resources '{"publish": 1}' publish, with the token and the
    key (PACKAGER_SIGN_KEY) of their environment. A cluster of other machines must ask for a token
    (RAY_AUTH_MODE=token).
    """
    from packager.pipeline.release import ReleaseChecks

    fleet = FleetOptions(
        jobs=jobs, ray=ray, store=store, disk_bytes=disk, store_bytes=store_size, gpus=gpus, attempts=attempts,
        priorities=tuple(priority or ()), per_hour=tuple(per_hour or ()), trusted_keys=tuple(trusted_key or ()),
    )  # fmt: skip
    fleet.check(fail_fast=fail_fast, sign_key=sign_key is not None, cache=cache is not None)
    environ = dict(os.environ)  # before the passphrase leaves it: the process that publishes signs
    if sign_key is not None:
        environ["PACKAGER_SIGN_KEY"] = str(sign_key.absolute())
    keys = signing_keys(sign_key, trusted_key, ask=not fleet.several)
    attended = yes or (not fleet.several and sys.stdin.isatty())
    checks = ReleaseChecks(strict=strict, publishing=not no_publish, attended=attended, keys=keys, here=not ray)
    paths, options = choose(recipes, glob, format).paths, options_of(dist, device, cache, gpu_memory)
    answer = _Answer(terminal=terminal_of(), as_json=format is Format.json, assume_yes=yes, fail_fast=fail_fast)
    results = _release(paths, options, checks, answer, (fleet, environ) if fleet.several else None)
    if code := max(result.exit_code for result in results):
        raise typer.Exit(code)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """How a release speaks with whoever started it."""

    terminal: "Terminal"
    as_json: bool
    assume_yes: bool
    fail_fast: bool

    def show_results(self, results: "Sequence[RecipeResult]") -> None:
        """Print what became of each recipe, and add it to the summary of a GitHub job."""
        from packager.cli.release_view import print_results, results_json
        from packager.cli.step_summary import add_step_summary, results_markdown

        add_step_summary(lambda: results_markdown("Release", results), self.terminal.log)
        if self.as_json:
            self.terminal.result({"recipes": results_json(results)})
        else:
            print_results(results, self.terminal.out)


def _release(
    paths: "Sequence[Path]",
    options: "Options",
    checks: "ReleaseChecks",
    answer: _Answer,
    fleet: "tuple[FleetOptions, Mapping[str, str]] | None",
) -> "Sequence[RecipeResult]":
    """Release one recipe after the other, or by a fleet, with the variables that its publishing process gets."""
    from packager.cli.fleet_view import release_side_by_side
    from packager.cli.publish_view import print_publish_plan
    from packager.cli.status_view import print_status
    from packager.pipeline.release import release

    terminal = answer.terminal
    if fleet is not None:
        return release_side_by_side(paths, options, terminal, checks, fleet[0], answer.show_results, fleet[1])
    return release(
        paths,
        options,
        terminal,
        checks,
        fail_fast=answer.fail_fast,
        show_plan=lambda plan: print_publish_plan(plan, terminal.err),
        show_status=lambda file, options: None if answer.as_json else print_status(file, options, terminal.out),
        show_results=answer.show_results,
        consent=ask_for_consent("publish", assume_yes=answer.assume_yes),
    )
