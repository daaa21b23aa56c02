"""Attention whose gradients are the same in each run.

The backward pass of torch's fused attention on CUDA adds with atomic operations, in another order in each run, unless a
switch of the whole process forbids it (`torch.use_deterministic_algorithms`); other threads quantize meanwhile. So the
forward pass is torch's, and the backward pass is written here: products, and a softmax computed again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from packager.quantize.tuning_memory import SCORES_AT_ONCE


class RepeatableAttention(TorchFunctionMode):
    """In the body, attention in this thread has gradients that are the same in each run."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replace torch's attention where gradients are recorded."""
        if func is scaled_dot_product_attention and torch.is_grad_enabled():
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attend as torch does: [rows, heads, tokens, head_dim], keys and values of as many heads or of fewer."""
    if dropout_p or query.dim() != 4 or (attn_mask is not None and attn_mask.requires_grad):
        raise NotImplementedError("attention with dropout, with a learned mask, or of other than four dimensions")
    result: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, attn_mask, is_causal, scale, enable_gqa
    )
    return result


class _Attention(torch.autograd.Function):
    """The forward pass of torch, and a backward pass of products."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool,
        scale: float | None, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(query, key, value)
        ctx.mask, ctx.is_causal = mask, is_causal
        ctx.scale = query.shape[-1] ** -0.5 if scale is None else scale
        result: Tensor = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        shared = query.shape[1] // key.shape[1]  # heads of queries for each head of keys
        masks = _mask(ctx.mask, ctx.is_causal, query, key)
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for rows, few in _parts(query.shape[0], key.shape[1], shared * query.shape[2] * key.shape[2]):
            many = slice(few.start * shared, few.stop * shared)
            mask = None if masks is None else masks[rows if masks.shape[0] > 1 else slice(None)]
            if mask is not None:
                mask = _grouped(mask[:, many], shared) if mask.shape[1] > 1 else mask[:, :, None]
            of_query, found[1][rows, few], found[2][rows, few] = _gradients(
                _grouped(query[rows, many], shared), _grouped(gradient[rows, many], shared), key[rows, few],
                value[rows, few], mask, ctx.scale,
            )  # fmt: skip
            found[0][rows, many] = of_query.flatten(1, 2)
        return *found, None, None, None, None


def _parts(rows: int, heads: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows with heads of keys whose scores are held at once: whole rows, or some heads of one row.

    Args:
        rows: of the batch.
        heads: of keys.
        scores: of each of them.
    """
    some_rows = max(1, SCORES_AT_ONCE // (heads * scores))
    some_heads = max(1, min(heads, SCORES_AT_ONCE // scores))
    for row in range(0, rows, some_rows):
        for head in range(0, heads, some_heads):
            yield slice(row, min(row + some_rows, rows)), slice(head, min(head + some_heads, heads))


def _grouped(x: Tensor, shared: int) -> Tensor:
    """Return [rows, heads, ...] as [rows, heads of keys, heads of queries for each, ...]."""
    return x.reshape(x.shape[0], -1, shared, *x.shape[2:])


def _mask(mask: Tensor | None, is_causal: bool, query: Tensor, key: Tensor) -> Tensor | None:
    """Return what is added to the scores, float32 [rows or 1, heads or 1, tokens, keys]."""
    if is_causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    return mask.float()[(None,) * (4 - mask.dim())]


def _gradients(
    query: Tensor, gradient: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by query, key and value.

    Args:
        query: [rows, heads of keys, heads of queries for each, tokens, head_dim].
        gradient: by the result, likewise.
        key: [rows, heads of keys, keys, head_dim].
        value: likewise.
        mask: added to the scores, broadcast to [.., .., .., tokens, keys].
        scale: of the scores.
    """
    key, value = key[:, :, None], value[:, :, None]
    scores = ((query * scale) @ key.mT).float()
    if mask is not None:
        scores += mask
    chances = scores.softmax(-1)
    del scores
    by_value = (chances.to(value.dtype).mT @ gradient).sum(2)
    by_chance = (gradient @ value.mT).float()
    by_chance -= (by_chance * chances).sum(-1, keepdim=True)
    by_score = by_chance.mul_(chances).mul_(scale).to(query.dtype)
    return by_score @ key, (by_score.mT @ query).sum(2), by_value
