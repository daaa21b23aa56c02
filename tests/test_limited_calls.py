"""Calls under limits: what they take is seen, whatever this process has, and whichever process takes it."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.limited_calls import MOST_BYTES_BEYOND, MOST_S, Measured, call_limited, overstepped

SIZE = 200_000_000


def fill() -> None:
    """Take memory in small pieces, as parsers do: they fill pages that are free already."""
    assert [bytes(1000) for _ in range(SIZE // 1000)]


def fill_in_a_child(size_bytes: int) -> None:
    subprocess.run([sys.executable, "-c", f"assert b'x' * {size_bytes}"], check=True)


def test_the_memory_of_a_call_is_seen_beside_a_harmless_one(tmp_path: Path) -> None:
    """This process has taken and freed more before, which hides nothing."""
    pieces = [bytes(1000) for _ in range(SIZE // 1000)]
    kept = pieces.pop()  # the last one: the C library keeps what lies below it
    del pieces
    clean = call_limited(lambda: None, tmp_path / "out")
    beyond = call_limited(fill, tmp_path / "out").peak_bytes - clean.peak_bytes
    assert 0.95 * SIZE < beyond < 1.3 * SIZE
    assert kept


@pytest.mark.slow
def test_the_memory_of_a_calls_child_is_seen(tmp_path: Path) -> None:
    nothing = call_limited(lambda: subprocess.run([sys.executable, "-c", ""], check=True), tmp_path / "out")
    small = call_limited(lambda: None, tmp_path / "out")
    found = call_limited(partial(fill_in_a_child, small.peak_bytes + SIZE), tmp_path / "out")
    assert found.status == nothing.status == 0
    assert found.peak_bytes > small.peak_bytes + SIZE


def test_waiting_is_not_computing(tmp_path: Path) -> None:
    found = call_limited(lambda: time.sleep(0.5), tmp_path / "out")
    assert found.seconds >= 0.5
    assert found.cpu_s < 0.3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"peak_bytes": 10_000_000 + MOST_BYTES_BEYOND + 1}, "1000 MB more than a harmless call"),
        ({"cpu_s": MOST_S + 1, "seconds": 70.0}, "61 s of computing"),
        ({"seconds": MOST_S * 2 + 1}, "121 s, of which it computed for 1.0 s"),
        ({"seconds": MOST_S * 2 - 1}, ""),
    ],
)
def test_limits_are_those_of_a_machine_as_slow_as_the_harmless_call(changes: dict[str, Any], words: str) -> None:
    clean = Measured(status=0, seconds=2.0, cpu_s=1.0, peak_bytes=10_000_000, output="")
    assert overstepped(replace(clean, **changes), clean) == words


def test_a_call_whose_output_cannot_be_written_ends_all_the_same(tmp_path: Path) -> None:
    """On a full disk, a fork went on as its parent: a second harness, which was ended after a minute."""

    def fail() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        os.dup2(1, 2)
        raise ValueError("a bug")

    found = call_limited(fail, tmp_path / "out")
    assert found.status == 99
    assert found.seconds < 30
