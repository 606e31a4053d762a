"""Shapes: the built-in world of coloured shapes, with the truth about every picture."""

from .captions import CaptionScore, parse_caption, score_caption
from .scenes import SPLITS, Scene, SceneObject, ShapesConfig
from .world import ShapesWorld, load_shapes

__all__ = [
    "SPLITS",
    "CaptionScore",
    "Scene",
    "SceneObject",
    "ShapesConfig",
    "ShapesWorld",
    "load_shapes",
    "parse_caption",
    "score_caption",
]
