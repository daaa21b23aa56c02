"""The sizes of a group of linears on which the memory of quantizing depends. No torch."""

from typing import NamedTuple

from packager.model.lock import LockedExperts, LockedGroup


class GroupWidths(NamedTuple):
    """What the memory of calibrating and solving a group depends on, see `LockedGroup`.

    Attributes:
        in_features: of its linears.
        widths: out_features of each linear.
        held_bytes: see `LockedGroup`.
        held_bytes_per_pair: likewise.
        experts: likewise.
    """

    in_features: int
    widths: tuple[int, ...]
    held_bytes: int
    held_bytes_per_pair: int
    experts: LockedExperts | None

    @classmethod
    def of(cls, group: LockedGroup) -> "GroupWidths":
        """Return the sizes of a group."""
        widths = tuple(linear.out_features for linear in group.linears)
        return cls(group.in_features, widths, group.held_bytes, group.held_bytes_per_pair, group.experts)

    @property
    def out_features(self) -> int:
        """Of all linears together."""
        return sum(self.widths)
