"""Claim: the maps of the matching score point at the object that a text names, far above chance.

    python benchmarks/claims/grounding.py [--seeds 0 1 2] [--output_dir outputs/claims]

ALBEF (arXiv 2107.07651), section 6.4: Grad-CAM on the cross-attention of a fusion layer, learnt without boxes. The
model is the full arm of objectives.py (trained once for both), fine-tuned as in the paper by retrieval on pictures and
expressions that name one object of each. Each text of the test names one of the two objects of a scene. Chance of the
pointing game is a point drawn at random in the picture; the stricter one is to choose either object at random, which
the column on the two objects is compared with. The model before its fine-tuning is measured as well.

In fine-tuning all pictures with the same expression are positives of each other, and negatives are random: a hard one
would too often be a picture in which the expression's object stands unnamed.
"""

import os
from pathlib import Path
from typing import Any

from _claims import TEST_SCENES, WORLD, Arm, arguments, arm, changes_of, measured, report, trained

# By the layer of the text stack whose cross-attention is looked at.
LAYERS = (2, 3)
FULL = arm("ITC + ITM + MLM")
FINETUNING = {
    "per_device_train_batch_size": 64,
    "max_steps": 300,
    "learning_rate": 3e-4,
    "weight_decay": 0.05,
    "warmup_steps": 30,
    "negatives": "random",
}
PROPOSAL = "proposal_accuracy"


def expressions(folder: Path, scenes: int = 8000) -> Path:
    """Folder of pictures of two objects and expressions that name one of them, which is what tells pairs apart."""
    file = folder / "expressions" / f"train_{scenes}" / "train.parquet"
    if not file.is_file():
        from hf_vlp.data import load_task

        rows = load_task("grounding", "shapes", "train", size=scenes, min_objects=2, **WORLD)
        others = [name for name in rows.column_names if name not in ("image", "text", "image_id")]
        rows = rows.map(lambda row: {"image_id": row["text"]}, remove_columns=others)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        rows.to_parquet(partial)
        partial.replace(file)
    return file.parent


def grounding_metrics(model: Path) -> dict[str, float]:
    """The pointing game and the box around the hot region, for each fusion layer."""
    from hf_vlp.evaluation.run import run_evaluation

    metrics: dict[str, float] = {}
    for layer in LAYERS:
        options: dict[str, Any] = {**WORLD, "size": TEST_SCENES, "min_objects": 2}
        result = run_evaluation(
            "grounding", model, "shapes", data_options=options, batch_size=50, layer=layer, show_progress=False
        )
        for name, value in result["metrics"].items():
            metrics[f"{name}_{layer}"] = value
    return metrics


def main() -> None:
    given = arguments(__doc__, [FULL.name])
    changes = changes_of(given)
    data = str(expressions(given.output_dir))
    rows: dict[str, dict[int, dict[str, float]]] = {"chance": {}}
    for seed in given.seeds:
        pretrained = trained(FULL, seed, given.output_dir, changes)
        options = {**FINETUNING, "model_name_or_path": str(pretrained / "model"), "train_data": data}
        finetuning = Arm("fine-tuned", tuple(options.items()), "finetune_retrieval", ())
        for name, run in (
            ("before", pretrained),
            (finetuning.name, trained(finetuning, seed, given.output_dir, changes)),
        ):
            found = measured(run, "grounding", grounding_metrics)
            rows["chance"][seed] = {one: found[f"{one}_chance_{LAYERS[0]}"] for one in ("pointing_game", PROPOSAL)}
            for layer in LAYERS:
                ending = f"_{layer}"
                of_layer = {one.removesuffix(ending): value for one, value in found.items() if one.endswith(ending)}
                rows.setdefault(f"{name}, fusion layer {layer - LAYERS[0] + 1}", {})[seed] = of_layer
    report(
        "Grounding in scenes of two objects, learnt without boxes: ± over seeds",
        rows,
        {
            "pointing game": {"": "pointing_game"},
            "right one of the two objects": {"": PROPOSAL},
            "mean IoU of the map's box": {"": "map_box_mean_iou"},
            "map's box with IoU ≥ 0.5": {"": "map_box_accuracy"},
        },
        "chance",
        given.output_dir / "grounding.json",
    )


if __name__ == "__main__":
    main()
