"""Estimate the memory of evaluation, and choose how many tokens' logits exist at once. Arithmetic only: no torch."""

from dataclasses import dataclass

from packager.model.architecture import Architecture
from packager.model.batches import (
    BLOCK_READERS,
    DEQUANTIZED_AT_ONCE,
    DEQUANTIZING_BYTES,
    ELEMENT_BYTES,
    TOKENS_PER_BATCH,
    WEIGHT_COPIES,
    converted_bytes,
    embedding_bytes,
    rows_per_batch,
    running_bytes,
)

# Bytes of one float64 tensor [tokens, vocab]. Its size does not change the time: 110 tokens of a vocabulary of 151,936
# are enough to keep a GPU busy.
PIECE_BYTES = 128 * 2**20
# A model's own forward makes a mask [tokens, tokens] for a piece.
_MAX_PIECE_TOKENS = 1024
# Float64 tensors [tokens, vocab] that exist at once: the base model's log-probabilities, the quantized model's, and the
# exponentials that they are computed with.
_PIECES = 3


@dataclass(frozen=True, kw_only=True)
class EvaluationMemory:
    """The estimated peak of evaluation, without what Python, torch and CUDA take themselves.

    Attributes:
        device_bytes: of the device that computes.
        host_bytes: of the host's memory beside a GPU; 0 where the host computes.
    """

    device_bytes: int
    host_bytes: int


def tokens_per_piece(vocab_size: int) -> int:
    """Return for how many tokens logits are computed at once."""
    return max(1, min(_MAX_PIECE_TOKENS, PIECE_BYTES // (8 * vocab_size)))


def question_tokens(num_tokens: int, device_type: str) -> int:
    """Return how many tokens of questions, padding included, run together: no fewer than the held-out tokens."""
    return max(num_tokens, TOKENS_PER_BATCH[device_type])


def evaluation_memory(
    architecture: Architecture, *, num_tokens: int, seq_len: int, device_type: str, questions: bool = False
) -> EvaluationMemory:
    """Estimate the peak memory of measuring the base model and one quantized model after the other.

    Args:
        architecture: of the base model.
        num_tokens: of the held-out rows.
        seq_len: tokens per row.
        device_type: "cpu" or "cuda".
        questions: whether there are any. As many as run together are counted, at most `question_tokens`.
    """
    element, hidden = ELEMENT_BYTES[device_type], architecture.hidden_size
    states = element * num_tokens * hidden
    asked = element * question_tokens(num_tokens, device_type) * hidden if questions else 0
    head = element * architecture.vocab_size * hidden
    piece = 8 * architecture.vocab_size * min(num_tokens, tokens_per_piece(architecture.vocab_size))
    logits = _PIECES * piece
    question_logits = 2 * 4 * architecture.vocab_size * tokens_per_piece(architecture.vocab_size) if questions else 0
    weights = element * max(kind.weight_elements for kind in architecture.kinds)
    batch_tokens = min(num_tokens, rows_per_batch(seq_len, device_type) * seq_len)
    # Of a batch, both models' states, which are made contiguous without each row's last one; and four figures a token.
    compared = 3 * element * batch_tokens * hidden + 4 * 8 * num_tokens
    if questions:
        batch_tokens = max(batch_tokens, TOKENS_PER_BATCH[device_type])
    blocks = WEIGHT_COPIES * weights + batch_tokens * running_bytes(architecture, device_type, seq_len)
    dequantizing = _dequantizing_bytes(architecture, device_type)
    embedding = embedding_bytes(architecture, device_type)
    # The base model's head stays on the device while the quantized model's blocks run, and both heads make logits.
    if device_type == "cpu":
        converted = converted_bytes(architecture, device_type)
        peak = max(asked + embedding + converted, asked + blocks + dequantizing, head + max(logits, converted + piece))
        if questions:
            peak = max(peak, asked + head + question_logits)
        return EvaluationMemory(device_bytes=2 * states + head + peak, host_bytes=0)
    return EvaluationMemory(
        device_bytes=head
        + max(states + asked + max(embedding, blocks + dequantizing), head + max(compared + logits, question_logits)),
        host_bytes=2 * states + asked + 2 * weights + 2 * architecture.largest_tensor_bytes,
    )


def _dequantizing_bytes(architecture: Architecture, device_type: str) -> int:
    """Return what dequantizing takes beside the weights that it makes: the packed linear, and a part of its weights."""
    largest = max((inputs * outputs for inputs, outputs, _experts in architecture.group_shapes), default=0)
    one = largest + DEQUANTIZING_BYTES * min(largest, DEQUANTIZED_AT_ONCE[device_type])  # 8 bits at most
    return one * (1 if device_type == "cpu" else BLOCK_READERS)
