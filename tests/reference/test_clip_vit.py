"""CLIP with a ViT tower against the original code."""

import torch
from torch import nn

from hf_vlp.models.clip.conversion_clip import model_from_original, to_original
from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining
from tests.reference.cases import Case, reference


def symmetric_cross_entropy(logits_per_image: torch.Tensor) -> torch.Tensor:
    target = torch.arange(len(logits_per_image))
    loss = nn.functional.cross_entropy
    return (loss(logits_per_image, target) + loss(logits_per_image.T, target)) / 2


def compare_outputs(case: Case, model: nn.Module) -> None:
    """Features, logits, loss and gradients, which all CLIP towers have in common."""
    image, text = case.inputs["image"], case.inputs["text"]
    case.compare("text_after_ln_final", model.get_text_features(text).last_hidden_state)
    case.compare("image_features", model.image_features(image))
    case.compare("text_features", model.text_features(text))
    case.compare("image_features_normalised", model.embed_images(image).itc)
    case.compare("text_features_normalised", model.embed_texts(text))
    outputs = model(input_ids=text, pixel_values=image, return_loss=True)
    case.compare("logits_per_image", outputs.logits_per_image)
    case.compare("logits_per_text", outputs.logits_per_text)
    case.compare("loss", outputs.loss)

    pretraining = CLIPForPreTraining.from_inference_model(model)
    loss = pretraining(pixel_values=image, input_ids=text).loss
    case.compare("loss", loss)
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in pretraining.model.named_parameters()
    }
    gradients = to_original(gradients, model.config.model_type)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, gradients[name.removeprefix("grad/")])


def build(case: Case) -> nn.Module:
    heads = {"vision_heads": case.config["vision_heads"], "text_heads": case.config["transformer_heads"]}
    model = model_from_original(case.weights, **heads)
    assert model.config.text_config.eos_token_id == case.config["eot_token"]
    return model


@reference("clip/vit")
def test_vit(case: Case) -> None:
    model = build(case)
    compare_outputs(case, model)
    outputs = model.vision_model(case.inputs["image"], output_hidden_states=True)
    case.compare("vision_after_ln_pre", outputs.hidden_states[0])
    for index, states in enumerate(outputs.hidden_states[1:]):
        case.compare(f"vision_block{index}", states)
    case.compare("vision_after_ln_post", outputs.pooler_output)


@reference("clip/vit", complete=False)
def test_original_weights_survive_the_round_trip(case: Case) -> None:
    back = to_original(build(case).state_dict(), "clip")
    assert back.keys() == case.weights.keys()
    for name, value in case.weights.items():
        assert torch.equal(back[name], value), name
