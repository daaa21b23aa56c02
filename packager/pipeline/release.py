"""A release run: build and publish every recipe that this machine can build, and report why others are left out."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from packager.errors import MachineError, PackagerError, PublishError
from packager.inputs.hub_models import access_problem
from packager.model.devices import choose_device
from packager.pipeline.build_state import STAGES, BuildState, Options, require_build_extra
from packager.pipeline.flow import build, publish, require_key
from packager.pipeline.plan import BuildPlan
from packager.publish.plan import PublishPlan
from packager.publish.sign_release import SigningKeys
from packager.quantize.engines import needs_cuda
from packager.quantize.memory import USABLE
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.system.text import gibibytes

# A CPU quantizes the demo in seconds and a 13B model in days: above this many parameters a GPU is required.
_LARGEST_ON_CPU = 1_000_000_000


def release(
    recipes: Sequence[Path],
    options: Options,
    terminal: Terminal,
    *,
    strict: bool,
    attended: bool = True,
    show_plan: Callable[[PublishPlan], None] = lambda _: None,
    show_status: Callable[[RecipeFile, Options], None] = lambda *_: None,
    consent: Callable[[PublishPlan], None] = lambda _: None,
    keys: SigningKeys | None = None,
) -> None:
    """Build and publish the recipes one after the other, each with a table at its end; report why others are left out.

    All recipes are read and planned before the first is built.

    Args:
        recipes: their files.
        options: where and how.
        terminal: gets all messages.
        strict: whether a recipe that this machine cannot build is an error.
        attended: whether `consent` can ask a person; if not, a target that others can see is refused first.
        show_plan: see `flow.publish`.
        show_status: called after each recipe is published.
        consent: see `flow.publish`.
        keys: see `flow.publish`.

    Raises:
        PublishError: two recipes have one repository, or not `attended` and a recipe's target is not local.
        PackagerError: of the first recipe that failed.
        MachineError: `strict`, and this machine cannot build one of them.
    """
    files = [RecipeFile.load(path) for path in recipes]
    _refuse_same_repository(files)
    for recipe_file in files:
        require_key(recipe_file, keys or SigningKeys())
    remote = [str(file.path) for file in files if file.recipe.repository.target != "local"]
    if remote and not attended:
        what = "publishing needs a confirmation, and standard input is not a terminal"
        raise PublishError(what, where=", ".join(remote), why="others can see it", hint="run again with --yes")
    reasons = {file.path: _why_not(BuildState(file, options, terminal)) for file in files}
    skipped = {path: reason for path, reason in reasons.items() if reason}
    if skipped and strict:
        raise _skipped_error(skipped)
    try:
        for recipe_file in files:
            if recipe_file.path not in skipped:
                terminal.log(str(recipe_file.path))
                build(recipe_file, options, terminal)
                publish(recipe_file, options, terminal, dry_run=False, show_plan=show_plan, consent=consent, keys=keys)
                show_status(recipe_file, options)
    finally:
        for path, reason in skipped.items():
            terminal.out.print(f"{path}: not built: {reason}", highlight=False, markup=False, soft_wrap=True)


def _refuse_same_repository(files: Sequence[RecipeFile]) -> None:
    """Raise PublishError if two recipes have one repository: each would replace the branches of the other."""
    by_id: dict[str, Path] = {}
    for file in files:
        first = by_id.setdefault(file.recipe.repository.id.lower(), file.path)
        if first is not file.path:
            raise PublishError(
                f"two recipes publish to {file.recipe.repository.id}",
                where=f"{first} and {file.path}",
                why="each would replace the branches of the other",
                hint="give one of them another repository.id, or put all variants into one recipe",
            )


def _skipped_error(skipped: Mapping[Path, str]) -> MachineError:
    return MachineError(
        "this machine cannot build every recipe",
        why="\n       ".join(f"{path}: {reason}" for path, reason in skipped.items()),
        hint="build these elsewhere, or leave out --strict",
    )


def _why_not(run: BuildState) -> str:
    """Return why this machine cannot continue a build, or ""; a finished build needs nothing of the machine."""
    with suppress(PackagerError):  # the build reports the error
        run.read_receipts()
    unfinished = any(map(run.missing, STAGES)) or run.loaders_to_run()
    return cannot_build(run.plan, run.options) if unfinished else ""


def cannot_build(plan: BuildPlan, options: Options) -> str:
    """Return why this machine cannot build a plan, or "" when it can.

    Raises:
        MachineError: the options demand a GPU and there is none.
    """
    try:
        require_build_extra()
    except MachineError as error:
        return f"{error.what} ({error.why})"
    base = plan.recipe.base_model
    return _lacking_memory(plan, options) or (access_problem(base.id) if base.revision else "")


def _lacking_memory(plan: BuildPlan, options: Options) -> str:
    device = choose_device(options.device)
    if device.type == "cpu" and (foreign := [v.variant.branch for v in plan.variants if needs_cuda(v.variant.engine)]):
        return f"needs a CUDA GPU for {', '.join(foreign)}, made by engine auto-gptq"
    quantizing = plan.memory.least.device_bytes if plan.memory is not None else 0
    needed = max(quantizing, plan.evaluation.gpu.device_bytes)
    if device.type == "cpu":
        too_large = plan.architecture.num_parameters > _LARGEST_ON_CPU
        return f"needs a CUDA GPU with {gibibytes(needed)} GiB" if too_large else ""
    import torch

    whole = round(USABLE * torch.cuda.get_device_properties(device).total_memory)
    limited = round(USABLE * options.gpu_memory_bytes) if options.gpu_memory_bytes else whole
    if quantizing > limited:
        return f"needs {gibibytes(quantizing)} GiB of a CUDA GPU, of this one {gibibytes(limited)} GiB can be used"
    if needed > whole:
        return f"measuring needs {gibibytes(needed)} GiB of a CUDA GPU, of this one {gibibytes(whole)} GiB can be used"
    return ""
