"""Stage 2, plan: everything a build will need and make, computed from the recipe and config.json before it starts.

No network, no torch: exact file sizes, a prediction per loader, memory and disk, and a digest per variant.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from packager.errors import PlanError
from packager.inputs.base_model import check_folder_of
from packager.model.architecture import Architecture
from packager.model.branch_config import normalized
from packager.model.branch_rules import ModelFacts
from packager.model.checkpoint import count_problem, fit_problems, length_problem
from packager.model.compatibility import Verdict, verdicts
from packager.model.runtimes import OTHER_LOADER
from packager.pipeline.branch_files import check_small_files
from packager.pipeline.card_texts import card_text_problems
from packager.pipeline.variant_plan import (
    VariantPlan,
    VariantPlanner,
    mix_problems,
    mix_refusals,
    only_measured,
    variant_description,
)
from packager.prove.evaluation_memory import EvaluationMemory, evaluation_memory
from packager.quantize.engines import engine_problems
from packager.quantize.memory import HOST_LIMIT_BYTES, SweepPlan, sweep_ways
from packager.quantize.workload import Workload
from packager.receipt import CONFIG, TOKENIZER_MODEL
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile
from packager.recipe.parsed_recipe import suggestion
from packager.variant import Variant

_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Ways of engine native to quantize its variants, and their estimated peak memory.

    Python, torch and CUDA themselves are not counted.

    Attributes:
        fastest: on a GPU, all variants in one sweep, everything in its memory.
        full_speed: on the smallest GPU that is as fast, if it reads the weights several times.
        least: on the smallest GPU of all, slower where batches run again or weights wait on the host.
        cpu: in host memory when there is no GPU (float32).
    """

    fastest: SweepPlan
    full_speed: SweepPlan
    least: SweepPlan
    cpu: SweepPlan


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """The estimated peak memory of measuring the variants; Python, torch and CUDA themselves are not counted."""

    gpu: EvaluationMemory
    cpu: EvaluationMemory


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Disk space at the end of a build, weights only: tokenizers and cards are a few megabytes more.

    Building takes no space of its own: a checkpoint is made in the files that it is published from.

    Attributes:
        source_bytes: the base model's download (0 for a local folder).
        builds_bytes: the checkpoint folders, reserved before the first block.
        publish_bytes: the same weights once more in a local publishing target.
        losses_bytes: what is quantized only to measure losses for mixes, and deleted when their bits are chosen.
    """

    source_bytes: int
    builds_bytes: int
    publish_bytes: int
    losses_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return self.source_bytes + self.builds_bytes + self.publish_bytes + self.losses_bytes


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """The result and the needs of a build; variants in the recipe's order.

    `changes` has a sentence for each value that a branch's configs get otherwise than the base model has it: of a model
    on the Hub only those of config.json are known.
    """

    recipe: Recipe
    architecture: Architecture
    variants: tuple[VariantPlan, ...]
    memory: MemoryPlan | None  # None where no variant has engine native: other engines' memory is not planned
    evaluation: EvaluationPlan
    disk: DiskPlan
    calibration_tokens: int
    changes: tuple[str, ...]

    @property
    def context_tokens(self) -> int:
        """The tokens of the row whose cache `run_bytes` counts."""
        return min(_CONTEXT_TOKENS, self.architecture.max_position_embeddings or _CONTEXT_TOKENS)

    @property
    def context_bytes(self) -> int:
        """What the model caches of `context_tokens` tokens: keys and values in fp16, and states."""
        return self.architecture.cache_bytes(self.context_tokens)

    @property
    def only_measured(self) -> tuple[VariantPlan, ...]:
        """What is quantized only to measure losses for mixes: no variant of the recipe has the same parameters."""
        return only_measured(self.variants)

    def run_bytes(self, variant_plan: VariantPlan) -> int:
        """Return the device memory of using a variant: its tensors and the cache of one row."""
        return variant_plan.tensor_bytes + self.context_bytes


def make_plan(recipe_file: RecipeFile, only: Collection[str] = ()) -> BuildPlan:
    """Plan a build offline.

    Args:
        recipe_file: what is built.
        only: plan these branches alone; none are all.

    Raises:
        PlanError: variants cannot be made from this model, a required loader refuses one, or a text of the card cannot
            be part of a page; all are named.
        SourceError: a local base model cannot be used.
        CardError: a text of the card cannot be read.
        LoaderError: a loader of another package is not installed, or broken.
    """
    recipe = recipe_file.recipe
    architecture = recipe_file.architecture
    variants = recipe.expanded_variants()
    lacks = lacks_tokenizer_model(recipe_file)
    judged = {variant.branch: _verdicts(recipe, variant, architecture, lacks=lacks) for variant in variants}
    by_mixes = mix_refusals(recipe, architecture, variants, judged)
    problems = [
        *_fit_problems(recipe, architecture, variants),
        *engine_problems(variants, recipe_file.config, architecture, recipe.calibration.seq_len),
        *mix_problems(architecture, variants),
        *by_mixes.values(),
        *_loader_problems(recipe, judged, by_mixes),
        *card_text_problems(recipe_file),
    ]
    _refuse(problems, recipe_file)
    check_folder_of(recipe_file)
    changes = _changes(recipe_file)
    planner = VariantPlanner(recipe, architecture, recipe_file.lock.base_model.revision)
    planned = tuple(replace(planner.plan(variant), verdicts=judged[variant.branch]) for variant in variants)
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    described = _described(recipe, planned)
    if recipe.card.templates is not None:
        # Few recipes have templates of their own, and rendering takes many modules.
        from packager.pipeline.predicted_card import PredictedCards
        from packager.pipeline.template_check import template_page_problems

        cards = PredictedCards(recipe_file=recipe_file, architecture=architecture, variants=described)
        _refuse(template_page_problems(cards), recipe_file)
    chosen = chosen_variants(described, only, str(recipe_file.path))
    return BuildPlan(
        recipe=recipe,
        architecture=architecture,
        variants=chosen,
        memory=_memory(architecture, recipe, [each.variant for each in chosen], len(only_measured(chosen))),
        evaluation=_evaluation(architecture, recipe),
        disk=_disk(recipe, architecture, chosen),
        calibration_tokens=tokens,
        changes=changes,
    )


def _refuse(problems: Sequence[str], recipe_file: RecipeFile) -> None:
    if problems:
        raise PlanError(
            "the recipe cannot be built from this model", where=str(recipe_file.path), why="\n       ".join(problems)
        )


def chosen_variants(planned: Sequence[VariantPlan], only: Collection[str], where: str) -> tuple[VariantPlan, ...]:
    """Return the variants of some branches, in the recipe's order; all of them if no branch is named.

    Raises:
        PlanError: the recipe has no such branch.
    """
    known = [variant_plan.variant.branch for variant_plan in planned]
    for branch in only:
        if branch not in known:
            hint = suggestion(branch, known) or f"it has {', '.join(known)}"
            raise PlanError(f"the recipe has no branch {branch!r}", where=where, hint=hint)
    return tuple(each for each in planned if not only or each.variant.branch in only)


def _changes(recipe_file: RecipeFile) -> tuple[str, ...]:
    """Audit the small files of a local base model, and return what a branch gets otherwise.

    Raises:
        SourceError: see `check_small_files`.
    """
    folder, architecture = recipe_file.recipe.base_model.path, recipe_file.architecture
    if folder is not None:
        return check_small_files(recipe_file.base_folder(folder), recipe_file.recipe, architecture)
    return normalized(CONFIG, recipe_file.config, ModelFacts.of(recipe_file.config, architecture)).changes


def lacks_tokenizer_model(recipe_file: RecipeFile) -> bool:
    """Return whether the base model is a local folder without tokenizer.model; False where it is not known."""
    folder = recipe_file.recipe.base_model.path
    return folder is not None and not (recipe_file.base_folder(folder) / TOKENIZER_MODEL).is_file()


def _fit_problems(recipe: Recipe, architecture: Architecture, variants: Sequence[Variant]) -> list[str]:
    """Return which row lengths and variants do not fit the model."""
    lengths = {
        "calibration.seq_len": recipe.calibration.seq_len,
        "evaluation.seq_len": recipe.evaluation.seq_len,
        "loaders.seq_len": recipe.loaders.seq_len,
    }
    return [
        *(() if architecture.example_linears else ("no weight of the model can be quantized, says its lock",)),
        *filter(None, (count_problem(architecture),)),
        *filter(None, (length_problem(architecture, key, seq_len) for key, seq_len in lengths.items())),
        *(
            f"{variant.branch}: {problem.message}"
            for variant in variants
            for bits in variant.all_bits
            for problem in fit_problems(architecture, bits=bits, group_size=variant.group_size)
        ),
    ]


def _verdicts(recipe: Recipe, variant: Variant, architecture: Architecture, *, lacks: bool) -> tuple[Verdict, ...]:
    """Return the verdicts of all runtimes that packager knows, and of the other packages' that the recipe names."""
    known = verdicts(variant, architecture, lacks_tokenizer_model=lacks)
    if not any(name.startswith(OTHER_LOADER) for name in recipe.loaders.names):
        return known
    # Here, because few recipes name one: `plan` starts faster.
    from packager.prove.other_loader import other_verdicts

    return (*known, *other_verdicts(recipe.loaders.names, variant, architecture))


def _loader_problems(
    recipe: Recipe, judged: Mapping[str, Sequence[Verdict]], reported: Collection[tuple[str, str]]
) -> list[str]:
    """Return which required loaders are known to refuse a variant: publishing could never succeed."""
    return [
        f"{branch}: the required loader {verdict.loader} {verdict.reason}"
        for branch, found in judged.items()
        for verdict in found
        if verdict.loader in recipe.loaders.required and not verdict.is_tried
        if (branch, verdict.loader) not in reported
    ]


def _described(recipe: Recipe, planned: Sequence[VariantPlan]) -> tuple[VariantPlan, ...]:
    sizes = [variant_plan.weights_bytes for variant_plan in planned]
    return tuple(
        replace(
            variant_plan,
            description=entry.description
            or variant_description(variant_plan.variant, variant_plan.weights_bytes, sizes),
        )
        for variant_plan, entry in zip(planned, recipe.variants, strict=True)
    )


def _memory(
    architecture: Architecture, recipe: Recipe, variants: Sequence[Variant], measured: int
) -> MemoryPlan | None:
    native = [variant for variant in variants if variant.engine == "native"]
    if not native:
        return None
    # What is mixed is quantized when the bits are chosen, after all else.
    mixed = sum(variant.mix is not None for variant in native)
    work = Workload.of(
        architecture, recipe.calibration.num_samples, recipe.calibration.seq_len, native,
        num_variants=max(len(native) - mixed + measured, mixed),
    )  # fmt: skip
    ways = list(sweep_ways(work, "cuda"))
    usual = [way for way in ways if way.host_bytes <= HOST_LIMIT_BYTES] or ways
    fastest = ways[0]
    as_fast = [way for way in usual if (way.suspended_batches, way.weights) == (fastest.suspended_batches, "device")]
    return MemoryPlan(
        fastest=fastest,
        full_speed=min(as_fast or [fastest], key=_device_bytes),
        least=min(usual, key=_device_bytes),
        cpu=next(sweep_ways(work, "cpu")),
    )


def _evaluation(architecture: Architecture, recipe: Recipe) -> EvaluationPlan:
    num_tokens, seq_len = recipe.evaluation.num_tokens, recipe.evaluation.seq_len
    gpu, cpu = (
        evaluation_memory(
            architecture,
            num_tokens=num_tokens,
            seq_len=seq_len,
            device_type=device_type,
            questions=recipe.evaluation.questions is not None,
        )
        for device_type in ("cuda", "cpu")
    )
    return EvaluationPlan(gpu=gpu, cpu=cpu)


def _device_bytes(way: SweepPlan) -> int:
    return way.device_bytes


def _disk(recipe: Recipe, architecture: Architecture, planned: Sequence[VariantPlan]) -> DiskPlan:
    builds = sum(variant_plan.weights_bytes for variant_plan in planned)
    return DiskPlan(
        source_bytes=architecture.base_bytes if recipe.base_model.path is None else 0,
        builds_bytes=builds,
        publish_bytes=builds,
        losses_bytes=sum(width.weights_bytes for width in only_measured(planned)),
    )
