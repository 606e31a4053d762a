"""Qwen-VL's eyes: a ViT without class token and the position-aware cross-attention resampler (section 2.1)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_qwen_vl import QwenVLVisionConfig


def sine_table(dim: int, grid: int) -> Tensor:
    """Fixed 2-D positions of a square grid: (grid * grid, dim), float32, row by row.

    The first half of the channels encodes the column, the second the row; each half is the sines of dim / 4
    frequencies and then their cosines.
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (grid, dim / 2)
    columns = line[None].expand(grid, -1, -1)
    rows = line[:, None].expand(-1, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(grid * grid, dim)


def resize_grid(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table (S * S, D) for another grid of patches (rows, columns): bicubic in float32."""
    side = math.isqrt(len(table))
    if (side, side) == tuple(grid):
        return table
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.to(table.dtype)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, heads: int, dropout: float) -> Tensor:
    """Attention of (B, Lq, D) to (B, Lk, D) through the attention interface of transformers: (B, Lq, D)."""

    def split(states: Tensor) -> Tensor:
        return states.unflatten(-1, (heads, -1)).transpose(1, 2)

    function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention)
    scaling = (query.shape[-1] // heads) ** -0.5
    dropout = dropout if module.training else 0.0
    output, _ = function(module, split(query), split(key), split(value), None, scaling=scaling, dropout=dropout)
    return output.flatten(2)


class QwenVLVisionAttention(nn.Module):
    """Self-attention of the patches."""

    is_causal = False

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def forward(self, states: Tensor) -> Tensor:
        mixed = attend(
            self,
            self.q_proj(states),
            self.k_proj(states),
            self.v_proj(states),
            self.config.num_attention_heads,
            self.config.attention_dropout,
        )
        return self.out_proj(mixed)


class QwenVLVisionMLP(nn.Module):
    """Feed-forward of a block."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class QwenVLVisionLayer(GradientCheckpointingLayer):
    """A block with the norms in front."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = QwenVLVisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = QwenVLVisionMLP(config)

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.self_attn(self.layer_norm1(states))
        return states + self.mlp(self.layer_norm2(states))


class QwenVLVisionTower(nn.Module):
    """The ViT: (B, 3, H, W) to (B, patches, hidden), patches row by row, no class token."""

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(config.num_positions, config.hidden_size))
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList([QwenVLVisionLayer(config) for _ in range(config.num_hidden_layers)])

    def embed(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches with their positions, normalised, (B, patches, hidden); and their rows and columns.

        Raises:
            ValueError: the image is smaller than a patch, or not (B, 3, H, W).
        """
        if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"pixel_values must be (images, 3, H, W), got {tuple(pixel_values.shape)}")
        if min(pixel_values.shape[-2:]) < self.config.patch_size:
            raise ValueError(
                f"images of {tuple(pixel_values.shape[-2:])} pixels are smaller than a patch of "
                f"{self.config.patch_size}"
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid = (patches.shape[2], patches.shape[3])
        states = patches.flatten(2).transpose(1, 2) + resize_grid(self.position_embedding, grid)
        return self.pre_layernorm(states), grid

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch states (B, patches, hidden), and the patches' rows and columns."""
        states, grid = self.embed(pixel_values)
        for layer in self.layers:
            states = layer(states)
        return states, grid


class QwenVLResampler(nn.Module):
    """One cross-attention of learned queries to the patches (B, patches, hidden) -> (B, queries, output_dim).

    Queries and keys, not values, carry the fixed 2-D positions; the keys' table is the queries', interpolated to the
    grid of patches, so that the network keeps its bearings at other resolutions.
    """

    is_causal = False

    def __init__(self, config: QwenVLVisionConfig) -> None:
        super().__init__()
        self.config = config
        dim, eps = config.output_dim, config.layer_norm_eps
        # Kept with the weights, as in the original, whose table went through the rounding of its checkpoint.
        self.register_buffer("position_table", sine_table(dim, math.isqrt(config.num_query_tokens)))
        self.query = nn.Parameter(torch.zeros(config.num_query_tokens, dim))
        same = config.hidden_size == dim
        self.kv_proj = nn.Identity() if same else nn.Linear(config.hidden_size, dim, bias=False)
        self.ln_q = nn.LayerNorm(dim, eps=eps)
        self.ln_kv = nn.LayerNorm(dim, eps=eps)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(dim, dim))
        self.post_layernorm = nn.LayerNorm(dim, eps=eps)
        self.projection = nn.Linear(dim, dim, bias=False)

    def pool(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """The cross-attention alone: (B, queries, output_dim)."""
        memory = self.ln_kv(self.kv_proj(states))
        table = self.position_table.to(memory.dtype)
        # The same for all images, so projected once.
        query = self.q_proj(self.ln_q(self.query) + table).expand(len(states), -1, -1)
        key = self.k_proj(memory + resize_grid(self.position_table, grid).to(memory.dtype))
        return self.out_proj(attend(self, query, key, self.v_proj(memory), self.config.resampler_heads, 0.0))

    def forward(self, states: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, patches, hidden) of a grid of patches (rows, columns) to (B, queries, output_dim)."""
        return self.projection(self.post_layernorm(self.pool(states, grid)))


__all__ = ["QwenVLResampler", "QwenVLVisionTower", "resize_grid", "sine_table"]
