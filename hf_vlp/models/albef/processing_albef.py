"""ALBEF's processor: square images, and captions cleaned and tokenized as the original cleans and tokenizes them."""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

_DROPPED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACES = re.compile(r"\s+")


def clean_caption(text: str, max_words: int | None = None) -> str:
    """Lower-cases, drops punctuation, opens hyphens and slashes, and cuts after `max_words` words."""
    text = _DROPPED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    words = _SPACES.sub(" ", text).strip().split(" ")
    return " ".join(words[:max_words])


def without_final_sep(tokenizer: Any) -> Any:
    """A tokenizer of the same vocabulary that turns a single text into [CLS] and its tokens.

    A saved BERT tokenizer is made anew from its vocabulary when it is loaded, so the change needs the general class.
    """
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.sep_token_id]:
        return tokenizer
    fast = tokenizer.backend_tokenizer
    parts = json.loads(fast.to_str())
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "cls", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": "cls", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
        ],
        "special_tokens": {
            "cls": {"id": "cls", "ids": [tokenizer.cls_token_id], "tokens": [tokenizer.cls_token]},
        },
    }
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=type(fast).from_str(json.dumps(parts)),
        model_max_length=tokenizer.model_max_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        **{name: getattr(tokenizer, name) for name in names},
    )


class AlbefProcessor(ProcessorMixin):
    """Images and texts to the inputs of every ALBEF model.

    A text becomes [CLS] and its tokens. As in the original there is no [SEP] behind a single text; `add_sep=True` puts
    one, for models that were trained so. Answers always end with [SEP] (`encode_answers`).

    Args:
        image_processor: resizes to a square (bicubic) and normalises; `for_image_size` makes the paper's.
        tokenizer: of a BERT.
        max_words: captions are cut after so many words (30 in pretraining, 50 for questions); None: never.
        add_sep: end texts with [SEP].
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        max_words: int | None = 30,
        add_sep: bool = False,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and not add_sep:
            tokenizer = without_final_sep(tokenizer)
        self.max_words = max_words
        self.add_sep = add_sep
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def for_image_size(cls, tokenizer: Any, image_size: int = 256, **kwargs: Any) -> "AlbefProcessor":
        """The paper's image settings: bicubic to a square, CLIP's mean and standard deviation.

        Args:
            tokenizer: of the BERT.
            image_size: in pixels (256 in pretraining, 384 in fine-tuning).
            kwargs: of the constructor.
        """
        return cls(BlipImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer, **kwargs)

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
            cleaned = [clean_caption(one, self.max_words) for one in texts]
            ids = self._ids(cleaned, max_length if truncation else None, self.add_sep)
            features.update(self._padded(ids, padding, max_length, return_tensors))
            if isinstance(text, str) and return_tensors is None:
                features["input_ids"], features["attention_mask"] = (
                    features["input_ids"][0],
                    features["attention_mask"][0],
                )
        return BatchFeature(features, tensor_type=None)

    def encode_answers(
        self, answers: Sequence[str], *, max_length: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """`labels` and `labels_attention_mask` of answers: [CLS], tokens, [SEP]; the start and end of decoding.

        Args:
            answers: of all questions, one after another.
            max_length: in tokens, special ones included; an answer that is cut still ends with [SEP].
            return_tensors: `"pt"`, or None for lists.
        """
        padded = self._padded(self._ids(list(answers), max_length, True), True, None, return_tensors)
        return BatchFeature({"labels": padded["input_ids"], "labels_attention_mask": padded["attention_mask"]})

    def decode_answers(self, ids: Any) -> list[str]:
        """Texts of generated answers, without special tokens."""
        return [one.strip() for one in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def _ids(self, texts: list[str], max_length: int | None, sep: bool) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        room = None if max_length is None else max_length - 1 - sep
        end = [self.tokenizer.sep_token_id] if sep else []
        return [[self.tokenizer.cls_token_id, *ids[:room], *end] for ids in encoded]

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


__all__ = ["AlbefProcessor", "clean_caption"]
