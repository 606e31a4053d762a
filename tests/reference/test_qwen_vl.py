"""Qwen-VL against its remote code: tower and resampler, the whole model, and the fine-tuning preprocess."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config

from hf_vlp.data.conversations import encode_conversation, make_template
from hf_vlp.models.qwen_vl.configuration_qwen_vl import QwenVLConfig
from hf_vlp.models.qwen_vl.conversion_qwen_vl import (
    VISUAL,
    from_original,
    model_from_original,
    to_original,
    tokenizer_from_original,
    vision_config_from_original,
)
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.modeling_qwen_vl_visual import resize_grid
from hf_vlp.models.qwen_vl.processing_qwen_vl import IMAGE_TOKEN, QwenVLProcessor, image_span
from tests.reference.cases import Case, reference

SPAN = re.compile(r"<img>(.*?)</img>", re.DOTALL)


def compare_gradients(case: Case, model: QwenVLForConditionalGeneration, prefix: str) -> None:
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    original = to_original(gradients, model.config.vision_config.num_attention_heads, prefix=prefix)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, original[name.removeprefix("grad/")])


@reference("qwen_vl/resampler")
def test_resampler(case: Case) -> None:
    vision = vision_config_from_original(case.config["visual"])
    width = vision.output_dim
    text = Qwen2Config(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = QwenVLForConditionalGeneration(QwenVLConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    weights = from_original(case.weights, vision.num_attention_heads)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("language_model.") for name in missing)
    images = case.inputs["images"]
    states, grid = model.vision_model.embed(images)
    case.compare("after_ln_pre", states)
    states, _ = model.vision_model(images)
    case.compare("after_transformer", states)
    case.compare("resampler_output", model.resampler.pool(states, grid))
    features = model.get_image_features(images)
    case.compare("features", features)
    loss = (features * case.inputs["cotangent"]).sum()
    case.compare("loss", loss)
    loss.backward()
    compare_gradients(case, model, "")
    case.compare("features_other_size", model.get_image_features(case.inputs["images_other_size"]))
    for name in case.output_names:
        if name.startswith("interpolated_query_pos/"):
            side = round(int(name.split("/")[1]) ** 0.5)
            table = resize_grid(model.resampler.position_table, (side, side))
            case.compare(name, table[:, : case.outputs[name].shape[1]])
    case.compare("interpolated_patch_pos", resize_grid(model.vision_model.position_embedding, grid))
    back = {name: value for name, value in model.state_dict().items() if not name.startswith("language_model.")}
    back = to_original(back, vision.num_attention_heads, prefix="")
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[name], case.weights[name]) for name in back)


def named_images(input_ids: Tensor, images: Tensor, config: dict[str, Any]) -> Tensor | None:
    """The images that the bytes between <img> and </img> name, in reading order."""
    start = config["visual"]["image_start_id"]
    order = []
    for row in input_ids.tolist():
        for place in (i for i, token in enumerate(row) if token == start):
            end = row.index(start + 1, place)
            order.append(int(bytes(token for token in row[place + 1 : end] if token != start + 2).decode()))
    return images[order] if order else None


@reference("qwen_vl/full_model")
def test_full_model(case: Case) -> None:
    config, inputs = case.config, case.inputs
    model = model_from_original(case.weights, config, eos_token_id=config["end_id"], pad_token_id=config["pad_id"])
    case.compare("image_features", model.get_image_features(inputs["images"]))
    ids = inputs["input_ids"]
    pixels = named_images(ids, inputs["images"], config)
    batch = {"input_ids": ids, "pixel_values": pixels, "attention_mask": inputs["attention_mask"]}
    output = model(**batch, labels=inputs["labels"], output_hidden_states=True)
    for i, states in enumerate(output.hidden_states):
        case.compare(f"image/hidden_states{i}", states)
    case.compare("image/logits", output.logits)
    case.compare("image/loss", output.loss)
    # In training mode the logits are made at supervised positions only, and no length is too long.
    model.train(ids.shape[1] <= config["seq_length"])
    loss = model(**batch, labels=inputs["labels"]).loss
    case.compare("image/loss", loss)
    loss.backward()
    compare_gradients(case, model, VISUAL)
    model.eval()

    text = {"input_ids": inputs["text_input_ids"], "labels": inputs["text_labels"]}
    output = model(**text)
    case.compare("text_only/logits", output.logits)
    case.compare("text_only/loss", output.loss)
    plain = output.logits
    if plain.shape[1] <= config["seq_length"]:
        assert torch.equal(model.language_model(inputs["text_input_ids"]).logits, plain)

    prompt = inputs["generate_input_ids"]
    new = case.outputs["generate/new_ids"].shape[1]
    start, size = config["visual"]["image_start_id"], config["vocab_size"]
    # Nothing ends the recorded answer.
    model.generation_config.eos_token_id = None
    written = model.generate(
        prompt,
        pixel_values=named_images(prompt, inputs["images"], config),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        suppress_tokens=list(range(start, size)),
    )
    case.compare("generate/new_ids", written[:, prompt.shape[1] :])

    model.config.seq_length = config["short_seq_length"]
    case.compare("short_seq_length/text_only_logits", model(inputs["text_input_ids"]).logits)
    case.compare("short_seq_length/image_logits", model(**batch).logits)
    # Nothing of it stays behind.
    model.config.seq_length = config["seq_length"]
    assert torch.equal(model(inputs["text_input_ids"]).logits, plain)
    heads = model.config.vision_config.num_attention_heads
    again = to_original(model.state_dict(), heads)
    assert again.keys() == case.weights.keys()
    assert all(torch.equal(again[name], case.weights[name]) for name in again)


def with_paths(ids: list[int], paths: list[str], processor: QwenVLProcessor) -> list[int]:
    """Ids with the paths' bytes in the places of images, where the original has them."""
    ids, at = list(ids), 0
    for path in paths:
        at = ids.index(processor.image_start_token_id, at) + 1
        length = processor.num_query_tokens
        ids[at : at + length] = image_span(path, length, processor.image_token_id)
        at += length
    return ids


@reference("qwen_vl/conversation")
def test_conversation(case: Case) -> None:
    config = case.config
    tokenizer = tokenizer_from_original(case.folder / "tiny.tiktoken")
    processor = QwenVLProcessor.for_image_size(tokenizer, 8)
    special = config["special_ids"]
    names = {
        "eod": "<|endoftext|>", "im_start": "<|im_start|>", "im_end": "<|im_end|>", "img_start": "<img>",
        "img_end": "</img>", "img_pad": IMAGE_TOKEN, "ref_start": "<ref>", "ref_end": "</ref>", "box_start": "<box>",
        "box_end": "</box>", "quad_start": "<quad>", "quad_end": "</quad>",
    }  # fmt: skip
    assert {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()} == special
    for number, text in enumerate(config["texts"]):
        ids = processor(text=text)["input_ids"]
        case.compare(f"text/{number}", torch.tensor(with_paths(ids, SPAN.findall(text), processor)))

    eod, longest = special["eod"], config["max_len"]
    options = {"system": config["system_message"], "image_position": "given"}
    template = make_template("qwen_vl", processor, number_pictures=False, **options)
    for number, turns in enumerate(config["conversations"]):
        messages, paths = [], []
        for place, (role, text) in enumerate(turns):
            pieces = SPAN.split(text)
            entries = [
                {"type": "image", "text": None} if i % 2 else {"type": "text", "text": piece}
                for i, piece in enumerate(pieces)
                if i % 2 or piece
            ]
            messages.append({"role": role, "content": entries})
            if place or role == "user":
                paths += pieces[1::2]
        encoded = encode_conversation(template.render(messages), template, processor)
        ids, labels, _ = encoded.expanded([processor.num_query_tokens] * len(paths))
        ids = torch.tensor(with_paths(ids, paths, processor)[:longest])
        room = longest - len(ids)
        ids = torch.nn.functional.pad(ids, (0, room), value=eod)
        case.compare(f"{number}/input_ids", ids)
        labels = torch.nn.functional.pad(torch.tensor(labels[:longest]), (0, room), value=-100)
        case.compare(f"{number}/labels", labels)
        case.compare(f"{number}/attention_mask", (ids != eod).long())
    with pytest.raises(ValueError, match="has room for"):
        image_span("x" * (processor.num_query_tokens + 1), processor.num_query_tokens, processor.image_token_id)
