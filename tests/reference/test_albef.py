"""ALBEF against the original authors' code: text towers, position embedding, pretraining, retrieval."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from hf_vlp.models.albef.configuration_albef import AlbefTextConfig
from hf_vlp.models.albef.conversion_albef import (
    config_from_original,
    from_original,
    layout_of,
    load,
    queue_from_original,
    queue_to_original,
    text_from_original,
    to_original,
    training_model,
    training_state_to_original,
    vision_from_original,
    vision_to_original,
)
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval, AlbefModel, interpolate_positions
from hf_vlp.models.albef.modeling_albef_text import AlbefTextModel
from hf_vlp.models.albef.momentum_albef import AlbefMomentumModel
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from tests.reference.cases import Case, reference


def text_fields(case: Case) -> dict[str, Any]:
    """The case's BERT settings without dropout."""
    fields = {
        name: value for name, value in case.config["bert"].items() if name not in ("type", "add_cross_attention")
    }
    return {**fields, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def albef_config(case: Case) -> Any:
    config = config_from_original(
        case.weights,
        layout_of(case.weights),
        text_config=text_fields(case),
        vision_heads=case.config["vision"]["heads"],
        text_heads=case.config["bert"]["num_attention_heads"],
    )
    for part in (config.text_config, config.decoder_config):
        if part is not None:
            part.mask_token_id = case.config["tokens"]["mask"]
            part.bos_token_id = case.config["tokens"]["cls"]
            part.eos_token_id = case.config["tokens"]["sep"]
    return config


def gradients(model: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    """Gradients of the parameters under `prefix`, zero where there is none, under their names without it.

    A shared parameter stands under all of its names, as a case may record it under any.
    """
    return {
        name.removeprefix(prefix): torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name.startswith(prefix)
    }


def compare_prefixed(case: Case, prefix: str, values: dict[str, Tensor]) -> None:
    """Compares every output `prefix/<original name>` with the tensor of that name."""
    for name in case.output_names:
        if name.startswith(prefix):
            case.compare(name, values[name.removeprefix(prefix)])


def check_encoder(case: Case, attention: str) -> None:
    config = AlbefTextConfig(**text_fields(case))
    config._attn_implementation = attention
    model = AlbefTextModel(config).eval()
    load(model, text_from_original(case.weights, config.fusion_layer))
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    images, image_mask = case.inputs["image_embeds"], case.inputs["image_mask"]
    with torch.no_grad():
        text = model(ids, mask, mode="text", output_hidden_states=True)
        case.compare("text/last", text.last_hidden_state)
        for i, states in enumerate(text.hidden_states):
            case.compare(f"text/hidden_{i}", states)
        fused = model(
            attention_mask=mask,
            encoder_hidden_states=images,
            encoder_attention_mask=image_mask,
            mode="fusion",
            inputs_embeds=text.last_hidden_state,
        )
        case.compare("fusion/last", fused.last_hidden_state)
        both = model(ids, mask, images, image_mask, output_hidden_states=True, output_attentions=True)
        case.compare("multimodal/last", both.last_hidden_state)
        for i, states in enumerate(both.hidden_states):
            case.compare(f"multimodal/hidden_{i}", states)
        for i, probabilities in enumerate(both.attentions):
            case.compare(f"multimodal/self_attention_{i}", probabilities)
        packed = model(ids, mask, images, image_mask, keep_padding=False).last_hidden_state
        tokens = mask.bool()
        torch.testing.assert_close(packed[tokens], both.last_hidden_state[tokens], rtol=1e-4, atol=1e-5)
        assert packed[~tokens].eq(0).all()
        case.compare("multimodal_no_image_mask/last", model(ids, mask, images).last_hidden_state)
        causal = AlbefTextConfig(**text_fields(case), is_decoder=True)
        causal._attn_implementation = attention
        decoder = AlbefTextModel(causal).eval()
        decoder.load_state_dict(model.state_dict())
        case.compare("multimodal_causal/last", decoder(ids, mask, images, image_mask).last_hidden_state)


@reference("albef/encoder_split")
def test_encoder_split(case: Case):
    check_encoder(case, "sdpa")


@reference("albef/encoder_split_early")
def test_encoder_split_early(case: Case):
    check_encoder(case, "eager")


@reference("albef/pos_embed_interpolation")
def test_position_embedding_interpolation(case: Case):
    from transformers import ViTConfig, ViTModel

    vision = case.config["vision"]
    converted = vision_from_original(
        {name.removeprefix("visual_encoder."): value for name, value in case.weights.items()}
    )
    for which, size in (
        ("larger", case.config["larger_image_size"]),
        ("smaller", case.config["smaller_image_size"]),
        ("same", case.config["checkpoint_image_size"]),
    ):
        tower = ViTModel(
            ViTConfig(
                hidden_size=vision["width"],
                num_hidden_layers=vision["depth"],
                num_attention_heads=vision["heads"],
                intermediate_size=converted["layers.0.mlp.fc1.weight"].shape[0],
                patch_size=vision["patch_size"],
                image_size=size,
                layer_norm_eps=1e-6,
            ),
            add_pooling_layer=False,
        ).eval()
        load(tower, converted)
        positions = tower.embeddings.position_embeddings
        case.compare(f"{which}/pos_embed", positions)
        torch.testing.assert_close(
            interpolate_positions(converted["embeddings.position_embeddings"], positions.shape[1] - 1), positions.data
        )
        with torch.no_grad():
            case.compare(f"{which}/image_embeds", tower(case.inputs[f"image_{which}"]).last_hidden_state)


def momentum_model(case: Case) -> AlbefMomentumModel:
    """The model of the case with its twin and queue."""
    names = ("momentum", "alpha", "distill", "mlm_probability")
    return training_model(case.weights, config=albef_config(case), **{n: case.config[n] for n in names}).train()


def original_gradients(model: AlbefMomentumModel, case: Case) -> dict[str, Tensor]:
    grads = gradients(model, "retrieval.")
    grads |= {f"mlm_head.{name}": value for name, value in gradients(model, "mlm_head.").items()}
    return to_original(grads, layout_of(case.weights))


def mask_with_recorded_draws(model: AlbefForPreTraining, case: Case) -> Any:
    """Our masking, with the recorded draws in the place of random numbers."""
    inputs = case.inputs
    probability = case.config["mlm_probability"]
    choice = torch.where(inputs["rng/mlm_candidate"] > 0, probability / 2, 1.0)
    # Of the candidates a first draw makes [MASK], and of the others a second one a random word.
    fate = torch.where(inputs["rng/mlm_replace"] > 0, 0.4, torch.where(inputs["rng/mlm_random"] > 0, 0.85, 0.95))
    with (
        patch("hf_vlp.objectives.language.torch.rand", return_value=torch.stack([choice, fate])),
        patch("hf_vlp.objectives.language.torch.randint", return_value=inputs["rng/mlm_random_words"]),
    ):
        return model.mask(inputs["input_ids"], inputs["attention_mask"])


def check_contrast(case: Case, model: AlbefMomentumModel, output: Any) -> None:
    contrast = output.contrast
    case.compare("loss_ita", output.loss_itc)
    case.compare("loss_itm", output.loss_itm)
    case.compare("loss_i2t", contrast.itc.loss_i2t)
    case.compare("loss_t2i", contrast.itc.loss_t2i)
    case.compare("image_feat", contrast.image_features)
    case.compare("text_feat", contrast.text_features)
    case.compare("image_feat_m", contrast.image_features_m)
    case.compare("text_feat_m", contrast.text_features_m)
    # The loss sees batch and queue; the output holds the batch's columns, so the queue's are made again from features.
    queued = queue_from_original(case.weights)
    temperature = model.retrieval.temperature.detach()
    case.compare(
        "sim_i2t",
        torch.cat([contrast.itc.logits_per_image, contrast.image_features @ queued["texts"].t() / temperature], dim=1),
    )
    case.compare(
        "sim_t2i",
        torch.cat([contrast.itc.logits_per_text, contrast.text_features @ queued["images"].t() / temperature], dim=1),
    )
    case.compare("weights_i2t", output.weights_i2t)
    case.compare("weights_t2i", output.weights_t2i)
    case.compare("vl_output", output.itm_logits)
    if "sim_i2t_targets" in case.output_names:
        case.compare("sim_i2t_targets", contrast.targets[0])
        case.compare("sim_t2i_targets", contrast.targets[1])


def text_states(model: AlbefModel, case: Case) -> Tensor:
    """States of the text encoder with padding, as recorded."""
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    with torch.no_grad():
        return model.text_model(ids, mask, mode="text").last_hidden_state


def check_pretraining(case: Case) -> None:
    model = momentum_model(case)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    masked = mask_with_recorded_draws(model, case)
    case.compare("mlm/input_ids", masked.input_ids)
    case.compare("mlm/labels", masked.labels)
    output = model(
        case.inputs["image"],
        ids,
        mask,
        masked_tokens=masked,
        negatives=(case.inputs["rng/neg_image_idx"], case.inputs["rng/neg_text_idx"]),
    )
    check_contrast(case, model, output)
    case.compare("loss_mlm", output.loss_mlm)
    case.compare("image_embeds", output.image_embeds)
    case.compare("itm_labels", output.itm_labels)
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", original_gradients(model, case))

    # What the step computes only where it needs it, for all positions.
    albef, twin = model.retrieval.albef, model.momentum
    case.compare("text_embeds", text_states(albef, case))
    with torch.no_grad():
        images = albef.encode_images(case.inputs["image"])
        case.compare("multimodal_pos", albef.text_model(ids, mask, images).last_hidden_state)
        logits = model.mlm_head(albef.text_model(masked.input_ids, mask, images).last_hidden_state)
        images_m = twin["albef"].encode_images(case.inputs["image"])
        states_m = twin["albef"].text_model(masked.input_ids, mask, images_m).last_hidden_state
        logits_m = twin["mlm_head"](states_m)
    case.compare("mlm_logits", logits)
    case.compare("mlm_logits_m", logits_m)
    at = masked.labels != -100
    torch.testing.assert_close(output.mlm_logits, logits[at], rtol=1e-4, atol=1e-4)
    if output.mlm_logits_m is not None:
        torch.testing.assert_close(output.mlm_logits_m, logits_m[at], rtol=1e-4, atol=1e-4)


@reference("albef/pretrain")
def test_pretraining(case: Case):
    check_pretraining(case)


@reference("albef/pretrain_alpha0")
def test_pretraining_without_distillation(case: Case):
    check_pretraining(case)


def check_retrieval(case: Case) -> None:
    model = momentum_model(case)
    check_evaluation(case, model.retrieval)
    model.train()
    output = model(
        case.inputs["image"],
        case.inputs["input_ids"],
        case.inputs["attention_mask"],
        image_ids=case.inputs["idx"],
        negatives=(case.inputs["rng/neg_image_idx"], case.inputs["rng/neg_text_idx"]),
    )
    check_contrast(case, model, output)
    case.compare("sim_targets", output.contrast.hard_targets)
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", original_gradients(model, case))
    case.compare("text_embeds", text_states(model.retrieval.albef, case))


@torch.no_grad()
def check_evaluation(case: Case, model: AlbefForImageTextRetrieval) -> None:
    """The protocol of the original's evaluation: shortlist by similarity, then the matching logit, no sum of both."""
    model.eval()
    ids, mask = case.inputs["eval_input_ids"], case.inputs["eval_attention_mask"]
    images = model.embed_images(case.inputs["eval_image"])
    texts = model.embed_texts(ids, mask)
    similarity = model.similarity(images, texts)
    case.compare("eval/image_embeds", images.itc)
    case.compare("eval/text_embeds", texts)
    case.compare("eval/sims_i2t", similarity)
    for name, scores in (("eval/score_i2t", similarity), ("eval/score_t2i", similarity.t())):
        top = scores.topk(case.config["k_test"], dim=1).indices
        rows = torch.arange(len(top))[:, None].expand_as(top)
        image, text = (rows, top) if name.endswith("i2t") else (top, rows)
        image, text = image.flatten(), text.flatten()
        matched = model.matching_scores(images, image, ids[text], mask[text])
        ranked = torch.full_like(scores, -100.0)
        ranked[rows.flatten(), top.flatten()] = matched
        case.compare(name, ranked)
    pairs = torch.arange(min(len(images.itc), len(ids)))
    hidden = model.albef.text_model(ids[pairs], mask[pairs], images.states[pairs]).last_hidden_state
    case.compare("eval/pair_hidden", hidden)
    logits = model.matching_logits(images, pairs, ids[pairs], mask[pairs])
    case.compare("eval/pair_itm_logits", logits)
    forward = model(case.inputs["eval_image"][pairs], ids[pairs], mask[pairs], matching=True)
    torch.testing.assert_close(forward.itm_logits, logits, rtol=1e-4, atol=1e-5)


@reference("albef/retrieval")
def test_retrieval(case: Case):
    check_retrieval(case)


@reference("albef/retrieval_nodistill")
def test_retrieval_without_distillation(case: Case):
    check_retrieval(case)


@pytest.mark.parametrize("kind", ["albef/pretrain", "albef/retrieval", "albef/vqa", "albef/nlvr", "albef/ve"])
def test_names_convert_both_ways(kind: str):
    @reference(kind, complete=False)
    def check(case: Case) -> None:
        layout = layout_of(case.weights)
        assert layout.kind == {"pretrain": "pretraining"}.get(kind.split("/")[1], kind.split("/")[1])
        back = to_original(from_original(case.weights, layout), layout)
        back |= to_original(from_original(case.weights, layout, twin=True), layout, twin=True)
        if "image_queue" in case.weights:
            back |= queue_to_original(queue_from_original(case.weights))
        expected = {name: value for name, value in case.weights.items() if not name.endswith("position_ids")}
        assert set(back) == set(expected)
        assert all(torch.equal(back[name], value) for name, value in expected.items())

    from tests.reference.cases import find_cases

    for case in find_cases(kind):
        check(case=case)


def test_vision_names_convert_both_ways():
    state = {
        "cls_token": torch.randn(1, 1, 4),
        "blocks.1.attn.qkv.bias": torch.randn(12),
        "blocks.1.mlp.fc1.weight": torch.randn(8, 4),
        "norm.bias": torch.randn(4),
    }
    back = vision_to_original(vision_from_original(state))
    assert set(back) == set(state) and all(torch.equal(back[name], value) for name, value in state.items())
