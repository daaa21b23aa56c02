"""GPTQ as pure tensor mathematics: torch in, torch out, nothing of ours but errors.

`hessian` collects what the inputs look like and factors it (`cholesky`), `copies` puts weights in solving order and
dequantizes them, `grid` chooses scales and zeros, `columns` rounds, `carry` sums what is owed to later columns, `solve`
walks over the columns, `layout` packs the integers into 32-bit words. `kernels` holds the Triton versions that CUDA
runs, which `ahead` has compiled in time, and `halves` its products in float32's precision. From `copies` on weights are
held transposed, [in_features, out_features]: a GPTQ column is then one contiguous row, and the checkpoint format packs
down the same axis.

Reference: Frantar et al., GPTQ, arXiv:2210.17323.
"""
