"""Pipelines: `image-to-text`, `image-question-answering`, `image-text-matching`, `zero-shot-image-classification`.

The files beside this one ship with the checkpoints that use them, so they import only torch, transformers, Pillow, the
standard library and each other; `loading.py` and `zero_shot_image_classification.py` stay here.
"""

from hf_vlp._exports import lazy_exports

# Public name -> module that defines it.
_EXPORTS = {
    "ImageToTextPipeline": "image_to_text",
    "ImageQuestionAnsweringPipeline": "image_question_answering",
    "ImageTextMatchingPipeline": "image_text_matching",
    "ProtocolZeroShotPipeline": "zero_shot_image_classification",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
