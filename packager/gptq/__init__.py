"""GPTQ as pure tensor mathematics: torch in, torch out, nothing of ours but errors.

`hessian` collects what the inputs look like and factors it, `grid` chooses scales and zeros, `columns` rounds,
`solve` walks over the columns, `layout` packs the integers into 32-bit words; `kernels` holds the Triton versions of
grid and columns that CUDA runs. Weights are held transposed, [in_features, out_features], everywhere in this package:
a GPTQ column is then one contiguous row, and the checkpoint format packs down the same axis.

Reference: Frantar et al., GPTQ, arXiv:2210.17323.
"""
