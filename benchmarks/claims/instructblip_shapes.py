"""Claim: a small InstructBLIP answers questions about scenes it has not seen, its language model staying frozen.

    python benchmarks/claims/instructblip_shapes.py [--arms instruct …] [--seeds 0 1 2] [--output_dir outputs/claims]

InstructBLIP (arXiv 2305.06500): an EVA tower trained by clip.py on captions, the Q-Former by blip2_stage1.py, the
language model by language_model.py on text alone (scenes told in words, questions, answers), then instruction tuning,
all on the built-in Shapes. Measured is the share of exact answers (colour, shape, count, relation; several turns) on
scenes of the test split. Each part is trained once a seed and shared by the arms; a run that was stopped goes on from
its checkpoint.

Arms: `instruct`, which trains the Q-Former and the projection; `lora`, with adapters in the language model as well;
`no stage 1`, instruction tuning of a Q-Former that stage 1 has only begun (one step), with as many steps as both.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _claims import SCENES
from _instructions import (
    LANGUAGE,
    LINEAR_LAYERS,
    TOWER,
    compare_answers,
    exact_answers,
    run,
    told_conversations,
    written,
)

STAGE1_STEPS, INSTRUCT_STEPS = 1000, 2000
TEXT_ROWS = 20_000
# A middle layer of the tower and a shallow Q-Former, as in the demo.
STAGE1: dict[str, Any] = {
    **SCENES, "drop_last_layers": 2, "qformer_size": "nano", "qformer_layers": 2, "num_query_tokens": 8,
    "cross_attention_frequency": 1, "qformer_dropout": 0, "shapes_size": 16000, "per_device_train_batch_size": 64,
    "max_steps": STAGE1_STEPS, "learning_rate": 1e-3, "warmup_steps": 60,
}  # fmt: skip
INSTRUCT: dict[str, Any] = {
    **SCENES, "shapes_short": "true", "shapes_size": 16000, "per_device_train_batch_size": 32,
    "max_steps": INSTRUCT_STEPS, "learning_rate": 1.5e-3, "warmup_steps": 60, "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
}  # fmt: skip
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0,
    "lora_targets": LINEAR_LAYERS,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "instruct": {},
    "lora": {"instruct": LORA},
    "no stage 1": {"stage1": {"max_steps": 1}, "instruct": {"max_steps": STAGE1_STEPS + INSTRUCT_STEPS}},
}


def lines(seed: int, rows: int) -> Iterator[str]:
    """What the language model reads: a scene told in words, then, behind another begin token, which is where text
    stands that has the queries in front of it, questions and answers: one by one in two of three lines, in the third
    as one instruction, which is how InstructBLIP is told what was said before."""
    from hf_vlp.data.conversations.instructblip import as_instruction
    from hf_vlp.data.conversations.messages import text_of
    from hf_vlp.training.text import BREAK

    for number, (said, messages) in enumerate(told_conversations(rows, 1000 + seed)):
        places = range(0, len(messages), 2)
        if number % 3:
            pieces = [f"{text_of(messages[place])} {text_of(messages[place + 1])}" for place in places]
        else:
            pieces = [f"{as_instruction(messages[:-1])} {text_of(messages[-1])}"]
        yield BREAK.join([said, *(" ".join(piece.split()) for piece in pieces)])


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    clip = run("clip", "clip", TOWER, seed, given, model_type="eva_clip")
    text = written(given.output_dir / "text" / f"instructblip_{seed}_{TEXT_ROWS}.txt", lines(seed, TEXT_ROWS))
    lm = run("language_model", "language model", LANGUAGE, seed, given, text_file=str(text))
    settings = {**STAGE1, **arm.get("stage1", {})}
    stage1 = run("blip2_stage1", "stage 1", settings, seed, given, vision_model=str(clip / "model"))
    parts = {"stage1": str(stage1 / "model"), "language_model": str(lm / "model")}
    return run("instructblip", name, {**INSTRUCT, **arm.get("instruct", {})}, seed, given, **parts)


if __name__ == "__main__":
    compare_answers(
        __doc__,
        list(ARMS),
        trained_arm,
        "instructblip_shapes.json",
        lambda model, _, given: exact_answers(model, given, "instructblip"),
    )
