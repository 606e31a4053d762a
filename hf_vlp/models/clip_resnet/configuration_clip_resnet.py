"""Configuration of CLIP with a ResNet image tower."""

from typing import Any

from transformers import CLIPTextConfig, PreTrainedConfig
from transformers.configuration_utils import strict

# Published models (2103.00020, table 19): image tower, joint width, and text tower.
PRESETS: dict[str, dict[str, Any]] = {
    "RN50": {"layers": [3, 4, 6, 3], "width": 64, "image_size": 224, "projection_dim": 1024, "text_width": 512},
    "RN101": {"layers": [3, 4, 23, 3], "width": 64, "image_size": 224, "projection_dim": 512, "text_width": 512},
    "RN50x4": {"layers": [4, 6, 10, 6], "width": 80, "image_size": 288, "projection_dim": 640, "text_width": 640},
    "RN50x16": {"layers": [6, 8, 18, 8], "width": 96, "image_size": 384, "projection_dim": 768, "text_width": 768},
    "RN50x64": {
        "layers": [3, 15, 36, 10],
        "width": 128,
        "image_size": 448,
        "projection_dim": 1024,
        "text_width": 1024,
    },
}


@strict
class CLIPResNetVisionConfig(PreTrainedConfig):
    r"""Configuration of [`CLIPResNetVisionModel`].

    Args:
        layers (`list[int]`, defaults to that of ResNet-50): bottleneck blocks of each of the four stages.
        width (`int`, defaults to 64): channels of the stem; the last stage has 32 times as many.
        num_attention_heads (`int`, *optional*): of the attention pooling, by default one for 64 channels.
        image_size (`int`, defaults to 224): side in pixels, a multiple of 32.
        num_channels (`int`, defaults to 3): of the input.
        projection_dim (`int`, defaults to 1024): width of the pooled output, which is the joint space.
        initializer_factor (`float`, defaults to 1.0): scales the random start of the attention pooling.
    """

    model_type = "clip_resnet_vision_model"
    base_config_key = "vision_config"

    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int | None = None
    image_size: int = 224
    num_channels: int = 3
    projection_dim: int = 1024
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        self.layers = list(self.layers)
        if self.num_attention_heads is None:
            self.num_attention_heads = max(self.width * 32 // 64, 1)
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last feature map."""
        return self.width * 32

    def validate_architecture(self) -> None:
        """Raises `ValueError` for sizes that do not fit together."""
        if len(self.layers) != 4:
            raise ValueError(f"layers must name four stages, not {self.layers}")
        if self.image_size % 32:
            raise ValueError(f"image_size must be a multiple of 32, not {self.image_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} does not divide {self.hidden_size}")


@strict
class CLIPResNetConfig(PreTrainedConfig):
    r"""Configuration of [`CLIPResNetModel`].

    Args:
        vision_config (`CLIPResNetVisionConfig` or `dict`, *optional*): image tower; its `projection_dim` is
            replaced by the one here.
        text_config (`CLIPTextConfig` or `dict`, *optional*): text tower.
        projection_dim (`int`, defaults to 1024): width of the joint space.
        logit_scale_init_value (`float`, defaults to 2.6592): logarithm of the initial inverse temperature, ln(1/0.07).
        initializer_factor (`float`, defaults to 1.0): scales the random start of the text tower and its projection.
    """

    model_type = "clip_resnet"
    # A saved folder carries this file, for machines without hf_vlp.
    _auto_class = "AutoConfig"
    sub_configs_defaults = {"vision_config": CLIPResNetVisionConfig, "text_config": CLIPTextConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 1024
    logit_scale_init_value: float | int = 2.6592
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.vision_config.projection_dim = self.projection_dim

    @classmethod
    def preset(cls, name: str, **kwargs: Any) -> "CLIPResNetConfig":
        """The configuration of a published model: `"RN50"`, `"RN101"`, `"RN50x4"`, `"RN50x16"` or `"RN50x64"`.

        Args:
            name: of the model.
            kwargs: override whole fields; `text_config` entries are merged into the preset's.

        Raises:
            ValueError: unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {sorted(PRESETS)}")
        sizes = PRESETS[name]
        width = sizes["text_width"]
        text = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
        text |= kwargs.pop("text_config", {})
        vision = {key: sizes[key] for key in ("layers", "width", "image_size")}
        fields = {"vision_config": vision, "projection_dim": sizes["projection_dim"], **kwargs}
        return cls(text_config=text, **fields)


__all__ = ["CLIPResNetConfig", "CLIPResNetVisionConfig"]
