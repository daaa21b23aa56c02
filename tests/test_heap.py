"""Memory that is freed goes back to the system, so that the peak of a build is what its plan says."""

import subprocess
import sys

import pytest

# Blocks of 8 MB between ones of 96 KB that stay, after a larger one was freed: glibc's heap would keep them all. Blocks
# of a few KB would not do: they fit where others were freed before, and then nothing lies behind the large ones.
SCRIPT = """
import sys
import torch
from packager.system.heap import return_large_blocks

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024

if sys.argv[1] == "returned":
    return_large_blocks()
for _ in range(3):
    del_me = torch.ones(31 << 18)
    del del_me
before, kept, large = held(), [], []
for _ in range(24):
    large.append(torch.ones(1 << 21))
    kept.append(torch.ones(24 << 10))
del large
print(held() - before)
"""


def held_after(way: str) -> int:
    command = [sys.executable, "-c", SCRIPT, way]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_are_returned() -> None:
    assert held_after("returned") < 20_000_000
    assert held_after("kept") > 50_000_000
