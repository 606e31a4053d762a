"""Comparison with recorded runs of the original authors' code."""
