"""Pipelines: `image-to-text`, `image-question-answering`, `image-text-matching`.

The files beside this one, `loading.py` excepted, ship with the checkpoints that use them, so they import only torch,
transformers, Pillow, the standard library and each other.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "ImageToTextPipeline": "hf_vlp.pipelines.image_to_text",
    "ImageQuestionAnsweringPipeline": "hf_vlp.pipelines.image_question_answering",
    "ImageTextMatchingPipeline": "hf_vlp.pipelines.image_text_matching",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
