"""Tiny runs of LLaVA on conversations with no, one or two pictures, with adapters and packed rows."""

from pathlib import Path
from typing import Any

import torch

from hf_vlp.data.conversations import ConversationCollator, ConversationDataset
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training.lora import LoraArguments, add_lora
from tests.tiny import llava as tiny
from tests.training import runs

ANSWERS = ("a red square", "two circle", "one blue circle", "three green square")


def conversations(count: int = 22) -> list[dict[str, Any]]:
    """Rows of one or two turns; the pictures are those of `runs.rows`."""
    pictures = [row["image"] for row in runs.rows(count)]
    rows = []
    for index in range(count):
        used = (0, 1, 1, 2)[index % 4]
        messages = []
        for turn in range(1 + index % 2):
            asked: list[dict[str, Any]] = [{"type": "text", "text": "what is this ?" if turn else "how many shapes ?"}]
            if turn == 0:
                asked = [{"type": "image", "text": None}] * used + asked
            messages.append({"role": "user", "content": asked})
            answer = ANSWERS[(index + turn) % len(ANSWERS)]
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        images = [pictures[(index + number) % count] for number in range(used)]
        rows.append({"images": images, "messages": messages, "source": "tiny", "key": str(index)})
    return rows


def llava_trainer(
    folder: str | Path,
    *,
    lora_r: int = 0,
    pack_to: int | None = None,
    group_by_length: bool = False,
    stage: str | None = None,
    tiles: bool = False,
    **changes: Any,
) -> VLPTrainer:
    model, processor = tiny.llava(seed=3, tiles=tiles)
    apply_stage(model, stage or ("stage2_lora" if lora_r else "stage2"))
    torch.manual_seed(5)
    add_lora(model, LoraArguments(lora_r=lora_r, lora_targets=["q_proj", "v_proj", "down_proj"], lora_dropout=0.2))
    return VLPTrainer(
        model,
        runs.arguments(folder, **changes),
        ConversationCollator(processor, pack_to=pack_to),
        ConversationDataset(conversations(), seed=1, group_by_length=group_by_length, image_tokens=4),
        processing_class=processor,
    )
