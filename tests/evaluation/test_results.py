import json

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_vlp.evaluation import format_table, to_eval_result_entries, to_eval_results, write_json
from hf_vlp.evaluation.results import HUB_TASKS, metric_title
from hf_vlp.evaluation.run import TASKS

RETRIEVAL = {
    "task": "retrieval",
    "metrics": {
        "i2t_r1_itc": 0.25, "i2t_mean_itc": 0.5, "t2i_r1_itc": 0.125, "mean_itc": 0.4, "t2i_r1_itm": 0.75,
        "t2i_r1_itm_5_folds": 1.0,
    },
    "samples": {"images": 8, "texts": 40, "skipped_images": 0},
    "model": "org/model", "data": "org/pairs", "split": "test", "date": "2026-01-02T03:04:05Z",
}  # fmt: skip
VQA = {
    "task": "vqa",
    "metrics": {"vqa_accuracy": 2 / 3, "exact_match": 0.5},
    "per_answer_type": {"yes/no": 0.25, "number": 1.0},
    "samples": {"questions": 12},
}


def test_recalls_stand_in_columns():
    lines = [line.split() for line in format_table(RETRIEVAL).splitlines()]
    assert lines == [
        ["retrieval:", "org/model", "on", "org/pairs", "(test)"],
        ["R@1", "mean"],
        ["image→text", "ITC", "25.00", "50.00"],
        ["text→image", "ITC", "12.50"],
        ["both", "ITC", "40.00"],
        ["text→image", "ITM", "re-ranked", "75.00"],
        ["text→image", "ITM", "re-ranked", "5", "folds", "100.00"],
        ["(images", "8,", "texts", "40)"],
    ]
    widths = {len(line) for line in format_table(RETRIEVAL).splitlines() if line.endswith("0") and "ITC" in line}
    assert len(widths) <= 2


def test_metrics_and_groups_stand_in_rows():
    assert [line.split() for line in format_table(VQA).splitlines()] == [
        ["vqa:", "model", "on", "data"],
        ["VQA", "accuracy", "66.67"],
        ["exact", "match", "50.00"],
        ["per", "answer", "type"],
        ["yes/no", "25.00"],
        ["number", "100.00"],
        ["(questions", "12)"],
    ]


def test_counts_are_not_shown_as_percent():
    table = format_table({"task": "shapes-captions", "metrics": {"spurious_per_scene": 0.25, "object_accuracy": 0.5}})
    assert "0.25" in table
    assert "50.00" in table


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("t2i_r1_itm", "text→image R@1 (ITM re-ranked)"),
        ("i2t_r10_itc_5_folds", "image→text R@10 (ITC, mean of 5 folds)"),
        ("mean_itc", "mean recall (ITC)"),
        ("bleu_4", "BLEU-4"),
        ("cider", "CIDEr"),
        ("top_5_accuracy", "top 5 accuracy"),
    ],
)
def test_titles(name: str, title: str):
    assert metric_title(name) == title


def test_json_replaces_a_file_whole(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(VQA, path)
    write_json({"é": 1}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [one.name for one in path.parent.iterdir()] == ["result.json"]

    class Odd:
        pass

    with pytest.raises(TypeError):
        write_json({"bad": Odd()}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert [one.name for one in path.parent.iterdir()] == ["result.json"]


def test_model_index_of_a_card_and_back():
    entries = to_eval_results(RETRIEVAL)
    card = ModelCard.from_template(
        ModelCardData(model_name="model", eval_results=entries), template_str="---\n{{ card_data }}\n---\n"
    )
    back = ModelCard(str(card)).data.eval_results
    assert [(one.metric_type, one.metric_value) for one in back] == list(RETRIEVAL["metrics"].items())
    assert {(one.task_type, one.dataset_type, one.dataset_split) for one in back} == {
        ("image-text-retrieval", "org/pairs", "test")
    }
    assert back[4].metric_name == "text→image R@1 (ITM re-ranked)"


def test_local_data_is_called_by_its_name(tmp_path):
    (tmp_path / "emoji").mkdir()
    entry = to_eval_results(VQA | {"data": str(tmp_path / "emoji")})[0]
    assert (entry.dataset_name, entry.dataset_type) == ("emoji", "emoji")
    entry = to_eval_results(VQA, dataset_name="VQA v2", dataset_type="org/vqa")[0]
    assert (entry.dataset_name, entry.dataset_type) == ("VQA v2", "org/vqa")
    with pytest.raises(ValueError, match="give dataset_name and dataset_type"):
        to_eval_results(VQA)


def test_entries_of_the_eval_results_files():
    entries = to_eval_result_entries(
        RETRIEVAL,
        dataset_id="org/pairs",
        task_ids={"t2i_r1_itm": "text_to_image_r1"},
        notes="rerank 16",
        source_url="https://example.org",
    )
    assert entries == [
        EvalResultEntry(
            dataset_id="org/pairs",
            task_id="text_to_image_r1",
            value=0.75,
            date="2026-01-02T03:04:05Z",
            notes="rerank 16",
            source_url="https://example.org",
        )
    ]
    assert len(to_eval_result_entries(RETRIEVAL, dataset_id="org/pairs")) == len(RETRIEVAL["metrics"])
    written = yaml.safe_load(yaml.safe_dump(eval_result_entries_to_yaml(entries)))
    assert written[0]["dataset"] == {"id": "org/pairs", "task_id": "text_to_image_r1"}
    assert written[0]["value"] == 0.75
    with pytest.raises(ValueError, match=r"no metric \['r1'\]; it has.*'i2t_r1_itc'"):
        to_eval_result_entries(RETRIEVAL, dataset_id="org/pairs", task_ids={"r1": "x"})


def test_every_task_is_known_to_the_hub_entries():
    assert set(TASKS) == set(HUB_TASKS)
    with pytest.raises(ValueError, match="'nlvr' is not known; known are.*'retrieval'"):
        to_eval_results({"task": "nlvr", "metrics": {}})
