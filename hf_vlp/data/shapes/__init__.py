"""Shapes: the built-in world of coloured shapes, with the truth about every picture."""

from .captions import CaptionScore, parse_caption, score_caption
from .questions import Question
from .scenes import SPLITS, Scene, SceneObject, ShapesConfig
from .tasks import load_shapes_task
from .world import ShapesWorld, load_shapes, load_shapes_questions, shapes_texts

__all__ = [
    "SPLITS",
    "CaptionScore",
    "Question",
    "Scene",
    "SceneObject",
    "ShapesConfig",
    "ShapesWorld",
    "load_shapes",
    "load_shapes_questions",
    "load_shapes_task",
    "parse_caption",
    "score_caption",
    "shapes_texts",
]
