"""Copies of host memory to a device, piece by piece through buffers."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from packager.model.staged_copies import StagedCopies


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


@pytest.mark.parametrize("shape", [(), (0, 4), (8,), (3, 50), (64, 64)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.int32])
def test_a_copy_has_the_values_in_the_dtype_that_is_asked_for(
    device: torch.device, shape: tuple[int, ...], stored: torch.dtype
) -> None:
    tensor = (1000 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(stored)
    for dtype in (stored, torch.float16):
        found = StagedCopies(device, piece_bytes=64).copy(tensor, dtype)
        assert found.device.type == device.type
        assert torch.equal(found.cpu(), tensor.to(dtype))
        assert found.shape == tensor.shape


def test_a_copy_shares_no_memory_and_takes_transposed_tensors(device: torch.device) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    found = StagedCopies(device, piece_bytes=16).copy(tensor, torch.float32)
    expected = tensor.clone()
    tensor.zero_()
    assert torch.equal(found.cpu(), expected)


def test_threads_copy_at_once_and_leave_their_buffers_to_later_ones(device: torch.device) -> None:
    staged = StagedCopies(device, piece_bytes=256)
    tensors = [torch.full((100, 30), float(number)) for number in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensor: staged.copy(tensor, torch.float32), tensors))
    assert all(torch.equal(copy.cpu(), tensor) for copy, tensor in zip(found, tensors, strict=True))
    assert 1 <= len(staged._free) <= 4
    assert all(buffer.is_pinned() == (device.type == "cuda") for buffer in staged._free)


@pytest.mark.gpu
def test_a_tensor_of_the_device_is_not_copied() -> None:
    tensor = torch.ones(4, device="cuda")
    assert StagedCopies(tensor.device).copy(tensor, torch.float32) is tensor
