"""BLIP against the original authors' code: towers, matching, captioning, question answering."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import BlipConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel

from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.blip.conversion_blip import (
    config_from_original,
    from_original,
    inference_model,
    load,
    to_original,
    vision_from_original,
)
from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval
from hf_vlp.models.blip.text_blip import fuse, grid, with_first
from hf_vlp.models.blip.vision_blip import encode_images
from tests.reference.cases import Case, reference
from tests.reference.test_albef import compare_prefixed, gradients


def blip_config(case: Case) -> BlipConfig:
    bert = case.config["bert"]
    tokens = case.config["tokens"]
    fields = {**bert, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return config_from_original(
        case.weights,
        text_config=fields,
        vision_heads=case.config["vision"]["heads"],
        text_heads=bert["num_attention_heads"],
        dec_token_id=tokens["dec"],
        enc_token_id=tokens["enc"],
        sep_token_id=tokens["sep"],
    )


def model_of(case: Case) -> Any:
    return inference_model(case.weights, config=blip_config(case))


def original_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return to_original(gradients(model, ""))


def dense(model: Any, stack: Any, ids: Tensor, mask: Tensor, first: int | None, states: Tensor, **options: Any) -> Any:
    """States of a text model with padding computed, as recorded."""
    texts = PackedTexts.from_padded(ids, mask, keep_padding=True)
    texts = texts if first is None else with_first(texts, first)
    return grid(fuse(stack, texts, torch.arange(len(texts)), states, **options), texts, ids.shape[1])


def dense_text(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """States of the unimodal text encoder with padding computed, as recorded."""
    from hf_vlp.models.blip.text_blip import text_pass

    texts = PackedTexts.from_padded(ids, mask, keep_padding=True)
    return grid(text_pass(model.text_encoder, texts), texts, ids.shape[1])


@reference("blip/pos_embed_interpolation")
def test_position_embedding_interpolation(case: Case):
    vision = case.config["vision"]
    state = {name.removeprefix("visual_encoder."): value for name, value in case.weights.items()}
    converted = vision_from_original(state)
    for which, size in (
        ("larger", case.config["larger_image_size"]),
        ("smaller", case.config["smaller_image_size"]),
        ("same", case.config["checkpoint_image_size"]),
    ):
        config = BlipVisionConfig(
            hidden_size=vision["width"],
            num_hidden_layers=vision["depth"],
            num_attention_heads=vision["heads"],
            intermediate_size=converted["encoder.layers.0.mlp.fc1.weight"].shape[0],
            patch_size=vision["patch_size"],
            image_size=size,
            layer_norm_eps=1e-6,
        )
        tower = BlipVisionModel(config).eval()
        load(tower, converted)
        case.compare(f"{which}/pos_embed", tower.embeddings.position_embedding)
        with torch.no_grad():
            case.compare(f"{which}/image_embeds", encode_images(tower, case.inputs[f"image_{which}"]))


@reference("blip/feature_extractor")
@torch.no_grad()
def test_feature_extractor(case: Case):
    model = BlipForImageTextRetrieval(blip_config(case)).eval()
    load(model, from_original(case.weights), ignore=("vision_proj", "text_proj", "itm_head"))
    ids, mask, image = (case.inputs[name] for name in ("input_ids", "attention_mask", "image"))
    found = model.extract_features(image, ids, mask)
    case.compare("features_image", found.image_embeds)
    case.compare("features_text", dense_text(model, ids, mask))
    enc = case.config["tokens"]["enc"]
    multimodal = dense(model, model.text_encoder, ids, mask, enc, found.image_embeds)
    case.compare("features_multimodal", multimodal)
    tokens = mask.bool()
    torch.testing.assert_close(found.multimodal_embeds[tokens], multimodal[tokens], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.text_embeds[tokens], dense_text(model, ids, mask)[tokens], rtol=1e-4, atol=1e-5)
    assert found.text_embeds[~tokens].eq(0).all() and found.multimodal_embeds[~tokens].eq(0).all()


@reference("blip/itm")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_matching(case: Case, attention: str):
    config = blip_config(case)
    config._attn_implementation = attention
    model = inference_model(case.weights, config=config)
    assert model.config._attn_implementation == attention
    ids, mask, image = (case.inputs[name] for name in ("input_ids", "attention_mask", "image"))
    matched = model(ids, image, attention_mask=mask)
    compared = model(ids, image, use_itm_head=False, attention_mask=mask)
    case.compare("itm_logits", matched.itm_score)
    case.compare("itc_sim", compared.itm_score)
    images = model.embed_images(image)
    case.compare("image_feat", images.itc)
    case.compare("text_feat", model.embed_texts(ids, mask))
    case.compare("image_embeds", matched.last_hidden_state)
    case.compare("multimodal_hidden", dense(model, model.text_encoder, ids, mask, None, images.states))
    case.compare("text_hidden", dense_text(model, ids, mask))
    case.compare("itm_logits_enc_token", model.matching_logits(images, torch.arange(len(ids)), ids, mask))
    (matched.itm_score[:, 1].sum() + compared.itm_score.trace()).backward()
    compare_prefixed(case, "grad/", original_gradients(model))


def labels_of(case: Case) -> Tensor:
    """Captions with padding and the prompt left out."""
    labels = case.inputs["input_ids"].masked_fill(case.inputs["attention_mask"] == 0, -100)
    labels[:, : case.config["prompt_length"]] = -100
    return labels


def sum_of_log_probabilities(case: Case, found: Any, eos: int) -> Tensor:
    """The scores times the length they were divided by: the whole length without the end token."""
    is_end = found.sequences == eos
    first = torch.where(is_end.any(1), is_end.int().argmax(1), found.sequences.shape[1])
    return found.sequences_scores * first


@reference("blip/caption")
def test_captioning(case: Case):
    model = model_of(case)
    ids, mask, image = (case.inputs[name] for name in ("input_ids", "attention_mask", "image"))
    dec, sep = case.config["tokens"]["dec"], case.config["tokens"]["sep"]
    labels = labels_of(case)
    case.compare("decoder_targets", labels)
    output = model(image, ids, mask, labels=labels)
    case.compare("loss_lm", output.loss)
    case.compare("image_embeds", output.image_embeds)
    with torch.no_grad():
        states = dense(model, model.text_decoder.bert, ids, mask, dec, output.image_embeds, causal=True)
        case.compare("lm_logits", model.text_decoder.cls(states))
    output.loss.backward()
    compare_prefixed(case, "grad/", original_gradients(model))

    prompt = torch.tensor(case.config["prompt_ids"]).expand(len(image), -1)
    for name, settings in case.config["generation"]["beam"].items():
        found = model.generate(image, prompt, return_dict_in_generate=True, output_scores=True, **settings)
        case.compare(f"{name}/sequences", found.sequences)
        case.compare(f"{name}/sequences_scores", found.sequences_scores)
        case.compare(f"{name}/sum_logprob", sum_of_log_probabilities(case, found, sep))
    draws = iter(case.inputs["rng/nucleus_draws"])
    with patch("torch.multinomial", lambda *_, **__: next(draws)[:, None]):
        sampled = model.generate(
            image,
            prompt,
            do_sample=True,
            return_dict_in_generate=True,
            output_scores=True,
            **case.config["generation"]["nucleus"],
        )
    case.compare("nucleus/sequences", sampled.sequences)
    case.compare("nucleus/step_probs", torch.stack(sampled.scores).softmax(dim=-1))
    with torch.no_grad():
        case.compare("nucleus/path_logits", model(image, case.outputs["nucleus/sequences"]).logits)


@reference("blip/vqa")
def test_question_answering(case: Case):
    model = model_of(case)
    inputs, tokens = case.inputs, case.config["tokens"]
    asked = {
        "pixel_values": inputs["image"],
        "input_ids": inputs["question_ids"],
        "attention_mask": inputs["question_mask"],
    }
    output = model(
        **asked,
        labels=inputs["answer_ids"],
        labels_attention_mask=inputs["answer_mask"],
        answers_per_question=inputs["answers_per_question"],
        answer_weights=inputs["weights"],
    )
    case.compare("loss", output.loss)
    case.compare("answer_loss", output.answer_loss)
    output.loss.backward()
    compare_prefixed(case, "grad/", original_gradients(model))
    with torch.no_grad():
        images = model.encode_images(inputs["image"])
        questions = dense(
            model, model.text_encoder, inputs["question_ids"], inputs["question_mask"], tokens["enc"], images
        )
        case.compare("question_hidden", questions)
        answers = PackedTexts.from_padded(inputs["answer_ids"], inputs["answer_mask"], keep_padding=True)
        index = torch.repeat_interleave(torch.arange(len(questions)), inputs["answers_per_question"])
        states = fuse(
            model.text_decoder.bert,
            with_first(answers, tokens["dec"]),
            index,
            questions,
            image_mask=inputs["question_mask"],
            causal=True,
        )
        case.compare("answer_logits", grid(model.text_decoder.cls(states), answers, inputs["answer_ids"].shape[1]))

    ranked = model.rank_answers(
        **asked,
        candidate_ids=inputs["candidate_ids"],
        candidate_attention_mask=inputs["candidate_mask"],
        top_k=case.config["k_test"],
    )
    case.compare("rank/max_ids", ranked.answer_index[:, 0])
    case.compare("rank/topk_ids", ranked.shortlist)
    case.compare("rank/first_token_logits", ranked.first_token_logits)
    case.compare("rank/prob_first_token", ranked.first_token_probabilities)
    case.compare("rank/log_probs_sum", ranked.scores)
    found = model.generate(
        **asked,
        num_beams=3,
        max_length=10,
        min_length=1,
        attend_padding=True,
        return_dict_in_generate=True,
        output_scores=True,
    )
    case.compare("generate/sequences", found.sequences)
    case.compare("generate/sequences_scores", found.sequences_scores)
    case.compare("generate/sum_logprob", sum_of_log_probabilities(case, found, tokens["sep"]))


@reference("blip/nlvr")
def test_visual_reasoning(case: Case):
    model = model_of(case).train()
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    # Recorded as all first images before all second ones.
    pixel_values = torch.stack(case.inputs["image"].chunk(2), dim=1)
    assert model.config.merge_from == case.config["merge_start_layer"]
    output = model(pixel_values, ids, mask, labels=case.inputs["targets"])
    case.compare("loss", output.loss)
    case.compare("logits", output.logits)
    output.loss.backward()
    compare_prefixed(case, "grad/", original_gradients(model))
    model.eval()
    with torch.no_grad():
        images = model.encode_images(case.inputs["image"])
        case.compare("image_embeds", images)
        case.compare("last_hidden_state", model.text_encoder(model.with_enc(ids), mask, *images.chunk(2)))
        case.compare("logits_eval", model(pixel_values, ids, mask).logits)
