"""The options of a build, which the command line and the Python interface make."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packager.model.devices import DeviceChoice


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command line that a build needs.

    Attributes:
        dist: output folder.
        cache: where loader environments are kept.
        device: where to compute.
        environ: the process environment, for the loaders' processes.
        gpu_memory_bytes: how much of each GPU quantizing and measuring may use; None for what is free.
        local_target: the output folder whose `hub` has what is published locally; None for `dist`.
    """

    dist: Path
    cache: Path
    device: DeviceChoice
    environ: Mapping[str, str]
    gpu_memory_bytes: int | None = None
    local_target: Path | None = None


def default_cache(environ: Mapping[str, str]) -> Path:
    """Return the folder of the loaders' environments where none is named."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptq-packager"
