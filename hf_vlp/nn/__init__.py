"""Blocks that several native architectures share."""
