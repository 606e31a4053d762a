"""The cards of BLIP's folders: their snippets run, and compute what the models were trained to compute."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from hf_vlp.hub import render_card
from hf_vlp.hub.saving import save_for_hub
from hf_vlp.models.blip.backbone_blip import use_tokenizer
from hf_vlp.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from hf_vlp.models.blip.processing_blip import BlipProcessor
from hf_vlp.models.blip.tasks_blip import BlipTasksForQuestionAnswering, BlipTasksForVisualReasoning, tasks_config
from tests.hub import tiny
from tests.tiny.blip import spread_weights

CLASSES = {
    "captioning": BlipForConditionalGeneration,
    "retrieval": BlipForImageTextRetrieval,
    "vqa": BlipForQuestionAnswering,
    "vqa of other widths": BlipTasksForQuestionAnswering,
    "two images": BlipTasksForVisualReasoning,
}


def saved(kind: type, folder: Path) -> tuple[torch.nn.Module, BlipProcessor]:
    """A folder with random weights that differ between inputs, its model and its processor."""
    processor = BlipProcessor.for_image_size(tiny.tokenizer("bert"), tiny.IMAGE_SIZE)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**small, "image_size": tiny.IMAGE_SIZE, "patch_size": 8}
    if kind is BlipTasksForQuestionAnswering:
        vision["hidden_size"] = 48
    text = {**small, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 64}
    config = transformers.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=24)
    use_tokenizer(config, processor.tokenizer)
    torch.manual_seed(0)
    model = spread_weights(kind(tasks_config(config) if kind.__name__.startswith("BlipTasks") else config))
    model.tie_weights()
    save_for_hub(model.eval(), processor, folder)
    return model, processor


def run_snippet(folder: Path, place: Path) -> dict[str, Any]:
    """What the names of the card's snippet stand for at its end."""
    card = render_card(folder, repo_id=str(folder))
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.new("RGB", (40, 30), "red").save(place / "photo.png")
    names: dict[str, Any] = {}
    exec(compile(snippet, f"card of {folder.name}", "exec"), names)
    return names


@pytest.mark.parametrize("name", CLASSES)
def test_the_snippet_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(CLASSES[name], tmp_path / "folder")
    assert "processor" in run_snippet(tmp_path / "folder", tmp_path)


def test_matching_is_asked_with_the_token_it_was_trained_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = saved(BlipForImageTextRetrieval, tmp_path / "folder")
    names = run_snippet(tmp_path / "folder", tmp_path)
    image = Image.open(tmp_path / "photo.png")
    inputs = processor(images=[image, image], text=["a cat", "a dog"], padding=True, return_tensors="pt")
    texts = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        images = model.embed_images(inputs["pixel_values"])
        match = model.matching_probabilities(images, torch.arange(2), *texts)
        cosines = model.similarity(images, model.embed_texts(*texts))
    torch.testing.assert_close(names["match"], match, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(names["cosines"], cosines, rtol=1e-4, atol=1e-5)


def test_questions_are_asked_with_the_token_they_were_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, processor = saved(BlipForQuestionAnswering, tmp_path / "folder")
    names = run_snippet(tmp_path / "folder", tmp_path)
    inputs = processor(images=[Image.open(tmp_path / "photo.png")], text=["what colour is it?"], return_tensors="pt")
    length = names["answers"].shape[1]
    answers = model.generate(**inputs, num_beams=3, count_prompt=False, max_length=length)
    assert names["answers"].tolist() == answers.tolist()
