"""A Cholesky factorisation for matrices so large that a GPU's own library keeps most of the GPU waiting.

cuSOLVER cuts a wide matrix into a dozen diagonal blocks and factors each on a corner of the GPU, 1.8 ms for one of 1024
columns, though it does one alone in 0.4 ms. Here it is given such blocks one by one, and everything else is float16
products on the tensor cores: 23 ms instead of 31 for 13824 columns on an H100.
"""

import torch
from torch import Tensor

from packager.quantize.gptq.split_float16 import add_product, split

# Beyond, it pays: an H100 takes 10 ms either way for 8192 columns.
_DIRECT = 8192
_PANEL = 768
# Rows of what is left that are updated by one product.
_ROWS = 1152


def cholesky(A: Tensor) -> tuple[Tensor, Tensor]:
    """Factor A = L L^T.

    Args:
        A: float32 [n, n], symmetric; only its lower triangle is read, and it may be overwritten.

    Returns:
        L, lower triangular, and whether it is one, bool [] on the device: A is positive definite and finite.
    """
    return in_panels(A, _PANEL) if A.is_cuda and A.shape[0] > _DIRECT else by_library(A)


def by_library(A: Tensor) -> tuple[Tensor, Tensor]:
    """See `cholesky`; succeeds with less damping than `in_panels` needs where A is all but singular."""
    L, failed = torch.linalg.cholesky_ex(A)
    return L, (failed == 0) & L.diagonal().isfinite().all()


def in_panels(A: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """See `cholesky`; after each panel of columns what is right of it is updated, in A itself.

    The panel's part of L is split into float16 numbers of 22 bits (`halves`), rows scaled by powers of two so that the
    diagonal of A is about 1. Splitting costs a sum of such products at most 2^-21 of sqrt(A_ii A_jj), of any length;
    adding it up on tensor cores, which cut off where they should round, 7e-6 on an H100.
    """
    n = A.shape[0]
    scale = torch.exp2(-torch.ceil(torch.log2(A.diagonal()) / 2))
    A.mul_(scale[:, None]).mul_(scale)
    fine = torch.ones((), dtype=torch.bool, device=A.device)
    identity = torch.eye(min(width, n), dtype=A.dtype, device=A.device)
    for begin in range(0, n, width):
        end = min(begin + width, n)
        here, below = slice(begin, end), slice(end, n)
        L, failed = torch.linalg.cholesky_ex(A[here, here])
        fine &= failed == 0
        A[here, here] = L
        A[here, below] = 0
        if end < n:
            inverse = torch.linalg.solve_triangular(L, identity, upper=False)
            A[below, here] = A[below, here] @ inverse.T
            _subtract_square(A[below, below], A[below, here])
    A.div_(scale[:, None])
    return A, fine & A.diagonal().isfinite().all()


def _subtract_square(rest: Tensor, panel: Tensor) -> None:
    """Subtract panel panel^T from the lower triangle of `rest`, which may write right of its diagonal too."""
    high, low = split(panel)
    # (high + low)(high + low)^T without low low^T, as one product: what is left is read and written once.
    left, right = torch.cat((high, high, low), 1).neg_(), torch.cat((high, low, high), 1)
    for begin in range(0, rest.shape[0], _ROWS):
        end = min(begin + _ROWS, rest.shape[0])
        add_product(rest[begin:end, :end], left[begin:end], right[:end].T)
