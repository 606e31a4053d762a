"""Tiny runs of Qwen-VL, packed and with adapters, and of InstructBLIP."""

from pathlib import Path
from typing import Any

import torch

from hf_vlp.data import InstructionCollator, InstructionDataset, InstructionSource
from hf_vlp.data.conversations import ConversationCollator, ConversationDataset
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training.lora import LoraArguments, add_lora
from tests.tiny import instructblip as tiny_instructblip
from tests.tiny import qwen_vl as tiny
from tests.training import runs


def conversations(count: int = 22) -> list[dict[str, Any]]:
    """Conversations of one or two turns about no, one or two pictures."""
    pictures = [row["image"] for row in runs.rows(count)]
    answers = ("a red square", "two circle", "one blue circle", "three green square")
    rows = []
    for index in range(count):
        used = (0, 1, 1, 2)[index % 4]
        turns: list[Any] = [("how many shapes?", used), answers[index % 4]]
        if index % 2:
            turns += ["what is this?", answers[(index + 1) % 4]]
        images = [pictures[(index + number) % count] for number in range(used)]
        rows.append({"images": images, "messages": tiny.messages(*turns), "source": "tiny", "key": str(index)})
    return rows


def qwen_vl_trainer(
    folder: str | Path, *, lora_r: int = 0, pack_to: int | None = None, stage: str = "sft", **changes: Any
) -> VLPTrainer:
    model, processor = tiny.model(seed=3), tiny.processor()
    apply_stage(model, stage)
    torch.manual_seed(5)
    add_lora(model, LoraArguments(lora_r=lora_r, lora_targets=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2))
    return VLPTrainer(
        model,
        runs.arguments(folder, **changes),
        ConversationCollator(processor, template="qwen_vl", pack_to=pack_to),
        ConversationDataset(conversations(), seed=1),
        processing_class=processor,
    )


def instructblip_trainer(folder: str | Path, *, dropout: float = 0.0, lora_r: int = 0, **changes: Any) -> VLPTrainer:
    model = tiny_instructblip.model(seed=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    apply_stage(model, "instruct")
    torch.manual_seed(5)
    add_lora(model, LoraArguments(lora_r=lora_r, lora_dropout=0.2))
    captions = runs.rows(12)
    questions = [{**row, "question": "what is it?", "answers": row["text"]} for row in runs.rows(9)]
    talks = [row for row in conversations() if len(row["images"]) == 1]
    sources = [
        InstructionSource("captioning", captions),
        InstructionSource("vqa", questions),
        InstructionSource("conversation", talks),
    ]
    processor = tiny_instructblip.processor()
    # As `from_stage1` does: longer instructions lose their beginning.
    processor.qformer_tokenizer.model_max_length = model.config.qformer_config.max_position_embeddings
    return VLPTrainer(
        model,
        runs.arguments(folder, **changes),
        InstructionCollator(processor),
        InstructionDataset(sources, seed=1),
        processing_class=processor,
    )


TRAINERS = {"qwen_vl": qwen_vl_trainer, "instructblip": instructblip_trainer}
