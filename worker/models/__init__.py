"""Models described by data: one transformer, a small declaration per family."""
