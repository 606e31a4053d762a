"""Tiny runs of CogVLM on captions, packed and with adapters in the experts or in the language model."""

from pathlib import Path
from typing import Any

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training.grounding import CaptionConversations
from hf_vlp.training.lora import LoraArguments, add_lora
from tests.tiny import cogvlm as tiny
from tests.training import runs


def tiny_processor(model: CogVLMForConditionalGeneration) -> CogVLMProcessor:
    """The processor of a tiny model, which is told its image token."""
    processor = CogVLMProcessor.for_model(tiny.byte_tokenizer(), model.config)
    model.config.image_token_id = processor.image_token_id
    return processor


def cogvlm_trainer(
    folder: Path | str, *, lora: str | None = None, pack_to: int | None = None, dropout: float = 0.0, **changes: Any
) -> VLPTrainer:
    """`lora` says which part gets adapters, `dropout` is theirs."""
    model = tiny.model(2, seed=3)
    processor = tiny_processor(model)
    apply_stage(model, "stage1")
    if lora:
        model.language_model_path = lora
        add_lora(model, LoraArguments(lora_r=2, lora_dropout=dropout), path=lora)
    collator = ConversationCollator(processor, template="cogvlm_chat", pack_to=pack_to)
    data = CaptionConversations(runs.rows(), seed=1)
    return VLPTrainer(model, runs.arguments(folder, **changes), collator, data, processing_class=processor)
