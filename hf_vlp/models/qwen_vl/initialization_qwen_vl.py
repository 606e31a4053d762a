"""Where Qwen-VL's weights come from before there is one: a ViT and a language model (section 3.1)."""

import copy
import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_vlp.models.generation_settings import drop_idle_settings
from hf_vlp.models.loading import load_backbone

from .configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig
from .modeling_qwen_vl import QwenVLForConditionalGeneration
from .modeling_qwen_vl_visual import resize_grid, sine_table
from .processing_qwen_vl import QwenVLProcessor


def vision_from_clip(
    tower: PreTrainedModel, num_positions: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and weights of the tower from a CLIP ViT, as the authors start from OpenCLIP's ViT-bigG.

    The class token is left out, and with it its position; what stands behind the last block is not read.

    Args:
        tower: `CLIPVisionModel`, or a `CLIPModel`.
        num_positions: rows of the position table; by default as many as the tower has patches.

    Raises:
        ValueError: it is no CLIP ViT.
    """
    tower = getattr(tower, "vision_model", tower)
    config = tower.config
    if config.model_type not in ("clip_vision_model", "clip"):
        raise ValueError(
            f"Qwen-VL's tower starts from a CLIP ViT (clip_vision_model), not from {config.model_type!r}; give a "
            "QwenVLVisionConfig to start one from scratch"
        )
    state = {}
    for name, value in tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if name == "embeddings.patch_embedding.weight":
            state["patch_embedding.weight"] = value
        elif name == "embeddings.position_embedding.weight":
            patches = value[1:]
            side = math.isqrt(num_positions or len(patches))
            state["position_embedding"] = resize_grid(patches, (side, side))
        elif name.startswith("pre_layrnorm."):
            state[name.replace("pre_layrnorm", "pre_layernorm")] = value
        elif name.startswith("encoder.layers."):
            state[name.removeprefix("encoder.")] = value
    settings = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "num_positions": len(state["position_embedding"]),
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
    }
    return settings, state


def from_vision_language_pretrained(
    vision: str | PreTrainedModel | PreTrainedConfig,
    language_model: str | PreTrainedModel,
    tokenizer: Any,
    *,
    image_size: int | None = None,
    num_query_tokens: int = 256,
    num_positions: int | None = None,
    resampler_heads: int | None = None,
    seq_length: int | None = None,
    **language_model_kwargs: Any,
) -> tuple[QwenVLForConditionalGeneration, QwenVLProcessor]:
    """Starts stage 1: a ViT and a language model with their weights, a new resampler between them.

    Args:
        vision: folder or Hub id of a CLIP ViT (or a CLIP), such a model, or a `QwenVLVisionConfig` for a tower from
            scratch.
        language_model: folder or Hub id of any causal language model, or the model, which is then changed: its
            embeddings grow if the tokenizer needs new tokens.
        tokenizer: of the language model; gets `<img>`, `</img>`, `<imgpad>`, `<ref>`, `<box>` and ChatML's tokens.
        image_size: pixels a side; by default the tower's.
        num_query_tokens: of an image; a square number.
        num_positions: rows of the tower's position table.
        resampler_heads: by default one for each 128 of the language model's width.
        seq_length: see `QwenVLConfig`.
        language_model_kwargs: for `from_pretrained` of the language model (`dtype`, `quantization_config`, ...).

    Returns:
        The model and its processor.
    """
    if isinstance(language_model, str):
        AutoConfig.from_pretrained(language_model)
        language_model = load_backbone(AutoModelForCausalLM, language_model, **language_model_kwargs)
    state: dict[str, Tensor] = {}
    if isinstance(vision, QwenVLVisionConfig):
        settings = {k: v for k, v in vision.to_dict().items() if k not in ("output_dim", "resampler_heads")}
    else:
        tower = load_backbone(AutoModel, vision, part="vision_model") if isinstance(vision, str) else vision
        settings, state = vision_from_clip(tower, num_positions)
    settings |= {
        "num_query_tokens": num_query_tokens,
        "output_dim": language_model.config.get_text_config().hidden_size,
        "resampler_heads": resampler_heads,
    }
    if image_size is not None:
        settings["image_size"] = image_size
    vision_config = QwenVLVisionConfig(**settings)
    processor = QwenVLProcessor.for_image_size(tokenizer, vision_config.image_size, num_query_tokens=num_query_tokens)
    make_room(language_model, len(processor.tokenizer))
    config = QwenVLConfig(
        vision_config=vision_config.to_dict(),
        text_config=language_model.config.to_dict(),
        image_start_token_id=processor.image_start_token_id,
        image_end_token_id=processor.image_end_token_id,
        image_token_id=processor.image_token_id,
        seq_length=seq_length,
    )
    with torch.device("meta"), init.no_init_weights():
        model = QwenVLForConditionalGeneration(config)
    model.language_model = language_model
    for part in (model.vision_model, model.resampler):
        part.to_empty(device="cpu")
        part.apply(model._init_weights)
    model.resampler.position_table.copy_(sine_table(vision_config.output_dim, math.isqrt(num_query_tokens)))
    if state:
        model.vision_model.load_state_dict(state)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    drop_idle_settings(model.generation_config)
    model.generation_config.eos_token_id = processor.stop_token_ids
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model, processor


@torch.no_grad()
def make_room(language_model: PreTrainedModel, size: int) -> None:
    """Enlarges the vocabulary if it is smaller than `size`; new rows are the mean of the old ones with a little noise,
    so that new tokens are neither likely nor all alike."""
    old = language_model.get_input_embeddings().num_embeddings
    if size <= old:
        return
    language_model.resize_token_embeddings(size, mean_resizing=False)
    for module in dict.fromkeys((language_model.get_input_embeddings(), language_model.get_output_embeddings())):
        rows = module.weight[:old].float()
        noise = torch.randn(size - old, rows.shape[1], device=rows.device) * rows.std(dim=0) * 0.1
        module.weight[old:] = (rows.mean(dim=0) + noise).to(module.weight.dtype)
        if getattr(module, "bias", None) is not None:
            module.bias[old:] = module.bias[:old].mean()


__all__ = ["from_vision_language_pretrained", "make_room", "vision_from_clip"]
