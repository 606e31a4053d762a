"""LLaVA (arXiv 2304.08485, 2310.03744) and LLaVA-NeXT: a projector between a vision tower and a language model."""
