"""CogVLM's network: experts that are copies change nothing, text stays the language model's, and silent errors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_vlp.models.cogvlm.configuration_cogvlm import LANGUAGE_MODEL_TYPES, CogVLMConfig, CogVLMVisionConfig
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration, ImageTokenError
from hf_vlp.training.freezing import apply_stage
from tests.tiny import cogvlm as tiny

IDS = ("input_ids", "attention_mask", "pixel_values")


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in IDS if name in batch}


def with_experts(language: torch.nn.Module, **options) -> CogVLMForConditionalGeneration:
    return CogVLMForConditionalGeneration.from_language_pretrained(
        language, vision_config=tiny.vision_config(), image_token_id=tiny.IMAGE, **options
    )


@pytest.mark.parametrize("kind", LANGUAGE_MODEL_TYPES)
@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_copied_experts_are_the_language_model(kind: str, version: int) -> None:
    changes = {"sliding_window": None} if kind == "mistral" else {}
    language = tiny.language_model(kind, **changes)
    model = with_experts(language, downsample=version, visual_expert_qkv_bias=version == 2)
    batch = tiny.rows(model, [[2, 0, 3], [0, 1, 0, 2], [4]])
    route = model.route(batch["input_ids"], None, batch["attention_mask"])
    states = model._embed(batch["input_ids"], model.get_image_features(batch["pixel_values"]), route)
    expected = language(
        inputs_embeds=route.to_grid(states),
        attention_mask=batch["attention_mask"],
        position_ids=route.positions(),
    ).logits
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs(batch)).logits[tokens], expected[tokens], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sliding_windows_are_kept() -> None:
    language = tiny.language_model("mistral", sliding_window=5)
    model = with_experts(language)
    batch = tiny.rows(model, [[2, 0, 3], [4]])
    route = model.route(batch["input_ids"], None, batch["attention_mask"])
    states = model._embed(batch["input_ids"], model.get_image_features(batch["pixel_values"]), route)
    expected = language(
        inputs_embeds=route.to_grid(states), attention_mask=batch["attention_mask"], position_ids=route.positions()
    ).logits
    tokens = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs(batch)).logits[tokens], expected[tokens], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_text_alone_is_the_language_model_bit_for_bit(left: bool) -> None:
    model = tiny.model(2)
    batch = tiny.rows(model, [[5], [9], [2]], left=left)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    alone = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    alone.load_state_dict(model.language_model.state_dict())
    assert torch.equal(model(**texts).logits, alone(**texts).logits)
    if left:
        ours = model.generate(**texts, max_new_tokens=5, do_sample=False)
        assert torch.equal(ours, alone.generate(**texts, max_new_tokens=5, do_sample=False))


@torch.no_grad()
def test_text_alone_costs_what_the_language_model_costs() -> None:
    model = tiny.model(2)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (2, 40))
    assert flops(lambda: model(ids)) == flops(lambda: model.language_model(ids))


@torch.no_grad()
def test_tokens_go_through_one_expert_only() -> None:
    model = tiny.model(2)
    batch = tiny.rows(model, [[9, 0, 20], [9, 0, 20]])
    states = model.encode_images(batch["pixel_values"])
    adapter = flops(lambda: model.get_image_features(image_embeds=states))
    whole = flops(lambda: model(batch["input_ids"], image_embeds=states))
    assert whole - adapter == flops(lambda: model.language_model(batch["input_ids"].clamp(max=5)))


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(left: bool, attention: str) -> None:
    model = tiny.model(2)
    model.set_attn_implementation(attention)
    layouts = [[2, 0, 3], [0, 1, 0, 2], [7], [0]]
    batch = tiny.rows(model, layouts, left=left)
    logits = model(**inputs(batch)).logits
    first = 0
    for row, layout in enumerate(layouts):
        keep = batch["attention_mask"][row].bool()
        number = sum(part == 0 for part in layout)
        pixels = batch["pixel_values"][first : first + number] if number else None
        alone = model(batch["input_ids"][row][keep][None], pixel_values=pixels).logits
        torch.testing.assert_close(logits[row][keep], alone[0], atol=1e-4, rtol=1e-4)
        first += number


def packed(batch: dict[str, Tensor], rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of conversations laid end to end, with padding behind the shorter ones."""
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    width = max(sum(lengths[i] for i in row) for row in rows)
    made = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), -100),
        "sequence_ids": torch.zeros(len(rows), width, dtype=torch.long),
    }
    for number, row in enumerate(rows):
        start = 0
        for sequence, i in enumerate(row, start=1):
            span = slice(start, start + lengths[i])
            made["input_ids"][number, span] = batch["input_ids"][i, : lengths[i]]
            made["labels"][number, span] = batch["labels"][i, : lengths[i]]
            made["sequence_ids"][number, span] = sequence
            start += lengths[i]
    return made | ({"pixel_values": batch["pixel_values"]} if "pixel_values" in batch else {})


@torch.no_grad()
def test_attention_is_set_in_every_part() -> None:
    model = tiny.model(2)
    batch = inputs(tiny.rows(model, [[2, 0, 3], [7]]))
    expected = model(**batch).logits
    for kind in ("eager", "sdpa"):
        model.set_attn_implementation(kind)
        parts = (model, model.vision_model, model.language_model)
        assert {part.config._attn_implementation for part in parts} == {kind}
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layouts", [[[2, 0, 3], [0, 1, 0, 2], [7], [0, 4]], [[3], [5], [2], [6]]])
def test_packed_is_unpacked(layouts: list[list[int]], attention: str) -> None:
    model = tiny.model(2)
    model.set_attn_implementation(attention)
    batch = tiny.rows(model, layouts)
    gradients = []
    for form in (batch, packed(batch, [[0, 1], [2, 3]])):
        model.zero_grad()
        loss = model(**form).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("version", [1, 2])
@torch.no_grad()
def test_cached_generation_is_plain(version: int) -> None:
    model = tiny.model(version)
    # The last row ends with its image: what comes next is text all the same.
    batch = inputs(tiny.rows(model, [[2, 0, 3], [0, 1, 0, 2], [3, 0]], left=True))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **options))
    # The prompt comes back with its image tokens, which here lie beyond the vocabulary.
    prompt = batch["input_ids"]
    assert prompt.max() >= tiny.VOCAB_SIZE
    assert torch.equal(cached[:, : prompt.shape[1]], prompt)
    static = model.generate(**batch, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(cached, static)
    beams = model.generate(**batch, num_beams=3, **options)
    plain = model.generate(**batch, num_beams=3, use_cache=False, **options)
    assert torch.equal(beams, plain)
    several = model.generate(**batch, num_beams=3, num_return_sequences=2, return_dict_in_generate=True, **options)
    assert torch.equal(several.sequences[:, : prompt.shape[1]], prompt.repeat_interleave(2, dim=0))
    model.generate(**batch, repetition_penalty=1.3, **options)


@torch.no_grad()
def test_features_stand_for_pixels() -> None:
    model = tiny.model(2)
    batch = inputs(tiny.rows(model, [[2, 0, 3], [0, 4]], left=True))
    states = model.encode_images(batch.pop("pixel_values"))
    pixels = tiny.images(2)
    assert torch.equal(model(**batch, image_embeds=states).logits, model(**batch, pixel_values=pixels).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    ours = model.generate(**batch, image_embeds=states, **options)
    assert torch.equal(ours, model.generate(**batch, pixel_values=pixels, **options))


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny.model(2).train()
    batch = tiny.rows(model, [[2, 0, 3], [0, 1]])
    gradients = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checked in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checked)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "sft"])
def test_only_the_stage_learns(stage: str) -> None:
    model = tiny.model(2)
    apply_stage(model, stage)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny.rows(model, [[2, 0, 3], [0, 1]])).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    optimizer.step()
    for name, value in model.state_dict().items():
        part = name.split(".")[0]
        if part == "language_model" or (part == "vision_model" and stage != "sft"):
            assert torch.equal(value, before[name]), name
    assert not torch.equal(model.visual_experts[0].q_proj.weight, before["visual_experts.0.q_proj.weight"])
    # A batch without images has a gradient for everything that learns, where other ranks wait for it.
    model.zero_grad()
    model(**tiny.rows(model, [[4], [5]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_loss_is_the_mean_over_supervised_tokens() -> None:
    model = tiny.model(1)
    batch = tiny.rows(model, [[2, 0, 3], [0, 4]])
    batch["labels"][0, -2:] = batch["input_ids"][0, -2:]
    logits = model(**inputs(batch)).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    kept = model(**inputs(batch), logits_to_keep=2).logits
    torch.testing.assert_close(kept, logits[:, -2:])


def test_resized_images_keep_the_old_grid() -> None:
    model = tiny.model(2)
    old = model.vision_model.position_embedding.weight.clone()
    model.resize_images(24)
    assert model.config.num_image_tokens == 3 * 3 + 2
    assert model.vision_model.position_embedding.weight.shape == (37, 24)
    assert torch.equal(model.vision_model.position_embedding.weight[0], old[0])
    batch = tiny.rows(model, [[2, 0, 3]]) | {"pixel_values": torch.randn(1, 3, 24, 24)}
    assert model(**inputs(batch)).logits.isfinite().all()
    with pytest.raises(ValueError, match="no multiple of 8 pixels"):
        model.resize_images(20)


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    language = tiny.language_model(tie_word_embeddings=tied)
    model = with_experts(language, downsample=2, visual_expert_qkv_bias=True)
    model.save_pretrained(tmp_path)
    again = CogVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert again.config.num_image_tokens == model.config.num_image_tokens
    batch = inputs(tiny.rows(model, [[2, 0, 3]]))
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    shared = again.language_model.lm_head.weight is again.get_input_embeddings().weight
    assert shared == tied


def test_experts_begin_as_copies_and_learn_apart() -> None:
    language = tiny.language_model("qwen2")
    model = with_experts(language)
    assert model.language_model is language
    for expert, layer in zip(model.visual_experts, language.model.layers, strict=True):
        assert torch.equal(expert.q_proj.weight, layer.self_attn.q_proj.weight)
        assert torch.equal(expert.k_proj.bias, layer.self_attn.k_proj.bias)
        assert torch.equal(expert.up_proj.weight, layer.mlp.up_proj.weight)
        assert expert.o_proj.weight.data_ptr() != layer.self_attn.o_proj.weight.data_ptr()
    assert not any(value.isnan().any() for value in model.state_dict().values())
    assert model.vision_model.class_embedding.std() > 0


def test_half_precision_language_model_with_full_precision_experts() -> None:
    model = tiny.model(2)
    model.language_model.to(torch.bfloat16)
    output = model(**tiny.rows(model, [[2, 0, 3], [0, 1]]))
    output.loss.backward()
    assert model.visual_experts[0].q_proj.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("pixel_values"), "no pixel_values"),
        (lambda b: b.update(pixel_values=b["pixel_values"][:1]), "tokens of 2 images, but 1 images"),
        (lambda b: b["input_ids"].__setitem__((0, 4), 7), "6 consecutive image tokens, but row 0 of the batch has 5"),
        (lambda b: b["attention_mask"].__setitem__((1, 3), 0), "but row 1 of the batch has 5"),
        (lambda b: b["labels"].__setitem__((0, 4), 7), "1 labels stand on image tokens"),
        (lambda b: b["labels"].__setitem__((1, -1), 7), "1 labels stand on padding"),
        (lambda b: b["labels"].fill_(-100), "all labels are -100"),
        (lambda b: b.update(labels=b["labels"][:, :-1]), "labels are"),
        (lambda b: b.update(pixel_values=b["pixel_values"][..., :8]), r"must be \(images, 3, 16, 16\)"),
    ],
)
def test_silent_errors_are_loud(change, message: str) -> None:
    model = tiny.model(2)
    batch = tiny.rows(model, [[2, 0, 3], [0, 4]])
    change(batch)
    with pytest.raises(ValueError, match=message):
        model(**batch)


def test_generation_wants_left_padding() -> None:
    model = tiny.model(2)
    with pytest.raises(ValueError, match="pad prompts on the left"):
        model.generate(**inputs(tiny.rows(model, [[2, 0, 3], [0, 1]])), max_new_tokens=2)


def test_image_tokens_must_be_known() -> None:
    model = tiny.model(2)
    model.config.image_token_id = None
    with pytest.raises(ImageTokenError, match="token_type_ids"):
        model(**inputs(tiny.rows(model, [[2, 0, 3]])))


def test_other_language_models_are_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    language = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(ValueError, match=r"type 'gpt2'.*llama"):
        CogVLMForConditionalGeneration.from_language_pretrained(language)
    with pytest.raises(ValueError, match="not 'gpt2'"):
        CogVLMConfig(text_config={"model_type": "gpt2"})


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="smaller than a patch of 14"):
        CogVLMVisionConfig(image_size=12, patch_size=14)
    with pytest.raises(ValueError, match="downsample is 2, but an image has 1 patches"):
        CogVLMConfig(vision_config={"image_size": 20, "patch_size": 14}, downsample=2)
    for image_size in (18, 20):
        with pytest.raises(ValueError, match=f"image_size {image_size} is no multiple of 8 pixels"):
            CogVLMForConditionalGeneration.from_language_pretrained(
                tiny.language_model(), vision_config=tiny.vision_config(image_size=image_size), downsample=2
            )


@torch.no_grad()
def test_features_need_not_cover_the_image() -> None:
    # As in the original code, whose convolutions leave the rest of an odd grid, and of an odd patch, out.
    model = tiny.model(2, vision_config=tiny.vision_config(image_size=22))
    assert model.config.num_image_tokens == 2 * 2 + 2
    assert model.vision_model.position_embedding.weight.shape[0] == 5 * 5 + 1
    pixels = torch.randn(1, 3, 22, 22)
    tower, features = model.encode_images(pixels), model.get_image_features(pixels)
    assert tower.shape[1] == 5 * 5 + 1 and features.shape[1] == 2 * 2 + 2
    changed = pixels.clone()
    changed[..., 20:, :] += 1
    changed[..., 20:] += 1
    torch.testing.assert_close(model.get_image_features(changed), features)
    batch = inputs(tiny.rows(model, [[2, 0, 3]])) | {"pixel_values": pixels}
    assert model(**batch).logits.isfinite().all()
    model.resize_images(24)
    assert model.config.num_image_tokens == 3 * 3 + 2
