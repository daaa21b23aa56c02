"""How many token rows go through the blocks together. No torch: the memory plan asks."""

# A GPU needs many tokens to be busy; a CPU is faster on what stays in its cache. Products round differently for other
# batch sizes, so these numbers also determine bytes: they do not depend on the memory that is free.
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 16384}


def rows_per_batch(seq_len: int, device_type: str) -> int:
    """Return how many rows of `seq_len` tokens make a batch on a "cpu" or on "cuda"."""
    return max(1, TOKENS_PER_BATCH[device_type] // seq_len)
