"""LLaVA's networks: native equality, packing, frozen parts, silent errors, generation, round trips."""

import unittest.mock
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_vlp.models.blip2.backbone_blip_2 import ImageTokenError, MissingWeightsError
from hf_vlp.models.blip2.language_blip_2 import LabelError
from hf_vlp.models.llava import modeling_llava
from hf_vlp.models.llava.anyres_llava import TileError, check_grids, grids, merge_tiles
from hf_vlp.models.llava.initialization_llava import new_processor
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from hf_vlp.models.llava.packing_llava import check_borders
from hf_vlp.objectives.language import AllLabelsIgnoredError
from hf_vlp.training import apply_stage
from tests.tiny import llava as tiny

TILES = pytest.mark.parametrize("tiles", [False, True], ids=["llava", "llava_next"])
NATIVE = {False: transformers.LlavaForConditionalGeneration, True: transformers.LlavaNextForConditionalGeneration}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# The native format


@TILES
def test_native_folder_both_ways(tiles: bool, tmp_path: Path) -> None:
    model, processor = tiny.llava(tiles=tiles)
    batch = tiny.batch(processor)
    model.save_pretrained(tmp_path / "ours")
    native, info = NATIVE[tiles].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits = native(**inputs_of(batch)).logits
        assert torch.equal(model(**inputs_of(batch)).logits, logits)
    native.save_pretrained(tmp_path / "native")
    back = type(model).from_pretrained(tmp_path / "native").eval()
    with torch.no_grad():
        assert torch.equal(back(**inputs_of(batch)).logits, logits)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "ours")) is NATIVE[tiles]


@TILES
def test_loss_and_gradients_are_native_ones(tiles: bool, tmp_path: Path) -> None:
    model, processor = tiny.llava(tiles=tiles)
    # A public checkpoint counts the image token among its words.
    model.generation_config.suppress_tokens = None
    batch = tiny.batch(processor)
    model.save_pretrained(tmp_path)
    native = NATIVE[tiles].from_pretrained(tmp_path)
    native.train()
    model.train()
    model.requires_grad_(True)
    expected = native(**batch).loss
    expected.backward()
    loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    theirs, ours = gradients(native), gradients(model)
    used = {name for name, value in theirs.items() if value.abs().max() > 0}
    assert used <= set(ours)
    for name in used:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


def test_the_placeholder_takes_no_probability() -> None:
    model, processor = tiny.llava()
    batch = tiny.batch(processor)
    token = model.config.image_token_id
    assert model.generation_config.suppress_tokens == [token]
    words = model(**inputs_of(batch)).logits[:, :-1, :token].float()
    labels = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(words.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(**batch).loss, expected)
    with torch.no_grad():
        model.lm_head.weight[token] += 5.0
    torch.testing.assert_close(model.train()(**batch).loss, expected)


def test_the_loss_in_pieces_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny.llava()
    model.train()
    batch = tiny.batch(processor, supervised=3)
    batch["labels"][batch["labels"] == model.config.image_token_id] = -100
    model(**batch).loss.backward()
    whole = gradients(model)
    for name in ("LOGITS_AT_A_TIME", "SMALLEST_PIECE"):
        monkeypatch.setattr(f"hf_vlp.models.llava.modeling_llava.{name}", 2)
    model.zero_grad()
    with unittest.mock.patch.object(
        modeling_llava, "language_modeling_loss", wraps=modeling_llava.language_modeling_loss
    ) as called:
        model(**batch).loss.backward()
    assert called.call_args.kwargs["chunk_size"] == 2
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, whole[name], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_v1_stays_one_linear_layer(connector: str) -> None:
    model, processor = tiny.llava(connector=connector)
    assert model.linear_projector == (connector == "linear")
    apply_stage(model, "stage1")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**tiny.batch(processor)).loss.backward()
    optimizer.step()
    second = model.model.multi_modal_projector.linear_2.weight
    assert torch.equal(second, torch.eye(len(second))) == (connector == "linear")


# What learns


@TILES
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage2_vision", "stage2_lora"])
def test_only_declared_parameters_change(tiles: bool, stage: str) -> None:
    model, processor = tiny.llava(tiles=tiles)
    apply_stage(model, stage)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    connector = {name for name, _ in model.named_parameters() if "multi_modal_projector" in name or "newline" in name}
    if stage in ("stage1", "stage2_lora"):
        assert trained == connector
    assert any(name.startswith("model.vision_tower") for name in trained) == (stage == "stage2_vision")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tiny.batch(processor)).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed <= trained
    assert connector <= changed


@TILES
def test_a_batch_without_pictures_gives_every_weight_a_gradient(tiles: bool) -> None:
    model, processor = tiny.llava(tiles=tiles)
    apply_stage(model, "stage2_vision")
    model.train()
    ids = processor.tokenizer("how many shapes", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids.clone()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() == 0


def test_frozen_parts_stay_in_eval_mode() -> None:
    model, _ = tiny.llava()
    apply_stage(model, "stage1")
    model.train()
    assert not model.model.vision_tower.training
    assert not model.model.language_model.training
    apply_stage(model, "stage2")
    assert model.train().model.language_model.training


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2"])
def test_text_alone_is_read_as_by_the_language_model(family: str, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    lm = tiny.any_language_model(family, len(words)).eval()
    ids = words("how many red shapes are there", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = lm(input_ids=ids).logits
    model, _ = tiny.llava(lm=lm)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits[..., : len(words)], expected)
    model.save_pretrained(tmp_path)
    native = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(native(input_ids=ids).logits[..., : len(words)], expected)


def test_language_models_that_the_format_cannot_hold() -> None:
    words = tiny.tokenizer()
    config = transformers.Gemma2Config(
        vocab_size=len(words), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.05,
    )  # fmt: skip
    with pytest.raises(ValueError, match="more to its output than one matrix"):
        tiny.llava(lm=AutoModelForCausalLM.from_config(config))


TOWERS: dict[str, Any] = {
    "siglip_vision_model": ("full", 0),
    "dinov2": ("default", 1),
    "vit": ("default", 1),
}


def test_a_tower_without_a_class_token_cannot_show_it() -> None:
    config = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    tower = transformers.SiglipVisionModel(config)
    with pytest.raises(ValueError, match="has 0 tokens beside the patches, not a class token alone"):
        new_processor(tiny.tokenizer(), tower, tiles=False, features="cls_patch")


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("tiles", [False, True])
def test_other_towers(family: str, tiles: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=8
    )
    if hasattr(config, "intermediate_size"):
        config.intermediate_size = 64
    tower, words = transformers.AutoModel.from_config(config), tiny.tokenizer()
    processor = new_processor(words, tower, tiles=tiles)
    strategy, extra = TOWERS[family]
    assert (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == (strategy, extra)
    cls = LlavaNextForConditionalGeneration if tiles else LlavaForConditionalGeneration
    model = cls.from_vision_language_pretrained(tower, tiny.language_model(len(words)), processor)
    apply_stage(model, "stage2_vision")
    batch = tiny.batch(processor)
    model.train()(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    model.eval().save_pretrained(tmp_path)
    native = NATIVE[tiles].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(native(**inputs_of(batch)).logits, model(**inputs_of(batch)).logits)


# Packed rows


def packed(model: Any, processor: Any, padding: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The rows of a batch laid end to end in one row with padding behind, and one by one."""
    batch = tiny.batch(processor)
    single, rows = [], []
    images = batch["pixel_values"]
    taken = 0
    for index, count in enumerate((0, 1, 2)):
        real = batch["attention_mask"][index].bool()
        row = {"input_ids": batch["input_ids"][index][real][None], "labels": batch["labels"][index][real][None]}
        rows.append(row)
        extra = {}
        if count:
            extra = {"pixel_values": images[taken : taken + count]}
            if "image_sizes" in batch:
                extra["image_sizes"] = batch["image_sizes"][taken : taken + count]
        taken += count
        single.append({**row, **extra})
    joined = {key: torch.cat([row[key] for row in rows], dim=1) for key in ("input_ids", "labels")}
    ids = torch.cat([torch.full_like(row["input_ids"], n + 1) for n, row in enumerate(rows)], dim=1)
    joined["input_ids"] = torch.nn.functional.pad(joined["input_ids"], (0, padding))
    joined["labels"] = torch.nn.functional.pad(joined["labels"], (0, padding), value=-100)
    joined["sequence_ids"] = torch.nn.functional.pad(ids, (0, padding))
    joined["pixel_values"] = images
    if "image_sizes" in batch:
        joined["image_sizes"] = batch["image_sizes"]
    return joined, single


@TILES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_equal_padded_ones(tiles: bool, attention: str) -> None:
    model, processor = tiny.llava(tiles=tiles)
    model.model.language_model.set_attn_implementation(attention)
    apply_stage(model, "stage2")
    model.train()
    row, _ = packed(model, processor)
    expected = model(**tiny.batch(processor)).loss
    expected.backward()
    separate = gradients(model)
    model.zero_grad()
    loss = model(**row).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, separate[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["opt", "gpt2", "mistral"])
def test_packing_with_other_language_models(family: str) -> None:
    words = tiny.tokenizer()
    model, processor = tiny.llava(lm=tiny.any_language_model(family, len(words)).eval())
    row, single = packed(model, processor)
    with torch.no_grad():
        logits = model(**{name: value for name, value in row.items() if name != "labels"}).logits[0]
        start = 0
        for one in single:
            alone = model(**inputs_of(one)).logits[0]
            torch.testing.assert_close(logits[start : start + len(alone)], alone, atol=1e-5, rtol=1e-4)
            start += len(alone)


def test_packed_as_one_long_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What variable-length flash attention is given, computed by another implementation."""
    model, processor = tiny.llava()
    row, _ = packed(model, processor)
    twice = {name: torch.cat([value, value]) for name, value in row.items()}
    with torch.no_grad():
        expected = model(**twice).loss
        monkeypatch.setattr("hf_vlp.models.llava.modeling_llava.flattened", lambda language_model: True)
        monkeypatch.setattr("hf_vlp.models.llava.modeling_llava.packed_mask", lambda *args: None)
        torch.testing.assert_close(model(**twice).loss, expected)


def test_a_language_model_that_looks_over_the_borders() -> None:
    words = tiny.tokenizer()
    with pytest.raises(ValueError, match="does not keep packed conversations apart"):
        check_borders(tiny.any_language_model("opt", len(words)).model)
    check_borders(tiny.any_language_model("mistral", len(words)).model)


def test_packing_refuses_wrong_positions() -> None:
    model, processor = tiny.llava()
    row, _ = packed(model, processor)
    with pytest.raises(ValueError, match="count from 0 in each"):
        model(**row, position_ids=torch.arange(row["input_ids"].shape[1])[None])


# Errors


@TILES
def test_image_tokens_that_do_not_match(tiles: bool) -> None:
    model, processor = tiny.llava(tiles=tiles)
    batch = tiny.batch(processor)
    token = model.config.image_token_id
    with pytest.raises(ImageTokenError, match="0 pictures|whole pictures"):
        model(input_ids=batch["input_ids"])
    fewer = {**inputs_of(batch), "pixel_values": batch["pixel_values"][:2]}
    if tiles:
        fewer["image_sizes"] = batch["image_sizes"][:2]
    with pytest.raises(ImageTokenError, match="whole pictures"):
        model(**fewer)
    ids = batch["input_ids"].clone()
    place = (ids[1] == token).nonzero()[0]
    ids[1, place] = 5
    # As many tokens as features in all, but the second row lacks one and the first has one too many.
    ids[0, 0] = token
    with pytest.raises(ImageTokenError, match="row 0 has 1 image tokens"):
        model(**{**inputs_of(batch), "input_ids": ids})
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == token, 5)
    with pytest.raises(ImageTokenError, match="would not be seen"):
        model(**{**inputs_of(batch), "input_ids": ids})


def test_labels_that_train_the_wrong_thing() -> None:
    model, processor = tiny.llava()
    batch = tiny.batch(processor)
    with pytest.raises(LabelError, match="image tokens"):
        model(**{**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)})
    wrong = batch["labels"].masked_fill(batch["attention_mask"] == 0, 0)
    with pytest.raises(LabelError, match="padding"):
        model(**{**batch, "labels": wrong})
    with pytest.raises(LabelError, match="shape"):
        model(**{**batch, "labels": batch["labels"][:, :-1]})
    with pytest.raises(AllLabelsIgnoredError):
        model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})


def test_other_silent_mistakes() -> None:
    model, processor = tiny.llava()
    batch = tiny.batch(processor)
    with pytest.raises(ValueError, match="differs from config"):
        model(**inputs_of(batch), vision_feature_layer=-1)
    with pytest.raises(ValueError, match="pixel_values have shape"):
        model(**{**inputs_of(batch), "pixel_values": torch.zeros(3, 3, 8, 8)})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_tiles_that_do_not_fit() -> None:
    model, processor = tiny.llava(tiles=True)
    batch = inputs_of(tiny.batch(processor))
    with pytest.raises(TileError, match="pixel_values hold 2"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:, :2]})
    with pytest.raises(TileError, match="over the maximum of 2"):
        check_grids([[16, 48]], 16, 2)
    with pytest.raises(TileError, match="whole tiles"):
        check_grids([[16, 40]], 16)
    with pytest.raises(TileError, match="3 tiles are given"):
        merge_tiles(torch.zeros(4, 4, 2), (16, 32), (1, 2), None)
    assert grids(336) == [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    assert grids(10, 3) == [[10, 20], [20, 10], [30, 10], [10, 30]]
    for most, count in ((5, 9), (6, 13)):
        shapes = [(height // 10, width // 10) for height, width in grids(10, most)]
        assert len(set(shapes)) == len(shapes) == count
        assert all(2 <= rows * columns <= most for rows, columns in shapes)


def test_a_merge_type_that_cannot_be_saved(tmp_path: Path) -> None:
    model, _ = tiny.llava(tiles=True)
    flat = LlavaNextForConditionalGeneration(model.config, merge_type="flat")
    with pytest.raises(ValueError, match="spatial_unpad"):
        flat.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="merge_type may be"):
        LlavaNextForConditionalGeneration(model.config, merge_type="round")


def test_a_folder_without_its_projector(tmp_path: Path) -> None:
    model, _ = tiny.llava()
    state = {name: v for name, v in model.state_dict().items() if "projector" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MissingWeightsError, match="multi_modal_projector"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


# Generation


@TILES
def test_left_padded_batches_answer_as_rows_alone(tiles: bool, tmp_path: Path) -> None:
    model, processor = tiny.llava(tiles=tiles)
    texts = ["<image> what is this ?", "<image> how many red shapes are there in all of this ?"]
    images = tiny.pictures((20, 13), (9, 30))
    together = processor(images=images, text=texts, return_tensors="pt", padding=True)
    answers = model.generate(**together, max_new_tokens=6, do_sample=False)
    width = together["input_ids"].shape[1]
    for index, (text, image) in enumerate(zip(texts, images, strict=True)):
        alone = processor(images=image, text=text, return_tensors="pt")
        answer = model.generate(**alone, max_new_tokens=6, do_sample=False)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(answers[index, width:][: len(answer)], answer)
    model.save_pretrained(tmp_path)
    native = NATIVE[tiles].from_pretrained(tmp_path)
    assert torch.equal(native.generate(**together, max_new_tokens=6, do_sample=False), answers)


def test_beams_encode_a_picture_once() -> None:
    model, processor = tiny.llava()
    inputs = processor(images=tiny.pictures((20, 13)), text="<image> what ?", return_tensors="pt")
    seen: list[int] = []
    handle = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    handle.remove()
    assert seen == [1]


def test_streaming() -> None:
    model, processor = tiny.llava()
    inputs = processor(images=tiny.pictures((20, 13)), text="<image> what ?", return_tensors="pt")

    class Pieces:
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Pieces()
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert streamer.tokens == tokens[0].tolist()
    assert streamer.ended
    assert model.config.image_token_id not in tokens[0, inputs["input_ids"].shape[1] :]
