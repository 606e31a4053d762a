"""Grounding with ALBEF: Grad-CAM of a score on attention maps (section 6.4 of the paper), and pictures of it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .modeling_albef_packing import PackedTexts, fusion_layouts


@dataclass
class GroundingOutput(ModelOutput):
    """Grad-CAM of N pairs on the patch grid (h, w).

    Args:
        maps: (N, h, w), non-negative.
        token_maps: (N, L, h, w), one map a text token, zero at padding; only from the matching score.
        attention: (N, heads, queries, 1 + h·w) attention probabilities of the chosen layer.
        gradient: their gradient of the score, same shape.
        score: the sum over pairs of the score that was differentiated.
        logits: (N, 2) ITM logits, or (N, N) similarities over the temperature.
    """

    maps: Tensor | None = None
    token_maps: Tensor | None = None
    attention: Tensor | None = None
    gradient: Tensor | None = None
    score: Tensor | None = None
    logits: Tensor | None = None


def _patch_grid(model: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    patch = model.config.vision_config.patch_size
    return pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch


def matching_grounding(
    model: nn.Module,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layer: int | None = None,
) -> GroundingOutput:
    """Cross-attention of one fusion layer times the positive part of its gradient of the matching score.

    The map of a pair is the mean over heads, and over all L text positions; padding adds nothing but counts in the
    divisor, as in the original.

    Args:
        model: `AlbefForImageTextRetrieval`.
        pixel_values: (N, 3, H, W).
        input_ids: (N, L).
        attention_mask: (N, L).
        layer: of the text stack, `fusion_layer` to `num_hidden_layers - 1`; default: the third fusion layer.

    Raises:
        ValueError: the layer has no cross-attention, or images and texts are not pairs.
    """
    text_config = model.config.text_config
    low, high = text_config.fusion_layer, text_config.num_hidden_layers - 1
    chosen = min(low + 2, high) if layer is None else layer
    if not low <= chosen <= high:
        raise ValueError(f"layer {chosen} has no cross-attention: choose {low} to {high}")
    if pixel_values.shape[0] != input_ids.shape[0]:
        raise ValueError(f"there are {pixel_values.shape[0]} images for {input_ids.shape[0]} texts: pass pairs")
    with torch.no_grad():
        image_states = model.albef.encode_images(pixel_values)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        text_states = model.albef.text_model.encode(texts)
    number, heads = len(texts), text_config.num_attention_heads
    layouts = fusion_layouts(texts, text_config.num_fusion_layers, torch.arange(number), number, keep=texts.first)
    weights: dict[str, Tensor] = {}
    # The last layer computes [CLS] alone, on which the score depends; as the chosen one it computes all tokens.
    if chosen == high:
        full = fusion_layouts(texts, text_config.num_fusion_layers, torch.arange(number), number)[-1]
        layouts[-1] = full
    layouts[chosen - low] = replace(layouts[chosen - low], weights=weights)
    with torch.enable_grad():
        fused = model.albef.text_model.fuse(text_states.detach().requires_grad_(), layouts, image_states)
        first = fused.index_select(0, texts.first.to(fused.device)) if chosen == high else fused
        logits = model.itm_head(first)
        score = logits[:, 1].sum()
        (gradient,) = torch.autograd.grad(score, weights["cross"])
    attention = weights["cross"].detach()
    height, width = _patch_grid(model, pixel_values)
    length = input_ids.shape[1]
    padded = length - attention.shape[2]
    attention, gradient = (nn.functional.pad(x, (0, 0, 0, padded)) for x in (attention, gradient))
    cam = (attention * gradient.clamp(min=0))[..., 1:].mean(dim=1)
    if texts.key_mask is not None:
        cam = cam * nn.functional.pad(texts.key_mask, (0, padded))[..., None]
    token_maps = cam.view(number, length, height, width)
    return GroundingOutput(
        maps=token_maps.mean(dim=1),
        token_maps=token_maps,
        attention=attention.view(number, heads, length, -1),
        gradient=gradient.view(number, heads, length, -1),
        score=score.detach(),
        logits=logits.detach(),
    )


def contrastive_grounding(
    model: nn.Module,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layer: int | None = None,
) -> GroundingOutput:
    """The class token's attention in a ViT block times the positive part of its gradient of the similarity.

    Args:
        model: `AlbefForImageTextRetrieval`.
        pixel_values: (N, 3, H, W).
        input_ids: (N, L).
        attention_mask: (N, L).
        layer: block of the image encoder; default: the last but two.

    Raises:
        ValueError: there is no such block, or images and texts are not pairs.
    """
    blocks = model.config.vision_config.num_hidden_layers
    chosen = max(0, blocks - 3) if layer is None else layer
    if not 0 <= chosen < blocks:
        raise ValueError(f"the image encoder has blocks 0 to {blocks - 1}, not {chosen}")
    if pixel_values.shape[0] != input_ids.shape[0]:
        raise ValueError(f"there are {pixel_values.shape[0]} images for {input_ids.shape[0]} texts: pass pairs")
    with torch.no_grad():
        text_itc = model.embed_texts(input_ids, attention_mask)
    tower = model.albef.vision_model
    implementation = tower.config._attn_implementation
    # Only attention that is written out has probabilities to differentiate by.
    tower.config._attn_implementation = "eager"
    try:
        with torch.enable_grad():
            encoded = tower(pixel_values.detach().requires_grad_(), output_attentions=True)
    finally:
        tower.config._attn_implementation = implementation
    with torch.enable_grad():
        similarity = model.project_image(encoded.last_hidden_state) @ text_itc.t() / model.temperature
        score = similarity.diagonal().sum()
        (gradient,) = torch.autograd.grad(score, encoded.attentions[chosen])
    attention = encoded.attentions[chosen].detach()
    height, width = _patch_grid(model, pixel_values)
    cam = (attention * gradient.clamp(min=0))[:, :, 0, 1:].mean(dim=1)
    return GroundingOutput(
        maps=cam.view(-1, height, width),
        attention=attention,
        gradient=gradient,
        score=score.detach(),
        logits=similarity.detach(),
    )


# Dark blue, blue, cyan, yellow, red: positions and colours between which heat is interpolated.
_HEAT = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_COLOURS = np.array([[0, 0, 96], [0, 64, 255], [0, 255, 224], [255, 224, 0], [224, 0, 0]], dtype=np.float64)


def heat_picture(image: Image.Image, heat: Tensor | Sequence, strength: float = 0.6) -> Image.Image:
    """Lays a map over its image.

    Args:
        image: any size.
        heat: (h, w); scaled so that its largest value is hottest.
        strength: 0 (image alone) to 1.

    Returns:
        An RGB picture of the image's size.
    """
    values = np.asarray(torch.as_tensor(heat).detach().cpu(), dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"a map must be (height, width), but has shape {values.shape}")
    values = values - values.min()
    values = values / values.max() if values.max() > 0 else values
    smooth = Image.fromarray(values.astype(np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(smooth, dtype=np.float64), 0, 1)
    colours = np.stack([np.interp(values, _HEAT, _COLOURS[:, channel]) for channel in range(3)], axis=-1)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    weight = strength * values[..., None]
    return Image.fromarray(np.clip((1 - weight) * pixels + weight * colours, 0, 255).astype(np.uint8))


__all__ = ["GroundingOutput", "contrastive_grounding", "heat_picture", "matching_grounding"]
