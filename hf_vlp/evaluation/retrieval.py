"""Image-text retrieval: Recall@1/5/10 in both directions, with optional re-ranking by the matching head.

The protocol is that of COCO and Flickr30K (Karpathy splits): every image has several captions; an image query is right
when *any* of its captions is among the first k, a text query when its one image is.

Works with every model that follows the package's retrieval protocol (`embed_images`, `embed_texts`, `similarity`,
`matching_scores`). What is computed once: the vision tower for an image, the text tower for a text that several images
share, the keys and values of an image for all texts that it is matched with, and a pair that both directions ask for.
Memory is bounded: similarities exist in blocks of images; the states that matching needs stay on the CPU, or are
computed again (`keep_states=False`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.evaluation.images import ImageRows, Skipped, column, embed_batches, rows_of
from hf_vlp.evaluation.recall import check_not_nan, recalls, top_k
from hf_vlp.evaluation.runtime import (
    batches_by_length,
    chunks,
    evaluating,
    gather_lists,
    gather_rows,
    progress,
    shard,
    world,
)

COMBINATIONS = ("itc+itm", "itm")
# Scores of one block of images with all texts: 64 Mi elements, 256 MiB in float32.
BLOCK_ELEMENTS = 2**26


@dataclass
class Gallery:
    """What is retrieved from what.

    Attributes:
        rows: for each image, the row that holds its picture.
        image_ids: for each image.
        texts: the different texts, each once.
        text_of: (T,) for each caption, its position in `texts`.
        image_of: (T,) for each caption, its image; ascending.
    """

    rows: list[int]
    image_ids: list[Any]
    texts: list[str]
    text_of: Tensor
    image_of: Tensor

    @classmethod
    def from_rows(cls, rows: Any) -> "Gallery":
        """Reads captions and image ids (not the pictures); rows with the same `image_id` are one image.

        Raises:
            ValueError: there are no rows, no `text` column, or an image without a caption.
        """
        texts = column(rows, "text")
        ids = column(rows, "image_id", required=False)
        images: dict[Any, int] = {}
        first_row: list[int] = []
        captions: list[list[str]] = []
        for row, text in enumerate(texts):
            key = ("row", row) if ids is None or ids[row] is None else ids[row]
            if key not in images:
                images[key] = len(images)
                first_row.append(row)
                captions.append([])
            given = [text] if isinstance(text, str) else list(text or [])
            captions[images[key]] += [one for one in given if isinstance(one, str) and one.strip()]
        without = [image for image, own in enumerate(captions) if not own]
        if without:
            named = ", ".join(str(first_row[image]) for image in without[:5])
            raise ValueError(
                f"{len(without)} of {len(captions)} images have no text (rows {named}{', …' if without[5:] else ''}): "
                "retrieval needs at least one caption in the `text` column of every image; drop these rows"
            )
        unique = {text: None for own in captions for text in own}
        position = {text: index for index, text in enumerate(unique)}
        return cls(
            rows=first_row,
            image_ids=[row if isinstance(key, tuple) else key for row, key in zip(first_row, images)],
            texts=list(unique),
            text_of=torch.tensor([position[text] for own in captions for text in own]),
            image_of=torch.tensor([image for image, own in enumerate(captions) for _ in own]),
        )

    def captions(self) -> list[list[str]]:
        """The captions of each image."""
        captions: list[list[str]] = [[] for _ in self.rows]
        for image, text in zip(self.image_of.tolist(), self.text_of.tolist()):
            captions[image].append(self.texts[text])
        return captions

    def without(self, dropped: Sequence[int]) -> "Gallery":
        """The gallery without some images and their captions."""
        gone = set(dropped)
        kept = [image for image in range(len(self.rows)) if image not in gone]
        number = torch.full((len(self.rows),), -1)
        number[kept] = torch.arange(len(kept))
        captions = number[self.image_of] >= 0
        used, text_of = torch.unique(self.text_of[captions], return_inverse=True)
        return Gallery(
            rows=[self.rows[image] for image in kept],
            image_ids=[self.image_ids[image] for image in kept],
            texts=[self.texts[text] for text in used.tolist()],
            text_of=text_of,
            image_of=number[self.image_of[captions]],
        )


@dataclass
class Selection:
    """A part of the gallery that is ranked by itself: everything, or one fold."""

    name: str
    images: range
    captions: Tensor  # (t,) positions of its captions in the gallery


@dataclass
class Ranking:
    """Ranks by ITC of one selection, and the candidates that re-ranking will look at (k = 0 when there is none).

    Image positions are the gallery's; caption positions are the selection's.
    """

    i2t: Tensor  # (i,)
    t2i: Tensor  # (t,)
    i2t_top: Tensor  # (i, k) captions
    i2t_top_scores: Tensor
    t2i_top: Tensor  # (t, k) images
    t2i_top_scores: Tensor


class Similarities:
    """Blocks of the ITC similarity matrix of this process's images with all different texts."""

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
        self._kept: dict[tuple[int, int], Tensor] = {}

    def blocks(self, images: range) -> Iterator[tuple[Tensor, Tensor]]:
        """(positions (b,), similarities (b, U) in float32) of those of `images` that are this process's."""
        start = max(images.start, self.first_image)
        stop = min(images.stop, self.first_image + len(self.image_itc))
        for begin in range(start, stop, self.block):
            end = min(begin + self.block, stop)
            scores = self._kept.get((begin, end))
            if scores is None:
                own = self.image_itc[begin - self.first_image : end - self.first_image].to(self.device)
                scores = self.model.similarity(own, self.text_itc).float()
                check_not_nan(scores)
                # A matrix of one block is not computed again for the second pass.
                if end - begin == len(self.image_itc):
                    self._kept[begin, end] = scores
            yield torch.arange(begin, end, device=self.device), scores


def rank_by_similarity(
    similarities: Similarities, gallery: Gallery, selection: Selection, k: int = 0, *, equal_texts_match: bool = False
) -> Ranking:
    """Ranks of all queries of a selection, and the `k` best candidates of each, on every process.

    Args:
        similarities: of this process's images; the processes exchange what they need.
        k: candidates kept for re-ranking, 0 for none.
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

    def block_scores() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for positions, unique in similarities.blocks(selection.images):
            if equal_texts_match:
                right = has_text[positions - selection.images.start][:, text_of]
            else:
                right = image_of == positions[:, None]
            yield positions, unique[:, text_of], right

    i2t, i2t_top, i2t_top_scores = [], [], []
    best = torch.full((captions,), float("-inf"), device=device)
    near = torch.empty(captions, 0, dtype=torch.long, device=device)
    near_scores = torch.empty(captions, 0, device=device)
    for positions, scores, right in block_scores():
        of_right = scores.masked_fill(~right, float("-inf"))
        i2t.append(((scores >= of_right.amax(dim=1, keepdim=True)) & ~right).sum(dim=1))
        best = torch.maximum(best, of_right.amax(dim=0))
        if k:
            chosen = top_k(scores, k_texts)
            i2t_top.append(chosen)
            i2t_top_scores.append(scores.gather(1, chosen))
            near, near_scores = _merge_candidates(
                (near, near_scores), (positions.expand(captions, -1), scores.T), k_images
            )
    best = torch.stack(gather_lists([best.cpu()])).amax(dim=0).to(device)
    t2i = torch.zeros(captions, dtype=torch.long, device=device)
    for _, scores, right in block_scores():
        t2i += ((scores >= best) & ~right).sum(dim=0)
    t2i = torch.stack(gather_lists([t2i.cpu()])).sum(dim=0)

    candidates = (torch.empty(captions, 0, dtype=torch.long), torch.empty(captions, 0))
    if k:
        for part in gather_lists([(near.cpu(), near_scores.cpu())]):
            candidates = _merge_candidates(candidates, part, k_images)
    return Ranking(
        i2t=gather_rows(torch.cat([*i2t, torch.empty(0, dtype=torch.long, device=device)]).cpu()),
        t2i=t2i,
        i2t_top=gather_rows(_cat(i2t_top, k_texts, torch.long)),
        i2t_top_scores=gather_rows(_cat(i2t_top_scores, k_texts, torch.float)),
        t2i_top=candidates[0],
        t2i_top_scores=candidates[1],
    )


def _cat(parts: list[Tensor], width: int, dtype: torch.dtype) -> Tensor:
    return torch.cat([part.cpu() for part in parts] or [torch.empty(0, width, dtype=dtype)])


def _merge_candidates(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The best `k` of two sets of (positions, scores), each (t, n); the positions of `left` come first."""
    positions = torch.cat([left[0], right[0]], dim=1)
    scores = torch.cat([left[1], right[1]], dim=1)
    chosen = top_k(scores, min(k, scores.shape[1]))
    return positions.gather(1, chosen), scores.gather(1, chosen)


def rerank(ranks: Tensor, candidates: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """Ranks after the `k` best candidates of each query are put in order by `scores`.

    A query whose right answer is not among its candidates keeps its rank, which is at least k.

    Args:
        ranks: (Q,) before.
        candidates: (Q, k), only its shape is used.
        scores: (Q, k) of the candidates.
        right: (Q, k) bool.
    """
    if scores.shape != candidates.shape or right.shape != candidates.shape:
        raise ValueError(f"scores {tuple(scores.shape)} and right {tuple(right.shape)} must be {candidates.shape}")
    check_not_nan(scores)
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    inside = ((scores >= best) & ~right).sum(dim=1)
    return torch.where(right.any(dim=1), inside, ranks)


class PairScores:
    """Matching scores of (image, text) pairs, looked up by pair."""

    def __init__(self, keys: Tensor, scores: Tensor, texts: int):
        """`keys`: ascending `image * texts + text`, (P,); `scores`: (P,)."""
        self.keys, self.scores, self.texts = keys, scores, texts

    def __call__(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scores of pairs, in the shape of `images` and `texts`."""
        return self.scores[torch.searchsorted(self.keys, images * self.texts + texts)]


def evaluate_retrieval(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 32,
    text_batch_size: int = 256,
    rerank: int | None = None,
    combine: str = "itc+itm",
    pair_batch_size: int = 128,
    keep_states: bool = True,
    folds: int | None = None,
    ks: Sequence[int] = (1, 5, 10),
    equal_texts_match: bool = False,
    max_length: int | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Recall@k from image to text and from text to image.

    Args:
        model: follows the retrieval protocol, on the device it is to run on.
        processor: of the model.
        rows: `image`, `text` (string or list of strings), optional `image_id` (rows with the same id are one image).
        batch_size: images at a time.
        text_batch_size: texts at a time.
        rerank: how many of the best candidates by ITC the matching head puts in order again, in both directions.
        combine: what they are ordered by: `"itc+itm"` adds the similarity to the matching logit (BLIP, BLIP-2 and
            LAVIS), `"itm"` takes the logit alone (ALBEF).
        pair_batch_size: pairs at a time for the matching head.
        keep_states: keep what matching needs of an image (for BLIP-2 its features: 1.4 MB at 257 × 1408 in float32)
            on the CPU; `False` encodes the image again instead.
        folds: also rank within so many equal parts and average (COCO's "1K" protocol is 5 folds of the 5,000).
        ks: depths.
        equal_texts_match: count a caption as right for every image that has one with the same words. The official
            protocol (`False`) knows positions only.
        max_length: tokens of a text; by default what tokenizer and text tower allow. LAVIS evaluates with 35.
        max_bad_rate: share of images that may be unreadable; they are left out, with their texts, and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add the rank of every query.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` with `i2t_r1_itc`, …, `t2i_r10_itc`, `i2t_mean_itc`, `t2i_mean_itc`, `mean_itc` in [0, 1]; the same
        with `_itm` after re-ranking; both with `_<n>_folds` behind where `folds` is given; and `samples`.

    Raises:
        ValueError: no rows, an image without text, a model without a matching head asked to re-rank, a NaN score.
    """
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not known; choose one of {COMBINATIONS}")
    if rerank is not None and rerank < 1:
        raise ValueError(f"rerank={rerank}: give the number of candidates to put in order, or None")
    if rerank and not getattr(model, "supports_matching", False):
        raise ValueError(
            f"rerank={rerank} needs a matching head, which {type(model).__name__} does not have; leave rerank out"
        )
    rows = rows_of(rows, limit)
    gallery = Gallery.from_rows(rows)
    if folds is not None and not 1 <= folds <= len(gallery.rows):
        raise ValueError(f"folds={folds}: must lie between 1 and the number of images, {len(gallery.rows)}")

    with evaluating(model):
        device = next(model.parameters()).device
        source = ImageRows(rows, processor, batch_size=batch_size, workers=workers)
        own = shard(len(gallery.rows))
        itc, states, failures = [], [], []
        bar = progress(
            embed_batches(model, source, [gallery.rows[image] for image in own]),
            "images",
            total=-(-len(own) // batch_size),
            show=show_progress,
        )
        for embeds, failed in bar:
            failures += failed
            if embeds is not None:
                itc.append(embeds.itc.float().cpu())
                if rerank and keep_states:
                    states.append(embeds.states.cpu())
        skipped = Skipped(gather_lists(failures), len(gallery.rows))
        skipped.check(max_bad_rate)
        bad_rows = set(skipped.rows)
        own_images = [image for image in own if gallery.rows[image] not in bad_rows]
        gallery = gallery.without([image for image, row in enumerate(gallery.rows) if row in bad_rows])
        first_image = sum(gather_lists([len(own_images)])[: world()[0]])

        tokens = tokenize(processor, gallery.texts, max_length or longest_text(model, processor), text_batch_size)
        text_itc = embed_texts(model, processor, tokens, text_batch_size, device, show_progress)
        image_itc = torch.cat(itc) if itc else text_itc.new_empty(0, text_itc.shape[1])
        similarities = Similarities(model, image_itc, text_itc, first_image, device)

        selections = [Selection("", range(len(gallery.rows)), torch.arange(len(gallery.image_of)))]
        for fold in range(folds or 0):
            images = range(fold * len(gallery.rows) // folds, (fold + 1) * len(gallery.rows) // folds)
            inside = (gallery.image_of >= images.start) & (gallery.image_of < images.stop)
            selections.append(Selection(f"fold {fold + 1}", images, inside.nonzero().flatten()))
        rankings = [
            rank_by_similarity(similarities, gallery, s, rerank or 0, equal_texts_match=equal_texts_match)
            for s in selections
        ]
        scores = None
        if rerank:
            scores = score_pairs(
                model,
                processor,
                gallery,
                wanted_pairs(gallery, selections, rankings),
                tokens,
                ImageStates(model, source, gallery, image_itc, states, first_image, keep_states),
                batch_size=batch_size,
                pair_batch_size=pair_batch_size,
                show_progress=show_progress,
            )

    reports = []
    for selection, ranking in zip(selections, rankings):
        ranks = {"itc": (ranking.i2t, ranking.t2i)}
        if scores is not None:
            ranks["itm"] = _reranked(gallery, selection, ranking, scores, combine, equal_texts_match)
        reports.append(ranks)
    metrics = _metrics(reports[0], ks)
    if folds:
        per_fold = [_metrics(report, ks) for report in reports[1:]]
        for name in metrics.copy():
            metrics[f"{name}_{folds}_folds"] = sum(fold[name] for fold in per_fold) / folds
    result: dict[str, Any] = {
        "task": "retrieval",
        "metrics": metrics,
        "samples": {
            "images": len(gallery.rows),
            "texts": len(gallery.image_of),
            "different_texts": len(gallery.texts),
            "truncated_texts": tokens.truncated,
            "pairs_matched": 0 if scores is None else len(scores.keys),
            **skipped.summary(),
        },
    }
    if details:
        result["details"] = {
            "image_ids": gallery.image_ids,
            "ranks": {
                f"{direction}_{kind}": ranks.tolist()
                for kind, pair in reports[0].items()
                for direction, ranks in zip(("i2t", "t2i"), pair)
            },
        }
    return result


def _metrics(ranks: dict[str, tuple[Tensor, Tensor]], ks: Sequence[int]) -> dict[str, float]:
    metrics = {}
    for kind, (i2t, t2i) in ranks.items():
        both = {"i2t": recalls(i2t, ks), "t2i": recalls(t2i, ks)}
        for direction, values in both.items():
            metrics |= {f"{direction}_{name}_{kind}": value for name, value in values.items()}
        metrics[f"mean_{kind}"] = (both["i2t"]["mean"] + both["t2i"]["mean"]) / 2
    return metrics


def _reranked(
    gallery: Gallery,
    selection: Selection,
    ranking: Ranking,
    scores: PairScores,
    combine: str,
    equal_texts_match: bool,
) -> tuple[Tensor, Tensor]:
    """Ranks of both directions after matching."""
    captions_image = gallery.image_of[selection.captions]
    captions_text = gallery.text_of[selection.captions]
    images = torch.arange(selection.images.start, selection.images.stop)
    pairs = gallery.image_of * len(gallery.texts) + gallery.text_of

    def right(image: Tensor, caption: Tensor) -> Tensor:
        if equal_texts_match:
            return torch.isin(image * len(gallery.texts) + captions_text[caption], pairs)
        return captions_image[caption] == image

    results = []
    for ranks, image, caption, similarity in (
        (ranking.i2t, images[:, None].expand_as(ranking.i2t_top), ranking.i2t_top, ranking.i2t_top_scores),
        (
            ranking.t2i,
            ranking.t2i_top,
            torch.arange(len(captions_image))[:, None].expand_as(ranking.t2i_top),
            ranking.t2i_top_scores,
        ),
    ):
        matching = scores(image, captions_text[caption])
        combined = matching + similarity if combine == "itc+itm" else matching
        results.append(rerank(ranks, image, combined, right(image, caption)))
    return results[0], results[1]


def wanted_pairs(gallery: Gallery, selections: Sequence[Selection], rankings: Sequence[Ranking]) -> Tensor:
    """Every (image, text) pair that some direction of some selection re-ranks, once: ascending keys (P,)."""
    keys = []
    for selection, ranking in zip(selections, rankings):
        text_of = gallery.text_of[selection.captions]
        images = torch.arange(selection.images.start, selection.images.stop)
        keys.append((images[:, None] * len(gallery.texts) + text_of[ranking.i2t_top]).flatten())
        keys.append((ranking.t2i_top * len(gallery.texts) + text_of[:, None]).flatten())
    return torch.unique(torch.cat(keys))


@dataclass
class ImageStates:
    """Gives the embeddings of this process's images again, from memory or by encoding them once more."""

    model: nn.Module
    source: ImageRows
    gallery: Gallery
    image_itc: Tensor
    states: list[Tensor]
    first_image: int
    keep: bool

    def __post_init__(self) -> None:
        self._joined = torch.cat(self.states) if self.keep and self.states else None
        self.states = []

    def batches(self, size: int) -> Iterator[tuple[range, Any]]:
        """(gallery positions, embeddings on the model's device) of all own images, in order."""
        device = next(self.model.parameters()).device
        images = range(self.first_image, self.first_image + len(self.image_itc))
        if not self.keep:
            start = images.start
            for embeds, _ in embed_batches(self.model, self.source, [self.gallery.rows[image] for image in images]):
                yield range(start, start + len(embeds.itc)), embeds
                start += len(embeds.itc)
            return
        for batch in chunks(images, size):
            own = slice(batch.start - self.first_image, batch.stop - self.first_image)
            yield batch, StoredEmbeds(self.image_itc[own].to(device), self._joined[own].to(device))


@dataclass
class StoredEmbeds:
    """Embeddings of some images, as `matching_scores` of the retrieval protocol takes them."""

    itc: Tensor
    states: Tensor | None


def score_pairs(
    model: nn.Module,
    processor: Any,
    gallery: Gallery,
    keys: Tensor,
    tokens: "Tokens",
    images: ImageStates,
    *,
    batch_size: int,
    pair_batch_size: int,
    show_progress: bool = True,
) -> PairScores:
    """Matching scores of the wanted pairs; every process scores those of its own images, and all get all."""
    texts = len(gallery.texts)
    device = next(model.parameters()).device
    own_keys, own_scores = [], []
    total = -(-len(images.image_itc) // batch_size)
    for batch, embeds in progress(images.batches(batch_size), "matching", total=total, show=show_progress):
        low, high = torch.searchsorted(keys, torch.tensor([batch.start * texts, batch.stop * texts])).tolist()
        mine = keys[low:high]
        # Texts of similar length side by side within an image: little padding, and an image's pairs stay together.
        lengths = tokens.lengths[mine % texts]
        mine = mine[torch.argsort(mine // texts * (tokens.lengths.max() + 1) + lengths, stable=True)]
        for part in chunks(mine, pair_batch_size):
            local = part // texts - batch.start
            named, index = torch.unique(local, return_inverse=True)
            inputs = tokens.padded((part % texts).tolist(), processor)
            scores = model.matching_scores(
                _select(embeds, named.to(device)),
                index.to(device),
                inputs["input_ids"].to(device),
                inputs["attention_mask"].to(device),
            )
            own_keys.append(part)
            own_scores.append(scores.float().cpu())
    all_keys = gather_rows(torch.cat([*own_keys, torch.empty(0, dtype=torch.long)]))
    all_scores = gather_rows(torch.cat([*own_scores, torch.empty(0)]))
    order = torch.argsort(all_keys)
    return PairScores(all_keys[order], all_scores[order], texts)


def _select(embeds: Any, index: Tensor) -> Any:
    states = None if embeds.states is None else embeds.states[index]
    return replace(embeds, itc=embeds.itc[index], states=states)


@dataclass
class Tokens:
    """Token ids of texts, without padding."""

    ids: list[list[int]]
    truncated: int

    def __post_init__(self) -> None:
        self.lengths = torch.tensor([len(one) for one in self.ids])

    def padded(self, texts: Sequence[int], processor: Any) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (n, longest) of some texts, padded on the right."""
        pad = processor.tokenizer.pad_token_id
        longest = max(len(self.ids[text]) for text in texts)
        ids = torch.full((len(texts), longest), 0 if pad is None else pad)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(self.ids[text])] = torch.tensor(self.ids[text])
            mask[row, : len(self.ids[text])] = 1
        return {"input_ids": ids, "attention_mask": mask}


def longest_text(model: nn.Module, processor: Any) -> int:
    """How many tokens both the tokenizer and the text tower allow."""
    config = getattr(model, "config", None)
    tower = getattr(config, "qformer_config", None) or getattr(config, "text_config", None)
    limits = [processor.tokenizer.model_max_length, getattr(tower, "max_position_embeddings", None)]
    return min(int(limit) for limit in limits if limit is not None)


def tokenize(processor: Any, texts: Sequence[str], max_length: int, batch_size: int = 1024) -> Tokens:
    """Token ids of texts through the processor, cut at `max_length`; counts those that were cut."""
    ids: list[list[int]] = []
    truncated = 0
    for batch in chunks(texts, batch_size):
        encoded = processor(text=list(batch), truncation=True, max_length=max_length + 1)["input_ids"]
        longer = [position for position, one in enumerate(encoded) if len(one) > max_length]
        if longer:
            cut = processor(text=[batch[p] for p in longer], truncation=True, max_length=max_length)["input_ids"]
            for position, one in zip(longer, cut):
                encoded[position] = one
        ids += [list(one) for one in encoded]
        truncated += len(longer)
    return Tokens(ids, truncated)


def embed_texts(
    model: nn.Module,
    processor: Any,
    tokens: Tokens,
    batch_size: int,
    device: torch.device,
    show_progress: bool = True,
) -> Tensor:
    """Embeddings (U, D) of all texts in float32 on the CPU; each process embeds its part."""
    own = shard(len(tokens.ids))
    parts: list[tuple[list[int], Tensor]] = []
    batches = list(batches_by_length([len(tokens.ids[text]) for text in own], batch_size))
    for batch in progress(batches, "texts", show=show_progress):
        inputs = tokens.padded([own[position] for position in batch], processor)
        embeds = model.embed_texts(inputs["input_ids"].to(device), inputs["attention_mask"].to(device))
        parts.append((batch, embeds.float().cpu()))
    order = torch.tensor([position for batch, _ in parts for position in batch], dtype=torch.long)
    joined = torch.cat([embeds for _, embeds in parts]) if parts else None
    if joined is not None:
        joined = torch.empty_like(joined).index_copy_(0, order, joined)
    gathered = [part for part in gather_lists([joined]) if part is not None]
    return torch.cat(gathered)
