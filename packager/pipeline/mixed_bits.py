"""The bits of mixes, decision 34: the losses of variants whose linears all have the same bits, and the choice by them.

Such a variant is one of the recipe's, if it has one with these parameters. If not, it is quantized for its losses alone
and then deleted; the losses are kept, so another mean needs no other measurement.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from packager.pipeline.build_state import BuildState
from packager.pipeline.earlier_builds import EarlierBuild
from packager.pipeline.variant_plan import VariantPlan, with_chosen_bits
from packager.quantize.choose_bits import choose_bits, mixed_groups
from packager.quantize.engines import engine_version
from packager.receipt import LinearRecord, digest_of
from packager.records import Record
from packager.system.files import open_regular, write_atomic


class MeasuredLosses(Record):
    """A file with the loss of each linear of a variant that was quantized for them alone.

    Attributes:
        fingerprint: everything that determined them, by name.
        losses: by linear.
    """

    fingerprint: dict[str, str]
    losses: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


def block_fingerprint(run: BuildState, variant_plan: VariantPlan, base_model: str) -> dict[str, str]:
    """Return everything that determines the bytes of a variant's blocks; `base_model` is the base model's token."""
    from packager.quantize.sweep import fingerprint

    variant = variant_plan.variant
    parts = fingerprint(
        variant_plan.digest,
        base_model,
        run.texts.calibration,
        run.device,
        engine_version=engine_version(variant.engine),
    )
    return parts if variant.mix is None else parts | {"bits of linears": digest_of(variant.linear_bits)}


def widths_to_measure(
    run: BuildState, mixed: Sequence[VariantPlan], quantized_now: Sequence[VariantPlan]
) -> tuple[VariantPlan, ...]:
    """Return what must be quantized for the losses alone before the bits of mixes are chosen, each once.

    Args:
        run: the build.
        mixed: variants whose bits are not chosen.
        quantized_now: variants that are quantized beside: their losses will be in their receipts.
    """
    now = {each.digest for each in quantized_now}
    wanted = {width.digest: width for each in mixed for width in each.widths}
    return tuple(each for digest, each in wanted.items() if digest not in now and _losses(run, each) is None)


def keep_losses(run: BuildState, width: VariantPlan, linears: Sequence[LinearRecord]) -> None:
    """Keep the losses of a variant that was quantized for them alone, and delete its blocks."""
    kept = MeasuredLosses(
        fingerprint=block_fingerprint(run, width, run.source.record.digest),
        losses={linear.name: linear.loss for linear in linears},
    )
    write_atomic(run.workspace.losses_path(width.digest), kept.model_dump_json(indent=2).encode() + b"\n")
    shutil.rmtree(run.workspace.work / width.variant.branch, ignore_errors=True)


def with_bits(run: BuildState, variant_plan: VariantPlan, earlier: EarlierBuild | None) -> VariantPlan:
    """Return the plan of a mix with its bits: those of an earlier build with the same inputs, or chosen now."""
    architecture, variant = run.plan.architecture, variant_plan.variant
    assert variant.mix is not None  # noqa: S101
    if earlier is not None:
        records = earlier.receipt.provenance.linears
        chosen = tuple((record.name, record.bits) for record in records if record.bits is not None)
        return with_chosen_bits(variant_plan, chosen, run.recipe, architecture)
    groups = mixed_groups(architecture, variant.group_size)
    losses = {width.variant.bits: found for width in variant_plan.widths if (found := _losses(run, width)) is not None}
    chosen = choose_bits(groups, variant.mix, losses)
    bits_of = dict(chosen)
    counts = Counter(bits_of[group.linears[0]] for group in groups)
    mean = sum(bits_of[group.linears[0]] * group.size for group in groups) / sum(group.size for group in groups)
    parts = ", ".join(f"{count} of {bits}" for bits, count in sorted(counts.items()))
    if len(counts) == 1:
        run.terminal.log(
            f"warning: {variant.branch} mixes nothing: {min(counts)} bits for all linears have the least loss"
        )
    run.terminal.log(f"{variant.branch}: bits of {len(groups)} groups of linears by loss: {parts}; mean {mean:.3f}")
    return with_chosen_bits(variant_plan, chosen, run.recipe, architecture)


def _losses(run: BuildState, width: VariantPlan) -> Mapping[str, float] | None:
    """Return the losses of a variant's linears: of the recipe's own, or those that were kept; None if not measured."""
    for each in run.plan.variants:
        receipt = run.receipts.get(each.variant.branch)
        if each.digest == width.digest and receipt is not None:
            return {linear.name: linear.loss for linear in receipt.provenance.linears}
    path = run.workspace.losses_path(width.digest)
    try:
        with open_regular(path) as stream:
            kept = MeasuredLosses.model_validate_json(stream.read())
    except (OSError, ValidationError):  # damaged: they are measured again
        return None
    if kept.losses.keys() != {linear.name for linear in run.plan.architecture.linears}:
        return None
    # Only now: of a large base model, this waits until it is hashed.
    return kept.losses if kept.fingerprint == block_fingerprint(run, width, run.source.record.digest) else None
