"""Which inputs each expert of a layer sees: rows sorted by expert, read by index and never copied for each expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The tokens of one batch, sorted by the expert that they go to.

    A pair is one token that goes to one expert; a token makes up to `top_k` pairs. Pairs that go to no expert (their
    index is outside 0 ... num_experts - 1, which transformers uses to leave a token out) are not part of it.

    Attributes:
        pairs: int64 [num_pairs], token * top_k + choice, sorted by expert, those of one expert in the order of tokens.
        ends: the number of pairs of all experts before each expert; num_experts + 1 numbers, the last is num_pairs.
        bounds: `ends` on the device, int64 [num_experts + 1].
        num_tokens: tokens of the batch.
        top_k: choices of each token.
    """

    pairs: Tensor
    ends: Sequence[int]
    bounds: Tensor
    num_tokens: int
    top_k: int

    @property
    def num_experts(self) -> int:
        """The experts of the layer."""
        return len(self.ends) - 1

    @property
    def num_pairs(self) -> int:
        """The pairs of all experts."""
        return self.ends[-1]

    def tokens(self) -> Tensor:
        """Return the token of each pair, int64 [num_pairs]."""
        return self.pairs // self.top_k

    def shares(self) -> Tensor | None:
        """Return by how much of its choices each token reaches experts, float32 [num_tokens]; None: all by all."""
        if self.num_pairs == self.num_tokens * self.top_k:
            return None
        return torch.bincount(self.tokens(), minlength=self.num_tokens) / self.top_k


def route(top_k_index: Tensor, num_experts: int) -> Routing:
    """Sort a batch's tokens by expert. It waits for a GPU once: the numbers of tokens must be known on the host.

    Args:
        top_k_index: integers [num_tokens, top_k], the experts of each token.
        num_experts: of the layer.

    Raises:
        QuantizeError: the indices are no table of integers.
    """
    if top_k_index.ndim != 2 or top_k_index.is_floating_point() or top_k_index.dtype == torch.bool:
        raise QuantizeError(
            "the routing is not understood",
            why=f"expert indices are {top_k_index.dtype} {list(top_k_index.shape)}, not integers [tokens, choices]",
        )
    expert, pairs = torch.sort(top_k_index.reshape(-1), stable=True)
    edges = torch.arange(num_experts + 1, dtype=expert.dtype, device=expert.device)
    bounds = torch.searchsorted(expert, edges)
    begin, *ends = bounds.tolist()
    num_tokens, top_k = top_k_index.shape
    return Routing(
        pairs=pairs[begin : ends[-1]],
        ends=(0, *(end - begin for end in ends)),
        bounds=bounds - begin,
        num_tokens=num_tokens,
        top_k=top_k,
    )


@dataclass(frozen=True, kw_only=True)
class RoutedInputs:
    """The inputs of one batch to the experts' linears.

    Attributes:
        rows: [num_rows, in_features], rows dense: one per token, or one per pair in the routing's order.
        routing: which expert sees which.
        per_token: `rows` has one row per token, which several experts see; else one per pair.
    """

    rows: Tensor
    routing: Routing
    per_token: bool

    def row_numbers(self) -> Tensor | None:
        """Return the row of each pair, int64 [num_pairs]; None: rows are in the order of pairs."""
        return self.routing.tokens() if self.per_token else None

    def of_expert(self, expert: int) -> Tensor:
        """Return the inputs of one expert, [tokens of the expert, in_features]."""
        part = slice(self.routing.ends[expert], self.routing.ends[expert + 1])
        return self.rows[self.routing.pairs[part] // self.routing.top_k] if self.per_token else self.rows[part]

    def once(self) -> Tensor:
        """Return all inputs that reach an expert, each as often as it does, divided by a factor common to all.

        A token that reaches fewer experts than the others is scaled by the root of its share: x x^T by the share.
        """
        shares = self.routing.shares() if self.per_token else None
        return self.rows if shares is None else self.rows * shares.sqrt()[:, None].to(self.rows.dtype)

    @property
    def weight(self) -> float:
        """How many inputs `once` stands for."""
        return self.routing.num_pairs / self.routing.top_k if self.per_token else float(self.routing.num_pairs)
