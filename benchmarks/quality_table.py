"""The tables of quality.py: each engine's held-out figures per permutation, and the act orders side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import mean, stdev
from typing import Any, get_args

from processes import Outcome
from rich.table import Table

from packager.receipt import QualityRecord, standard_error
from packager.variant import ActOrder

# The titles of the peers that, like a recipe's defaults, run GPTQ and nothing after it.
_GPTQ = ("AutoGPTQ", "GPTQModel")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One checkpoint's figures, or why there are none."""

    engine: str
    group_size: int
    act_order: ActOrder
    seed: int
    ours: bool
    outcome: Outcome
    quality: QualityRecord | None

    @property
    def permutation(self) -> str:
        """The permutation's name in the tables."""
        return f"{self.group_size}g" + ("" if self.act_order == "none" else f" {self.act_order}")

    @property
    def kl(self) -> float:
        """KL divergence; only where there is a quality."""
        assert self.quality is not None  # noqa: S101 - the tables ask only then
        return self.quality.kl_divergence

    def result(self) -> dict[str, Any]:
        """Return the measurement's entry in the JSON file."""
        return {
            "engine": self.engine,
            "group_size": self.group_size,
            "act_order": self.act_order,
            "seed": self.seed,
            "status": self.outcome.status,
            "reason": self.outcome.reason,
            "quality": self.quality.model_dump() if self.quality is not None else None,
            "result": dict(self.outcome.result),
        }


def measurements_of(report: Mapping[str, Any]) -> list[Measurement]:
    """Return the measurements of a JSON file of quality.py."""
    return [
        Measurement(
            engine=each["engine"],
            group_size=each["group_size"],
            act_order=each["act_order"],
            seed=each["seed"],
            ours=each["engine"] in report["ours"],
            outcome=Outcome(status=each["status"], reason=each["reason"], result=each["result"]),
            quality=QualityRecord.model_validate_json(json.dumps(each["quality"])) if each["quality"] else None,
        )
        for each in report["measurements"]
    ]


def kl_table(measurements: Sequence[Measurement]) -> Table:
    """Return KL per permutation: the mean over the seeds and their range, and ours over the best peer of each seed."""
    engines = list(dict.fromkeys(each.engine for each in measurements))
    ours = list(dict.fromkeys(each.engine for each in measurements if each.ours))
    peers = any(each.quality is not None and not each.ours for each in measurements)
    table = Table(title="KL divergence to the base model, nats per token: mean over the seeds, and their range")
    table.add_column("permutation")
    for engine in engines:
        table.add_column(engine, justify="right")
    for engine in ours if peers else ():
        table.add_column(f"{engine} / best peer,\nworst seed", justify="right")
    for permutation in dict.fromkeys(each.permutation for each in measurements):
        here = [each for each in measurements if each.permutation == permutation]
        cells = [_range([each for each in here if each.engine == engine]) for engine in engines]
        ratios = [_worst_ratio(here, engine) for engine in ours] if peers else []
        table.add_row(permutation, *cells, *ratios)
    return table


def figures_table(measurements: Sequence[Measurement]) -> Table:
    """Return perplexity and top-1 agreement, means over the seeds, engine by engine."""
    table = Table(title="Means over the seeds")
    table.add_column("permutation")
    table.add_column("engine")
    for head in ("perplexity", "base perplexity", "top-1 agreement", "seeds"):
        table.add_column(head, justify="right")
    for permutation, engine in dict.fromkeys((each.permutation, each.engine) for each in measurements):
        here = [each for each in measurements if (each.permutation, each.engine) == (permutation, engine)]
        found = [each.quality for each in here if each.quality is not None]
        if not found:
            table.add_row(permutation, engine, f"{here[0].outcome.status}: {here[0].outcome.reason}")
            continue
        table.add_row(
            permutation,
            engine,
            f"{mean(quality.perplexity for quality in found):.4f}",
            f"{found[0].base_perplexity:.4f}",
            f"{mean(quality.top1_agreement for quality in found):.2%}",
            str(len(found)),
        )
    return table


def peers_table(measurements: Sequence[Measurement]) -> Table:
    """Return our KL over each peer's on the same seed, and the seconds of both.

    An order of ours that leaves g_idx at i // group_size is compared with the peer's checkpoint without act order,
    which loads in the same runtimes; full order with full order. A ratio is the mean over the seeds; its standard error
    is over the held-out rows and over the seeds, and the ratio is marked where it is within twice that error of 1.
    Where the two GPTQ engines were run, ours is compared with the better of them, too, seed by seed.
    """
    table = Table(
        title="Our KL over a peer's on the same seed: mean, standard error over rows and seeds, and the largest; "
        "~ means no difference"
    )
    for head in ("permutation", "engine"):
        table.add_column(head)
    found = [each for each in measurements if each.quality is not None]
    peers = {each.engine: [other for other in found if other.engine == each.engine] for each in found if not each.ours}
    if all(name in peers for name in _GPTQ):
        peers[f"the better of {' and '.join(_GPTQ)}"] = _better([each for name in _GPTQ for each in peers[name]])
    for head in ("seconds", *(f"over {peer}" for peer in peers)):
        table.add_column(head, justify="right")
    for permutation, engine in dict.fromkeys((each.permutation, each.engine) for each in found if each.ours):
        own = [each for each in found if (each.permutation, each.engine) == (permutation, engine)]
        order = "full" if own[0].act_order == "full" else "none"
        beside = [
            [each for each in those if (each.act_order, each.group_size) == (order, own[0].group_size)]
            for those in peers.values()
        ]
        table.add_row(permutation, engine, _seconds(own), *(_over_peer(own, those) for those in beside))
    return table


def _better(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the measurement with the lowest KL of each permutation and seed."""
    best: dict[tuple[str, int], Measurement] = {}
    for each in measurements:
        key = (each.permutation, each.seed)
        if key not in best or each.kl < best[key].kl:
            best[key] = each
    return list(best.values())


def _over_peer(own: Sequence[Measurement], peers: Sequence[Measurement]) -> str:
    """Return the ratio of our KL to that of a peer, seed by seed, and the peer's seconds."""
    of_peer = {each.seed: each for each in peers}
    pairs = [(each, of_peer[each.seed]) for each in own if each.seed in of_peer]
    if not pairs:
        return "-"
    ratios = [each.kl / other.kl for each, other in pairs]
    over_seeds = standard_error(ratios) if len(ratios) > 1 else 0.0
    error = hypot(over_seeds, _error_over_rows(pairs))
    shown = f" +- {error:.3f}{' ~' if abs(mean(ratios) - 1) < 2 * error else ''}" if error else ""
    largest = f", max {max(ratios):.3f}" if len(ratios) > 1 else ""
    return f"{mean(ratios):.3f}{shown}{largest}\n{_seconds(peers)}"


def _error_over_rows(pairs: Sequence[tuple[Measurement, Measurement]]) -> float:
    """Return the standard error, over the held-out rows, of the ratio of two engines' KL; 0 where rows are unknown.

    A row's KL is its mean over the seeds, so the seeds, which share the rows, are no further draws of text. The error
    of a ratio of two means of the same rows is that of the residuals own - ratio * other, over the other's mean.
    """
    own, other = (_row_means(side) for side in zip(*pairs, strict=True))
    if not own or not other:
        return 0.0
    ratio = mean(own) / mean(other)
    residuals = [ours - ratio * theirs for ours, theirs in zip(own, other, strict=True)]
    return standard_error(residuals) / mean(other)


def _row_means(measurements: Sequence[Measurement]) -> list[float]:
    """Return the mean KL of each held-out row; nothing where a measurement has no rows."""
    records = [each.quality.rows for each in measurements if each.quality is not None]
    rows = [record.kl_divergence for record in records if record is not None]
    return [mean(seeds) for seeds in zip(*rows, strict=True)] if len(rows) == len(measurements) else []


def _seconds(measurements: Sequence[Measurement]) -> str:
    found = [each.outcome.result["seconds"] for each in measurements if "seconds" in each.outcome.result]
    return f"{mean(found):.1f} s" if found else "-"


def order_table(measurements: Sequence[Measurement]) -> Table:
    """Return, by engine and group size, KL of each act order and its ratio to none's of the same seed.

    Each with the standard error of the mean over the seeds.
    """
    orders = [order for order in get_args(ActOrder) if any(each.act_order == order for each in measurements)]
    table = Table(title="Act orders: KL, and over none's of the same seed; mean and standard error over the seeds")
    for head in ("engine", "group size"):
        table.add_column(head)
    for order in orders:
        table.add_column(order, justify="right")
    for engine, size in dict.fromkeys((each.engine, each.group_size) for each in measurements):
        found: dict[ActOrder, dict[int, float]] = {order: {} for order in get_args(ActOrder)}
        for each in measurements:
            if (each.engine, each.group_size) == (engine, size) and each.quality is not None:
                found[each.act_order][each.seed] = each.kl
        table.add_row(engine, str(size), *(_beside(found[order], found["none"]) for order in orders))
    return table


def _beside(kl: dict[int, float], of_none: dict[int, float]) -> str:
    """Return the mean of some seeds' KL, and of its ratio to that of no act order."""
    if not kl:
        return "-"
    ratios = [kl[seed] / of_none[seed] for seed in kl if seed in of_none]
    text = _with_error(list(kl.values()), 6)
    return text if not ratios or kl is of_none else f"{text}\n{_with_error(ratios, 3)}"


def _with_error(values: Sequence[float], digits: int) -> str:
    """Return a mean with its standard error, which takes two values."""
    error = f" +- {stdev(values) / sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{error}"


def _range(measurements: Sequence[Measurement]) -> str:
    found = [each.kl for each in measurements if each.quality is not None]
    if not found:
        return measurements[0].outcome.status if measurements else "-"
    text = f"{mean(found):.6f}"
    if len(found) > 1:
        text += f"\n({min(found):.6f} to {max(found):.6f})"
    return text if len(found) == len(measurements) else f"{text}\n{len(measurements) - len(found)} failed"


def _worst_ratio(measurements: Sequence[Measurement], engine: str) -> str:
    """Return the largest ratio, over the seeds, of an engine's KL to the best peer's of the same seed."""
    ratios = []
    for own in (each for each in measurements if each.engine == engine and each.quality is not None):
        peers = [each.kl for each in measurements if each.seed == own.seed and not each.ours and each.quality]
        if peers:
            ratios.append(own.kl / min(peers))
    return f"{max(ratios):.3f}" if ratios else "-"
