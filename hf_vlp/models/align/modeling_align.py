"""ALIGN (Jia et al., 2102.05918): the class of transformers, able to retrieve and to train.

What it saves is native: `transformers.AlignModel` opens it, and this class opens every public `align` checkpoint.
"""

import torch
import transformers
from torch import Tensor, nn
from transformers import AlignConfig, AlignVisionConfig
from transformers import initialization as init
from transformers.models.align.modeling_align import round_filters

from hf_vlp.models.clip.retrieval_clip import DualEncoderRetrieval, require_one


def image_width(config: AlignVisionConfig) -> int:
    """Channels in which the image tower ends, which must be the `projection_dim` of the whole model."""
    return round_filters(config, config.out_channels[-1])


class AlignModel(DualEncoderRetrieval, transformers.AlignModel):
    """`transformers.AlignModel` with the retrieval protocol.

    `forward`, `get_image_features` and `get_text_features` are the native ones. The learned `temperature` divides
    cosines, where CLIP's `logit_scale` multiplies them.

    Raises:
        ValueError: `projection_dim` is not the width in which the image tower ends.
    """

    def __init__(self, config: AlignConfig) -> None:
        super().__init__(config)
        width = image_width(config.vision_config)
        if width != config.projection_dim:
            raise ValueError(
                f"config.projection_dim is {config.projection_dim}, but vision_config ends in {width} "
                f"channels, which ALIGN does not project; set projection_dim={width}"
            )
        # Differs from transformers, which hands the original's decay of 0.99 to torch as a momentum, where it means
        # the weight of the new batch: running statistics would be those of the last batch alone.
        for module in self.vision_model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1 - config.vision_config.batch_norm_momentum

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # Differs from transformers, whose 0.02 everywhere lets the signal die out: EfficientNet's own rule
            # (1905.11946), where a depthwise kernel counts as one output channel.
            for layer in self.vision_model.modules():
                if isinstance(layer, nn.Conv2d):
                    fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
                    init.normal_(layer.weight, std=(2 / fan_out) ** 0.5)

    def pooled_states(self, pixel_values: Tensor) -> Tensor:
        """The image tower's pooled output `(images, dim)`: what `image_embeds` stands for, and a cache keeps."""
        return self.vision_model(pixel_values).pooler_output

    def image_features(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """Pooled image features `(images, dim)`, not normalised; ALIGN has no projection on the image side.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        require_one(pixel_values, image_embeds)
        return self.pooled_states(pixel_values) if image_embeds is None else image_embeds

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected state of the first token `(texts, dim)`, not normalised; columns that all rows pad are cut."""
        if attention_mask is not None:
            used = attention_mask.any(dim=0).int()
            length = int((used * torch.arange(1, len(used) + 1, device=used.device)).max())
            input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
        states = self.text_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.text_projection(states[:, 0])


__all__ = ["AlignModel", "image_width"]
