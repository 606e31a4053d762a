"""Configuration of BLIP-2 on any vision model of transformers."""

from typing import Any, Literal

from transformers import AutoConfig, Blip2Config, Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec, strict


@strict
class Blip2AnyVisionConfig(Blip2Config):
    r"""Configuration of [`Blip2AnyVisionForImageTextRetrieval`] and [`Blip2AnyVisionForConditionalGeneration`].

    The native `blip-2` type holds one kind of vision tower, EVA-ViT. This type holds any that `AutoModel` can make;
    the rest is the native config.

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*): of the tower, as deep as it is used: BLIP-2 leaves
            out the last block of a CLIP tower, so `num_hidden_layers` is one less than the published one.
        vision_output (`str`, defaults to `"last_layer"`): `"last_layer"` takes what the last block gives, before any
            final norm of the tower, class token included; `"last_hidden_state"` takes the tower's own output, for
            towers that are no plain stack of blocks (Swin).
        vision_layer_norm_eps (`float`, defaults to 1e-5): of the trained LayerNorm behind the frozen tower.
    """

    model_type = "blip2_any_vision"
    # A saved folder carries this file, for machines without hf_vlp.
    _auto_class = "AutoConfig"
    attribute_map = {"image_token_id": "image_token_index"}
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt"),
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "qformer_config": Blip2QFormerConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_output: Literal["last_layer", "last_hidden_state"] = "last_layer"
    vision_layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        try:
            super().__post_init__(**kwargs)
        except AttributeError as error:
            if "hidden_size" not in str(error):
                raise
            raise ValueError(
                f"a vision tower of type {self.vision_config.model_type!r} does not say its `hidden_size`, which the "
                "Q-Former must know"
            ) from error


__all__ = ["Blip2AnyVisionConfig"]
