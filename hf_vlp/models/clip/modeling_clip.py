"""CLIP with a ViT image tower (Radford et al., 2103.00020): the class of transformers, able to retrieve.

What it saves is native: `transformers.CLIPModel` opens it, and this class opens every public `clip` checkpoint.
"""

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPTextModel, CLIPVisionModel

from hf_vlp.models.clip.initialization_clip import initialize_text_tower, initialize_vision_tower
from hf_vlp.models.clip.retrieval_clip import DualEncoderRetrieval, require_one, trim_texts
from hf_vlp.models.loading import load_backbone

# Configs from before transformers 4.31 carry this wrong id; native code pools the highest id of the row for them.
LEGACY_EOS_TOKEN_ID = 2


class CLIPModel(DualEncoderRetrieval, transformers.CLIPModel):
    """`transformers.CLIPModel` with the retrieval protocol and a start from scratch as in the original code.

    `forward`, `get_image_features` and `get_text_features` are the native ones. `embed_texts` computes no padding.
    """

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            factor = self.config.initializer_factor
            initialize_text_tower(self.text_model, factor)
            initialize_vision_tower(self.vision_model, factor)

    @property
    def pooled_token_id(self) -> int | None:
        """Id of the token whose state embeds a text; None where the highest id of each row is taken."""
        return pooled_token_id(self.text_model)

    def pooled_states(self, pixel_values: Tensor) -> Tensor:
        """The image tower's pooled output `(images, hidden)`: what `image_embeds` stands for, and a cache keeps."""
        return self.vision_model(pixel_values).pooler_output

    def image_features(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """Projected image features `(images, dim)`, not normalised, from pixels or from pooled tower outputs.

        Raises:
            ValueError: not exactly one of the two is given.
        """
        require_one(pixel_values, image_embeds)
        if image_embeds is None:
            image_embeds = self.pooled_states(pixel_values)
        # A cache keeps half precision.
        return self.visual_projection(image_embeds.to(self.visual_projection.weight.dtype))

    def text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projected text features `(texts, dim)`, not normalised. Equal to native ones; columns of padding are cut.

        Raises:
            ValueError: a text has no end token.
        """
        input_ids, attention_mask = trim_texts(input_ids, attention_mask, self.pooled_token_id)
        return self.text_projection(self.text_model(input_ids, attention_mask=attention_mask).pooler_output)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str | None = None,
        *,
        text_config: transformers.CLIPTextConfig | None = None,
        projection_dim: int | None = None,
    ) -> "CLIPModel":
        """A CLIP whose towers come from checkpoints and whose projections are new.

        Args:
            vision: folder or Hub id with a CLIP vision tower (`clip` or `clip_vision_model`).
            text: the same for the text tower; None draws a text tower of `text_config` (locked-image tuning).
            text_config: sizes of a new text tower; ignored where `text` is given.
            projection_dim: width of the joint space, by default the vision checkpoint's.

        Raises:
            MissingWeightsError: a checkpoint lacks weights of its tower, as one of another type does.
        """
        vision_model = load_backbone(CLIPVisionModel, vision, dtype=torch.float32)
        text_model = None if text is None else load_backbone(CLIPTextModel, text, dtype=torch.float32)
        config = CLIPConfig(
            vision_config=vision_model.config.to_dict(),
            text_config=(text_model.config if text_model else text_config or transformers.CLIPTextConfig()).to_dict(),
            projection_dim=projection_dim or vision_model.config.projection_dim,
        )
        model = cls(config)
        model.vision_model.load_state_dict(vision_model.state_dict())
        if text_model is not None:
            model.text_model.load_state_dict(text_model.state_dict())
        return model


def pooled_token_id(text_model: CLIPTextModel) -> int | None:
    """Id of the token that a CLIP text tower pools; None where it pools the highest id of each row."""
    eos_token_id = text_model.eos_token_id
    return None if eos_token_id == LEGACY_EOS_TOKEN_ID else eos_token_id


__all__ = ["CLIPModel", "pooled_token_id"]
