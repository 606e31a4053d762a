"""Captions of Shapes scenes against the truth: which objects are named with the right colour and shape."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_vlp.data.shapes import score_caption
from hf_vlp.evaluation.generation import common_result, generate_texts
from hf_vlp.evaluation.images import column, rows_of
from hf_vlp.evaluation.results import write_json
from hf_vlp.evaluation.runtime import is_main


def evaluate_shapes_captions(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    batch_size: int = 32,
    prompt: str = "",
    num_beams: int = 1,
    max_new_tokens: int = 40,
    generation: dict[str, Any] | None = None,
    captions_file: str | Path | None = None,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Captions scenes and compares what is named with what is there.

    Args:
        model: of the role `captioning`, on the device it is to run on.
        processor: of the model.
        rows: of `hf_vlp.data.load_shapes` (`image`, `objects`).
        batch_size: images at a time.
        prompt: text that the caption goes on from; empty for none.
        num_beams, max_new_tokens: of the generation.
        generation: further arguments of `generate`.
        captions_file: JSON `[{"image_id": …, "caption": …}]`.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add caption, objects and verdict of every scene.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `object_accuracy` (share of all objects whose colour and shape the caption names
        together), `scene_accuracy` (share of scenes with every object right and nothing else named),
        `spurious_per_scene` (combinations named that are not there); by number of objects under
        `object_accuracy_by_count`; and `samples`.

    Raises:
        ValueError: no rows, or no `objects` column.
        ErrorRateExceeded: an image that cannot be read.
    """
    rows = rows_of(rows, limit)
    scenes = column(rows, "objects")
    ids = column(rows, "key", required=False) or list(range(len(scenes)))
    generated, skipped = generate_texts(
        model,
        processor,
        rows,
        range(len(scenes)),
        [prompt] * len(scenes) if prompt else None,
        batch_size=batch_size,
        workers=workers,
        description="captioning",
        show_progress=show_progress,
        **({"num_beams": num_beams, "max_new_tokens": max_new_tokens} | (generation or {})),
    )
    skipped.check(0.0)
    scores = [score_caption(caption, scenes[row]) for row, caption in generated]
    if captions_file is not None and is_main():
        write_json([{"image_id": ids[row], "caption": caption} for row, caption in generated], captions_file)
    verdicts = [verdict for score in scores for verdict in score.correct]
    by_count: dict[int, list[bool]] = {}
    for score in scores:
        by_count.setdefault(len(score.correct), []).extend(score.correct)
    metrics = {
        "object_accuracy": sum(verdicts) / max(1, len(verdicts)),
        "scene_accuracy": sum(score.exact for score in scores) / len(scores),
        "spurious_per_scene": sum(len(score.spurious) for score in scores) / len(scores),
    }
    result = common_result("shapes-captions", metrics, skipped, images=len(scores), objects=len(verdicts))
    result["object_accuracy_by_count"] = {
        str(count): sum(values) / len(values) for count, values in sorted(by_count.items()) if values
    }
    if details:
        result["details"] = [
            {
                "key": ids[row],
                "caption": caption,
                "objects": [f"{thing['color']} {thing['shape']}" for thing in scenes[row]],
                "correct": list(score.correct),
                "spurious": [" ".join(filter(None, pair)) for pair in score.spurious],
            }
            for (row, caption), score in zip(generated, scores)
        ]
    return result
