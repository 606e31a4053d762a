"""Trained-like tiny models of every architecture that is saved for the Hub, with their processors."""

from collections.abc import Callable

import torch
from transformers import AlignProcessor, PreTrainedModel, ProcessorMixin

from hf_vlp.models.catalog import ARCHITECTURES
from tests.hub import tiny
from tests.tiny import blip2, clip

Pair = tuple[PreTrainedModel, ProcessorMixin]


def _two_towers(model_type: str) -> Pair:
    torch.manual_seed(0)
    model = ARCHITECTURES[model_type].load("model")(clip.config_of(model_type))
    if model_type == "align":
        words = tiny.tokenizer("bert")
        processor: ProcessorMixin = AlignProcessor(tiny.image_processor(), words)
        processor.image_processor.size = {"height": clip.IMAGE_SIZE, "width": clip.IMAGE_SIZE}
    else:
        processor = clip.processor()
        config = clip.config_of(model_type)
        config.text_config = type(config.text_config)(**clip.text_config_of(processor))
        model = ARCHITECTURES[model_type].load("model")(config)
    # Far from the start, where every pair of a small random model is as similar as any other.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif "logit_scale" in name:
                parameter.fill_(2.0)
    return model.eval(), processor


def _any_vision(role: str) -> Pair:
    from hf_vlp.models.blip2.configuration_blip2_any_vision import Blip2AnyVisionConfig

    architecture = ARCHITECTURES["blip2_any_vision"]
    config = blip2.blip2_config(None if role == "retrieval" else blip2.opt_config()).to_dict()
    tower = {"model_type": "clip_vision_model", **blip2.vision_config()}
    tower = {name: value for name, value in tower.items() if name not in ("qkv_bias", "initializer_range")}
    processor = blip2.retrieval_processor() if role == "retrieval" else blip2.generation_processor("opt")
    settings = {
        name: config[name] for name in ("qformer_config", "text_config", "num_query_tokens", "image_text_hidden_size")
    }
    if role == "captioning":
        settings["image_token_index"] = processor.image_token_id
    torch.manual_seed(0)
    model = architecture.load(role)(Blip2AnyVisionConfig(vision_config=tower, **settings))
    return blip2.wake(model).eval(), processor


SAVED: dict[str, Callable[[], Pair]] = {
    "clip": lambda: _two_towers("clip"),
    "clip_resnet": lambda: _two_towers("clip_resnet"),
    "eva_clip": lambda: _two_towers("eva_clip"),
    "align": lambda: _two_towers("align"),
    "blip2-opt": lambda: (blip2.generation_model("opt"), blip2.generation_processor("opt")),
    "blip2-llama": lambda: (blip2.generation_model("llama"), blip2.generation_processor("llama")),
    "blip2-t5": lambda: (blip2.generation_model("t5"), blip2.generation_processor("t5")),
    "blip2-retrieval": lambda: (blip2.retrieval_model(), blip2.retrieval_processor()),
    "any-vision-opt": lambda: _any_vision("captioning"),
    "any-vision-retrieval": lambda: _any_vision("retrieval"),
}
CAPTIONERS = ("blip2-opt", "blip2-llama", "blip2-t5", "any-vision-opt")
RETRIEVERS = ("blip2-retrieval", "any-vision-retrieval")
OWN_CODE = ("clip_resnet", "eva_clip", "any-vision-opt", "any-vision-retrieval")
