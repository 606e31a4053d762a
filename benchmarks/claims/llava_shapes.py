"""Claim: a small LLaVA answers questions about scenes it has not seen; two stages beat one, and LoRA comes close.

    python benchmarks/claims/llava_shapes.py [--arms two-stage …] [--seeds 0 1 2] [--output_dir outputs/claims]

LLaVA (arXiv 2304.08485, 2310.03744): the vision tower is trained by clip.py on captions, the language model by
language_model.py on text alone, the projector in stage 1, projector and language model in stage 2, all on the built-in
Shapes. Measured is the share of exact answers (colour, shape, count, relation; several turns) on scenes of the test
split. Each part is trained once a seed and shared by the arms; a run that was stopped goes on from its checkpoint.

Arms: `two-stage`; `stage 2 alone` with as many steps as both stages together; `linear` in place of the two layers;
`lora` in place of the whole language model.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _claims import (
    SCENES,
    WORLD,
    Arm,
    arguments,
    changes_of,
    in_words,
    measured,
    report,
    told_conversations,
    trained,
)

IMAGE = 40
TEST_CONVERSATIONS = 300
STAGE1_STEPS, STAGE2_STEPS = 600, 1500
CLIP: dict[str, Any] = {
    **SCENES, "model_type": "clip", "size": "nano", "image_size": IMAGE, "patch_size": 8, "vocab_size": 600,
    "shapes_size": 16000, "per_device_train_batch_size": 96, "max_steps": 700, "learning_rate": 2e-3,
    "weight_decay": 0.05, "warmup_steps": 70,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 384, "vocab_size": 600, "per_device_train_batch_size": 32, "max_steps": 2000,
    "learning_rate": 2e-3, "warmup_steps": 60, "max_length": 160,
}  # fmt: skip
STAGE1: dict[str, Any] = {
    **SCENES, "shapes_size": 16000, "per_device_train_batch_size": 32, "max_steps": STAGE1_STEPS,
    "learning_rate": 2e-3, "warmup_steps": 20, "lr_scheduler_type": "cosine",
}  # fmt: skip
STAGE2: dict[str, Any] = {
    **SCENES, "shapes_short": "true", "shapes_size": 16000, "per_device_train_batch_size": 32,
    "max_steps": STAGE2_STEPS, "learning_rate": 1e-3, "warmup_steps": 60, "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0, "group_by_length": "true",
}  # fmt: skip
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "learning_rate": 3e-3,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "two-stage": {},
    "stage 2 alone": {"alone": True},
    "linear": {"connector": "linear"},
    "lora": {"stage2": LORA},
}


def text_file(folder: Path, seed: int, rows: int = 20_000) -> Path:
    """What the language model reads: conversations as stage 2 writes them, scenes told in words in place of pictures,
    and captions told and repeated, as in stage 1."""
    path = folder / "text" / f"llava_{seed}_{rows}.txt"
    if not path.is_file():
        from hf_vlp.data.conversations.templates import VicunaTemplate
        from hf_vlp.training.text import BREAK

        # The begin token of its tokenizer is its end token, so a break is the end of a turn. The system's words are
        # the longest part and always the same: every eighth conversation has them.
        templates = [VicunaTemplate(eos_token=BREAK, image_token="", system=words) for words in (None, *[""] * 7)]
        lines = []
        for number, (said, messages) in enumerate(told_conversations(rows, 1000 + seed)):
            written = templates[number % 8].render(in_words(messages, said)).text
            lines += [written.replace("\n", " ").strip(), f"{said}{BREAK}{said}"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(
    script: str, name: str, settings: Mapping[str, Any], seed: int, given: argparse.Namespace, **more: Any
) -> Path:
    """Folder of a run, trained unless it is there."""
    options = {**settings, **more}
    if given.steps is not None:
        options |= changes_of(given)
    return trained(Arm(name, (), script, tuple(options.items())), seed, given.output_dir, {})


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    clip = run("clip", "clip", CLIP, seed, given)
    lm = run(
        "language_model", "language model", LANGUAGE, seed, given, text_file=str(text_file(given.output_dir, seed))
    )
    parts = {
        "vision_model": str(clip / "model"),
        "language_model": str(lm / "model"),
        "connector": arm.get("connector", "mlp"),
    }
    stage2 = {**STAGE2, **arm.get("stage2", {})}
    if not arm.get("alone"):
        first = run("llava_stage1", "stage 1", STAGE1, seed, given, **parts)
        return run("llava_stage2", name, stage2, seed, given, model_name_or_path=str(first / "model"))
    start = given.output_dir / "new" / clip.name / lm.name
    if not (start / "config.json").is_file():
        from hf_vlp.cli.main import main as command

        options = [f"--{key}={value}" for key, value in (("vision", clip / "model"), ("language", lm / "model"))]
        if command(["new", *options, "--connector=mlp", f"--out={start}", f"--seed={seed}"]):
            raise SystemExit("hf-vlp new failed")
    stage2["max_steps"] = STAGE1_STEPS + STAGE2_STEPS
    return run("llava_stage2", name, stage2, seed, given, model_name_or_path=str(start))


def exact_answers(model: Path, conversations: int) -> dict[str, float]:
    """Share of right answers on the test split, over all and by kind."""
    from hf_vlp.evaluation.run import run_evaluation

    options = {**WORLD, "short": True, "size": conversations}
    result = run_evaluation("instructions", model, "shapes", data_options=options, batch_size=50, show_progress=False)
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}
    return metrics | {f"exact_{kind}": value for kind, value in (result.get("per_kind") or {}).items()}


def main() -> None:
    given = arguments(
        __doc__,
        list(ARMS),
        lambda parser: parser.add_argument(
            "--conversations", type=int, default=TEST_CONVERSATIONS, help="Of the test."
        ),
    )
    import torch

    torch.set_num_threads(given.threads)
    results: dict[str, dict[int, dict[str, float]]] = {}
    for seed in given.seeds:
        for name in given.arms:
            folder = trained_arm(name, seed, given)
            results.setdefault(name, {})[seed] = measured(
                folder, f"instructions_{given.conversations}", lambda model: exact_answers(model, given.conversations)
            )
            print(f"{name}, seed {seed}: {results[name][seed]} ({folder})", flush=True)
    columns = {"exact": "exact", "first turn": "exact_first_turn", "later turns": "exact_later_turns"}
    report(
        "Exact answers about unseen scenes: ± over seeds",
        results,
        {column: {"": metric} for column, metric in columns.items()},
        "two-stage",
        given.output_dir / "llava_shapes.json",
    )


if __name__ == "__main__":
    main()
