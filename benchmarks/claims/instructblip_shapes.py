"""Claim: a small InstructBLIP answers questions about scenes it has not seen, its language model staying frozen.

    python benchmarks/claims/instructblip_shapes.py [--arms instruct …] [--seeds 0 1 2] [--output_dir outputs/claims]

InstructBLIP (arXiv 2305.06500): an EVA tower trained by clip.py on captions, the Q-Former by blip2_stage1.py, the
language model by language_model.py on text alone (scenes told in words, questions, answers), then instruction tuning,
all on the built-in Shapes. Measured is the share of exact answers (colour, shape, count, relation; several turns) on
scenes of the test split. The language model is trained once, the other parts once a seed, shared by the arms; a run
that was stopped goes on from its checkpoint.

Arms: `instruct`, which trains the Q-Former and the projection; `lora`, with adapters in the language model as well;
`no stage 1`, instruction tuning of a Q-Former that stage 1 has only begun (one step), with as many steps as both.
"""

import argparse
from pathlib import Path
from typing import Any

from _instructions import (
    LINEAR_LAYERS,
    TOWER,
    compare_answers,
    exact_answers,
    language_model,
    preset,
    run,
)

STAGE1, INSTRUCT = preset("blip2_stage1_row_cpu"), preset("instructblip_cpu")
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0,
    "lora_targets": LINEAR_LAYERS,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "instruct": {},
    "lora": {"instruct": LORA},
    "no stage 1": {"stage1": {"max_steps": 1}, "instruct": {"max_steps": STAGE1["max_steps"] + INSTRUCT["max_steps"]}},
}


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    clip = run("clip", "clip", TOWER, seed, given, model_type="eva_clip")
    settings = {**STAGE1, **arm.get("stage1", {})}
    stage1 = run("blip2_stage1", "stage 1", settings, seed, given, vision_model=str(clip / "model"))
    parts = {"stage1": str(stage1 / "model"), "language_model": str(language_model(given))}
    return run("instructblip", name, {**INSTRUCT, **arm.get("instruct", {})}, seed, given, **parts)


if __name__ == "__main__":
    compare_answers(
        __doc__,
        list(ARMS),
        trained_arm,
        "instructblip_shapes.json",
        lambda model, _, given: exact_answers(model, given, "instructblip"),
    )
