"""An independent GPTQ in float64, from the paper's algorithm 1, one column at a time; slow and plain on purpose."""

from dataclasses import dataclass

import torch


@dataclass
class Reference:
    q: torch.Tensor  # [in, out], original column order
    weight: torch.Tensor  # float64 [in, out], what q stands for
    g_idx: list[int]
    losses: torch.Tensor  # [out]


def grid(group: torch.Tensor, bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros of a group [columns, out], by AutoGPTQ's rules, scales rounded to float16."""
    maxq = 2**bits - 1
    low, high = group.min(0).values.clamp(max=0), group.max(0).values.clamp(min=0)
    scales, zeros = [], []
    for lowest, highest in zip(low.tolist(), high.tolist(), strict=True):
        lo, hi = (lowest, highest) if lowest or highest else (-1.0, 1.0)
        if sym:
            scale, zero = 2 * max(-lo, hi) / maxq, 2 ** (bits - 1)
        else:
            scale = (hi - lo) / maxq
            zero = None
        scale = torch.tensor(scale).to(torch.float16).double().item()
        if zero is None:
            zero = min(max(round(-lo / scale), 0), maxq)
            if zero == 0:  # v1 cannot store it
                zero, scale = 1, torch.tensor(hi / (maxq - 1)).to(torch.float16).double().item()
        scales.append(scale)
        zeros.append(zero)
    return torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros, dtype=torch.float64)


def gptq(
    weight: torch.Tensor, H: torch.Tensor, *, bits: int, group_size: int, sym: bool, desc_act: bool, damp: float,
    static_groups: bool = False,
) -> Reference:  # fmt: skip
    """weight [in, out], H [in, in]."""
    n = H.shape[0]
    W, H = weight.double().clone(), H.double().clone()
    size = n if group_size == -1 else group_size
    for i in range(n):
        if H[i, i] == 0:
            H[i, i] = 1
            W[i] = 0
    order = sorted(range(n), key=lambda i: -H[i, i].item()) if desc_act else list(range(n))
    static = [grid(W[i : i + size], bits, sym) for i in range(0, n, size)] if static_groups else []
    W, H = W[order], H[order][:, order]
    H += torch.eye(n, dtype=torch.float64) * damp * H.diagonal().mean()
    inverse = torch.linalg.inv(H)
    q, weights, g_idx, losses = torch.zeros_like(W), torch.zeros_like(W), [0] * n, torch.zeros_like(W[0])
    for i in range(n):
        if static_groups:
            group = order[i] // size
            scale, zero = static[group]
        else:
            group = i // size
            if i % size == 0:
                scale, zero = grid(W[i : i + size], bits, sym)
        q[i] = torch.clamp(torch.round(W[i] / scale) + zero, 0, 2**bits - 1)
        weights[i] = (q[i] - zero) * scale
        # The paper's update with the inverse Hessian itself, eliminating one variable at a time (no Cholesky).
        error = (W[i] - weights[i]) / inverse[i, i]
        losses += error * (W[i] - weights[i]) / 2
        W[i + 1 :] -= inverse[i + 1 :, i, None] * error
        inverse = inverse - inverse[:, i, None] * inverse[i, None, :] / inverse[i, i]
        g_idx[order[i]] = group
    back = [order.index(i) for i in range(n)]
    return Reference(q=q[back], weight=weights[back], g_idx=g_idx, losses=losses)
