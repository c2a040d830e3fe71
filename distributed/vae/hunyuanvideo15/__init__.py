"""The parts of a decode that are specific to HunyuanVideo-1.5."""
