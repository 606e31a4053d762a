"""Retrieval with a dual encoder: one vector an image, one a text, compared by their cosine.

Shared by the native architectures of the CLIP family. `clip_resnet` and `eva_clip` ship with their checkpoints and so
carry this protocol themselves.
"""

import torch
from torch import Tensor

from hf_vlp.models.retrieval import ImageEmbeds


def normalize(features: Tensor) -> Tensor:
    """Unit vectors along the last axis, computed in float32 at least, whatever the autocast dtype."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / features.norm(dim=-1, keepdim=True)


def trim_texts(
    input_ids: Tensor, attention_mask: Tensor | None, eos_token_id: int | None
) -> tuple[Tensor, Tensor | None]:
    """Cuts the columns behind the last end token that is pooled.

    Under causal attention the state at a text's first end token depends on no later position, so a tower that pools
    there gives the same embedding for the shorter input.

    Args:
        input_ids: `(texts, length)`.
        attention_mask: `(texts, length)` or None.
        eos_token_id: the pooled token; None pools the highest id of each row, as the original does.

    Returns:
        Ids and mask of the shorter length. The mask is None where it hides no position up to a pooled one, so that
        attention can run on its fast causal path.

    Raises:
        ValueError: a text has no end token, or the mask hides it: the tower would pool an unrelated position.
    """
    if eos_token_id is None:
        is_end = input_ids == input_ids.amax(dim=1, keepdim=True)
    else:
        is_end = input_ids == eos_token_id
    position = is_end.int().argmax(dim=1)  # (texts,)
    bad = ~is_end.any(dim=1)
    hidden = torch.zeros_like(bad)
    if attention_mask is not None:
        up_to_end = torch.arange(input_ids.shape[1], device=input_ids.device) <= position[:, None]
        hidden = ((attention_mask == 0) & up_to_end).any(dim=1)
        bad |= attention_mask.gather(1, position[:, None])[:, 0] == 0
    # One transfer for the three numbers, as each would otherwise wait for the device.
    length, any_hidden, any_bad = torch.stack([position.max() + 1, hidden.any().long(), bad.any().long()]).tolist()
    if any_bad:
        rows = bad.nonzero()[:8, 0].tolist()
        raise ValueError(
            f"input_ids: texts {rows} of this batch have no visible end token (id {eos_token_id}), which is the one "
            "that the text tower pools. Tokenize with special tokens and truncation, and check that the tokenizer's "
            "eos_token_id is config.text_config.eos_token_id."
        )
    input_ids = input_ids[:, :length]
    return input_ids, attention_mask[:, :length] if any_hidden else None


class DualEncoderRetrieval:
    """The retrieval protocol, mixed into a model that has these two methods:

    `image_features(pixel_values, image_embeds)` and `text_features(input_ids, attention_mask)`, the projected features
    before normalisation, `(images, dim)` and `(texts, dim)`.

    `supports_matching` is False: there is no joint encoder that scores a pair.
    """

    supports_matching = False

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Embeds images.

        Args:
            pixel_values: `(images, 3, height, width)`.
            image_embeds: instead of pixels, the vision tower's pooled output `(images, hidden)`, as a cache of a
                frozen tower keeps it.
        """
        return ImageEmbeds(normalize(self.image_features(pixel_values, image_embeds)))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeds texts: `(texts, length)` ids to unit vectors `(texts, dim)`."""
        return normalize(self.text_features(input_ids, attention_mask))

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosines `(images, texts)` in float32."""
        itc = images if isinstance(images, Tensor) else images.itc
        return itc.float() @ text_itc.float().T


def require_one(pixel_values: Tensor | None, image_embeds: Tensor | None) -> None:
    """Raises `ValueError` unless exactly one of the two ways to give an image is used."""
    if (pixel_values is None) == (image_embeds is None):
        raise ValueError("give either pixel_values or image_embeds (the vision tower's pooled output), not both")
