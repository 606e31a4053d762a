"""Saved folders where hf_vlp is not installed: own types by the code beside them, native ones by transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline

from hf_vlp.models.catalog import ARCHITECTURES
from tests.tiny import clip as tiny

KINDS = ["clip", "clip_resnet", "eva_clip"]

# Runs in a process in which `import hf_vlp` fails, as it does where the package is missing.
SCRIPT = """
import json, sys
sys.modules["hf_vlp"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
for folder in json.loads(sys.argv[1]):
    native = folder.endswith("/clip")
    trust = {} if native else {"trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(folder, **trust)
    texts = ["a red circle", "two green triangles"]
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "green")]
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(folder, **trust).eval()
    zero_shot = AutoModelForZeroShotImageClassification.from_pretrained(folder, **trust).eval()
    assert type(model).__name__ == type(zero_shot).__name__
    with torch.no_grad():
        outputs = model(**inputs)
    assert torch.equal(outputs.logits_per_image, zero_shot(**inputs).logits_per_image)
    classify = pipeline("zero-shot-image-classification", model=folder, **trust)
    scores = {row["label"]: row["score"] for row in classify(images[0], candidate_labels=texts)}
    saved = {name: outputs[name].contiguous() for name in ("logits_per_image", "image_embeds", "text_embeds")}
    saved["scores"] = torch.tensor([scores[text] for text in texts])
    save_file(saved | dict(inputs), folder + "/../" + folder.split("/")[-1] + ".safetensors")
    # What was loaded as remote code saves itself whole again.
    model.save_pretrained(folder + "-again")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a type, and the outputs of a process without hf_vlp beside it."""
    root = tmp_path_factory.mktemp("shipped")
    processor = tiny.processor()
    for kind in KINDS:
        torch.manual_seed(0)
        config = tiny.config_of(kind)
        for name, value in tiny.text_config_of(processor, max_position_embeddings=64).items():
            setattr(config.text_config, name, value)
        ARCHITECTURES[kind].load("model")(config).save_pretrained(root / kind)
        processor.save_pretrained(root / kind)
    environment = {"HF_HOME": str(root / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, "-I", "-c", SCRIPT, json.dumps([str(root / kind) for kind in KINDS])]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: root / kind for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_without_the_package_are_ours(kind: str, folders: dict[str, Path]) -> None:
    theirs = load_file(folders[kind].parent / f"{kind}.safetensors")
    model = ARCHITECTURES[kind].load("model").from_pretrained(folders[kind]).eval()
    inputs = {name: theirs[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    with torch.no_grad():
        ours = model(**inputs)
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-5, rtol=1e-5)
    images = model.embed_images(inputs["pixel_values"])
    texts = model.embed_texts(inputs["input_ids"], inputs["attention_mask"])
    logits = model.logit_scale.exp() * model.similarity(images, texts)
    torch.testing.assert_close(logits, theirs["logits_per_image"], atol=1e-4, rtol=1e-4)
    assert theirs["scores"].sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_folder_holds_what_it_needs_and_nothing_of_training(kind: str, folders: dict[str, Path]) -> None:
    files = {path.name for path in folders[kind].iterdir()}
    code = set() if kind == "clip" else {f"configuration_{kind}.py", f"modeling_{kind}.py"}
    shared = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == shared | code
    auto_map = json.loads((folders[kind] / "config.json").read_text()).get("auto_map", {})
    assert set(auto_map) == (
        set() if kind == "clip" else {"AutoConfig", "AutoModel", "AutoModelForZeroShotImageClassification"}
    )
    again = {path.name for path in folders[kind].with_name(f"{kind}-again").iterdir()}
    assert again == {"config.json", "model.safetensors"} | code
    weights = [
        load_file(folder / "model.safetensors") for folder in (folders[kind], folders[kind].with_name(f"{kind}-again"))
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_auto_classes_need_no_flag_here(kind: str, folders: dict[str, Path]) -> None:
    import hf_vlp  # noqa: F401

    model = AutoModel.from_pretrained(folders[kind])
    if kind != "clip":
        assert isinstance(model, ARCHITECTURES[kind].load("model"))
        assert isinstance(
            AutoModelForZeroShotImageClassification.from_pretrained(folders[kind]), ARCHITECTURES[kind].load("model")
        )
    processor = AutoProcessor.from_pretrained(folders[kind])
    classify = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )
    assert len(classify(tiny.images(1)[0], candidate_labels=["a red circle", "two green triangles"])) == 2


def test_code_loads_with_weights_of_another_dtype(tmp_path: Path) -> None:
    """The default of transformers 5 keeps the checkpoint's dtype; embeddings are float32 all the same."""
    for kind in KINDS:
        model = ARCHITECTURES[kind].load("model")(tiny.config_of(kind))
        model.save_pretrained(tmp_path / kind)
        weights = load_file(tmp_path / kind / "model.safetensors")
        half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights.items()}
        save_file(half, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        loaded = type(model).from_pretrained(tmp_path / kind).eval()
        assert loaded.dtype == torch.bfloat16
        batch = tiny.batch()
        embeds = loaded.embed_images(batch["pixel_values"].bfloat16()).itc
        assert embeds.dtype == torch.float32
        torch.testing.assert_close(embeds.norm(dim=1), torch.ones(4))
