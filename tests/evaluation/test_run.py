import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig

import hf_vlp.evaluation
from hf_vlp.data import load_shapes
from hf_vlp.evaluation import TASKS, evaluate_retrieval, load_model_and_processor, run_evaluation, task_options
from hf_vlp.models.clip.modeling_clip import CLIPModel
from tests.tiny import blip2, clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved CLIP."""
    path = tmp_path_factory.mktemp("clip")
    processor = clip.processor()
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=clip.text_config_of(processor), vision_config=clip.vision_config(), projection_dim=24)
    )
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


def test_retrieval_from_folder_to_json(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "results" / "retrieval.json"
    result = run_evaluation(
        "retrieval",
        folder,
        "shapes",
        batch_size=4,
        limit=6,
        output=output,
        data_options={"size": 9, "preset": "simple"},
        show_table=True,
        ks=[1, 2],
        show_progress=False,
    )
    assert json.loads(output.read_text()) == result
    model, processor = load_model_and_processor(folder, "retrieval", device="cpu")
    rows = load_shapes("test", size=9, preset="simple")
    expected = evaluate_retrieval(model, processor, rows, batch_size=4, limit=6, ks=[1, 2], show_progress=False)
    assert {name: result[name] for name in expected} == expected
    assert (result["model"], result["data"], result["split"]) == (folder, "shapes", "test")
    assert result["options"]["ks"] == [1, 2]
    assert result["seconds"] > 0
    table = capsys.readouterr().out
    assert table.startswith(f"retrieval: {folder} on shapes (test)")
    assert "text→image" in table


def test_captioning_and_vqa_from_a_folder(tmp_path: Path):
    model, processor = blip2.generation_model("opt"), blip2.generation_processor("opt")
    model.save_pretrained(tmp_path / "blip2")
    processor.save_pretrained(tmp_path / "blip2")
    for task, options in (
        ("captioning", {"max_new_tokens": 4, "num_beams": 1}),
        ("shapes_captions", {"max_new_tokens": 4}),
        ("vqa", {"max_new_tokens": 2, "num_beams": 1, "prompt": "{}", "limit": 1}),
    ):
        data = {"size": 3, "preset": "simple"}
        result = run_evaluation(
            task, tmp_path / "blip2", "shapes", split="heldout", data_options=data, show_progress=False, **options
        )
        assert result["task"] == task.replace("_", "-")
        assert result["metrics"]
        assert result["split"] == "heldout"


def test_the_model_is_loaded_for_the_role(folder: str):
    model, processor = load_model_and_processor(folder, "retrieval", dtype="bfloat16", device="cpu")
    assert type(model) is CLIPModel
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.tokenizer is not None
    with pytest.raises(KeyError, match="no 'captioning' class; it has.*'retrieval'"):
        load_model_and_processor(folder, "captioning")


def test_bfloat16_gives_almost_the_same(folder: str):
    options = {"data_options": {"size": 8}, "show_progress": False, "device": "cpu"}
    exact, short = (run_evaluation("retrieval", folder, "shapes", dtype=d, **options) for d in (None, "bfloat16"))
    assert short["samples"] == exact["samples"]


def test_unknown_names_list_what_there_is(folder: str):
    with pytest.raises(ValueError, match="no evaluation task 'nlvr2'; there are.*'captioning'.*'zero-shot'"):
        run_evaluation("nlvr2", folder, "shapes")
    with pytest.raises(ValueError, match=r"task 'retrieval' has no option \['beams'\]; it has.*'rerank'"):
        run_evaluation("retrieval", folder, "shapes", beams=3)
    with pytest.raises(ValueError, match="no split 'dev2'"):
        run_evaluation("retrieval", folder, "shapes", split="dev2")
    with pytest.raises(FileNotFoundError, match="no file or folder './nothing'"):
        run_evaluation("retrieval", folder, "./nothing")


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_option_is_documented(task: str):
    function = TASKS[task].load()
    documented = inspect.getdoc(function)
    options = task_options(task)
    assert {"batch_size", "limit", "workers", "details", "show_progress"} <= set(options)
    for name, parameter in options.items():
        assert f" {name}" in documented, f"{name} of {task}"
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


def test_public_names_resolve():
    for name in hf_vlp.evaluation.__all__:
        assert getattr(hf_vlp.evaluation, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hf_vlp.evaluation.nothing  # noqa: B018
