"""`CLIPProcessor`: images and texts to the inputs of every model of the family."""

from collections.abc import Iterable
from typing import Any

import transformers
from transformers import BatchFeature, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_vlp.models.clip.image_processing_clip import CLIPImageProcessorPil
from hf_vlp.models.clip.tokenization_clip import clean_text, train_clip_tokenizer


class CLIPProcessor(transformers.CLIPProcessor):
    """The native processor that also cleans text and treats images as the original code does.

    Text is repaired (`ftfy`), unescaped, collapsed and lower-cased before the tokenizer sees it. Images are resized
    and cropped on Pillow in their own mode and then made RGB. A saved folder is native: plain transformers opens it,
    without the cleaning.

    Args:
        image_processor: any native CLIP image processor; replaced by the exact one of the same settings.
        tokenizer: a CLIP tokenizer.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        if type(image_processor).__name__ in ("CLIPImageProcessor", "CLIPImageProcessorPil") and not isinstance(
            image_processor, CLIPImageProcessorPil
        ):
            image_processor = CLIPImageProcessorPil.from_native(image_processor)
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """As the native call.

        Args:
            images: a PIL image or several (arrays and tensors as well).
            text: a string or a list.
            kwargs: of the tokenizer and the image processor (`padding`, `truncation`, `max_length`, ...).
        """
        if isinstance(text, str):
            text = clean_text(text)
        elif text is not None:
            text = [clean_text(one) for one in text]
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, image_size: int = 224, vocab_size: int = 8192, context_length: int = 77
    ) -> "CLIPProcessor":
        """A processor from scratch: a tokenizer trained on `texts` and square images of `image_size` pixels."""
        return cls.for_image_size(train_clip_tokenizer(texts, vocab_size, context_length), image_size)

    @classmethod
    def for_image_size(
        cls,
        tokenizer: CLIPTokenizer,
        image_size: int,
        image_mean: tuple[float, float, float] = tuple(OPENAI_CLIP_MEAN),
        image_std: tuple[float, float, float] = tuple(OPENAI_CLIP_STD),
    ) -> "CLIPProcessor":
        """A processor with a given tokenizer and square images of `image_size` pixels."""
        image_processor = CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(image_mean),
            image_std=list(image_std),
        )
        return cls(image_processor, tokenizer)


__all__ = ["CLIPImageProcessorPil", "CLIPProcessor"]
