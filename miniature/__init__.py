"""The built-in miniature of HunyuanVideo-1.5: its files, its encoders, its world, and its training."""
