"""The engine: fp16 blocks in, packed blocks out."""
