"""`hf-vlp evaluate`: its options are those of the evaluation, and reach it."""

import json
from pathlib import Path
from typing import Any

import pytest

import hf_vlp.evaluation.run as evaluation
from hf_vlp.cli import evaluate
from hf_vlp.cli.errors import EXIT_FAILED, EXIT_USAGE, UsageError
from hf_vlp.cli.main import main
from tests.hub import tiny


def test_the_names_of_the_tasks() -> None:
    assert set(evaluate.TASKS) == set(evaluation.TASKS)


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_help_has_the_options_of_the_task(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", task, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"options of {task}:" in text
    for name, parameter in evaluation.task_options(task).items():
        kind, _ = evaluate._kind(evaluate._types(task).get(name, parameter.annotation))
        if kind is not None:
            assert f"--{name}" in text


def test_options_arrive(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: dict[str, Any] = {}

    def run_evaluation(*arguments: Any, **options: Any) -> dict[str, Any]:
        called.update(arguments=arguments, **options)
        return {"metrics": {"t2i_r1_itc": 0.5}}

    monkeypatch.setattr(evaluation, "run_evaluation", run_evaluation)
    monkeypatch.setattr("hf_vlp.evaluation.run_evaluation", run_evaluation, raising=False)
    line = "evaluate retrieval --model m --data d --split val --rerank 16 --ks 1 5 --no-show_progress --json"
    assert main([*line.split(), "--columns", "image=picture", "text=caption", "--image_root", "images"]) == 0
    assert called["arguments"] == ("retrieval", "m", "d")
    assert called["rerank"] == 16
    assert called["ks"] == [1, 5]
    assert called["show_progress"] is False
    assert called["split"] == "val"
    assert called["data_options"] == {"columns": {"image": "picture", "text": "caption"}, "image_root": "images"}
    assert called["show_table"] is False
    assert "combine" not in called, "what is not given is the evaluation's to choose"
    assert json.loads(capsys.readouterr().out) == {"metrics": {"t2i_r1_itc": 0.5}}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vqa --annotations none", {"annotations": "none"}),
        ("grounding --annotations i.json --box_format xywh", {"annotations": "i.json", "box_format": "xywh"}),
        ("dialog", {}),
    ],
)
def test_companions_of_annotation_files_arrive(
    monkeypatch: pytest.MonkeyPatch, line: str, expected: dict[str, str]
) -> None:
    called: dict[str, Any] = {}
    monkeypatch.setattr("hf_vlp.evaluation.run_evaluation", lambda *a, **k: called.update(k) or {}, raising=False)
    assert main(["evaluate", *line.split(), "--model", "m", "--data", "d", "--json"]) == 0
    assert called["data_options"] == expected
    assert main(["evaluate", "retrieval", "--annotations", "a", "--model", "m", "--data", "d"]) == EXIT_USAGE


def test_underscores_and_hyphens_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(
        "hf_vlp.evaluation.run_evaluation", lambda task, *a, **k: called.append(task) or {}, raising=False
    )
    assert main(["evaluate", "zero_shot", "--model", "m", "--data", "d", "--json"]) == 0
    assert called == ["zero-shot"]


def test_a_real_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.save(tiny.clip(), tmp_path / "clip")
    output = tmp_path / "result.json"
    line = ["evaluate", "retrieval", "--model", model, "--data", "shapes", "--limit", "6", "--output", str(output)]
    assert main([*line, "--no-show_progress"]) == 0
    result = json.loads(output.read_text())
    assert result["task"] == "retrieval"
    assert any(name.startswith("t2i_r1") for name in result["metrics"])
    assert "retrieval" in capsys.readouterr().out


def test_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "retrival", "--model", "m", "--data", "d"]) == EXIT_USAGE
    assert "there is no evaluation 'retrival'; there are: retrieval" in capsys.readouterr().err
    assert main(["evaluate", "retrieval", "--data", "d"]) == EXIT_USAGE
    assert main(["evaluate", "retrieval", "--model", "m", "--data", "d", "--columns", "image"]) == EXIT_USAGE
    assert "--columns takes NAME=COLUMN, got 'image'" in capsys.readouterr().err
    assert main(["evaluate", "retrieval", "--model", str(tmp_path), "--data", "shapes"]) == EXIT_FAILED
    assert "hf-vlp evaluate: error: " in capsys.readouterr().err


def test_columns() -> None:
    assert evaluate.read_columns(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
    for wrong in ("a", "=b", "a="):
        with pytest.raises(UsageError):
            evaluate.read_columns([wrong])


def test_kinds_of_options() -> None:
    assert evaluate._kind(int) == (int, False)
    assert evaluate._kind(int | None) == (int, False)
    assert evaluate._kind(list[str] | None) == (str, True)
    assert evaluate._kind(tuple[int, ...]) == (int, True)
    assert evaluate._kind(dict[str, str]) == (None, False)
    assert evaluate._kind(bool) == (bool, False)
