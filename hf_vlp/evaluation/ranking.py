"""Ranks of all queries in both directions, from similarities that exist in blocks, and re-ranking of the best.

On several processes each has the similarities of its own images; what the ranks of the texts need is exchanged.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_vlp.evaluation.gallery import Gallery
from hf_vlp.evaluation.recall import check_not_nan, top_k
from hf_vlp.evaluation.runtime import gather_lists, gather_rows

# Similarities of a block of images with all texts (times queries, where an image has several): 64 MiB in float32.
BLOCK_ELEMENTS = 2**24
# Blocks are kept for the second pass up to here, 1 GiB: COCO's 5,000 × 25,000 fit. Beyond, they are computed again.
KEPT_ELEMENTS = 2**28


@dataclass
class Selection:
    """A part of the gallery that is ranked by itself: everything, or one fold.

    Attributes:
        images: consecutive images of the gallery.
        captions: (t,) positions in the gallery of their captions.
    """

    images: range
    captions: Tensor

    @classmethod
    def of(cls, gallery: Gallery, images: range) -> "Selection":
        """Some images with all their captions."""
        inside = (gallery.image_of >= images.start) & (gallery.image_of < images.stop)
        return cls(images, inside.nonzero().flatten())


@dataclass
class Ranking:
    """Ranks of a selection, and the candidates that re-ranking will look at (k = 0 when there is none).

    Images are named by their position in the gallery, captions by theirs in the selection.
    """

    i2t: Tensor  # (i,)
    t2i: Tensor  # (t,)
    i2t_top: Tensor  # (i, k) captions
    i2t_top_scores: Tensor  # (i, k)
    t2i_top: Tensor  # (t, k) images
    t2i_top_scores: Tensor  # (t, k)


class Similarities:
    """The similarity matrix of this process's images with all different texts, in blocks of images."""

    def __init__(self, model: nn.Module, image_itc: Tensor, text_itc: Tensor, first_image: int, device: torch.device):
        """
        Args:
            image_itc: (own images, D) or (own images, Q, D) on the CPU.
            text_itc: (U, D).
            first_image: position of the first own image in the gallery.
        """
        self.model, self.image_itc, self.first_image, self.device = model, image_itc, first_image, device
        self.text_itc = text_itc.to(device)
        queries = image_itc.shape[1] if image_itc.ndim == 3 else 1
        self.block = max(1, BLOCK_ELEMENTS // max(1, len(text_itc) * queries))
        self._kept: dict[int, Tensor] = {}

    def blocks(self, images: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions (b,), similarities (b, U) in float32) of those of `images` that are this process's."""
        for begin in range(0, len(self.image_itc), self.block):
            end = min(begin + self.block, len(self.image_itc))
            low = max(begin, images.start - self.first_image)
            high = min(end, images.stop - self.first_image)
            if low < high:
                positions = torch.arange(self.first_image + low, self.first_image + high, device=self.device)
                yield positions, self._scores(begin, end)[low - begin : high - begin]

    def _scores(self, begin: int, end: int) -> Tensor:
        if begin in self._kept:
            return self._kept[begin].to(self.device)
        scores = self.model.similarity(self.image_itc[begin:end].to(self.device), self.text_itc).float()
        check_not_nan(scores)
        if len(self.image_itc) * len(self.text_itc) <= KEPT_ELEMENTS:
            self._kept[begin] = scores.cpu()
        return scores


def rank_by_similarity(
    similarities: Similarities, gallery: Gallery, selection: Selection, k: int = 0, *, equal_texts_match: bool = False
) -> Ranking:
    """Ranks of all queries of a selection, and the `k` best candidates of each, on every process.

    Args:
        k: candidates to keep for re-ranking, 0 for none.
        equal_texts_match: count a caption as right for every image that has one with the same words.
    """
    device = similarities.device
    text_of = gallery.text_of[selection.captions].to(device)
    image_of = gallery.image_of[selection.captions].to(device)
    captions, images = len(selection.captions), len(selection.images)
    k_texts, k_images = min(k, captions), min(k, images)
    if equal_texts_match:
        has_text = torch.zeros(images, len(gallery.texts), dtype=torch.bool, device=device)
        has_text[image_of - selection.images.start, text_of] = True

    def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for positions, scores in similarities.blocks(selection.images):
            if equal_texts_match:
                right = has_text[positions - selection.images.start][:, text_of]
            else:
                right = image_of == positions[:, None]
            # Texts that read the same are compared once, so that their scores are equal to the last bit.
            yield positions, scores[:, text_of], right

    i2t = [torch.empty(0, dtype=torch.long)]
    i2t_top = [torch.empty(0, k_texts, dtype=torch.long)]
    i2t_top_scores = [torch.empty(0, k_texts)]
    best = torch.full((captions,), float("-inf"), device=device)
    near = (torch.empty(captions, 0, dtype=torch.long, device=device), torch.empty(captions, 0, device=device))
    for positions, scores, right in blocks():
        of_right = scores.masked_fill(~right, float("-inf"))
        i2t.append(((scores >= of_right.amax(dim=1, keepdim=True)) & ~right).sum(dim=1).cpu())
        best = torch.maximum(best, of_right.amax(dim=0))
        if k:
            chosen = top_k(scores, k_texts)
            i2t_top.append(chosen.cpu())
            i2t_top_scores.append(scores.gather(1, chosen).cpu())
            near = _merge(near, (positions.expand(captions, -1), scores.T), k_images)
    best = torch.stack(gather_lists([best.cpu()])).amax(dim=0).to(device)
    t2i = torch.zeros(captions, dtype=torch.long, device=device)
    for _, scores, right in blocks():
        t2i += ((scores >= best) & ~right).sum(dim=0)

    near = (near[0].cpu(), near[1].cpu())
    if k:
        parts = gather_lists([near])
        near = parts[0]
        for part in parts[1:]:
            near = _merge(near, part, k_images)
    return Ranking(
        i2t=gather_rows(torch.cat(i2t)),
        t2i=torch.stack(gather_lists([t2i.cpu()])).sum(dim=0),
        i2t_top=gather_rows(torch.cat(i2t_top)),
        i2t_top_scores=gather_rows(torch.cat(i2t_top_scores)),
        t2i_top=near[0],
        t2i_top_scores=near[1],
    )


def _merge(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best `k` of two sets of (positions, scores), each (t, n); the positions of `left` come first."""
    positions = torch.cat([left[0], right[0]], dim=1)
    scores = torch.cat([left[1], right[1]], dim=1)
    if scores.shape[1] <= k:
        return positions, scores
    chosen = top_k(scores, k)
    return positions.gather(1, chosen), scores.gather(1, chosen)


def reranked(ranks: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """Ranks after the best candidates of each query were put in order by `scores`. Ties count against.

    A query whose right answer is not among its candidates keeps its rank, which is at least their number.

    Args:
        ranks: (Q,) before.
        scores: (Q, k) of the candidates.
        right: (Q, k) bool.
    """
    check_not_nan(scores)
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    inside = ((scores >= best) & ~right).sum(dim=1)
    return torch.where(right.any(dim=1), inside, ranks)


class PairScores:
    """Matching scores of (image, text) pairs."""

    def __init__(self, keys: Tensor, scores: Tensor, texts: int):
        """
        Args:
            keys: (P,) ascending, `image * texts + text`.
            scores: (P,).
            texts: how many different texts there are.
        """
        self.keys, self.scores, self.texts = keys, scores, texts

    def __len__(self) -> int:
        return len(self.keys)

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores of pairs, in the shape of `images` and `texts`; each pair has to be there."""
        return self.scores[torch.searchsorted(self.keys, images * self.texts + texts)]


def wanted_pairs(gallery: Gallery, selections: Sequence[Selection], rankings: Sequence[Ranking]) -> Tensor:
    """Every (image, text) pair that some direction of some selection re-ranks, once: ascending keys (P,)."""
    texts = len(gallery.texts)
    keys = []
    for selection, ranking in zip(selections, rankings):
        text_of = gallery.text_of[selection.captions]
        images = torch.arange(selection.images.start, selection.images.stop)
        keys.append((images[:, None] * texts + text_of[ranking.i2t_top]).flatten())
        keys.append((ranking.t2i_top * texts + text_of[:, None]).flatten())
    return torch.unique(torch.cat(keys))


def rerank_both(
    gallery: Gallery,
    selection: Selection,
    ranking: Ranking,
    matching: PairScores,
    *,
    add_similarity: bool,
    equal_texts_match: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranks (i,) and (t,) of both directions after matching.

    Args:
        add_similarity: order by matching score plus similarity, not by the matching score alone.
    """
    captions_image, captions_text = gallery.image_of[selection.captions], gallery.text_of[selection.captions]
    pairs = gallery.image_of * len(gallery.texts) + gallery.text_of

    def ranks_of(before: Tensor, images: Tensor, captions: Tensor, similarity: Tensor) -> Tensor:
        texts = captions_text[captions]
        scores = matching(images, texts)
        if add_similarity:
            scores = scores + similarity
        if equal_texts_match:
            right = torch.isin(images * len(gallery.texts) + texts, pairs)
        else:
            right = captions_image[captions] == images
        return reranked(before, scores, right)

    images = torch.arange(selection.images.start, selection.images.stop)[:, None]
    captions = torch.arange(len(selection.captions))[:, None]
    return (
        ranks_of(ranking.i2t, images.expand_as(ranking.i2t_top), ranking.i2t_top, ranking.i2t_top_scores),
        ranks_of(ranking.t2i, ranking.t2i_top, captions.expand_as(ranking.t2i_top), ranking.t2i_top_scores),
    )
