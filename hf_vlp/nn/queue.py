"""A queue of features of earlier batches (MoCo, arXiv 1911.05722, section 3.2; ALBEF, 2107.07651, section 3.2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_vlp.objectives.distributed import gather

NO_ID = -100


class FeatureQueue(nn.Module):
    """Ring buffer of paired image and text features, the same on all ranks, that `contrastive_loss` takes as `queue`.

    Its state is in named buffers, so a checkpoint holds it. Batches of any size fit: the buffer wraps around.

    Args:
        size: how many pairs it holds.
        width: of a text feature, and of an image feature.
        queries: features an image, for the query form of the loss; None for one vector an image.
        with_ids: whether image ids are kept, to recognise further positives.
        start: `"empty"`: only what has been enqueued counts. `"random"`: full of random unit vectors from the start,
            as in the original codes.
        seed: of the random start, the same on all ranks.
    """

    def __init__(
        self,
        size: int,
        width: int,
        *,
        queries: int | None = None,
        with_ids: bool = False,
        start: Literal["empty", "random"] = "empty",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"`size` must be at least 1, got {size}")
        if start not in ("empty", "random"):
            raise ValueError(f'`start` must be "empty" or "random", got {start!r}')
        self.size, self.start, self.seed = size, start, seed
        shape = (size, width) if queries is None else (size, queries, width)
        self.register_buffer("images", torch.empty(shape))
        self.register_buffer("texts", torch.empty(size, width))
        self.register_buffer("ids", torch.empty(size, dtype=torch.int64) if with_ids else None)
        self.register_buffer("position", torch.empty((), dtype=torch.int64))
        self.register_buffer("filled", torch.empty((), dtype=torch.int64))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start."""
        if self.start == "random" and not self.images.is_meta:
            generator = torch.Generator().manual_seed(self.seed)
            for features in (self.images, self.texts):
                features.copy_(F.normalize(torch.randn(features.shape, generator=generator), dim=-1))
        else:
            self.images.zero_()
            self.texts.zero_()
        if self.ids is not None:
            self.ids.fill_(NO_ID)
        self.position.zero_()
        self.filled.fill_(self.size if self.start == "random" else 0)

    def __len__(self) -> int:
        """Number of pairs that count."""
        return int(self.filled)

    @property
    def image_embeds(self) -> Tensor:
        """`(K, D)` or `(K, Q, D)` features of the images that are in the queue."""
        return self.images[: len(self)]

    @property
    def text_embeds(self) -> Tensor:
        """`(K, D)` features of their texts."""
        return self.texts[: len(self)]

    @property
    def image_ids(self) -> Tensor | None:
        """`(K,)` their image ids; -100 for the random start."""
        return None if self.ids is None else self.ids[: len(self)]

    @torch.no_grad()
    def enqueue(self, image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor | None = None) -> None:
        """Adds the pairs of all ranks, in rank order, in the place of the oldest ones.

        Call it after the loss of the step, on all ranks together. A batch larger than the queue leaves its last pairs.

        Args:
            image_embeds: `(B, D)` or `(B, Q, D)`; B may differ between ranks.
            text_embeds: `(B, D)`.
            image_ids: `(B,)`, needed exactly if the queue keeps ids.

        Raises:
            ValueError: shapes that don't fit the queue, or ids that are missing or unexpected.
        """
        if image_embeds.shape[1:] != self.images.shape[1:] or text_embeds.shape[1:] != self.texts.shape[1:]:
            raise ValueError(
                f"the queue holds images of {tuple(self.images.shape[1:])} and texts of "
                f"{tuple(self.texts.shape[1:])}, got {tuple(image_embeds.shape[1:])} and "
                f"{tuple(text_embeds.shape[1:])}"
            )
        if len(image_embeds) != len(text_embeds) or (image_ids is not None and len(image_ids) != len(text_embeds)):
            raise ValueError("`image_embeds`, `text_embeds` and `image_ids` must have one row a pair")
        if (image_ids is None) != (self.ids is None):
            raise ValueError(
                "the queue was made with `with_ids=True`: give `image_ids`"
                if self.ids is not None
                else "`image_ids` given, but the queue keeps none: make it with `with_ids=True`"
            )
        streams = [(self.images, gather(image_embeds.detach())), (self.texts, gather(text_embeds.detach()))]
        if self.ids is not None:
            streams.append((self.ids, gather(image_ids)))
        count = len(streams[0][1])
        kept = min(count, self.size)
        start = self.position + (count - kept)
        places = (start + torch.arange(kept, device=self.position.device)) % self.size
        for buffer, rows in streams:
            buffer.index_copy_(0, places, rows[count - kept :].to(buffer))
        self.position.copy_((self.position + count) % self.size)
        self.filled.copy_((self.filled + count).clamp(max=self.size))
