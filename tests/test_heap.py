"""Memory that is freed goes back to the system, so that the peak of a build is what its plan says."""

import subprocess
import sys

import pytest

# Every second block of 8 MB is freed, after a larger one was: glibc's heap would keep them all, for a block that
# stays lies behind each. Blocks that stay are as large as the freed ones, so that none of them fits an older hole.
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
    larger = torch.ones(31 << 18)
    del larger
blocks = [torch.ones(1 << 21) for _ in range(24)]
before = held()
del blocks[::2]
print(before - held())
"""


def returned_bytes(way: str) -> int:
    command = [sys.executable, "-c", SCRIPT, way]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_blocks_are_returned() -> None:
    freed = 12 * (8 << 20)
    if returned_bytes("kept") > 0.3 * freed:
        pytest.skip("this heap returns freed blocks by itself")
    assert returned_bytes("returned") > 0.95 * freed
