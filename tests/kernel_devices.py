"""The devices on which tests run Triton's kernels: a GPU, and the CPU in Triton's interpreter."""

import pytest
import torch

KERNEL_DEVICES = [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]


def kernel_device(name: str) -> torch.device:
    """Return a device of `KERNEL_DEVICES`; without the interpreter the test is skipped on the CPU."""
    import triton

    if name == "cuda":
        assert torch.cuda.is_available(), "this test needs a CUDA GPU"
    elif not triton.knobs.runtime.interpret:
        pytest.skip("kernels take CPU tensors in the interpreter only, which -m gpu leaves out")
    return torch.device(name)
