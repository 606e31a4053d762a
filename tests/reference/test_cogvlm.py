"""CogVLM and CogVLM2 against the original authors' code: tower, adapter, experts, loss, gradients, generation."""

import torch
from PIL import Image
from torch import Tensor

from hf_vlp.models.cogvlm.configuration_cogvlm import CogVLMConfig
from hf_vlp.models.cogvlm.conversion_cogvlm import (
    config_from_original,
    config_to_original,
    from_original,
    model_from_original,
    to_original,
    version_of,
)
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.cogvlm.modeling_cogvlm_experts import CogVLMVisualExpert
from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor
from tests.reference.cases import Case, reference
from tests.tiny.cogvlm import byte_tokenizer


def build(case: Case, attention: str = "sdpa") -> CogVLMForConditionalGeneration:
    model = model_from_original(case.weights, case.config)
    model.set_attn_implementation(attention)
    return model


def at_tokens(case: Case, name: str, ours: Tensor, mask: Tensor) -> None:
    """Compares where there are tokens; what the original computes at padding means nothing."""
    shape = (*mask.shape, *[1] * (ours.ndim - 2))
    case.compare(name, torch.where(mask.bool().view(shape), ours, case.outputs[name]))


def batch_of(case: Case, prefix: str) -> dict[str, Tensor]:
    names = ("input_ids", "token_type_ids", "attention_mask")
    return {name: case.inputs[f"{prefix}{name}"] for name in names} | {"pixel_values": case.inputs["images"]}


@torch.no_grad()
def check_images(case: Case, model: CogVLMForConditionalGeneration, name: str, prefix: str) -> None:
    batch = batch_of(case, prefix)
    mask = batch["attention_mask"]
    route = model.route(batch["input_ids"], batch["token_type_ids"], mask)
    case.compare(f"{name}/position_ids", route.positions())
    case.compare(f"{name}/vision_expert_mask", route.visual_mask().long())
    recorded: dict[str, Tensor] = {}
    first = model.visual_experts[0]
    for part in ("attention", "mlp"):
        compute = getattr(CogVLMVisualExpert, part)

        def record(*arguments, compute=compute, part=part):
            recorded[part] = compute(first, *arguments)
            return recorded[part]

        setattr(first, part, record)
    output = model(**batch, output_hidden_states=True)
    del first.attention, first.mlp
    for i, states in enumerate(output.hidden_states):
        at_tokens(case, f"{name}/hidden_states{i}", states, mask)
    for part, rows in recorded.items():
        if f"{name}/layer0_{part}" in case.output_names:
            at_tokens(case, f"{name}/layer0_{part}", route.to_grid(rows), mask)
    at_tokens(case, f"{name}/logits", output.logits, mask)
    case.compare(f"{name}/loss", model(**batch, labels=case.inputs[f"{prefix}labels"]).loss)


def check_gradients(case: Case, model: CogVLMForConditionalGeneration) -> None:
    model.zero_grad()
    model(**batch_of(case, ""), labels=case.inputs["labels"]).loss.backward()
    gradients = to_original({name: p.grad for name, p in model.named_parameters()}, model.config)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, gradients[name.removeprefix("grad/")])


@torch.no_grad()
def check_text(case: Case, model: CogVLMForConditionalGeneration) -> None:
    ids, labels = case.inputs["text_input_ids"], case.inputs["text_labels"]
    route = model.route(ids, torch.zeros_like(ids))
    case.compare("text_only/position_ids", route.positions())
    case.compare("text_only/vision_expert_mask", route.visual_mask().long())
    output = model(ids, output_hidden_states=True)
    for i, states in enumerate(output.hidden_states):
        case.compare(f"text_only/hidden_states{i}", states)
    case.compare("text_only/logits", output.logits)
    case.compare("text_only/loss", model(ids, labels=labels).loss)
    assert torch.equal(output.logits, model.language_model(ids).logits)


@torch.no_grad()
def check_generation(case: Case, model: CogVLMForConditionalGeneration) -> None:
    model.generation_config.eos_token_id = None
    left = batch_of(case, "left_")
    number = case.outputs["generate_left_pad/new_ids"].shape[1]
    options = {"do_sample": False, "pad_token_id": model.config.text_config.pad_token_id}
    ids = model.generate(**left, max_new_tokens=number, min_new_tokens=number, **options)
    case.compare("generate_left_pad/new_ids", ids[:, -number:])
    whole = case.outputs["generate/ids"]
    length = int(case.inputs["attention_mask"][0].sum())
    row = {name: value[:1, :length] for name, value in batch_of(case, "").items() if name != "pixel_values"}
    row["pixel_values"] = case.inputs["images"][:1]
    number = whole.shape[1] - length
    ids = model.generate(**row, max_new_tokens=number, min_new_tokens=number, **options)
    case.compare("generate/ids", ids)
    plain = model.generate(**row, max_new_tokens=number, min_new_tokens=number, use_cache=False, **options)
    assert torch.equal(plain, ids)


def check(case: Case, attention: str) -> None:
    model = build(case, attention)
    with torch.no_grad():
        tower = model.encode_images(case.inputs["images"])
        case.compare("vision_tower_output", tower)
        case.compare("image_features", model.get_image_features(image_embeds=tower))
    check_images(case, model, "image", "")
    check_images(case, model, "image_left_pad", "left_")
    check_gradients(case, model)
    check_text(case, model)
    check_generation(case, model)


@reference("cogvlm/visual_expert")
def test_cogvlm2(case: Case):
    check(case, "sdpa")


@reference("cogvlm/visual_expert_v1")
def test_cogvlm1(case: Case):
    check(case, "sdpa")


@reference("cogvlm/visual_expert", complete=False)
def test_cogvlm2_with_eager_attention(case: Case):
    check(case, "eager")
    case.finish()


@reference("cogvlm/visual_expert", complete=False)
def test_round_trip_of_cogvlm2(case: Case):
    check_round_trip(case)


@reference("cogvlm/visual_expert_v1", complete=False)
def test_round_trip_of_cogvlm1(case: Case):
    check_round_trip(case)


def check_round_trip(case: Case) -> None:
    assert version_of(case.weights) == case.config["version"]
    model = build(case)
    original = to_original(model.state_dict(), model.config)
    assert original.keys() == case.weights.keys()
    for name, value in original.items():
        if name.endswith("inv_freq"):
            torch.testing.assert_close(value, case.weights[name])
        else:
            assert torch.equal(value, case.weights[name]), name
    config = config_to_original(model.config)
    assert {name: case.config[name] for name in config if name in case.config} == {
        name: value for name, value in config.items() if name in case.config
    }
    again = config_from_original(config, version=case.config["version"])
    assert again.to_dict() == model.config.to_dict()
    assert from_original(original, again).keys() == set(model.state_dict())


@reference("cogvlm/conversation")
def test_conversation(case: Case):
    config = case.config
    # The original writes CogVLM2's padding token for an image token whatever the tokenizer is.
    tokenizer = byte_tokenizer({"<image>": 128002})
    sizes = CogVLMConfig(
        vision_config={"image_size": config["image_size"], "patch_size": config["patch_size"]}, downsample=2
    )
    processor = CogVLMProcessor.for_model(tokenizer, sizes)
    picture = Image.fromarray(case.inputs["image"].numpy())
    for number, item in enumerate(config["items"]):
        # The original passes over the turns before a text of its own format, for which ours has no place.
        history = item.get("history", ()) if item["template"] != "base" else ()
        row = processor.conversation(
            item["query"],
            history=history,
            answer=item.get("answer"),
            image=item.get("image", True),
            template=item["template"],
        )
        assert {f"{number}/{name}" for name in row} == {n for n in case.output_names if n.startswith(f"{number}/")}
        for name, values in row.items():
            case.compare(f"{number}/{name}", torch.tensor(values))
        if item.get("image", True):
            prompt = processor([picture], [item["query"]], history=[history], template=item["template"])
            length = prompt["input_ids"].shape[1]
            assert prompt["input_ids"][0].tolist() == row["input_ids"][:length]
    case.compare("pixel_values", processor.prepare_images([picture])[0]["pixel_values"][0])
