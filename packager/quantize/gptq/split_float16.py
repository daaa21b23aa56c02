"""float32 matrices as sums of two float16 ones, 22 bits in all, and products of their parts.

float32 products are what GPTQ needs and what a GPU is slow at: three float16 products on its tensor cores, added in
float32, take a quarter of the time.
"""

import torch
from torch import Tensor


def split(
    x: Tensor, rows: Tensor | None = None, columns: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return float16 `high` and `low` with high + low = x, its rows and columns multiplied by powers of two.

    Args:
        x: float32 [n, m].
        rows: float32 [n], what each row is multiplied by; None for 1.
        columns: float32 [m], likewise.
        out: float16 [n, m] each, rows dense, to be filled in; None makes them.
    """
    high, low = out or (torch.empty(x.shape, dtype=torch.float16, device=x.device) for _ in range(2))
    if x.is_cuda:
        from packager.quantize.gptq import kernels

        kernels.split(x, rows, columns, high, low)
        return high, low
    scaled = x if rows is None else x * rows[:, None]
    scaled = scaled if columns is None else scaled * columns
    high.copy_(scaled)
    low.copy_(scaled - high)
    return high, low


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a b, float32, of float16 matrices; `total` is overwritten, None stands for 0."""
    if not a.is_cuda:
        product = a.float() @ b.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
