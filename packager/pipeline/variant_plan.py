"""The plan of one variant: its digest, its weights files, their sizes; of a mix, bounds until its bits are chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from packager.card.mixed_bits import bits_in_words
from packager.model.architecture import Architecture
from packager.model.checkpoint import Shard, checkpoint_tensors, split_shards
from packager.model.compatibility import Verdict, verdicts
from packager.quantize.choose_bits import mixed_groups, most_size
from packager.quantize.engines import engine_version
from packager.receipt import digest_of
from packager.recipe import Recipe
from packager.recipe.fields import DRAWING_VERSION
from packager.variant import ActOrder, Bits, Variant

_ACT_ORDERS: Mapping[ActOrder, str] = {
    "none": "no act order", "group": "group-aware act order", "static": "static act order", "full": "act order",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VariantPlan:
    """One branch that a build will make.

    Attributes:
        digest: sha256 of what determines the weights' bytes: base model, linears that are quantized, calibration,
            parameters, engine version. The contents of local files are not in it: the build digests them.
        shards: the weights files with their tensors and exact sizes.
        weights_bytes: size of all weights files, headers included.
        tensor_bytes: the tensors alone: what a runtime holds on its device.
        verdicts: for each runtime, whether it can open the branch.
        description: the recipe's own, or one that states size, group size and act order.
        widths: of a mix, a variant for each number of bits: its bits are chosen by their losses. Before that there are
            no shards, and the sizes are the largest that it may have.
        least_bytes: of a mix, the smallest `weights_bytes` that it may have; else the same.
    """

    variant: Variant
    digest: str
    shards: tuple[Shard, ...]
    weights_bytes: int
    tensor_bytes: int
    verdicts: tuple[Verdict, ...]
    description: str
    widths: "tuple[VariantPlan, ...]" = ()
    least_bytes: int = 0


def only_measured(planned: Sequence[VariantPlan]) -> tuple[VariantPlan, ...]:
    """Return the variants by whose losses bits are chosen and that are not among those planned, each once."""
    made = {each.digest for each in planned}
    wanted = {width.digest: width for each in planned for width in each.widths}
    return tuple(width for digest, width in wanted.items() if digest not in made)


class VariantPlanner:
    """Plans variants of one base model; those of the same bits and group size share their files' plan.

    Args:
        recipe: what is built.
        architecture: of the base model.
        revision: the commit of the base model; None for a local folder.
    """

    def __init__(self, recipe: Recipe, architecture: Architecture, revision: str | None) -> None:
        self._recipe, self._architecture, self._revision = recipe, architecture, revision
        self._linears = _linears_digest(architecture)
        self._shards: dict[tuple[int, int], tuple[Shard, ...]] = {}

    def plan(self, variant: Variant) -> VariantPlan:
        """Return the plan of a variant, without verdicts and description."""
        digest = _digest(variant, self._recipe, self._revision, self._linears)
        if variant.mix is not None:
            widths = tuple(self.plan(variant.of_width(bits)) for bits in variant.mix.bits)
            return _plan_mix(variant, self._architecture, widths, digest)
        sizes = variant.bits, variant.group_size
        if sizes not in self._shards:
            self._shards[sizes] = _shards(variant, self._recipe, self._architecture)
        return _plan_variant(variant, self._shards[sizes], digest)


def _linears_digest(architecture: Architecture) -> str:
    """Return the digest of which linears are quantized, and which of them with one Hessian."""
    groups = [[kind.blocks, [group.modules for group in kind.groups]] for kind in architecture.kinds]
    return digest_of([architecture.linear_names, groups])


def _digest(variant: Variant, recipe: Recipe, revision: str | None, linears: str) -> str:
    base, skip = recipe.base_model, sorted(recipe.quantize.skip)
    return digest_of(
        {
            "engine_version": engine_version(variant.engine),
            "base_model": {"id": base.id, "revision": revision, "path": base.public_path},
            "linears": linears,
            "calibration": recipe.calibration.model_dump(mode="json"),
            "drawing": DRAWING_VERSION,
            "parameters": variant.parameters(),
            **({"skip": skip} if skip else {}),
        }
    )


def _shards(variant: Variant, recipe: Recipe, architecture: Architecture) -> tuple[Shard, ...]:
    checkpoint = recipe.checkpoint
    return split_shards(checkpoint_tensors(architecture, variant), checkpoint.max_shard_bytes, checkpoint.weights_name)


def _plan_variant(variant: Variant, shards: tuple[Shard, ...], digest: str) -> VariantPlan:
    weights_bytes = sum(shard.size_bytes for shard in shards)
    return VariantPlan(
        variant=variant,
        digest=digest,
        shards=shards,
        weights_bytes=weights_bytes,
        tensor_bytes=sum(shard.tensor_bytes for shard in shards),
        verdicts=(),
        description="",
        least_bytes=weights_bytes,
    )


def _plan_mix(
    variant: Variant, architecture: Architecture, widths: tuple[VariantPlan, ...], digest: str
) -> VariantPlan:
    """Plan a variant whose bits are not chosen yet: the bounds of its sizes."""
    assert variant.mix is not None  # noqa: S101
    fewest, most = widths[0], widths[-1]
    groups = mixed_groups(architecture, variant.group_size)
    words = most_size(groups, variant.mix) - fewest.variant.bits * sum(group.size for group in groups)
    tensor_bytes = fewest.tensor_bytes + words // 8
    # The headers are those of more bits: their numbers have most digits, and there may be more files.
    headers = most.weights_bytes - most.tensor_bytes
    return VariantPlan(
        variant=variant, digest=digest, shards=(), weights_bytes=tensor_bytes + headers, tensor_bytes=tensor_bytes,
        verdicts=(), description="", widths=widths, least_bytes=fewest.weights_bytes,
    )  # fmt: skip


def with_chosen_bits(
    variant_plan: VariantPlan, linear_bits: tuple[tuple[str, Bits], ...], recipe: Recipe, architecture: Architecture
) -> VariantPlan:
    """Return the plan of a mix when the bits of its linears are chosen: it has shards and exact sizes."""
    variant = replace(variant_plan.variant, linear_bits=linear_bits)
    chosen = _plan_variant(variant, _shards(variant, recipe, architecture), variant_plan.digest)
    return replace(chosen, verdicts=variant_plan.verdicts, description=variant_plan.description)


def variant_description(variant: Variant, weights_bytes: int, all_sizes: Sequence[int]) -> str:
    """Describe a variant by facts that need no measurement: bits, group size, act order, size against the others."""
    facts = [
        bits_in_words(variant.parameters()),
        "one group per row" if variant.group_size == -1 else f"group size {variant.group_size}",
        _ACT_ORDERS[variant.act_order],
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


def mix_refusals(
    recipe: Recipe, architecture: Architecture, variants: Sequence[Variant], judged: Mapping[str, Sequence[Verdict]]
) -> dict[tuple[str, str], str]:
    """Return by branch and loader which of the recipe's loaders do not read a variant because its bits are mixed."""
    sections = [(name, "required") for name in recipe.loaders.required]
    sections += [(name, "if_available") for name in recipe.loaders.if_available]
    found: dict[tuple[str, str], str] = {}
    for variant in variants:
        if variant.mix is None:
            continue
        mixed = {verdict.loader: verdict for verdict in judged[variant.branch]}
        plain = {verdict.loader: verdict for verdict in verdicts(variant.of_width(variant.bits), architecture)}
        for name, section in sections:
            # A loader of another package refuses by its own rules, for its own reasons.
            if name in plain and mixed[name].status == "refused" and plain[name].status != "refused":
                found[variant.branch, name] = (
                    f"{variant.branch}: mix: the loader {name} {mixed[name].reason}; take it out of loaders.{section}, "
                    "or put the mix into a recipe of its own"
                )
    return found


def mix_problems(architecture: Architecture, variants: Sequence[Variant]) -> list[str]:
    """Return why the bits of a model's linears cannot be mixed."""
    experts = [group.unit for kind in architecture.kinds for group in kind.groups if group.unit]
    return [
        f"{variant.branch}: mix is not for models with experts ({experts[0]}): nobody tried under which names runtimes "
        "look for the bits of experts; use bits"
        for variant in variants
        if variant.mix is not None and experts
    ]
