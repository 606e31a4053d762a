"""Configuration of CogVLM (Wang et al. 2023, arXiv 2311.03079) and CogVLM2 (arXiv 2408.16500)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# Causal language models whose layers are Llama's: one norm in front of each half, rotary positions, a gated MLP.
LANGUAGE_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


class CogVLMVisionConfig(PreTrainedConfig):
    """The EVA2-CLIP image encoder; the defaults are the published models' (EVA2-CLIP-E without its last layer).

    Args:
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels. What the patches leave over at the right and at the bottom is not seen.
        dropout_prob: dropout behind each half of a layer.
    """

    model_type = "cogvlm_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1792
    intermediate_size: int = 15360
    num_hidden_layers: int = 63
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 490
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout_prob: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.image_size < self.patch_size:
            raise ValueError(f"images of {self.image_size} pixels are smaller than a patch of {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")

    @property
    def grid_size(self) -> int:
        """Whole patches along a side."""
        return self.image_size // self.patch_size


class CogVLMConfig(PreTrainedConfig):
    """Configuration of CogVLM.

    Args:
        vision_config: see `CogVLMVisionConfig`.
        text_config: of the language model, one of `LANGUAGE_MODEL_TYPES`.
        downsample: side of the square of patches that a convolution joins to one feature: 1 for CogVLM (no
            convolution), 2 for CogVLM2. The convolution leaves out patches at the edge that fill no square.
        projector_hidden_size: width inside the adapter's gated MLP; the language model's `intermediate_size` by
            default, as published.
        visual_expert_qkv_bias: the experts' query, key and value projections have biases (CogVLM2) even where the
            language model's have none.
        image_token_id: the id that stands for an image token in `input_ids` where no `token_type_ids` are given. It
            is never looked up in the embeddings, so it may lie beyond the vocabulary.
    """

    model_type = "cogvlm"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {
        "vision_config": CogVLMVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    downsample: int = 1
    projector_hidden_size: int | None = None
    visual_expert_qkv_bias: bool = False
    image_token_id: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.text_config.model_type not in LANGUAGE_MODEL_TYPES:
            raise ValueError(
                f"visual experts are made for language models of the types {list(LANGUAGE_MODEL_TYPES)}, not "
                f"{self.text_config.model_type!r}"
            )
        if not 1 <= self.downsample <= self.vision_config.grid_size:
            raise ValueError(
                f"downsample is {self.downsample}, but an image has {self.vision_config.grid_size} patches along a "
                "side"
            )
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.intermediate_size
        self.tie_word_embeddings = bool(self.text_config.tie_word_embeddings)

    @property
    def feature_size(self) -> int:
        """Side in pixels of the part of an image that becomes one feature."""
        return self.vision_config.patch_size * self.downsample

    def check_image_size(self, image_size: int) -> None:
        """Refuses a size at which the edge of an image would not be seen.

        Only for sizes that are chosen here: checkpoints may have any, and the original code computes them.

        Args:
            image_size: side in pixels.

        Raises:
            ValueError: no multiple of `feature_size`.
        """
        step = self.feature_size
        if image_size < step or image_size % step:
            raise ValueError(f"image_size {image_size} is no multiple of {step} pixels, one feature's side")

    @property
    def num_image_tokens(self) -> int:
        """Positions that an image takes: its features, and the tokens of its begin and end."""
        return (self.vision_config.grid_size // self.downsample) ** 2 + 2


__all__ = ["CogVLMConfig", "CogVLMVisionConfig"]
