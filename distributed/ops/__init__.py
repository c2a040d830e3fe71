"""Kernels and their plain twins."""
