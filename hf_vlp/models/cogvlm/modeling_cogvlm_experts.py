"""The visual expert (arXiv 2311.03079, section 2.1, equations 1 to 5), and the way of a batch's tokens through it.

Every layer of the language model has a second set of projections and a second MLP for image tokens; the attention
between all tokens is one. The tokens of a batch are put in order once, image tokens first and padding left out, and
stay so through all layers: each set of matrices gets a slice of them. Only the attention sees the grid of the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

_IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ImageTokenError(ValueError):
    """The image tokens of a batch do not fit its images."""


class _ToGrid(torch.autograd.Function):
    """Rows in computing order to the rows of the grid, padding filled with any row."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, place)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        # Nothing reads the padding, so nothing flows back from it; each token stands at one place of the grid.
        return grad.index_select(0, order), None, None


class _FromGrid(torch.autograd.Function):
    """Rows of the grid to the rows in computing order."""

    @staticmethod
    def forward(ctx: FunctionCtx, grid: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        ctx.rows = grid.shape[0]
        return grid.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        full = order.shape[0] == ctx.rows
        grid = grad.new_empty(ctx.rows, grad.shape[1]) if full else grad.new_zeros(ctx.rows, grad.shape[1])
        return grid.index_copy_(0, order, grad), None


@dataclass
class Route:
    """Which tokens of a batch (B, L) are computed, and by which expert.

    Attributes:
        shape: (B, L).
        order: (N,) place in the flat grid of each computed token: those of the visual expert, then the others, each
            in reading order.
        place: (B * L,) row among the computed tokens of each place of the grid; 0 for padding.
        visual: number of tokens of the visual expert.
        images: (I, K) places of each image's tokens.
        tokens: (B, L) bool, False at padding.
    """

    shape: tuple[int, int]
    order: Tensor
    place: Tensor
    visual: int
    images: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, token_types: Tensor, tokens: Tensor, tokens_per_image: int) -> "Route":
        """Finds the images of a batch.

        An image's last token, its end, goes through the language model's matrices, as in the original.

        Args:
            token_types: (B, L), 1 at image tokens.
            tokens: (B, L) bool, False at padding.
            tokens_per_image: K.

        Raises:
            ImageTokenError: image tokens that do not come in runs of `tokens_per_image`.
        """
        batch, length = token_types.shape
        at = ((token_types == 1) & tokens).flatten().nonzero()[:, 0]
        count = tokens_per_image
        whole = at.shape[0] % count == 0
        images = at.view(-1, count) if whole else at
        if whole and images.shape[0]:
            whole = bool(
                ((images[:, -1] - images[:, 0] == count - 1) & (images[:, 0] % length + count <= length)).all()
            )
        if not whole:
            rows = (at // length).bincount(minlength=batch).tolist()
            wrong = [row for row, found in enumerate(rows) if found % count] or list(range(batch))
            raise ImageTokenError(
                f"an image takes {count} consecutive image tokens, but row {wrong[0]} of the batch has "
                f"{rows[wrong[0]]}; take the processor saved with this model, and do not cut through an image"
            )
        visual = torch.zeros(batch * length, dtype=torch.bool, device=token_types.device)
        visual[images[:, :-1].flatten()] = True
        others = (tokens.flatten() & ~visual).nonzero()[:, 0]
        seen = images[:, :-1].flatten()
        order = torch.cat([seen, others])
        place = torch.zeros(batch * length, dtype=torch.long, device=order.device)
        place[order] = torch.arange(order.shape[0], device=order.device)
        return cls((batch, length), order, place, seen.shape[0], images, tokens)

    def to_grid(self, rows: Tensor) -> Tensor:
        """(N, W) to (B, L, W); what stands at padding is finite and means nothing."""
        return _ToGrid.apply(rows, self.order, self.place).view(*self.shape, -1)

    def from_grid(self, grid: Tensor) -> Tensor:
        """(B, L, W) to (N, W)."""
        return _FromGrid.apply(grid.reshape(-1, grid.shape[-1]), self.order)

    def positions(self, sequence_ids: Tensor | None = None) -> Tensor:
        """(B, L) rotary positions: an image's features share one, between those of its begin and its end.

        Counting starts at 0 with the first place of a row; padding does not count. As in the original, a row padded
        on the left starts at 1, which rotary attention does not notice.

        Args:
            sequence_ids: (B, L) number of the conversation in a packed row; counting starts anew with each.
        """
        steps = self.tokens.flatten().long()
        steps[self.images[:, 2:-1].flatten()] = 0
        steps = steps.view(self.shape)
        steps[:, 0] = 0
        counted = steps.cumsum(dim=1)
        if sequence_ids is None:
            return counted
        begins = torch.zeros_like(self.tokens)
        begins[:, 0] = True
        begins[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
        # Counts never fall, so the count at the last begin is the largest one so far.
        return counted - torch.where(begins, counted, 0).cummax(dim=1).values

    def visual_mask(self) -> Tensor:
        """(B, L) bool, True where the visual expert computes."""
        mask = torch.zeros(self.shape[0] * self.shape[1], dtype=torch.bool, device=self.order.device)
        mask[self.order[: self.visual]] = True
        return mask.view(self.shape)


def block_mask(
    tokens: Tensor,
    sequence_ids: Tensor | None,
    past: int,
    keys_mask: Tensor | None,
    window: int | None,
    eager_dtype: torch.dtype | None,
) -> Tensor | None:
    """Who looks at whom: (B, 1, L, past + L), or None where plain causal attention says it all.

    Args:
        tokens: (B, L) bool, False at padding.
        sequence_ids: (B, L) of packed rows; a token sees its own conversation only.
        past: tokens in the cache.
        keys_mask: (B, past + L) bool, False at padding; None: all tokens are real.
        window: a token sees this many tokens at most, itself included; None for all.
        eager_dtype: give an additive mask of this dtype rather than a bool one.
    """
    length = tokens.shape[1]
    if keys_mask is not None and past == 0:
        # Padding behind all tokens is out of their sight anyway.
        trailing = not bool((keys_mask[:, 1:] & ~keys_mask[:, :-1]).any()) and bool(keys_mask[:, 0].all())
        keys_mask = None if trailing else keys_mask
    windowed = window is not None and past + length > window
    if sequence_ids is None and keys_mask is None and past == 0 and not windowed and eager_dtype is None:
        return None
    rows = torch.arange(past, past + length, device=tokens.device)[:, None]
    columns = torch.arange(past + length, device=tokens.device)[None]
    mask = columns <= rows
    if windowed:
        mask = mask & (columns > rows - window)
    mask = mask[None]
    if keys_mask is not None:
        mask = mask & keys_mask[:, None]
    if sequence_ids is not None:
        mask = mask & (sequence_ids[:, :, None] == sequence_ids[:, None, :])
    # Padding sees itself, so that no row of the softmax is empty.
    mask = (mask | (columns == rows)[None])[:, None]
    if eager_dtype is None:
        return mask
    return torch.zeros(mask.shape, dtype=eager_dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(eager_dtype).min
    )


def sliding_window_of(attention: nn.Module) -> int | None:
    """How many tokens an attention of the language model sees, None for all."""
    if attention.config.model_type == "mistral":
        return attention.config.sliding_window
    return getattr(attention, "sliding_window", None)


def _same_shape(layer: nn.Module, bias: bool | None = None) -> nn.Linear:
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None if bias is None else bias)


class CogVLMVisualExpert(GradientCheckpointingLayer):
    """The second matrices of one layer of the language model.

    Args:
        layer: of the language model; the expert's matrices have its shapes.
        qkv_bias: give query, key and value biases even where the language model has none.
    """

    def __init__(self, layer: nn.Module, qkv_bias: bool = False) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        for name in _IN_PROJECTIONS:
            setattr(self, name, _same_shape(getattr(attention, name), bias=True if qkv_bias else None))
        self.o_proj = _same_shape(attention.o_proj)
        for name in _MLP_PROJECTIONS:
            setattr(self, name, _same_shape(getattr(mlp, name)))
        self.activation = mlp.act_fn if isinstance(mlp.act_fn, nn.Module) else ACT2FN["silu"]

    @torch.no_grad()
    def copy_language(self, layer: nn.Module) -> None:
        """Takes over the language model's weights, as at the start of the paper's training."""
        for owner, names in ((layer.self_attn, (*_IN_PROJECTIONS, "o_proj")), (layer.mlp, _MLP_PROJECTIONS)):
            for name in names:
                source, own = getattr(owner, name), getattr(self, name)
                own.weight.copy_(source.weight)
                if own.bias is not None and source.bias is None:
                    own.bias.zero_()
                elif own.bias is not None:
                    own.bias.copy_(source.bias)

    def attention(
        self,
        states: Tensor,
        language: nn.Module,
        route: Route,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """One attention of all tokens to all, with projections by expert (equations 2 and 3): (N, D) to (N, D)."""
        seen, read = states[: route.visual], states[route.visual :]
        heads = []
        for name in _IN_PROJECTIONS:
            rows = _joined(_apply(getattr(self, name), seen), getattr(language, name)(read))
            heads.append(route.to_grid(rows).unflatten(-1, (-1, language.head_dim)))
        for index, name in ((0, "q_norm"), (1, "k_norm")):
            if hasattr(language, name):
                heads[index] = getattr(language, name)(heads[index])
        query, key, value = (one.transpose(1, 2) for one in heads)
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, language.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(language.config._attn_implementation, eager_attention_forward)
        mixed, _ = attend(
            language,
            query,
            key,
            value,
            mask,
            dropout=language.attention_dropout if self.training else 0.0,
            scaling=language.scaling,
            sliding_window=sliding_window_of(language),
        )
        mixed = route.from_grid(mixed.reshape(*route.shape, -1))
        seen, read = mixed[: route.visual], mixed[route.visual :]
        return _joined(_apply(self.o_proj, seen), language.o_proj(read))

    def mlp(self, states: Tensor, language: nn.Module, route: Route) -> Tensor:
        """The gated MLP of each token's expert (equation 4): (N, D) to (N, D)."""
        seen, read = states[: route.visual], states[route.visual :]
        gated = self.activation(_apply(self.gate_proj, seen)) * _apply(self.up_proj, seen)
        return _joined(_apply(self.down_proj, gated), language(read))

    def forward(
        self,
        states: Tensor,
        layer: nn.Module,
        route: Route,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """One layer: (N, D) tokens in the order of `route` to (N, D).

        Args:
            layer: the language model's.
            rotary: cosines and sines (B, L, head_dim) of the grid.
            mask: from `block_mask`, or a padding mask (B, keys) for flash attention.
        """
        normed = layer.input_layernorm(states)
        states = states + self.attention(normed, layer.self_attn, route, rotary, mask, past_key_values)
        return states + self.mlp(layer.post_attention_layernorm(states), layer.mlp, route)


def _apply(layer: nn.Module, rows: Tensor) -> Tensor:
    """A trained float32 matrix on the rows of a language model that is kept in 16 bits."""
    weight = getattr(layer, "weight", None)
    if weight is None or weight.dtype == rows.dtype or torch.is_autocast_enabled(rows.device.type):
        return layer(rows)
    return layer(rows.to(weight.dtype)).to(rows.dtype)


def _joined(seen: Tensor, read: Tensor) -> Tensor:
    return torch.cat([seen.to(read.dtype), read])


__all__ = ["CogVLMVisualExpert", "ImageTokenError", "Route", "block_mask", "sliding_window_of"]
