"""An independent GPTQ in float64, from the paper's algorithm 1, one column at a time; slow and plain on purpose.

Where a value lies on the boundary between two roundings, the last bit of float32 decides, and through the error that
spreads everything after it becomes another, equally good solution. So the reference can also follow the decisions of
another solution, and measure how far each is from the one it would have taken itself in the same state.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from packager.quantize.gptq.solve import Solution

# What float32 justifies: a value before rounding has up to 2^bits steps and is off by a few units in its last place,
# each 2^-24 of it.
TIE = 2.0**-20
LOSS_TOLERANCE = 1e-3
SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
SHRINKS = [1 - step / 100 for step in range(41)]


@dataclass
class Reference:
    q: Tensor  # [in, out], original column order
    weight: Tensor  # float64 [in, out], the dequantized q
    g_idx: list[int]
    losses: Tensor  # [out]
    # How far the decisions that were followed are from the reference's own, 0 where they are the same:
    q_misses: Tensor  # [in, out], the value before rounding from the boundary to q's rounding, in steps of the grid
    grid_misses: Tensor  # [n_groups, out], the scale before rounding likewise, and the search's error, both relative


def gptq(
    weight: Tensor, H: Tensor, *, bits: int, group_size: int, sym: bool, act_order: str, damp: float,
    scale_search: bool | str = False, follow: Solution | None = None,
) -> Reference:  # fmt: skip
    """weight [in, out], H [in, in]."""
    n, out = weight.shape
    maxq = 2**bits - 1
    W, H = weight.double().clone(), H.double().clone()
    size = n if group_size == -1 else group_size
    for i in range(n):
        if H[i, i] == 0:
            H[i, i] = 1
            W[i] = 0
    order = solving_order(H.diagonal().tolist(), size, act_order)
    # Each group's columns as stored, but for full order, whose groups are cut in solving order.
    grouping = [position // size for position in range(n)] if act_order == "full" else [i // size for i in order]
    stored = W
    W, H = W[order], H[order][:, order]
    H += torch.eye(n, dtype=torch.float64) * damp * H.diagonal().mean()
    pivots, spread = eliminations(torch.linalg.inv(H))
    column_weight = 1 / pivots
    grids = Grids(-(-n // size), out, bits=bits, sym=sym, search=scale_search, follow=follow)
    if act_order == "static":
        column_weight_stored = torch.empty_like(column_weight)
        column_weight_stored[order] = column_weight
        for group, begin in enumerate(range(0, n, size)):
            grids.find(group, stored[begin : begin + size], column_weight_stored[begin : begin + size])
    q, weights, g_idx, losses = torch.zeros_like(W), torch.zeros_like(W), [0] * n, torch.zeros_like(W[0])
    misses = torch.zeros_like(W)
    for i in range(n):
        group = grouping[i]
        if act_order != "static" and group not in grouping[:i]:
            members = [position for position in range(n) if grouping[position] == group]
            grids.find(group, W[members], column_weight[members])
        scale, zero = grids.scales[group], grids.zeros[group]
        q[i] = torch.clamp(torch.round(W[i] / scale) + zero, 0, maxq)
        if follow is not None:
            q[i] = follow.q[order[i]].cpu().double()
            misses[i] = ((torch.clamp(W[i] / scale + zero, 0, maxq) - q[i]).abs() - 0.5).clamp(min=0)
        weights[i] = (q[i] - zero) * scale
        error = W[i] - weights[i]
        losses += error.square() / pivots[i] / 2
        W[i + 1 :] -= spread[i, i + 1 :, None] * error
        g_idx[order[i]] = group
    back = torch.argsort(torch.tensor(order))
    return Reference(
        q=q[back], weight=weights[back], g_idx=g_idx, losses=losses, q_misses=misses[back], grid_misses=grids.misses
    )


def solving_order(diagonal: list[float], size: int, act_order: str) -> list[int]:
    """The columns in the order in which they are quantized."""
    columns = list(range(len(diagonal)))
    if act_order == "none":
        return columns
    if act_order in ("full", "static"):
        return sorted(columns, key=lambda i: -diagonal[i])
    groups = [sorted(columns[begin : begin + size], key=lambda i: -diagonal[i]) for begin in columns[::size]]
    short = [groups.pop()] if len(groups[-1]) < size else []
    groups.sort(key=lambda group: -diagonal[group[0]])
    return [i for group in groups + short for i in group]


def eliminations(inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's way with the inverse Hessian itself, eliminating one variable at a time (no Cholesky).

    Returns each column's diagonal entry [in] at its turn, and what the later ones lose per error in it [in, in].
    """
    pivots, spread = inverse.diagonal().clone(), torch.zeros_like(inverse)
    for i in range(len(inverse)):
        pivots[i] = inverse[0, 0]
        spread[i, i + 1 :] = inverse[0, 1:] / inverse[0, 0]
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return pivots, spread


class Grids:
    """Scales and zeros by AutoGPTQ's rules, scales rounded to float16; or those that are followed."""

    def __init__(
        self, n_groups: int, out: int, *, bits: int, sym: bool, search: bool | str, follow: Solution | None
    ) -> None:
        self.bits, self.maxq, self.sym, self.search = bits, 2**bits - 1, sym, search
        self.scales, self.zeros, self.misses = (torch.zeros(n_groups, out, dtype=torch.float64) for _ in range(3))
        self.follow = follow

    def find(self, group: int, w: Tensor, column_weight: Tensor) -> None:
        """Decide for the columns w [columns, out] of a group."""
        least, sure, miss = (torch.full_like(w[0], torch.inf) for _ in range(3))
        for low, high, sign in self.ranges(w):
            scale, zero = self.grid(low, high, sign)
            error = self.error(w, column_weight, scale, zero)
            better = error < least
            self.scales[group] = torch.where(better, scale, self.scales[group])
            self.zeros[group] = torch.where(better, zero, self.zeros[group])
            least = torch.where(better, error, least)
            if self.follow is not None:
                sure = torch.minimum(sure, self.surely(w, column_weight, low, high, sign))
                taken = self.follow.scales[group].cpu().double(), self.follow.zeros[group].cpu().double()
                miss = torch.minimum(miss, self.miss(low, high, sign, *taken))
        if self.follow is not None:
            excess = (
                self.error(w, column_weight, *taken) / sure.clamp(min=1e-300) - 1
                if self.search
                else torch.zeros_like(miss)
            )
            self.scales[group], self.zeros[group] = taken
            self.misses[group] = torch.maximum(miss, excess)

    def ranges(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Each range that is tried, with the sign of its scale."""
        low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
        empty = (low == 0) & (high == 0)
        for shrink in SHRINKS if self.search else [1.0]:
            for sign in (1, -1) if self.search == "signed" else (1,):
                yield torch.where(empty, -1.0, low * shrink), torch.where(empty, 1.0, high * shrink), sign

    def exact_scale(self, low: Tensor, high: Tensor, sign: int) -> Tensor:
        """The scale before its rounding, as a positive number."""
        if sign < 0:  # -8 to 7 times a negative scale: eight steps above zero, and below as many as a positive one has
            above, below = high / 2 ** (self.bits - 1), -2 * low / self.maxq
            return torch.where(high > -low, above, below).clamp(min=SMALLEST_SCALE)
        span = 2 * torch.maximum(-low, high) if self.sym else high - low
        scale: Tensor = span / self.maxq
        return scale.clamp(min=SMALLEST_SCALE)

    def exact_scale_without_zero(self, high: Tensor) -> Tensor:
        scale: Tensor = high / (self.maxq - 1)
        return scale.clamp(min=SMALLEST_SCALE)

    def grid(self, low: Tensor, high: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
        scale = self.exact_scale(low, high, sign).half().double()
        if self.sym:
            return sign * scale, torch.full_like(scale, 2.0 ** (self.bits - 1))
        zero = torch.clamp(torch.round(-low / scale), 0, self.maxq)
        none = zero == 0  # v1 cannot store it
        above = self.exact_scale_without_zero(high).half().double()
        return torch.where(none, above, scale), torch.where(none, 1.0, zero)

    def surely(self, w: Tensor, column_weight: Tensor, low: Tensor, high: Tensor, sign: int) -> Tensor:
        """The error that float32, too, finds for a range, whichever way it rounds scale and zero where they tie."""
        ends = [(low * a, high * b) for a in (1 - TIE, 1, 1 + TIE) for b in (1 - TIE, 1, 1 + TIE)]
        return torch.stack([self.error(w, column_weight, *self.grid(*each, sign)) for each in ends]).amax(0)

    def error(self, w: Tensor, column_weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        q = torch.clamp(torch.round(w / scale) + zero, 0, self.maxq)
        return ((w - (q - zero) * scale).square() * column_weight[:, None]).sum(0)

    def miss(self, low: Tensor, high: Tensor, sign: int, scale: Tensor, zero: Tensor) -> Tensor:
        """How far a grid is from being the one of a range; 0 if it is."""
        exact = self.exact_scale(low, high, sign)
        if self.sym:
            other = torch.where(zero == 2 ** (self.bits - 1), 0.0, torch.inf)
            return torch.where(scale * sign > 0, torch.maximum(scale_miss(exact, scale * sign), other), torch.inf)
        zero_miss = ((torch.clamp(-low / scale, 0, self.maxq) - zero).abs() - 0.5).clamp(min=0)
        within = torch.maximum(scale_miss(exact, scale), zero_miss)
        no_zero_miss = (-low / exact.half().double() - 0.5).clamp(min=0)
        above = torch.maximum(scale_miss(self.exact_scale_without_zero(high), scale), no_zero_miss)
        return torch.where(zero == 1, torch.minimum(within, above), within)


def scale_miss(exact: Tensor, scale: Tensor) -> Tensor:
    """By how much, relatively, a scale would have to differ to be rounded to this float16."""
    half = scale.half().numpy()
    below, above = (torch.from_numpy(np.nextafter(half, np.float16(end)).astype(np.float64)) for end in (0, np.inf))
    lower, upper = (below + scale) / 2, (scale + above) / 2
    return torch.maximum(lower - exact, exact - upper).clamp(min=0) / exact


def assert_agrees(
    found: Solution, weight: Tensor, H: Tensor, *, bits: int, group_size: int, sym: bool, act_order: str,
    damp: float = 0.01, scale_search: bool | str = False, tie: float = TIE,
) -> Reference:  # fmt: skip
    """Assert that every q, scale and zero is the reference's but for ties, which are few, and the losses likewise.

    A decision may differ only where the reference's own value lies within `tie` x 2^bits of the boundary; it is then
    adopted by the reference, which judges the next decision by its consequences.
    """
    expected = gptq(
        weight.cpu(), H.cpu(), bits=bits, group_size=group_size, sym=sym, act_order=act_order, damp=damp,
        scale_search=scale_search, follow=found,
    )  # fmt: skip
    assert found.g_idx.tolist() == expected.g_idx
    misses = {"q": expected.q_misses, "grid": expected.grid_misses}
    furthest = {name: float(miss.max()) for name, miss in misses.items()}
    assert max(furthest.values()) <= tie * 2**bits, furthest
    assert (expected.q_misses > 0).double().mean() <= 1e-3
    assert torch.equal(found.q.cpu().double(), expected.q)
    assert torch.allclose(found.dequantized().T.cpu().double(), expected.weight, rtol=1e-6, atol=0)
    assert torch.allclose(found.losses.cpu().double(), expected.losses, rtol=LOSS_TOLERANCE, atol=0)
    return expected
