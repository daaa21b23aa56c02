"""Targets of other packages, by an entry point: a function of a repository's id that returns a `Target`."""

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Final

from packager.errors import PackagerError, PublishError
from packager.publish.targets import Target

GROUP_OF_TARGETS: Final = "gptq_packager.targets"
_METHODS: Final = tuple(name for name in vars(Target) if not name.startswith("_"))


def open_other_target(name: str, repository_id: str, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target of a repository that an installed package offers under a name.

    The package is imported and gets the environment: its code is trusted, as the user installed it.

    Raises:
        PublishError: no installed package offers it, or it cannot be made.
    """
    offered = {each.name: each.value for each in entry_points(group=GROUP_OF_TARGETS)}
    if name not in offered:
        raise PublishError(
            f"no installed package has the target {name}",
            where="repository.plugin",
            why=f"there are: {', '.join(sorted(offered)) or 'none'}",
            hint=f"install the package that has {name} in its entry points {GROUP_OF_TARGETS}",
        )
    try:
        target = next(iter(entry_points(group=GROUP_OF_TARGETS, name=name))).load()(repository_id, environ, log)
    except PackagerError:
        raise
    except (Exception, SystemExit) as error:  # the code of another package raises anything
        why = f"{type(error).__name__}: {error}"
        hint = "ask the author of the package"
        raise PublishError(f"the target {name} cannot be opened", where=offered[name], why=why, hint=hint) from error
    if lacking := [each for each in _METHODS if not hasattr(target, each)]:
        raise PublishError(
            f"the target {name} lacks methods of a target",
            where=offered[name],
            why=f"it has no {', '.join(lacking)}",
            hint="packager.publish.targets.Target says what a target has",
        )
    made: Target = target
    return made
