"""The Python interface, for notebooks and scripts of one's own: `plan`, `build`, `status`, `card`, `publish`.

Each does what the command of its name does and returns its result; nothing is printed but the log, on standard error.
The names in `__all__`, their arguments and the documented fields of what they return follow semantic versions; all
other modules may change in any release. Importing this module imports nothing heavy. docs/reference/python.md has an
example.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.errors import PackagerError, PublishError
from packager.model.devices import GPU_ALLOCATION

if TYPE_CHECKING:
    from packager.pipeline.build_options import Options
    from packager.pipeline.flow import BuildResult
    from packager.pipeline.plan import BuildPlan
    from packager.pipeline.status import BranchStatus
    from packager.publish.branches import PublishReport
    from packager.publish.plan import PublishPlan
    from packager.system.terminal import Terminal

__all__ = ["PackagerError", "build", "card", "plan", "publish", "status"]

os.environ.setdefault(*GPU_ALLOCATION)


def plan(recipe: str | Path, *, only: Collection[str] = (), settings: Sequence[str] = ()) -> "BuildPlan":
    """Return what a recipe means: branches, exact sizes in bytes, memory, disk, and the loaders' verdicts.

    Reads the recipe, its lock and a local base model's small files; needs no network and no torch.

    Args:
        recipe: a recipe file.
        only: of these branches; none are all.
        settings: `KEY=VALUE`, which change the recipe for a trial.

    Raises:
        PackagerError: the recipe is wrong, or cannot be built from this model; `problems` has each with its line.
    """
    from packager.pipeline.plan import make_plan
    from packager.recipe.file import RecipeFile

    return make_plan(RecipeFile.load(Path(recipe), trial=settings), only)


def build(
    recipe: str | Path,
    *,
    dist: str | Path = "dist",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    only: Collection[str] = (),
    gpu_memory_bytes: int | None = None,
    cache: str | Path | None = None,
    quiet: bool = False,
) -> "BuildResult":
    """Quantize, measure and verify every variant, and write the cards; continue what was interrupted.

    Args:
        recipe: a recipe file.
        dist: the output folder.
        device: where to compute; "auto" uses a CUDA GPU if there is one.
        only: work on these branches; none are all.
        gpu_memory_bytes: of each GPU that quantizing and measuring may use; None is what is free.
        cache: the folder of the loaders' environments; None is that of the command line.
        quiet: log nothing.

    Returns:
        The receipts in the recipe's order, each with its quality and its loaders' results, and what was done now.

    Raises:
        PackagerError: of the stage that failed; what is finished is kept.
    """
    from packager.pipeline import flow
    from packager.recipe.file import RecipeFile

    options = _options(dist, device=device, gpu_memory_bytes=gpu_memory_bytes, cache=cache)
    return flow.build(RecipeFile.load(Path(recipe)), options, _terminal(quiet=quiet), only=only)


def status(recipe: str | Path, *, dist: str | Path = "dist") -> "tuple[BranchStatus, ...]":
    """Return what is built, proven and published of each variant, in the recipe's order; change nothing.

    Raises:
        PackagerError: the recipe is wrong.
    """
    from packager.pipeline.status import read_status
    from packager.recipe.file import RecipeFile

    return read_status(RecipeFile.load(Path(recipe)), _options(dist))


def card(recipe: str | Path, *, branch: str = "main", dist: str | Path = "dist", quiet: bool = False) -> str:
    """Render the cards of all built variants again, and return one, as Markdown.

    Raises:
        PackagerError: a variant is not built and verified, or a card was edited.
    """
    from packager.pipeline.flow import render
    from packager.recipe.file import RecipeFile

    return render(RecipeFile.load(Path(recipe)), _options(dist), _terminal(quiet=quiet), branch=branch)


def publish(
    recipe: str | Path,
    *,
    dist: str | Path = "dist",
    dry_run: bool = False,
    tag: str = "",
    in_public: bool = False,
    quiet: bool = False,
) -> "PublishReport":
    """Publish the built variants, one branch each, without signatures; build nothing.

    Args:
        recipe: a recipe file.
        dist: the output folder of the build.
        dry_run: plan and check, write nothing.
        tag: a name for main's commit, "" for none.
        in_public: must be true to change a repository that other people can see.
        quiet: log nothing.

    Returns:
        The plan, and the commit of each branch.

    Raises:
        PackagerError: a variant is not ready, the target refused, or a public change was not allowed.
    """
    from packager.pipeline import flow
    from packager.recipe.file import RecipeFile

    def consent(plan: "PublishPlan") -> None:
        if not in_public:
            raise PublishError(
                "nothing was changed: others can see this repository",
                where=plan.where,
                why=f"it would change {', '.join(plan.effects)}",
                hint="look at the plan with dry_run=True, then call publish with in_public=True",
            )

    recipe_file = RecipeFile.load(Path(recipe))
    terminal = _terminal(quiet=quiet)
    return flow.publish(recipe_file, _options(dist), terminal, dry_run=dry_run, consent=consent, tag=tag)


def _options(
    dist: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "cpu",
    gpu_memory_bytes: int | None = None,
    cache: str | Path | None = None,
) -> "Options":
    from packager.pipeline.build_options import Options, default_cache

    return Options(
        dist=Path(dist),
        cache=Path(cache) if cache is not None else default_cache(os.environ),
        device=device,
        environ=dict(os.environ),
        gpu_memory_bytes=gpu_memory_bytes,
    )


def _terminal(*, quiet: bool) -> "Terminal":
    from packager.system.terminal import Terminal

    return Terminal(quiet=quiet)
