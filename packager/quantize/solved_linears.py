"""The linears of a block that were quantized together, while the device may still be computing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from packager.quantize.host_copies import HostCopies
from packager.receipt import ExpertLinearRecord, LinearRecord

_COMPUTED = ("losses", "unrefined_losses", "succeeded")


@dataclass(frozen=True, kw_only=True)
class SolvedLinears:
    """Linears that were quantized together; the device may still be computing the losses and `succeeded`.

    `position` is the key of their records in `QuantizedBlock`: the number of their group, and their place in it.

    `calibrated` is what is known of each linear's Hessian, of experts only: the tokens and rho of a record.
    """

    position: tuple[int, int]
    names: tuple[str, ...]
    damp_percents: tuple[float, ...]
    losses: Tensor
    unrefined_losses: Tensor
    refined: tuple[bool, ...]
    succeeded: Tensor
    calibrated: tuple[tuple[int, float], ...] = ()

    def records(self) -> tuple[LinearRecord, ...]:
        """Return a record for each linear; this waits for the device."""
        before = [
            loss if refined else None
            for loss, refined in zip(self.unrefined_losses.tolist(), self.refined, strict=True)
        ]
        found = tuple(
            LinearRecord(name=name, loss=loss, damp_percent=damp, unrefined_loss=unrefined)
            for name, loss, damp, unrefined in zip(
                self.names, self.losses.tolist(), self.damp_percents, before, strict=True
            )
        )
        if not self.calibrated:
            return found
        return tuple(
            ExpertLinearRecord(**record.model_dump(), tokens=tokens, rho=rho)
            for record, (tokens, rho) in zip(found, self.calibrated, strict=True)
        )


def start_copying(solved: Sequence[SolvedLinears]) -> Callable[[], list[SolvedLinears]]:
    """Start copying to the host what the device computes of these linears.

    Returns:
        What waits for the copies, but not for later work of the device, and returns the linears with them.
    """
    copies = HostCopies(
        {f"{number} {name}": getattr(each, name) for number, each in enumerate(solved) for name in _COMPUTED}
    )

    def finished() -> list[SolvedLinears]:
        found = copies.wait()
        return [
            replace(
                each,
                losses=found[f"{number} losses"],
                unrefined_losses=found[f"{number} unrefined_losses"],
                succeeded=found[f"{number} succeeded"],
            )
            for number, each in enumerate(solved)
        ]

    return finished
