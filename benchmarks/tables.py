"""The tables of speed.py: one line per engine, with ratios and peaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from processes import Outcome
from rich.table import Table

_NOTHING = "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One engine's line of the table of speeds.

    Attributes:
        title: the engine.
        variants: permutations made in the run.
        layers: of the model.
        ours: whether the engine is ours.
        outcome: of the engine's process.
        evaluation: of measuring the quality of what was made, where that was asked for.
    """

    title: str
    variants: int
    layers: int
    ours: bool
    outcome: Outcome
    evaluation: Outcome | None = None

    @property
    def seconds(self) -> float | None:
        """Wall time of the timed call, without packing where that is known separately: the best figure for a peer."""
        if self.outcome.status != "ok":
            return None
        return float(self.outcome.result["seconds"]) - float(self.outcome.result.get("packing_s") or 0.0)

    @property
    def per_layer(self) -> float | None:
        """Seconds per layer and permutation."""
        return None if self.seconds is None else self.seconds / self.layers / self.variants

    @property
    def later_layers(self) -> float | None:
        """Seconds per layer and permutation, without the work that only the first or the last layer has."""
        marks = list(self.outcome.result.get("marks", ()))
        if self.outcome.status != "ok" or self.layers < 3 or len(marks) < self.layers:
            return None
        return float(marks[self.layers - 2] - marks[0]) / (self.layers - 2) / self.variants

    def result(self) -> dict[str, Any]:
        """Return the run's entry in the JSON file."""
        return {
            "engine": self.title,
            "permutations": self.variants,
            "layers": self.layers,
            "status": self.outcome.status,
            "reason": self.outcome.reason,
            "seconds_without_packing": self.seconds,
            "seconds_per_layer_and_permutation": self.per_layer,
            "seconds_per_later_layer_and_permutation": self.later_layers,
            "result": dict(self.outcome.result),
            "evaluation": None if self.evaluation is None else _plain(self.evaluation),
        }


def speed_table(rows: Sequence[Row]) -> Table:
    """Return the table; ratios are per layer and permutation, to each line of ours."""
    ours = [row for row in rows if row.ours]
    table = Table(title="Seconds and peaks")
    table.add_column("engine")
    heads = ("permutations", "seconds", "packing", "per layer and permutation", "later layers")
    ratios = (f"ratio to {row.title}" for row in ours)
    for head in (*heads, *ratios, "GPU peak", "reserved", "host peak"):
        table.add_column(head, justify="right")
    table.add_column("version, or why there is no figure")
    for row in rows:
        result = row.outcome.result
        note = _versions(result) if row.seconds is not None else f"{row.outcome.status}: {row.outcome.reason}"
        table.add_row(
            row.title,
            str(row.variants),
            seconds(row.seconds),
            seconds(result.get("packing_s")),
            seconds(row.per_layer, digits=2),
            seconds(row.later_layers, digits=2),
            *(_ratio(row.per_layer, each.per_layer) for each in ours),
            gigabytes(result.get("gpu_allocated_bytes")),
            gigabytes(result.get("gpu_reserved_bytes")),
            gigabytes(result.get("host_bytes")) if row.seconds is not None else _NOTHING,
            note,
        )
    return table


def stages_table(result: Mapping[str, Any]) -> Table:
    """Return the seconds of each stage of a run of ours."""
    table = Table(title="From the recipe to audited checkpoints")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    for name, spent in result["stages"].items():
        table.add_row(str(name), seconds(spent))
    table.add_row("all, disk to disk", seconds(result["disk_to_disk_s"]))
    return table


def evaluation_table(title: str, result: Mapping[str, Any]) -> Table:
    """Return the seconds and peaks of the stage evaluate, and the seconds that 40 layers take by those of one."""
    layers, limit = result["layers"], result["settings"]["gpu_memory_bytes"]
    tokens = f"{result['held_out_tokens']:,} tokens in rows of {result['seq_len']:,}"
    table = Table(title=f"Quality, {title}: {tokens}, {layers} layers")
    for head in ("model", "forward", "per layer", "beside the layers", "comparison with fp16", "40 layers"):
        table.add_column(head, justify="left" if head == "model" else "right")
    whole = 0.0
    for model in result["models"]:
        beside, layer = model["forward_s"] - model["blocks_s"], model["blocks_s"] / layers
        forty = 40 * layer + beside + model["compare_s"]
        whole += forty
        cells = (model["forward_s"], layer, beside, model["compare_s"], forty)
        table.add_row(model["name"], *(seconds(each, digits=3) for each in cells))
    spent = sum(model["forward_s"] + model["compare_s"] for model in result["models"])
    rest = result["seconds"] - spent
    table.add_row("stage", seconds(result["seconds"]), "", seconds(rest, digits=3), "", seconds(whole + rest))
    host, before = result["host_bytes"], result["host_before_bytes"]
    plan = (result["planned_device_bytes"], result["planned_host_bytes"])
    table.caption = (
        f"GPU peak beyond what was held: {gigabytes(result['gpu_allocated_beyond_bytes'])} allocated, "
        f"{gigabytes(result['gpu_reserved_beyond_bytes'])} reserved; planned {gigabytes(plan[0])}; "
        f"limit {gigabytes(limit)}. Host peak {gigabytes(host)}, "
        f"beyond the start {gigabytes(None if before is None else host - before)}; planned {gigabytes(plan[1])}."
    )
    return table


def seconds(value: float | None, *, digits: int = 1) -> str:
    """Return seconds as a cell."""
    return _NOTHING if value is None else f"{value:.{digits}f}"


def gigabytes(value: int | None) -> str:
    """Return bytes as a cell."""
    return _NOTHING if value is None else f"{value / 1e9:.1f} GB"


def _ratio(value: float | None, ours: float | None) -> str:
    return _NOTHING if value is None or ours is None else f"{value / ours:.2f}"


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {"status": outcome.status, "reason": outcome.reason, "result": dict(outcome.result)}


def _versions(result: Mapping[str, Any]) -> str:
    found: Mapping[str, str] = result["versions"]
    own = [name for name in ("auto-gptq", "gptqmodel", "llmcompressor") if name in found]
    return ", ".join(f"{name} {found[name]}" for name in (*own, "transformers", "torch"))
