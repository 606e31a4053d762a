"""Scores of images and texts that may belong together.

This file ships with checkpoints: it imports only torch, transformers, the standard library and a sibling.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForZeroShotImageClassification

from .image_pipeline import ImagePipeline, is_single, unknown_parameter


class ImageTextMatchingPipeline(ImagePipeline):
    """`pipeline("image-text-matching", model=...)(image, text=["a cat", "a dog"])`.

    For models with an image-text matching head (BLIP-2) and for two-tower models (CLIP, ALIGN, ...). A model with the
    retrieval protocol of hf_vlp (`embed_images`, `embed_texts`, `similarity`, `matching_probabilities`) encodes each
    image once, whatever the number of its texts.
    """

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """Scores.

        Args:
            images: an image (as in `open_image`), a record `{"image": image, "text": text or list of texts}`, or a
                list, dataset or iterator of these.
            text: with one image, a text or a list of texts to compare it with; with a list of images, a text for all
                or a list with the text, or list of texts, of each.
            batch_size (`int`): images to run at once, each with all its texts; 1 by default.
            timeout (`float`): seconds to wait for the image of a URL.

        Returns:
            `{"text": ..., "score": ..., "similarity": ...}` for one text, a list of these for a list of texts, in the
            order of the texts; and a list of such results for a list of images. `similarity` is that of the
            contrastive space, in [-1, 1]; `score` is the probability of a match where the model has a matching head,
            and the similarity where it has none.

        Raises:
            ValueError: an image can't be read, has no text, or the numbers of images and texts differ.
        """
        for alias in ("inputs", "image"):
            if images is None:
                images = kwargs.pop(alias, None)
        if images is None:
            raise ValueError(f"the pipeline {self.task!r} needs an image: pipe(image, text='...')")
        if isinstance(text, list | tuple) and not is_single(images):
            if not isinstance(images, list | tuple) or len(images) != len(text):
                raise ValueError(
                    f"{len(text)} texts need a list of as many images, or one image that all are compared with"
                )
            images = [{"image": image, "text": own} for image, own in zip(images, text, strict=True)]
            text = None
        return self.run_on(images, partial(self.record, text=text), **kwargs)

    def record(self, item: Any, text: str | list[str] | None = None) -> dict[str, Any]:
        if isinstance(item, dict) and "image" in item:
            text = item.get("text") if text is None else text
            item = item["image"]
        texts = [text] if isinstance(text, str) else list(text or [])
        if not texts or not all(isinstance(entry, str) and entry.strip() for entry in texts):
            raise ValueError(f"the pipeline {self.task!r} needs a text for each image: pipe(image, text='...')")
        return {"image": item, "texts": texts, "single": isinstance(text, str)}

    def _sanitize_parameters(
        self, timeout: float | None = None, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if kwargs:
            raise unknown_parameter(self, kwargs)
        return {} if timeout is None else {"timeout": timeout}, {}, {}

    def collate(self, records: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [text for record in records for text in record["texts"]]
        owners = [index for index, record in enumerate(records) for _ in record["texts"]]
        encode = self.tokenizer if self.processor is None else partial(self.processor, images=None)
        tokens = encode(text=texts, padding=True, truncation=True, return_tensors="pt")
        names = ("input_ids", "attention_mask")
        return {
            "images": self._to_model(self.image_processor(images=[r["image"] for r in records], return_tensors="pt")),
            "tokens": {name: tokens[name] for name in names if name in tokens},
            "owners": torch.tensor(owners),  # (P,)
            "records": [{"texts": record["texts"], "single": record["single"]} for record in records],
        }

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        images, tokens, owners = model_inputs["images"], model_inputs["tokens"], model_inputs["owners"]
        if hasattr(self.model, "embed_images"):
            similarity, score = self._by_protocol(images, tokens, owners)
        elif "use_image_text_matching_head" in inspect.signature(self.model.forward).parameters:
            similarity, score = self._by_head(images, tokens, owners)
        else:
            similarity = score = self._by_towers(images, tokens, owners)
        return {"similarity": similarity.float(), "score": score.float(), "records": model_inputs["records"]}

    def _by_protocol(
        self, images: dict[str, Tensor], tokens: dict[str, Tensor], owners: Tensor
    ) -> tuple[Tensor, Tensor]:
        embedded = self.model.embed_images(**images)
        text_itc = self.model.embed_texts(**tokens)  # (P, D)
        similarity = self.model.similarity(embedded, text_itc)[owners, torch.arange(len(owners), device=owners.device)]
        if not getattr(self.model, "supports_matching", False) or not hasattr(self.model, "matching_probabilities"):
            return similarity, similarity
        # The protocol's `matching_scores` are logits, made for ranking.
        return similarity, self.model.matching_probabilities(embedded, owners, **tokens)

    def _by_head(self, images: dict[str, Tensor], tokens: dict[str, Tensor], owners: Tensor) -> tuple[Tensor, Tensor]:
        """The native `Blip2ForImageTextRetrieval` takes pairs and encodes the image of each."""
        pairs = {name: value[owners] for name, value in images.items()}
        logits = self.model(**pairs, **tokens, use_image_text_matching_head=True).logits_per_image  # (P, 2)
        contrast = self.model(**images, **tokens, use_image_text_matching_head=False)
        similarity = torch.einsum("pqd,pd->pq", contrast.image_embeds[owners], contrast.text_embeds).amax(dim=1)
        return similarity, logits.float().softmax(dim=-1)[:, 1]

    def _by_towers(self, images: dict[str, Tensor], tokens: dict[str, Tensor], owners: Tensor) -> Tensor:
        outputs = self.model(**images, **tokens)
        image_embeds = F.normalize(outputs.image_embeds.float(), dim=-1)
        text_embeds = F.normalize(outputs.text_embeds.float(), dim=-1)
        return (image_embeds[owners] * text_embeds).sum(dim=-1)

    def postprocess(self, model_outputs: dict[str, Any]) -> list[Any]:
        results = []
        values = zip(model_outputs["score"].tolist(), model_outputs["similarity"].tolist(), strict=True)
        for record in model_outputs["records"]:
            own = []
            for text in record["texts"]:
                score, similarity = next(values)
                own.append({"text": text, "score": score, "similarity": similarity})
            results.append(own[0] if record["single"] else own)
        return results


ImageTextMatchingPipeline._registered_impl = {
    "image-text-matching": {"impl": ImageTextMatchingPipeline, "pt": (AutoModelForZeroShotImageClassification,)}
}
