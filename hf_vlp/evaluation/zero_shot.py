"""Zero-shot classification: images against class names put into prompts (CLIP, 2103.00020, section 3.1.4)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from hf_vlp.evaluation.gallery import embed_texts, longest_text, tokenize
from hf_vlp.evaluation.images import ImageRows, Skipped, column, embed_batches, rows_of
from hf_vlp.evaluation.recall import ranks_from_scores, recall_at
from hf_vlp.evaluation.runtime import evaluating, gather_lists, gather_rows, progress, shard
from hf_vlp.models.clip.prompts_clip import TEMPLATES

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def expand_templates(templates: Sequence[str]) -> list[str]:
    """Templates, with the name of an ensemble of `hf_vlp.models.clip.prompts_clip` replaced by its members.

    Raises:
        ValueError: there are none, or one is neither the name of an ensemble nor has a `{}` for the class name.
    """
    templates = [templates] if isinstance(templates, str) else templates
    expanded = [one for template in templates for one in TEMPLATES.get(template, (template,))]
    wrong = [template for template in expanded if "{}" not in template]
    if wrong or not expanded:
        raise ValueError(
            f"templates need '{{}}' for the class name to go to, or the name of an ensemble ({', '.join(TEMPLATES)}); "
            f"given: {wrong or 'none'}"
        )
    return expanded


def class_embeddings(
    model: nn.Module,
    processor: Any,
    class_names: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    batch_size: int = 256,
) -> Tensor:
    """One unit vector a class: the mean of the unit embeddings of its name in every template, normalised again.

    Args:
        class_names: C names.
        templates: with `{}` where the name goes, or names of ensembles.

    Returns:
        (C, D) float32 on the CPU.

    Raises:
        ValueError: no classes, a name twice, no templates, or a template without `{}`.
    """
    if len(set(class_names)) != len(class_names) or not class_names:
        raise ValueError(f"class_names must be different and at least one, not {list(class_names)[:10]}")
    templates = expand_templates(templates)
    prompts = [template.replace("{}", name) for name in class_names for template in templates]
    with evaluating(model):
        tokens = tokenize(processor, prompts, longest_text(model, processor))
        device = next(model.parameters()).device
        embeds = embed_texts(model, tokens, batch_size, device, show_progress=False)
    return normalize(embeds.view(len(class_names), len(templates), -1).mean(dim=1), dim=-1)


def evaluate_zero_shot(
    model: nn.Module,
    processor: Any,
    rows: Any,
    *,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    label_column: str = "label",
    batch_size: int = 32,
    ks: Sequence[int] = (5,),
    max_bad_rate: float = 0.0,
    limit: int | None = None,
    workers: int = 0,
    details: bool = False,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Accuracy of choosing the class whose name is most similar to the image. Ties count against the model.

    Args:
        model: follows the retrieval protocol, on the device it is to run on.
        processor: of the model.
        rows: `image` and a label: a name, or a number into `class_names`.
        class_names: by default those of the label column's `ClassLabel`, or the different names in it.
        templates: prompts that are averaged, with `{}` where the name goes; or the name of an ensemble: plain, photo,
            icon.
        label_column: name of the column.
        batch_size: images at a time.
        ks: depths beside the first place.
        max_bad_rate: share of images that may be unreadable; they are left out and counted.
        limit: use only so many rows.
        workers: processes that decode images.
        details: add the rank of the right class of every image.
        show_progress: progress bars on the main process.

    Returns:
        `metrics` in [0, 1]: `accuracy`, `top_5_accuracy` (where there are more than 5 classes), `mean_class_accuracy`;
        `per_class`; and `samples`.

    Raises:
        ValueError: no rows, no label column, a label that is none of the classes, fewer than two classes.
    """
    rows = rows_of(rows, limit)
    labels, names = _labels(rows, label_column, class_names)
    if len(names) < 2:
        raise ValueError(f"{len(names)} class: classification needs at least two; give class_names")
    templates = expand_templates(templates)
    classes = class_embeddings(model, processor, names, templates)

    with evaluating(model):
        device = next(model.parameters()).device
        on_device = classes.to(device)
        own = shard(len(rows))
        source = ImageRows(rows, processor, batch_size=batch_size, workers=workers)
        scores, failures = [torch.empty(0, len(names))], []
        total = -(-len(own) // batch_size)
        for embeds, failed in progress(embed_batches(model, source, own), "images", total=total, show=show_progress):
            failures += failed
            if embeds is not None:
                scores.append(model.similarity(embeds, on_device).float().cpu())
        skipped = Skipped(gather_lists(failures), len(rows))
        skipped.check(max_bad_rate)
        all_scores = gather_rows(torch.cat(scores))
    bad = set(skipped.rows)
    kept = torch.tensor([label for row, label in enumerate(labels) if row not in bad])
    ranks = ranks_from_scores(all_scores, torch.nn.functional.one_hot(kept, len(names)).bool())

    right = (ranks == 0).double()
    per_class = {
        name: right[kept == label].mean().item() for label, name in enumerate(names) if bool((kept == label).any())
    }
    metrics = {"accuracy": recall_at(ranks, 1)}
    metrics |= {f"top_{k}_accuracy": recall_at(ranks, k) for k in ks if k < len(names)}
    metrics["mean_class_accuracy"] = sum(per_class.values()) / len(per_class)
    result: dict[str, Any] = {
        "task": "zero-shot",
        "metrics": metrics,
        "per_class": per_class,
        "samples": {"images": len(kept), "classes": len(names), "templates": len(templates), **skipped.summary()},
    }
    if details:
        predictions = all_scores.argmax(dim=1).tolist()
        result["details"] = [
            {"label": names[label], "prediction": names[prediction], "rank": rank}
            for label, prediction, rank in zip(kept.tolist(), predictions, ranks.tolist())
        ]
    return result


def _labels(rows: Any, label_column: str, class_names: Sequence[str] | None) -> tuple[list[int], list[str]]:
    """(number of each row's class, class names)."""
    labels = column(rows, label_column)
    declared = getattr(getattr(rows, "features", {}).get(label_column), "names", None)
    names = list(class_names or declared or [])
    if not names:
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(f"{label_column!r} holds numbers without names: give class_names")
        names = sorted(set(labels))
    position = {name: index for index, name in enumerate(names)}
    numbers = []
    for row, label in enumerate(labels):
        number = position.get(label) if isinstance(label, str) else label
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(names):
            raise ValueError(
                f"row {row}: label {label!r} is none of the {len(names)} classes ({', '.join(names[:8])}, …)"
            )
        numbers.append(number)
    return numbers, names
