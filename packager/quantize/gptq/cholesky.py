"""Cholesky factorisations panel by panel, of a batch of matrices or of a wide one, and solving with a factor.

On CUDA the library factors a batch of wide matrices one after the other, or one per multiprocessor: too small pieces
of work for the GPU. `blocked_cholesky` makes every step one call for the whole batch.

The library computes one wide matrix, and solves with its factor, without tensor cores. `split_cholesky` leaves it the
diagonal blocks and the triangular solves, `split_solve` the inverses of diagonal blocks. Both make the products, most
of the arithmetic, of float16 parts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from packager.quantize.gptq.tensor_ops import TensorOps

_PANEL = 128
# From this width on, `split_cholesky` is used on CUDA. With at least 6 panels, what it holds beside A takes no more
# than A: 24 bytes for each row and column of a panel. `packager.quantize.solving_memory` plans two of its size.
SPLIT_WIDTH = 11008
SPLIT_PANEL = 256
_UPDATE_COLUMNS = 2048  # of one product; right of the diagonal it computes what nothing reads
_HEADROOM = 2.0**9  # bounds the float16 parts: entries far below the largest of their row keep their bits, too
# Columns of a panel of a matrix that is damped by the mean of its diagonal: 256 take a GPU as long, and the host twice.
DAMPED_PANEL = 512
_SOLVE_COLUMNS = 4096  # of a product in `split_solve`
# The norm of a row that is solved for; its solutions exceed it by up to 2 sqrt(n + 1), and float16 ends at 2^16.
_SOLVE_NORM = 2.0**7
_SMALLEST_NORM = 2.0**-60  # of such a row: keeps the factor of a row of zeros finite


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
    left of them, a sum would have up to n. It also stores the float16 parts of two
    panels only.

    The next panel's columns are updated first. It is factored, by small pieces of work one after the other, beside the
    updates of the columns right of it: on a GPU, on another stream.

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
    beside = _Beside(A.device)
    buffers = [torch.empty(max(n - panel, 0), 4, panel, dtype=torch.float16, device=A.device) for _ in range(2)]
    failed = torch.zeros((), dtype=torch.bool, device=A.device)
    for number, begin in enumerate(range(0, n, panel)):
        end = min(begin + panel, n)
        L, failed_at = torch.linalg.cholesky_ex(A[begin:end, begin:end])
        failed |= failed_at != 0
        torch.mul(L, scale[begin:end, None], out=A[begin:end, begin:end])
        if end < n:
            rows = rows_below(L, A[end:, begin:end])
            torch.mul(rows, scale[end:, None], out=A[end:, begin:end])
            left, right = _parts_of(rows, buffers[number % 2][: n - end], ops)
            beside.wait()  # for the products of the panel before, which are subtracted from the next panel too
            _subtract_columns(A[end:, end:], left, right, range(panel), ops)
            with beside.work():
                _subtract_columns(A[end:, end:], left, right, range(panel, n - end), ops)
    beside.wait()
    return A.tril_(), failed


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    """Return one stream for each GPU: cuBLAS keeps a workspace of 32 MiB for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _Beside:
    """Work that a GPU does on another stream; without a GPU, on the current one like all work."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _stream_beside(device) if device.type == "cuda" else None

    def work(self) -> AbstractContextManager[Any]:
        """Return a context whose work comes after what the current stream was given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Let the current stream continue when this work is done."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


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


def _parts_of(x: Tensor, parts: Tensor, ops: TensorOps) -> tuple[Tensor, Tensor]:
    """Return the factors of x x^T but for the product of the two low parts of x: [m, 3 panel] and [3 panel, m].

    `parts` becomes [high, low, high, high]. Its first three times its last three are the three products in one sum,
    which reads and writes the matrix once. The small products come first: added to the large one, each would be cut off
    at its last bit.

    Args:
        x: float32 [m, panel].
        parts: float16 [m, 4, panel], overwritten.
        ops: splits.
    """
    high, low = parts[:, 0], parts[:, 1]
    ops.split(x, None, None, (high, low))
    parts[:, 2:] = high[:, None]
    return parts[:, :3].flatten(1), parts[:, 1:].flatten(1).T


def _subtract_columns(total: Tensor, left: Tensor, right: Tensor, columns: range, ops: TensorOps) -> None:
    """Subtract columns of a product from those of a symmetric matrix, on and below the diagonal.

    Args:
        total: float32 [m, m]; right of the diagonal, some of it is overwritten.
        left: float16 [m, k].
        right: float16 [k, m].
        columns: which.
        ops: multiplies.
    """
    for begin in range(columns.start, columns.stop, _UPDATE_COLUMNS):
        some = slice(begin, min(begin + _UPDATE_COLUMNS, columns.stop))
        ops.add_product(total[begin:, some], left[begin:], right[:, some], alpha=-1)


def split_solve(P: Tensor, L: Tensor, ops: TensorOps, panel: int = DAMPED_PANEL) -> Tensor:
    """Overwrite P by P A^-1, A = L L^T, with products of float16 parts: X L^T = P, then R L = X.

    Rows of L are divided by powers of two near their norms, columns of P likewise, and each row of P by one near its
    own. For a matrix with `CORRECTION_DAMPING`, whose A_ii are at most n + 1 times its least eigenvalue, no part then
    exceeds float16 for n up to 65,000.

    The error: R is exact for A + E, |E| <= c u |L| |L^T| with u = 2^-22 of two parts. Hence with that damping lambda,
    where trace(A) = 2 n lambda and |A^-1| <= 1 / lambda, the error of a row of R is within 2 n c u of its norm, and
    with parts of 11 bits alone it could be as large as R.

    Args:
        P: float32 [k, n], rows dense; a row is a right-hand side.
        L: lower triangular float32 [n, n]; its rows are scaled in place.
        ops: splits and multiplies.
        panel: columns of a diagonal block, whose inverse is a factor of its own: for a matrix damped that much it is
            exact enough.
    """
    n = L.shape[0]
    size = torch.exp2(torch.ceil(torch.log2(torch.linalg.vector_norm(L, dim=1))))
    L.div_(size[:, None])
    P.div_(size)
    blocks = [(begin, min(begin + panel, n)) for begin in range(0, n, panel)]
    inverses = [(slice(*block), each) for block, each in zip(blocks, inverse_blocks(L.mT, blocks), strict=True)]
    backwards = [(columns, inverse.mT) for columns, inverse in reversed(inverses)]
    for triangle, panels in ((L, inverses), (L.mT, backwards)):
        norms = torch.linalg.vector_norm(P, dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
        scale = torch.exp2(torch.floor(torch.log2(_SOLVE_NORM / norms)))
        _solve_columns(P.mul_(scale), triangle, panels, ops)
        P.div_(scale)
    return P.div_(size)


def _solve_columns(P: Tensor, T: Tensor, panels: Sequence[tuple[slice, Tensor]], ops: TensorOps) -> None:
    """Overwrite columns of P by those of X, X T^T = P, first those of half of the panels: a product then has many.

    Args:
        P: float32 [k, n].
        T: triangular float32 [n, n].
        panels: columns in the order in which they are solved, each with the inverse of T^T's diagonal block.
        ops: splits and multiplies.
    """
    if len(panels) == 1:
        ((columns, inverse),) = panels
        P[:, columns] = ops.add_product(None, P[:, columns], inverse)
        return
    first, second = panels[: len(panels) // 2], panels[len(panels) // 2 :]
    _solve_columns(P, T, first, ops)
    solved, rest = _span(first), _span(second)
    for begin in range(solved.start, solved.stop, _SOLVE_COLUMNS):
        some = slice(begin, min(begin + _SOLVE_COLUMNS, solved.stop))
        _subtract_product(P[:, rest], P[:, some], T[rest, some], ops)
    _solve_columns(P, T, second, ops)


def _span(panels: Sequence[tuple[slice, Tensor]]) -> slice:
    return slice(min(columns.start for columns, _ in panels), max(columns.stop for columns, _ in panels))


def _subtract_product(total: Tensor, x: Tensor, y: Tensor, ops: TensorOps) -> None:
    """Subtract x y^T, but for the product of the two low parts: x is high, low, high and y is low, high, high.

    `_parts_of` says why it is one sum in this order.

    Args:
        total: float32 [k, m].
        x: float32 [k, columns].
        y: float32 [m, columns].
        ops: splits and multiplies.
    """
    left, right = (torch.empty(len(each), 3, x.shape[1], dtype=torch.float16, device=x.device) for each in (x, y))
    ops.split(x, None, None, (left[:, 0], left[:, 1]))
    ops.split(y, None, None, (right[:, 1], right[:, 0]))
    left[:, 2], right[:, 2] = left[:, 0], right[:, 1]
    ops.add_product(total, left.flatten(1), right.flatten(1).T, alpha=-1)


def inverse_blocks(U: Tensor, blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the inverses of U's diagonal blocks, upper triangular; blocks of one width are inverted in one call."""
    inverses: dict[int, Tensor] = {}
    for width in {end - begin for begin, end in blocks}:
        chosen = [number for number, (begin, end) in enumerate(blocks) if end - begin == width]
        squares = torch.stack([U[..., slice(*blocks[number]), slice(*blocks[number])] for number in chosen])
        identity = torch.eye(width, dtype=U.dtype, device=U.device).expand_as(squares)
        inverses |= dict(
            zip(chosen, torch.linalg.solve_triangular(squares, identity, upper=True).contiguous(), strict=True)
        )
    return [inverses[number] for number in range(len(blocks))]
