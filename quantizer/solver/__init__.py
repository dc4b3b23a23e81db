"""Rounding under a Hessian: pure functions of tensors that know grids and nothing else."""
