"""One read per tensor for several threads."""

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

    shared, together = SharedReader(read, [1] * 4), Barrier(4)

    def read_all() -> list[float]:
        found, reader = [], shared.for_thread()
        for first in range(0, 100, 10):
            together.wait()  # no thread lags by more than is kept
            found += [float(reader(name)) for name in NAMES[first : first + 10]]
        return found

    with ThreadPoolExecutor(4) as pool:
        results = [run.result() for run in [pool.submit(read_all) for _ in range(4)]]
    assert all(found == [float(number) for number in range(100)] for found in results)
    assert set(reads.values()) == {1}
    assert not shared._kept


def test_a_thread_that_lags_far_behind_reads_again_and_little_is_kept():
    reads: Counter[str] = Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return torch.zeros(1)

    shared = SharedReader(read, [1, 1])
    first, second = shared.for_thread(), shared.for_thread()
    for name in NAMES:
        first(name)
        assert len(shared._kept) <= shared_reader._MOST_KEPT
    for name in NAMES:
        second(name)
    assert reads[NAMES[0]] == 2
    assert reads[NAMES[-1]] <= 2
    assert not shared._kept


@pytest.mark.parametrize("sweeps", [[2, 1], [1, 3], [2, 2], [3, 1, 2]])
def test_threads_with_unequal_numbers_of_sweeps_leave_nothing_behind(sweeps):
    """Three variants on two GPUs that have memory for one each: one GPU goes through the model twice."""
    reads: Counter[str] = Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return torch.tensor([float(name[1:])])

    shared = SharedReader(read, sweeps)
    readers = [shared.for_thread() for _ in sweeps]
    for sweep in range(max(sweeps)):
        for name in NAMES:
            asking = [reader for reader, many in zip(readers, sweeps, strict=True) if many > sweep]
            assert [float(reader(name)) for reader in asking] == [float(name[1:])] * len(asking)
            assert not shared._kept
    assert set(reads.values()) == {max(sweeps)}


def test_an_error_of_reading_reaches_every_waiting_thread():
    def read(_: str) -> torch.Tensor:
        raise OSError("gone")

    shared = SharedReader(read, [1, 1])
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            shared.for_thread()("t0")
