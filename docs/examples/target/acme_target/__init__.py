"""A target of one's own: git repositories below the folder that ACME_ARCHIVE names, which others can see."""

from collections.abc import Callable, Mapping
from pathlib import Path

from packager.errors import PublishError
from packager.publish.targets import Target
from packager.publish.targets.local import LocalTarget


class Archive(LocalTarget):
    """A local target whose changes others see at once, so that a publish asks before it changes something."""

    is_public = True


def open_archive(repository_id: str, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target of a repository; read and write nothing."""
    if not environ.get("ACME_ARCHIVE"):
        raise PublishError("ACME_ARCHIVE is not set", where=repository_id, hint="set it to the folder of the archive")
    log(f"publishing into the archive {environ['ACME_ARCHIVE']}")
    return Archive(Path(environ["ACME_ARCHIVE"]), repository_id)
