"""ALBEF's tasks against the original authors' code: question answering, two images, entailment, grounding."""

from typing import Any

import torch
from torch import Tensor

from hf_vlp.models.albef.conversion_albef import (
    inference_model,
    layout_of,
    to_original,
    training_model,
    training_state_to_original,
)
from hf_vlp.models.albef.modeling_albef import AlbefPreTrainedModel
from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from tests.reference.cases import Case, reference
from tests.reference.test_albef import albef_config, compare_prefixed, gradients


def task_model(case: Case, **settings: Any) -> AlbefPreTrainedModel:
    """The fine-tuning model of the case with its twin."""
    names = ("momentum", "alpha", "distill")
    settings = {name: case.config[name] for name in names if name in case.config} | settings
    return training_model(case.weights, config=albef_config(case), **settings).train()


def original_gradients(case: Case, model: AlbefPreTrainedModel, prefix: str = "model.") -> dict[str, Tensor]:
    return to_original(gradients(model, prefix), layout_of(case.weights))


def last_hidden_state(case: Case, model: AlbefPreTrainedModel, images: Tensor) -> Tensor:
    """Fused states with padding, as recorded."""
    with torch.no_grad():
        ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
        return model.albef_model.text_model(ids, mask, images).last_hidden_state


def check_classification(case: Case, pixel_values: Tensor) -> None:
    ids, mask, labels = (case.inputs[name] for name in ("input_ids", "attention_mask", "targets"))
    model = inference_model(case.weights, config=albef_config(case))
    with torch.no_grad():
        plain = model(pixel_values, ids, mask, labels=labels)
        images = model.albef.encode_images(
            pixel_values if pixel_values.ndim == 4 else pixel_values.transpose(0, 1).flatten(0, 1)
        )
    case.compare("logits", plain.logits)
    case.compare("loss_nodistill", plain.loss)
    case.compare("last_hidden_state", last_hidden_state(case, model, images))
    undistilled = task_model(case, distill=False)
    torch.testing.assert_close(undistilled(pixel_values, ids, mask, labels=labels).loss, plain.loss)

    model = task_model(case)
    output = model(pixel_values, ids, mask, labels=labels)
    case.compare("loss", output.loss)
    case.compare("logits_m", output.logits_m)
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", original_gradients(case, model))


@reference("albef/ve")
def test_visual_entailment(case: Case):
    check_classification(case, case.inputs["image"])


@reference("albef/nlvr")
def test_visual_reasoning(case: Case):
    # Recorded as all first images before all second ones.
    check_classification(case, torch.stack(case.inputs["image"].chunk(2), dim=1))


@reference("albef/pretrain_nlvr")
def test_text_assignment(case: Case):
    model = training_model(case.weights, config=albef_config(case)).train()
    inputs = case.inputs
    draws = (inputs["rng/branch_u"], inputs["rng/order_u"], inputs["rng/picked"])
    output = model(inputs["image"], inputs["input_ids"], inputs["attention_mask"], draws=draws)
    case.compare("loss", output.loss)
    case.compare("logits", output.logits)
    case.compare("labels", output.labels)
    weights = output.sampling_weights
    case.compare("sampling_weights", weights)
    case.compare("sampling_probs", weights / weights.sum(dim=1, keepdim=True))
    case.compare("image_feat", output.image_features)
    first, second = (output.image_embeds[index] for index in output.image_index)
    case.compare("image_input_first", first)
    case.compare("image_input_second", second)
    case.compare("last_hidden_state", last_hidden_state(case, model, torch.cat([first, second]).detach()))
    output.loss.backward()
    grads = gradients(model, "reasoning.") | {
        f"{part}.{name}": value
        for part in ("vision_projection", "assignment_head")
        for name, value in gradients(model, f"{part}.").items()
    }
    compare_prefixed(case, "grad/", to_original(grads, layout_of(case.weights)))


def dense_logits(model: Any, case: Case, states: Tensor, mask: Tensor) -> Tensor:
    """The decoder's logits at all positions of the answers, padding included, as recorded."""
    answers = PackedTexts.from_padded(case.inputs["answer_ids"], case.inputs["answer_mask"], keep_padding=True)
    question = torch.repeat_interleave(torch.arange(len(states)), case.inputs["answers_per_question"])
    with torch.no_grad():
        hidden = model.decoder.hidden(answers, states, mask, question)
        return model.decoder.lm_head(hidden).view(*case.inputs["answer_ids"].shape, -1)


@reference("albef/vqa")
def test_question_answering(case: Case):
    inputs = case.inputs
    asked = (inputs["image"], inputs["question_ids"], inputs["question_mask"])
    answered = {
        "labels": inputs["answer_ids"],
        "labels_attention_mask": inputs["answer_mask"],
        "answers_per_question": inputs["answers_per_question"],
        "answer_weights": inputs["weights"],
    }
    model = inference_model(case.weights, config=albef_config(case))
    with torch.no_grad():
        plain = model(*asked, **answered)
        case.compare("loss_nodistill", plain.loss)
        ranked = model.rank_answers(
            *asked,
            candidate_ids=inputs["candidate_ids"],
            candidate_attention_mask=inputs["candidate_mask"],
            top_k=case.config["k_test"],
        )
        images = model.albef.encode_images(inputs["image"])
        states = model.albef.text_model(inputs["question_ids"], inputs["question_mask"], images).last_hidden_state
        case.compare("question_hidden", states)
        case.compare("answer_logits", dense_logits(model, case, states, inputs["question_mask"]))
    case.compare("rank/topk_ids", ranked.answer_index)
    case.compare("rank/topk_probs", ranked.probabilities)
    case.compare("rank/first_token_logits", ranked.first_token_logits)
    case.compare("rank/answer_loss", ranked.answer_loss)
    case.compare("rank/log_probs_sum", ranked.scores)
    case.compare("rank/prob_first_token", ranked.first_token_probabilities)

    model = task_model(case)
    output = model(*asked, **answered)
    case.compare("loss", output.loss)
    case.compare("answer_loss", output.answer_loss)
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", original_gradients(case, model))
    with torch.no_grad():
        images_m = model.momentum.albef.encode_images(inputs["image"])
        states_m = model.momentum.albef.text_model(
            inputs["question_ids"], inputs["question_mask"], images_m
        ).last_hidden_state
    case.compare("answer_logits_m", dense_logits(model.momentum, case, states_m, inputs["question_mask"])[:, :-1])


@reference("albef/gradcam")
def test_grounding(case: Case):
    model = inference_model(case.weights, config=albef_config(case))
    pairs = (case.inputs["image"], case.inputs["input_ids"], case.inputs["attention_mask"])
    number, length = case.inputs["input_ids"].shape
    real = case.inputs["attention_mask"].bool()
    # Attention of padding is not computed; the maps do not see it. It is compared from the text stack with padding.
    with torch.no_grad():
        images = model.albef.encode_images(case.inputs["image"])
        padded = model.albef.text_model(*pairs[1:], images, output_attentions=True).cross_attentions
    fusion_layer = case.config["bert"]["fusion_layer"]
    for block in case.config["itm_blocks"]:
        for parameter in model.parameters():
            parameter.requires_grad_(block % 2 == 0)
        found = model.grounding_maps(*pairs, layer=block)
        case.compare(f"itm_block{block}/gradcam", found.maps)
        case.compare(f"itm_block{block}/gradcam_per_token", found.token_maps)
        case.compare(f"itm_block{block}/score", found.score)
        attention = padded[block - fusion_layer].view(number, -1, length, found.attention.shape[-1])
        by_token = found.attention.transpose(1, 2)
        torch.testing.assert_close(by_token[real], attention.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)
        case.compare(f"itm_block{block}/attention", attention)
        case.compare(f"itm_block{block}/attention_grad", found.gradient)
    case.compare("itm_logits", found.logits)
    for block in case.config["itc_blocks"]:
        found = model.grounding_maps(*pairs, layer=block, source="contrastive")
        for output, value in (
            ("gradcam", found.maps),
            ("score", found.score),
            ("attention", found.attention),
            ("attention_grad", found.gradient),
        ):
            case.compare(f"itc_block{block}/{output}", value)
    case.compare("itc_sim", found.logits)
