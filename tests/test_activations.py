"""Stored hidden states: for every placement, each batch is returned as it was put."""

import gc
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from packager.quantize.activations import Activations
from tests.hypothesis_profiles import examples

PLACEMENTS = ("device", "host", "disk")
SHAPES = ((4, 6, 8), (4, 6, 8), (3, 6, 8))  # the last batch is often shorter
EVERYWHERE = pytest.mark.parametrize("placement", PLACEMENTS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


def batches(device: torch.device, start: float = 0) -> list[Tensor]:
    """Batches of one value each, all different."""
    return [torch.full(shape, start + index, device=device) for index, shape in enumerate(SHAPES)]


def values(held: Activations) -> list[float]:
    """The one value of each batch."""
    found = [held.get(index) for index in range(len(held))]
    assert [tuple(batch.shape) for batch in found] == list(SHAPES)
    return [value for batch in found for value in batch.unique().tolist()]


@EVERYWHERE
def test_a_forward_reads_and_replaces_batch_by_batch(device, tmp_path, placement):
    held = Activations(batches(device), placement, tmp_path)
    assert len(held) == 3
    for index in range(3):
        held.put(index, held.get(index) + 10)
    assert values(held) == [10, 11, 12]


@EVERYWHERE
@pytest.mark.parametrize("expected", [False, True])
def test_a_sweep_reads_all_some_again_and_then_replaces_all(device, tmp_path, placement, expected):
    """Suspended batches are read once, the others once per group; then all are replaced, read again or not."""
    held = Activations(batches(device), placement, tmp_path)
    for block in range(3):
        if expected:
            held.prefetch_all()
        first = [held.get(index) for index in range(3)]
        again = [held.get(index) for index in (1, 2)]
        assert torch.equal(again[0], first[1])
        for index in range(3):
            source = held.get(index) if index else first[index]
            held.put(index, source + 10)
        assert [batch.unique().item() for batch in first] == [10 * block, 10 * block + 1, 10 * block + 2]
    assert values(held) == [30, 31, 32]


@settings(max_examples=examples(50), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.tuples(st.sampled_from(["get", "put", "expect"]), st.integers(0, 2)), max_size=20))
@EVERYWHERE
def test_any_order_of_reading_and_replacing(device, tmp_path, placement, steps):
    held, present, counter = Activations(batches(device), placement, tmp_path), [0.0, 1.0, 2.0], itertools.count(100)
    for what, index in steps:
        if what == "put":
            present[index] = float(next(counter))
            held.put(index, torch.full(SHAPES[index], present[index], device=device))
        elif what == "get":
            assert held.get(index).unique().tolist() == [present[index]]
        else:
            held.prefetch_all()
    assert values(held) == present


@EVERYWHERE
def test_variants_share_their_first_batches_and_nothing_else(device, tmp_path, placement):
    first = batches(device)
    one, other = (Activations(first, placement, tmp_path) for _ in range(2))
    for index in range(3):
        one.put(index, one.get(index) + 10)
    assert values(other) == [0, 1, 2]
    for index in range(3):
        other.put(index, other.get(index) + 20)
    assert (values(one), values(other)) == ([10, 11, 12], [20, 21, 22])
    assert [batch.unique().item() for batch in first] == [0, 1, 2]


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_a_stored_batch_may_be_freed_or_overwritten(device, tmp_path, placement):
    first = batches(device)
    held = Activations(first, placement, tmp_path)
    if device.type == "cpu":
        first[0].fill_(99)
    mine = held.get(1)
    del first
    mine.fill_(99)
    assert values(held) == [0, 1, 2]


def test_files_on_disk_have_no_name_and_end_with_their_owner(device, tmp_path):
    held = [Activations(batches(device, start), "disk", tmp_path) for start in (0, 100)]
    assert list(tmp_path.iterdir()) == []
    if (maps := Path("/proc/self/maps")).exists():
        assert maps.read_text().count(f"{tmp_path}/") == 6
    assert [values(one) for one in held] == [[0, 1, 2], [100, 101, 102]]
    del held
    gc.collect()
    if maps.exists():
        assert f"{tmp_path}/" not in maps.read_text()


def test_a_folder_is_needed_for_the_disk(device):
    with pytest.raises(ValueError, match="need a folder"):
        Activations(batches(device), "disk")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@EVERYWHERE
def test_every_bit_comes_back(device, tmp_path, placement, dtype):
    batch = torch.randn(3, 5, 7).to(device, dtype)
    held = Activations([batch, batch + 1], placement, tmp_path)
    held.put(0, batch * 3)
    assert held.get(0).dtype == dtype
    assert torch.equal(held.get(0), batch * 3)
    assert torch.equal(held.get(1), batch + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["host", "disk"])
@pytest.mark.parametrize("expected", [False, True])
def test_copies_wait_for_their_source(tmp_path, placement, expected):
    """The GPU is kept busy: a copy that does not wait for it gets data too early, or after it was overwritten."""
    cuda, shape, many = torch.device("cuda"), (1 << 22,), 4
    held = Activations([torch.zeros(shape, device=cuda) for _ in range(many)], placement, tmp_path)
    for block in range(1, 4):
        for index in range(many):
            batch = held.get(index)
            torch.cuda._sleep(20_000_000)
            batch = batch + 1
            held.put(index, batch)
            del batch
            torch.full(shape, torch.nan, device=cuda)  # in the memory that was freed
        if expected:
            held.prefetch_all()
        torch.cuda._sleep(20_000_000)
        found = [held.get(index).unique().tolist() for index in range(many)]
        assert found == [[block]] * many


@pytest.mark.gpu
def test_states_beside_a_gpu_are_pinned():
    held = Activations(batches(torch.device("cuda")), "host")
    assert all(room.is_pinned() for room in held._buffers)
