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

        Where all of them together would not make room, none is taken back: they stay until enough of them may go.

        Args:
            wanted_bytes: of what is to begin.
            may_go: whether the builds of a recipe may be deleted.
        """
        if self.limit_bytes is None:
            return []
        lacking_bytes = self._taken_bytes + wanted_bytes - self.limit_bytes
        dropped: list[str] = []
        for name, size_bytes in self._taken.items():
            if lacking_bytes <= 0:
                break
            if may_go(name):
                lacking_bytes -= size_bytes
                dropped.append(name)
        if lacking_bytes > 0:
            return []
        for name in dropped:
            self._taken_bytes -= self._taken.pop(name)
        return dropped
