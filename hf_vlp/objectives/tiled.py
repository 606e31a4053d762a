"""Similarity matrices that are never held: each tile is computed, reduced and dropped, and computed again in the
backward (as Inf-CL, arXiv 2410.17243, and FlashAttention do). What stays are a few numbers a row and a column.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .precision import without_autocast


class TileStatistics(NamedTuple):
    """What a softmax loss needs of the logits of each row (or of each column).

    Attributes:
        logsumexp: log of the sum of the exponentials; -inf where there is nothing to sum.
        positive: sum of the logits of the positive pairs.
        total: sum of all logits; None unless asked for.
    """

    logsumexp: Tensor
    positive: Tensor
    total: Tensor | None


def scores(images: Tensor, texts: Tensor) -> Tensor:
    """Similarity of every image and every text; with several features an image, that of its nearest one.

    Args:
        images: `(M, D)` or `(M, Q, D)`.
        texts: `(N, D)`.

    Returns:
        `(M, N)`.
    """
    if images.dim() == 2:
        return images @ texts.t()
    return _query_scores(images, texts).max(dim=1).values


def _query_scores(images: Tensor, texts: Tensor) -> Tensor:
    count, queries, width = images.shape
    return (images.reshape(count * queries, width) @ texts.t()).view(count, queries, texts.shape[0])


def _scaled_scores(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """`scale * scores(images, texts)` in memory of its own, and which query was the nearest."""
    if images.dim() == 2:
        return (images * scale) @ texts.t(), None
    nearest = _query_scores(images, texts).max(dim=1)
    return nearest.values.mul_(scale), nearest.indices


def tiled_statistics(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    tile_size: int,
    *,
    rows: bool = True,
    columns: bool = True,
    totals: bool = False,
) -> tuple[TileStatistics | None, TileStatistics | None]:
    """Row and column statistics of `scale * scores(images, texts)`, in tiles of `tile_size` x `tile_size`.

    Extra memory is a few tiles (times Q) plus some numbers a row and a column; the tiles are computed once in the
    forward and once again in the backward, for 4/3 of the multiplications of the dense form.

    Args:
        images: `(M, D)` or `(M, Q, D)`.
        texts: `(N, D)`.
        scale: scalar.
        image_ids: `(M,)` integers; a pair of equal ids is positive.
        text_ids: `(N,)`.
        rows: whether statistics of each image over the texts are wanted.
        columns: the same for each text over the images.
        totals: whether the sums of all logits are wanted.

    Returns:
        Statistics over each row, and over each column; None where not wanted.
    """
    if tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}")
    flat = _TiledStatistics.apply(images, texts, scale, image_ids, text_ids, tile_size, rows, columns, totals)
    return (
        TileStatistics(*flat[:3]) if rows else None,
        TileStatistics(*flat[3:]) if columns else None,
    )


def _tiles(count: int, tile: int) -> Iterator[slice]:
    for start in range(0, count, tile):
        yield slice(start, min(start + tile, count))


class _Ranges:
    """Smallest and largest id of each tile, to skip the comparison of tiles that can have no positive pair."""

    def __init__(self, ids: Tensor, tile: int) -> None:
        self.bounds = {s.start: (int(ids[s].min()), int(ids[s].max())) for s in _tiles(len(ids), tile)}

    def meet(self, start: int, other: "_Ranges", other_start: int) -> bool:
        (low, high), (other_low, other_high) = self.bounds[start], other.bounds[other_start]
        return low <= other_high and other_low <= high


class _Accumulator:
    """Statistics over one axis, tile by tile, with a running maximum so that nothing overflows."""

    def __init__(self, count: int, like: Tensor, totals: bool) -> None:
        self.maximum = like.new_full((count,), -torch.inf)
        self.sum = like.new_zeros(count)
        self.positive = like.new_zeros(count)
        self.total = like.new_zeros(count) if totals else None

    def add(self, where: slice, logits: Tensor, positives: Tensor | None, axis: int) -> None:
        old = self.maximum[where]
        new = torch.maximum(old, logits.amax(axis))
        self.sum[where] = self.sum[where] * (old - new).exp() + (logits - new.unsqueeze(axis)).exp_().sum(axis)
        self.maximum[where] = new
        if positives is not None:
            self.positive[where] += torch.where(positives, logits, 0).sum(axis)
        if self.total is not None:
            self.total[where] += logits.sum(axis)

    def statistics(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.maximum + self.sum.log(), self.positive, self.total


class _TiledStatistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        tile: int,
        rows: bool,
        columns: bool,
        totals: bool,
    ) -> tuple[Tensor | None, ...]:
        row_stats = _Accumulator(len(images), images, totals) if rows else None
        column_stats = _Accumulator(len(texts), texts, totals) if columns else None
        row_ranges, column_ranges = _Ranges(image_ids, tile), _Ranges(text_ids, tile)
        with without_autocast(images.device):
            for r in _tiles(len(images), tile):
                for c in _tiles(len(texts), tile):
                    logits, _ = _scaled_scores(images[r], texts[c], scale)
                    positives = None
                    if row_ranges.meet(r.start, column_ranges, c.start):
                        positives = image_ids[r, None] == text_ids[None, c]
                    if row_stats is not None:
                        row_stats.add(r, logits, positives, axis=1)
                    if column_stats is not None:
                        column_stats.add(c, logits, positives, axis=0)
        flat = (row_stats.statistics() if row_stats is not None else (None,) * 3) + (
            column_stats.statistics() if column_stats is not None else (None,) * 3
        )
        ctx.save_for_backward(images, texts, scale, image_ids, text_ids, flat[0], flat[3])
        ctx.tile = tile
        ctx.ranges = row_ranges, column_ranges
        ctx.set_materialize_grads(False)
        return flat

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        images, texts, scale, image_ids, text_ids, row_lse, column_lse = ctx.saved_tensors
        row_lse_grad, row_positive_grad, row_total_grad, column_lse_grad, column_positive_grad, column_total_grad = (
            grads
        )
        row_ranges, column_ranges = ctx.ranges
        want_images, want_texts, want_scale = ctx.needs_input_grad[:3]
        image_grad = torch.zeros_like(images) if want_images or want_scale else None
        text_grad = torch.zeros_like(texts) if want_texts else None
        with without_autocast(images.device):
            for r in _tiles(len(images), ctx.tile):
                for c in _tiles(len(texts), ctx.tile):
                    logits, nearest = _scaled_scores(images[r], texts[c], scale)
                    grad = torch.zeros_like(logits)
                    if row_lse_grad is not None:
                        grad.addcmul_((logits - row_lse[r, None]).exp_(), row_lse_grad[r, None])
                    if column_lse_grad is not None:
                        grad.addcmul_(logits.sub_(column_lse[None, c]).exp_(), column_lse_grad[None, c])
                    if row_ranges.meet(r.start, column_ranges, c.start):
                        positives = image_ids[r, None] == text_ids[None, c]
                        if row_positive_grad is not None:
                            grad += positives * row_positive_grad[r, None]
                        if column_positive_grad is not None:
                            grad += positives * column_positive_grad[None, c]
                    if row_total_grad is not None:
                        grad += row_total_grad[r, None]
                    if column_total_grad is not None:
                        grad += column_total_grad[None, c]
                    _accumulate(images, texts, image_grad, text_grad, grad, r, c, nearest)
        # `image_grad` is still without the factor `scale`, so that the scale's own gradient needs no division.
        scale_grad = (image_grad * images).sum().reshape(scale.shape) if want_scale else None
        return (
            image_grad.mul_(scale) if want_images else None,
            text_grad.mul_(scale) if want_texts else None,
            scale_grad,
            *(None,) * 6,
        )


def _accumulate(
    images: Tensor,
    texts: Tensor,
    image_grad: Tensor | None,
    text_grad: Tensor | None,
    grad: Tensor,
    r: slice,
    c: slice,
    nearest: Tensor | None,
) -> None:
    """Adds what the gradient `grad` `(R, C)` of a tile of scores gives for its images and texts."""
    rows = images[r]
    if nearest is not None:
        count, queries, width = rows.shape
        spread = grad.new_zeros(count, queries, grad.shape[1]).scatter_(1, nearest[:, None], grad[:, None])
        grad, rows = spread.view(count * queries, -1), rows.reshape(count * queries, width)
    if image_grad is not None:
        image_grad[r] += (grad @ texts[c]).view(images[r].shape)
    if text_grad is not None:
        text_grad[c] += grad.t() @ rows


def tiled_sigmoid_sum(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    tile_size: int,
) -> Tensor:
    """Sum over all pairs of `softplus(-y * (scale * <image, text> + bias))`, y = 1 for equal ids, else -1, in tiles.

    Args: as of `tiled_statistics`; `bias`: scalar.

    Returns:
        Scalar.
    """
    if tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}")
    return _TiledSigmoid.apply(images, texts, scale, bias, image_ids, text_ids, tile_size)


def sigmoid_block_value(
    images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, image_ids: Tensor, text_ids: Tensor, tile: int
) -> Tensor:
    """Value of `tiled_sigmoid_sum`, without a graph."""
    value = images.new_zeros(())
    row_ranges, column_ranges = _Ranges(image_ids, tile), _Ranges(text_ids, tile)
    for r in _tiles(len(images), tile):
        for c in _tiles(len(texts), tile):
            logits = scores(images[r], texts[c]).mul_(scale).add_(bias)
            value += F.softplus(logits).sum()
            if row_ranges.meet(r.start, column_ranges, c.start):
                # softplus(-z) = softplus(z) - z
                value -= torch.where(image_ids[r, None] == text_ids[None, c], logits, 0).sum()
    return value


def sigmoid_block_grads(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    tile: int,
    image_grad: Tensor,
    text_grad: Tensor,
) -> Tensor:
    """Adds the gradients of `tiled_sigmoid_sum` without the factor `scale` to `image_grad` and `text_grad`.

    Returns:
        Gradient of the bias.
    """
    bias_grad = torch.zeros_like(bias)
    row_ranges, column_ranges = _Ranges(image_ids, tile), _Ranges(text_ids, tile)
    for r in _tiles(len(images), tile):
        for c in _tiles(len(texts), tile):
            grad = scores(images[r], texts[c]).mul_(scale).add_(bias).sigmoid_()
            if row_ranges.meet(r.start, column_ranges, c.start):
                grad -= (image_ids[r, None] == text_ids[None, c]).to(grad.dtype)
            bias_grad += grad.sum()
            _accumulate(images, texts, image_grad, text_grad, grad, r, c, None)
    return bias_grad


class _TiledSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor,
        image_ids: Tensor,
        text_ids: Tensor,
        tile: int,
    ) -> Tensor:
        ctx.save_for_backward(images, texts, scale, bias, image_ids, text_ids)
        ctx.tile = tile
        with without_autocast(images.device):
            return sigmoid_block_value(images, texts, scale, bias, image_ids, text_ids, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias, image_ids, text_ids = ctx.saved_tensors
        image_grad, text_grad = torch.zeros_like(images), torch.zeros_like(texts)
        with without_autocast(images.device):
            bias_grad = sigmoid_block_grads(
                images, texts, scale, bias, image_ids, text_ids, ctx.tile, image_grad, text_grad
            )
            scale_grad = (image_grad * images).sum().reshape(scale.shape)
            return (
                image_grad.mul_(scale * grad),
                text_grad.mul_(scale * grad),
                scale_grad * grad,
                bias_grad * grad,
                None,
                None,
                None,
            )
