"""Original checkpoints to ours and back: sizes read off the shapes, wrappings, files, and what does not fit."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_vlp.models.catalog import ARCHITECTURES
from hf_vlp.models.clip.conversion_clip import (
    config_from_original,
    convert_checkpoint,
    from_original,
    model_from_original,
    model_type_of,
    read_original,
    save_original,
    to_original,
    unwrap_state_dict,
)
from hf_vlp.models.clip.processing_clip import CLIPProcessor
from tests.tiny import clip as tiny

KINDS = ["clip", "clip_resnet", "eva_clip"]


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = ARCHITECTURES[kind].load("model")(tiny.config_of(kind)).eval()
    for name, parameter in model.named_parameters():
        # Biases and norms start at constants, which a mix-up would not change.
        if not name.endswith("qkv.bias"):
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def original(kind: str) -> dict[str, Tensor]:
    return to_original(build(kind).state_dict(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind: str) -> None:
    model = build(kind)
    state = to_original(model.state_dict(), kind)
    assert model_type_of(state) == kind
    back = from_original(state)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())
    again = to_original(back, kind)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", KINDS)
def test_config_is_read_off_the_shapes(kind: str) -> None:
    heads = tiny.text_config()["num_attention_heads"]
    config = config_from_original(original(kind), vision_heads=None if kind == "clip_resnet" else 2, text_heads=heads)
    expected = tiny.config_of(kind)
    for part in ("text_config", "vision_config"):
        ours, wanted = getattr(config, part).to_dict(), getattr(expected, part).to_dict()
        for name in ("projection_dim", "initializer_range"):
            ours.pop(name, None), wanted.pop(name, None)
        assert ours == wanted, part
    assert config.projection_dim == expected.projection_dim
    model = model_from_original(
        original(kind), vision_heads=config.vision_config.num_attention_heads, text_heads=heads
    )
    batch = tiny.batch()
    torch.testing.assert_close(model(**batch).logits_per_image, build(kind)(**batch).logits_per_image)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16)])
def test_number_of_heads_of_published_towers(width: int, heads: int) -> None:
    with torch.device("meta"):
        state = {
            "visual.transformer.resblocks.0.attn.in_proj_weight": torch.empty(3 * width, width),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4 * width, width),
            "visual.conv1.weight": torch.empty(width, 3, 14, 14),
            "visual.positional_embedding": torch.empty(257, width),
            "transformer.resblocks.0.mlp.c_fc.weight": torch.empty(2048, 512),
            "token_embedding.weight": torch.empty(49408, 512),
            "positional_embedding": torch.empty(77, 512),
            "text_projection": torch.empty(512, 640),
        }
    config = config_from_original(state, hidden_act="gelu")
    assert config.vision_config.num_attention_heads == heads
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (224, 14)
    assert config.text_config.num_attention_heads == 8 and config.text_config.hidden_act == "gelu"
    assert (config.text_config.bos_token_id, config.text_config.eos_token_id) == (49406, 49407)


def test_wrappings_come_off() -> None:
    state = original("clip")
    text = ("token_embedding", "positional_embedding", "transformer.", "ln_final", "text_projection")
    wrapped = {
        "epoch": 3,
        "state_dict": {f"module.{'text.' * name.startswith(text)}{name}": value for name, value in state.items()},
    }
    wrapped["state_dict"]["module.context_length"] = torch.tensor(77)
    bare = unwrap_state_dict(wrapped)
    assert bare.keys() == state.keys() and all(torch.equal(bare[name], state[name]) for name in state)


def test_eva_names_of_timm_are_known() -> None:
    state = original("eva_clip")
    trunk = {name.replace("visual.", "visual.trunk."): value for name, value in state.items()}
    assert model_type_of(unwrap_state_dict(trunk)) == "eva_clip"


def test_eva_key_bias_has_no_influence_and_is_dropped() -> None:
    model, batch = build("eva_clip"), tiny.batch()
    expected = model(**batch).logits_per_image
    attention = model.vision_model.encoder.layers[0].self_attn
    width = attention.embed_dim
    attention.qkv.bias.data[width : 2 * width] = torch.randn(width)
    torch.testing.assert_close(model(**batch).logits_per_image, expected, atol=1e-4, rtol=1e-4)
    state = to_original(model.state_dict(), "eva_clip")
    back = from_original(state)["vision_model.encoder.layers.0.self_attn.qkv.bias"]
    assert not back[width : 2 * width].any() and torch.equal(back[:width], attention.qkv.bias[:width])


def test_what_does_not_fit_raises() -> None:
    with pytest.raises(ValueError, match="no image tower of a known layout"):
        model_type_of({"visual.trunk.stem.weight": torch.ones(1)})
    state = original("clip") | {"visual.transformer.resblocks.0.ls_1.gamma": torch.ones(32)}
    with pytest.raises(ValueError, match=r"without a counterpart.*ls_1\.gamma"):
        from_original(state)
    with pytest.raises(ValueError, match="no original format for 'align'"):
        to_original({}, "align")
    with pytest.raises(ValueError, match="does not have.*'head.weight'"):
        to_original(build("clip").state_dict() | {"head.weight": torch.ones(1)}, "clip")


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, tmp_path: Path) -> None:
    model = build(kind)
    save_original(model, tmp_path / "original.safetensors")
    assert load_file(tmp_path / "original.safetensors").keys() == original(kind).keys()
    torch.save({"state_dict": original(kind)}, tmp_path / "original.pt")
    for name in ("original.safetensors", "original.pt"):
        state = read_original(tmp_path / name)
        assert all(torch.equal(state[key], value) for key, value in original(kind).items())


def test_converted_folder_opens_with_plain_transformers(tmp_path: Path) -> None:
    """Half-precision weights as OpenAI publishes them, with a tokenizer."""
    processor = tiny.processor()
    torch.manual_seed(0)
    config = tiny.clip_config()
    for name, value in tiny.text_config_of(processor).items():
        setattr(config.text_config, name, value)
    model = transformers.CLIPModel(config).eval()
    save_file({n: v.half() for n, v in to_original(model.state_dict(), "clip").items()}, tmp_path / "a.safetensors")
    convert_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "out", tokenizer=processor.tokenizer, vision_heads=2, text_heads=2
    )
    plain = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = loaded(text=list(tiny.TEXTS), images=tiny.images(), padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[-1] == tiny.IMAGE_SIZE
    expected = model.half().float()(**inputs).logits_per_image
    torch.testing.assert_close(plain(**inputs).logits_per_image, expected)
    assert isinstance(CLIPProcessor.from_pretrained(tmp_path / "out"), CLIPProcessor)


class Scripted(nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.visual = nn.Linear(2, 2)
        self.register_buffer("logit_scale", state["logit_scale"])

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def test_scripted_models_need_consent(tmp_path: Path) -> None:
    module = Scripted({"logit_scale": torch.tensor(2.5)})
    torch.jit.script(module).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="allow_torchscript=True"):
        read_original(tmp_path / "model.pt")
    state = read_original(tmp_path / "model.pt", allow_torchscript=True)
    assert state["logit_scale"].item() == 2.5 and torch.equal(state["visual.weight"], module.visual.weight)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="[Ww]eights"):
        read_original(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()
