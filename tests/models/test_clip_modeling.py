"""The inference models of the CLIP family: equal to transformers, trimming, the retrieval protocol, initialisation."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import Blip2VisionModel, CLIPTextConfig, CLIPVisionModel

from hf_vlp.models.align.modeling_align import AlignModel, image_width
from hf_vlp.models.catalog import ARCHITECTURES
from hf_vlp.models.clip.modeling_clip import CLIPModel
from hf_vlp.models.clip.retrieval_clip import trim_texts
from hf_vlp.models.clip_resnet.configuration_clip_resnet import PRESETS, CLIPResNetConfig, CLIPResNetVisionConfig
from hf_vlp.models.clip_resnet.modeling_clip_resnet import CLIPResNetModel, CLIPResNetVisionModel
from hf_vlp.models.eva_clip.configuration_eva_clip import EvaCLIPConfig
from hf_vlp.models.eva_clip.modeling_eva_clip import EvaCLIPModel
from tests.tiny import clip as tiny

KINDS = sorted(tiny.CONFIGS)
CAUSAL_KINDS = ["clip", "clip_resnet", "eva_clip"]


def build(kind: str, seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    return ARCHITECTURES[kind].load("model")(tiny.config_of(kind, **changes)).eval()


@pytest.mark.parametrize(("kind", "native"), [("clip", transformers.CLIPModel), ("align", transformers.AlignModel)])
def test_outputs_equal_the_native_class(kind: str, native: type, tmp_path: Path) -> None:
    model, batch = build(kind), tiny.batch()
    model.save_pretrained(tmp_path)
    plain = native.from_pretrained(tmp_path)
    assert type(plain) is native
    ours, theirs = model(**batch, return_loss=True), plain(**batch, return_loss=True)
    for name in ("loss", "logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(model.embed_images(batch["pixel_values"]).itc, theirs.image_embeds)
    texts = model.embed_texts(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(texts, theirs.text_embeds, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("kind", "native"), [("clip", transformers.CLIPModel), ("align", transformers.AlignModel)])
def test_native_to_ours_to_native_is_unchanged(kind: str, native: type, tmp_path: Path) -> None:
    plain = native(tiny.config_of(kind))
    plain.save_pretrained(tmp_path / "native")
    ours = ARCHITECTURES[kind].load("model").from_pretrained(tmp_path / "native")
    ours.save_pretrained(tmp_path / "ours")
    back = native.from_pretrained(tmp_path / "ours")
    before, after = plain.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    native.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "again")
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("again", "ours")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_is_exact_and_whole(kind: str, tmp_path: Path) -> None:
    model, batch = build(kind), tiny.batch()
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    torch.testing.assert_close(loaded(**batch).logits_per_image, model(**batch).logits_per_image)


@pytest.mark.parametrize("kind", KINDS)
def test_retrieval_protocol(kind: str) -> None:
    model, batch = build(kind), tiny.batch()
    with torch.no_grad():
        images = model.embed_images(batch["pixel_values"])
        texts = model.embed_texts(batch["input_ids"], batch["attention_mask"])
    assert images.states is None and len(images) == 4 and not model.supports_matching
    ones = torch.ones(4)
    torch.testing.assert_close(images.itc.norm(dim=1), ones)
    torch.testing.assert_close(texts.norm(dim=1), ones)
    similarity = model.similarity(images, texts)
    torch.testing.assert_close(similarity, images.itc @ texts.T)
    assert torch.equal(model.similarity(images.itc, texts), similarity)
    assert torch.equal(model.similarity(images[1:3], texts), similarity[1:3])


@pytest.mark.parametrize("kind", KINDS)
def test_cached_tower_outputs_stand_for_pixels(kind: str) -> None:
    model, batch = build(kind), tiny.batch()
    cached = model.pooled_states(batch["pixel_values"])
    expected = model.embed_images(batch["pixel_values"]).itc
    assert torch.equal(model.embed_images(image_embeds=cached).itc, expected)
    half = model.embed_images(image_embeds=cached.half()).itc
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, atol=5e-3, rtol=5e-3)
    for arguments in ({}, {"pixel_values": batch["pixel_values"], "image_embeds": cached}):
        with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
            model.embed_images(**arguments)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_trimming_is_exact_and_saves_the_padding(kind: str) -> None:
    model = build(kind)
    batch = tiny.batch(pairs=6, length=16, longest=5)
    lengths: list[int] = []
    model.text_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    full = model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    trimmed = model.text_features(batch["input_ids"], batch["attention_mask"])
    assert lengths == [16, int(batch["attention_mask"].sum(dim=1).max())]
    torch.testing.assert_close(trimmed, full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_padding_with_any_token_and_without_mask(kind: str) -> None:
    model, batch = build(kind), tiny.batch()
    expected = model.embed_texts(batch["input_ids"], batch["attention_mask"])
    zeros = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    for arguments in ((batch["input_ids"],), (zeros,), (zeros, batch["attention_mask"])):
        torch.testing.assert_close(model.embed_texts(*arguments), expected, atol=1e-6, rtol=1e-5)


def test_trimming_keeps_a_mask_that_hides_something() -> None:
    model = build("clip")
    ids = torch.tensor([[5, 5, tiny.START, 7, tiny.END, 9], [tiny.START, 3, 4, 8, tiny.END, tiny.END]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]])
    trimmed, kept = trim_texts(ids, mask, tiny.END)
    assert trimmed.shape == (2, 5) and torch.equal(kept, mask[:, :5])
    expected = model.get_text_features(ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(model.text_features(ids, mask), expected, atol=1e-6, rtol=1e-5)


def test_legacy_configs_pool_the_highest_id() -> None:
    """Configs with the wrong end id 2 of old checkpoints: native code takes the highest id, and so must trimming."""
    config = tiny.clip_config()
    config.text_config.eos_token_id = 2
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    assert model.pooled_token_id is None
    # An id 2 early in the text must not be taken for its end.
    ids = torch.tensor([[tiny.START, 2, 6, 7, tiny.END, 0, 0, 0], [tiny.START, 4, 2, tiny.END, 0, 0, 0, 0]])
    lengths: list[int] = []
    model.text_model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    expected = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(model.text_features(ids), expected, atol=1e-6, rtol=1e-5)
    assert lengths == [8, 5]


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_texts_without_a_visible_end_raise(kind: str) -> None:
    model, batch = build(kind), tiny.batch()
    without = batch["input_ids"].clone()
    without[2][without[2] == tiny.END] = 1
    with pytest.raises(ValueError, match=rf"input_ids: texts \[2\].*end token \(id {tiny.END}\)"):
        model.embed_texts(without)
    mask = batch["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ValueError, match=r"texts \[1\]"):
        model.embed_texts(batch["input_ids"], mask)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_equals_plain(kind: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, batch = build(kind).train(), tiny.batch()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**batch, return_loss=True).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_every_parameter_gets_a_gradient() -> None:
    for kind in KINDS:
        model = build(kind).train()
        model(**tiny.batch(), return_loss=True).loss.backward()
        missing = {name for name, p in model.named_parameters() if p.grad is None}
        # The pooler belongs to the format of ALIGN's text tower, but its embedding does not pass through it.
        assert all(name.startswith("text_model.pooler") for name in missing), (kind, missing)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_text_tower_starts_as_in_the_original(kind: str) -> None:
    config = tiny.config_of(kind)
    config.text_config.hidden_size, config.text_config.intermediate_size = 128, 512
    torch.manual_seed(0)
    text = ARCHITECTURES[kind].load("model")(config).text_model
    width, depth = 128, 2
    layer = text.encoder.layers[1]
    expected = {
        layer.self_attn.q_proj: width**-0.5,
        layer.self_attn.v_proj: width**-0.5,
        layer.self_attn.out_proj: width**-0.5 * (2 * depth) ** -0.5,
        layer.mlp.fc1: (2 * width) ** -0.5,
        layer.mlp.fc2: width**-0.5 * (2 * depth) ** -0.5,
    }
    for linear, std in expected.items():
        assert linear.weight.std().item() == pytest.approx(std, rel=0.05)
    assert text.embeddings.position_embedding.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert text.embeddings.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_vit_starts_as_in_the_original() -> None:
    config = tiny.clip_config()
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 128, 512
    torch.manual_seed(0)
    vision = CLIPModel(config).vision_model
    layer = vision.encoder.layers[0]
    bound = (6 / (128 + 3 * 128)) ** 0.5
    assert layer.self_attn.k_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert layer.mlp.fc2.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
    assert vision.embeddings.position_embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_resnet_starts_as_in_the_original() -> None:
    torch.manual_seed(0)
    model = CLIPResNetModel(tiny.clip_resnet_config())
    blocks = [block for index in (1, 2, 3, 4) for block in getattr(model.vision_model, f"layer{index}")]
    assert all(not block.bn3.weight.any() for block in blocks)
    pool = model.vision_model.attnpool
    for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert linear.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    convolution = model.vision_model.conv3.weight
    assert convolution.abs().max().item() == pytest.approx(convolution[0].numel() ** -0.5, rel=0.05)


def test_loaded_weights_are_not_drawn_again(tmp_path: Path) -> None:
    """Only what a checkpoint lacks may be initialised, although whole towers have a rule of their own."""
    for kind in CAUSAL_KINDS:
        model = build(kind)
        state = model.state_dict()
        del state["text_projection.weight"]
        model.save_pretrained(tmp_path / kind, state_dict=state)
        torch.manual_seed(1)
        loaded = type(model).from_pretrained(tmp_path / kind)
        after = loaded.state_dict()
        changed = {name for name in model.state_dict() if not torch.equal(after[name], model.state_dict()[name])}
        assert changed == {"text_projection.weight"}
        assert after["text_projection.weight"].isfinite().all()


def test_eva_tower_is_the_native_one_and_not_dead() -> None:
    config = EvaCLIPConfig(text_config=tiny.text_config(), vision_config=tiny.vision_config(initializer_range=1e-10))
    assert config.vision_config.initializer_range == 0.02
    model = EvaCLIPModel(config).eval()
    assert type(model.vision_model) is Blip2VisionModel
    pixels = tiny.batch()["pixel_values"]
    states = model.vision_model(pixels).last_hidden_state
    # A dead tower gives the same features for every image.
    assert (states[0] - states[1]).abs().max() > 1e-2
    # Embedded is the class token after one final norm; native pooling applies the norm twice.
    torch.testing.assert_close(model.image_features(pixels), model.visual_projection(states[:, 0]))


def test_eva_tower_moves_into_blip_2() -> None:
    model = build("eva_clip")
    tower = Blip2VisionModel(model.config.vision_config).eval()
    assert not any(tower.load_state_dict(model.vision_model.state_dict()))
    pixels = tiny.batch()["pixel_values"]
    assert torch.equal(tower(pixels).last_hidden_state, model.vision_model(pixels).last_hidden_state)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_resnet_presets_have_the_published_shapes(name: str) -> None:
    config = CLIPResNetConfig.preset(name)
    with torch.device("meta"):
        model = CLIPResNetModel(config)
    vision = config.vision_config
    assert model.vision_model.attnpool.positional_embedding.shape == (
        (vision.image_size // 32) ** 2 + 1,
        vision.width * 32,
    )
    assert config.text_config.num_attention_heads == config.text_config.hidden_size // 64
    # 2103.00020, table 1 of the model card, in millions, with the text tower.
    published = {"RN50": 102, "RN101": 119.7, "RN50x4": 178.3, "RN50x16": 291, "RN50x64": 623.3}
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(published[name], rel=0.01)


def test_eva_preset_has_the_published_size() -> None:
    config = EvaCLIPConfig.preset("EVA01-g-14", text_config={"vocab_size": 1000})
    assert config.text_config.vocab_size == 1000 and config.projection_dim == 1024
    with torch.device("meta"):
        vision = Blip2VisionModel(config.vision_config)
    # 2303.15389, table 1: the tower has 1.0 B parameters.
    assert sum(p.numel() for p in vision.parameters()) / 1e9 == pytest.approx(1.01, abs=0.01)


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="RN50x64"):
        CLIPResNetConfig.preset("RN18")
    with pytest.raises(ValueError, match="EVA01-g-14"):
        EvaCLIPConfig.preset("EVA02-L")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "multiple of 32"),
        ({"layers": [1, 1]}, "four stages"),
        ({"width": 8, "num_attention_heads": 7}, "does not divide"),
    ],
)
def test_resnet_config_refuses_what_does_not_fit(fields: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        CLIPResNetVisionConfig(**fields)


def test_resnet_refuses_other_image_sizes() -> None:
    vision = CLIPResNetVisionModel(tiny.clip_resnet_config().vision_config)
    with pytest.raises(ValueError, match="this tower takes 32 x 32"):
        vision(torch.zeros(1, 3, 64, 64))


def test_align_needs_a_joint_space_as_wide_as_its_tower() -> None:
    config = tiny.align_config(projection_dim=12)
    with pytest.raises(ValueError, match=f"set projection_dim={image_width(config.vision_config)}"):
        AlignModel(config)


def test_align_running_statistics_average_over_batches() -> None:
    model = build("align").train()
    norm = model.vision_model.embeddings.batchnorm
    assert norm.momentum == pytest.approx(0.01)
    model.vision_model(tiny.batch()["pixel_values"] + 3)
    assert norm.num_batches_tracked == 1
    assert (norm.running_var - 1).abs().max() < 0.05


def test_towers_from_checkpoints(tmp_path: Path) -> None:
    source = build("clip")
    source.save_pretrained(tmp_path)
    torch.manual_seed(3)
    both = CLIPModel.from_vision_text_pretrained(str(tmp_path), str(tmp_path)).eval()
    batch = tiny.batch()
    assert torch.equal(
        both.vision_model(batch["pixel_values"]).pooler_output,
        source.vision_model(batch["pixel_values"]).pooler_output,
    )
    assert torch.equal(
        both.text_model(batch["input_ids"]).pooler_output, source.text_model(batch["input_ids"]).pooler_output
    )
    assert not torch.equal(both.visual_projection.weight, source.visual_projection.weight)
    locked = CLIPModel.from_vision_text_pretrained(
        str(tmp_path), text_config=CLIPTextConfig(**tiny.text_config(num_hidden_layers=1)), projection_dim=12
    )
    assert locked.projection_dim == 12 and len(locked.text_model.encoder.layers) == 1
    loaded = CLIPVisionModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in locked.vision_model.state_dict().items())
