"""Which runtimes load each branch of a recipe, a folder or a repository, by the rules alone: nothing is run."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from packager.errors import AuditError, PlanError, PublishError
from packager.inputs.describe_in_child import description_by_transformers
from packager.model.checkpoint import MOST_RECORD_BYTES
from packager.model.compatibility import Verdict, verdicts
from packager.pipeline.plan import lacks_tokenizer_model
from packager.prove.declared import DECLARING_FILES, declared_checkpoint
from packager.publish.published.states import published_states
from packager.publish.targets import BranchState, Target
from packager.receipt import CONFIG, TOKENIZER_MODEL
from packager.recipe.file import RecipeFile
from packager.recipe.parsed_recipe import suggestion
from packager.system.scratch import ScratchFolder
from packager.system.text import printable
from packager.variant import MAIN, Variant


@dataclass(frozen=True, kw_only=True)
class JudgedBranch:
    """The verdicts on a branch.

    Attributes:
        branch: its name.
        variant: its parameters; None where they could not be read.
        model: class of transformers; "" where it could not be read.
        verdicts: one per runtime; none where the branch cannot be judged.
        problem: why it cannot be judged, or "".
    """

    branch: str
    variant: Variant | None = None
    model: str = ""
    verdicts: tuple[Verdict, ...] = ()
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Compatibility:
    """The verdicts on all branches of something.

    Attributes:
        where: the recipe, folder or repository.
        branches: in the recipe's order; of a repository, main first.
    """

    where: str
    branches: tuple[JudgedBranch, ...]


def compatibility_of_recipe(recipe_file: RecipeFile, branches: Collection[str]) -> Compatibility:
    """Judge a recipe's variants.

    Args:
        recipe_file: the recipe; of the model its lock is read.
        branches: only these; none are all.

    Raises:
        PlanError: the recipe has no such branch, or the lock cannot be used.
    """
    variants = {variant.branch: variant for variant in recipe_file.recipe.expanded_variants()}
    for branch in branches:
        if branch not in variants:
            hint = suggestion(branch, list(variants)) or f"it has {', '.join(variants)}"
            raise PlanError(f"the recipe has no branch {branch!r}", where=str(recipe_file.path), hint=hint)
    architecture, lacks = recipe_file.architecture, lacks_tokenizer_model(recipe_file)
    judged = tuple(
        JudgedBranch(
            branch=branch,
            variant=variant,
            model=architecture.model_class,
            verdicts=verdicts(variant, architecture, lacks_tokenizer_model=lacks, earlier=True),
        )
        for branch, variant in variants.items()
        if not branches or branch in branches
    )
    return Compatibility(where=str(recipe_file.path), branches=judged)


def compatibility_of_folder(folder: Path) -> Compatibility:
    """Judge a checkpoint folder, made by any program.

    Raises:
        AuditError: see `declared_checkpoint`.
    """
    has_tokenizer_model = (folder / TOKENIZER_MODEL).is_file()
    judged = _judged(folder, folder.absolute().name, has_tokenizer_model=has_tokenizer_model)
    return Compatibility(where=str(folder), branches=(judged,))


def compatibility_of_repository(target: Target, branches: Collection[str], log: Callable[[str], None]) -> Compatibility:
    """Judge the branches of a repository, by their small files.

    Args:
        target: the repository.
        branches: only these; none are all.
        log: gets a line per branch.

    Raises:
        PublishError: the repository cannot be read, or lacks one of `branches`.
        AuditError: no branch can be judged.
    """
    states = published_states(target, branches)
    chosen = sorted(set(branches or states), key=lambda branch: (branch != MAIN, branch))
    judged, problems = [], []
    for branch in chosen:
        log(f"{printable(branch)}: reading its small files")
        try:
            judged.append(_read_and_judged(target, branch, states[branch]))
        except (AuditError, PublishError) as error:
            problems.append(error)
            judged.append(JudgedBranch(branch=branch, problem=": ".join(filter(None, (error.what, error.why)))))
    if len(problems) == len(chosen):
        raise problems[0]
    return Compatibility(where=target.where, branches=tuple(judged))


def _read_and_judged(target: Target, branch: str, state: BranchState) -> JudgedBranch:
    with ScratchFolder("compat") as scratch:
        for name, content in _documents(target, branch, state).items():
            (scratch.path / name).write_bytes(content)
        try:
            return _judged(scratch.path, branch, has_tokenizer_model=TOKENIZER_MODEL in state.files)
        except AuditError as error:
            raise AuditError(error.what, where=f"{target.where}@{branch}: {CONFIG}", why=error.why) from error


def _documents(target: Target, branch: str, state: BranchState) -> Mapping[str, bytes]:
    """Return the documents of a branch, none of them larger than is read of any checkpoint."""
    found = {}
    for name in DECLARING_FILES:
        file = state.files.get(name)
        if file is None or file.size_bytes <= 0:
            continue
        if file.size_bytes > MOST_RECORD_BYTES:
            raise PublishError(
                f"{name} is too large", where=f"{target.where}@{branch}",
                why=f"it has more than {MOST_RECORD_BYTES:,} bytes",
            )  # fmt: skip
        found[name] = target.read_bytes(state.commit, name, size=file.size_bytes)[: file.size_bytes]
    return found


def _judged(folder: Path, branch: str, *, has_tokenizer_model: bool) -> JudgedBranch:
    declared = declared_checkpoint(folder, branch, description_by_transformers())
    found = verdicts(
        declared.variant, declared.architecture, lacks_tokenizer_model=not has_tokenizer_model, earlier=True
    )
    return JudgedBranch(
        branch=branch, variant=declared.variant, model=declared.architecture.model_class, verdicts=found
    )
