"""Training of the miniature. `python -m miniature.training.train --help` says how."""
