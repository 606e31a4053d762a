"""Claim: a small CogVLM answers questions about scenes it has not seen, and its language model stays what it was.

    python benchmarks/claims/cogvlm_shapes.py [--arms two-stage …] [--seeds 0 1 2] [--output_dir outputs/claims]

CogVLM (arXiv 2311.03079): a language model that was trained on text alone gets visual experts; experts, adapter and a
small image encoder learn captions (stage 1) and conversations (SFT), the language model never does. Measured are the
share of exact answers (colour, shape, count, relation; several turns) on scenes of the test split, and whether the
logits of texts alone are the language model's to the bit. Each part is trained once a seed and shared by the arms; a
run that was stopped goes on from its checkpoint.

Arms: `two-stage`; `sft alone` with as many steps as both stages together; `lora`: adapters in the experts in SFT.
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
    write_json,
)

TEST_CONVERSATIONS = 300
STAGE1_STEPS, SFT_STEPS = 400, 1200
LANGUAGE_STEPS = 600
SIZES: dict[str, Any] = {
    "image_size": 40, "patch_size": 8, "vision_hidden_size": 128, "vision_layers": 4, "vision_heads": 4,
    "vision_intermediate_size": 256,
}  # fmt: skip
STAGE1: dict[str, Any] = {
    **SCENES, "stage": "stage1", "train_vision": "true", "shapes_size": 8000, "per_device_train_batch_size": 32,
    "max_steps": STAGE1_STEPS, "learning_rate": 1e-3, "warmup_steps": 40, "lr_scheduler_type": "cosine",
}  # fmt: skip
SFT: dict[str, Any] = {
    **SCENES, "stage": "sft", "shapes_short": "true", "shapes_size": 16000, "per_device_train_batch_size": 32,
    "max_steps": SFT_STEPS, "learning_rate": 1e-3, "warmup_steps": 60, "lr_scheduler_type": "cosine",
    "max_grad_norm": 1.0,
}  # fmt: skip
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "learning_rate": 3e-3,
    "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {"two-stage": {}, "sft alone": {"alone": True}, "lora": {"sft": LORA}}


def language_model(folder: Path, seed: int, steps: int, rows: int = 20_000) -> Path:
    """Folder of a Llama that has read conversations in which scenes are told in words; trained unless it is there."""
    run = folder / "text" / f"llama_{seed}_{steps}_{rows}"
    if (run / "seconds.json").is_file():
        return run / "model"
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from hf_vlp.data.conversations import ConversationCollator, ConversationDataset
    from hf_vlp.data.tokenizers import train_opt_tokenizer
    from hf_vlp.models.cogvlm.configuration_cogvlm import CogVLMConfig
    from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor
    from hf_vlp.training import VLPTrainer, VLPTrainingArguments

    class EveryWord(ConversationCollator):
        """Questions are learned too."""

        def __call__(self, records: Any) -> dict[str, Any]:
            batch = super().__call__(records)
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            return {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "record_report")}

    read = []
    for number, (said, messages) in enumerate(told_conversations(rows, 1000 + seed)):
        # What stage 1 asks for, and what SFT does.
        told = [
            {"role": "user", "content": [{"type": "text", "text": said}]},
            {"role": "assistant", "content": [{"type": "text", "text": said}]},
        ]
        read += [
            {"images": [], "messages": one, "source": "text", "key": f"{kind} {number}"}
            for kind, one in (("conversation", in_words(messages, said)), ("caption", told))
        ]
    words = (one["text"] for row in read for turn in row["messages"] for one in turn["content"])
    tokenizer = train_opt_tokenizer([*words, "Question: Answer:\n"], 600, max_length=384)
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=344, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    processor = CogVLMProcessor.for_model(tokenizer, CogVLMConfig())
    running = {"sanity": False, "save_steps": 200, "save_total_limit": 1, "disable_tqdm": True, "use_cpu": True}
    args = VLPTrainingArguments(
        output_dir=str(run), max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3, warmup_steps=40,
        seed=seed, logging_steps=50, **running,
    )  # fmt: skip
    collator = EveryWord(processor, template="cogvlm_chat")
    VLPTrainer(model, args, collator, ConversationDataset(read, seed=seed), processing_class=tokenizer).train()
    model.save_pretrained(run / "model")
    tokenizer.save_pretrained(run / "model")
    write_json(run / "seconds.json", {"steps": steps})
    return run / "model"


def run(name: str, settings: Mapping[str, Any], seed: int, given: argparse.Namespace, **more: Any) -> Path:
    """Folder of a run of cogvlm.py, trained unless it is there."""
    options = {**settings, **more}
    if given.steps is not None:
        options |= changes_of(given)
    return trained(Arm(name, (), "cogvlm", tuple(options.items())), seed, given.output_dir, {})


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> tuple[Path, Path]:
    """The last run of an arm, and the language model in it."""
    arm = ARMS[name]
    steps = LANGUAGE_STEPS if given.steps is None else given.steps
    language = language_model(given.output_dir, seed, steps)
    parts = {**SIZES, "language_model": str(language)}
    sft = {**SFT, **arm.get("sft", {})}
    if arm.get("alone"):
        sft["max_steps"] = STAGE1_STEPS + SFT_STEPS
        return run(name, sft, seed, given, **parts), language
    first = run("stage 1", STAGE1, seed, given, **parts)
    return run(name, sft, seed, given, model_name_or_path=str(first / "model")), language


def measures(model: Path, language: Path, conversations: int) -> dict[str, float]:
    """Exact answers on the test split, and whether texts alone have the language model's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_vlp.evaluation.run import run_evaluation
    from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration

    result = run_evaluation(
        "instructions", model, "shapes", template="cogvlm_chat", batch_size=50, show_progress=False,
        data_options={**WORLD, "short": True, "size": conversations},
    )  # fmt: skip
    metrics = {name: value for name, value in result["metrics"].items() if isinstance(value, int | float)}
    metrics |= {f"exact_{kind}": value for kind, value in (result.get("per_kind") or {}).items()}
    ours = CogVLMForConditionalGeneration.from_pretrained(model).eval()
    plain = AutoModelForCausalLM.from_pretrained(language).eval()
    ids = torch.randint(plain.config.vocab_size, (8, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        metrics["text_logits_identical"] = float(torch.equal(ours(ids).logits, plain(ids).logits))
    return metrics


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
            folder, language = trained_arm(name, seed, given)
            results.setdefault(name, {})[seed] = measured(
                folder,
                f"instructions_{given.conversations}",
                lambda model, language=language: measures(model, language, given.conversations),
            )
            print(f"{name}, seed {seed}: {results[name][seed]} ({folder})", flush=True)
    columns = {
        "exact": "exact",
        "first turn": "exact_first_turn",
        "later turns": "exact_later_turns",
        "text logits identical": "text_logits_identical",
    }
    report(
        "Exact answers about unseen scenes: ± over seeds",
        results,
        {column: {"": metric} for column, metric in columns.items()},
        "two-stage",
        given.output_dir / "cogvlm_shapes.json",
    )


if __name__ == "__main__":
    main()
