"""The vision towers of BLIP-2 against LAVIS: EVA-ViT and CLIP ViT-L, and their load at another image size."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, PreTrainedModel

from hf_vlp.models.blip2.conversion_blip_2 import from_original, to_original
from hf_vlp.models.blip2.initialization_blip_2 import resize_tower
from hf_vlp.models.catalog import ARCHITECTURES
from tests.reference.cases import Case, reference


def retrieval_model(
    model_type: str, vision: dict[str, Any], weights: dict[str, Tensor], image_size: int | None = None
) -> PreTrainedModel:
    """A retrieval model with the recorded tower and a Q-Former that is not looked at."""
    native, _ = from_original(weights)
    architecture = ARCHITECTURES[model_type]
    qformer = Blip2QFormerConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, use_qformer_text_input=True
    )
    config = architecture.load("config")(vision_config=vision, qformer_config=qformer.to_dict())
    prefix = "vision_model." if model_type == "blip-2" else "vision_model.tower."
    if image_size is not None:
        tower = {name.removeprefix(prefix): value for name, value in native.items() if name.startswith(prefix)}
        norm = {name: value for name, value in native.items() if name.startswith("vision_model.post_layernorm.")}
        resize_tower(config.vision_config, tower, image_size)
        native = {prefix + name: value for name, value in tower.items() if not name.startswith("post_layernorm.")}
        native |= norm
    model = architecture.load("retrieval")(config)
    missing, unexpected = model.load_state_dict(native, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith(prefix) and "tower.post_layernorm" not in name]
    return model.eval()


def compare_tower(case: Case, model_type: str, vision: dict[str, Any]) -> None:
    model = retrieval_model(model_type, vision, case.weights)
    layers: nn.ModuleList = (
        model.vision_model.encoder.layers if model_type == "blip-2" else model.vision_model.tower.encoder.layers
    )
    blocks: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda module, inputs, output: blocks.append(output[0] if isinstance(output, tuple) else output)
        )
    states = model.tower_states(case.inputs["image"])
    case.compare("last_hidden_state", states)
    for index, output in enumerate(blocks):
        if f"block_{index}" in case.output_names:
            case.compare(f"block_{index}", output)
    features = model.image_features(image_embeds=states)
    case.compare("image_embeds", features)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if name.startswith("vision_model.")
    }
    original = to_original(gradients)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, original[name.removeprefix("grad/")])

    other = case.config["other_image_size"]
    resized = retrieval_model(model_type, vision, case.weights, image_size=other)
    with torch.no_grad():
        table = to_original(dict(resized.vision_model.named_parameters(prefix="vision_model")))
        name = "visual_encoder.pos_embed" if model_type == "blip-2" else "visual_encoder.positional_embedding"
        case.compare("interpolated/pos_embed", table[name])
        states = resized.tower_states(case.inputs["image_other_size"])
        case.compare("interpolated/last_hidden_state", states)
        case.compare("interpolated/image_embeds", resized.image_features(image_embeds=states))


@reference("blip2/eva_vit")
def test_eva_vit(case: Case) -> None:
    recorded = case.config["vision"]
    vision = {
        "hidden_size": recorded["width"],
        "intermediate_size": recorded["mlp_hidden"],
        "num_hidden_layers": recorded["depth"],
        "num_attention_heads": recorded["heads"],
        "image_size": recorded["image_size"],
        "patch_size": recorded["patch_size"],
        "layer_norm_eps": recorded["layer_norm_eps"],
    }
    compare_tower(case, "blip-2", vision)
    # The same by resizing at run time.
    model = retrieval_model("blip-2", vision, case.weights)
    with torch.no_grad():
        states = model.tower_states(case.inputs["image_other_size"], interpolate_pos_encoding=True)
    case.compare("interpolated/last_hidden_state", states)


@reference("blip2/clip_vit_L")
def test_clip_vit(case: Case) -> None:
    recorded = case.config["vision"]
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": recorded["width"],
        "intermediate_size": 4 * recorded["width"],
        "num_hidden_layers": recorded["depth"],
        "num_attention_heads": recorded["heads"],
        "image_size": recorded["image_size"],
        "patch_size": recorded["patch_size"],
        "layer_norm_eps": recorded["layer_norm_eps"],
        "hidden_act": recorded["hidden_act"],
    }
    compare_tower(case, "blip2_any_vision", vision)
