"""Packed ring attention: a host-side plan, block kernels, a point-to-point exchange, and the autograd function."""
