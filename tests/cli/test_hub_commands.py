"""`hf-vlp card`, `push`, `convert`, `list`."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from hf_vlp.cli.convert import FORMATS
from hf_vlp.cli.errors import EXIT_FAILED, EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.models.catalog import ARCHITECTURES
from tests.hub import tiny
from tests.tiny import blip2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(tiny.save(tiny.blip2(), tmp_path / "model"))


# card


def test_a_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.yaml").write_text("data: Scenes.\nlicense: other\n")
    result = {"task": "captioning", "data": "org/coco", "split": "test", "metrics": {"cider": 1.5}}
    (tmp_path / "coco.json").write_text(json.dumps(result))
    line = ["card", str(folder), "--card", str(tmp_path / "card.yaml"), "--license", "mit", "--repo_id", "org/model"]
    assert main([*line, "--results", str(tmp_path / "coco.json"), "--dataset_id", "org/coco"]) == 0
    assert capsys.readouterr().out == f"{folder / 'README.md'}\n"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit"
    assert card.data.eval_results[0].metric_value == 1.5
    assert "Scenes." in card.text
    assert 'model="org/model"' in card.text
    assert (folder / ".eval_results" / "org-coco.yaml").is_file()
    assert (folder / "image_to_text.py").is_file()
    assert "image-to-text" in json.loads((folder / "config.json").read_text())["custom_pipelines"]


def test_print_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(["card", str(folder), "--print"]) == 0
    assert capsys.readouterr().out.startswith("---\n")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_card_failures(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(tmp_path / "nowhere")]) == EXIT_FAILED
    assert "has no config.json" in capsys.readouterr().err
    (tmp_path / "card.yaml").write_text("licence: mit\n")
    assert main(["card", str(folder), "--card", str(tmp_path / "card.yaml")]) == EXIT_FAILED
    assert "unknown field(s) ['licence'] of a CardData" in capsys.readouterr().err
    assert main(["card", str(folder), "--results", str(tmp_path / "none.json")]) == EXIT_FAILED
    assert not (folder / "README.md").exists()


# push


def test_push_writes_the_card_that_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed = []

    def push(path: Path, repo_id: str, **options: object) -> str:
        pushed.append((path, repo_id, options))
        return "https://example.org/commit"

    monkeypatch.setattr("hf_vlp.hub.pushing.push", push)
    assert main(["push", str(folder), "org/name", "--private", "--license", "mit"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "https://example.org/commit\n"
    assert "wrote " in printed.err
    assert ModelCard.load(folder / "README.md").data.license == "mit"
    assert pushed[0][:2] == (folder, "org/name")
    assert pushed[0][2]["private"] is True
    assert main(["push", str(folder), "org/name"]) == 0
    assert pushed[1][2]["private"] is None
    assert capsys.readouterr().err == ""


def test_push_failures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path / "nowhere"), "org/name"]) == EXIT_FAILED
    assert "nowhere is no folder" in capsys.readouterr().err
    assert main(["push", str(folder), "org/na--me"]) == EXIT_FAILED
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-vlp push: error: 'org/na--me' is no name for a repository")
    (folder / "model.safetensors").write_bytes(b"half")
    assert main(["push", str(folder), "org/name"]) == EXIT_FAILED
    assert "model.safetensors is cut off or damaged" in capsys.readouterr().err
    assert main(["push", str(folder)]) == EXIT_USAGE


# convert


def test_clip_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.clip()
    model.save_pretrained(tmp_path / "native")
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-openai-clip", str(tmp_path / "native"), str(original)]) == 0
    assert "visual.conv1.weight" in load_file(original)
    line = ["convert", "openai-clip", str(original), str(back), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*line, "--vision_heads", "4", "--text_heads", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(back)
    loaded = CLIPModel.from_pretrained(back)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (back / "README.md").is_file()
    assert (back / "processor_config.json").is_file()


def test_blip2_there_and_back(tmp_path: Path) -> None:
    model, processor = blip2.generation_model("opt"), blip2.generation_processor("opt")
    for layer in model.vision_model.encoder.layers:
        # The original has no such bias, which native folders hold as zeros.
        width = layer.self_attn.qkv.bias.numel() // 3
        layer.self_attn.qkv.bias.data[width : 2 * width] = 0
    model.save_pretrained(tmp_path / "native")
    model.language_model.save_pretrained(tmp_path / "opt")
    processor.tokenizer.save_pretrained(tmp_path / "opt")
    original, back = tmp_path / "original.safetensors", tmp_path / "back"
    assert main(["convert", "to-lavis-blip2", str(tmp_path / "native"), str(original)]) == 0
    heads = str(model.config.vision_config.num_attention_heads)
    line = ["convert", "lavis-blip2", str(original), str(back), "--language_model", str(tmp_path / "opt")]
    assert main([*line, "--vision_heads", heads]) == 0
    stored = load_file(back / "model.safetensors")
    for name, value in load_file(tmp_path / "native" / "model.safetensors").items():
        if not name.startswith("language_model."):
            assert torch.equal(stored[name], value), name
    assert json.loads((back / "processor_config.json").read_text())["num_query_tokens"] == blip2.QUERIES


def test_convert_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "openai", "a", "b"]) == EXIT_USAGE
    assert "there is no format 'openai'; there are: openai-clip" in capsys.readouterr().err
    assert main(["convert", "openai-clip", str(tmp_path / "no.pt"), str(tmp_path / "out")]) == EXIT_FAILED
    assert "there is no file or folder" in capsys.readouterr().err
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("mine")
    line = ["convert", "openai-clip", str(tmp_path / "foreign.safetensors")]
    assert main([*line, str(tmp_path / "taken")]) == EXIT_FAILED
    assert "taken exists; name a place where nothing is" in capsys.readouterr().err
    assert main([*line, str(tmp_path / "out")]) == EXIT_FAILED
    assert "hf-vlp convert: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_a_function_and_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(FORMATS[name].load())
    assert main(["convert", name, "--help"]) == 0
    assert FORMATS[name].summary in capsys.readouterr().out


# list


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    for model_type in ARCHITECTURES:
        assert model_type in text
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found["architectures"]] == list(ARCHITECTURES)
    assert set(found["formats"]) == set(FORMATS)
