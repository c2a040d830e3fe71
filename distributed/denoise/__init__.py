"""Denoising with HunyuanVideo-1.5's transformer: in one process, or divided between ranks."""
