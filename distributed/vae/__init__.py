"""The decode job: distributed VAE decoding."""
