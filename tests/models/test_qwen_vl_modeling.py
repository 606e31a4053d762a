"""Qwen-VL's network: places of images, loss, packing, stages, generation, long inputs, silent errors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, LlamaForCausalLM

from hf_vlp.data.conversations import ConversationCollator
from hf_vlp.models.qwen_vl.configuration_qwen_vl import QwenVLConfig, QwenVLVisionConfig
from hf_vlp.models.qwen_vl.initialization_qwen_vl import from_vision_language_pretrained
from hf_vlp.models.qwen_vl.modeling_qwen_vl import (
    ImageSpanError,
    QwenVLForConditionalGeneration,
    packed_mask,
    restarting_positions,
)
from hf_vlp.models.qwen_vl.modeling_qwen_vl_visual import resize_grid, sine_table
from hf_vlp.training import apply_stage
from hf_vlp.training.lora import LoraArguments, add_lora, merged_state_dict
from tests.tiny import qwen_vl as tiny
from tests.tiny.blip2 import images

ROWS = [
    tiny.messages(("what is it?", 1), "a red circle"),
    tiny.messages(("compare them", 2), "two green triangles", "and now?", "nothing but a black dot"),
    tiny.messages("say nothing", "a star"),
]


def batch(pack_to: int | None = None, rows: Any = ROWS) -> dict[str, Tensor]:
    records = []
    for number, row in enumerate(rows):
        count = sum(entry["type"] == "image" for turn in row for entry in turn["content"])
        records.append({"messages": row, "images": images(count), "key": str(number), "source": "tiny"})
    made = ConversationCollator(tiny.processor(), template="qwen_vl", pack_to=pack_to)(records)
    made.pop("record_report")
    return made


def gradients(model: QwenVLForConditionalGeneration) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_sine_table_is_the_closed_form() -> None:
    table = sine_table(16, 3)
    for row in range(3):
        for column in range(3):
            for i in range(4):
                omega = 10000 ** (-i / 4)
                expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega)]
                place = table[row * 3 + column]
                assert [place[i], place[4 + i], place[8 + i]] == pytest.approx(expected, abs=1e-6)
    assert resize_grid(table, (3, 3)) is table
    assert resize_grid(table, (2, 5)).shape == (10, 16)


def test_features_stand_between_the_marks_and_nothing_else_changes() -> None:
    model, made = tiny.model(), batch()
    features = model.get_image_features(made["pixel_values"])
    assert features.shape == (3, tiny.QUERIES, 24)
    embeds, _ = model.embed(made["input_ids"], made["pixel_values"])
    plain = model.get_input_embeddings()(made["input_ids"])
    inside = made["input_ids"] == model.config.image_token_id
    torch.testing.assert_close(embeds[inside], features.flatten(0, 1))
    assert torch.equal(embeds[~inside], plain[~inside])
    # What stands there does not matter, as in the original, which has paths there.
    changed = made["input_ids"].masked_fill(inside, 7)
    assert torch.equal(model.embed(changed, made["pixel_values"])[0], embeds)
    # Features once computed serve again.
    again = model(**{k: v for k, v in made.items() if k not in ("pixel_values", "labels")}, image_features=features)
    torch.testing.assert_close(again.logits, model(**made).logits)


def test_attention_goes_through_the_interface_of_transformers() -> None:
    model, made = tiny.model(), batch()
    assert model.vision_model.config._attn_implementation == "sdpa"
    logits = model(**made).logits
    model.set_attn_implementation("eager")
    assert (
        model.vision_model.config._attn_implementation == model.language_model.config._attn_implementation == "eager"
    )
    torch.testing.assert_close(model(**made).logits, logits, atol=1e-5, rtol=1e-4)


def test_text_alone_is_the_language_models_own() -> None:
    model = tiny.model()
    ids = torch.randint(5, 300, (2, 9))
    assert torch.equal(model(ids).logits, model.language_model(ids).logits)


@pytest.mark.parametrize("size", [16, 32, 40])
def test_other_resolutions(size: int) -> None:
    model = tiny.model()
    features = model.get_image_features(tiny.pixels(2, size=size))
    assert features.shape == (2, tiny.QUERIES, 24)
    wide = model.get_image_features(tiny.pixels(1)[:, :, :16])
    assert wide.shape == (1, tiny.QUERIES, 24)
    with pytest.raises(ValueError, match="smaller than a patch"):
        model.get_image_features(tiny.pixels(1, size=4))


def test_places_and_images_must_fit() -> None:
    model, made = tiny.model(), batch()
    ids, pixels = made["input_ids"], made["pixel_values"]
    start, end = model.config.image_start_token_id, model.config.image_end_token_id
    with pytest.raises(ImageSpanError, match=r"0 images were given.*places for 3 \(\[1, 2, 0\] by row\)"):
        model(ids)
    with pytest.raises(ImageSpanError, match="2 images were given"):
        model(ids, pixels[:2])
    with pytest.raises(ImageSpanError, match=r"rows \[1\] of input_ids have an <img> without"):
        broken = ids.clone()
        broken[1, (ids[1] == end).nonzero()[0]] = 5
        model(broken, pixels)
    with pytest.raises(ImageSpanError, match="row 0 .* 4 tokens later"):
        short = torch.cat([ids[:, : int((ids[0] == start).nonzero()[0]) + 2], ids], dim=1)[:1]
        short[0, int((ids[0] == start).nonzero()[0]) + 1] = end
        model(short, pixels)
    with pytest.raises(ValueError, match="labels stand at image places"):
        model(ids, pixels, labels=torch.where(ids == model.config.image_token_id, ids, -100))
    with pytest.raises(ValueError, match="all labels are -100"):
        model(ids, pixels, labels=torch.full_like(ids, -100))
    with pytest.raises(ValueError, match="go together"):
        model(ids, pixels, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(pixel_values=pixels)


def test_loss_is_the_mean_over_supervised_tokens_in_both_modes() -> None:
    model, made = tiny.model(), batch()
    output = model(**made)
    targets = made["labels"][:, 1:]
    expected = F.cross_entropy(output.logits[:, :-1][targets != -100], targets[targets != -100])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    plain = gradients(model)
    model.zero_grad()
    loss = model.train()(**made)
    assert loss.logits is None
    torch.testing.assert_close(loss.loss, expected)
    loss.loss.backward()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_rows_equal_padded_ones() -> None:
    model = tiny.model().train()
    padded, packed = batch(), batch(pack_to=200)
    assert len(packed["input_ids"]) < len(padded["input_ids"])
    results = []
    for made in (padded, packed):
        model.zero_grad()
        loss = model(**made).loss
        loss.backward()
        results.append((loss, gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # Positions follow from the sequences where the batch does not bring them.
    without = {name: value for name, value in packed.items() if name != "position_ids"}
    torch.testing.assert_close(model(**without).loss, results[1][0])


def test_packed_mask_and_positions() -> None:
    ids = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert restarting_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0]]
    seen = packed_mask(ids, torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("stage", "frozen"),
    [
        ("pretrain", {"language_model."}),
        ("multitask", set()),
        ("sft", {"vision_model.", "resampler.post_layernorm.", "resampler.projection."}),
    ],
)
def test_stages_train_what_the_paper_says(stage: str, frozen: set[str]) -> None:
    model = tiny.model()
    apply_stage(model, stage)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        changes = not name.startswith(tuple(frozen)) and name != "resampler.position_table"
        # The bias of keys cancels in the softmax.
        if "k_proj.bias" not in name:
            assert torch.equal(value, before[name]) != changes, name
    assert model.vision_model.training == (stage != "sft")
    assert model.language_model.training == (stage != "pretrain")


def test_a_batch_without_images_reaches_every_parameter_in_training() -> None:
    model = tiny.model().train()
    made = batch(rows=ROWS[2:])
    assert "pixel_values" not in made
    model(**made).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing
    assert not model.vision_model.patch_embedding.weight.grad.any()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_generation(kind: str) -> None:
    model, processor = tiny.model(kind), tiny.processor()
    prompts = [
        processor.apply_chat_template(row[:1], add_generation_prompt=True, tokenize=False)
        for row in (ROWS[0], ROWS[1])
    ]
    inputs = processor(images=images(3), text=prompts, return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens[:, :length], inputs["input_ids"])
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), tokens)
    # Each by itself, without padding.
    first, counts = 0, (1, 2)
    for row, count in enumerate(counts):
        alone = processor(text=prompts[row], images=images(3)[first : first + count], return_tensors="pt")
        alone["pixel_values"] = inputs["pixel_values"][first : first + count]
        written = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(written, tokens[row, length:])
        first += count
    calls = []
    handle = model.vision_model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    beams = model.generate(**inputs, **options, num_beams=3)
    handle.remove()
    assert calls == [3] and len(beams) == 2


def test_long_inputs_are_stretched_in_eval_mode_only() -> None:
    model = tiny.model("llama")
    ids = torch.randint(5, 300, (1, 30))
    plain = model(ids).logits
    model.config.seq_length = 100
    assert torch.equal(model(ids).logits, plain)
    model.config.seq_length = 8
    long = model(ids).logits
    assert not torch.allclose(long, plain)
    # The cache continues with the prompt's base, as the original does.
    cached = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert cached.shape == (1, 35)
    model.train()
    assert torch.equal(model(ids).logits, plain)
    model.eval()
    model.config.seq_length = None
    assert torch.equal(model(ids).logits, plain)


def test_long_inputs_need_rotary_positions() -> None:
    config = tiny.config().to_dict()
    config["text_config"] = GPT2Config(vocab_size=340, n_embd=24, n_layer=1, n_head=2).to_dict()
    model = QwenVLForConditionalGeneration(QwenVLConfig(**config))
    model.config.seq_length = 4
    ids = torch.randint(5, 300, (1, 9))
    with pytest.raises(ValueError, match="use_dynamic_ntk=False"):
        model.eval()(ids)
    model.config.use_dynamic_ntk = False
    with pytest.raises(ValueError, match="use_logn_attn=False"):
        model(ids)
    model.config.use_logn_attn = False
    model(ids)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"num_query_tokens": 5}, "num_query_tokens is 5, which is not a square"),
        ({"output_dim": 28}, "output_dim is 28, but the language model is 24"),
        ({"num_attention_heads": 3}, "no multiple of 3 heads"),
        ({"resampler_heads": 5}, "resampler_heads 5"),
    ],
)
def test_settings_that_cannot_be(vision: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.config(vision=vision)


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    model, made = tiny.model(), batch()
    model.save_pretrained(tmp_path)
    again = QwenVLForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**made).logits, model(**made).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("resampler.ln_q")}
    model.save_pretrained(tmp_path / "broken", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks resampler\.ln_q"):
        QwenVLForConditionalGeneration.from_pretrained(tmp_path / "broken")
    QwenVLForConditionalGeneration.from_pretrained(tmp_path / "broken", allow_missing=True)


def test_start_from_a_clip_tower_and_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
        )
    )
    words = tiny.tokenizer()
    language = LlamaForCausalLM(tiny.language_config("llama", vocab_size=len(words)))
    tower.save_pretrained(tmp_path / "tower")
    model, processor = from_vision_language_pretrained(
        str(tmp_path / "tower"), language, words, num_query_tokens=9, resampler_heads=2
    )
    assert model.get_input_embeddings().num_embeddings == len(processor.tokenizer) > 320
    assert not [name for name, p in model.named_parameters() if p.is_meta or not p.isfinite().all()]
    tower = getattr(tower, "vision_model", tower)
    state = tower.state_dict()
    assert torch.equal(model.vision_model.layers[1].mlp.fc2.weight, state["encoder.layers.1.mlp.fc2.weight"])
    # Without the class token the blocks see other neighbours, so only the embeddings can be compared.
    pixels = tiny.pixels(2)
    theirs = tower.pre_layrnorm(tower.embeddings(pixels))[:, 1:]
    torch.testing.assert_close(model.vision_model.embed(pixels)[0], theirs)
    torch.testing.assert_close(model.resampler.position_table, sine_table(24, 3))
    fresh, _ = from_vision_language_pretrained(
        QwenVLVisionConfig(
            hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, patch_size=8
        ),
        language,
        processor.tokenizer,
        image_size=24,
        num_query_tokens=4,
    )
    assert fresh.config.vision_config.image_size == 24
    with pytest.raises(ValueError, match="starts from a CLIP ViT"):
        from_vision_language_pretrained(language, language, processor.tokenizer)


def test_lora_merged_gives_the_same_outputs(tmp_path: Path) -> None:
    model, made = tiny.model(), batch()
    apply_stage(model, "sft")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = add_lora(model, LoraArguments(lora_r=2, lora_dropout=0.0))
    assert len(targets) == 4
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(**made).loss.backward()
        optimizer.step()
    model.eval()
    merged = tiny.model()
    state = merged_state_dict(model)
    merged.load_state_dict(state)
    torch.testing.assert_close(merged(**made).logits, model(**made).logits, atol=1e-5, rtol=1e-4)
    for name, value in before.items():
        frozen = name.startswith(("vision_model.", "resampler.post_layernorm", "resampler.projection"))
        if frozen or (name.startswith("language_model.") and not name.endswith(("q_proj.weight", "v_proj.weight"))):
            assert torch.equal(state[name], value), name
