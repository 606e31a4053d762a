"""`hf-vlp new`: folders of every connector, ready for their first stage."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vlp.cli.errors import EXIT_FAILED, EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.catalog import ARCHITECTURES, load_class
from hf_vlp.models.clip.image_processing_clip import CLIPImageProcessorPil
from tests.scripts.running import COMMON, script
from tests.tiny import cogvlm as tiny_cogvlm
from tests.tiny import llava as tiny


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a vision tower and of a language model, whose settings of generation are Vicuna 1.5's."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.vision_tower().save_pretrained(folder / "vision")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder / "vision"
    )
    words = tiny.tokenizer()
    tiny.language_model(len(words)).save_pretrained(folder / "language")
    words.save_pretrained(folder / "language")
    settings = folder / "language" / "generation_config.json"
    # A temperature without sampling, which transformers would refuse to save anew.
    published = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **published}))
    return str(folder / "vision"), str(folder / "language")


def new(parts: tuple[str, str], connector: str, out: Path, *options: str) -> int:
    return main(
        ["new", "--vision", parts[0], "--language", parts[1], "--connector", connector, "--out", str(out), *options]
    )


@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize("tiles", [False, True])
def test_projectors(
    connector: str, tiles: bool, parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert new(parts, connector, out, *(["--tiles"] if tiles else [])) == 0
    assert "llava_stage1 --model_name_or_path" in capsys.readouterr().out
    model = AutoModelForImageTextToText.from_pretrained(out)
    kind = "LlavaNextForConditionalGeneration" if tiles else "LlavaForConditionalGeneration"
    assert type(model) is getattr(transformers, kind)
    assert model.config.projector_hidden_act == ("linear" if connector == "linear" else "gelu")
    assert new(parts, connector, out) == EXIT_FAILED
    assert "exists" in capsys.readouterr().err


def test_which_features_the_projector_sees(parts: tuple[str, str], tmp_path: Path) -> None:
    seen = ["--vision_features", "cls_patch", "--vision_feature_layer", "-1"]
    assert new(parts, "mlp", tmp_path / "out", *seen) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-1, "full")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    batch = processor(images=Image.new("RGB", (16, 16), "red"), text="<image> a", return_tensors="pt")
    patches = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
    assert (batch["input_ids"] == model.config.image_token_id).sum() == patches + 1
    with torch.no_grad():
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        expected = model.model.multi_modal_projector(states[-1])
        features = model.model.get_image_features(batch["pixel_values"]).pooler_output
        assert torch.isfinite(model(**batch).logits).all()
    torch.testing.assert_close(torch.as_tensor(features[0]), expected[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--tiles"], "features of tiles stand in a grid"), (["--vision_feature_layer", "9"], "vision_feature_layer 9 ")],
)
def test_features_that_cannot_be(
    options: list[str], message: str, parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(parts, "mlp", tmp_path / "out", "--vision_features", "cls_patch", *options) == EXIT_FAILED
    assert message in capsys.readouterr().err


def test_a_seed_gives_the_same_folder(parts: tuple[str, str], tmp_path: Path) -> None:
    for name, seed in (("one", "1"), ("same", "1"), ("other", "2")):
        assert new(parts, "mlp", tmp_path / name, "--seed", seed) == 0
    one, same, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "same", "other"))
    assert one == same
    assert one != other


def test_a_qformer(parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert new(parts, "qformer", tmp_path / "out", "--qformer", "nano", "--num_query_tokens", "4") == 0
    assert f"blip2_stage1 --model_name_or_path {tmp_path / 'out'} --train_data" in capsys.readouterr().out
    model = load_class(tmp_path / "out", "captioning").from_pretrained(tmp_path / "out")
    assert model.query_tokens.shape[1] == 4


def test_the_bert_of_a_qformer_is_named_for_its_stage_1(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=40))
    bert.save_pretrained(tmp_path / "bert")
    assert new(parts, "qformer", tmp_path / "out", "--qformer", str(tmp_path / "bert")) == 0
    assert f"--model_name_or_path {tmp_path / 'out'} --qformer {tmp_path / 'bert'} --" in capsys.readouterr().out


def test_a_qformer_folder_is_the_start_of_both_stages(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = tmp_path / "start"
    assert new(parts, "qformer", start, "--qformer", "nano", "--num_query_tokens", "4") == 0
    options = ["--model_name_or_path", str(start), "--eval_split", "none", "--vocab_size", "600"]
    options += ["--image_size", "64", "--output_dir", str(tmp_path / "stage1")]
    script("blip2_stage1").main([*COMMON, *options])
    said = capsys.readouterr().out
    assert f"the image encoder and the Q-Former of {start}; text side: new" in said
    assert "not used: --image_size" in said
    assert "--vocab_size" not in said
    before = load_class(start, "captioning").from_pretrained(start)
    trained = load_class(tmp_path / "stage1" / "model", "retrieval").from_pretrained(tmp_path / "stage1" / "model")
    for name, value in before.vision_model.tower.state_dict().items():
        assert torch.equal(trained.vision_model.tower.state_dict()[name], value), name
    assert trained.query_tokens.shape == before.query_tokens.shape
    # Two steps of training away from where they started.
    moved = (trained.query_tokens - before.query_tokens).abs()
    assert 0 < moved.max() < 1e-3
    size = load_class(start, "processor").from_pretrained(tmp_path / "stage1" / "model").image_processor.crop_size
    assert size["height"] == 16
    options = ["--stage1", str(tmp_path / "stage1" / "model"), "--language_model", parts[1], "--eval_split", "none"]
    script("blip2_stage2").main([*COMMON, *options, "--output_dir", str(tmp_path / "stage2")])
    assert load_class(tmp_path / "stage2" / "model", "captioning").from_pretrained(tmp_path / "stage2" / "model")


@pytest.mark.skipif("qwen_vl" not in ARCHITECTURES, reason="no Qwen-VL in this version")
def test_a_resampler(parts: tuple[str, str], tmp_path: Path) -> None:
    assert new(parts, "resampler", tmp_path / "out", "--num_query_tokens", "4") == 0
    assert ARCHITECTURES["qwen_vl"].load("model").from_pretrained(tmp_path / "out").config.model_type == "qwen_vl"


def test_a_visual_expert_needs_the_tower_of_a_cogvlm(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new(parts, "visual-expert", tmp_path / "out") == EXIT_USAGE
    assert "tower of a CogVLM folder" in capsys.readouterr().err


def test_a_visual_expert(parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = tiny_cogvlm.model(2, seed=3)
    seen.save_pretrained(tmp_path / "seen")
    assert new((str(tmp_path / "seen"), parts[1]), "visual-expert", tmp_path / "out") == 0
    assert "cogvlm --model_name_or_path" in capsys.readouterr().out
    model = load_class(tmp_path / "out", "model").from_pretrained(tmp_path / "out")
    for name, value in seen.vision_model.state_dict().items():
        assert torch.equal(model.vision_model.state_dict()[name], value), name
    words = transformers.AutoModelForCausalLM.from_pretrained(parts[1]).state_dict()
    for name, value in words.items():
        assert torch.equal(model.language_model.state_dict()[name], value), name
    processor = load_class(tmp_path / "out", "processor").from_pretrained(tmp_path / "out")
    assert model.config.image_token_id == processor.image_token_id


def test_a_visual_expert_needs_a_whole_tower(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = tiny_cogvlm.model(2, seed=3)
    state = {name: value for name, value in seen.state_dict().items() if not name.startswith("vision_model.")}
    seen.save_pretrained(tmp_path / "seen", state_dict=state)
    assert new((str(tmp_path / "seen"), parts[1]), "visual-expert", tmp_path / "out") == EXIT_FAILED
    assert "lacks weights of CogVLMForConditionalGeneration: vision_model" in capsys.readouterr().err


def test_connectors_that_are_not_there(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ARCHITECTURES, "qwen_vl", raising=False)
    assert new(parts, "resampler", tmp_path / "out") == EXIT_USAGE
    assert "there are: linear, mlp, qformer" in capsys.readouterr().err


def test_a_vision_model_without_patches(
    parts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert new((parts[1], parts[1]), "mlp", tmp_path / "out") == EXIT_FAILED
    assert "no patches" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("connector", "options", "message"),
    [
        ("qformer", ["--tiles"], "--tiles is for --connector linear and mlp, not qformer"),
        ("mlp", ["--num_query_tokens", "8"], "--num_query_tokens is for --connector qformer and resampler"),
        ("resampler", ["--qformer", "nano"], "--qformer is for --connector qformer"),
        ("mlp", ["--max_tiles", "6"], "with --tiles only"),
        ("mlp", ["--tiles", "--aspect", "crop"], "keep their proportions"),
        ("mlp", ["--tiles", "--max_tiles", "1"], "at least 2"),
    ],
)
def test_options_without_effect_are_refused(
    connector: str,
    options: list[str],
    message: str,
    parts: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert new(parts, connector, tmp_path / "out", *options) in (EXIT_USAGE, EXIT_FAILED)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
