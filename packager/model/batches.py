"""The number of token rows that go through the blocks together, and their bytes. No torch: memory plans use it."""

import math

from packager.model.architecture import Architecture
from packager.model.safetensors_file import TensorInfo

# Bytes of an activation or weight while a model computes: float32 on the CPU, float16 or bfloat16 on a GPU.
ELEMENT_BYTES = {"cpu": 4, "cuda": 2}
TRACED_BYTES = 2  # of an activation in the sizes that a lock gives
# Copies of a block's weights that exist at once: as read, as used and overwritten in the block, and the next block's.
WEIGHT_COPIES = 3

# A GPU needs many tokens to be busy; a CPU is faster on what stays in its cache. Products round differently for other
# batch sizes, so these numbers also determine bytes: they do not depend on the memory that is free.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}

# Threads that read a block for a GPU: one reads 13B's block of 634 MB in some 0.5 s, two GPUs compute it in 0.3 s.
BLOCK_READERS = 4
# Pinned memory through which each of them copies; a piece of that size takes some 0.1 ms to an H200.
STAGED_BYTES = 2**22
# Weights of a linear that are dequantized at once. On a CPU the parts stay in its cache: [4096, 5120] takes 0.08 s,
# all at once 0.21 s (2 cores). A GPU needs many to be busy, and few kernels are launched.
DEQUANTIZED_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
# Bytes of each of them meanwhile: the integer, its float32, and its zero's or its scale's.
DEQUANTIZING_BYTES = 1 + 4 + 4


def rows_per_batch(seq_len: int, device_type: str) -> int:
    """Return how many rows of `seq_len` tokens make a batch on a "cpu" or on "cuda"."""
    return max(1, TOKENS_PER_BATCH[device_type] // seq_len)


def running_bytes(architecture: Architecture, device_type: str, seq_len: int) -> int:
    """Return the most bytes that a token of the running batch, of rows of `seq_len` tokens, takes in a block."""
    peak = max(kind.peak_bytes + seq_len * kind.peak_bytes_per_pair for kind in architecture.kinds)
    return peak * ELEMENT_BYTES[device_type] // TRACED_BYTES


def embedding_bytes(architecture: Architecture, device_type: str) -> int:
    """Return what the embeddings of tokens take on a device while the inputs of the first block are made."""
    matrices = _token_matrices(architecture)
    # A head has the embedding's size where it is a tensor of its own, so it does not matter which of both is left out.
    embeddings = matrices if architecture.tied else matrices[1:]
    return ELEMENT_BYTES[device_type] * sum(math.prod(tensor.shape) for tensor in embeddings)


def converted_bytes(architecture: Architecture, device_type: str) -> int:
    """Return the bytes of the largest embedding or head as it is stored, which is there while it becomes float32."""
    sizes = (tensor.size_bytes for tensor in _token_matrices(architecture) if tensor.dtype != "F32")
    return max(sizes, default=0) if device_type == "cpu" else 0


def _token_matrices(architecture: Architecture) -> list[TensorInfo]:
    """Return embeddings of tokens and an untied head: matrices outside the blocks with a row for most tokens."""
    most = architecture.vocab_size / 2
    return [
        tensor
        for tensor in architecture.tree.outside(architecture.blocks_prefix)
        if len(tensor.shape) == 2 and tensor.shape[0] >= most
    ]
