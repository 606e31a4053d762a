"""Configuration of Qwen-VL (Bai et al. 2023, "Qwen-VL: A Versatile Vision-Language Model", arXiv 2308.12966)."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class QwenVLVisionConfig(PreTrainedConfig):
    """The vision tower and the resampler behind it.

    Args:
        hidden_size: width of the tower.
        intermediate_size: width of its feed-forward.
        num_hidden_layers: blocks.
        num_attention_heads: heads of each block.
        image_size: pixels a side that images are resized to: 224 in pretraining, 448 afterwards. Only a default of
            the processor: the network takes any size.
        patch_size: pixels a side of a patch.
        num_positions: rows of the learned position table, a square grid, interpolated to the grid of patches.
        hidden_act: activation of the tower.
        layer_norm_eps: of every LayerNorm, the resampler's included.
        attention_dropout: of the tower.
        num_query_tokens: what an image becomes, whatever its size; a square number.
        output_dim: width of the resampler; the language model's hidden size.
        resampler_heads: heads of the resampler; default: one for each 128 of `output_dim`.
    """

    model_type = "qwen_vl_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    num_positions: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    num_query_tokens: int = 256
    output_dim: int = 4096
    resampler_heads: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.resampler_heads is None:
            self.resampler_heads = max(self.output_dim // 128, 1)
        for name in ("num_positions", "num_query_tokens"):
            number = getattr(self, name)
            if round(number**0.5) ** 2 != number:
                raise ValueError(f"{name} is {number}, which is not a square: positions lie on a square grid")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.output_dim % 4 or self.output_dim % self.resampler_heads:
            raise ValueError(
                f"output_dim {self.output_dim} must be a multiple of 4 (sine and cosine of rows and columns) and of "
                f"resampler_heads {self.resampler_heads}"
            )


class QwenVLConfig(PreTrainedConfig):
    """Configuration of `QwenVLForConditionalGeneration`.

    Args:
        vision_config: see `QwenVLVisionConfig`; its `output_dim` becomes the language model's hidden size.
        text_config: any causal language model of transformers (default: Qwen2, which Qwen-7B's weights fit).
        image_start_token_id: `<img>`.
        image_end_token_id: `</img>`.
        image_token_id: `<imgpad>`, of which the processor puts `num_query_tokens` between the two. What stands there
            is not read: the features of the image take its place.
        seq_length: length that the language model was trained with. In eval mode longer inputs get Qwen's scaling
            (dynamic NTK-aware rotary base, queries times log-n). None: no scaling, whatever the language model.
        use_dynamic_ntk, use_logn_attn: which of the two.
    """

    model_type = "qwen_vl"
    _auto_class = "AutoConfig"
    sub_configs_defaults = {
        "vision_config": QwenVLVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_start_token_id: int = 151857
    image_end_token_id: int = 151858
    image_token_id: int = 151859
    seq_length: int | None = None
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        width = self.text_config.get_text_config().hidden_size
        if self.vision_config.output_dim != width:
            raise ValueError(
                f"vision_config.output_dim is {self.vision_config.output_dim}, but the language model is {width} "
                "wide: image features take the place of its word embeddings"
            )


__all__ = ["QwenVLConfig", "QwenVLVisionConfig"]
