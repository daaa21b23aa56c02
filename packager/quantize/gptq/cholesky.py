"""The Cholesky factorisation of many matrices at once, panel by panel, from products of whole batches.

On CUDA the library factors a batch of wide matrices one after the other, or one per multiprocessor: too small pieces
of work for the GPU. Here every step is one call for the whole batch.
"""

import torch
from torch import Tensor

_PANEL = 128


def blocked_cholesky(A: Tensor, panel: int = _PANEL) -> tuple[Tensor, Tensor]:
    """Overwrite symmetric matrices by their lower triangular factors L, A = L L^T, all in float32.

    Each panel of columns first loses the products of the columns left of it, then its diagonal block is factored by
    the library, then the rows below are L[>, B] = A[>, B] L[B, B]^-T.

    Args:
        A: float32 [batch, n, n]; only the lower triangle is read.
        panel: columns of a panel.

    Returns:
        A, which is L now, and bool [batch]: whether a matrix is not positive definite; its L has no meaning then.
    """
    n = A.shape[-1]
    failed = torch.zeros(A.shape[0], dtype=torch.bool, device=A.device)
    for begin in range(0, n, panel):
        end = min(begin + panel, n)
        if begin:
            A[:, begin:, begin:end].baddbmm_(A[:, begin:, :begin], A[:, begin:end, :begin].mT, alpha=-1)
        L, failed_at = torch.linalg.cholesky_ex(A[:, begin:end, begin:end])
        A[:, begin:end, begin:end] = L
        failed |= failed_at != 0
        if end < n:
            below = torch.linalg.solve_triangular(L, A[:, end:, begin:end].mT, upper=False)
            A[:, end:, begin:end] = below.mT
    return A.tril_(), failed
