"""BLIP's processor, in the native format: square images, and captions cleaned and tokenized as the original does."""

import re
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import BatchFeature
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

_DROPPED = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")
DECODER_TOKEN, ENCODER_TOKEN = "[DEC]", "[ENC]"


def clean_caption(text: str, max_words: int | None = None) -> str:
    """Lower-cases, turns punctuation into spaces, and cuts after `max_words` words."""
    text = _SPACES.sub(" ", _DROPPED.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def add_blip_tokens(tokenizer: Any) -> Any:
    """Adds [DEC], where decoding starts, and [ENC], first token of texts that look at an image, in place.

    In this order, behind the vocabulary, as in the original; a tokenizer that has them stays as it is.
    """
    if tokenizer.convert_tokens_to_ids(DECODER_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"bos_token": DECODER_TOKEN})
    if tokenizer.convert_tokens_to_ids(ENCODER_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_tokens([ENCODER_TOKEN], special_tokens=True)
    return tokenizer


class BlipProcessor(transformers.BlipProcessor):
    """Images and texts to the inputs of every BLIP model; saved under the native class name.

    A text becomes [CLS], its tokens and [SEP]; the models put [ENC] or [DEC] in the place of [CLS] themselves.

    Args:
        image_processor: resizes to a square (bicubic) and normalises; `for_image_size` makes the paper's.
        tokenizer: of a BERT; `for_image_size` adds [DEC] and [ENC].
        max_words: texts are cut after so many words (30 in pretraining, 50 for questions); None: never.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, max_words: int | None = 30, **kwargs: Any
    ) -> None:
        self.max_words = max_words
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def for_image_size(cls, tokenizer: Any, image_size: int = 224, **kwargs: Any) -> "BlipProcessor":
        """The paper's image settings: bicubic to a square, CLIP's mean and standard deviation.

        Args:
            tokenizer: of the BERT; [DEC] and [ENC] are added to it.
            image_size: in pixels (224 in pretraining, 384 in most fine-tuning, 480 in question answering).
            kwargs: of the constructor.
        """
        images = BlipImageProcessorPil(size={"height": image_size, "width": image_size})
        return cls(images, add_blip_tokens(tokenizer), **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "attention_mask"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes a batch.

        Args:
            images: a PIL image or several (arrays and tensors as well).
            text: a string or several; cleaned, then tokenized.
            padding: False, True (to the longest) or `"max_length"`; on the right.
            truncation: cut texts at `max_length` tokens.
            max_length: in tokens, special ones included.
            return_tensors: `"pt"`, or None for lists.
            kwargs: of the image processor.

        Raises:
            ValueError: neither images nor text.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        features: dict[str, Any] = {}
        if images is not None:
            features.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            ids = self._ids([clean_caption(one, self.max_words) for one in texts], max_length if truncation else None)
            padded = self._padded(ids, padding, max_length, return_tensors)
            if isinstance(text, str) and return_tensors is None:
                padded = {name: value[0] for name, value in padded.items()}
            features.update(padded)
        return BatchFeature(features, tensor_type=None)

    def encode_answers(
        self, answers: Sequence[str], *, max_length: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """`labels` and `labels_attention_mask` of answers: [DEC], tokens, [SEP]; the start and end of decoding.

        Args:
            answers: of all questions, one after another.
            max_length: in tokens, special ones included; an answer that is cut still ends with [SEP].
            return_tensors: `"pt"`, or None for lists.
        """
        start = self.tokenizer.convert_tokens_to_ids(DECODER_TOKEN)
        ids = [[start, *one[1:]] for one in self._ids(list(answers), max_length)]
        padded = self._padded(ids, True, None, return_tensors)
        return BatchFeature({"labels": padded["input_ids"], "labels_attention_mask": padded["attention_mask"]})

    def decode_answers(self, ids: Any) -> list[str]:
        """Texts of generated answers, without special tokens."""
        return [one.strip() for one in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def training_inputs(
        self, images: Any, texts: Sequence[str], prompt: str = "", max_length: int | None = None
    ) -> BatchFeature:
        """A batch of captions to learn: `labels` are -100 at [DEC], at the prompt and at padding.

        Args:
            images: one a text.
            texts: captions without the prompt.
            prompt: put before every caption, such as "a picture of"; not learnt.
            max_length: in tokens, special ones included; a caption that is cut has no [SEP] to learn.

        Raises:
            ValueError: the prompt leaves no room for a caption.
        """
        batch = dict(self.image_processor(images, return_tensors="pt"))
        prefix = self._ids([clean_caption(prompt)], None)[0][:-1] if prompt else [self.tokenizer.cls_token_id]
        if max_length is not None and len(prefix) + 1 > max_length:
            raise ValueError(f"max_length {max_length} leaves no room behind the prompt of {len(prefix)} tokens")
        prefix[0] = self.tokenizer.convert_tokens_to_ids(DECODER_TOKEN)
        cleaned = [clean_caption(one, self.max_words) for one in texts]
        ids = [[*prefix, *one[1:]][:max_length] for one in self._ids(cleaned, None)]
        padded = self._padded(ids, True, None, "pt")
        labels = torch.where(padded["attention_mask"].bool(), padded["input_ids"], -100)
        labels[:, : len(prefix)] = -100
        return BatchFeature(batch | padded | {"labels": labels})

    def _ids(self, texts: list[str], max_length: int | None) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        room = None if max_length is None else max_length - 2
        return [[self.tokenizer.cls_token_id, *ids[:room], self.tokenizer.sep_token_id] for ids in encoded]

    def _padded(
        self, ids: list[list[int]], padding: bool | str, max_length: int | None, return_tensors: str | None
    ) -> dict[str, Any]:
        rows = {"input_ids": ids, "attention_mask": [[1] * len(one) for one in ids]}
        padded = self.tokenizer.pad(
            rows,
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            padding_side="right",
            return_tensors=return_tensors,
        )
        return dict(padded)


__all__ = ["BlipProcessor", "add_blip_tokens", "clean_caption"]
