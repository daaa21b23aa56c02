"""What earlier builds in the output folder measured of a plan's variants; without torch, and without their folders."""

from pathlib import Path

from pydantic import ValidationError

from packager.pipeline.plan import BuildPlan
from packager.receipt import Provenance, Receipt
from packager.system.files import open_regular

_MOST_BYTES = 64_000_000


def measured_variants(plan: BuildPlan, dist: Path) -> list[Provenance]:
    """Return the records of variants that were built and measured as they are planned now.

    Receipts that cannot be read are left out: `status` and `build` report them.
    """
    found = []
    for variant_plan in plan.variants:
        path = dist / "receipts" / plan.recipe.repository.id / f"{variant_plan.variant.branch}.json"
        try:
            with open_regular(path) as stream:
                made = Receipt.model_validate_json(stream.read(_MOST_BYTES)).provenance
        except (OSError, ValidationError):
            continue
        if made.variant_digest == variant_plan.digest and made.quality is not None:
            found.append(made)
    return found
