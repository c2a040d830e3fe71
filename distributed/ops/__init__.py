"""Kernels: plain PyTorch forms and fused Triton forms."""
