"""What a model is, base or quantized: shapes, files, packing and the forward pass."""
