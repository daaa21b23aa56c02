"""One reading for several threads."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from packager.quantize import shared_reader
from packager.quantize.shared_reader import SharedReader

NAMES = [f"t{number}" for number in range(100)]


def test_every_thread_gets_every_tensor_and_each_is_read_once():
    reads: Counter[str] = Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return torch.tensor([float(name[1:])])

    reader, together = SharedReader(read, 4), Barrier(4)

    def walk() -> list[float]:
        found = []
        for first in range(0, 100, 10):
            together.wait()  # nobody lags by more than is kept
            found += [float(reader(name)) for name in NAMES[first : first + 10]]
        return found

    with ThreadPoolExecutor(4) as pool:
        results = [run.result() for run in [pool.submit(walk) for _ in range(4)]]
    assert all(found == [float(number) for number in range(100)] for found in results)
    assert set(reads.values()) == {1}
    assert not reader._kept


def test_a_thread_that_lags_far_behind_reads_again_and_little_is_kept():
    reads: Counter[str] = Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return torch.zeros(1)

    reader = SharedReader(read, 2)
    for name in NAMES:
        reader(name)
        assert len(reader._kept) <= shared_reader._MOST_KEPT
    for name in NAMES:
        reader(name)
    assert reads[NAMES[0]] == 2
    assert reads[NAMES[-1]] <= 2


def test_what_goes_wrong_is_heard_by_whoever_waits_for_it():
    def read(_: str) -> torch.Tensor:
        raise OSError("gone")

    reader = SharedReader(read, 2)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            reader("t0")
