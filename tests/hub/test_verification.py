"""Saved folders where this package is not installed: they load, compute the same, and their cards' snippets run.

All folders are loaded in one process, since importing torch and transformers takes most of its time.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import pipeline

import hf_vlp
from hf_vlp.hub import VerificationError, probe, save_for_hub, verify_folder
from hf_vlp.hub.verification import card_snippets, run_without_package, write_snippets
from tests.hub import tiny
from tests.hub.models import CAPTIONERS, OWN_CODE, RETRIEVERS, SAVED

_PIPELINES = """
import json, sys
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

results = {}
folder, name, kind, own = sys.argv[1:5]
pictures = [Image.open(path) for path in sys.argv[5:]]
flag = {"trust_remote_code": True}
results["config"] = type(AutoConfig.from_pretrained(folder, **(flag if own == "own" else {}))).__name__
if kind == "captioning":
    pipe = pipeline("image-to-text", model=folder, max_new_tokens=5, **flag)
    results["alone"] = [pipe(picture) for picture in pictures]
    results["batch"] = pipe(sys.argv[5:], batch_size=3)
    results["prompted"] = pipe(pictures[:2], text="a photo of", num_beams=2, max_new_tokens=4)
    ask = pipeline("visual-question-answering", model=folder, **flag)
    results["answers"] = ask(pictures[0], question="what color is the dot?", max_new_tokens=3)
elif kind == "retrieval":
    pipe = pipeline("image-text-matching", model=folder, **flag)
    results["matching"] = pipe(pictures[0], text=["a red circle above a blue square", "two green triangles"])
else:
    pipe = pipeline("zero-shot-image-classification", model=folder, **(flag if own == "own" else {}))
    labels = ["red circle", "blue square"]
    results["zero-shot"] = [pipe(picture, candidate_labels=labels) for picture in pictures]
    results["batch"] = pipe(pictures, candidate_labels=labels, batch_size=2)
results["module"] = type(pipe).__module__.split(".")[0]
results["model"] = type(pipe.model).__module__.split(".")[0]
print(json.dumps(results))
"""


def kind_of(name: str) -> str:
    return "captioning" if name in CAPTIONERS else "retrieval" if name in RETRIEVERS else "zero-shot"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, colour in enumerate(("red", "blue", "green")):
        paths.append(str(folder / f"{colour}.png"))
        tiny.image(colour, (20 + 7 * index, 24)).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any, Any]]:
    root = tmp_path_factory.mktemp("folders")
    folders = {}
    for name, make in SAVED.items():
        model, processor = make()
        folders[name] = (save_for_hub(model, processor, root / name, repo_id=f"org/{name}"), model, processor)
    return folders


@pytest.fixture(scope="module")
def elsewhere(
    saved: dict[str, tuple[Path, Any, Any]], pictures: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """For each folder, what a process without hf_vlp computed."""
    scratch = tmp_path_factory.mktemp("elsewhere")
    script = scratch / "pipelines.py"
    script.write_text(_PIPELINES)
    scripts: list[list[str]] = []
    snippets: dict[str, int] = {}
    for name, (folder, _, _) in saved.items():
        own = "own" if name in OWN_CODE else "native"
        scripts.append([probe.__file__, str(folder), str(scratch / f"{name}.safetensors")])
        scripts.append([str(script), str(folder), name, kind_of(name), own, *pictures])
        (scratch / name).mkdir()
        written = write_snippets(folder, scratch / name)
        (scratch / name / "photo.png").replace(scratch / "photo.png")
        snippets[name] = len(written)
        scripts += [[str(path)] for path in written]
    printed = iter(run_without_package(scripts, cwd=scratch, timeout=500))
    results = {}
    for name in saved:
        assert next(printed) == ""
        outputs = json.loads(next(printed))
        results[name] = {
            "outputs": load_file(scratch / f"{name}.safetensors"),
            "pipelines": outputs,
            "snippets": [next(printed) for _ in range(snippets[name])],
        }
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_outputs_are_those_of_the_model_that_was_saved(
    name: str, saved: dict[str, tuple[Path, Any, Any]], elsewhere: dict[str, dict[str, Any]]
) -> None:
    _, model, processor = saved[name]
    expected, found = probe.probe(model, processor), elsewhere[name]["outputs"]
    assert set(found) == set(expected)
    for key, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_the_snippets_of_the_card_run(name: str, elsewhere: dict[str, dict[str, Any]]) -> None:
    printed = elsewhere[name]["snippets"]
    assert len(printed) == 2
    assert all(text.strip() for text in printed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAVED)
def test_pipelines_give_the_same_with_and_without_the_package(
    name: str, saved: dict[str, tuple[Path, Any, Any]], elsewhere: dict[str, dict[str, Any]], pictures: list[str]
) -> None:
    """Here by the installed pipelines and no flag, there by the files that the folder carries."""
    folder = str(saved[name][0])
    there = elsewhere[name]["pipelines"]
    own = name in OWN_CODE
    assert there["model"] == ("transformers_modules" if own else "transformers")
    if kind_of(name) == "captioning":
        assert there["module"] == "transformers_modules"
        here = pipeline("image-to-text", model=folder, max_new_tokens=5)
        assert type(here).__module__ == "hf_vlp.pipelines.image_to_text"
        assert [here(path) for path in pictures] == there["alone"] == there["batch"]
        assert here(pictures[:2], text="a photo of", num_beams=2, max_new_tokens=4) == there["prompted"]
        answers = pipeline("vqa", model=folder)(pictures[0], question="what color is the dot?", max_new_tokens=3)
        assert answers == there["answers"]
    elif kind_of(name) == "retrieval":
        assert there["module"] == "transformers_modules"
        texts = ["a red circle above a blue square", "two green triangles"]
        compare(pipeline("image-text-matching", model=folder)(pictures[0], text=texts), there["matching"])
    else:
        here = pipeline("zero-shot-image-classification", model=folder)
        labels = ["red circle", "blue square"]
        for path, single, batched in zip(pictures, there["zero-shot"], there["batch"], strict=True):
            compare(here(path, candidate_labels=labels), single)
            compare(batched, single)


def compare(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert value == (pytest.approx(other[key], abs=1e-5) if isinstance(value, float) else other[key])


@pytest.mark.parametrize("name", CAPTIONERS)
def test_the_pipeline_captions_as_our_processor_and_model_do(
    name: str, saved: dict[str, tuple[Path, Any, Any]], pictures: list[str]
) -> None:
    folder, model, processor = saved[name]
    from PIL import Image

    inputs = processor(images=[Image.open(path) for path in pictures], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8)
    prompt = inputs["input_ids"].shape[1]
    if not model.config.text_config.is_encoder_decoder and tokens.shape[1] > 8:
        tokens = tokens[:, prompt:]
    expected = [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    captions = pipeline("image-to-text", model=str(folder))(pictures, max_new_tokens=8, batch_size=3)
    assert [caption[0]["generated_text"] for caption in captions] == expected


@pytest.mark.slow
def test_verify_folder(saved: dict[str, tuple[Path, Any, Any]], tmp_path: Path) -> None:
    _, model, processor = saved["eva_clip"]
    model.train()
    folder = save_for_hub(model, processor, tmp_path / "eva", verify=True)
    assert model.training
    model.eval()

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("visual_projection.weight"))
    weights[name] = weights[name].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="differs by .* from the model it was saved from"):
        verify_folder(folder, model=model, processor=processor, snippets=False)

    code = folder / "modeling_eva_clip.py"
    code.write_text("from hf_vlp.models.catalog import ARCHITECTURES\n" + code.read_text())
    with pytest.raises(VerificationError, match="(?s)failed without hf_vlp.*hf_vlp"):
        verify_folder(folder, model=model, processor=processor)


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(VerificationError, match=r"sleeper\.py did not end within 1 s"):
        run_without_package([[str(script)]], cwd=tmp_path, timeout=1)


def test_the_package_is_really_missing(tmp_path: Path) -> None:
    script = tmp_path / "importer.py"
    script.write_text("import hf_vlp")
    assert hf_vlp.__version__
    with pytest.raises(VerificationError, match="(?s)ModuleNotFoundError.*hf_vlp"):
        run_without_package([[str(script)]], cwd=tmp_path)


def test_snippets_are_read_off_the_card() -> None:
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n\n```python\ny = 2\nz = 3\n```\n"
    assert card_snippets(text) == ["x = 1\n", "y = 2\nz = 3\n"]
