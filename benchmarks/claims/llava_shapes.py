"""Claim: a small LLaVA answers questions about scenes it has not seen; two stages beat one, and LoRA comes close.

    python benchmarks/claims/llava_shapes.py [--arms two-stage …] [--seeds 0 1 2] [--output_dir outputs/claims]

LLaVA (arXiv 2304.08485, 2310.03744): the vision tower is trained by clip.py on captions, the language model by
language_model.py on text alone, the projector in stage 1, projector and language model in stage 2, all on the built-in
Shapes. Measured is the share of exact answers (colour, shape, count, relation; several turns) on scenes of the test
split. The language model is trained once, the other parts once a seed, shared by the arms; a run that was stopped goes
on from its checkpoint.

Arms: `two-stage`; `stage 2 alone` with as many steps as both stages together; both again with half of the steps, and
once more so with 2,000 conversations instead of 16,000, stage 1 keeping its captions; `linear` in place of the two
layers; `lora` in place of the whole language model.
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

STAGE1, STAGE2 = preset("llava_stage1_cpu"), preset("llava_stage2_cpu")
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "learning_rate": 3e-3,
    "lora_targets": LINEAR_LAYERS,
}  # fmt: skip
FEW = {"shapes_size": 2000}
ARMS: dict[str, dict[str, Any]] = {
    "two-stage": {},
    "stage 2 alone": {"alone": True},
    "two-stage, half the steps": {"half": True},
    "stage 2 alone, half the steps": {"alone": True, "half": True},
    "two-stage, few conversations": {"half": True, "stage2": FEW},
    "stage 2 alone, few conversations": {"alone": True, "half": True, "stage2": FEW},
    "linear": {"connector": "linear"},
    "lora": {"stage2": LORA},
}


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    clip = run("clip", "clip", TOWER, seed, given, model_type="clip")
    lm = language_model(given)
    parts = {
        "vision_model": str(clip / "model"),
        "language_model": str(lm),
        "connector": arm.get("connector", "mlp"),
    }
    stage1, stage2 = dict(STAGE1), {**STAGE2, **arm.get("stage2", {})}
    if arm.get("half"):
        for stage in (stage1, stage2):
            stage["max_steps"] //= 2
    if not arm.get("alone"):
        first = run("llava_stage1", "stage 1", stage1, seed, given, **parts)
        return run("llava_stage2", name, stage2, seed, given, model_name_or_path=str(first / "model"))
    start = given.output_dir / "new" / clip.name / lm.parent.name
    if not (start / "config.json").is_file():
        from hf_vlp.cli.main import main as command

        options = [f"--{key}={value}" for key, value in (("vision", clip / "model"), ("language", lm))]
        if command(["new", *options, "--connector=mlp", f"--out={start}", f"--seed={seed}"]):
            raise SystemExit("hf-vlp new failed")
    stage2["max_steps"] += stage1["max_steps"]
    return run("llava_stage2", name, stage2, seed, given, model_name_or_path=str(start))


if __name__ == "__main__":
    compare_answers(
        __doc__,
        list(ARMS),
        trained_arm,
        "llava_shapes.json",
        lambda model, _, given: exact_answers(model, given),
    )
