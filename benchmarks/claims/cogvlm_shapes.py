"""Claim: a small CogVLM answers questions about scenes it has not seen, and its language model stays what it was.

    python benchmarks/claims/cogvlm_shapes.py [--arms two-stage …] [--seeds 0 1 2] [--output_dir outputs/claims]

CogVLM (arXiv 2311.03079): a language model that was trained on text alone gets visual experts; experts, adapter and a
small image encoder learn captions (stage 1) and conversations (SFT), the language model never does. Measured are the
share of exact answers (colour, shape, count, relation; several turns) on scenes of the test split, and whether the
logits of texts alone are the language model's to the bit. The language model is trained once, the other parts once a
seed, shared by the arms; a run that was stopped goes on from its checkpoint.

Arms: `two-stage`; `sft alone` with as many steps as both stages together; `lora`: adapters in the experts in SFT.
"""

import argparse
from pathlib import Path
from typing import Any

from _instructions import LINEAR_LAYERS, compare_answers, exact_answers, language_model, preset, run

STAGE1, SFT = preset("cogvlm_cpu"), preset("cogvlm_sft_cpu")
LORA: dict[str, Any] = {
    "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "learning_rate": 3e-3,
    "lora_targets": LINEAR_LAYERS,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {"two-stage": {}, "sft alone": {"alone": True}, "lora": {"sft": LORA}}


def trained_arm(name: str, seed: int, given: argparse.Namespace) -> Path:
    """The last run of an arm, with all that it starts from."""
    arm = ARMS[name]
    parts = {"language_model": str(language_model(given))}
    sft = {**SFT, **arm.get("sft", {})}
    if arm.get("alone"):
        # With the sizes of a new encoder.
        sft = {**STAGE1, **sft, "max_steps": STAGE1["max_steps"] + SFT["max_steps"]}
        return run("cogvlm", name, sft, seed, given, **parts)
    first = run("cogvlm", "stage 1", STAGE1, seed, given, **parts)
    return run("cogvlm", name, sft, seed, given, model_name_or_path=str(first / "model"))


def measures(model: Path, _: int, given: argparse.Namespace) -> dict[str, float]:
    """Exact answers, and whether texts alone have the language model's logits."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration

    metrics = exact_answers(model, given, "cogvlm_chat")
    ours = CogVLMForConditionalGeneration.from_pretrained(model).eval()
    plain = AutoModelForCausalLM.from_pretrained(language_model(given)).eval()
    ids = torch.randint(plain.config.vocab_size, (8, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        metrics["text_logits_identical"] = float(torch.equal(ours(ids).logits, plain(ids).logits))
    return metrics


if __name__ == "__main__":
    compare_answers(
        __doc__,
        list(ARMS),
        trained_arm,
        "cogvlm_shapes.json",
        measures,
        {"text logits identical": "text_logits_identical"},
    )
