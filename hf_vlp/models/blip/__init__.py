"""BLIP (arXiv 2201.12086), in the native format of transformers."""
