"""Claim: the maps of the matching score point at the object that a text names, far above chance.

    python benchmarks/claims/grounding.py [--seeds 0 1 2] [--output_dir outputs/claims]

ALBEF (arXiv 2107.07651), section 6.4: Grad-CAM on the cross-attention of a fusion layer, learnt from captions alone,
without boxes. The model is the full arm of objectives.py (trained once for both). Each text names one of the two
objects of a test scene. Chance of the pointing game is a point drawn at random in the picture; the stricter one is to
choose either object at random, which the column on the two objects is compared with.
"""

from pathlib import Path
from typing import Any

from _claims import TEST_SCENES, WORLD, arguments, arm, over_arms, report

# The full arm of objectives.py, by the layer of the text stack whose cross-attention is looked at.
LAYERS = (2, 3)
FULL = arm("ITC + ITM + MLM")
PROPOSAL = "proposal_accuracy"


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
    trained = over_arms([FULL], given, "grounding", grounding_metrics)[FULL.name]
    rows: dict[str, dict[int, dict[str, float]]] = {"chance": {}}
    for seed, found in trained.items():
        rows["chance"][seed] = {name: found[f"{name}_chance_{LAYERS[0]}"] for name in ("pointing_game", PROPOSAL)}
        for layer in LAYERS:
            ours = {
                name.removesuffix(f"_{layer}"): value for name, value in found.items() if name.endswith(f"_{layer}")
            }
            rows.setdefault(f"fusion layer {layer - LAYERS[0] + 1}", {})[seed] = ours
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
