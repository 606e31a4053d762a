"""EVA-CLIP (Sun et al., 2303.15389) with the plain EVA-01 image tower that BLIP-2 freezes.

The image tower is `Blip2VisionModel` of transformers, name for name, so that `model.vision_model` moves into a BLIP-2
as it is; the text tower is `CLIPTextModel`. The class token after the final norm embeds an image.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2VisionModel, CLIPTextModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_eva_clip import EvaCLIPConfig


@dataclass
class EvaCLIPOutput(ModelOutput):
    """
    Args:
        loss (`Tensor`, *optional*): symmetric cross-entropy of this batch alone, with `return_loss=True`.
        logits_per_image (`Tensor` of shape `(images, texts)`): cosines times the inverse temperature.
        logits_per_text (`Tensor` of shape `(texts, images)`): its transpose.
        text_embeds (`Tensor` of shape `(texts, projection_dim)`): unit vectors.
        image_embeds (`Tensor` of shape `(images, projection_dim)`): unit vectors.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


@dataclass(frozen=True)
class ImageEmbeds:
    """Images ready for comparison.

    Attributes:
        itc: unit vectors `(images, dim)`.
        states: what matching needs of each image; a dual encoder has none.
    """

    itc: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.itc)

    def __getitem__(self, index: Tensor | slice) -> "ImageEmbeds":
        return ImageEmbeds(self.itc[index], None if self.states is None else self.states[index])


def trim_texts(input_ids: Tensor, attention_mask: Tensor | None, eos_token_id: int) -> tuple[Tensor, Tensor | None]:
    """Cuts the columns behind the last end token; exact, as attention is causal and the end token's state is pooled.

    Raises:
        ValueError: a text has no end token, or the mask hides it.
    """
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
        raise ValueError(
            f"input_ids: texts {bad.nonzero()[:8, 0].tolist()} of this batch have no visible end token (id "
            f"{eos_token_id}), which is the one that the text tower pools. Tokenize with special tokens and "
            "truncation, and check that the tokenizer's eos_token_id is config.text_config.eos_token_id."
        )
    return input_ids[:, :length], attention_mask[:, :length] if any_hidden else None


def normalize(features: Tensor) -> Tensor:
    """Unit vectors along the last axis, computed in float32 at least, whatever the autocast dtype."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / features.norm(dim=-1, keepdim=True)


class EvaCLIPPreTrainedModel(PreTrainedModel):
    config_class = EvaCLIPConfig
    base_model_prefix = "eva_clip"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Blip2EncoderLayer", "CLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, EvaCLIPModel):
            return
        factor = self.config.initializer_factor
        init.constant_(module.logit_scale, self.config.logit_scale_init_value)
        init.normal_(module.visual_projection.weight, std=factor * module.visual_projection.in_features**-0.5)
        init.normal_(module.text_projection.weight, std=factor * module.text_projection.in_features**-0.5)
        # Text tower as in the original CLIP (2103.00020, section 2.4); transformers swaps two of these scales.
        text = module.text_model
        width, depth = text.config.hidden_size, text.config.num_hidden_layers
        init.normal_(text.embeddings.position_embedding.weight, std=factor * 0.01)
        for layer in text.encoder.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                init.normal_(projection.weight, std=factor * width**-0.5)
            for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
                init.normal_(projection.weight, std=factor * width**-0.5 * (2 * depth) ** -0.5)
            init.normal_(layer.mlp.fc1.weight, std=factor * (2 * width) ** -0.5)
        # EVA's towers scale each block's last projections down by its depth.
        vision = module.vision_model
        std = vision.config.initializer_range
        for index, layer in enumerate(vision.encoder.layers, start=1):
            for projection in (layer.self_attn.projection, layer.mlp.fc2):
                init.normal_(projection.weight, std=std * (2 * index) ** -0.5)


class EvaCLIPModel(EvaCLIPPreTrainedModel):
    """Dual encoder for retrieval and zero-shot classification.

    Submodules: `vision_model` (`Blip2VisionModel`), `text_model` (`CLIPTextModel`), `visual_projection`,
    `text_projection`, `logit_scale`.
    """

    supports_matching = False
    # A saved folder carries this file, for machines without hf_vlp.
    _auto_class = "AutoModel"

    def __init__(self, config: EvaCLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.text_model = CLIPTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(
            config.vision_config.hidden_size, config.projection_dim, bias=config.vision_projection_bias
        )
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @property
    def pooled_token_id(self) -> int:
        """Id of the token whose state embeds a text."""
        return self.text_model.eos_token_id

    def pooled_states(self, pixel_values: Tensor) -> Tensor:
        """Class tokens after the final norm `(images, hidden)`: what `image_embeds` stands for, and a cache keeps."""
        # Not `pooler_output`, to which the native tower applies the final norm a second time.
        return self.vision_model(pixel_values).last_hidden_state[:, 0]

    def image_features(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """Projected image features `(images, dim)`, not normalised, from pixels or from class tokens after the norm.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("give either pixel_values or image_embeds (the vision tower's class token), not both")
        if image_embeds is None:
            image_embeds = self.pooled_states(pixel_values)
        # A cache keeps half precision.
        return self.visual_projection(image_embeds.to(self.visual_projection.weight.dtype))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features `(texts, dim)`, not normalised; columns of padding are cut.

        Raises:
            ValueError: a text has no end token.
        """
        input_ids, attention_mask = trim_texts(input_ids, attention_mask, self.pooled_token_id)
        return self.text_projection(self.text_model(input_ids, attention_mask=attention_mask).pooler_output)

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Tower states, and in `pooler_output` the projected features."""
        states = self.vision_model(pixel_values).last_hidden_state
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.visual_projection(states[:, 0]))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutputWithPooling:
        """Tower states, and in `pooler_output` the projected features."""
        outputs = self.text_model(input_ids, attention_mask=attention_mask)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Embeds images given as pixels `(images, 3, height, width)` or as the tower's class tokens."""
        return ImageEmbeds(normalize(self.image_features(pixel_values, image_embeds)))

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeds texts: ids `(texts, length)` to unit vectors `(texts, dim)`."""
        return normalize(self.text_features(input_ids, attention_mask))

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosines `(images, texts)` in float32."""
        itc = images if isinstance(images, Tensor) else images.itc
        return itc.float() @ text_itc.float().T

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> EvaCLIPOutput | tuple[Tensor, ...]:
        """Compares every image with every text of the batch."""
        image_embeds = self.embed_images(pixel_values).itc
        text_embeds = self.embed_texts(input_ids, attention_mask)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()
        loss = None
        if return_loss:
            target = torch.arange(len(logits_per_text), device=logits_per_text.device)
            loss = (
                nn.functional.cross_entropy(logits_per_text, target)
                + nn.functional.cross_entropy(logits_per_text.T, target)
            ) / 2
        output = EvaCLIPOutput(loss, logits_per_text.T, logits_per_text, text_embeds, image_embeds)
        return output.to_tuple() if return_dict is False else output

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; the folder also opens as a zero-shot classifier."""
        reference = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
        auto_map = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = auto_map | {"AutoModelForZeroShotImageClassification": reference}
        super().save_pretrained(save_directory, **kwargs)


__all__ = ["EvaCLIPModel", "EvaCLIPPreTrainedModel"]
