import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hf_vlp.evaluation.metrics import METRICS, load_metric, metric_path

GOLDEN = Path(__file__).with_name("golden_captions.json")

# Runs in a process of its own: with a fresh cache, no network, and from a folder that is not the checkout.
SCRIPT = """
    import json, socket, sys

    def refuse(*args, **kwargs):
        raise AssertionError("a metric opened a connection")

    socket.socket.connect = refuse
    socket.create_connection = refuse
    socket.getaddrinfo = refuse

    import evaluate
    from hf_vlp.evaluation.metrics import METRICS, load_metric, metric_path

    golden = json.load(open(sys.argv[1]))
    images = golden["images"]
    tokens = {
        "predictions": [image["prediction_tokens"] for image in images],
        "references": [image["reference_tokens"] for image in images],
        "tokenized": True,
    }
    texts = {
        "predictions": [image["prediction"] for image in images],
        "references": [image["references"] for image in images],
    }
    results = {}
    for name in ("bleu", "rouge_l", "cider", "cider_d"):
        metric = evaluate.load(metric_path(name))
        results |= metric.compute(**tokens)
        # Captions as written are tokenised to the same tokens.
        assert metric.compute(**texts) == metric.compute(**tokens)
        assert metric.description and metric.citation and metric.inputs_description
    results["cider_paper"] = load_metric("cider").compute(**tokens, variant="paper")["cider"]
    vqa = load_metric("vqa_accuracy")
    # Batches added one after the other count together.
    vqa.add_batch(predictions=["red", "Two"], references=[["red"] * 10, ["2"] * 9 + ["two"]])
    vqa.add(prediction="x", reference=["y"] * 10)
    results |= vqa.compute()
    recall = load_metric("recall_at_k")
    results |= recall.compute(predictions=[[0.1, 0.9, 0.3], [0.5, 0.5, 0.1]], references=[[2, 1], [0]], ks=[1, 2])
    pairs = load_metric("nlvr2").compute(predictions=[1, 0, 1], references=[1, 0, 0], groups=["a", "a", "b"])
    assert pairs == {"accuracy": 2 / 3, "consistency": 0.5}
    entailed = load_metric("visual_entailment").compute(predictions=[0, 2], references=[0, 1])
    assert entailed == {"accuracy": 0.5, "accuracy_contradiction": 1.0, "accuracy_neutral": 0.0}
    turns = load_metric("visdial").compute(
        predictions=[[0.1, 0.9], [0.1, 0.9]], references=[1, 0], relevance=[[0.0, 1.0], []]
    )
    assert turns == {
        "recall_at_1": 0.5, "recall_at_5": 1.0, "recall_at_10": 1.0, "mrr": 0.75, "mean_rank": 1.5, "ndcg": 1.0
    }
    boxes = load_metric("box_accuracy")
    right = [[[0, 0, 2, 2]], [[0, 0, 2, 2]]]
    assert boxes.compute(predictions=[[0, 0, 2, 2], [1, 0, 3, 2]], references=right) == {
        "box_accuracy": 0.5, "mean_iou": 2 / 3
    }
    assert boxes.compute(predictions=[[1, 1], [3, 3]], references=right) == {"pointing_game": 0.5}
    print(json.dumps(results))
"""


@pytest.mark.slow
def test_metrics_load_offline_and_equal_the_reference(tmp_path: Path):
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(GOLDEN)],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.strip().splitlines()[-1])
    expected = {name: score["corpus"] for name, score in json.loads(GOLDEN.read_text())["scores"].items()}
    expected |= {"cider_d": expected["cider"], "vqa_accuracy": 2 / 3, "recall_at_1": 0.5, "recall_at_2": 1.0}
    assert results == pytest.approx(expected, rel=0, abs=1e-12)


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="no metric 'meteor'; there are.*'cider_d'"):
        load_metric("meteor")


def test_every_metric_has_its_file():
    assert {Path(metric_path(name)).name for name in METRICS} == {
        path.name for path in Path(metric_path("bleu")).parent.glob("vlp_*.py")
    }
