"""One kind of job: decode."""
