"""The host's memory: what this machine has to give, containers' limits included, and the peak of this process."""

import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Return the memory that processes can still get without swapping; None where the system does not state it.

    Args:
        meminfo: Linux's table of the machine's memory.
        cgroup: folder of the control group that this process sees, which limits a container (version 2).
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
    limit, used = (_number(cgroup / name) for name in ("memory.max", "memory.current"))
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used + (_page_cache(cgroup) or 0)))


def peak_memory_bytes() -> int:
    """Return the largest resident size this process has had."""
    import resource  # POSIX only: importing this module works everywhere

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max": there is no limit
        return None


def _page_cache(cgroup: Path) -> int | None:
    """Return what the control group uses for files that can be read again: it is used, and can be had."""
    try:
        lines = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="utf-8").splitlines())
        return int(lines["inactive_file"])
    except (OSError, KeyError, ValueError):
        return None
