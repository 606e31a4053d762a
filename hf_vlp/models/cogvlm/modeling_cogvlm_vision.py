"""EVA2-CLIP, CogVLM's image encoder, and the adapter to the language model (arXiv 2311.03079, section 2.1)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_cogvlm import CogVLMConfig, CogVLMVisionConfig


class CogVLMVisionAttention(nn.Module):
    """Self-attention of all tokens of an image; query, key and value in one matrix as in the checkpoints."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        fused = self.query_key_value(states).view(batch, length, 3, -1, self.head_dim)
        query, key, value = fused.permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(self, query, key, value, None, dropout=0.0, scaling=self.head_dim**-0.5, is_causal=False)
        return self.dense(mixed.reshape(batch, length, width))


class CogVLMVisionMLP(nn.Module):
    """Two layers with a non-linearity between them."""

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class CogVLMVisionLayer(GradientCheckpointingLayer):
    """A block whose norms stand behind its branches: x + norm(f(x))."""

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__()
        self.attention = CogVLMVisionAttention(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CogVLMVisionMLP(config)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout_prob = config.dropout_prob

    def forward(self, states: Tensor) -> Tensor:
        branch = F.dropout(self.attention(states), self.dropout_prob, self.training)
        states = states + self.input_layernorm(branch)
        branch = F.dropout(self.mlp(states), self.dropout_prob, self.training)
        return states + self.post_attention_layernorm(branch)


class CogVLMVisionModel(PreTrainedModel):
    """EVA2-CLIP without its last layer and final norm: (I, 3, H, W) to (I, 1 + patches, width), class token first."""

    config_class = CogVLMVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CogVLMVisionLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__(config)
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, kernel_size=size, stride=size)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_embedding = nn.Embedding(config.grid_size**2 + 1, config.hidden_size)
        self.layers = nn.ModuleList(CogVLMVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CogVLMVisionModel):
            init.normal_(module.class_embedding, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encodes images of the configured size.

        Raises:
            ValueError: another shape than (I, channels, image_size, image_size).
        """
        config = self.config
        expected = (config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must be (images, {', '.join(map(str, expected))}), not {tuple(pixel_values.shape)}; "
                "take the processor saved with this model, or `resize_images` for another resolution"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        states = torch.cat([first, patches], dim=1) + self.position_embedding.weight
        for layer in self.layers:
            states = layer(states)
        return states

    @torch.no_grad()
    def resize_images(self, image_size: int) -> None:
        """Interpolates the position embedding (bicubic) to images of another size, as between CogVLM's stages.

        Args:
            image_size: side in pixels, a multiple of the patch size.
        """
        if image_size % self.config.patch_size:
            raise ValueError(f"image_size {image_size} is no multiple of patch_size {self.config.patch_size}")
        old, new = self.config.grid_size, image_size // self.config.patch_size
        self.config.image_size = image_size
        table = self.position_embedding
        if new == old:
            return
        grid = table.weight[1:].T.reshape(1, -1, old, old).float()
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        weight = torch.cat([table.weight[:1], grid.flatten(2)[0].T.to(table.weight.dtype)])
        resized = nn.Embedding(len(weight), table.embedding_dim, _weight=weight)
        resized.weight.requires_grad_(table.weight.requires_grad)
        self.position_embedding = resized


class CogVLMProjector(nn.Module):
    """The adapter: image features to the language model's width, between the tokens of the image's begin and end.

    CogVLM2 first joins squares of patches by a convolution.
    """

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        seen, width, inner = (
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.projector_hidden_size,
        )
        side = config.downsample
        self.conv = nn.Conv2d(seen, seen, kernel_size=side, stride=side) if side > 1 else None
        self.linear = nn.Linear(seen, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.begin = nn.Parameter(torch.zeros(width))
        self.end = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """(I, 1 + patches, vision width) to (I, features + 2, width); the class token is not used."""
        states = states[:, 1:].to(self.linear.weight.dtype)
        if self.conv is not None:
            side = round(states.shape[1] ** 0.5)
            grid = states.transpose(1, 2).unflatten(2, (side, side))
            states = self.conv(grid).flatten(2).transpose(1, 2)
        states = F.gelu(self.norm(self.linear(states)))
        states = self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))
        ends: list[Any] = [one.to(states.dtype).expand(len(states), 1, -1) for one in (self.begin, self.end)]
        return torch.cat([ends[0], states, ends[1]], dim=1)


__all__ = ["CogVLMProjector", "CogVLMVisionModel"]
