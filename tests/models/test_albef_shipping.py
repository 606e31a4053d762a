"""ALBEF folders in a process without hf_vlp: their own code gives our outputs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification, BertTokenizer, pipeline

from hf_vlp.hub.card import render_card
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval, AlbefModel
from hf_vlp.models.albef.modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
)
from hf_vlp.models.albef.processing_albef import AlbefProcessor
from tests.tiny import albef as tiny

CLASSES = {
    "base": AlbefModel,
    "retrieval": AlbefForImageTextRetrieval,
    "vqa": AlbefForQuestionAnswering,
    "nlvr": AlbefForVisualReasoning,
    "ve": AlbefForVisualEntailment,
}
TEXTS = ["a red circle", "two green triangles"]

# Runs in a process in which `import hf_vlp` fails, as it does where the package is missing.
SCRIPT = """
import json, sys
sys.modules["hf_vlp"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
root, texts = sys.argv[1], json.loads(sys.argv[2])
images = [Image.new("RGB", (40, 30), color) for color in ("red", "green")]
processor = AutoProcessor.from_pretrained(root + "/retrieval", trust_remote_code=True)
inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
saved = dict(inputs)
models = {name: AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True).eval()
          for name in ("base", "retrieval", "vqa", "nlvr", "ve")}
with torch.no_grad():
    saved["base"] = models["base"](**inputs).last_hidden_state
    output = models["retrieval"](**inputs, matching=True)
    saved["retrieval"], saved["itm"] = output.logits_per_image, output.itm_logits
    saved["maps"] = models["retrieval"].grounding_maps(**inputs).maps
    saved["vqa"] = models["vqa"].generate(**inputs, num_beams=2, max_new_tokens=4)
    saved["ve"] = models["ve"](**inputs).logits
    pairs = dict(inputs, pixel_values=inputs["pixel_values"][None].repeat(2, 1, 1, 1, 1))
    saved["nlvr"] = models["nlvr"](**pairs).logits
zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(root + "/retrieval", trust_remote_code=True)
assert type(zero_shot) is type(models["retrieval"])
classify = pipeline("zero-shot-image-classification", model=root + "/retrieval", trust_remote_code=True)
scores = {row["label"]: row["score"] for row in classify(images[0], candidate_labels=texts)}
saved["scores"] = torch.tensor([scores[text] for text in texts])
save_file({name: value.contiguous().clone() for name, value in saved.items()}, root + "/theirs.safetensors")
models["vqa"].save_pretrained(root + "/vqa-again")
processor.save_pretrained(root + "/vqa-again")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class, and the outputs of a process without hf_vlp beside them."""
    root = tmp_path_factory.mktemp("shipped")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "green", "triangles", "."]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    processor = AlbefProcessor.for_image_size(tokenizer, tiny.IMAGE_SIZE)
    for name, cls in CLASSES.items():
        torch.manual_seed(0)
        model = tiny.spread_weights(cls(tiny.albef_config(images_per_text=2 if name == "nlvr" else 1)))
        model.tie_weights()
        model.save_pretrained(root / name)
        processor.save_pretrained(root / name)
    environment = {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, str(root), json.dumps(TEXTS)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
def test_outputs_without_the_package_are_ours(root: Path) -> None:
    theirs = load_file(root / "theirs.safetensors")
    inputs = {name: theirs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    models = {name: cls.from_pretrained(root / name).eval() for name, cls in CLASSES.items()}
    pairs = dict(inputs, pixel_values=inputs["pixel_values"][None].repeat(2, 1, 1, 1, 1))
    with torch.no_grad():
        retrieval = models["retrieval"](**inputs, matching=True)
        ours = {
            "base": models["base"](**inputs).last_hidden_state,
            "retrieval": retrieval.logits_per_image,
            "itm": retrieval.itm_logits,
            "maps": models["retrieval"].grounding_maps(**inputs).maps,
            "vqa": models["vqa"].generate(**inputs, num_beams=2, max_new_tokens=4),
            "ve": models["ve"](**inputs).logits,
            "nlvr": models["nlvr"](**pairs).logits,
        }
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert theirs["scores"].sum().item() == pytest.approx(1, abs=1e-3)
    processor = AlbefProcessor.from_pretrained(root / "base")
    assert torch.equal(processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"], inputs["input_ids"])


@pytest.mark.slow
def test_folder_holds_its_code_and_nothing_of_training(root: Path) -> None:
    code = {f"{kind}_albef.py" for kind in ("configuration", "modeling", "processing")}
    code |= {f"modeling_albef_{part}.py" for part in ("packing", "text", "grounding")}
    shared = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (root / "retrieval").iterdir()} == shared | code
    for name in ("vqa", "vqa-again"):
        files = {path.name for path in (root / name).iterdir()} - {"__pycache__", "generation_config.json"}
        assert files == shared | code | {"modeling_albef_tasks.py"}
    auto_map = json.loads((root / "retrieval" / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForZeroShotImageClassification"] == "modeling_albef.AlbefForImageTextRetrieval"
    weights = [load_file(root / name / "model.safetensors") for name in ("vqa", "vqa-again")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_auto_classes_need_no_flag_here(root: Path) -> None:
    import hf_vlp  # noqa: F401

    for name, cls in CLASSES.items():
        assert type(AutoModel.from_pretrained(root / name)) is cls
    assert isinstance(
        AutoModelForZeroShotImageClassification.from_pretrained(root / "retrieval"), AlbefForImageTextRetrieval
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_card_shows_a_snippet_that_runs(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = render_card(root / name, repo_id=str(root / name))
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(snippets) == 1 and "2107.07651" in card
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.png")
    exec(compile(snippets[0], f"card of {name}", "exec"), {})
    assert (tmp_path / "a_cat.png").exists() == (name == "retrieval")


@pytest.mark.slow
def test_pipelines_of_the_package(root: Path) -> None:
    import hf_vlp  # noqa: F401

    image = Image.new("RGB", (40, 30), "red")
    match = pipeline("image-text-matching", model=str(root / "retrieval"))(image, text=TEXTS)
    model = AlbefForImageTextRetrieval.from_pretrained(root / "retrieval").eval()
    inputs = AlbefProcessor.from_pretrained(root / "base")(
        images=[image] * 2, text=TEXTS, padding=True, return_tensors="pt"
    )
    expected = model(**inputs, matching=True).itm_logits.softmax(-1)[:, 1]
    assert [row["score"] for row in match] == pytest.approx(expected.tolist(), abs=1e-5)
    answer = pipeline("image-question-answering", model=str(root / "vqa"))(image, question="two?", max_new_tokens=2)
    assert isinstance(answer[0]["answer"], str)
