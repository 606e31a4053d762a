import pytest
import torch
from torch import nn

from hf_vlp.training.freezing import apply_stage, format_bytes, keep_frozen_in_eval
from tests.tiny import blip2 as tiny_blip2
from tests.training import runs


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)


class Model(nn.Module):
    stages = {
        "all": {"": True},
        "head": {"": False, "tower.second": True, "scale": True},
        "no_tower": {"": True, "tower": False, "tower.second.linear": True},
    }

    def __init__(self):
        super().__init__()
        self.tower = nn.ModuleDict({"first": Block(), "second": Block()})
        self.head = Block()
        self.scale = nn.Parameter(torch.ones(()))


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_longest_path_decides_and_both_values_are_set():
    model = Model()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = apply_stage(model, "no_tower")
    assert trainable(model) == {
        "tower.second.linear.weight", "tower.second.linear.bias", "head.linear.weight", "head.linear.bias", "scale",
    }  # fmt: skip
    assert report.trainable_parameters == 20 + 20 + 1
    assert report.frozen_parameters == 20
    assert report.optimizer_bytes == 8 * 41


def test_the_last_stage_alone_counts():
    first, second = Model(), Model()
    apply_stage(first, "head")
    apply_stage(second, "all")
    apply_stage(second, "head")
    apply_stage(second, "head")
    assert trainable(first) == trainable(second) == {
        "tower.second.linear.weight", "tower.second.linear.bias", "scale",
    }  # fmt: skip


def test_rows_of_the_table_cover_the_model_once():
    model = Model()
    report = apply_stage(model, "head")
    assert sum(row.parameters for row in report.rows) == sum(p.numel() for p in model.parameters())
    assert sum(row.bytes for row in report.rows) == 4 * sum(p.numel() for p in model.parameters())
    text = str(report)
    assert "tower.second" in text
    assert "(everything else)" in text
    assert f"trainable {report.trainable_parameters}" in text


def test_frozen_parts_stay_in_eval_and_their_trained_children_do_not():
    model = Model()
    apply_stage(model, "no_tower")
    model.train()
    keep_frozen_in_eval(model)
    assert model.training
    assert not model.tower["first"].drop.training
    assert not model.tower["second"].drop.training
    assert model.tower["second"].linear.training
    assert model.head.drop.training


def test_parts_that_only_the_empty_path_freezes_are_in_eval_too():
    model = Model()
    apply_stage(model, "head")
    model.train()
    keep_frozen_in_eval(model)
    assert model.training, "the composite itself trains"
    assert not model.head.drop.training
    assert not model.tower["first"].drop.training
    assert model.tower["second"].drop.training


def test_without_a_stage_nothing_is_touched():
    model = Model().train()
    keep_frozen_in_eval(model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"": True, "tovver": False}, "tower"),
        ({"tower": True}, "does not say whether 'scale'"),
        ({"": True, "tower.third": False}, "tower.first"),
    ],
)
def test_tables_that_do_not_fit_the_model(table, message):
    with pytest.raises(ValueError, match=message):
        apply_stage(Model(), "mine", table=table)


def test_unknown_stage_lists_the_known_ones():
    with pytest.raises(ValueError, match="'all', 'head', 'no_tower'"):
        apply_stage(Model(), "stage9")


def test_a_tied_parameter_cannot_be_trained_and_frozen():
    model = Model()
    model.head.linear.weight = model.tower["first"].linear.weight
    with pytest.raises(ValueError, match="one tied parameter"):
        apply_stage(model, "mine", table={"": True, "tower": False})
    apply_stage(model, "mine", table={"": True})


def test_quantized_weights_cannot_be_trained():
    model = Model()
    model.head.linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="torch.uint8"):
        apply_stage(model, "all")
    apply_stage(model, "frozen head", table={"": True, "head": False})


def test_stages_of_the_models_apply():
    clip, _ = runs.clip_model()
    apply_stage(clip, "locked_image")
    assert not any(p.requires_grad for p in clip.model.vision_model.parameters())
    assert clip.model.logit_scale.requires_grad

    stage1 = tiny_blip2.pretraining_model()
    apply_stage(stage1, "stage1")
    names = trainable(stage1)
    assert "retrieval.vision_model.post_layernorm.weight" in names
    assert not any(name.startswith("retrieval.vision_model.encoder") for name in names)

    stage2 = tiny_blip2.generation_model()
    apply_stage(stage2, "stage2")
    assert not any(name.startswith("language_model") for name in trainable(stage2))
    assert "language_projection.weight" in trainable(stage2)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB")])
def test_format_bytes(count, text):
    assert format_bytes(count) == text
