"""Configuration of EVA-CLIP."""

from typing import Any

from transformers import Blip2VisionConfig, CLIPTextConfig, PreTrainedConfig
from transformers.configuration_utils import strict

# Published models: image tower, text tower, joint width.
PRESETS: dict[str, dict[str, Any]] = {
    "EVA01-g-14": {
        "vision_config": {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 40},
        "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        "projection_dim": 1024,
    },
}


@strict
class EvaCLIPConfig(PreTrainedConfig):
    r"""Configuration of [`EvaCLIPModel`].

    Args:
        vision_config (`Blip2VisionConfig` or `dict`, *optional*): image tower. Its native `initializer_range` of 1e-10
            leaves a tower from scratch without any signal, so a value below 1e-6 is replaced by 0.02.
        text_config (`CLIPTextConfig` or `dict`, *optional*): text tower.
        projection_dim (`int`, defaults to 512): width of the joint space.
        vision_projection_bias (`bool`, defaults to `True`): the published image towers end in a linear head with bias.
        logit_scale_init_value (`float`, defaults to 2.6592): logarithm of the initial inverse temperature, ln(1/0.07).
        initializer_factor (`float`, defaults to 1.0): scales the random start of the text tower and the projections.
    """

    model_type = "eva_clip"
    # A saved folder carries this file, for machines without hf_vlp.
    _auto_class = "AutoConfig"
    sub_configs_defaults = {"vision_config": Blip2VisionConfig, "text_config": CLIPTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 512
    vision_projection_bias: bool = True
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vision_config.initializer_range < 1e-6:
            self.vision_config.initializer_range = 0.02

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> "EvaCLIPConfig":
        """The configuration of a published model.

        Args:
            name: `"EVA01-g-14"`.
            kwargs: override whole fields; entries of `vision_config` and `text_config` are merged into the preset's.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {sorted(PRESETS)}")
        fields = dict(PRESETS[name])
        for part in ("vision_config", "text_config"):
            fields[part] = fields[part] | kwargs.pop(part, {})
        return cls(**(fields | kwargs))


__all__ = ["EvaCLIPConfig"]
