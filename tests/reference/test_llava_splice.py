"""LLaVA 1 and 1.5 against the original: features, spliced embeddings, loss, gradients, generation."""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from hf_vlp.models.llava.conversion_llava import from_original, model_from_original, to_original, words_of
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration
from tests.reference.cases import Case, reference

TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)


def configs(case: Case) -> dict[str, Any]:
    """The recorded sizes as configs of transformers."""
    config = case.config
    return {
        "text_config": LlamaConfig(
            **{key: config[key] for key in TEXT_KEYS},
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            pad_token_id=config["pad_token_id"],
        ),
        "vision_config": CLIPVisionConfig(**config["vision"]),
    }


def recorded_model(case: Case, **options: Any) -> LlavaForConditionalGeneration:
    return model_from_original(
        case.weights, {**case.config, **options.pop("settings", {})}, **configs(case), **options
    )


def expand(
    case: Case, model: LlavaForConditionalGeneration, lengths: list[int], *, prefix: str = ""
) -> tuple[list[Tensor], list[Tensor | None], list[int]]:
    """Ids of each row with a run of image tokens for each -200, labels alike, and which images the rows use.

    As in the original, a row without an image uses one up all the same.
    """
    ids, mask = case.inputs[f"{prefix}input_ids"], case.inputs.get(f"{prefix}attention_mask")
    labels = case.inputs.get(f"{prefix}labels")
    placeholder, ignored = case.config["image_token_index"], case.config["ignore_index"]
    rows, targets, used, image = [], [], [], 0
    for index, row in enumerate(ids):
        real = torch.ones_like(row, dtype=torch.bool) if mask is None else mask[index].bool()
        new_ids, new_labels = [], []
        if not (row[real] == placeholder).any():
            image += 1
        for token, label in zip(
            row[real].tolist(), (row if labels is None else labels[index])[real].tolist(), strict=True
        ):
            if token == placeholder:
                new_ids += [model.config.image_token_id] * lengths[image]
                new_labels += [ignored] * lengths[image]
                used.append(image)
                image += 1
            else:
                new_ids.append(token)
                new_labels.append(label)
        rows.append(torch.tensor(new_ids))
        targets.append(None if labels is None else torch.tensor(new_labels))
    return rows, targets, used


def padded(rows: list[Tensor], value: int | float, side: str) -> Tensor:
    """Rows of one length."""
    longest = max(len(row) for row in rows)
    result = rows[0].new_full((len(rows), longest, *rows[0].shape[1:]), value)
    for index, row in enumerate(rows):
        result[index, slice(0, len(row)) if side == "right" else slice(longest - len(row), None)] = row
    return result


def compare_where_real(case: Case, name: str, ours: Tensor, mask: Tensor) -> None:
    """Compares logits at tokens; at padding, where a token sees nothing, libraries differ and nothing reads them."""
    case.compare(name, torch.where(mask.bool()[..., None], ours, case.outputs[name]))


def compare_splice(case: Case) -> None:
    model = recorded_model(case)
    assert words_of(model) == case.config["vocab_size"]
    images = case.inputs["images"]
    with torch.no_grad():
        states = model.tower_states(images)
        case.compare("vision_features_selected", states)
        case.compare("projected_image_features", model.project(states))

    model.train()
    model.model.vision_tower.requires_grad_(False)
    rows, targets, used = expand(case, model, [states.shape[1]] * len(images))
    words, pad, limit = case.config["vocab_size"], case.config["pad_token_id"], case.config["truncate_to"]
    scenarios = {"right_pad": (None, "right"), "right_pad_truncated": (limit, "right"), "left_pad": (None, "left")}
    for name, (cut, side) in scenarios.items():
        ids = padded(rows, pad, "right")
        embeds = model.embed(ids, images[used])
        # The original pads with zeros behind the splice, and cuts there too, even through an image.
        embeds = padded([one[: len(row)][:cut] for one, row in zip(embeds, rows, strict=True)], 0.0, side)
        labels = padded([target[:cut] for target in targets], case.config["ignore_index"], side)
        mask = padded([torch.ones_like(row)[:cut] for row in rows], 0, side)
        case.compare(f"{name}/inputs_embeds", embeds)
        case.compare(f"{name}/labels", labels)
        case.compare(f"{name}/attention_mask", mask)
        case.compare(f"{name}/position_ids", (mask.cumsum(1) - 1).clamp(min=0) * mask)
        output = model(inputs_embeds=embeds, attention_mask=mask, labels=labels)
        case.compare(f"{name}/loss", output.loss)
        model.eval()
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, attention_mask=mask).logits[..., :words]
        model.train()
        compare_where_real(case, f"{name}/logits", logits, mask)
        if name == "right_pad":
            # The way a user goes: ids and pictures in, padded with tokens instead of zeros.
            loss = model(input_ids=ids, pixel_values=images[used], attention_mask=mask, labels=labels).loss
            case.compare(f"{name}/loss", loss)
            loss.backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            original = to_original(gradients, linear=model.linear_projector, words=words)
            for key in case.output_names:
                if key.startswith("grad/"):
                    case.compare(key, original[key.removeprefix("grad/")])
            assert not any(name.startswith("model.vision_tower") for name in original)

    model.eval()
    rows, _, used = expand(case, model, [states.shape[1]] * len(case.inputs["generate_images"]), prefix="generate_")
    inputs = {"input_ids": torch.stack(rows), "pixel_values": case.inputs["generate_images"][used]}
    with torch.no_grad():
        case.compare("generate/prefill_logits", model(**inputs).logits[..., :words])
    new = case.outputs["generate/ids"].shape[1]
    written = model.generate(
        **inputs, do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=case.config["pad_token_id"]
    )
    case.compare("generate/ids", written[:, inputs["input_ids"].shape[1] :])


@reference("llava/multimodal_splice")
def test_multimodal_splice(case: Case) -> None:
    compare_splice(case)


@reference("llava/multimodal_splice_v1_linear")
def test_multimodal_splice_v1_linear(case: Case) -> None:
    compare_splice(case)
    assert recorded_model(case).linear_projector


@reference("llava/multimodal_splice", complete=False)
def test_names_go_both_ways(case: Case) -> None:
    check_names(case)


@reference("llava/multimodal_splice_v1_linear", complete=False)
def test_names_of_v1_go_both_ways(case: Case) -> None:
    check_names(case)


def check_names(case: Case) -> None:
    model = recorded_model(case)
    back = to_original(model.state_dict(), linear=model.linear_projector, words=words_of(model))
    assert set(back) == {name for name in case.weights if not name.endswith("position_ids")}
    for name, value in back.items():
        assert torch.equal(value, case.weights[name]), name
    assert len(from_original(back)) == len(model.state_dict())
