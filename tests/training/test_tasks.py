"""What the fine-tuning scripts share."""

import json
from types import SimpleNamespace

import pytest
from torch import nn

from hf_vlp.training.tasks import (
    TaskModelArguments,
    answer_options,
    apply_task_stage,
    fit_processor,
    load_for_task,
    most_frequent_answers,
    read_answers,
)
from tests.tiny import albef as tiny_albef
from tests.tiny import blip2 as tiny_blip2


def albef_processor():
    from hf_vlp.models.albef.processing_albef import AlbefProcessor

    return AlbefProcessor.for_image_size(tiny_blip2.bert_tokenizer(), tiny_albef.IMAGE_SIZE)


def test_image_size_and_words_go_to_the_processor():
    processor = albef_processor()
    fit_processor(processor, 48, 50)
    assert dict(processor.image_processor.size) == {"height": 48, "width": 48}
    assert processor.max_words == 50
    fit_processor(processor, None)
    assert dict(processor.image_processor.size) == {"height": 48, "width": 48}


def test_a_processor_without_such_settings_is_named():
    clip = SimpleNamespace(image_processor=SimpleNamespace(size={"shortest_edge": 32}))
    with pytest.raises(ValueError, match="--image_size.*shortest_edge"):
        fit_processor(clip, 48)
    with pytest.raises(ValueError, match="--max_words.*does not count words"):
        fit_processor(clip, None, 30)


def test_answers_are_counted_once_a_question():
    rows = [{"answers": ["red"] * 10}, {"answers": ["blue", "green"]}, {"answers": ["blue", " "]}, {"answers": "two"}]
    assert most_frequent_answers(rows, 3) == ["blue", "green", "red"]
    assert most_frequent_answers(rows, 9) == ["blue", "green", "red", "two"]
    with pytest.raises(ValueError, match="no row of the training data has an answer"):
        most_frequent_answers([{"answers": []}, {"answers": None}], 3)


def test_a_list_of_answers_is_read_and_checked(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["yes", "no"]))
    assert read_answers(path) == ["yes", "no"]
    task = SimpleNamespace(answering="rank", answer_list=str(path), answer_count=5, rank=128)
    assert answer_options(task, []) == {"answer_list": ["yes", "no"], "top_k": 2}
    task.answering = "generate"
    assert "answer_list" not in answer_options(task, [])
    path.write_text('{"yes": 1}')
    with pytest.raises(ValueError, match="JSON list of answers"):
        read_answers(path)


class Model(nn.Module):
    def __init__(self, stages):
        super().__init__()
        self.stages = stages
        self.tower, self.head = nn.Linear(2, 2), nn.Linear(2, 2)


def test_the_stage_of_fine_tuning_is_found():
    both = Model({"pretrain": {"": True}, "finetune": {"": True, "tower": False}})
    apply_task_stage(both)
    assert not both.tower.weight.requires_grad
    assert both.head.weight.requires_grad
    apply_task_stage(both, "pretrain")
    assert both.tower.weight.requires_grad
    only = Model({"stage2": {"": False, "head": True}})
    apply_task_stage(only)
    assert not only.tower.weight.requires_grad


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval

    path = tmp_path_factory.mktemp("albef")
    AlbefForImageTextRetrieval(tiny_albef.albef_config()).save_pretrained(path)
    albef_processor().save_pretrained(path)
    return str(path)


def test_a_setting_that_the_task_lacks_is_refused(folder):
    arguments = TaskModelArguments(model_name_or_path=folder)
    with pytest.raises(ValueError, match="no setting 'label_smoothing'"):
        load_for_task(arguments, "finetune_vqa", script="x.py", settings={"label_smoothing": 0.1})
    model, _ = load_for_task(arguments, "finetune_vqa", script="x.py", settings={"label_smoothing": None})
    assert type(model).__name__ == "AlbefForQuestionAnsweringFineTuning"


def test_a_missing_model_is_named():
    with pytest.raises(SystemExit, match="x.py: --model_name_or_path is missing"):
        load_for_task(TaskModelArguments(), "finetune_vqa", script="x.py")
