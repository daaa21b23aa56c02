"""Estimate the memory of tuning a block (effort: high). Arithmetic only: no torch."""

from packager.model.architecture import Architecture, BlockKind
from packager.model.batches import ELEMENT_BYTES, TRACED_BYTES

# Per weight: the offset and two moments in float32, the integers at the start, the best and those being compared, and
# one byte for everything that groups have. Beside them: the weight that the block computes with, and its gradient.
_PARAMETER_BYTES = 16
# Per weight of one linear, while it takes a step: some ten float32 tensors of its size.
_STEP_BYTES = 40
# Scores of the backward pass of attention that are held at once, see `repeatable_attention`, and the bytes of each.
SCORES_AT_ONCE = 2**24
_SCORE_BYTES = 16
# Values of a token that a backward pass needs, in widths of the hidden states: two norms with float32 copies, and sums.
_KEPT_WIDTHS = 16


def tuning_bytes(architecture: Architecture, device_type: str, batch_tokens: int, seq_len: int) -> int:
    """Return the bytes of tuning the largest block, without its original weights and its inputs and targets.

    Args:
        architecture: of the base model.
        device_type: "cpu" or "cuda", where it is tuned.
        batch_tokens: of a batch.
        seq_len: tokens of a row.
    """
    heads = architecture.text_config.get("num_attention_heads")
    scores = SCORES_AT_ONCE
    if isinstance(heads, int):
        scores = min(scores, batch_tokens * seq_len * heads)
    attention = _SCORE_BYTES * max(scores, seq_len**2)
    kinds = (
        _kind_bytes(kind, architecture.hidden_size, device_type, batch_tokens, seq_len) for kind in architecture.kinds
    )
    return attention + max(kinds)


def _kind_bytes(kind: BlockKind, hidden_size: int, device_type: str, batch_tokens: int, seq_len: int) -> int:
    element = ELEMENT_BYTES[device_type]
    shapes = [(group.in_features, linear.out_features) for group in kind.groups for linear in group.linears]
    weights = [in_features * out_features for in_features, out_features in shapes]
    parameters = (_PARAMETER_BYTES + 2 * element) * sum(weights) + _STEP_BYTES * max(weights, default=0)
    # Each linear's input and output, and what lies between: an activation function, its product, a rotation.
    widths = _KEPT_WIDTHS * hidden_size + 2 * sum(group.in_features + group.out_features for group in kind.groups)
    pairs = 4 * seq_len * kind.peak_bytes_per_pair * element // TRACED_BYTES
    return parameters + batch_tokens * (element * widths + pairs)
