"""What makes the weights: our own engine and, for comparison, AutoGPTQ. One protocol, one contract for the result.

Whatever the engine, the same linears come out as the same tensors (FORMAT.md), so that packing, proving, measuring and
the card need not know who made them. No torch here: `plan` asks what an engine can do.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packager.errors import MachineError
from packager.model.architecture import Architecture
from packager.prove.loaders import ISOLATED
from packager.quantize.engines import legacy_config
from packager.receipt import LinearRecord
from packager.variant import EngineName, Variant

if TYPE_CHECKING:
    from packager.quantize.sweep import QuantizeJob, Report

_HERE = Path(__file__).parent
AUTO_GPTQ_SCRIPT = _HERE / "auto_gptq_script.py"
# The loader's environment serves both: what quantizes is what opens the result.
AUTO_GPTQ_LOCK = _HERE.parents[1] / "prove" / "loaders" / "requirements" / "autogptq.txt"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What an engine says of the variants it made; their blocks are in the job's stores.

    Attributes:
        records: for each branch, one record per linear in model order.
        made_with: the engine's name and version, as the card shows it.
        versions: of the packages that took part.
    """

    records: Mapping[str, tuple[LinearRecord, ...]]
    made_with: str
    versions: Mapping[str, str]


class Engine(Protocol):
    """Makes variants of one base model."""

    def quantize(self, job: "QuantizeJob", report: "Report") -> Made:
        """Leave every block of every variant of the job finished in its store.

        Args:
            job: whose variants are all this engine's.
            report: told of linears and blocks as they are done, each variant's blocks in order.

        Raises:
            QuantizeError: a linear cannot be quantized.
            MachineError: this machine lacks what the engine needs.
        """


@dataclass(frozen=True, kw_only=True)
class Site:
    """What an engine of another environment needs to know of this machine.

    Attributes:
        cache: where environments are kept.
        scratch: a folder for what passes between processes; its content may be deleted at any time.
        environ: the process environment to derive its own from; secrets are removed.
        log: told in one line when an environment is made.
    """

    cache: Path
    scratch: Path
    environ: Mapping[str, str]
    log: Callable[[str], None]


def engine_named(name: EngineName, site: Site) -> Engine:
    """Return an engine, its modules imported only now."""
    if name == "native":
        from packager.quantize.engines.native import Native

        return Native()
    from packager.quantize.engines.auto_gptq import AutoGptq

    return AutoGptq(site)


def needs_cuda(name: EngineName) -> bool:
    """Return whether an engine computes on CUDA only."""
    return name == "auto-gptq"


def require_engines(names: Iterable[EngineName], device_type: str) -> None:
    """Raise MachineError unless every engine can compute on a type of device, "cpu" or "cuda"."""
    if device_type != "cuda" and any(map(needs_cuda, names)):
        raise MachineError(
            "engine auto-gptq needs a CUDA GPU",
            why=f"AutoGPTQ 0.7.1 quantizes on CUDA only, and this build computes on {device_type}",
            hint="use engine: native, or build on a machine with a GPU",
        )


def engine_problems(
    variants: Sequence[Variant], config: Mapping[str, object], architecture: Architecture, seq_len: int
) -> list[str]:
    """Return which variants ask an engine for what it cannot do with this model, one line for each."""
    found = legacy_config.problems(config, architecture, seq_len)
    return [
        f"{variant.branch}: engine auto-gptq cannot quantize {problem}; use engine: native"
        for variant in variants
        if variant.engine == "auto-gptq"
        for problem in found
    ]


def auto_gptq_digest() -> str:
    """Return what changes when AutoGPTQ would make other bytes: the digest of our scripts and the pinned packages."""
    parts = (AUTO_GPTQ_SCRIPT, ISOLATED, AUTO_GPTQ_LOCK)
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
