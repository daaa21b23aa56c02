"""The protocol that every engine implements, and its result. No torch at import."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from packager.quantize.job import QuantizeJob, Report
from packager.receipt import LinearRecord


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """The result of an engine; the blocks themselves are in the job's stores.

    Attributes:
        records: for each branch, one record per linear in model order.
        made_with: the engine's name and version, as the card shows it.
        versions: of the packages that took part.
    """

    records: Mapping[str, tuple[LinearRecord, ...]]
    made_with: str
    versions: Mapping[str, str]


class Engine(Protocol):
    """Quantizes variants of one base model."""

    def quantize(self, job: QuantizeJob, report: Report) -> EngineResult:
        """Quantize every block of every variant into its store.

        Args:
            job: whose variants all name this engine.
            report: called when linears and blocks are done, each variant's blocks in order.

        Raises:
            QuantizeError: a linear cannot be quantized.
            MachineError: this machine lacks what the engine needs.
        """
