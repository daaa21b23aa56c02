"""A report on the variants of a build: what was made, how good it is, where the damage is, what it took; its page.

The values come from receipts alone; `report_page` shows them as one HTML page that makes no request. Names of tensors,
reasons of loaders and texts come from models and runtimes: they are hostile until they are escaped.
"""

import base64
import hashlib
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from packager.card import numbers, templates_dir
from packager.card.floor import floor_problems, perplexity_increase
from packager.receipt import (
    ExpertLinearRecord,
    LinearRecord,
    LoaderRecord,
    LoaderRunRecord,
    Provenance,
    QualityRecord,
    Receipt,
)
from packager.records import TaskRecord
from packager.system.text import format_bytes, printable

TEMPLATE_OF_REPORT: Final = "report.html.j2"
# Colours of the heat map, on a logarithmic scale from the least to the largest loss of all variants.
LEVELS: Final = 9
_WORST: Final = 5
_BLOCK: Final = re.compile(r"(?P<path>[^0-9]*?)\.(?P<block>[0-9]{1,6})\.(?P<module>.+)", re.DOTALL)
_NUMBER: Final = re.compile(r"(?<=\.)[0-9]+(?=\.)")

Values = dict[str, Any]


def report_values(receipts: Sequence[Receipt], changes: Sequence[Mapping[str, Any]] | None = None) -> Values:
    """Return the report as values that `json` can write, safe to print; figures that are no numbers are null.

    Args:
        receipts: one per variant, at least one.
        changes: what differs from the published release, one entry per branch; None where that was not compared.
    """
    made = [receipt.provenance for receipt in receipts]
    values: Values = {
        "repository": made[0].repository,
        "base_model": made[0].base_model.model_dump(include={"id", "revision", "digest", "dtype", "num_parameters"}),
        "made_with": sorted({each.made_with for each in made}),
        "devices": sorted({each.device for each in made}),
        "versions": [
            {"branch": each.branch, **each.versions}
            for each in made
            if each.versions != made[0].versions or each is made[0]
        ],
        "variants": [_variant(each) for each in made],
        "tasks": _tasks(made),
        "loss": _loss(made),
        "loaders": _loaders(made),
        "experts": [found for each in made if (found := _experts(each))],
        "stages": [
            {
                "branch": receipt.provenance.branch,
                "seconds": dict(receipt.seconds),
                "peak_memory_bytes": receipt.peak_memory_bytes,
                "trial": list(receipt.trial),
                "loader_runs": [_run(made) for made in receipt.runs],
            }
            for receipt in receipts
        ],
        "digests": [_digests(each) for each in made],
        "changes": None if changes is None else [dict(each) for each in changes],
    }
    safe: Values = _safe(values)
    return safe


def report_page(values: Values) -> str:
    """Return the page of a report."""
    return html_page(TEMPLATE_OF_REPORT, values)


def html_page(template: str, values: Values) -> str:
    """Return a page: one file, without a script; its policy lets a browser request nothing.

    Args:
        template: its name.
        values: what it shows; texts of others are made safe to print, and escaped.
    """
    folder = templates_dir()
    style = (folder / "report.css").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return _environment(folder).get_template(template).render(**_safe(values), policy=policy, css=style)


def _variant(made: Provenance) -> Values:
    quality = made.quality
    missed = floor_problems(quality, made.floor) if quality is not None and made.floor is not None else ()
    return {
        "branch": made.branch,
        "parameters": dict(made.parameters),
        "weights_bytes": made.weights_bytes,
        "quality": None if quality is None else _quality(quality),
        "floor": None if made.floor is None else {**made.floor.model_dump(), "problems": list(missed)},
        "raised_damping": sum(each.damp_percent > float(made.parameters["damp_percent"]) for each in made.linears),
        "not_quantized": dict(made.not_quantized),
    }


def _quality(quality: QualityRecord) -> Values:
    errors = quality.errors
    names = ("perplexity", "base_perplexity", "kl_divergence", "kl_median", "kl_p99", "top1_agreement")
    figures = {name: (getattr(quality, name), getattr(errors, name) if errors else None) for name in names}
    figures["perplexity_change"] = (perplexity_increase(quality), errors.perplexity_change if errors else None)
    return {
        **{name: {"value": value, "standard_error": error} for name, (value, error) in figures.items()},
        **quality.model_dump(include={"num_tokens", "questions", "answered", "base_answered"}),
    }


def _tasks(made: Sequence[Provenance]) -> list[Values]:
    """Return an entry per task with its scores on each branch, None where it was not measured on one."""
    names = dict.fromkeys(record.name for each in made for record in each.tasks)
    return [
        {"task": name, "scores": [{"branch": each.branch, "record": _task(each.tasks, name)} for each in made]}
        for name in names
    ]


def _task(records: Sequence[TaskRecord], name: str) -> Values | None:
    record = next((record for record in records if record.name == name), None)
    if record is None:
        return None
    figures = {
        "score": (record.score, record.score_error),
        "base_score": (record.base_score, record.base_error),
        "recovery": (record.recovery, record.recovery_error),
    }
    return {
        **record.model_dump(exclude={"name", *figures, "score_error", "base_error", "recovery_error"}),
        **{key: {"value": value, "standard_error": error} for key, (value, error) in figures.items()},
    }


def _loss(made: Sequence[Provenance]) -> Values:
    """Return the loss of each kind of linear in each block, the mean over experts, and the worst linears."""
    known = [value for each in made for linear in each.linears if (value := _positive(linear.loss)) is not None]
    least, most = (min(known), max(known)) if known else (None, None)
    maps = []
    for each in made:
        cells: dict[str, dict[int, list[float | None]]] = {}
        outside: list[str] = []
        for linear in each.linears:
            place = place_of_linear(linear)
            if place is None:
                outside.append(linear.name)
                continue
            block, module = place
            cells.setdefault(module, {}).setdefault(block, []).append(_positive(linear.loss))
        blocks = sorted({block for row in cells.values() for block in row})
        maps.append(
            {
                "branch": each.branch,
                "blocks": blocks,
                "rows": [
                    {"module": module, "losses": [_mean(row[block]) if block in row else None for block in blocks]}
                    for module, row in cells.items()
                ],
                "outside_of_blocks": outside,
                "worst": [
                    {"name": linear.name, "loss": linear.loss, "damp_percent": linear.damp_percent}
                    for linear in sorted(each.linears, key=lambda linear: -(_positive(linear.loss) or 0.0))[:_WORST]
                ],
            }
        )
    return {"least": least, "most": most, "maps": maps}


def place_of_linear(linear: LinearRecord) -> tuple[int, str] | None:
    """Return the block of a linear and its name there, * for the number of an expert; None if no block is named."""
    found = _BLOCK.fullmatch(linear.name)
    if found is None:
        return None
    module = found["module"]
    return int(found["block"]), _NUMBER.sub("*", module) if isinstance(linear, ExpertLinearRecord) else module


def level_of(loss: float | None, least: float, most: float) -> int | None:
    """Return the colour of a loss, 0 to LEVELS - 1 on a logarithmic scale; None of one that is not known."""
    if loss is None or not least <= loss <= most:
        return None
    share = math.log(loss / least) / math.log(most / least) if most > least else 0.0
    return min(LEVELS - 1, int(share * LEVELS))


def _positive(loss: float) -> float | None:
    return loss if math.isfinite(loss) and loss > 0 else None


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None]
    return statistics.fmean(known) if known else None


def _loaders(made: Sequence[Provenance]) -> list[Values]:
    """Return a row per loader with its record on each branch, None where there is none."""
    names = dict.fromkeys(record.loader for each in made for record in each.loaders)
    return [{"loader": name, "records": [_record(each.loaders, name) for each in made]} for name in names]


def _run(made: LoaderRunRecord) -> Values:
    speed = made.num_tokens / made.forward_s if made.forward_s > 0 else None
    decode = made.decode_tokens / made.decode_s if made.decode_s else None
    return {**made.model_dump(), "forward_tokens_per_s": speed, "decode_tokens_per_s": decode}


def _record(records: Sequence[LoaderRecord], name: str) -> Values | None:
    return next((record.model_dump() for record in records if record.loader == name), None)


def _experts(made: Provenance) -> Values | None:
    """Return how many tokens the experts of each block were calibrated on."""
    blocks: dict[int, list[ExpertLinearRecord]] = {}
    for linear in made.linears:
        if isinstance(linear, ExpertLinearRecord) and (place := place_of_linear(linear)) is not None:
            blocks.setdefault(place[0], []).append(linear)
    if not blocks:
        return None
    return {
        "branch": made.branch,
        "blocks": [
            {
                "block": block,
                "linears": len(found),
                "least": min(each.tokens for each in found),
                "median": statistics.median_low(each.tokens for each in found),
                "most": max(each.tokens for each in found),
                # rho = columns / (columns + tokens)
                "few": sum(each.rho > 1 / 2 for each in found),
                "unseen": sum(each.tokens == 0 for each in found),
            }
            for block, found in sorted(blocks.items())
        ],
    }


def _digests(made: Provenance) -> Values:
    return {
        "branch": made.branch,
        "recipe": made.recipe_digest,
        "variant": made.variant_digest,
        "calibration": made.calibration.digest,
        "evaluation": made.evaluation.digest,
        "weights": {name: record.model_dump() for name, record in made.weights_files.items()},
    }


def _safe(value: Any) -> Any:
    """Return JSON values with texts that are safe to print, and null for what is not a number."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {printable(str(key)): _safe(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_safe(each) for each in value]
    return value


@cache
def _environment(folder: Path) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=_figure, level=level_of, size=format_bytes, digits=numbers.digits, minute=_minute)
    return environment


def _minute(seconds: float) -> str:
    """Return a time of seconds since 1970."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (OverflowError, ValueError, OSError):  # of the year 10^300, which a record may hold
        return "not known"


def _figure(figure: Mapping[str, float | None], kind: str = "") -> str:
    """Return a figure with twice its standard error; `kind` percent or change: of a fraction."""
    value, error = figure["value"], figure["standard_error"]
    if value is None:
        return "not known"
    if kind:
        return numbers.measured_percent(value, error, signed=kind == "change")
    return numbers.measured(value, error)
