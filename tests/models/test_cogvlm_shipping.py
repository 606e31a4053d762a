"""CogVLM folders in a process without hf_vlp, and the original format there and back."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_vlp.hub import save_for_hub
from hf_vlp.models.cogvlm.conversion_cogvlm import (
    config_to_original,
    from_original,
    model_from_original,
    read_original,
    save_original,
)
from hf_vlp.models.cogvlm.modeling_cogvlm import CogVLMForConditionalGeneration
from hf_vlp.models.cogvlm.processing_cogvlm import CogVLMProcessor
from tests.tiny import cogvlm as tiny

# Runs in a process in which `import hf_vlp` fails, as it does where the package is missing.
SCRIPT = """
import sys
sys.modules["hf_vlp"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model)
images = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
inputs = processor(images, ["what is it?", "is it a long question?"])
with torch.no_grad():
    saved = dict(inputs, logits=model(**inputs).logits)
    saved["loss"] = model(**processor.training_inputs(images, ["a", "b"])).loss
    saved["ids"] = model.generate(**inputs, max_new_tokens=4, do_sample=False)
save_file({name: value.contiguous().clone() for name, value in saved.items()}, out)
model.save_pretrained(folder + "-again")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shipped") / "model"
    model = tiny.model(2)
    processor = CogVLMProcessor.for_model(tiny.byte_tokenizer(), model.config)
    model.config.image_token_id = processor.image_token_id
    save_for_hub(model, processor, root)
    return root


@pytest.mark.slow
def test_outputs_without_the_package_are_ours(folder: Path, tmp_path: Path) -> None:
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, str(folder), str(tmp_path / "theirs.safetensors")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "theirs.safetensors")
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert isinstance(model, CogVLMForConditionalGeneration), "with hf_vlp imported no flag is needed"
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
    inputs = processor(images, ["what is it?", "is it a long question?"])
    for name, value in inputs.items():
        assert torch.equal(theirs[name], value), name
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], model(**inputs).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs["loss"], model(**processor.training_inputs(images, ["a", "b"])).loss)
        assert torch.equal(theirs["ids"], model.generate(**inputs, max_new_tokens=4, do_sample=False))
    again = load_file(Path(f"{folder}-again") / "model.safetensors")
    assert again.keys() == load_file(folder / "model.safetensors").keys()


def test_folder_holds_its_code(folder: Path) -> None:
    code = {f"modeling_cogvlm{part}.py" for part in ("", "_vision", "_experts")}
    assert code | {"configuration_cogvlm.py", "processing_cogvlm.py", "README.md"} <= {
        p.name for p in folder.iterdir()
    }
    config = json.loads((folder / "config.json").read_text())
    reference = "modeling_cogvlm.CogVLMForConditionalGeneration"
    assert {config["auto_map"][name] for name in ("AutoModel", "AutoModelForImageTextToText")} == {reference}


def test_card_shows_snippets_that_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (folder / "README.md").read_text()
    assert "2311.03079" in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert snippets
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    for snippet in snippets:
        snippet = snippet.replace('"model"', repr(str(folder)))
        exec(compile(snippet, "card", "exec"), {})


@pytest.mark.parametrize("version", [1, 2])
def test_the_original_format_there_and_back(version: int, tmp_path: Path) -> None:
    model = tiny.model(version)
    # The original code has heads of width / heads only, and as many key heads as query heads in version 1.
    text = tiny.text_config(head_dim=8, num_key_value_heads=2 if version == 2 else 4)
    config = type(model.config)(
        vision_config=tiny.vision_config(), text_config=text, downsample=version,
        visual_expert_qkv_bias=version == 2, image_token_id=tiny.PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    model = CogVLMForConditionalGeneration(config).eval()
    tiny.spread_weights(model)
    save_original(model, tmp_path)
    state, original = read_original(tmp_path)
    again = model_from_original(state, original)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    batch = tiny.rows(model, [[2, 0, 3]])
    types = (batch["input_ids"] == tiny.IMAGE).long()
    batch["input_ids"][types == 1] = tiny.PAD
    with torch.no_grad():
        ours = model(batch["input_ids"], batch["pixel_values"], token_type_ids=types).logits
        theirs = again(batch["input_ids"], batch["pixel_values"], token_type_ids=types).logits
    assert torch.equal(ours, theirs)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        read_original(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no \\*\\.safetensors"):
        read_original(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no CogVLM checkpoint"):
        model_from_original(*read_original(tmp_path))
    model = tiny.model(1)
    with pytest.raises(ValueError, match="CogVLM has no tensor 'model.extra'"):
        from_original({"model.extra": torch.zeros(1)}, model.config)
    with pytest.raises(ValueError, match="grouped-query"):
        config_to_original(model.config)
    with pytest.raises(ValueError, match="only CogVLM and CogVLM2 on a Llama"):
        config_to_original(tiny.model(2, model_type="qwen2").config)


def test_the_command_converts_both_ways(tmp_path: Path) -> None:
    from hf_vlp.cli.main import main

    config = tiny.model(2).config
    config.text_config = tiny.text_config(head_dim=8)
    torch.manual_seed(0)
    CogVLMForConditionalGeneration(config).save_pretrained(tmp_path / "ours")
    assert main(["convert", "to-cogvlm", str(tmp_path / "ours"), str(tmp_path / "original")]) == 0
    tiny.byte_tokenizer().save_pretrained(tmp_path / "original-words")
    words = ["--tokenizer", str(tmp_path / "original-words")]
    assert main(["convert", "cogvlm", str(tmp_path / "original"), str(tmp_path / "back"), *words]) == 0
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    processor = AutoProcessor.from_pretrained(tmp_path / "back")
    assert processor.image_token_id == json.loads((tmp_path / "back" / "config.json").read_text())["image_token_id"]
