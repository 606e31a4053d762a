"""The way through the native `BlipVisionModel` with the attention interface of transformers.

The module and its parameter names are those of transformers, whose own attention is written out; the way through it
here takes the kernel that the config names (sdpa unless asked otherwise).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.blip.modeling_blip import BlipEncoderLayer, BlipVisionModel

from hf_vlp.models.albef.modeling_albef_packing import eager_attention


@dataclass(frozen=True)
class Kernel:
    """What an attention function of transformers asks of the module that calls it.

    Attributes:
        config: has `_attn_implementation`.
        dropout: of the attention probabilities.
        scaling: of the scores.
        training: whether dropout is on.
        is_causal: whether a query sees only its past.
    """

    config: PreTrainedConfig
    dropout: nn.Dropout
    scaling: float
    training: bool
    is_causal: bool = False


def checkpointed(layer: nn.Module, step: Callable[..., Any], *arguments: Any) -> Any:
    """`step(*arguments)`, recomputed in the backward pass where gradient checkpointing is on for `layer`."""
    if layer.gradient_checkpointing and layer.training and torch.is_grad_enabled():
        return layer._gradient_checkpointing_func(step, *arguments)
    return step(*arguments)


def _block(layer: BlipEncoderLayer, hidden: Tensor) -> Tensor:
    attention = layer.self_attn
    qkv = attention.qkv(layer.layer_norm1(hidden))
    query, key, value = qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)
    kernel = Kernel(attention.config, attention.dropout, attention.scale, attention.training)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention)
    dropout = attention.dropout.p if attention.training else 0.0
    output, _ = function(kernel, query, key, value, None, dropout=dropout, scaling=attention.scale, is_causal=False)
    hidden = hidden + attention.projection(output.flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def encode_images(tower: BlipVisionModel, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
    """Images (I, 3, H, W) to all tokens after the final norm (I, K, width), the class token first.

    Raises:
        ValueError: images of another size than the tower's, without `interpolate_pos_encoding`.
    """
    size = tower.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    if pixel_values.ndim != 4:
        raise ValueError(f"pixel_values must be (images, 3, height, width), but has {tuple(pixel_values.shape)}")
    if tuple(pixel_values.shape[-2:]) != size and not interpolate_pos_encoding:
        raise ValueError(
            f"pixel_values are {tuple(pixel_values.shape[-2:])} pixels, the vision tower was made for {size}: resize "
            "the images with the model's processor, call set_image_size(), or pass interpolate_pos_encoding=True"
        )
    hidden = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    for layer in tower.encoder.layers:
        hidden = checkpointed(layer, partial(_block, layer), hidden)
    return tower.post_layernorm(hidden)
