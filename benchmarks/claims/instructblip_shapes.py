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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _claims import SCENES, WORLD, Arm, arguments, changes_of, measured, report, told_conversations, trained

IMAGE = 40
TEST_CONVERSATIONS = 300
STAGE1_STEPS, INSTRUCT_STEPS = 1000, 2000
CLIP: dict[str, Any] = {
    **SCENES, "model_type": "eva_clip", "size": "nano", "image_size": IMAGE, "patch_size": 8, "vocab_size": 600,
    "shapes_size": 16000, "per_device_train_batch_size": 96, "max_steps": 700, "learning_rate": 2e-3,
    "weight_decay": 0.05, "warmup_steps": 70,
}  # fmt: skip
# Of Llama's kind, as Vicuna is: its end token ends an answer.
LANGUAGE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 384, "vocab_size": 600, "per_device_train_batch_size": 32, "max_steps": 2000,
    "learning_rate": 2e-3, "warmup_steps": 60, "max_length": 160,
}  # fmt: skip
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
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "instruct": {},
    "lora": {"instruct": LORA},
    "no stage 1": {"stage1": {"max_steps": 1}, "instruct": {"max_steps": STAGE1_STEPS + INSTRUCT_STEPS}},
}


def text_file(folder: Path, seed: int, rows: int = 20_000) -> Path:
    """What the language model reads: a scene told in words, then, behind another begin token, which is where text
    stands that has the queries in front of it, questions and answers: one by one in two of three lines, in the third
    as one instruction, which is how InstructBLIP is told what was said before."""
    path = folder / "text" / f"instructblip_{seed}_{rows}.txt"
    if not path.is_file():
        from hf_vlp.data.conversations.instructblip import as_instruction
        from hf_vlp.data.conversations.messages import text_of
        from hf_vlp.training.text import BREAK

        lines = []
        for number, (said, messages) in enumerate(told_conversations(rows, 1000 + seed)):
            places = range(0, len(messages), 2)
            if number % 3:
                pieces = [f"{text_of(messages[place])} {text_of(messages[place + 1])}" for place in places]
            else:
                pieces = [f"{as_instruction(messages[:-1])} {text_of(messages[-1])}"]
            lines.append(BREAK.join([said, *(" ".join(piece.split()) for piece in pieces)]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(
    script: str, name: str, settings: Mapping[str, Any], seed: int, given: argparse.Namespace, **more: Any
) -> Path:
    """Folder of a run, trained unless it is there."""
    options = {**settings, **more}
    if given.steps is not None and options["max_steps"] > given.steps:
        options |= changes_of(given)
    return trained(Arm(name, (), script, tuple(options.items())), seed, given.output_dir, {})


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    clip = run("clip", "clip", CLIP, seed, given)
    words = str(text_file(given.output_dir, seed))
    lm = run("language_model", "language model", LANGUAGE, seed, given, text_file=words)
    settings = {**STAGE1, **arm.get("stage1", {})}
    stage1 = run("blip2_stage1", "stage 1", settings, seed, given, vision_model=str(clip / "model"))
    parts = {"stage1": str(stage1 / "model"), "language_model": str(lm / "model")}
    return run("instructblip", name, {**INSTRUCT, **arm.get("instruct", {})}, seed, given, **parts)


def exact_answers(model: Path) -> dict[str, float]:
    """Share of right answers on the test split, over all and by kind."""
    from hf_vlp.evaluation.run import run_evaluation

    options = {**WORLD, "short": True, "size": TEST_CONVERSATIONS}
    result = run_evaluation(
        "instructions",
        model,
        "shapes",
        data_options=options,
        batch_size=50,
        template="instructblip",
        show_progress=False,
    )
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}
    return metrics | {f"exact_{kind}": value for kind, value in (result.get("per_kind") or {}).items()}


def main() -> None:
    given = arguments(__doc__, list(ARMS))
    import torch

    torch.set_num_threads(given.threads)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for seed in given.seeds:
        for name in given.arms:
            folder = trained_arm(name, seed, given)
            results.setdefault(name, {})[seed] = measured(folder, "instructions", exact_answers)
            print(f"{name}, seed {seed}: {results[name][seed]} ({folder})", flush=True)
    columns = {"exact": "exact", "first turn": "exact_first_turn", "later turns": "exact_later_turns"}
    report(
        "Exact answers about unseen scenes: ± over seeds",
        results,
        {column: {"": metric} for column, metric in columns.items()},
        "instruct",
        given.output_dir / "instructblip_shapes.json",
    )


if __name__ == "__main__":
    main()
