"""Image-text contrastive learning (ITC) with a softmax over the texts and images of all ranks.

CLIP (arXiv 2103.00020, figure 3), ALIGN (2102.05918, equations 1-2), ALBEF (2107.07651, equations 1-2 and 6) and
BLIP-2 (2301.12597, section 3.1: the similarity of an image is that of its nearest query). The sigmoid form of SigLIP
is in `sigmoid`.
"""

from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import batch_sizes, gather_with_sizes, offset_of, transpose_shards, world
from .precision import full_precision, without_autocast
from .sigmoid import EMPTY
from .sigmoid import sigmoid_loss as sigmoid_loss
from .tiled import TileStatistics, scores, tiled_statistics

GatherKeys = Literal["exact", "own_rows", "detached", "local"]
Rows = Literal["own", "all"]


class ContrastiveOutput(NamedTuple):
    """Loss and logits of a contrastive objective.

    Attributes:
        loss: scalar, mean of the two directions.
        loss_i2t: scalar, each image against all texts; None for the sigmoid loss, which has no directions.
        loss_t2i: scalar, each text against all images.
        logits_per_image: `(B, G)`, own images against the texts of all ranks; None in the tiled form.
        logits_per_text: `(B, G)`, own texts against the images of all ranks; None in the tiled form.
        offset: column of the first own pair in both.
    """

    loss: Tensor
    loss_i2t: Tensor | None
    loss_t2i: Tensor | None
    logits_per_image: Tensor | None
    logits_per_text: Tensor | None
    offset: int = 0


class Queue(Protocol):
    """Features of earlier batches, more negatives: `hf_vlp.nn.queue.FeatureQueue` is one.

    Attributes:
        image_embeds: `(K, D)`, or `(K, Q, D)` for the query form.
        text_embeds: `(K, D)`.
        image_ids: `(K,)`, or None if the queue keeps none.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    image_ids: Tensor | None


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    gather_keys: GatherKeys = "exact",
    rows: Rows = "own",
    tile_size: int | None = None,
    queue: Queue | None = None,
    soft_targets: Tensor | tuple[Tensor, Tensor] | None = None,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
) -> ContrastiveOutput:
    """Symmetric cross-entropy between the matching of images and texts and the softmax of their similarities.

    On N ranks the mean of the returned losses over ranks is the loss of the joined batch, and the gradients averaged
    over ranks are its gradients, for any sizes of the local batches. The loss is computed in float32 at least.

    Args:
        image_embeds: `(B, D)`, normalised; `(B, Q, D)` for several features an image, of which the nearest counts.
        text_embeds: `(B, D)`, normalised; row i belongs to image i.
        logit_scale: scalar that multiplies the cosines (the exponential has been taken already).
        image_ids: `(B,)` integers. Texts of the same image are all positive, with equal weight.
        label_smoothing: share of each row's target that is spread evenly over all its columns.
        gather_keys: what the gradient sees of the features that an anchor is compared with.
            `"exact"`: all of it.
            `"detached"`: nothing, as in LAVIS' BLIP-2: image-to-text trains the images only, text-to-image the texts
            only, also on one process.
            `"own_rows"`: the own rows alone, as OpenCLIP without `gather_with_grad`.
            `"local"`: no exchange at all; each rank has its own batch as negatives.
        rows: `"own"`: a rank computes the rows of its own images and texts. `"all"`: each rank computes the whole
            matrix and reports the loss of the joined batch, as OpenCLIP without `local_loss`: the same result for
            N times the work. For `gather_keys` `"exact"` and `"own_rows"`.
        tile_size: computes the matrix in tiles of this size, forward and backward, so that it is never held. Same
            value and gradient; no logits are returned.
        queue: features of earlier batches, negatives of every anchor (positives where the image id is equal). They
            are columns of the loss, not of the returned logits.
        soft_targets: `(B, G + K)` rows that sum to one, or one such matrix for each direction, instead of the hard
            matching: own rows against all columns (G over all ranks, then K of the queue).
        image_keys: `(B, D)`, what texts are compared with if not with `image_embeds` (features of a momentum twin).
        text_keys: the same for images.

    Raises:
        ValueError: shapes that don't fit, options that exclude each other, or no pair on any rank.
    """
    _check(image_embeds, text_embeds, image_ids, image_keys, text_keys, label_smoothing, gather_keys, rows)
    if soft_targets is not None and (image_ids is not None or tile_size is not None or rows == "all"):
        raise ValueError(
            "`soft_targets` already is the whole target matrix of the own rows: give it without `image_ids`, "
            'without `tile_size` (it is as large as what tiles avoid) and with `rows="own"`'
        )
    if queue is not None and image_ids is not None and queue.image_ids is None:
        raise ValueError(
            "`image_ids` are given but the queue keeps none, so texts of the same image would be negatives: "
            "make the queue with image ids"
        )
    with without_autocast(image_embeds.device):
        scale = torch.as_tensor(logit_scale, device=image_embeds.device)
        images, texts = full_precision(image_embeds), full_precision(text_embeds)
        scale = scale.to(images.dtype).reshape(())
        sides = _sides(images, texts, image_keys, text_keys, image_ids, gather_keys, rows)
        if sides.all_rows == 0:
            raise ValueError(EMPTY)
        compute = _dense if tile_size is None else _tiled
        image_sum, text_sum, logits_per_image, logits_per_text = compute(
            sides, scale, label_smoothing, tile_size, queue, soft_targets
        )
        # Every rank's sum is over its own rows, or over all of them.
        factor = (1 if rows == "all" else world()[1]) / sides.all_rows
        loss_i2t, loss_t2i = image_sum * factor, text_sum * factor
    if rows == "all" and logits_per_image is not None and logits_per_text is not None:
        own = slice(sides.offset, sides.offset + len(image_embeds))
        logits_per_image, logits_per_text = logits_per_image[own], logits_per_text[own]
    return ContrastiveOutput(
        (loss_i2t + loss_t2i) / 2, loss_i2t, loss_t2i, logits_per_image, logits_per_text, sides.offset
    )


def query_contrastive_loss(
    image_feats: Tensor,
    text_feat: Tensor,
    logit_scale: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    gather_keys: GatherKeys = "exact",
    rows: Rows = "own",
    tile_size: int | None = None,
    queue: Queue | None = None,
    soft_targets: Tensor | tuple[Tensor, Tensor] | None = None,
) -> ContrastiveOutput:
    """ITC of BLIP-2 (section 3.1): the similarity of an image and a text is the largest over the image's queries.

    Args:
        image_feats: `(B, Q, D)`, normalised features of the queries.
        text_feat: `(B, D)`, normalised feature of the text.
        logit_scale: scalar that multiplies the cosines; for a temperature, its inverse.
        others: as of `contrastive_loss`.
    """
    if image_feats.dim() != 3:
        raise ValueError(f"`image_feats` must be (batch, queries, width), got {tuple(image_feats.shape)}")
    return contrastive_loss(
        image_feats,
        text_feat,
        logit_scale,
        image_ids=image_ids,
        label_smoothing=label_smoothing,
        gather_keys=gather_keys,
        rows=rows,
        tile_size=tile_size,
        queue=queue,
        soft_targets=soft_targets,
    )


def _check(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor | None,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    label_smoothing: float,
    gather_keys: str,
    rows: str,
) -> None:
    if images.dim() not in (2, 3) or texts.dim() != 2 or len(images) != len(texts):
        raise ValueError(
            "`image_embeds` must be (batch, width) or (batch, queries, width) and `text_embeds` (batch, width) of the "
            f"same batch, got {tuple(images.shape)} and {tuple(texts.shape)}"
        )
    if images.shape[-1] != texts.shape[-1]:
        raise ValueError(
            f"images and texts must be projected to one width, got {images.shape[-1]} and {texts.shape[-1]}"
        )
    if image_ids is not None and image_ids.shape != (len(images),):
        raise ValueError(f"`image_ids` must be ({len(images)},), one an image, got {tuple(image_ids.shape)}")
    for name, keys, like in (("image_keys", image_keys, images), ("text_keys", text_keys, texts)):
        if keys is not None and keys.shape != like.shape:
            raise ValueError(f"`{name}` must have the shape {tuple(like.shape)}, got {tuple(keys.shape)}")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}")
    if gather_keys not in get_args(GatherKeys):
        raise ValueError(f"`gather_keys` must be one of {get_args(GatherKeys)}, got {gather_keys!r}")
    if rows not in get_args(Rows):
        raise ValueError(f"`rows` must be one of {get_args(Rows)}, got {rows!r}")
    if rows == "all" and gather_keys not in ("exact", "own_rows"):
        raise ValueError(f'`rows="all"` goes with `gather_keys` "exact" or "own_rows", not {gather_keys!r}')


class _Sides(NamedTuple):
    """Who is compared with whom on this rank.

    `layout` says how many similarity matrices that makes. `"whole"`: one, which this rank holds whole. `"spread"`:
    one, of which this rank computes the rows of its own images and receives the columns of its own texts. `"apart"`:
    two, as the two directions see different features or gradients.
    """

    layout: Literal["whole", "spread", "apart"]
    images: Tensor  # anchors of image-to-text
    texts: Tensor  # anchors of text-to-image
    image_keys: Tensor | None  # not needed where the matrix is spread
    text_keys: Tensor
    anchor_ids: Tensor | None
    key_ids: Tensor | None
    sizes: list[int]  # rows of the matrix on each rank
    offset: int  # column of the first own pair
    first: int  # column of the first anchor's pair
    all_rows: int  # number of pairs that the loss is a mean over


def _sides(
    images: Tensor,
    texts: Tensor,
    image_keys: Tensor | None,
    text_keys: Tensor | None,
    image_ids: Tensor | None,
    gather_keys: GatherKeys,
    rows: Rows,
) -> _Sides:
    _, size = world()
    one_matrix = image_keys is None and text_keys is None and gather_keys != "detached"
    image_keys = images if image_keys is None else full_precision(image_keys)
    text_keys = texts if text_keys is None else full_precision(text_keys)

    if size == 1 or gather_keys == "local":
        if gather_keys == "detached":
            image_keys, text_keys = image_keys.detach(), text_keys.detach()
        all_rows = sum(batch_sizes(len(images), images.device))
        layout = "whole" if one_matrix else "apart"
        return _Sides(
            layout, images, texts, image_keys, text_keys, image_ids, image_ids, [len(images)], 0, 0, all_rows
        )

    all_texts, sizes = gather_with_sizes(text_keys, with_grad=gather_keys == "exact")
    offset, all_rows = offset_of(sizes), sum(sizes)
    key_ids = None if image_ids is None else gather_with_sizes(image_ids, with_grad=False)[0]
    if one_matrix and gather_keys == "exact" and rows == "own":
        return _Sides("spread", images, texts, None, all_texts, image_ids, key_ids, sizes, offset, offset, all_rows)

    def collect(x: Tensor) -> Tensor:
        everyone, _ = gather_with_sizes(x, with_grad=gather_keys == "exact")
        if gather_keys == "own_rows":
            everyone = torch.cat([everyone[:offset], x, everyone[offset + len(x) :]])
        return everyone

    all_images = collect(image_keys)
    if gather_keys == "own_rows":
        all_texts = torch.cat([all_texts[:offset], text_keys, all_texts[offset + len(text_keys) :]])
    if rows == "own":
        return _Sides(
            "apart", images, texts, all_images, all_texts, image_ids, key_ids, sizes, offset, offset, all_rows
        )
    if one_matrix:
        return _Sides(
            "whole", all_images, all_texts, all_images, all_texts, key_ids, key_ids, sizes, offset, 0, all_rows
        )
    return _Sides(
        "apart", collect(images), collect(texts), all_images, all_texts, key_ids, key_ids, sizes, offset, 0, all_rows
    )


def _dense(
    sides: _Sides,
    scale: Tensor,
    label_smoothing: float,
    _tile_size: int | None,
    queue: Queue | None,
    soft_targets: Tensor | tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the cross-entropies of the anchors in the two directions, and the logits without the queue's columns."""
    cosines = scores(sides.images, sides.text_keys)
    logits_per_image = cosines * scale
    if sides.layout == "whole":
        logits_per_text = logits_per_image.t()
    elif sides.layout == "spread":
        # Scaled on arrival, so that each rank's gradient of the scale is that of its own rows.
        logits_per_text = transpose_shards(cosines, sides.sizes, sides.sizes) * scale
    else:
        logits_per_text = (scores(sides.image_keys, sides.texts) * scale).t()

    image_columns, text_columns = logits_per_image, logits_per_text
    if queue is not None:
        old_images, old_texts = _queued(queue, scale.dtype)
        image_columns = torch.cat([image_columns, scores(sides.images, old_texts) * scale], dim=1)
        text_columns = torch.cat([text_columns, (scores(old_images, sides.texts) * scale).t()], dim=1)

    if soft_targets is None:
        image_targets = text_targets = _hard_targets(sides, queue, scale.dtype)
    else:
        image_targets, text_targets = soft_targets if isinstance(soft_targets, tuple) else (soft_targets, soft_targets)
        image_targets, text_targets = (t.detach().to(scale.dtype) for t in (image_targets, text_targets))
        for targets in (image_targets, text_targets):
            if targets.shape != image_columns.shape:
                raise ValueError(
                    f"`soft_targets` must be {tuple(image_columns.shape)}, own rows against the pairs of all ranks "
                    f"and of the queue; got {tuple(targets.shape)}"
                )
    return (
        F.cross_entropy(image_columns, image_targets, label_smoothing=label_smoothing, reduction="sum"),
        F.cross_entropy(text_columns, text_targets, label_smoothing=label_smoothing, reduction="sum"),
        logits_per_image,
        logits_per_text,
    )


def _queued(queue: Queue, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Copies: the queue may be written to before the backward.
    return queue.image_embeds.detach().to(dtype, copy=True), queue.text_embeds.detach().to(dtype, copy=True)


def _hard_targets(sides: _Sides, queue: Queue | None, dtype: torch.dtype) -> Tensor:
    """Index of each anchor's pair `(A,)`, or with image ids the row-normalised positives `(A, G + K)`."""
    if sides.anchor_ids is None:
        return torch.arange(sides.first, sides.first + len(sides.images), device=sides.images.device)
    ids = sides.key_ids if queue is None else torch.cat([sides.key_ids, queue.image_ids])
    positives = (sides.anchor_ids[:, None] == ids[None, :]).to(dtype)
    return positives / positives.sum(dim=1, keepdim=True)


def _tiled(
    sides: _Sides,
    scale: Tensor,
    label_smoothing: float,
    tile_size: int,
    queue: Queue | None,
    _soft_targets: None,
) -> tuple[Tensor, Tensor, None, None]:
    """As `_dense`, from row and column statistics of tiles that are dropped as soon as they are summed up."""
    key_ids, anchor_ids = sides.key_ids, sides.anchor_ids
    if key_ids is None or anchor_ids is None:
        key_ids = torch.arange(len(sides.text_keys), device=sides.images.device)
        anchor_ids = key_ids[sides.first : sides.first + len(sides.images)]
    totals = label_smoothing > 0

    if sides.layout == "apart":
        of_images, _ = tiled_statistics(
            sides.images, sides.text_keys, scale, anchor_ids, key_ids, tile_size, columns=False, totals=totals
        )
        _, of_texts = tiled_statistics(
            sides.image_keys, sides.texts, scale, key_ids, anchor_ids, tile_size, rows=False, totals=totals
        )
    else:
        of_images, of_texts = tiled_statistics(
            sides.images, sides.text_keys, scale, anchor_ids, key_ids, tile_size, totals=totals
        )
        if sides.layout == "spread":
            of_texts = _join_columns(of_texts, sides.sizes)

    columns, all_ids = len(sides.text_keys), key_ids
    if queue is not None:
        old_images, old_texts = _queued(queue, scale.dtype)
        if sides.anchor_ids is None:
            old_ids = torch.full((len(old_texts),), -1, device=key_ids.device)
        else:
            old_ids = queue.image_ids
        more, _ = tiled_statistics(
            sides.images, old_texts, scale, anchor_ids, old_ids, tile_size, columns=False, totals=totals
        )
        of_images = _add(of_images, more)
        _, more = tiled_statistics(
            old_images, sides.texts, scale, old_ids, anchor_ids, tile_size, rows=False, totals=totals
        )
        of_texts = _add(of_texts, more)
        columns, all_ids = columns + len(old_texts), torch.cat([key_ids, old_ids])

    weights = (1 - label_smoothing) / _count_of_each(anchor_ids, all_ids).to(scale.dtype)
    sums = []
    for statistics in (of_images, of_texts):
        losses = statistics.logsumexp - weights * statistics.positive
        if totals:
            losses = losses - label_smoothing / columns * statistics.total
        sums.append(losses.sum())
    return sums[0], sums[1], None, None


def _join_columns(partial: TileStatistics, sizes: list[int]) -> TileStatistics:
    """Statistics of the own texts over the images of all ranks, from each rank's over its own images."""
    fields = [field for field in partial if field is not None]
    ranks = len(sizes)
    received = transpose_shards(torch.stack(fields), [len(fields)] * ranks, sizes)
    received = received.view(sizes[world()[0]], ranks, len(fields))
    return TileStatistics(
        received[..., 0].logsumexp(dim=1),
        received[..., 1].sum(dim=1),
        received[..., 2].sum(dim=1) if len(fields) == 3 else None,
    )


def _add(a: TileStatistics, b: TileStatistics) -> TileStatistics:
    total = None if a.total is None else a.total + b.total
    return TileStatistics(torch.logaddexp(a.logsumexp, b.logsumexp), a.positive + b.positive, total)


def _count_of_each(values: Tensor, pool: Tensor) -> Tensor:
    """How often each value occurs in `pool`."""
    pool = pool.sort().values
    return torch.searchsorted(pool, values, right=True) - torch.searchsorted(pool, values)
