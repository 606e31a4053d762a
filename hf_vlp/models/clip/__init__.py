"""CLIP: ViT towers, and what the whole family shares."""
