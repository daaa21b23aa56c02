"""The progress of quantizing on the terminal: the plan of each device, a line per block, the time of each variant."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from packager.quantize.job import DeviceShare, Event, LinearsDone, ModulesFused
from packager.system.terminal import Bar, Terminal
from packager.system.text import format_bytes

if TYPE_CHECKING:
    from packager.model.fused_blocks import FusedModules

_MOST_NAMES = 3


class QuantizeView:
    """Shows the events that `quantize` reports, from several threads.

    Args:
        terminal: gets the lines.
        bar: counts blocks, of all variants.
        branches: of the variants.

    Attributes:
        seconds: each variant's time so far; on several GPUs at the same time.
        fused: the modules that run fused kernels; None before a GPU has begun.
    """

    def __init__(self, terminal: Terminal, bar: Bar, branches: Iterable[str]) -> None:
        self._terminal, self._bar = terminal, bar
        self.seconds = dict.fromkeys(branches, 0.0)
        self.fused: FusedModules | None = None

    def report(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, DeviceShare):
            self._terminal.log(share_line(event))
        elif isinstance(event, ModulesFused):
            self.fused = event.modules
            self._terminal.log(fused_line(event))
        elif isinstance(event, LinearsDone):
            self._bar.note(linears_line(event))
        else:
            self.seconds[event.branch] += event.seconds
            result = "resumed" if event.resumed else f"loss {event.loss:.4g}"
            self._bar.step(
                f"{event.branch} block {event.block + 1}/{event.num_blocks} {result} {event.seconds:.1f} s",
                typical=not event.resumed,
            )


def share_line(share: DeviceShare) -> str:
    """Return the line that shows how a device will quantize its share."""
    plan, branches = share.plan, ", ".join(variant.branch for variant in share.variants)
    sweeps = len(share.sweeps)
    devices = ", ".join(map(str, share.devices))
    ways = {"device": f"on {share.devices[0].type}", "host": "in pinned host memory", "disk": "on disk"}
    each = "each of " if len(share.devices) > 1 else ""
    parts = [f"activations {ways[plan.placement]}", f"about {format_bytes(plan.device_bytes)} of {each}{devices}"]
    if each:
        parts.insert(0, "rows shared")
    if sweeps > 1:
        parts.insert(0, f"{sweeps} sweeps")
    if 0 < plan.suspended_batches < plan.num_batches:
        again = plan.num_batches - plan.suspended_batches
        parts.append(f"{again} of {plan.num_batches} batches run again for each group of linears")
    if plan.weights == "host":
        parts.append("weights wait in host memory")
    return f"  {branches}: {', '.join(parts)}"


def fused_line(event: ModulesFused) -> str:
    """Return the line that shows how much of the model runs fused kernels, and what does not although it could."""
    missed = event.modules.missed
    names = f"; transformers' own code: {', '.join(missed[:_MOST_NAMES])}" if missed else ""
    more = f" and {len(missed) - _MOST_NAMES} more" if len(missed) > _MOST_NAMES else ""
    return f"  {event.device}: {event.modules}{names}{more}"


def linears_line(done: LinearsDone) -> str:
    """Return the line with the linears of a block that are quantized, and their losses; of experts, the mean loss."""
    losses: dict[str, list[float]] = {}
    for record in done.linears:
        losses.setdefault(record.name.rpartition(".")[2], []).append(record.loss)
    parts = [
        f"{name} {sum(values) / len(values):.3g}{f' ({len(values)} experts)' if len(values) > 1 else ''}"
        for name, values in losses.items()
    ]
    return f"{done.branch} block {done.block + 1}: {', '.join(parts)}"
