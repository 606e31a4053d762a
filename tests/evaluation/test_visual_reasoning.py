from pathlib import Path

import pytest

from hf_vlp.data.records import ErrorRateExceeded
from hf_vlp.evaluation import evaluate_visual_reasoning
from hf_vlp.evaluation.visual_reasoning import consistency
from tests.evaluation.fakes import numbered_image
from tests.evaluation.task_fakes import Classifier, TaskProcessor

LABELS = [1, 0, 1, 0, 1]
SAID = [1, 0, 1, 1, 1]
GROUPS = ["a", "a", "b", "b", "c"]


def rows() -> list[dict]:
    return [
        {
            "image_0": numbered_image(i),
            "image_1": numbered_image(9),
            "text": f"statement {GROUPS[i]}",
            "label": label,
            "sentence_id": GROUPS[i],
            "identifier": f"dev-1-{i}-0",
            "statement_type": "more" if i < 2 else "side",
        }
        for i, label in enumerate(LABELS)
    ]


def evaluate(data: list[dict], **options) -> dict:
    return evaluate_visual_reasoning(
        Classifier(SAID, 2), TaskProcessor(), data, batch_size=2, show_progress=False, **options
    )


def test_accuracy_and_consistency(tmp_path: Path):
    file = tmp_path / "predictions.csv"
    result = evaluate(rows(), predictions_file=file, details=True)
    assert result["metrics"] == {"accuracy": 4 / 5, "consistency": 2 / 3}
    assert result["per_statement_type"] == {"more": 1.0, "side": 2 / 3}
    assert result["samples"] == {"statements": 5, "skipped_records": 0}
    assert file.read_text() == "".join(f"dev-1-{i}-0,{bool(said)}\n" for i, said in enumerate(SAID))
    assert result["details"][3] | {"probability": 0} == {
        "identifier": "dev-1-3-0", "text": "statement b", "label": 0, "prediction": 1, "probability": 0,
    }  # fmt: skip


def test_without_labels_only_predictions(tmp_path: Path):
    data = [row | {"label": None} for row in rows()]
    with pytest.raises(ValueError, match="no labels to score with: give a predictions_file"):
        evaluate(data)
    assert evaluate(data, predictions_file=tmp_path / "p.csv")["metrics"] == {}
    assert (tmp_path / "p.csv").read_text().count("True") == 4


def test_what_is_left_out_is_named():
    data = rows()
    data[1]["label"] = 2
    data[3]["image_1"] = {"bytes": b"", "path": None}
    with pytest.raises(ErrorRateExceeded, match="2 of 5 records cannot be used.*row 1.*label_outside.*row 3"):
        evaluate(data)
    result = evaluate(data, max_bad_rate=0.5)
    assert result["metrics"] == {"accuracy": 1.0, "consistency": 1.0}
    assert result["samples"]["skipped_records_reasons"] == {"label_outside": 1, "image_empty": 1}


def test_consistency_is_of_whole_groups():
    assert consistency([True, False, True], [1, 1, 2]) == 0.5
    assert consistency([True, True], ["x", "x"]) == 1.0
    with pytest.raises(ValueError, match="2 predictions for 1 groups"):
        consistency([True, True], ["x"])
