"""How fast the loaders were while they proved the files: a table that a recipe asks for, as it has times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from packager.card.numbers import digits
from packager.model.runtimes import title_of
from packager.receipt import LoaderRunRecord, Provenance

_DIGITS = 2
_NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A loader's run on a branch; figures are texts, "not measured" where there is none.

    Attributes:
        forward: tokens per second of one forward over whole rows, with the logits of every token. A prefill ends with
            the first token of an answer: see `ProbeResult`.
        decode: tokens per second of answers, after the first one of each.
        beside: loaders that ran at once.
    """

    branch: str
    loader: str
    machine: str
    forward: str
    decode: str
    peak_memory_bytes: int | None
    beside: int | None


def speed_rows(receipts: Sequence[Provenance], runs: Mapping[str, Sequence[LoaderRunRecord]]) -> tuple[SpeedRow, ...]:
    """Return a row for each loader that passed on a branch, in the order of branches, not of speeds.

    Args:
        receipts: of the branches.
        runs: time and memory of the loaders' runs by branch, as their receipts keep them.
    """
    return tuple(
        _row(made.branch, record.loader, {run.loader: run for run in runs.get(made.branch, ())}.get(record.loader))
        for made in receipts
        for record in made.loaders
        if record.status == "passed"
    )


def _row(branch: str, loader: str, run: LoaderRunRecord | None) -> SpeedRow:
    return SpeedRow(
        branch=branch,
        loader=title_of(loader),
        machine=run.machine or run.device if run is not None else _NOT_MEASURED,
        forward=_rate(run.num_tokens, run.forward_s) if run is not None else _NOT_MEASURED,
        decode=_rate(run.decode_tokens, run.decode_s) if run is not None else _NOT_MEASURED,
        peak_memory_bytes=None if run is None else run.peak_memory_bytes,
        beside=None if run is None else run.beside,
    )


def _rate(tokens: int, seconds: float | None) -> str:
    """Return tokens per second with two digits: a run of a second is not known more precisely."""
    if not tokens or seconds is None or seconds <= 0:
        return _NOT_MEASURED
    rate = tokens / seconds
    return f"{rate:,.0f}" if rate >= 10**_DIGITS else digits(rate, _DIGITS)
