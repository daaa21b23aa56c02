"""The results of cuda_loaders.py, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from packager.receipt import LoaderRecord

# The package of versions that names a loader's own version.
_PACKAGES = {"autogptq": "auto-gptq"}


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What a loader made of one variant.

    Attributes:
        runtime: the loader's title.
        branch: of the variant.
        negative: share of negative scales among the variant's.
        record: the verdict and its figures.
        load_s, peak_memory_bytes: of the probe; None where it failed.
        prefill, decode: tokens per second; None where nothing was timed.
        control: the other variant whose answers were judged as this one's, or "".
    """

    runtime: str
    branch: str
    negative: float
    record: LoaderRecord
    load_s: float | None = None
    prefill: float | None = None
    decode: float | None = None
    peak_memory_bytes: int | None = None
    control: str = ""

    def plain(self) -> dict[str, Any]:
        """Return the entry of the JSON file."""
        return {**asdict(self), "record": self.record.model_dump(mode="json")}

    @property
    def version(self) -> str:
        """The version of the loader's own package, or ""."""
        name = self.record.loader
        return self.record.versions.get(_PACKAGES.get(name, name), "")

    @property
    def as_wanted(self) -> bool:
        """Whether the loader passed, or the control failed."""
        return (self.record.status == "passed") != bool(self.control)


def table(found: Sequence[Opened]) -> Table:
    """Return one row per loader, kernel and variant."""
    made = Table(
        "loader", "version", "kernel", "variant", "scales < 0", "status", "relative error", "top-1", "tokens equal",
        "load, s", "prefill, tokens/s", "decode, tokens/s", "peak, MB", box=None,
    )  # fmt: skip
    for each in found:
        record = each.record
        row = [each.runtime, each.version, kernel_title(record.kernel), each.branch, f"{each.negative:.1%}"]
        if each.control:
            row.append(f"control, answers to {each.control}: {record.status}{'' if each.as_wanted else ', WRONG'}")
        else:
            row.append(record.status if record.status == "passed" else f"{record.status}: {record.reason}")
        if record.top1_agreement is not None:
            error = "" if record.relative_error is None else f"{record.relative_error:.6f}"
            row += [error, f"{record.top1_agreement:.4f}", f"{record.tokens_equal} of {record.tokens_generated}"]
        if each.load_s is not None:
            speeds = ["" if speed is None else f"{speed:.0f}" for speed in (each.prefill, each.decode)]
            row += [f"{each.load_s:.2f}", *speeds, f"{(each.peak_memory_bytes or 0) / 1e6:.0f}"]
        made.add_row(*row)
    return made


def kernel_title(kernel: str) -> str:
    """Return the last names of the kernels' classes, of AutoGPTQ's their modules: all its classes have one name."""
    classes = [full.split(".") for full in kernel.split("+")]
    return "+".join(parts[-2] if parts[-1] == "QuantLinear" else parts[-1] for parts in classes)
