import pytest
import torch
from torch import nn

from hf_vlp.training.optimization import check_master_weights, parameter_groups, parse_rates
from tests.training import runs


def test_gains_biases_and_temperatures_do_not_decay():
    model, _ = runs.clip_model()
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.2)
    assert [(group["weight_decay"], group["lr"], group["part"]) for group in groups] == [
        (0.2, 1e-3, "base"), (0.0, 1e-3, "base"),
    ]  # fmt: skip
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert decayed | spared == set(names.values())
    assert "model.logit_scale" in spared
    assert "model.vision_model.embeddings.class_embedding" in spared
    assert all("norm" not in name and not name.endswith("bias") for name in decayed)
    assert {"model.visual_projection.weight", "model.text_model.embeddings.token_embedding.weight"} <= decayed


def test_parts_have_their_own_rates_and_the_longest_path_decides():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"c": nn.Linear(2, 2), "d": nn.Linear(2, 2)})})
    groups = parameter_groups(
        model, learning_rate=1.0, weight_decay=0.1, rates=parse_rates(["b=0.5", "b.c=0.25", "a.bias=2"])
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]}
    assert rates == {
        "a.weight": 1.0, "a.bias": 2.0, "b.c.weight": 0.25, "b.c.bias": 0.25, "b.d.weight": 0.5, "b.d.bias": 0.5,
    }  # fmt: skip
    assert groups[0]["part"] == "base"


def test_frozen_parameters_are_in_no_group():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.0)
    assert sum(len(group["params"]) for group in groups) == 2
    with pytest.raises(ValueError, match="under which nothing trains"):
        parameter_groups(model, learning_rate=1.0, weight_decay=0.0, rates={"0": 0.1})
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        parameter_groups(model, learning_rate=1.0, weight_decay=0.0)


@pytest.mark.parametrize("entry", ["qformer", "=1e-4", "qformer=fast", "qformer=-1", "qformer=0"])
def test_rates_that_cannot_be_read(entry):
    with pytest.raises(ValueError, match="PATH=RATE"):
        parse_rates([entry])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_master_weights_are_refused(tmp_path, dtype):
    model, _ = runs.clip_model()
    model.model.visual_projection.to(dtype)
    with pytest.raises(ValueError, match="model.visual_projection.weight.*float32 weights"):
        check_master_weights(model)
    model.model.visual_projection.requires_grad_(False)
    check_master_weights(model)


def test_the_trainer_refuses_a_half_precision_model(tmp_path):
    from hf_vlp.data import ImageTextCollator, PairDataset
    from hf_vlp.training import VLPTrainer

    model, processor = runs.clip_model()
    with pytest.raises(ValueError, match="torch.float16"):
        VLPTrainer(model.half(), runs.arguments(tmp_path), ImageTextCollator(processor), PairDataset(runs.rows()))
