"""The way in which every architecture is used for retrieval."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class ImageEmbeds:
    """Images, encoded once, for any number of comparisons with texts.

    Files that travel with checkpoints cannot import this one and carry a class of the same behaviour.

    Attributes:
        itc: (I, D), or (I, Q, D) where an image has several features; normalised.
        states: per-image state that matching needs (for BLIP-2 the image features, (I, tokens, hidden)); `None` where
            the model only compares features.
    """

    itc: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.itc)

    def __getitem__(self, index: Tensor | slice) -> "ImageEmbeds":
        """The images `index`, a slice or a tensor of indices."""
        return ImageEmbeds(self.itc[index], None if self.states is None else self.states[index])


class RetrievalModel(Protocol):
    """What the role "retrieval" of the catalogue promises."""

    supports_matching: bool

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Encodes images; `image_embeds` are cached outputs of the vision tower that stand for `pixel_values`."""

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encodes texts: (T, D), normalised."""

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosine similarities (I, T)."""

    def matching_scores(
        self, images: ImageEmbeds, image_index: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """(P,) how well text p fits image `image_index[p]`: the logit of "match"."""
