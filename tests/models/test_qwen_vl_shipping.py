"""Qwen-VL folders in a process without hf_vlp: their own code gives our outputs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, pipeline

from hf_vlp.hub import save_for_hub
from hf_vlp.hub.card import render_card
from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import QwenVLProcessor
from tests.tiny import qwen_vl as tiny

# Runs in a process in which `import hf_vlp` fails, as it does where the package is missing.
SCRIPT = """
import sys
sys.modules["hf_vlp"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=prompt, return_tensors="pt")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is type(model)
saved = dict(inputs)
with torch.no_grad():
    saved["logits"] = model(**inputs).logits
saved["tokens"] = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
model.train()
saved["loss"] = model(**inputs, labels=labels).loss.detach()
save_file({name: value.contiguous().clone() for name, value in saved.items()}, folder + "/theirs.safetensors")
model.save_pretrained(folder + "/again")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped") / "qwen"
    save_for_hub(tiny.model(), tiny.processor(), folder)
    environment = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(folder)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_outputs_without_the_package_are_ours(folder: Path) -> None:
    theirs = load_file(folder / "theirs.safetensors")
    model = QwenVLForConditionalGeneration.from_pretrained(folder).eval()
    processor = QwenVLProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template(
        tiny.messages(("what is it?", 1)), add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=Image.new("RGB", (40, 30), "red"), text=prompt, return_tensors="pt")
    for name, value in inputs.items():
        torch.testing.assert_close(theirs[name], value)
    torch.testing.assert_close(theirs["logits"], model(**inputs).logits, atol=1e-5, rtol=1e-5)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(theirs["tokens"], tokens)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == processor.image_token_id, -100)
    torch.testing.assert_close(theirs["loss"], model(**inputs, labels=labels).loss, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_folder_holds_its_code(folder: Path) -> None:
    code = {"configuration_qwen_vl.py", "modeling_qwen_vl.py", "modeling_qwen_vl_visual.py", "processing_qwen_vl.py"}
    for path in (folder, folder / "again"):
        found = {entry.name for entry in path.glob("*_qwen_vl*.py")}
        # The processor's code travels with the processor.
        assert code - ({"processing_qwen_vl.py"} if path.name == "again" else set()) <= found
        assert not any("training" in name or "conversion" in name for name in found)


@pytest.mark.slow
def test_auto_classes_and_pipelines_need_no_flag_here(folder: Path) -> None:
    import hf_vlp  # noqa: F401

    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is QwenVLForConditionalGeneration
    image = Image.new("RGB", (40, 30), "red")
    captions = pipeline("image-to-text", model=str(folder))([image, image], max_new_tokens=4)
    assert len(captions) == 2 and captions[0] == captions[1]
    answer = pipeline("visual-question-answering", model=str(folder))(image, question="two?", max_new_tokens=3)
    assert isinstance(answer[0]["answer"], str)


@pytest.mark.slow
def test_card_shows_a_snippet_that_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = render_card(folder, repo_id=str(folder))
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 1 and "2308.12966" in card
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    exec(compile(snippets[0], "card of qwen_vl", "exec"), {})
