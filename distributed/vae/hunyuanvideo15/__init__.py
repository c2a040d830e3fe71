"""What is HunyuanVideo-1.5's own: its decoder."""
