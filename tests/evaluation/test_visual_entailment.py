import pytest

from hf_vlp.evaluation import evaluate_visual_entailment
from hf_vlp.evaluation.visual_entailment import label_accuracy
from tests.evaluation.fakes import numbered_image
from tests.evaluation.task_fakes import Classifier, TaskProcessor

LABELS = [0, 1, 2, 2]
SAID = [0, 2, 2, 1]


def rows() -> list[dict]:
    return [{"image": numbered_image(i), "text": f"h{i}", "label": label} for i, label in enumerate(LABELS)]


def evaluate(data: list[dict], model: Classifier | None = None, **options) -> dict:
    model = model or Classifier(SAID, 3)
    return evaluate_visual_entailment(model, TaskProcessor(), data, batch_size=3, show_progress=False, **options)


def test_accuracy_in_all_and_by_label():
    result = evaluate(rows(), details=True)
    assert result["metrics"] == {"accuracy": 0.5}
    assert result["per_label"] == {"contradiction": 1.0, "neutral": 0.0, "entailment": 0.5}
    assert result["details"][1] == {"text": "h1", "label": "neutral", "prediction": "entailment"}
    named = [row | {"label": ["contradiction", "neutral", "entailment"][row["label"]]} for row in rows()]
    assert evaluate(named)["metrics"] == {"accuracy": 0.5}


def test_the_models_order_of_classes_counts():
    turned = Classifier([2 - said for said in SAID], 3, {0: "entailment", 1: "neutral", 2: "contradiction"})
    assert evaluate(rows(), turned)["metrics"] == {"accuracy": 0.5}
    assert evaluate(rows(), Classifier(SAID, 3, {i: f"LABEL_{i}" for i in range(3)}))["metrics"] == {"accuracy": 0.5}
    with pytest.raises(ValueError, match=r"classes are \['cat', 'dog'\]"):
        evaluate(rows(), Classifier(SAID, 2, {0: "cat", 1: "dog"}))


def test_labels_are_needed_and_checked():
    with pytest.raises(ValueError, match="no labels to score with"):
        evaluate([row | {"label": None} for row in rows()])
    with pytest.raises(ValueError, match="label 3 is none of 0 to 2"):
        label_accuracy([0], [3])
    with pytest.raises(ValueError, match="1 predictions for 0 labels"):
        label_accuracy([0], [])
