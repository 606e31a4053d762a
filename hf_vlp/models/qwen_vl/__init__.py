"""Qwen-VL (arXiv 2308.12966): a ViT, a position-aware resampler, and any causal language model behind them."""
