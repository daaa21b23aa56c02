"""The floor that a recipe sets for the quality of what it publishes, and what is far from the fp16 model anyway."""

import math
from collections.abc import Iterable, Sequence

from packager.receipt import FloorRecord, Provenance, QualityRecord
from packager.recipe import QualityFloor, Recipe

# `main` is what readers get who name no branch: from here on a plan and a card warn of it, whatever the recipe's floor.
# SmolLM2-135M at 64g without act order has 20 % more than fp16, at 32g with act order 8 %.
FAR_INCREASE = 0.1


def perplexity_increase(quality: QualityRecord) -> float:
    """Return the perplexity's increase over the fp16 model's, as a fraction; infinite where it is not a number."""
    change = quality.perplexity / quality.base_perplexity - 1 if quality.base_perplexity > 0 else math.inf
    return change if math.isfinite(change) else math.inf


def floor_problems(quality: QualityRecord, floor: QualityFloor | FloorRecord) -> tuple[str, ...]:
    """Return which limits a measured variant misses; a figure that is not a number misses each."""
    found = []
    increase, most = perplexity_increase(quality), floor.max_perplexity_increase
    if most is not None and not increase <= most:
        found.append(f"perplexity {_shown(increase)}, at most {_shown(most)}")
    kl = quality.kl_divergence if math.isfinite(quality.kl_divergence) else math.inf
    if floor.max_kl is not None and not kl <= floor.max_kl:
        found.append(f"KL divergence {kl:.4g}, at most {floor.max_kl:.4g}")
    return tuple(found)


def floor_record(recipe: Recipe, provenance: Provenance) -> FloorRecord | None:
    """Return what a variant's record says of the floor; None for a recipe without one."""
    if recipe.quality == QualityFloor():
        return None
    missed = provenance.quality is not None and bool(floor_problems(provenance.quality, recipe.quality))
    return FloorRecord(
        max_perplexity_increase=recipe.quality.max_perplexity_increase,
        max_kl=recipe.quality.max_kl,
        missed=missed,
        published_below=missed and provenance.branch in allowed_below(recipe),
    )


def allowed_below(recipe: Recipe) -> frozenset[str]:
    """Return the branches that the recipe publishes although they miss the floor."""
    pairs = zip(recipe.variants, recipe.expanded_variants(), strict=True)
    return frozenset(variant.branch for entry, variant in pairs if entry.publish_below_floor)


def floor_lines(recipe: Recipe, provenances: Iterable[Provenance]) -> list[str]:
    """Return a line for each measured variant that misses the floor: by how much, and whether it is published."""
    allowed, lines = allowed_below(recipe), []
    for provenance in provenances:
        if provenance.quality is not None and (found := floor_problems(provenance.quality, recipe.quality)):
            does = "published all the same" if provenance.branch in allowed else "not published"
            lines.append(f"{provenance.branch} misses the floor, {does}: {'; '.join(found)}")
    return lines


def is_far(provenance: Provenance) -> bool:
    """Return whether a variant's perplexity is far above the fp16 model's, beyond twice its standard error."""
    quality = provenance.quality
    if quality is None:
        return False
    error = quality.errors.perplexity_change if quality.errors is not None else 0.0
    return perplexity_increase(quality) - 2 * error > FAR_INCREASE


def far_lines(provenances: Sequence[Provenance], main: str) -> list[str]:
    """Return a warning if the branch that readers get by default is far from the fp16 model."""
    return [
        f"warning: readers who name no branch get {main}, whose perplexity is "
        f"{_shown(perplexity_increase(made.quality))} against fp16: give main smaller groups, an act order or more bits"
        for made in provenances
        if made.branch == main and made.quality is not None and is_far(made)
    ]


def _shown(fraction: float) -> str:
    return f"{100 * fraction:+.4g} %" if math.isfinite(fraction) else "that is no number"
