"""BLIP's pretraining and retrieval fine-tuning against the original authors' code, also on two processes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_vlp.models.blip.conversion_blip import (
    from_original,
    queue_from_original,
    queue_to_original,
    to_original,
    training_model,
    training_state_to_original,
)
from hf_vlp.models.blip.momentum_blip import BlipMomentumModel
from tests.distributed import run_ranks
from tests.reference.cases import Case, find_cases, reference
from tests.reference.test_albef import compare_prefixed, gradients
from tests.reference.test_blip import blip_config, dense, dense_text


def momentum_model(case: Case, **settings: Any) -> BlipMomentumModel:
    """The model of the case with its twin and queue."""
    names = ("momentum", "alpha")
    settings = {name: case.config[name] for name in names if name in case.config} | settings
    return training_model(case.weights, config=blip_config(case), **settings).train()


def model_gradients(model: BlipMomentumModel) -> dict[str, Tensor]:
    """Gradients under the original names."""
    return to_original(gradients(model.model, "") | {"temperature": model.temperature.grad})


def check_contrast(case: Case, model: BlipMomentumModel, output: Any, prefix: str = "") -> None:
    contrast = output.contrast
    values = {
        "loss_ita": output.loss_itc,
        "loss_itm": output.loss_itm,
        "loss_i2t": contrast.itc.loss_i2t,
        "loss_t2i": contrast.itc.loss_t2i,
        "image_feat": contrast.image_features,
        "text_feat": contrast.text_features,
        "image_feat_m": contrast.image_features_m,
        "text_feat_m": contrast.text_features_m,
        "sim_targets": contrast.hard_targets,
        "sim_i2t_targets": contrast.targets[0],
        "sim_t2i_targets": contrast.targets[1],
        "weights_i2t": output.weights_i2t,
        "weights_t2i": output.weights_t2i,
        "vl_output": output.itm_logits,
    }
    # The loss sees batch and queue; the output holds the batch's columns, so the queue's are made again from features.
    queued = queue_from_original(case.weights)
    for name, own, logits in (
        ("sim_i2t", contrast.image_features @ queued["texts"].t(), contrast.itc.logits_per_image),
        ("sim_t2i", contrast.text_features @ queued["images"].t(), contrast.itc.logits_per_text),
    ):
        values[name] = torch.cat([logits, own / output.temperature], dim=1)
    for name, value in values.items():
        if prefix + name in case.output_names:
            case.compare(prefix + name, value)


def check_pretraining(case: Case) -> None:
    inputs = case.inputs
    model = momentum_model(case)
    decoder = model.model.text_decoder.bert
    assert decoder.encoder.layer[0].intermediate.dense.weight is (
        model.model.text_encoder.encoder.layer[0].intermediate.dense.weight
    )
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        case.compare("text_hidden", dense_text(model.model, ids, mask))
    output = model(inputs["image"], ids, mask, negatives=(inputs["rng/neg_image_idx"], inputs["rng/neg_text_idx"]))
    check_contrast(case, model, output)
    case.compare("loss_lm", output.loss_lm)
    case.compare("image_embeds", output.image_embeds)
    case.compare("itm_labels", output.itm_labels)
    targets = ids.masked_fill(mask == 0, -100)
    targets[:, 0] = model.model.dec_token_id
    case.compare("decoder_targets", targets)
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", model_gradients(model))
    with torch.no_grad():
        images, tokens = output.image_embeds.detach(), case.config["tokens"]
        positive = dense(model.model, model.model.text_encoder, ids, mask, tokens["enc"], images)
        case.compare("multimodal_pos", positive)
        states = dense(model.model, decoder, ids, mask, tokens["dec"], images, causal=True)
        case.compare("lm_logits", model.model.text_decoder.cls(states))


@reference("blip/pretrain")
def test_pretraining(case: Case):
    check_pretraining(case)


@reference("blip/pretrain_alpha0")
def test_pretraining_without_distillation(case: Case):
    check_pretraining(case)


@torch.no_grad()
def check_evaluation(case: Case, model: Any) -> None:
    """The original's evaluation: shortlist by similarity, then matching logit plus similarity."""
    ids, mask = case.inputs["eval_input_ids"], case.inputs["eval_attention_mask"]
    images, texts = model.embed_images(case.inputs["eval_image"]), model.embed_texts(ids, mask)
    similarity = model.similarity(images, texts)
    case.compare("eval/image_embeds", images.itc)
    case.compare("eval/text_embeds", texts)
    case.compare("eval/sims_i2t", similarity)
    for name, scores in (("eval/score_i2t", similarity), ("eval/score_t2i", similarity.t())):
        best = scores.topk(case.config["k_test"], dim=1)
        rows = torch.arange(len(scores))[:, None].expand_as(best.indices)
        image, text = (rows, best.indices) if name.endswith("i2t") else (best.indices, rows)
        matched = model.matching_scores(images, image.flatten(), ids[text.flatten()], mask[text.flatten()])
        ranked = torch.full_like(scores, -100.0)
        ranked[rows.flatten(), best.indices.flatten()] = matched + best.values.flatten()
        case.compare(name, ranked)


def retrieval_step(model: BlipMomentumModel, inputs: dict[str, Tensor]) -> Any:
    return model(
        inputs["image"],
        inputs["input_ids"],
        inputs["attention_mask"],
        image_ids=inputs["idx"],
        negatives=(inputs["rng/neg_image_idx"], inputs["rng/neg_text_idx"]),
    )


@reference("blip/retrieval")
def test_retrieval(case: Case):
    recorded = bool(case.config["negative_all_rank"])
    model = momentum_model(case, across_ranks="local", negative_all_rank=recorded)
    check_evaluation(case, model.model.eval())
    model.train()
    output = retrieval_step(model, case.inputs)
    check_contrast(case, model, output)
    case.compare("neg_sim_i2t", output.similarities[0])
    case.compare("neg_sim_t2i", output.similarities[1])
    output.loss.backward()
    compare_prefixed(case, "after/", training_state_to_original(model))
    compare_prefixed(case, "grad/", model_gradients(model))
    other = retrieval_step(momentum_model(case, across_ranks="local", negative_all_rank=not recorded), case.inputs)
    case.compare("other_negative_all_rank/loss_ita", other.loss_itc)
    case.compare("other_negative_all_rank/loss_itm", other.loss_itm)
    joined = retrieval_step(momentum_model(case), case.inputs)
    torch.testing.assert_close(joined.loss, output.loss)


def rank_step(folder: str) -> dict[str, Tensor]:
    """One rank's part of the recorded step: outputs by name."""
    case = Case(Path(folder), json.loads((Path(folder) / "case.json").read_text(encoding="utf-8")))
    prefix = f"rank{torch.distributed.get_rank()}/"
    inputs = {name.removeprefix(prefix): value for name, value in case.inputs.items() if name.startswith(prefix)}
    model = momentum_model(case, across_ranks="local", negative_all_rank=case.config["negative_all_rank"])
    output = retrieval_step(model, inputs)
    output.loss.backward()
    contrast = output.contrast
    values = {
        "loss_ita": output.loss_itc,
        "loss_itm": output.loss_itm,
        "image_feat": contrast.image_features,
        "text_feat": contrast.text_features,
        "image_feat_m": contrast.image_features_m,
        "text_feat_m": contrast.text_features_m,
        "sim_targets": contrast.hard_targets,
        "sim_i2t_targets": contrast.targets[0],
        "sim_t2i_targets": contrast.targets[1],
        "weights_i2t": output.weights_i2t,
        "weights_t2i": output.weights_t2i,
        "vl_output": output.itm_logits,
    }
    values |= {f"after/{name}": value for name, value in training_state_to_original(model).items()}
    values |= {f"grad/{name}": value for name, value in model_gradients(model).items()}
    wanted = {name.removeprefix(prefix) for name in case.output_names if name.startswith(prefix)}
    return {prefix + name: value.detach().clone() for name, value in values.items() if name in wanted}


@reference("blip/retrieval_2ranks")
def test_retrieval_on_two_processes(case: Case):
    for values in run_ranks(rank_step, case.config["world_size"], str(case.folder)):
        for name, value in values.items():
            case.compare(name, value)


@pytest.mark.parametrize("kind", ["pretrain", "caption", "vqa", "nlvr", "retrieval", "itm", "feature_extractor"])
def test_names_convert_both_ways(kind: str):
    for case in find_cases(f"blip/{kind}"):
        back = to_original(from_original(case.weights))
        back |= to_original(from_original(case.weights, twin=True), twin=True)
        if "image_queue" in case.weights:
            back |= queue_to_original(queue_from_original(case.weights))
        expected = {name: value for name, value in case.weights.items() if not name.endswith("position_ids")}
        assert set(back) == set(expected)
        assert all(torch.equal(back[name], value) for name, value in expected.items())
