"""The keys of a variant's stages: for each, the digest of everything that determines its result (decision 4).

A stage whose key is unchanged is not run again. Making the keys needs neither torch nor a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packager.inputs.source_files import list_source_files
from packager.model.branch_rules import BRANCH_RULES_VERSION
from packager.pipeline.variant_plan import VariantPlan
from packager.prove.loaders import ISOLATED, LoaderSpec
from packager.prove.other_loader import loader_spec
from packager.receipt import EVALUATION_VERSION, digest_of
from packager.recipe.fields import DRAWING_VERSION
from packager.recipe.file import RecipeFile
from packager.recipe.task_models import EvaluationTask
from packager.system.files import file_records, sha256_file

StageName = Literal["weights", "evaluate", "verify", "tasks"]
STAGES: tuple[StageName, ...] = ("weights", "evaluate", "verify", "tasks")


@dataclass(frozen=True, kw_only=True)
class InputDigests:
    """The digests of the files on this machine that determine the result of a build, for the keys of its stages.

    Attributes:
        base: of the files of a local base model, without licences: no stage but the card reads them. Files on the Hub
            are identified by their commit.
        texts: of the calibration.
        evaluation: of the text, and of the questions; "" where there is none.
        loaders: of each loader of the recipe: its script, the module that all scripts share, and its lock.
        tasks: of each task of the recipe: its definition and its documents.
        task_programs: what `loaders` has of a loader, of the program that runs the tasks.
    """

    base: Mapping[str, str]
    texts: tuple[str, ...]
    evaluation: tuple[str, str]
    loaders: tuple[tuple[str, ...], ...]
    tasks: tuple[tuple[str, ...], ...]
    task_programs: tuple[str, ...]


def input_digests(recipe_file: RecipeFile, base: Mapping[str, str]) -> InputDigests:
    """Hash the files that a recipe names, but for the base model's, whose digests are given."""
    recipe = recipe_file.recipe
    evaluation = recipe.evaluation
    if evaluation.tasks:
        from packager.prove.tasks import TASKS_SPEC  # most recipes have none

        task_programs = _program_digests(TASKS_SPEC)
    else:
        task_programs = ()
    return InputDigests(
        base=base,
        texts=tuple(_local_digest(recipe_file, text.path) for text in recipe.calibration.texts),
        evaluation=(_local_digest(recipe_file, evaluation.path), _local_digest(recipe_file, evaluation.questions)),
        loaders=tuple(_program_digests(loader_spec(name)) for name in recipe.loaders.names),
        tasks=tuple(
            tuple(_local_digest(recipe_file, name) for name in (task.definition, *_documents(task)))
            for task in evaluation.tasks
        ),
        task_programs=task_programs,
    )


def _documents(task: EvaluationTask) -> tuple[str | None, ...]:
    return tuple(data.path for data in task.sources.values())


def base_digests(recipe_file: RecipeFile) -> dict[str, str]:
    """Hash the files of a local base model; {} for one on the Hub."""
    base = recipe_file.recipe.base_model
    if base.path is None:
        return {}
    files = list_source_files(recipe_file.base_folder(base.path))
    return {path.name: record.sha256 for path, record in file_records(files.paths).items()}


def stage_keys(
    recipe_file: RecipeFile, variant_plan: VariantPlan, inputs: InputDigests | None = None
) -> dict[str, str]:
    """Return, for each stage, the digest of everything that determines its result (no torch, no network).

    "quantize" is the key of the quantized tensors, "weights" that of the packed files.

    Args:
        recipe_file: the recipe.
        variant_plan: the variant.
        inputs: the digests of the files that the recipe names; None: they are hashed now.
    """
    recipe = recipe_file.recipe
    inputs = inputs or input_digests(recipe_file, base_digests(recipe_file))
    quantized = digest_of([variant_plan.digest, inputs.base, list(inputs.texts)])
    # Packing adds: the repository's id in quantize_config.json, the names and the sizes of the weights files, and the
    # rules for the branch's configs.
    packed = [recipe.repository.id, recipe.checkpoint.model_dump(mode="json"), BRANCH_RULES_VERSION]
    weights = digest_of([quantized, *packed])
    evaluation = recipe.evaluation
    held_out = digest_of([quantized, DRAWING_VERSION, evaluation.text(), *inputs.evaluation])
    measured = digest_of([held_out, EVALUATION_VERSION])
    verified = digest_of([held_out, weights, recipe.loaders.model_dump(mode="json"), list(map(list, inputs.loaders))])
    keys = {"quantize": quantized, "weights": weights, "evaluate": measured, "verify": verified}
    if not evaluation.tasks:
        return keys
    from packager.prove.task_figures import TASK_FIGURES_VERSION  # most recipes have no task

    # Where a score is written to does not change it.
    asked = [task.model_dump(mode="json", exclude={"leaderboard"}) for task in evaluation.tasks]
    files, programs = (list(map(list, inputs.tasks)), list(inputs.task_programs))
    return keys | {"tasks": digest_of([weights, TASK_FIGURES_VERSION, asked, files, programs])}


def _program_digests(spec: LoaderSpec) -> tuple[str, ...]:
    return tuple(sha256_file(path) for path in (spec.script, ISOLATED, spec.requirements))


def _local_digest(recipe_file: RecipeFile, name: str | None) -> str:
    return sha256_file(recipe_file.resolve(name)) if name is not None else ""
