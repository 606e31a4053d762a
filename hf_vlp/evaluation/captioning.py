"""Captioning: generated captions by BLEU-1..4, ROUGE-L, CIDEr and CIDEr-D, as the COCO caption evaluation does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.evaluation.caption_scores import caption_metrics
from hf_vlp.evaluation.gallery import Gallery
from hf_vlp.evaluation.generation import common_result, generate_texts
from hf_vlp.evaluation.images import Skipped, rows_of
from hf_vlp.evaluation.ptb_tokenizer import tokenize_captions
from hf_vlp.evaluation.results import write_json
from hf_vlp.evaluation.runtime import is_main


def score_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Scores of captions as people and models write them: tokenised first, then measured.

    Args:
        predictions: one caption an image.
        references: the reference captions of each image.

    Returns:
        `metrics` (`bleu_1` … `bleu_4`, `rouge_l`, `cider`, `cider_d`) and `per_image` with a list for each of them.

    Raises:
        ValueError: nothing to score, lengths differ, an image without a reference.
    """
    scores = caption_metrics(tokenize_captions(predictions), [tokenize_captions(captions) for captions in references])
    return {
        "metrics": {name: score.corpus for name, score in scores.items()},
        "per_image": {name: score.per_image for name, score in scores.items()},
    }


def evaluate_captioning(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 16,
    prompt: str = "",
    num_beams: int = 5,
    max_new_tokens: int = 30,
    min_new_tokens: int | None = None,
    length_penalty: float = 1.0,
    generation: dict[str, Any] | None = None,
    captions_file: str | Path | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Captions every image once and scores the captions against all its reference texts.

    Args:
        model: of the role `captioning`, on the device it is to run on.
        processor: of the model.
        rows: `image`, `text` (string or list of strings), optional `image_id` (rows with the same id are one image).
        batch_size: images at a time.
        prompt: text that the caption goes on from ("a photo of"); empty for none. It is not part of the caption.
        num_beams, max_new_tokens, min_new_tokens, length_penalty: of beam search.
        generation: further arguments of `generate`.
        captions_file: JSON in the result format of COCO, `[{"image_id": …, "caption": …}]`.
        max_bad_rate: share of images that may be unreadable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add caption, references and scores of every image.
        show_progress: progress bars on the main process.

    Returns:
        `metrics`, on the scales of the reference code (BLEU and ROUGE-L in [0, 1], CIDEr up to 10), and `samples`.

    Raises:
        ValueError: no rows, an image without a reference, unreadable images above the rate.
    """
    rows = rows_of(rows, limit)
    gallery, text_failures = Gallery.from_rows(rows)
    bad_texts = Skipped(text_failures, len(gallery.text_of) + len(text_failures), "texts")
    bad_texts.check(max_bad_rate)
    references = gallery.captions()
    options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    if min_new_tokens is not None:
        options["min_new_tokens"] = min_new_tokens
    if num_beams > 1:
        options["length_penalty"] = length_penalty
    generated, skipped = generate_texts(
        model,
        processor,
        rows,
        gallery.rows,
        [prompt] * len(gallery.rows) if prompt else None,
        batch_size=batch_size,
        workers=workers,
        description="captioning",
        show_progress=show_progress,
        **(options | (generation or {})),
    )
    skipped.check(max_bad_rate)
    captions = [caption for _, caption in generated]
    scores = score_captions(captions, [references[image] for image, _ in generated])
    if captions_file is not None and is_main():
        write_json(
            [{"image_id": gallery.image_ids[image], "caption": caption} for image, caption in generated],
            captions_file,
        )
    result = common_result(
        "captioning",
        scores["metrics"],
        skipped,
        images=len(captions),
        references=sum(len(references[image]) for image, _ in generated),
        empty_captions=sum(not caption for caption in captions),
        **bad_texts.summary(),
    )
    if details:
        result["details"] = [
            {
                "image_id": gallery.image_ids[image],
                "caption": caption,
                "references": references[image],
                **{name: values[position] for name, values in scores["per_image"].items()},
            }
            for position, (image, caption) in enumerate(generated)
        ]
    return result
