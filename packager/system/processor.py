"""The name of this machine's processor, which says more of a speed than the word cpu."""

import os
import platform
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """Return the processor's model and how many threads of it this process may use; no name of the machine."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # only Linux has it
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    return f"{named[0] if named else model}, {threads} threads"
