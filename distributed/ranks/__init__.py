"""How rank processes live. Knows no model and no kind of job."""
