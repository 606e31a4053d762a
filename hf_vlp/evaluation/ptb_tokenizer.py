"""Tokens of captions as the COCO caption evaluation makes them."""


def tokenize_captions(captions):
    return [c.lower() for c in captions]
