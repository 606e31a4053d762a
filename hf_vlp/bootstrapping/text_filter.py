"""Says which texts fit their image: any model with the role "retrieval", by ITM, by ITC, or by both."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hf_vlp.bootstrapping.fingerprint import model_fingerprint
from hf_vlp.evaluation.gallery import longest_text, tokenize
from hf_vlp.evaluation.runtime import batches_by_length, to_device
from hf_vlp.models.retrieval import ImageEmbeds

# Scores are rounded before anything is decided, so that the last bits, which depend on the batch, decide nothing.
DIGITS = 5


@dataclass(frozen=True)
class FilterSettings:
    """What a text has to reach to be kept.

    Attributes:
        itm_threshold: least probability of "match"; 0.5 is the paper's "predicted as matched". None: ITM is not asked.
        itc_threshold: least cosine of the contrastive features, besides or instead; None: not asked.
        max_length: longest text in tokens, cut beyond; None for what the model allows.

    Raises:
        ValueError: neither threshold, or a value out of range.
    """

    itm_threshold: float | None = 0.5
    itc_threshold: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.itm_threshold is None and self.itc_threshold is None:
            raise ValueError(
                "the filter has no threshold and would keep everything: give itm_threshold or leave it out"
            )
        if self.itm_threshold is not None and not 0.0 <= self.itm_threshold <= 1.0:
            raise ValueError(f"itm_threshold={self.itm_threshold} is not a probability")
        if self.itc_threshold is not None and not -1.0 <= self.itc_threshold <= 1.0:
            raise ValueError(f"itc_threshold={self.itc_threshold} is not a cosine, between -1 and 1")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length={self.max_length}: a text has at least one token")


@dataclass(frozen=True)
class Score:
    """How a text fits an image: probability of "match" and cosine, each None if it was not asked for."""

    itm: float | None
    itc: float | None


class TextFilter:
    """Scores texts against images, and judges them.

    Args:
        model: the retrieval protocol (`hf_vlp.models.retrieval.RetrievalModel`); for ITM also
            `matching_probabilities`, with the arguments of `matching_scores`.
        processor: makes the inputs from images and from texts.
        settings: the thresholds.

    Raises:
        ValueError: the model has no matching head and ITM is asked for.
    """

    def __init__(self, model: nn.Module, processor: Any, settings: FilterSettings | None = None) -> None:
        self.model, self.processor, self.settings = model, processor, settings or FilterSettings()
        if self.settings.itm_threshold is not None and not (
            getattr(model, "supports_matching", False) and hasattr(model, "matching_probabilities")
        ):
            raise ValueError(
                f"{type(model).__name__} has no matching head, so ITM can't decide; use a model that has one (ALBEF, "
                "BLIP, BLIP-2 stage 1), or give an itc_threshold and no itm_threshold"
            )
        self.fingerprint = model_fingerprint(model, processor)
        self.max_length = self.settings.max_length or longest_text(model, processor)

    def recorded(self) -> dict[str, Any]:
        """What decides the judgement, for the settings of the set."""
        return {"model": self.fingerprint, **asdict(self.settings)}

    def inputs(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Model inputs of images, on the CPU."""
        return {"pixel_values": self.processor(images=list(images), return_tensors="pt")["pixel_values"]}

    def embed(self, inputs: dict[str, Any]) -> ImageEmbeds:
        """Encodes a batch of images."""
        parameter = next(self.model.parameters())
        return self.model.embed_images(**to_device(inputs, parameter.device, parameter.dtype))

    def scores(
        self, images: Sequence[ImageEmbeds], image_of: Sequence[int], texts: Sequence[str], batch_size: int
    ) -> list[Score]:
        """A score for each text.

        Args:
            images: encoded batches, one after the other.
            image_of: for each text, the number of its image.
            texts: any number; they are compared in batches of similar length.
            batch_size: texts at a time.
        """
        if not texts:
            return []
        joined = _joined(images)
        device = next(self.model.parameters()).device
        tokens = tokenize(self.processor, texts, self.max_length)
        found: list[Score | None] = [None] * len(texts)
        for batch in batches_by_length([len(ids) for ids in tokens.ids], batch_size):
            padded = tokens.padded(batch, device)
            index = torch.tensor([image_of[text] for text in batch], device=device)
            itm = self._itm(joined, index, padded)
            itc = self._itc(joined, index, padded)
            for text, matched, cosine in zip(batch, itm, itc, strict=True):
                found[text] = Score(matched, cosine)
        return found

    def verdict(self, score: Score) -> str:
        """`""` for a text that is kept, else what speaks against it: `"itm"` or `"itc"`."""
        settings = self.settings
        # `not >=`, so that a score that is no number keeps nothing.
        if settings.itm_threshold is not None and not score.itm >= settings.itm_threshold:
            return "itm"
        if settings.itc_threshold is not None and not score.itc >= settings.itc_threshold:
            return "itc"
        return ""

    def _itm(self, images: ImageEmbeds, index: Tensor, texts: dict[str, Tensor]) -> list[float | None]:
        if self.settings.itm_threshold is None:
            return [None] * len(index)
        return _rounded(self.model.matching_probabilities(images, index, **texts))

    def _itc(self, images: ImageEmbeds, index: Tensor, texts: dict[str, Tensor]) -> list[float | None]:
        if self.settings.itc_threshold is None:
            return [None] * len(index)
        wanted, place = index.unique(return_inverse=True)
        similarity = self.model.similarity(images.itc[wanted], self.model.embed_texts(**texts))
        return _rounded(similarity.gather(0, place[None])[0])


def _rounded(scores: Tensor) -> list[float]:
    return [round(value, DIGITS) for value in scores.double().tolist()]


def _joined(images: Sequence[ImageEmbeds]) -> ImageEmbeds:
    if len(images) == 1:
        return images[0]
    states = [one.states for one in images]
    joined = None if states[0] is None else torch.cat(states)
    return ImageEmbeds(torch.cat([one.itc for one in images]), joined)
