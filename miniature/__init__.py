"""Training of the built-in miniature of HunyuanVideo-1.5. `python -m miniature.train --help` says how."""
