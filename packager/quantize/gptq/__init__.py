"""GPTQ as pure tensor mathematics: torch in, torch out; of the package it imports errors only.

`hessian` accumulates and factors H, adding in the order of `row_parts`; `grid` chooses scales and zeros, `columns`
rounds, `lazy_updates` computes the updates of later columns, `solve` quantizes linears column block by column block,
`refine` betters the result. `tensor_ops` declares the operations that differ by device, `torch_ops` and `triton_ops`
(with `triton_kernels`, `triton_matrix_kernels` and `triton_refine_kernel`) implement them, `choose_ops` chooses, and
`compile_kernels` compiles the kernels ahead of time. `cholesky` factors where the library is slow on CUDA: a batch, and
a wide matrix. `routing` and `expert_hessians` serve the experts of a layer, which are solved as one batch. The whole
algorithm: docs/reference/engine.md.

Reference: Frantar et al., GPTQ, arXiv:2210.17323.
"""
