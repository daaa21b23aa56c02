"""The quota of a fleet's store: how much of it the builds of recipes take."""

from collections.abc import Callable
from dataclasses import dataclass, field

from packager.fleet.tasks import BuildRequest


@dataclass
class StoreQuota:
    """The bytes of the store that recipes take, from their first fetch until their builds have left it.

    Attributes:
        limit_bytes: that all may take together; None for any number.
    """

    limit_bytes: int | None
    _taken: dict[str, int] = field(default_factory=dict)  # by recipe, the first one first
    _taken_bytes: int = 0

    def has_room(self, request: BuildRequest) -> bool:
        """Return whether a recipe may begin now; one that has its bytes already may."""
        if self.limit_bytes is None or request.recipe in self._taken:
            return True
        return self._taken_bytes + request.store_bytes <= self.limit_bytes

    def lacking(self, request: BuildRequest) -> str:
        """Return why a recipe can never begin: it takes more than the whole limit. "" if it can."""
        if self.limit_bytes is None or request.store_bytes <= self.limit_bytes:
            return ""
        return f"its builds take {request.store_bytes / 1e9:.0f} GB, more than the store may have"

    def take(self, request: BuildRequest) -> None:
        """Count the bytes of a recipe that begins, unless they are counted already."""
        if request.recipe not in self._taken:
            self._taken[request.recipe] = request.store_bytes
            self._taken_bytes += request.store_bytes

    def make_room(self, wanted_bytes: int, may_go: Callable[[str], bool]) -> list[str]:
        """Take back the bytes of recipes, the oldest first, until there is room for so many bytes; return the recipes.

        Args:
            wanted_bytes: of what is to begin.
            may_go: whether the builds of a recipe may be deleted.
        """
        dropped: list[str] = []
        if self.limit_bytes is None:
            return dropped
        for name in list(self._taken):
            if self._taken_bytes + wanted_bytes <= self.limit_bytes:
                break
            if may_go(name):
                self._taken_bytes -= self._taken.pop(name)
                dropped.append(name)
        return dropped
