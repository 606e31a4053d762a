"""Tiny random InstructBLIP models and batches, made in memory."""

from typing import Any

import torch
from torch import Tensor
from transformers import InstructBlipConfig

from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor
from tests.tiny.blip2 import IMAGE_SIZE, LANGUAGE_MODELS, QUERIES, bert_tokenizer, qformer_config, vision_config, wake

INSTRUCTIONS = ("what color is the dot?", "a photo of", "what is to the left of a small red cross?", "")
ANSWERS = ("black", "two green triangles", "a large yellow star", "nothing")


def processor(kind: str = "llama") -> InstructBlipProcessor:
    return InstructBlipProcessor.for_language_model(
        LANGUAGE_MODELS[kind][1](), bert_tokenizer(), QUERIES, image_size=IMAGE_SIZE
    )


def model(kind: str = "llama", seed: int = 0, **changes: Any) -> InstructBlipForConditionalGeneration:
    torch.manual_seed(seed)
    qformer = qformer_config(**changes)
    del qformer["use_qformer_text_input"]
    config = InstructBlipConfig(
        vision_config=vision_config(),
        qformer_config=qformer,
        text_config=LANGUAGE_MODELS[kind][0]().to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=processor(kind).image_token_id,
    )
    return wake(InstructBlipForConditionalGeneration(config)).eval()


def batch(kind: str = "llama", count: int = 4, **options: Any) -> dict[str, Tensor]:
    """Training inputs without images."""
    return dict(processor(kind).training_inputs(None, ANSWERS[:count], prompt=list(INSTRUCTIONS[:count]), **options))
