"""BLIP-2 stage 1 against LAVIS: the pretraining step, and what the trained Q-Former gives."""

import dataclasses
import warnings
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer

from hf_vlp.models.blip2.conversion_blip_2 import model_from_original, to_original
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining, Blip2ForPreTrainingOutput
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.models.blip2.qformer import (
    Layout,
    generation_pass,
    joint_pass,
    project_images,
    query_pass,
    text_pass,
)
from hf_vlp.nn.packing import PackedTexts
from hf_vlp.objectives.matching import hard_negatives
from tests.reference.cases import Case, NotComputedWarning, reference
from tests.reference.test_blip2_stage2 import compare_ids, writes_the_same


def stage1_model(case: Case, **settings: object) -> Blip2ForPreTraining:
    """The recorded model, as the recording ran it: frozen tower, no dropout."""
    config = case.config
    converted = model_from_original(
        case.weights, vision_heads=config["vision"]["heads"], qformer_heads=config["qformer"]["num_attention_heads"]
    )
    ids = config["token_ids"]["bert"]
    for ours, theirs in (
        ("itc_label_smoothing", "label_smoothing_itc"),
        ("itg_label_smoothing", "label_smoothing_lm"),
    ):
        if theirs in config:
            settings[ours] = config[theirs]
    model = Blip2ForPreTraining.from_inference_model(
        converted.retrieval, decoder_start_token_id=ids["dec(bos)"], eos_token_id=ids["sep"], **settings
    )
    model.load_extras(converted.pretraining_extras())
    model.retrieval.vision_model.requires_grad_(False)
    model.retrieval.vision_model.post_layernorm.requires_grad_(True)
    return model.eval()


def compare_at(case: Case, name: str, ours: Tensor, where: Tensor, reason: str) -> None:
    """Compares at the positions `where` alone, and says why the others are not computed."""
    expected = case.outputs[name]
    while where.dim() < expected.dim():
        where = where[..., None]
    case.compare(name, torch.where(where, ours, expected))
    warnings.warn(f"{case.kind}: {name} is compared in part: {reason}", NotComputedWarning, stacklevel=2)


def tokenizer_of(case: Case, name: str) -> Blip2Processor:
    return AutoTokenizer.from_pretrained(case.folder / "tokenizers" / name)


def to_length(grid: Tensor, length: int, value: float = 0) -> Tensor:
    """Text values (B, L, ...) with further positions up to `length`."""
    padding = [0, 0] * (grid.dim() - 2) + [0, length - grid.shape[1]]
    return F.pad(grid, padding, value=value)


def compare_gradients(case: Case, model: Blip2ForPreTraining, output: Blip2ForPreTrainingOutput) -> None:
    model.zero_grad()
    output.loss.backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    prefix = "retrieval."
    inner = {name.removeprefix(prefix): value for name, value in gradients.items() if name.startswith(prefix)}
    extras = {name: value for name, value in gradients.items() if not name.startswith(prefix)}
    original = to_original(inner, extras)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, original[name.removeprefix("grad/")])


def compare_masks(case: Case, texts: PackedTexts, image_index: Tensor, text_index: Tensor, queries: int) -> None:
    """What each pass lets a position see, read off the masks that our passes use."""
    length = case.inputs["input_ids"].shape[1]
    texts = dataclasses.replace(texts, longest=length)
    batch = len(texts)

    def seen(layout: Layout, rows: int) -> Tensor:
        keys = layout.length if layout.mask is None else layout.mask.shape[-1]
        mask = torch.ones(layout.sequences, 1, 1, keys, dtype=torch.bool) if layout.mask is None else layout.mask
        return mask.expand(-1, -1, rows, -1)

    image = Layout(batch, queries, None)
    text = Layout(batch, 0, texts)
    own = torch.arange(batch)
    pairs = dataclasses.replace(texts.select(torch.cat([own, own, text_index])), longest=length)
    joint = Layout(3 * batch, queries, pairs)
    generated = Layout(batch, 0, texts, causal=True, cached=queries)
    recorded = case.spec["outputs"]

    def compare(name: str, mask: Tensor) -> None:
        shape = recorded[name]["shape"]
        case.compare(name, mask.reshape(shape).to(case.outputs[name].dtype))

    compare("mask/itc_image_raw", seen(image, 1))
    compare("mask/itc_text_raw", seen(text, 1))
    compare("mask/itm_raw", seen(joint, 1))
    compare("mask/itg_text_rows_raw", seen(generated, length))
    unseen = torch.zeros(batch, 1, queries, length, dtype=torch.bool)
    of_queries = torch.cat([seen(image, queries), unseen], dim=-1)
    alone = torch.cat([unseen.transpose(2, 3), seen(text, length)], dim=-1)
    compare("mask/itc_unimodal", torch.cat([of_queries, alone], dim=2))
    compare("mask/itm_bidirectional", seen(joint, queries + length))
    causal = torch.cat([of_queries, seen(generated, length)], dim=2)
    compare("mask/itg_multimodal_causal", causal)
    compare("mask/itg_uncached", causal)


def step(model: Blip2ForPreTraining, inputs: Mapping[str, Tensor], prefix: str = "") -> Blip2ForPreTrainingOutput:
    return model(
        inputs["image"],
        inputs["input_ids"],
        inputs["attention_mask"],
        image_ids=inputs["image_id"] if prefix else None,
        negative_image_index=inputs[f"{prefix}neg_image_idx"],
        negative_text_index=inputs[f"{prefix}neg_text_idx"],
    )


@reference("blip2/stage1")
def test_pretraining_step(case: Case) -> None:
    model = stage1_model(case, gather_keys="detached")
    inputs, length = case.inputs, case.inputs["input_ids"].shape[1]
    processor = Blip2Processor.for_retrieval(
        tokenizer_of(case, "bert"), image_size=case.config["vision"]["image_size"]
    )
    tokens = processor(
        text=case.spec["texts"]["text_input"],
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=case.config["max_txt_len"],
    )
    assert torch.equal(tokens["input_ids"], inputs["input_ids"])
    assert torch.equal(tokens["attention_mask"], inputs["attention_mask"])
    assert processor.tokenizer.bos_token_id == model.settings.decoder_start_token_id

    output = step(model, inputs)
    case.compare("loss", output.loss)
    case.compare("loss_itc", output.loss_itc)
    case.compare("loss_itm", output.loss_itm)
    case.compare("loss_lm", output.loss_itg)
    case.compare("sim_i2t", output.logits_per_image)
    case.compare("sim_t2i", output.logits_per_text)
    case.compare("itm_logits", output.itm_logits)
    case.compare("itm_labels", output.itm_labels)
    compare_gradients(case, model, output)

    retrieval = model.retrieval
    tower = retrieval.tower_states(inputs["image"])
    case.compare("vit_last_hidden_state", tower)
    features = retrieval.image_features(image_embeds=tower)
    case.compare("image_embeds", features)
    images = project_images(retrieval.qformer, features)
    texts = retrieval.texts(inputs["input_ids"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()
    queries = query_pass(retrieval.qformer, retrieval.query_tokens, images, with_cache=True)
    case.compare("query_output", queries.states)
    case.compare("image_feats", retrieval.project_queries(queries.states))
    states = text_pass(retrieval.qformer, retrieval.embeddings, texts)
    padding = "outputs at padding are not computed"
    compare_at(case, "text_output", to_length(texts.pad(states), length), real, padding)
    case.compare("text_feat", retrieval.project_text(states[texts.first]))
    negatives = hard_negatives(output.logits_per_image, output.logits_per_text)
    case.compare("weights_t2i", negatives.weights_t2i)
    case.compare("weights_i2t", negatives.weights_i2t)

    own = torch.arange(len(texts))
    image_index = torch.cat([own, inputs["neg_image_idx"], own])
    text_index = torch.cat([own, own, inputs["neg_text_idx"]])
    pairs = texts.select(text_index)
    joint, joint_text = joint_pass(
        retrieval.qformer,
        retrieval.embeddings,
        retrieval.query_tokens,
        pairs,
        images,
        image_index=image_index,
        queries_only=False,
    )
    whole = torch.cat([joint, to_length(pairs.pad(joint_text), length)], dim=1)
    seen = torch.cat([torch.ones(joint.shape[:2], dtype=torch.bool), real[text_index]], dim=1)
    compare_at(case, "itm_output", whole, seen, padding)
    written = texts.with_first(model.settings.decoder_start_token_id)
    states = generation_pass(retrieval.qformer, retrieval.embeddings, written, queries.cache)
    compare_at(case, "lm_text_output", to_length(texts.pad(states), length), real, padding)
    logits = to_length(texts.pad(model.token_logits(states)), length)
    compare_at(case, "lm_logits", logits, real, padding + "; in training none are made where nothing is learnt")
    inputs_only = texts.without_last()
    labels = torch.where(inputs_only.mask, inputs_only.pad(texts.next_tokens()), -100)
    case.compare("lm_labels_shifted", to_length(labels, length - 1, -100))
    compare_masks(case, texts, image_index, inputs["neg_text_idx"], retrieval.config.num_query_tokens)

    output = step(model, inputs, "imgid/")
    case.compare("imgid/loss", output.loss)
    case.compare("imgid/loss_itc", output.loss_itc)
    case.compare("imgid/loss_itm", output.loss_itm)
    case.compare("imgid/loss_lm", output.loss_itg)
    negatives = hard_negatives(output.logits_per_image, output.logits_per_text, image_ids=inputs["image_id"])
    case.compare("imgid/weights_t2i", negatives.weights_t2i)
    case.compare("imgid/weights_i2t", negatives.weights_i2t)


@reference("blip2/stage1_inference")
@torch.no_grad()
def test_inference(case: Case) -> None:
    model = stage1_model(case)
    retrieval, inputs = model.retrieval, case.inputs
    texts = case.spec["texts"]["text_input"]
    processor = Blip2Processor.for_retrieval(
        tokenizer_of(case, "bert"), image_size=case.config["vision"]["image_size"]
    )
    tokens = processor(text=texts, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], inputs["input_ids"])
    assert torch.equal(tokens["attention_mask"], inputs["attention_mask"])
    real = inputs["attention_mask"].bool()

    features = retrieval.extract_features(inputs["image"], inputs["input_ids"], inputs["attention_mask"])
    case.compare("image/image_embeds", features.image_embeds)
    case.compare("image/image_embeds_proj", features.image_embeds_proj)
    padding = "outputs at padding are not computed"
    compare_at(case, "text/text_embeds", features.text_embeds, real, padding)
    compare_at(case, "text/text_embeds_proj", features.text_embeds_proj, real, padding)
    case.compare("multimodal/multimodal_embeds", features.multimodal_embeds)
    case.compare("forward_image/query_output", features.image_embeds)
    case.compare("image_embeds", retrieval.image_features(inputs["image"]))
    case.compare("forward_text/cls", features.text_embeds[:, 0])

    images = retrieval.embed_images(inputs["image"])
    batch = len(texts)
    image_index = torch.arange(batch).repeat_interleave(batch)
    pairs = {name: inputs[name].repeat(batch, 1) for name in ("input_ids", "attention_mask")}
    scores = retrieval.matching_scores(images, image_index, **pairs)
    case.compare("compute_itm/matrix", scores.view(batch, batch))
    # Only the scores of single pairs are of texts that were cut.
    cut = processor(text=texts, return_tensors="pt", truncation=True, max_length=case.config["max_txt_len"])
    matched = retrieval(inputs["image"], cut["input_ids"], cut["attention_mask"], use_image_text_matching_head=True)
    case.compare("itm_forward/logits", matched.logits_per_image)
    case.compare("itm_forward/probabilities", matched.logits_per_image.softmax(dim=-1))
    similarity = retrieval.similarity(images, retrieval.embed_texts(cut["input_ids"], cut["attention_mask"]))
    case.compare("itc_forward/scores", similarity.diagonal()[:, None])

    keys = project_images(retrieval.qformer, images.states)
    cache = query_pass(retrieval.qformer, retrieval.query_tokens, keys, with_cache=True).cache
    packed = retrieval.texts(inputs["input_ids"], inputs["attention_mask"])
    states = generation_pass(
        retrieval.qformer,
        retrieval.embeddings,
        packed.with_first(model.settings.decoder_start_token_id),
        cache,
    )
    compare_at(case, "lm/logits_one_pass", packed.pad(model.token_logits(states)), real, padding)

    limits = {name: case.config["generate"][name] for name in ("max_length", "min_length")}
    beams = case.config["generate"]["num_beams"]
    case.compare("generate_greedy/ids", model.generate(inputs["image"], **limits))
    # The recorded scores are means whatever the penalty. A penalty that is set in its generation config does not reach
    # the library of the recording, which then repeats the search with 1.
    repeated = all(
        torch.equal(case.outputs[f"generate_beam3/{what}"], case.outputs[f"generate_beam3_lp0/{what}"])
        for what in ("ids", "beam_scores")
    )
    stop = model.settings.eos_token_id
    for name, penalty in (("generate_beam3", 1.0), ("generate_beam3_lp0", 1.0 if repeated else 0.0)):
        output = model.generate(
            inputs["image"],
            num_beams=beams,
            length_penalty=penalty,
            return_dict_in_generate=True,
            output_scores=True,
            **limits,
        )
        compare_ids(case, f"{name}/ids", output.sequences, stop)
        ends = output.sequences == stop
        ended = ends.any(dim=1)
        written = torch.where(ended, ends.int().argmax(dim=1), output.sequences.shape[1] - 1)
        total = output.sequences_scores * written.float() ** penalty
        # In the recorded means [DEC] counts, the end token does not.
        if writes_the_same(case, f"{name}/beam_scores"):
            case.compare(f"{name}/beam_scores", total / torch.where(ended, written, written + 1))
