"""Image-text retrieval: Recall@1/5/10 in both directions, with optional re-ranking by the matching head.

The protocol is that of COCO and Flickr30K (Karpathy splits): every image has several captions; an image query is right
when *any* of its captions is among the first k, a text query when its one image is.

Works with every model that follows the package's retrieval protocol (`hf_vlp.models.retrieval`). What is computed
once: the vision tower for an image, the text tower for a text that several images share, the keys and values of an
image for a batch of texts that it is matched with, and a pair that both directions ask for. Memory is bounded:
similarities exist in blocks of images; the states that matching needs stay on the CPU, or are computed again
(`keep_states=False`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_vlp.evaluation.gallery import Gallery, Tokens, embed_texts, longest_text, tokenize
from hf_vlp.evaluation.images import ImageRows, Skipped, embed_batches, rows_of
from hf_vlp.evaluation.ranking import (
    PairScores,
    Selection,
    Similarities,
    rank_by_similarity,
    rerank_both,
    wanted_pairs,
)
from hf_vlp.evaluation.recall import recalls
from hf_vlp.evaluation.runtime import chunks, evaluating, gather_lists, gather_rows, progress, shard, world
from hf_vlp.models.retrieval import ImageEmbeds

COMBINATIONS = ("itc+itm", "itm")


def evaluate_retrieval(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 32,
    text_batch_size: int = 256,
    rerank: int | None = None,
    combine: str | None = None,
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
    """Recall@k from image to text and from text to image. Ties count against the model.

    Args:
        model: follows the retrieval protocol, on the device it is to run on.
        processor: of the model.
        rows: `image`, `text` (string or list of strings), optional `image_id` (rows with the same id are one image).
        batch_size: images at a time.
        text_batch_size: texts at a time.
        rerank: how many of the best candidates by similarity the matching head puts in order again, both directions.
        combine: what they are ordered by: "itc+itm" adds the similarity to the matching logit (BLIP, BLIP-2, LAVIS),
            "itm" takes the logit alone (ALBEF). By default as the authors of the model do: its `rerank_by`, or
            "itc+itm" where it has none.
        pair_batch_size: pairs at a time for the matching head.
        keep_states: keep what matching needs of an image (for BLIP-2 its features: 1.4 MB at 257 × 1408 in float32)
            on the CPU; otherwise encode the image again.
        folds: rank within so many equal parts as well, and average (COCO's "1K" protocol is 5 folds of the 5,000).
        ks: depths.
        equal_texts_match: count a caption as right for every image that has one with the same words; the official
            protocol knows positions only.
        max_length: tokens of a text; by default what tokenizer and text tower allow. LAVIS evaluates with 35.
        max_bad_rate: share of images, and of captions, that may be unusable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add the rank of every query.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` with `i2t_r1_itc`, …, `t2i_r10_itc`, `i2t_mean_itc`, `t2i_mean_itc`, `mean_itc` in [0, 1]; the same
        with `_itm` after re-ranking; all of them with `_<n>_folds` behind where `folds` is given; and `samples`.

    Raises:
        ValueError: no rows, no text column, a model without a matching head asked to re-rank, a NaN score.
        ErrorRateExceeded: more unusable images or captions than `max_bad_rate` allows.
    """
    combine = getattr(model, "rerank_by", "itc+itm") if combine is None else combine
    if combine not in COMBINATIONS:
        raise ValueError(f"combine={combine!r} is not known; choose one of {COMBINATIONS}")
    if rerank is not None and rerank < 1:
        raise ValueError(f"rerank={rerank}: give the number of candidates to put in order, or None")
    if rerank and not getattr(model, "supports_matching", False):
        raise ValueError(
            f"rerank={rerank} needs a matching head, which {type(model).__name__} does not have; leave rerank out"
        )
    rows = rows_of(rows, limit)
    gallery, text_failures = Gallery.from_rows(rows)
    bad_texts = Skipped(text_failures, len(gallery.text_of) + len(text_failures), "texts")
    bad_texts.check(max_bad_rate)

    with evaluating(model):
        images = _embed_images(
            model,
            ImageRows(rows, processor, batch_size=batch_size, workers=workers),
            gallery.rows,
            keep_states=bool(rerank) and keep_states,
            show_progress=show_progress,
        )
        images.skipped.check(max_bad_rate)
        gallery = gallery.without(images.skipped.rows)
        if folds is not None and not 1 <= folds <= len(gallery.rows):
            raise ValueError(f"folds={folds}: must lie between 1 and the number of images, {len(gallery.rows)}")

        tokens = tokenize(processor, gallery.texts, max_length or longest_text(model, processor))
        text_itc = embed_texts(model, tokens, text_batch_size, images.device, show_progress=show_progress)
        image_itc = torch.cat(images.itc) if images.itc else text_itc.new_empty(0, text_itc.shape[1])
        similarities = Similarities(model, image_itc, text_itc, images.first, images.device)

        count = len(gallery.rows)
        parts = [range(count)]
        parts += [range(fold * count // folds, (fold + 1) * count // folds) for fold in range(folds or 0)]
        selections = [Selection.of(gallery, part) for part in parts]
        rankings = [
            rank_by_similarity(similarities, gallery, selection, rerank or 0, equal_texts_match=equal_texts_match)
            for selection in selections
        ]
        matching = None
        if rerank:
            matching = score_pairs(
                model,
                images,
                wanted_pairs(gallery, selections, rankings),
                tokens,
                pair_batch_size=pair_batch_size,
                show_progress=show_progress,
            )

    reports = []
    for selection, ranking in zip(selections, rankings):
        ranks = {"itc": (ranking.i2t, ranking.t2i)}
        if matching is not None:
            ranks["itm"] = rerank_both(
                gallery,
                selection,
                ranking,
                matching,
                add_similarity=combine == "itc+itm",
                equal_texts_match=equal_texts_match,
            )
        reports.append(ranks)
    metrics = _metrics(reports[0], ks)
    if folds:
        per_fold = [_metrics(report, ks) for report in reports[1:]]
        metrics |= {f"{name}_{folds}_folds": sum(fold[name] for fold in per_fold) / folds for name in metrics}
    result: dict[str, Any] = {
        "task": "retrieval",
        "metrics": metrics,
        "samples": {
            "images": count,
            "texts": len(gallery.image_of),
            "different_texts": len(gallery.texts),
            "truncated_texts": tokens.truncated,
            "pairs_matched": 0 if matching is None else len(matching),
            **images.skipped.summary(),
            **bad_texts.summary(),
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


@dataclass
class _Images:
    """This process's images.

    Attributes:
        itc: embeddings of each batch, on the CPU.
        states: what matching needs of each batch, on the CPU; empty if it is to be computed again.
        first: position of the first of them in the gallery of usable images.
        rows: of the usable ones.
        skipped: unusable images of all processes.
    """

    model: nn.Module
    source: ImageRows
    device: torch.device
    skipped: Skipped
    first: int = 0
    rows: list[int] = field(default_factory=list)
    itc: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)

    def batches(self) -> Iterator[tuple[range, ImageEmbeds]]:
        """(positions in the gallery, embeddings on the device) of all of them, in order."""
        start = self.first
        for embeds in self._kept() if self.states else self._again():
            yield range(start, start + len(embeds)), embeds
            start += len(embeds)

    def _kept(self) -> Iterator[ImageEmbeds]:
        for itc, states in zip(self.itc, self.states):
            yield ImageEmbeds(itc.to(self.device), states.to(self.device))

    def _again(self) -> Iterator[ImageEmbeds]:
        for embeds, _ in embed_batches(self.model, self.source, self.rows):
            yield ImageEmbeds(embeds.itc, embeds.states)


def _embed_images(
    model: nn.Module, source: ImageRows, rows: Sequence[int], *, keep_states: bool, show_progress: bool
) -> _Images:
    """Embeds this process's part of the images; what could not be read is known to all processes."""
    own = shard(len(rows))
    images = _Images(model, source, next(model.parameters()).device, Skipped([], len(rows)))
    failures = []
    batches = embed_batches(model, source, [rows[image] for image in own])
    for embeds, failed in progress(batches, "images", total=-(-len(own) // source.batch_size), show=show_progress):
        failures += failed
        if embeds is not None:
            images.itc.append(embeds.itc.float().cpu())
            if keep_states:
                images.states.append(embeds.states.cpu())
    images.skipped = Skipped(gather_lists(failures), len(rows))
    bad = set(images.skipped.rows)
    images.rows = [rows[image] for image in own if rows[image] not in bad]
    images.first = sum(gather_lists([len(images.rows)])[: world()[0]])
    return images


def score_pairs(
    model: nn.Module,
    images: _Images,
    keys: Tensor,
    tokens: Tokens,
    *,
    pair_batch_size: int,
    show_progress: bool = True,
) -> PairScores:
    """Matching scores of the wanted pairs; every process scores those of its own images, and all get all.

    Args:
        keys: (P,) ascending, `image * texts + text`.
    """
    texts = len(tokens.ids)
    own_keys, own_scores = [torch.empty(0, dtype=torch.long)], [torch.empty(0)]
    for batch, embeds in progress(images.batches(), "matching", total=len(images.itc), show=show_progress):
        low, high = torch.searchsorted(keys, torch.tensor([batch.start * texts, batch.stop * texts])).tolist()
        mine = keys[low:high]
        # An image's pairs stay together, and among them texts of similar length.
        order = mine // texts * (tokens.lengths.max() + 1) + tokens.lengths[mine % texts]
        mine = mine[torch.argsort(order, stable=True)]
        for part in chunks(mine, pair_batch_size):
            named, index = torch.unique(part // texts - batch.start, return_inverse=True)
            scores = model.matching_scores(
                embeds[named.to(images.device)],
                index.to(images.device),
                **tokens.padded((part % texts).tolist(), images.device),
            )
            own_keys.append(part)
            own_scores.append(scores.float().cpu())
    all_keys, all_scores = gather_rows(torch.cat(own_keys)), gather_rows(torch.cat(own_scores))
    ascending = torch.argsort(all_keys)
    return PairScores(all_keys[ascending], all_scores[ascending], texts)
