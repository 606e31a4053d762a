"""Pipelines: `image-to-text`, `image-question-answering`, `image-text-matching`, `zero-shot-image-classification`.

The files beside this one ship with the checkpoints that use them, so they import only torch, transformers, Pillow, the
standard library and each other; `loading.py` and `zero_shot_image_classification.py` stay here.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ImageToTextPipeline": "hf_vlp.pipelines.image_to_text",
    "ImageQuestionAnsweringPipeline": "hf_vlp.pipelines.image_question_answering",
    "ImageTextMatchingPipeline": "hf_vlp.pipelines.image_text_matching",
    "ProtocolZeroShotPipeline": "hf_vlp.pipelines.zero_shot_image_classification",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
