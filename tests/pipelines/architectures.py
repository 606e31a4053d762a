"""Tiny image-to-text models of other types than ours: the pipeline takes any that transformers loads."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from tests.hub import tiny

_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION = {**_SMALL, "image_size": tiny.IMAGE_SIZE, "patch_size": 8, "initializer_range": 0.2}
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}answer :"
)


def _sharpen(model: Any) -> Any:
    """Random weights large enough for the picture to change the words."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
            elif "norm" not in name.lower():
                parameter.normal_(std=0.05)
    return model.eval()


def blip() -> dict[str, Any]:
    words = tiny.tokenizer("bert")
    text = {**_SMALL, "vocab_size": len(words), "encoder_hidden_size": 32, "max_position_embeddings": 64}
    text |= {
        "bos_token_id": words.bos_token_id,
        "sep_token_id": words.sep_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = BlipConfig(vision_config=_VISION, text_config=text)
    return {
        "model": _sharpen(BlipForConditionalGeneration(config)),
        "processor": BlipProcessor(tiny.image_processor(), words),
    }


def git() -> dict[str, Any]:
    words = tiny.tokenizer("bert")
    config = GitConfig(
        vision_config={**_VISION, "model_type": "git_vision_model"},
        **_SMALL,
        vocab_size=len(words),
        max_position_embeddings=64,
        bos_token_id=words.cls_token_id,
        eos_token_id=words.sep_token_id,
        pad_token_id=words.pad_token_id,
    )
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    images = CLIPImageProcessor(size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size=size)
    return {"model": _sharpen(GitForCausalLM(config)), "processor": GitProcessor(images, words)}


def instructblip() -> dict[str, Any]:
    words, question = tiny.tokenizer("opt"), tiny.tokenizer("bert")
    processor = InstructBlipProcessor(tiny.image_processor(), words, question, num_query_tokens=tiny.QUERIES)
    native, _ = tiny.blip2()
    config = InstructBlipConfig(
        vision_config=_VISION,
        qformer_config={
            **_SMALL,
            "vocab_size": len(question),
            "encoder_hidden_size": 32,
            "cross_attention_frequency": 1,
            "max_position_embeddings": 64,
        },
        text_config=native.config.text_config.to_dict(),
        num_query_tokens=tiny.QUERIES,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    return {"model": _sharpen(InstructBlipForConditionalGeneration(config)), "processor": processor}


def llava(chat: bool = True) -> dict[str, Any]:
    words = tiny.tokenizer("opt")
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": tiny.IMAGE_SIZE}, crop_size=size),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT if chat else None,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(
            **_SMALL, vocab_size=len(words), bos_token_id=2, eos_token_id=2, pad_token_id=words.pad_token_id
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return {"model": _sharpen(LlavaForConditionalGeneration(config)), "processor": processor}


def encoder_decoder() -> dict[str, Any]:
    words = tiny.tokenizer("bert")
    decoder = BertConfig(**_SMALL, vocab_size=len(words), is_decoder=True, add_cross_attention=True)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**_VISION), decoder)
    config.decoder_start_token_id = words.cls_token_id
    config.pad_token_id = words.pad_token_id
    config.eos_token_id = words.sep_token_id
    model = _sharpen(VisionEncoderDecoderModel(config))
    model.generation_config.decoder_start_token_id = words.cls_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return {"model": model, "tokenizer": words, "image_processor": tiny.image_processor()}


OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "blip": blip,
    "git": git,
    "instructblip": instructblip,
    "llava": llava,
    "llava without a chat template": lambda: llava(chat=False),
    "vision-encoder-decoder": encoder_decoder,
}
