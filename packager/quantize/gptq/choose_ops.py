"""The one choice between the torch operations and the Triton kernels."""

import torch

from packager.quantize.gptq.tensor_ops import TensorOps
from packager.quantize.gptq.torch_ops import TorchOps


def ops_for(device: torch.device) -> TensorOps:
    """Return Triton kernels and tensor-core products on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TorchOps()
    from packager.quantize.gptq.triton_ops import TritonOps

    return TritonOps()
