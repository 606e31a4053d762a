"""ALBEF's network: packed equals padded, shared equals repeated, and bad input is named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, ViTConfig, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_vlp.models.albef.configuration_albef import AlbefConfig, AlbefTextConfig
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval, AlbefModel, ImageEmbeds
from hf_vlp.models.albef.modeling_albef_packing import CrossLayout, PackedTexts, fusion_layouts
from hf_vlp.models.albef.modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
)
from hf_vlp.models.albef.modeling_albef_text import AlbefTextDecoder
from tests.tiny import albef as tiny


def build(cls: type = AlbefForImageTextRetrieval, **changes: Any) -> Any:
    torch.manual_seed(0)
    return tiny.spread_weights(cls(tiny.albef_config(**changes))).double().eval()


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("fusion_layer", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[5, 9, 2, 7], [6, 6, 6]])
def test_unpadded_equals_padded(fusion_layer: int, lengths: list[int]) -> None:
    model = build(AlbefModel, fusion_layer=fusion_layer).text_model
    ids, mask = tiny.texts(lengths)
    images = torch.randn(len(lengths), 5, 32, dtype=torch.float64)
    padded = model(ids, mask, images).last_hidden_state
    unpadded = model(ids, mask, images, keep_padding=False).last_hidden_state
    close(unpadded[mask.bool()], padded[mask.bool()])
    assert not unpadded[~mask.bool()].any()
    longer_ids, longer_mask = (torch.nn.functional.pad(x, (0, 4)) for x in (ids, mask))
    longer = model(longer_ids, longer_mask, images, keep_padding=False).last_hidden_state
    close(longer[:, : ids.shape[1]], unpadded)


@pytest.mark.parametrize("fusion_layer", [0, 1, 2, 3])
def test_rows_that_share_texts_and_images_equal_repeated_ones(fusion_layer: int) -> None:
    """The first fusion layer expands texts to rows, the last one computes what is asked for; they may be the same."""
    model = build(AlbefModel, fusion_layer=fusion_layer).text_model
    ids, mask = tiny.texts([5, 9, 2, 7])
    images = torch.randn(3, 5, 32, dtype=torch.float64)
    source, index = torch.tensor([3, 0, 0, 1, 3, 2, 0]), torch.tensor([0, 0, 2, 0, 2, 0, 0])
    wanted = model(ids[source], mask[source], images[index]).last_hidden_state
    texts = PackedTexts.from_padded(ids, mask)
    states = model.encode(texts)
    number = model.config.num_fusion_layers
    rows = texts.select(source)
    for chosen in (None, rows.first, torch.tensor([0, 1, 7, 8, 12, 20])):
        layouts = fusion_layouts(texts, number, index, 3, source=source, keep=chosen)
        fused = model.fuse(states, layouts, images)
        expected = wanted[mask[source].bool()]
        close(fused, expected if chosen is None else expected[chosen])
        close(model.fuse(states, layouts, key_values=model.project_images(images)), fused)


def test_slots_hold_every_row_once_and_bound_the_empty_cells() -> None:
    counts = torch.tensor([3, 1, 4, 2, 5, 2, 2, 6])
    index = torch.tensor([1, 1, 1, 1, 1, 1, 0, 3])
    layout = CrossLayout.build(counts, index, 4, torch.device("cpu"))
    assert layout.images.tolist() == [0, 1, 1, 3]
    assert len(set(layout.rows.cells.tolist())) == int(counts.sum())
    slot = layout.rows.cells // layout.rows.width
    assert torch.equal(layout.images[slot], torch.repeat_interleave(index, counts))
    values = torch.randn(int(counts.sum()), 2)
    assert torch.equal(layout.rows.unpad(layout.rows.pad(values)), values)


def test_images_project_their_keys_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    rows: list[int] = []
    for layer in model.albef.text_model.encoder.layer[2:]:
        layer.crossattention.self.key.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[0]))
    images = model.embed_images(tiny.images(3).double())
    ids, mask = tiny.texts([4, 6, 5, 9] * 10)
    model.matching_scores(images, torch.arange(40) % 3, ids, mask)
    assert rows == [3, 3]
    rows.clear()
    model.matching_logits(images, torch.arange(40) % 3, ids, mask, rows_at_once=7)
    assert sum(rows) == 2 * 3


def test_matching_of_any_pairs_equals_one_by_one() -> None:
    model = build()
    pixels = tiny.images(4).double()
    images = model.embed_images(pixels)
    ids, mask = tiny.texts([4, 6, 5, 9, 6, 3])
    ids[4, :6] = ids[1, :6]
    index = torch.tensor([3, 0, 3, 1, 1, 0])
    wanted = torch.stack(
        [
            model(pixels[i : i + 1], ids[t : t + 1], mask[t : t + 1], matching=True).itm_logits[0]
            for t, i in enumerate(index)
        ]
    )
    for rows in (1, 2, 4, 512):
        close(model.matching_logits(images, index, ids, mask, rows_at_once=rows), wanted)
    close(model.matching_scores(images, index, ids, mask), wanted[:, 1])
    probabilities = model.matching_probabilities(images, index, ids, mask)
    torch.testing.assert_close(probabilities, wanted.float().softmax(1)[:, 1])
    assert model.matching_logits(images, index[:0], ids[:0], mask[:0]).shape == (0, 2)


def test_similarities_divide_by_the_temperature() -> None:
    model = build()
    ids, mask = tiny.texts([4, 6, 5])
    output = model(tiny.images(2).double(), ids, mask)
    images, texts = model.embed_images(tiny.images(2).double()), model.embed_texts(ids, mask)
    assert output.logits_per_image.shape == (2, 3)
    expected = model.similarity(images, texts).double() / model.temperature
    torch.testing.assert_close(output.logits_per_image, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(images.itc.norm(dim=1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("cls", [AlbefModel, AlbefForVisualReasoning, AlbefForQuestionAnswering])
def test_attention_implementations_agree(cls: type) -> None:
    def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Any:
        """What flash attention computes from rows laid end to end, one row at a time."""
        assert mask is None and query.shape[0] == key.shape[0] == 1
        bounds = zip(options["cu_seq_lens_q"].tolist(), options["cu_seq_lens_k"].tolist())
        previous, parts = next(bounds), []
        for at in bounds:
            q, k, v = (
                query[0, :, previous[0] : at[0]],
                key[0, :, previous[1] : at[1]],
                value[0, :, previous[1] : at[1]],
            )
            assert q.shape[1] <= options["max_length_q"] and k.shape[1] <= options["max_length_k"]
            scores = q @ k.transpose(1, 2) * options["scaling"]
            if options["is_causal"]:
                scores = scores.masked_fill(torch.ones_like(scores).tril().logical_not(), -torch.inf)
            parts.append((scores.softmax(-1) @ v).transpose(0, 1))
            previous = at
        return torch.cat(parts)[None], None

    ALL_ATTENTION_FUNCTIONS.register("flash_for_this_test", packed_attention)
    pairs = cls is AlbefForVisualReasoning
    model = build(cls, images_per_text=2 if pairs else 1)
    ids, mask = tiny.texts([5, 9, 2, 7])
    pixels = tiny.images(8).double().view(4, 2, 3, 32, 32) if pairs else tiny.images(4).double()
    labels, labels_mask = tiny.texts([3, 5, 4, 3, 6], seed=1)

    def run() -> Tensor:
        if cls is AlbefForQuestionAnswering:
            return model(
                pixels, ids, mask, labels, labels_mask, answers_per_question=torch.tensor([2, 1, 1, 1])
            ).logits
        return model(pixels, ids, mask)[0]

    outputs = {}
    for name in ("eager", "sdpa", "flash_for_this_test"):
        for part in model.modules():
            config = getattr(part, "config", None)
            if isinstance(config, AlbefTextConfig):
                config._attn_implementation = name
        outputs[name] = run()
    close(outputs["sdpa"], outputs["eager"])
    close(outputs["flash_for_this_test"], outputs["eager"])


def test_gradient_checkpointing_changes_nothing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build(AlbefForVisualReasoning, images_per_text=2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = tiny.texts([5, 9])
        pixels = tiny.images(4).double().view(2, 2, 3, 32, 32)
        model(pixels, ids, mask, labels=torch.tensor([0, 1])).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 50
    for name, gradient in grads[0].items():
        close(grads[1][name], gradient)


@pytest.mark.parametrize(
    ("cls", "changes"),
    [
        (AlbefModel, {}),
        (AlbefForImageTextRetrieval, {}),
        (AlbefForVisualEntailment, {}),
        (AlbefForVisualReasoning, {"images_per_text": 2}),
        (AlbefForQuestionAnswering, {}),
    ],
)
def test_saved_is_loaded(cls: type, changes: dict[str, Any], tmp_path: Path) -> None:
    model = cls(tiny.albef_config(**changes)).eval()
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    for part in ("text_config", "vision_config", "decoder_config"):
        own, loaded = (getattr(one.config, part) for one in (model, again))
        assert own is loaded is None or {**own.to_dict(), "dtype": None} == {**loaded.to_dict(), "dtype": None}
    assert again.config.id2label == model.config.id2label
    assert AlbefModel.from_pretrained(tmp_path).config.text_config.fusion_layer == 2


def test_a_head_that_the_checkpoint_lacks_is_an_error(tmp_path: Path) -> None:
    AlbefForImageTextRetrieval(tiny.albef_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no AlbefForVisualEntailment: it lacks classifier\.0\.bias"):
        AlbefForVisualEntailment.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no AlbefForQuestionAnswering"):
        AlbefForQuestionAnswering.from_pretrained(tmp_path)
    model = AlbefForVisualEntailment.from_pretrained(tmp_path, allow_missing=True)
    assert model.classifier[-1].out_features == 3
    with pytest.raises(ValueError, match="needs images_per_text=2"):
        AlbefForVisualReasoning.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("towers")
    config = tiny.albef_config()
    vision = {**config.vision_config.to_dict(), "image_size": 48}
    torch.manual_seed(1)
    ViTModel(ViTConfig(**vision)).save_pretrained(folder / "vit")
    fields = {name: value for name, value in config.text_config.to_dict().items() if name in BertConfig().to_dict()}
    BertForMaskedLM(BertConfig(**{**fields, "model_type": "bert"})).save_pretrained(folder / "bert")
    return str(folder / "vit"), str(folder / "bert")


def test_starts_from_any_vit_and_bert(towers: tuple[str, str]) -> None:
    model = AlbefForImageTextRetrieval.from_vision_text_pretrained(*towers, projection_dim=16).eval()
    assert model.config.text_config.fusion_layer == 2 and model.config.projection_dim == 16
    vit, bert = ViTModel.from_pretrained(towers[0]).eval(), BertModel.from_pretrained(towers[1]).eval()
    pixels = tiny.images(2, size=48)
    close(model.albef.encode_images(pixels), vit(pixels).last_hidden_state)
    # Without cross-attention the whole stack is BERT.
    ids, mask = tiny.texts([5, 9])
    plain = AlbefModel.from_vision_text_pretrained(*towers, fusion_layer=4).eval()
    found = plain.text_model(ids, mask, mode="text").last_hidden_state
    wanted = bert(ids, mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-5, atol=1e-6)


def test_starts_pairs_and_answers_from_towers(towers: tuple[str, str]) -> None:
    pairs = AlbefForVisualReasoning.from_vision_text_pretrained(*towers, images_per_text=2)
    twin = pairs.albef.text_model.encoder.layer[2]
    assert torch.equal(twin.first.intermediate.dense.weight, twin.second.intermediate.dense.weight)
    assert twin.second.crossattention.self.key is None
    answering = AlbefForQuestionAnswering.from_vision_text_pretrained(*towers, image_size=32)
    assert answering.config.vision_config.image_size == 32
    source, target = answering.albef.text_model.encoder.layer[3], answering.decoder.text_model.encoder.layer[1]
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values()))
    answering(tiny.images(1), *tiny.texts([4]), labels=torch.tensor([[2, 9, 3]]))


def test_a_backbone_that_did_not_load_is_an_error(towers: tuple[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    BertModel.from_pretrained(towers[1]).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in state.items() if "layer.1.intermediate" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 2 parameters of BertModel"):
        AlbefModel.from_vision_text_pretrained(towers[0], str(tmp_path))
    with pytest.raises(ValueError, match="is a 'vit' model"):
        AlbefModel.from_vision_text_pretrained(towers[0], towers[0])


def test_other_image_sizes(tmp_path: Path) -> None:
    model = AlbefForImageTextRetrieval(tiny.albef_config()).eval()
    before = model.albef.encode_images(tiny.images(1))
    model.set_image_size(64)
    assert model.albef.encode_images(tiny.images(1, size=64)).shape == (1, 17, 32)
    model.save_pretrained(tmp_path)
    assert AlbefForImageTextRetrieval.from_pretrained(tmp_path).config.vision_config.image_size == 64
    model = AlbefForImageTextRetrieval(tiny.albef_config())
    model.set_image_size(32)
    assert model.albef.encode_images(tiny.images(1)).shape == before.shape
    with pytest.raises(ValueError, match="multiple of the patch size 16"):
        model.set_image_size(40)


def test_cached_generation_equals_the_whole_decoder() -> None:
    model = build(AlbefForQuestionAnswering)
    ids, mask = tiny.texts([5, 9])
    states, states_mask = model.encode_questions(tiny.images(2).double(), ids, mask)
    answers, answers_mask = tiny.texts([5, 5], seed=3)
    whole = model.decoder(answers, answers_mask, states, states_mask).logits
    cache, steps = None, []
    for position in range(answers.shape[1]):
        output = model.decoder(
            answers[:, position : position + 1],
            answers_mask[:, : position + 1],
            states,
            states_mask,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        steps.append(output.logits)
    close(torch.cat(steps, dim=1), whole)
    logits, _, _ = model.score_answers(
        states, states_mask, PackedTexts.from_padded(answers, answers_mask), torch.arange(2)
    )
    close(logits.view(2, 4, -1), whole[:, :-1])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_and_without_cache(beams: int) -> None:
    model = build(AlbefForQuestionAnswering)
    inputs = (tiny.images(3).double(), *tiny.texts([5, 9, 7]))
    cached = model.generate(*inputs, num_beams=beams, max_new_tokens=5)
    plain = model.generate(*inputs, num_beams=beams, max_new_tokens=5, use_cache=False)
    assert torch.equal(cached, plain)
    assert cached[:, 0].eq(tiny.CLS).all() and cached.shape[1] <= 6
    if beams == 1:
        states, mask = model.encode_questions(*inputs)
        greedy = torch.full((3, 1), tiny.CLS)
        for _ in range(cached.shape[1] - 1):
            logits = model.decoder(greedy, None, states, mask).logits
            greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], dim=1)
        until_end = (greedy == tiny.SEP).cumsum(1).sub((greedy == tiny.SEP).long()) == 0
        assert torch.equal(cached[until_end], greedy[until_end])


def test_ranking_scores_count_the_first_token_twice() -> None:
    model = build(AlbefForQuestionAnswering)
    inputs = (tiny.images(2).double(), *tiny.texts([5, 9]))
    candidates, _ = tiny.texts([3, 5, 4, 3, 6], seed=1)
    ranked = model.rank_answers(*inputs, candidate_ids=candidates, top_k=5)
    for question in range(2):
        for answer in range(5):
            one = model(
                inputs[0][question : question + 1],
                inputs[1][question : question + 1],
                inputs[2][question : question + 1],
                labels=candidates[answer : answer + 1],
            )
            at = ranked.shortlist[question].tolist().index(answer)
            first = ranked.first_token_probabilities[question, answer].log()
            torch.testing.assert_close(ranked.scores[question, at], (first - one.answer_loss[0]).float())
    assert (ranked.probabilities.diff(dim=1) <= 0).all()
    with pytest.raises(ValueError, match="top_k is 6"):
        model.rank_answers(*inputs, candidate_ids=candidates, top_k=6)


def test_grounding_does_not_depend_on_frozen_weights_and_draws_pictures() -> None:
    model = build()
    inputs = (tiny.images(2).double(), *tiny.texts([5, 9]))
    maps = model.grounding_maps(*inputs).maps
    model.requires_grad_(False)
    close(model.grounding_maps(*inputs, layer=3).maps, maps)
    with torch.no_grad():
        close(model.grounding_maps(*inputs).maps, maps)
    assert maps.shape == (2, 2, 2) and (maps >= 0).all()
    picture = model.grounding_picture(Image.new("L", (50, 30), 128), torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert picture.size == (50, 30) and picture.mode == "RGB"
    assert all(abs(value - 128) <= 1 for value in picture.getpixel((2, 2)))
    red, green, blue = picture.getpixel((47, 27))
    assert red > green and red > blue
    assert model.grounding_picture(Image.new("RGB", (8, 8)), torch.zeros(2, 2)).getpixel((4, 4)) == (0, 0, 0)
    with pytest.raises(ValueError, match="layer 1 has no cross-attention"):
        model.grounding_maps(*inputs, layer=1)
    with pytest.raises(ValueError, match="blocks 0 to 1"):
        model.grounding_maps(*inputs, layer=2, source="contrastive")
    with pytest.raises(ValueError, match="'matching' or 'contrastive'"):
        model.grounding_maps(*inputs, source="saliency")


IDS, MASK = tiny.texts([4, 6])
PAIRS = tiny.images(4).view(2, 2, 3, 32, 32)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (AlbefForVisualReasoning, (tiny.images(6).view(2, 3, 3, 32, 32), IDS, MASK), "exactly two images"),
        (AlbefForVisualReasoning, (tiny.images(2), IDS, MASK), "exactly two images"),
        (AlbefForVisualReasoning, (PAIRS[:1], IDS, MASK), "2 texts need 4 images"),
        (AlbefForVisualReasoning, (PAIRS, IDS, MASK, torch.tensor([0, 2])), r"labels must lie in 0\.\.1"),
        (AlbefForVisualEntailment, (tiny.images(2), IDS, MASK, torch.tensor([-1, 2])), "reach from -1 to 2"),
        (AlbefForVisualEntailment, (tiny.images(2), IDS, MASK, torch.tensor([1])), "one class for each of 2"),
        (AlbefForVisualEntailment, (tiny.images(3), IDS, MASK), "2 texts need 2 images"),
        (AlbefForVisualEntailment, (tiny.images(2), IDS, MASK[:, :4]), "attention_mask has shape"),
        (AlbefForVisualEntailment, (tiny.images(2), IDS, MASK.flip(1)), "pad on the right"),
        (AlbefForQuestionAnswering, (tiny.images(2), IDS, MASK), "answers are missing"),
        (AlbefForQuestionAnswering, (tiny.images(2), IDS, MASK, IDS[:1]), "there are 1 answers"),
        (AlbefForQuestionAnswering, (tiny.images(2), IDS, MASK, torch.tensor([[2], [2]])), "nothing to predict"),
        (AlbefForQuestionAnswering, (tiny.images(1), IDS, MASK, IDS), "1 images for 2 questions"),
        (AlbefForImageTextRetrieval, (tiny.images(3), IDS, MASK, True), "3 images and 2 texts"),
        (AlbefForImageTextRetrieval, (tiny.images(3), None), "pass pixel_values and input_ids"),
        (AlbefModel, (), "pass pixel_values"),
        (AlbefModel, (tiny.images(2), torch.full((2, 30), 9)), "30 tokens, but the model has 24 positions"),
    ],
)
def test_bad_input_is_named(cls: type, arguments: tuple, message: str) -> None:
    model = cls(tiny.albef_config(images_per_text=2 if cls is AlbefForVisualReasoning else 1))
    with pytest.raises(ValueError, match=message):
        model(*arguments)


def test_matching_checks_its_indices() -> None:
    model = build()
    images = model.embed_images(tiny.images(2).double())
    with pytest.raises(ValueError, match=r"must lie in 0\.\.1"):
        model.matching_scores(images, torch.tensor([0, 2]), IDS, MASK)
    with pytest.raises(ValueError, match="one image for each of the 2 texts"):
        model.matching_scores(images, torch.tensor([0]), IDS, MASK)
    with pytest.raises(ValueError, match="no states to match"):
        model.matching_scores(ImageEmbeds(images.itc), torch.tensor([0, 1]), IDS, MASK)
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        model.embed_images()


def test_text_tower_checks_its_modes() -> None:
    model = AlbefModel(tiny.albef_config()).text_model
    with pytest.raises(ValueError, match="'text', 'fusion' or 'multi_modal'"):
        model(IDS, MASK, mode="both")
    with pytest.raises(ValueError, match="pass encoder_hidden_states"):
        model(IDS, MASK)
    with pytest.raises(ValueError, match="starts from text states"):
        model(IDS, MASK, torch.zeros(2, 5, 32), mode="fusion")
    with pytest.raises(ValueError, match="must hold 2 images"):
        model(IDS, MASK, torch.zeros(3, 5, 32))


def test_configuration_is_checked() -> None:
    with pytest.raises(ValueError, match="fusion_layer is 5"):
        tiny.albef_config(fusion_layer=5)
    with pytest.raises(ValueError, match="1 or 2 images"):
        tiny.albef_config(images_per_text=3)
    with pytest.raises(ValueError, match="is_decoder=True and fusion_layer=0"):
        AlbefTextDecoder(tiny.albef_config().text_config)
    config = AlbefConfig()
    assert config.text_config.num_fusion_layers == 6 and config.vision_config.image_size == 256
    assert config.with_decoder().decoder_config.num_hidden_layers == 6 and config.decoder_config is None


def test_generation_needs_to_know_where_answers_start_and_end() -> None:
    model = AlbefForQuestionAnswering(tiny.albef_config())
    model.config.decoder_config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id is unknown"):
        model.generate(tiny.images(2), IDS, MASK)
