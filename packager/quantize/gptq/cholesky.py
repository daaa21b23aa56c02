"""Cholesky factorisations panel by panel: of a batch of matrices, and of one wide matrix on the tensor cores.

On CUDA the library factors a batch of wide matrices one after the other, or one per multiprocessor: too small pieces
of work for the GPU. `blocked_cholesky` makes every step one call for the whole batch.

The library computes one wide matrix without tensor cores. `split_cholesky` leaves it the diagonal blocks and the
triangular solves, and makes the products, most of the arithmetic, of float16 parts.
"""

import torch
from torch import Tensor

from packager.quantize.gptq.tensor_ops import TensorOps

_PANEL = 128
# From this width on, `split_cholesky` is used on CUDA. With at least 4 panels, what it holds beside A takes no more
# than A: 16 bytes for each row and column of a panel. `packager.quantize.memory` plans two matrices of A's size for it.
SPLIT_WIDTH = 11008
SPLIT_PANEL = 256
_UPDATE_COLUMNS = 2048  # of one product; right of the diagonal it computes what nothing reads
_HEADROOM = 2.0**9  # bounds the float16 parts: entries far below the largest of their row keep their bits, too


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


def split_cholesky(A: Tensor, ops: TensorOps, panel: int = SPLIT_PANEL) -> tuple[Tensor, Tensor]:
    """Overwrite a symmetric matrix by its lower triangular factor L, A = L L^T, with products of float16 parts.

    Rows and columns of A are first divided by powers of two near the square roots of its diagonal, which bound the rows
    of L. When the columns of a panel are known, their product is subtracted from all of A that is right of them.

    Tensor cores cut off where they should round, so the error of a sum grows with its length. Hence this order, where a
    sum within the tensor cores has the columns of one panel: if a panel's own columns were updated last, by all columns
    left of them, a sum would have up to n. It also stores the float16 parts of one panel only.

    Args:
        A: float32 [n, n], rows dense.
        ops: splits and multiplies.
        panel: columns of a panel; the library factors its diagonal block.

    Returns:
        A, which is L now, and bool []: whether the matrix is not positive definite; L has no meaning then.
    """
    n = A.shape[0]
    scale = torch.exp2(torch.ceil(torch.log2(A.diagonal().sqrt()))) / _HEADROOM
    A.div_(scale[:, None]).div_(scale)
    parts = torch.empty(max(n - panel, 0), 4, panel, dtype=torch.float16, device=A.device)
    failed = torch.zeros((), dtype=torch.bool, device=A.device)
    for begin in range(0, n, panel):
        end = min(begin + panel, n)
        L, failed_at = torch.linalg.cholesky_ex(A[begin:end, begin:end])
        failed |= failed_at != 0
        torch.mul(L, scale[begin:end, None], out=A[begin:end, begin:end])
        if end < n:
            rows = rows_below(L, A[end:, begin:end])
            torch.mul(rows, scale[end:, None], out=A[end:, begin:end])
            _subtract_square(A[end:, end:], rows, parts[: n - end], ops)
    return A.tril_(), failed


def rows_below(L: Tensor, A: Tensor) -> Tensor:
    """Return A L^-T, the rows of the factor below a diagonal block, [m, panel], rows dense.

    Not the product with the inverse of L: where a block is nearly singular it was so inexact that the rest of A was not
    positive definite any more.

    Args:
        L: the block's factor, float32 [panel, panel].
        A: float32 [m, panel].
    """
    transposed: Tensor = torch.linalg.solve_triangular(L, A.mT, upper=False)
    return transposed.mT


def _subtract_square(total: Tensor, x: Tensor, parts: Tensor, ops: TensorOps) -> None:
    """Subtract x x^T from the lower triangle of a matrix, but for the product of the two low parts of x.

    `parts` becomes [high, low, high, high]. Its first three times its last three are the three products in one sum,
    which reads and writes the matrix once. The small products come first: added to the large one, each would be cut off
    at its last bit.

    Args:
        total: float32 [m, m]; right of the diagonal, some of it is overwritten.
        x: float32 [m, panel].
        parts: float16 [m, 4, panel], overwritten.
        ops: splits and multiplies.
    """
    high, low = parts[:, 0], parts[:, 1]
    ops.split(x, None, None, (high, low))
    parts[:, 2:] = high[:, None]
    left, right = parts[:, :3].flatten(1), parts[:, 1:].flatten(1).T
    for begin in range(0, x.shape[0], _UPDATE_COLUMNS):
        columns = slice(begin, begin + _UPDATE_COLUMNS)
        ops.add_product(total[begin:, columns], left[begin:], right[:, columns], alpha=-1)
