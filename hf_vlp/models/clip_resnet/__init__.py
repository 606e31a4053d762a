"""CLIP with the modified ResNet image tower."""
