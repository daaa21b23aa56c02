"""The values that `quantize` takes and reports. No torch at import."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packager.inputs.base_model import SourceModel
from packager.inputs.rows import TokenRows
from packager.quantize.block_store import BlockStore
from packager.quantize.memory import SweepPlan
from packager.receipt import LinearRecord
from packager.variant import Variant

if TYPE_CHECKING:
    import torch

    from packager.model.fused_blocks import FusedModules


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """Everything that determines the sweeps.

    Attributes:
        source: the base model.
        rows: calibration tokens.
        stores: the variants to quantize, each with the open store of its blocks.
        devices: where to compute; several share the variants, or the rows where there are fewer variants.
        device_limit: bytes of each GPU that may be used; None for all that are free.
        host_limit: bytes of host memory beside GPUs, for all of them together; None for most of what is available.
    """

    source: SourceModel
    rows: TokenRows
    stores: Mapping[Variant, BlockStore]
    devices: "tuple[torch.device, ...]"
    device_limit: int | None = None
    host_limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceShare:
    """The variants that one device quantizes, or several that share the rows; in several sweeps where memory is short.

    Attributes:
        devices: the devices; each has some of the rows.
        variants: their variants.
        plan: how each sweep fits into the memory of each device.
    """

    devices: "tuple[torch.device, ...]"
    variants: tuple[Variant, ...]
    plan: SweepPlan

    @property
    def sweeps(self) -> tuple[tuple[Variant, ...], ...]:
        """The variants of each sweep."""
        step = self.plan.num_variants
        return tuple(self.variants[first : first + step] for first in range(0, len(self.variants), step))


@dataclass(frozen=True, kw_only=True)
class LinearsDone:
    """Progress: linears that share an input have been quantized."""

    branch: str
    block: int
    linears: tuple[LinearRecord, ...]


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """Progress: a block of a variant is finished; `loss` is the sum over its linears."""

    branch: str
    block: int
    num_blocks: int
    loss: float
    seconds: float
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class ModulesFused:
    """The modules of the base model that run fused kernels on a device; reported once per device, on CUDA only."""

    device: "torch.device"
    modules: "FusedModules"


Event = DeviceShare | ModulesFused | BlockDone | LinearsDone
Report = Callable[[Event], None]
