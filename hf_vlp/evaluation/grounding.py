"""Grounding: does the map of an expression point at the object that it names? Pointing game and accuracy of boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hf_vlp.data.collators import ImageTextCollator
from hf_vlp.data.records import BadRecord
from hf_vlp.data.rows import boxes_of
from hf_vlp.data.tasks import TaskDataset
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.task_batches import score_records

Box = Sequence[float]


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def resized_map(heat: Tensor, width: int, height: int) -> Tensor:
    """(h, w) to (height, width) in pixels, bicubic, as ALBEF's evaluation does."""
    return F.interpolate(heat[None, None].float(), size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def hottest_point(heat: Tensor) -> tuple[float, float]:
    """(x, y) of the centre of the hottest pixel; the middle of them where several are equally hot.

    A map without a maximum (all zero, say) thus points at the centre of the image and not at its corner.

    Raises:
        ValueError: a value is NaN.
    """
    if torch.isnan(heat).any():
        raise ValueError("the map holds NaN: the model's outputs are not finite")
    rows, columns = (heat == heat.max()).nonzero(as_tuple=True)
    return columns.double().mean().item() + 0.5, rows.double().mean().item() + 0.5


def points_into(point: tuple[float, float], boxes: Sequence[Box], tolerance: float = 0.0) -> bool:
    """Whether a point lies in one of the boxes, or within `tolerance` pixels of it (Zhang et al., 2016, allow 15)."""
    x, y = point
    return any(
        left - tolerance <= x <= right + tolerance and top - tolerance <= y <= bottom + tolerance
        for left, top, right, bottom in boxes
    )


def covered_share(boxes: Sequence[Box], width: int, height: int) -> float:
    """Share of the image's pixels in the boxes: how often a point drawn at random would hit."""
    inside = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in boxes:
        inside[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))] = True
    return float(inside.mean())


def best_proposal(heat: Tensor, proposals: Sequence[Box], alpha: float = 0.5) -> int:
    """The proposal with the most heat for its size: sum of the map inside it over area to the power of `alpha`.

    ALBEF's evaluation on RefCOCO+ (section 6.4 of the paper) with alpha 0.5. Of equal ones the first.

    Args:
        heat: (height, width) in pixels.
        proposals: boxes, such as a detector's.
    """
    height, width = heat.shape
    scores = []
    for left, top, right, bottom in proposals:
        x0, y0 = max(0, int(left)), max(0, int(top))
        x1, y1 = min(width, int(right)), min(height, int(bottom))
        area = (right - left) * (bottom - top)
        scores.append(heat[y0:y1, x0:x1].sum().item() / area**alpha if area > 0 else float("-inf"))
    return max(range(len(scores)), key=lambda position: scores[position])


def box_of_map(heat: Tensor, threshold: float = 0.5) -> tuple[float, float, float, float]:
    """The smallest box around the region of the hottest pixel that is hotter than `threshold` of the way from the
    coldest to the hottest value (pixels that touch by a side are one region).

    Args:
        heat: (height, width) in pixels.
    """
    values = heat.double()
    low, high = values.min(), values.max()
    if high <= low:
        return 0.0, 0.0, float(heat.shape[1]), float(heat.shape[0])
    hot = (values >= low + threshold * (high - low)).numpy()
    start = np.unravel_index(int(values.argmax()), hot.shape)
    reached = np.zeros_like(hot)
    reached[start] = True
    while True:
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= hot
        if (grown == reached).all():
            break
        reached = grown
    rows, columns = np.nonzero(reached)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def box_accuracy(predicted: Sequence[Box], boxes: Sequence[Sequence[Box]], threshold: float = 0.5) -> dict[str, float]:
    """Share of predicted boxes whose IoU with one of the right ones is at least `threshold`, and their `mean_iou`.

    Raises:
        ValueError: no boxes, or numbers that do not fit.
    """
    if len(predicted) != len(boxes) or not predicted:
        raise ValueError(f"{len(predicted)} predicted boxes for {len(boxes)} expressions: give as many, at least one")
    best = [max(iou(one, right) for right in wanted) for one, wanted in zip(predicted, boxes)]
    return {"accuracy": sum(value >= threshold for value in best) / len(best), "mean_iou": sum(best) / len(best)}


class _GroundingCollator(ImageTextCollator):
    """Expressions with their images; the size of each image goes along."""

    gives_image_ids = False

    def _read(self, record: dict[str, Any]) -> tuple[Any, Any]:
        image, text = super()._read(record)
        boxes, problem = boxes_of(record.get("boxes"))
        if not boxes:
            reason, _, detail = (problem or "box_missing").partition(": ")
            raise BadRecord(reason, detail)
        return image, text

    keys = ImageTextCollator.keys | {"sizes"}

    def _encode(self, images: list[Image.Image], texts: list[str]) -> dict[str, Any]:
        sizes = torch.tensor([image.size for image in images])
        return {**super()._encode(images, texts), "sizes": sizes}


def evaluate_grounding(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 16,
    layer: int | None = None,
    source: str = "matching",
    alpha: float = 0.5,
    iou_threshold: float = 0.5,
    map_threshold: float = 0.5,
    tolerance: float = 0.0,
    max_length: int | None = None,
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Compares the maps of referring expressions with the boxes of what they refer to.

    Args:
        model: has `grounding_maps(pixel_values, input_ids, attention_mask, layer=, source=).maps` (N, h, w), as
            `AlbefForImageTextRetrieval`.
        processor: of the model; it must show the model the whole image.
        rows: `image`, `text`, `boxes` (any of them is right); optional `proposals`, the boxes to choose from.
        batch_size: expressions at a time.
        layer, source: of `grounding_maps`.
        alpha: how much the size of a proposal counts, see `best_proposal`.
        iou_threshold: IoU from which a box is right.
        map_threshold: see `box_of_map`.
        tolerance: of the pointing game, in pixels.
        max_length: most tokens of an expression.
        max_bad_rate: share of records that may be unusable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add text, point, boxes and hits of every expression.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `pointing_game` and `pointing_game_chance` (a point drawn at random); `map_box_accuracy`
        and `map_box_mean_iou` of the box around the hot region; with proposals `proposal_accuracy` and
        `proposal_accuracy_chance` (a proposal drawn at random); and `samples`.

    Raises:
        ValueError: no rows, a missing column, or a model without grounding maps.
    """
    if not hasattr(model, "grounding_maps"):
        raise ValueError(
            f"{type(model).__name__} has no grounding_maps(pixel_values, input_ids, attention_mask): grounding needs "
            f"a model with maps, such as ALBEF's retrieval model"
        )
    rows = rows_of(rows, limit)
    for name in ("text", "boxes"):
        column(rows, name)
    records = TaskDataset(rows, "grounding")

    def score(batch: dict[str, Any]) -> list[tuple[Tensor, tuple[int, int]]]:
        sizes = batch.pop("sizes").tolist()
        maps = model.grounding_maps(**batch, layer=layer, source=source).maps.float().cpu()
        return [(one, tuple(size)) for one, size in zip(maps, sizes)]

    scored, skipped = score_records(
        model,
        records,
        _GroundingCollator,
        processor,
        score,
        batch_size=batch_size,
        workers=workers,
        description="expressions",
        show_progress=show_progress,
        max_length=max_length,
    )
    skipped.check(max_bad_rate)
    texts, all_boxes = column(rows, "text"), column(rows, "boxes")
    all_proposals = column(rows, "proposals", required=False)
    hits, chances, drawn, chosen, proposal_chances, found = [], [], [], [], [], []
    for row, (small, (width, height)) in scored:
        boxes = boxes_of(all_boxes[row])[0] or []
        heat = resized_map(small, width, height)
        point = hottest_point(heat)
        hits.append(points_into(point, boxes, tolerance))
        chances.append(covered_share(boxes, width, height))
        drawn.append(box_of_map(heat, map_threshold))
        proposals = None if all_proposals is None else all_proposals[row]
        if proposals:
            best = proposals[best_proposal(heat, proposals, alpha)]
            chosen.append((best, boxes))
            fits = [max(iou(one, right) for right in boxes) >= iou_threshold for one in proposals]
            proposal_chances.append(sum(fits) / len(fits))
        if details:
            found.append(
                {
                    "text": texts[row],
                    "point": list(point),
                    "hit": hits[-1],
                    "map_box": list(drawn[-1]),
                    "boxes": boxes,
                }
            )
    boxed = box_accuracy(drawn, [boxes_of(all_boxes[row])[0] or [] for row, _ in scored], iou_threshold)
    metrics = {
        "pointing_game": sum(hits) / len(hits),
        "pointing_game_chance": sum(chances) / len(chances),
        "map_box_accuracy": boxed["accuracy"],
        "map_box_mean_iou": boxed["mean_iou"],
    }
    if chosen:
        best_boxes, wanted = [box for box, _ in chosen], [boxes for _, boxes in chosen]
        metrics["proposal_accuracy"] = box_accuracy(best_boxes, wanted, iou_threshold)["accuracy"]
        metrics["proposal_accuracy_chance"] = sum(proposal_chances) / len(proposal_chances)
    result: dict[str, Any] = {
        "task": "grounding",
        "metrics": metrics,
        "samples": {"expressions": len(scored), **skipped.summary()},
    }
    if details:
        result["details"] = found
    return result
