"""The pairwise sigmoid loss of SigLIP (arXiv 2303.15343, equation in section 3.2 and algorithm 1)."""

from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .distributed import batch_sizes, gather_with_sizes, offset_of, transpose_shards, world
from .precision import full_precision, without_autocast
from .tiled import scores, sigmoid_block_grads, sigmoid_block_value, tiled_sigmoid_sum

if TYPE_CHECKING:
    from .contrastive import ContrastiveOutput

EMPTY = (
    "the batch is empty on all ranks: a step without any pair has no contrastive loss, skip it on all ranks together"
)


def sigmoid_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    tile_size: int | None = None,
    exchange: Literal["gather", "ring"] = "gather",
) -> "ContrastiveOutput":
    """Each pair of an image and a text is classified on its own as matching or not.

    The loss is the sum over all pairs of `-log sigmoid(y * (scale * <image, text> + bias))`, y = 1 for a matching pair
    and -1 else, divided by the number of images. On N ranks the mean of the returned losses over ranks is the loss of
    the joined batch, and the gradients averaged over ranks are its gradients, for any sizes of the local batches.

    Args:
        image_embeds: `(B, D)`, normalised.
        text_embeds: `(B, D)`, normalised; row i belongs to image i.
        logit_scale: scalar (the exponential has been taken already).
        logit_bias: scalar; SigLIP starts it at -10.
        image_ids: `(B,)` integers; all pairs of one id match.
        tile_size: computes the logits in tiles of this size, forward and backward, so that the matrix is never held.
            Same value and gradient; no logits are returned.
        exchange: how the texts of other ranks come. `"gather"`: all at once. `"ring"`: one rank's texts at a time
            travel round the ranks (algorithm 1), in the backward together with their gradient, so that no rank ever
            holds more than one foreign batch; no logits are returned.

    Returns:
        `ContrastiveOutput` without the losses of single directions, which this loss does not have.

    Raises:
        ValueError: shapes that don't fit, or no pair on any rank.
    """
    from .contrastive import ContrastiveOutput

    if image_embeds.dim() != 2 or image_embeds.shape != text_embeds.shape:
        raise ValueError(
            "`image_embeds` and `text_embeds` must be (batch, width) of the same shape, got "
            f"{tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}"
        )
    if image_ids is not None and image_ids.shape != (len(image_embeds),):
        raise ValueError(f"`image_ids` must be ({len(image_embeds)},), one an image, got {tuple(image_ids.shape)}")
    if exchange not in ("gather", "ring"):
        raise ValueError(f'`exchange` must be "gather" or "ring", got {exchange!r}')
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"`tile_size` must be at least 1, got {tile_size}")
    device, batch = image_embeds.device, len(image_embeds)
    _, size = world()
    with without_autocast(device):
        images, texts = full_precision(image_embeds), full_precision(text_embeds)
        scale = torch.as_tensor(logit_scale, device=device).to(images.dtype).reshape(())
        bias = torch.as_tensor(logit_bias, device=device).to(images.dtype).reshape(())
        logits_per_image = logits_per_text = None
        if exchange == "ring":
            sizes = batch_sizes(batch, device)
        else:
            texts, sizes = gather_with_sizes(texts)
        offset, total = offset_of(sizes), sum(sizes)
        if total == 0:
            raise ValueError(EMPTY)
        if image_ids is None:
            text_ids = torch.arange(total, device=device)
            image_ids = text_ids[offset : offset + batch]
        else:
            text_ids, _ = gather_with_sizes(image_ids, with_grad=False)

        if exchange == "ring" and size > 1:
            value = _RingSigmoid.apply(images, texts, scale, bias, image_ids, text_ids, tile_size or max(sizes), sizes)
        elif exchange == "ring" or tile_size is not None:
            value = tiled_sigmoid_sum(images, texts, scale, bias, image_ids, text_ids, tile_size or total)
        else:
            logits_per_image = scores(images, texts) * scale + bias
            logits_per_text = transpose_shards(logits_per_image, sizes, sizes)
            positives = image_ids[:, None] == text_ids[None, :]
            value = F.softplus(torch.where(positives, -logits_per_image, logits_per_image)).sum()
        loss = value * (size / total)
    return ContrastiveOutput(loss, None, None, logits_per_image, logits_per_text, offset)


class _RingSigmoid(torch.autograd.Function):
    """Own images against the texts of one rank after the other, which travel to the next rank after each block."""

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
        sizes: list[int],
    ) -> Tensor:
        ctx.save_for_backward(images, texts, scale, bias, image_ids, text_ids)
        ctx.tile, ctx.sizes = tile, sizes
        rank, size = world()
        ids = text_ids.split(sizes)
        value = images.new_zeros(())
        with without_autocast(images.device):
            for step in range(size):
                owner = (rank - step) % size
                value += sigmoid_block_value(images, texts, scale, bias, image_ids, ids[owner], tile)
                if step + 1 < size:
                    texts = _pass_on(texts, sizes[(owner - 1) % size])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias, image_ids, text_ids = ctx.saved_tensors
        sizes, (rank, size) = ctx.sizes, world()
        ids = text_ids.split(sizes)
        image_grad, bias_grad = torch.zeros_like(images), torch.zeros_like(bias)
        # The texts and their gradient so far, side by side.
        parcel = torch.cat([texts, torch.zeros_like(texts)], dim=1)
        width = texts.shape[1]
        with without_autocast(images.device):
            for step in range(size):
                owner = (rank - step) % size
                visiting, own_part = parcel[:, :width], torch.zeros_like(parcel[:, width:])
                bias_grad += sigmoid_block_grads(
                    images, visiting, scale, bias, image_ids, ids[owner], ctx.tile, image_grad, own_part
                )
                parcel[:, width:] += own_part.mul_(grad)  # `grad` may differ between ranks
                parcel = _pass_on(parcel, sizes[(owner - 1) % size])
        scale_grad = (image_grad * images).sum().reshape(scale.shape) * grad
        return (
            image_grad.mul_(scale * grad),
            parcel[:, width:] * scale,
            scale_grad,
            bias_grad * grad,
            None,
            None,
            None,
            None,
        )


def _pass_on(x: Tensor, rows: int) -> Tensor:
    """Sends `x` to the next rank and returns what the rank before sends: `rows` rows. Empty batches don't travel."""
    rank, size = world()
    received = x.new_empty(rows, x.shape[1])
    transfers = []
    if len(x):
        transfers.append(dist.P2POp(dist.isend, x.contiguous(), (rank + 1) % size))
    if rows:
        transfers.append(dist.P2POp(dist.irecv, received, (rank - 1) % size))
    for request in dist.batch_isend_irecv(transfers) if transfers else ():
        request.wait()
    return received
