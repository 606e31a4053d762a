"""BLIP-2 (arXiv 2301.12597): a Q-Former between a frozen image encoder and a frozen language model, in two stages."""
