"""The notes of a build plan: what its tables do not show of the recipe's variants."""

from packager.pipeline.plan import BuildPlan
from packager.quantize.tuning_schedule import SCHEDULE
from packager.system.text import gigabytes, joined_by_and

_FP16_BYTES = 2


def plan_notes(plan: BuildPlan) -> list[str]:
    """Return a line for each thing that a reader of the tables would miss."""
    return [*_engine_notes(plan), *_effort_notes(plan), *_mix_notes(plan), *_proof_notes(plan)]


def _engine_notes(plan: BuildPlan) -> list[str]:
    """Return a line on the memory of engine auto-gptq, which the table of needs does not contain."""
    branches = [planned.variant.branch for planned in plan.variants if planned.variant.engine == "auto-gptq"]
    if not branches:
        return []
    host = gigabytes(2 * _FP16_BYTES * plan.architecture.num_parameters)
    return [
        f"note: engine auto-gptq makes {', '.join(branches)} one after the other, on CUDA only, with the whole model "
        f"in host memory (up to {host} GB while it is read); its GPU memory is not estimated"
    ]


def _effort_notes(plan: BuildPlan) -> list[str]:
    """Return a line on the variants whose blocks are tuned."""
    branches = [planned.variant.branch for planned in plan.variants if planned.variant.effort == "high"]
    if not branches:
        return []
    rows = plan.recipe.calibration
    passes = SCHEDULE.forwards(rows.num_samples, rows.seq_len, "cuda")
    return [
        f"note: effort high tunes each block of {', '.join(branches)} in {SCHEDULE.steps} steps: on a GPU as long as "
        f"{passes:.0f} passes of the calibration rows, where quantizing alone takes about 3; each on one GPU"
    ]


def _mix_notes(plan: BuildPlan) -> list[str]:
    """Return what is known of mixes before their bits are chosen, and what is quantized to choose them."""
    mixed = [planned for planned in plan.variants if planned.variant.mix is not None]
    lines = [
        f"note: {planned.variant.branch}: bits of {joined_by_and(planned.variant.mix.bits)}, chosen by loss for each "
        f"group of linears that see the same input: {planned.least_bytes:,} to {planned.weights_bytes:,} bytes"
        for planned in mixed
        if planned.variant.mix is not None
    ]
    if not mixed:
        return []
    branches = {each.digest: each.variant.branch for each in plan.variants}
    used = [branches[width.digest] for planned in mixed for width in planned.widths if width.digest in branches]
    measured = sorted({width.variant.bits for width in plan.only_measured})
    sources = [*dict.fromkeys(used)]
    if measured:
        sources.append(f"variants of {joined_by_and(measured)} bits that are quantized for this alone, and not kept")
    return [*lines, f"note: these losses are of {joined_by_and(sources)}"]


def _proof_notes(plan: BuildPlan) -> list[str]:
    """Return a line for a recipe whose variants no loader will open."""
    if plan.recipe.loaders.names:
        return []
    return ["note: the recipe names no loader: no variant will be proven, and publish does not ask for a proof"]
