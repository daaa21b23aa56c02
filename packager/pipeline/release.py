"""A release run: build and publish every recipe that this machine can build, and report why others are left out."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from packager.errors import MachineError, PackagerError, PublishError
from packager.inputs.hub_models import access_problem
from packager.model.devices import LARGEST_ON_CPU, choose_device
from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.flow import build, publish
from packager.pipeline.many_recipes import RecipeResult, Results
from packager.pipeline.plan import BuildPlan
from packager.pipeline.publish_checks import require_key
from packager.pipeline.stage_keys import STAGES
from packager.publish.plan import PublishPlan
from packager.publish.sign_release import SigningKeys
from packager.quantize.engines import needs_cuda
from packager.quantize.memory import USABLE
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.system.text import gigabytes


@dataclass(frozen=True, kw_only=True)
class ReleaseChecks:
    """What is checked before the first recipe of a release is built.

    Attributes:
        strict: nothing is built if a recipe is wrong, or if this machine cannot build one; all of them are reported.
        publishing: otherwise the recipes are built only, and no key is needed.
        attended: a person can be asked; if not, a target that others can see is refused first.
        keys: see `flow.publish`.
        here: this machine builds, and signs.
        read_token: with which builds read base models on the Hub, "" for none; None for that of this user.
    """

    strict: bool = False
    publishing: bool = True
    attended: bool = True
    keys: SigningKeys | None = None
    here: bool = True
    read_token: str | None = field(default=None, repr=False)


def release(
    recipes: Sequence[Path],
    options: Options,
    terminal: Terminal,
    checks: ReleaseChecks | None = None,
    *,
    fail_fast: bool = False,
    show_plan: Callable[[PublishPlan], None] = lambda _: None,
    show_status: Callable[[RecipeFile, Options], None] = lambda *_: None,
    show_results: Callable[[Sequence[RecipeResult]], None] = lambda _: None,
    consent: Callable[[PublishPlan], None] = lambda _: None,
) -> tuple[RecipeResult, ...]:
    """Build and publish the recipes one after the other; a recipe that fails does not stop the others.

    All recipes are read and planned before the first is built.

    Args:
        recipes: their files.
        options: where and how.
        terminal: gets all messages.
        checks: what is checked first, and whether the recipes are published.
        fail_fast: end with the first recipe that fails.
        show_plan: see `flow.publish`.
        show_status: called after each recipe is published, or built.
        show_results: called at the end, whatever ended the run, with a result for each recipe.
        consent: see `flow.publish`.

    Returns:
        A result for each recipe, in their order.

    Raises:
        PublishError: not `attended` and a recipe's target is not local.
        PackagerError: `fail_fast`, and a recipe failed.
        MachineError: `strict`, and this machine cannot build some of them, which are right.
    """
    checks = checks or ReleaseChecks()
    results = Results(terminal, stop=fail_fast, by_path={path: RecipeResult(path=path) for path in recipes})
    try:
        for file in wanted_recipes(results, options, checks):
            terminal.log(str(file.path))
            with results.recorded(file.path, "published" if checks.publishing else "built"):
                build(file, options, terminal)
                if checks.publishing:
                    publish(
                        file,
                        options,
                        terminal,
                        dry_run=False,
                        show_plan=show_plan,
                        consent=consent,
                        keys=checks.keys,
                    )
                show_status(file, options)
    finally:
        show_results(results.ordered)
    return results.ordered


def wanted_recipes(results: Results, options: Options, checks: ReleaseChecks) -> list[RecipeFile]:
    """Read and plan the recipes of a release, and return those that are built; the results get the others.

    Raises:
        PublishError, MachineError: see `release`.
    """
    signs = checks.publishing and checks.here
    files = _read_all(results, (checks.keys or SigningKeys()) if signs else None)
    _require_consent(files if checks.publishing else (), attended=checks.attended)
    wanted = _that_can_be_built(results, files, options, checks.read_token) if checks.here else files
    if checks.strict and any(result.outcome == "failed" for result in results.ordered):
        return []
    if checks.strict:
        _refuse_skipped(results)
    return wanted


def _read_all(results: Results, keys: SigningKeys | None) -> list[RecipeFile]:
    """Return the recipes that can be read and, with `keys`, signed; the results get the others."""
    files: list[RecipeFile] = []
    for path in list(results.by_path):
        with results.recorded(path):
            file = RecipeFile.load(path)
            results.update(path, repository=file.recipe.repository.id)
            if keys is not None:
                require_key(file, keys)
            files.append(file)
    for file in files:
        with results.recorded(file.path):
            _refuse_same_repository(file, files)
    return [file for file in files if results.by_path[file.path].outcome != "failed"]


def _that_can_be_built(
    results: Results, files: Sequence[RecipeFile], options: Options, read_token: str | None
) -> list[RecipeFile]:
    """Plan recipes and return those that this machine can build; the results get the others."""
    wanted = []
    for file in files:
        with results.recorded(file.path):
            if why := _why_not(BuildState(file, options, results.terminal), read_token):
                results.update(file.path, outcome="not built", why=why)
            else:
                wanted.append(file)
    return wanted


def _require_consent(files: Sequence[RecipeFile], *, attended: bool) -> None:
    remote = [str(file.path) for file in files if file.recipe.repository.target != "local"]
    if remote and not attended:
        what = "publishing needs a confirmation, and standard input is not a terminal"
        raise PublishError(what, where=", ".join(remote), why="others can see it", hint="run again with --yes")


def _refuse_same_repository(file: RecipeFile, files: Sequence[RecipeFile]) -> None:
    """Raise PublishError if another recipe has the same repository: each would replace the branches of the other."""
    wanted = file.recipe.repository.id
    same = [other.path for other in files if other.recipe.repository.id.lower() == wanted.lower()]
    if len(same) > 1:
        raise PublishError(
            f"{len(same)} recipes publish to {wanted}",
            where=" and ".join(map(str, same)),
            why="each would replace the branches of the other",
            hint="give each a repository.id of its own, or put all variants into one recipe",
        )


def _refuse_skipped(results: Results) -> None:
    """Raise MachineError if this machine cannot build some of the recipes; those count as failed."""
    skipped = {result.path: result.why for result in results.ordered if result.outcome == "not built"}
    if not skipped:
        return
    for path in skipped:
        results.update(path, outcome="failed", exit_code=MachineError.exit_code)
    raise MachineError(
        "this machine cannot build every recipe",
        why="\n       ".join(f"{path}: {reason}" for path, reason in skipped.items()),
        hint="build these elsewhere, or leave out --strict",
    )


def _why_not(run: BuildState, read_token: str | None) -> str:
    """Return why this machine cannot continue a build, or ""; a finished build needs nothing of the machine."""
    with suppress(PackagerError):  # the build reports the error
        run.read_receipts()
    unfinished = any(map(run.missing, STAGES)) or run.loaders_to_run()
    return cannot_build(run.plan, run.options, read_token) if unfinished else ""


def cannot_build(plan: BuildPlan, options: Options, read_token: str | None = None) -> str:
    """Return why this machine cannot build a plan, or "" when it can.

    Args:
        plan: of the recipe.
        options: where and how.
        read_token: see `ReleaseChecks`.

    Raises:
        MachineError: the options demand a GPU and there is none.
    """
    try:
        require_build_extra()
    except MachineError as error:
        return f"{error.what} ({error.why})"
    base = plan.recipe.base_model
    return _lacking_memory(plan, options) or (_unreadable(base.id, read_token) if base.revision else "")


def _unreadable(base_id: str, read_token: str | None) -> str:
    problem = access_problem(base_id, read_token)
    if not problem or read_token is None:
        return problem
    with_what = "with PACKAGER_READ_TOKEN" if read_token else "without a token: set PACKAGER_READ_TOKEN"
    return f"{problem} (the processes that build do not get HF_TOKEN, they read {with_what})"


def _lacking_memory(plan: BuildPlan, options: Options) -> str:
    device = choose_device(options.device)
    if device.type == "cpu" and (foreign := [v.variant.branch for v in plan.variants if needs_cuda(v.variant.engine)]):
        return f"needs a CUDA GPU for {', '.join(foreign)}, made by engine auto-gptq"
    quantizing = plan.memory.least.device_bytes if plan.memory is not None else 0
    needed = max(quantizing, plan.evaluation.gpu.device_bytes)
    if device.type == "cpu":
        too_large = plan.architecture.num_parameters > LARGEST_ON_CPU
        return f"needs a CUDA GPU with {gigabytes(needed)} GB" if too_large else ""
    import torch

    whole = round(USABLE * torch.cuda.get_device_properties(device).total_memory)
    limited = round(USABLE * options.gpu_memory_bytes) if options.gpu_memory_bytes else whole
    if quantizing > limited:
        return f"needs {gigabytes(quantizing)} GB of a CUDA GPU, of this one {gigabytes(limited)} GB can be used"
    if needed > limited:
        return f"measuring needs {gigabytes(needed)} GB of a CUDA GPU, of this one {gigabytes(limited)} GB can be used"
    return ""
