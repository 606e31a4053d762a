"""Zero-shot classification with models of the retrieval protocol whose `forward` is not CLIP's (ALBEF, BLIP)."""

import math
from typing import Any

from torch import Tensor
from transformers import ZeroShotImageClassificationPipeline
from transformers.image_utils import load_image

# Temperature at which BLIP and ALBEF begin; the native format of BLIP does not keep the learned one.
_TEMPERATURE = 0.07


class ProtocolZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """`pipeline("zero-shot-image-classification", model=...)(image, candidate_labels=["cat", "dog"])`.

    Texts go through the model's processor, which cleans them as in training, and the classes are ranked by the
    contrastive similarity over the temperature. Every other model is used as transformers uses it.
    """

    _load_processor = None
    _load_tokenizer = None
    _load_image_processor = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.processor is not None:
            self.tokenizer = self.tokenizer or getattr(self.processor, "tokenizer", None)
            self.image_processor = self.image_processor or getattr(self.processor, "image_processor", None)
        missing = [name for name in ("tokenizer", "image_processor") if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"the pipeline {self.task!r} found no {' and no '.join(missing)} in "
                f"{getattr(self.model, 'name_or_path', '') or 'what it was given'}: save the processor there"
            )

    def check_model_type(self, supported_models: Any) -> None:
        """Models of the protocol need not be in the list of transformers, which would log that they are not."""
        if not self._by_protocol():
            super().check_model_type(supported_models)

    def _by_protocol(self) -> bool:
        model = self.model
        own = hasattr(model, "embed_images") and hasattr(model, "embed_texts") and hasattr(model, "similarity")
        return own and self.processor is not None and not hasattr(model, "logit_scale")

    def preprocess(
        self,
        image: Any,
        candidate_labels: list[str] | None = None,
        hypothesis_template: str = "This is a photo of {}.",
        timeout: float | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        if not self._by_protocol():
            return super().preprocess(image, candidate_labels, hypothesis_template, timeout, tokenizer_kwargs)
        if not candidate_labels:
            raise ValueError("zero-shot classification needs candidate_labels: the names of the classes")
        picture = load_image(image, timeout=timeout)
        texts = [hypothesis_template.format(label) for label in candidate_labels]
        tokens = self.processor(text=texts, padding=True, return_tensors="pt", **(tokenizer_kwargs or {}))
        pixels = self.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        return {
            "candidate_labels": candidate_labels,
            "pixel_values": pixels.to(self.dtype),
            "tokens": {name: tokens[name] for name in ("input_ids", "attention_mask")},
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        if not self._by_protocol():
            return super()._forward(model_inputs)
        tokens, pixels = model_inputs["tokens"], model_inputs["pixel_values"]
        # Two images in a batch come with the classes of each.
        images = self.model.embed_images(pixel_values=pixels)
        logits = self.model.similarity(images, self.model.embed_texts(**tokens)) / self._temperature()
        return {"candidate_labels": model_inputs["candidate_labels"], "logits": logits}

    def _temperature(self) -> float | Tensor:
        learned = getattr(self.model, "temperature", None)
        if learned is not None:
            return learned
        scale = getattr(self.model.config, "logit_scale_init_value", None)
        return _TEMPERATURE if scale is None else math.exp(-scale)
