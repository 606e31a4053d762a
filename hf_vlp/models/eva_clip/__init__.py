"""EVA-CLIP: the image tower that BLIP-2 freezes."""
