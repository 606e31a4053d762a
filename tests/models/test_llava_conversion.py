"""Original LLaVA folders to native ones and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_vlp.cli.errors import EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.blip2.backbone_blip_2 import MissingWeightsError
from hf_vlp.models.llava.conversion_llava import (
    OriginalFormatError,
    from_original,
    is_original,
    load_original,
    model_from_original,
    save_original,
    to_original,
    words_of,
)
from tests.tiny import llava as tiny


@pytest.mark.parametrize("tiles", [False, True], ids=["llava", "llava_next"])
@pytest.mark.parametrize("connector", ["linear", "mlp"])
def test_a_folder_goes_there_and_back(tiles: bool, connector: str, tmp_path: Path) -> None:
    model, processor = tiny.llava(tiles=tiles, connector=connector)
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    save_original(model, tmp_path / "original", vision=str(tmp_path / "tower"))
    assert is_original(tmp_path / "original")
    assert not is_original(tmp_path / "tower")
    state = load_file(tmp_path / "original" / "model.safetensors")
    assert len(state["lm_head.weight"]) == words_of(model) == len(tiny.tokenizer())
    again = load_original(tmp_path / "original")
    assert type(again) is type(model)
    batch = tiny.batch(processor)
    with torch.no_grad():
        expected, found = model(**batch), again(**batch)
    assert torch.equal(found.logits[..., :-1], expected.logits[..., :-1])
    assert torch.equal(found.loss, expected.loss)
    assert again.linear_projector == (connector == "linear")


def test_stage_1_of_the_original_is_a_projector_alone(tmp_path: Path) -> None:
    model, processor = tiny.llava()
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    save_original(model, tmp_path / "whole", vision=str(tmp_path / "tower"))
    state = load_file(tmp_path / "whole" / "model.safetensors")
    base = {name: v for name, v in state.items() if "mm_projector" not in name and "vision" not in name}
    for name in ("base", "stage1"):
        (tmp_path / name).mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    torch.save({n: v for n, v in state.items() if "mm_projector" in n}, tmp_path / "stage1" / "mm_projector.bin")
    (tmp_path / "stage1" / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    again = load_original(tmp_path / "stage1", base=tmp_path / "base")
    batch = tiny.batch(processor)
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**batch).loss)


@pytest.mark.parametrize("tiles", [False, True], ids=["llava", "llava_next"])
def test_the_command_both_ways(tiles: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.llava(tiles=tiles)
    model.save_pretrained(tmp_path / "native")
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    tower = ["--vision", str(tmp_path / "tower")]
    assert main(["convert", "to-llava", str(tmp_path / "native"), str(tmp_path / "original"), *tower]) == 0
    words = ["--tokenizer", str(tmp_path / "words")]
    assert main(["convert", "llava", str(tmp_path / "original"), str(tmp_path / "back"), *words]) == 0
    again = type(model).from_pretrained(tmp_path / "back").eval()
    batch = tiny.batch(type(processor).from_pretrained(tmp_path / "back"))
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model(**tiny.batch(processor)).loss)
    assert main(["convert", "llava", str(tmp_path / "tower"), str(tmp_path / "other")]) == EXIT_USAGE
    assert "no folder of the original LLaVA" in capsys.readouterr().err


def test_what_the_native_format_cannot_hold(tmp_path: Path) -> None:
    model, _ = tiny.llava()
    original = to_original(model.state_dict(), linear=False, words=words_of(model))
    with pytest.raises(OriginalFormatError, match="neither 'linear' nor"):
        from_original({**original, "model.mm_projector.4.weight": torch.zeros(2, 2)})
    with pytest.raises(OriginalFormatError, match="no weight of an original LLaVA"):
        from_original({"transformer.wte.weight": torch.zeros(2, 2)})
    parts = {"text_config": model.config.text_config, "vision_config": model.config.vision_config}
    with pytest.raises(OriginalFormatError, match="mm_projector_type 'identity'"):
        model_from_original(original, {"mm_projector_type": "identity"}, **parts)
    incomplete = {name: v for name, v in original.items() if "layers.0.mlp" not in name}
    with pytest.raises(MissingWeightsError, match=r"layers\.0\.mlp"):
        model_from_original(incomplete, {"mm_projector_type": "mlp2x_gelu"}, **parts)
    tmp_path.joinpath("config.json").write_text(json.dumps({"model_type": "llava_mpt", "mm_vision_tower": "x"}))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(OriginalFormatError, match="'llava_mpt'"):
        load_original(tmp_path)


def test_a_token_of_the_vocabulary_can_stand_for_the_picture() -> None:
    model, _ = tiny.llava()
    original = to_original(model.state_dict(), linear=False, words=words_of(model))
    settings = {"mm_projector_type": "mlp2x_gelu"}
    text = type(model.config.text_config)(**{**model.config.text_config.to_dict(), "vocab_size": words_of(model)})
    again = model_from_original(
        original, settings, text_config=text, vision_config=model.config.vision_config, image_token_id=3
    )
    assert again.config.image_token_id == 3
    assert again.lm_head.weight.shape == original["lm_head.weight"].shape
    assert not again.generation_config.suppress_tokens
