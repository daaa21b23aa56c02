"""A release run: build and publish every recipe that this machine can build, and account for the rest."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from packager.build_state import Build, Options, choose_device
from packager.errors import MachineError, PackagerError
from packager.pipeline import build, publish
from packager.plan import BuildPlan
from packager.progress import Terminal
from packager.recipe.file import RecipeFile
from packager.source import access_problem
from packager.status import print_status

# A CPU quantizes the demo in seconds and a 13B model in days: above this many parameters a GPU is asked for.
_LARGEST_ON_CPU = 1_000_000_000


def release(recipes: Sequence[Path], options: Options, terminal: Terminal, *, strict: bool) -> None:
    """Build and publish the recipes one after the other; end with one table each.

    All recipes are read and planned before the first is built.

    Raises:
        PackagerError: of the first recipe that failed.
        MachineError: `strict`, and this machine cannot build one of them.
    """
    files = [RecipeFile.load(path) for path in recipes]
    reasons = {}
    for recipe_file in files:
        run = Build(recipe_file, options, terminal)
        with suppress(PackagerError):  # building it will say what is wrong
            run.read_receipts()
        done = not any(run.missing(stage) for stage in ("weights", "evaluate", "verify"))
        reasons[recipe_file.path] = "" if done else cannot_build(run.plan, options)
    skipped = {path: reason for path, reason in reasons.items() if reason}
    if skipped and strict:
        raise _skipped_error(skipped)
    for recipe_file in files:
        if recipe_file.path in skipped:
            continue
        terminal.say(f"{recipe_file.path}")
        build(recipe_file, options, terminal)
        publish(recipe_file, options, terminal, dry_run=False)
        print_status(recipe_file, options, terminal.out)
    for path, reason in skipped.items():
        terminal.out.print(f"{path}: not built: {reason}", highlight=False, markup=False)


def _skipped_error(skipped: dict[Path, str]) -> MachineError:
    return MachineError(
        "this machine cannot build every recipe",
        why="; ".join(f"{path}: {reason}" for path, reason in skipped.items()),
        hint="build these elsewhere, or leave out --strict",
    )


def cannot_build(plan: BuildPlan, options: Options) -> str:
    """Return why this machine cannot build a plan, or "" when it can."""
    device = choose_device(options.device)
    if device.type == "cpu":
        if plan.architecture.num_parameters > _LARGEST_ON_CPU:
            return (
                f"needs a CUDA GPU with {_gib(plan.memory.gpu_bytes_one_variant)} GiB for one variant at a time, "
                f"{_gib(plan.memory.gpu_bytes)} GiB for all in one sweep"
            )
        return ""
    import torch

    free = torch.cuda.get_device_properties(device).total_memory
    if plan.memory.gpu_bytes > free:
        return f"needs {_gib(plan.memory.gpu_bytes)} GiB of GPU memory, this GPU has {_gib(free)} GiB"
    base = plan.recipe.base_model
    return access_problem(base.id) if base.revision else ""


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f}"
