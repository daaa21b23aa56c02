"""The model, base or quantized: shapes, files, packing and the forward pass."""
