"""Model cards: what they say, where it comes from, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from transformers import TrainingArguments

from hf_vlp.hub import (
    CardData,
    Metric,
    complete_folder,
    metrics_from_result,
    name_repository,
    recipe_of,
    render_card,
    write_card,
)
from hf_vlp.models.catalog import ARCHITECTURES, is_training_role
from hf_vlp.resources import resource_folder
from tests.hub import tiny

CARD = CardData(
    license="mit",
    name="Captions of shapes",
    data="20,000 scenes drawn by a program.",
    datasets=["org/shapes"],
    recipe={"stage 1": {"learning_rate": 1e-4, "steps": 300}, "stage 2": "As stage 1, on the language model."},
    command="hf-vlp train blip2_stage2 --output_dir outputs/blip2",
    metrics=[
        Metric("cider", 1.25, "COCO captions", dataset_id="org/coco", split="test", label="CIDEr", notes="beam 5"),
        Metric("bleu_4", 0.4, "COCO captions", dataset_id="org/coco", split="test"),
        Metric("object_accuracy", 0.93, "Shapes", split="unseen"),
    ],
    base_models=["facebook/opt-125m"],
    language=["en"],
    tags=["captioning"],
    limits="It knows three shapes.",
    authors="A. Tester",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tiny.save(tiny.blip2(), tmp_path_factory.mktemp("blip2")))
    complete_folder(folder)
    return folder


def folder_of(model_type: str, architecture: str, tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "architectures": [architecture]}))
    return tmp_path


def test_metadata(folder: Path) -> None:
    card = ModelCard(render_card(folder, CARD, "org/blip2"))
    data = card.data
    assert data.license == "mit"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-to-text"
    assert data.datasets == ["org/shapes"]
    assert data.base_model == ["facebook/opt-125m"]
    assert data.language == ["en"]
    assert {"hf_vlp", "blip-2", "captioning"} <= set(data.tags)
    assert data.model_name == "Captions of shapes"
    results = {(result.dataset_type, result.metric_type): result for result in data.eval_results}
    assert results["org/coco", "cider"].metric_value == 1.25
    assert results["org/coco", "cider"].metric_name == "CIDEr"
    assert results["org/coco", "bleu_4"].dataset_split == "test"
    assert results["shapes", "object_accuracy"].metric_value == 0.93
    assert all(result.task_type == "image-to-text" for result in data.eval_results)


def test_text(folder: Path) -> None:
    text = render_card(folder, CARD, "org/blip2")
    for said in (
        "# Captions of shapes", "20,000 scenes drawn by a program.", "| learning_rate | 0.0001 |", "| steps | 300 |",
        "As stage 1, on the language model.", "hf-vlp train blip2_stage2", "| CIDEr | 1.25 | COCO captions | test |",
        "It knows three shapes.", "`mit`, as chosen by A. Tester", "arxiv.org/abs/2301.12597", 'model="org/blip2"',
        "@inproceedings{li2023blip2", "4 queries",
    ):  # fmt: skip
        assert said in text, said
    assert "{{" not in text.replace("{{BLIP-2}:", "")
    model, _ = tiny.blip2()
    assert f"{model.num_parameters():,} parameters" in text


def test_nothing_is_made_up(folder: Path) -> None:
    text = render_card(folder)
    assert ModelCard(text).data.license == "unknown"
    assert ModelCard(text).data.eval_results is None
    assert "has not chosen a licence" in text
    assert text.count("Not stated by the author") == 2
    assert "No results are given." in text


def test_eval_results(folder: Path) -> None:
    path = write_card(folder, CARD, "org/blip2")
    assert path == folder / "README.md"
    files = list((folder / ".eval_results").iterdir())
    assert [file.name for file in files] == ["org-coco.yaml"], "Shapes is not on the Hub"
    entries = parse_eval_result_entries(yaml.safe_load(files[0].read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("org/coco", "default", 1.25),
        ("org/coco", "default", 0.4),
    ]
    assert entries[0].notes == "CIDEr; test; beam 5"


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda architecture: architecture.model_type)
def test_every_architecture_and_role(architecture: Any, tmp_path: Path) -> None:
    for role, reference in architecture.classes.items():
        if role in ("config", "processor") or is_training_role(role):
            continue
        folder = folder_of(architecture.model_type, reference.split(":")[1], tmp_path)
        text = render_card(folder, CARD, "org/name")
        assert ModelCard(text).data.pipeline_tag
        assert architecture.title in text
        assert "```python" in text
        assert "## Limits\n\n- " in text
        assert "```bibtex\n@" in text


def entries_of(text: str) -> list[dict[str, str]]:
    """Reads BibTeX as its parser does, brace by brace; an entry that is not whole is an error."""
    entries = []
    while text := text.strip():
        head = re.match(r"@\w+\{[\w-]+,", text)
        assert head, f"no entry begins here: {text[:60]!r}"
        entry, text = {}, text[head.end() :]
        while not text.lstrip().startswith("}"):
            name = re.match(r"\s*(\w+)\s*=\s*\{", text)
            assert name, f"no field begins here: {text[:60]!r}"
            depth, end = 1, name.end()
            while depth:
                assert end < len(text), f"{name[1]} is not closed"
                depth += {"{": 1, "}": -1}.get(text[end], 0)
                end += 1
            entry[name[1]] = text[name.end() : end - 1]
            text = text[end:].removeprefix(",")
        entries.append(entry)
        text = text.lstrip()[1:]
    return entries


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda architecture: architecture.model_type)
def test_citations_are_whole(architecture: Any, tmp_path: Path) -> None:
    text = render_card(folder_of(architecture.model_type, "", tmp_path), CARD, "org/name")
    (block,) = re.findall(r"```bibtex\n(.*?)```", text, re.DOTALL)
    assert block.count("{") == block.count("}")
    for entry in entries_of(block):
        assert {"title", "author", "year"} <= set(entry)
        assert all(value.strip() for value in entry.values())
        assert entry["title"].count("{") == entry["title"].count("}")


@pytest.mark.parametrize("model_type", ["clip", "clip_resnet", "eva_clip", "align", "blip-2", "blip2_any_vision"])
def test_a_template_an_architecture(model_type: str) -> None:
    assert (resource_folder("model_cards") / f"{model_type}.md").is_file()


def test_recipe_of_training_arguments(tmp_path: Path) -> None:
    recipe = recipe_of(TrainingArguments(output_dir=str(tmp_path), learning_rate=3e-4, seed=7, use_cpu=True))
    assert recipe["learning_rate"] == 3e-4
    assert recipe["seed"] == 7
    assert recipe["lr_scheduler_type"] == "linear"
    assert not {"bf16", "fp16", "max_steps"} & set(recipe)


def test_metrics_of_an_evaluation() -> None:
    result = {
        "task": "retrieval",
        "data": "org/flickr30k",
        "split": "test",
        "metrics": {"t2i_r1_itc": 0.5, "t2i_r1_itm": 0.625},
    }
    metrics = metrics_from_result(result, dataset_id="org/flickr30k")
    assert [(metric.name, metric.value) for metric in metrics] == [("t2i_r1_itc", 0.5), ("t2i_r1_itm", 0.625)]
    assert {metric.split for metric in metrics} == {"test"}
    assert {metric.dataset_id for metric in metrics} == {"org/flickr30k"}
    with pytest.raises(ValueError, match="no result of an evaluation"):
        metrics_from_result({"loss": 1.0})


def test_a_card_file(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("license: mit\ndata: Shapes.\nmetrics:\n- {name: cider, value: 1.5, dataset: COCO}\n")
    card = CardData.from_file(path)
    assert card == CardData(license="mit", data="Shapes.", metrics=[Metric("cider", 1.5, "COCO")])


# Failures


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("licence: mit", r"unknown field\(s\) \['licence'\] of a CardData; known: .*'license'"),
        ("- a\n- b", "a card file is a mapping of fields, got list"),
        ("metrics: [cider]", "each entry of 'metrics' is a mapping, got 'cider'"),
        ("metrics: [{name: a, value: 1, data: b}]", r"unknown field\(s\) \['data'\] of a Metric"),
    ],
)
def test_card_files_with_mistakes(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        CardData.from_file(path)
    assert "card.yaml" in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.5", None, True])
def test_a_metric_is_a_number(value: Any) -> None:
    with pytest.raises(ValueError, match="metric 'cider' on 'COCO': its value is no number"):
        Metric("cider", value, "COCO")


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        render_card(tmp_path)
    with pytest.raises(ValueError, match="model type 'vit' has no card template; known: "):
        render_card(folder_of("vit", "ViTModel", tmp_path))


def test_a_card_names_its_repository_once_that_is_known(folder: Path) -> None:
    write_card(folder, CardData(license="mit", metrics=CARD.metrics))
    assert f'from_pretrained("{folder.name}"' in (folder / "README.md").read_text()
    name_repository(folder, "org/blip2-opt")
    text = (folder / "README.md").read_text()
    assert f'"{folder.name}"' not in text
    assert 'model="org/blip2-opt"' in text and 'from_pretrained("org/blip2-opt"' in text
    assert "\n# blip2-opt\n" in text
    assert ModelCard(text).data.model_name == "blip2-opt"
    # Another repository later does not change what its author may have written.
    name_repository(folder, "elsewhere/other")
    assert (folder / "README.md").read_text() == text


def test_a_title_of_its_own_stays(folder: Path) -> None:
    write_card(folder, CARD)
    name_repository(folder, "org/blip2-opt")
    text = (folder / "README.md").read_text()
    assert "\n# Captions of shapes\n" in text
    assert 'model="org/blip2-opt"' in text
