"""Stage 2, plan: everything a build will need and make, worked out from the recipe and config.json before it starts.

No network, no torch: exact file sizes, the loaders' static verdicts, memory and disk, and a digest per variant.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packager.errors import PlanError
from packager.model.architecture import (
    Architecture,
    Shard,
    checkpoint_tensors,
    quantized_tensors,
    read_architecture,
    split_shards,
)
from packager.model.compatibility import Verdict, verdicts
from packager.quantize.engines import auto_gptq_digest, engine_problems
from packager.quantize.memory import HOST_LIMIT_BYTES, SweepPlan, Workload, sweep_ways
from packager.recipe import Recipe, digest_of
from packager.recipe.file import RecipeFile
from packager.variant import Engine, Variant

# Raised whenever our own engine would make other bytes from the same inputs: finished work is then made anew.
ENGINE_VERSION = 3
# Raised when the files beside an auto-gptq variant's weights become other ones; ours are covered above.
_FILES_VERSION = 2

_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """One branch to be.

    Attributes:
        digest: sha256 of what the recipe says about the weights' bytes: base model, calibration, parameters,
            checkpoint options, engine version. What the named files contain is not in it: that is digested at build.
        shards: the weights files with their tensors and exact sizes.
        weights_bytes: size of all weights files, headers included.
        tensor_bytes: the tensors alone: what a runtime holds on its device.
        verdicts: what each runtime will make of it.
        description: the recipe's own, or one that states size, group size and act order.
    """

    variant: Variant
    digest: str
    shards: tuple[Shard, ...]
    weights_bytes: int
    tensor_bytes: int
    verdicts: tuple[Verdict, ...]
    description: str


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Ways to quantize and their estimated peak memory, without what Python, torch and CUDA take themselves.

    Attributes:
        fastest: on a GPU, all variants in one sweep, everything in its memory.
        full_speed: on the smallest GPU that is as fast, if it reads the weights several times.
        least: on the smallest GPU of all, about half as fast.
        cpu: in host memory when there is no GPU (float32).
    """

    fastest: SweepPlan
    full_speed: SweepPlan
    least: SweepPlan
    cpu: SweepPlan


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Disk space at the end of a build, weights only: tokenizers and cards are a few megabytes more.

    Building takes no space of its own: a checkpoint is made in the files that it is published from.

    Attributes:
        source_bytes: the base model's download (0 for a local folder).
        builds_bytes: the checkpoint folders, reserved before the first block.
        publish_bytes: the same weights once more in a local publishing target.
    """

    source_bytes: int
    builds_bytes: int
    publish_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them together."""
        return self.source_bytes + self.builds_bytes + self.publish_bytes


@dataclass(frozen=True, kw_only=True)
class BuildPlan:
    """What a recipe will make and need; variants in the recipe's order."""

    recipe: Recipe
    architecture: Architecture
    variants: tuple[VariantPlan, ...]
    memory: MemoryPlan
    disk: DiskPlan
    calibration_tokens: int

    @property
    def disk_bytes(self) -> int:
        """Disk space at the end of the build, all of it together."""
        return self.disk.total_bytes

    @property
    def context_tokens(self) -> int:
        """How long a conversation `run_bytes` counts with."""
        return min(_CONTEXT_TOKENS, self.architecture.max_position_embeddings)

    def run_bytes(self, variant_plan: VariantPlan) -> int:
        """Return the device memory of using a variant: its tensors and `context_tokens` of fp16 keys and values."""
        return variant_plan.tensor_bytes + self.context_tokens * self.architecture.kv_bytes_per_token


def make_plan(recipe_file: RecipeFile) -> BuildPlan:
    """Plan a build offline.

    Raises:
        PlanError: config.json is missing or unusable, or variants cannot be made from this model; all are named.
    """
    recipe = recipe_file.recipe
    config_path = _config_path(recipe_file)
    config = _read_config(config_path)
    architecture = read_architecture(config, str(config_path))
    variants = recipe.expanded_variants()
    judged = {variant.branch: verdicts(variant, architecture) for variant in variants}
    problems = [
        *_length_problems(recipe, architecture),
        *(problem for variant in variants for problem in _variant_problems(variant, architecture)),
        *engine_problems(variants, config, architecture, recipe.calibration.seq_len),
        *_loader_problems(recipe, judged),
    ]
    if problems:
        raise PlanError(
            "the recipe cannot be built from this model", where=str(recipe_file.path), why="\n       ".join(problems)
        )
    planned = tuple(_plan_variant(variant, recipe, architecture, judged[variant.branch]) for variant in variants)
    tokens = recipe.calibration.num_samples * recipe.calibration.seq_len
    return BuildPlan(
        recipe=recipe,
        architecture=architecture,
        variants=_described(recipe, planned),
        memory=_memory(architecture, recipe, variants),
        disk=_disk(recipe, architecture, planned),
        calibration_tokens=tokens,
    )


def _config_path(recipe_file: RecipeFile) -> Path:
    base_model = recipe_file.recipe.base_model
    if base_model.config is not None:
        return recipe_file.resolve(base_model.config)
    return recipe_file.resolve(f"{base_model.path}/config.json")


def _read_config(path: Path) -> Mapping[str, object]:
    try:
        config = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise PlanError(
            "the base model's config.json cannot be read",
            where=str(path),
            why=error.strerror or str(error),
            hint="base_model.config names a copy of it, base_model.path the folder that holds it",
        ) from error
    except (ValueError, RecursionError) as error:
        raise PlanError("the base model's config.json is not JSON", where=str(path), why=str(error)) from error
    if not isinstance(config, dict):
        raise PlanError("the base model's config.json is not a JSON object", where=str(path))
    return config


def _length_problems(recipe: Recipe, architecture: Architecture) -> list[str]:
    """Return which token rows are longer than the model's positions."""
    longest = architecture.max_position_embeddings
    lengths = {
        "calibration.seq_len": recipe.calibration.seq_len,
        "evaluation.seq_len": recipe.evaluation.seq_len,
        "loaders.seq_len": recipe.loaders.seq_len,
    }
    return [
        f"{key} {length} exceeds the model's max_position_embeddings {longest}"
        for key, length in lengths.items()
        if length > longest
    ]


def _variant_problems(variant: Variant, architecture: Architecture) -> list[str]:
    """Return why linears cannot be stored in this variant's format, a linear and its likes in other blocks once."""
    problems = []
    for linear in architecture.block_linears:
        name = f"{variant.branch}: {linear.name}"
        if architecture.num_blocks > 1:
            name += f" (and its likes in {architecture.num_blocks - 1} more blocks)"
        if variant.group_size != -1 and linear.in_features % variant.group_size:
            problems.append(f"{name}: group_size {variant.group_size} does not divide its {linear.in_features} columns")
        for key, features in (("in_features", linear.in_features), ("out_features", linear.out_features)):
            if features * variant.bits % 32:
                problems.append(f"{name}: {key} {features} x {variant.bits} bits do not fill 32-bit words")
    return problems


def _loader_problems(recipe: Recipe, judged: Mapping[str, Sequence[Verdict]]) -> list[str]:
    """Return which required loaders are known to refuse a variant: publishing could never succeed."""
    return [
        f"{branch}: the required loader {verdict.loader} {verdict.reason}"
        for branch, found in judged.items()
        for verdict in found
        if verdict.loader in recipe.loaders.required and not verdict.can_load
    ]


def engine_version(engine: Engine) -> int | str:
    """Return what changes when an engine would make other bytes from the same inputs."""
    return ENGINE_VERSION if engine == "native" else f"{auto_gptq_digest()}-{_FILES_VERSION}"


def _plan_variant(
    variant: Variant, recipe: Recipe, architecture: Architecture, judged: tuple[Verdict, ...]
) -> VariantPlan:
    checkpoint = recipe.checkpoint
    tensors = checkpoint_tensors(architecture, variant)
    shards = split_shards(tensors, checkpoint.max_shard_bytes, checkpoint.weights_name)
    digest = digest_of(
        {
            "engine_version": engine_version(variant.engine),
            "base_model": recipe.base_model.model_dump(mode="json", include={"id", "revision", "path"}),
            "calibration": recipe.calibration.model_dump(mode="json"),
            "parameters": variant.parameters(),
            "checkpoint": checkpoint.model_dump(mode="json"),
        }
    )
    return VariantPlan(
        variant=variant,
        digest=digest,
        shards=shards,
        weights_bytes=sum(shard.size_bytes for shard in shards),
        tensor_bytes=sum(tensor.size_bytes for tensor in tensors),
        verdicts=judged,
        description="",
    )


def _described(recipe: Recipe, planned: Sequence[VariantPlan]) -> tuple[VariantPlan, ...]:
    sizes = [plan.weights_bytes for plan in planned]
    return tuple(
        replace(plan, description=entry.description or describe(plan.variant, plan.weights_bytes, sizes))
        for plan, entry in zip(planned, recipe.variants, strict=True)
    )


def describe(variant: Variant, weights_bytes: int, all_sizes: Sequence[int]) -> str:
    """Say what is certain before anything is measured: bits, group size, act order, and the size beside the others."""
    facts = [
        f"{variant.bits}-bit",
        "one group per row" if variant.group_size == -1 else f"group size {variant.group_size}",
        "act order" if variant.desc_act else "no act order",
    ]
    if not variant.sym:
        facts.append("asymmetric")
    smallest, largest = min(all_sizes), max(all_sizes)
    percent = 100 * (weights_bytes / smallest - 1)
    larger = f"{percent:.0f} % larger than the smallest" if percent >= 1 else "less than 1 % larger than the smallest"
    if smallest == largest:
        relation = ""
    elif weights_bytes == smallest:
        relation = ": the smallest size"
    elif weights_bytes == largest:
        relation = f": the largest size, {larger}"
    else:
        relation = f": {larger}"
    return f"{', '.join(facts)}{relation}."


def _memory(architecture: Architecture, recipe: Recipe, variants: Sequence[Variant]) -> MemoryPlan:
    work = Workload(
        architecture=architecture,
        num_samples=recipe.calibration.num_samples,
        seq_len=recipe.calibration.seq_len,
        num_variants=len(variants),
        true_sequential=any(variant.true_sequential for variant in variants),
    )
    ways = list(sweep_ways(work, "cuda"))
    usual = [way for way in ways if way.host_bytes <= HOST_LIMIT_BYTES] or ways
    return MemoryPlan(
        fastest=ways[0],
        full_speed=min((way for way in usual if way.suspended_batches == ways[0].suspended_batches), key=_device_bytes),
        least=min(usual, key=_device_bytes),
        cpu=next(sweep_ways(work, "cpu")),
    )


def _device_bytes(way: SweepPlan) -> int:
    return way.device_bytes


def _packed_bytes(architecture: Architecture, variant: Variant) -> int:
    """Return the bytes of a variant's quantized linears."""
    return architecture.num_blocks * sum(
        tensor.size_bytes
        for linear in architecture.block_linears
        for tensor in quantized_tensors(linear, bits=variant.bits, group_size=variant.group_size)
    )


def _disk(recipe: Recipe, architecture: Architecture, planned: Sequence[VariantPlan]) -> DiskPlan:
    builds = sum(plan.weights_bytes for plan in planned)
    return DiskPlan(
        source_bytes=architecture.base_bytes if recipe.base_model.path is None else 0,
        builds_bytes=builds,
        publish_bytes=builds,
    )
