import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_vlp.training import checkpoints
from hf_vlp.training.checkpoints import IncompleteCheckpointError


def write(folder, step, *, text="weights"):
    writing = folder / f".writing-checkpoint-{step}"
    (writing / "sub").mkdir(parents=True)
    (writing / "model.txt").write_text(text)
    (writing / "sub" / "state.txt").write_text("state")
    final = folder / f"checkpoint-{step}"
    checkpoints.publish(writing, final)
    return final


def test_published_checkpoints_are_whole_and_in_order(tmp_path):
    for step in (20, 3, 100):
        write(tmp_path, step)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-3", "checkpoint-20", "checkpoint-100",
    ]  # fmt: skip
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-100"
    checkpoints.verify(tmp_path / "checkpoint-100")
    assert not list(tmp_path.glob(".writing*"))


def test_no_folder_no_checkpoint(tmp_path):
    assert checkpoints.newest_checkpoint(tmp_path / "none") is None
    assert checkpoints.remove_leftovers(tmp_path / "none") == []


@pytest.mark.parametrize("damage", ["no manifest", "half a manifest", "missing file", "short file"])
def test_a_half_written_checkpoint_is_never_picked_up(tmp_path, damage):
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    if damage == "no manifest":
        (broken / "manifest.json").unlink()
    elif damage == "half a manifest":
        text = (broken / "manifest.json").read_text()
        (broken / "manifest.json").write_text(text[: len(text) // 2])
    elif damage == "missing file":
        (broken / "sub" / "state.txt").unlink()
    else:
        (broken / "model.txt").write_text("weigh")
    assert checkpoints.newest_checkpoint(tmp_path).name == "checkpoint-1"
    with pytest.raises(IncompleteCheckpointError, match="checkpoint-2 is not a whole checkpoint"):
        checkpoints.verify(broken)


def test_changed_bytes_of_the_same_size_are_found_on_loading(tmp_path):
    folder = write(tmp_path, 1)
    (folder / "model.txt").write_text("weightz")
    assert checkpoints.is_complete(folder), "sizes alone are right"
    with pytest.raises(IncompleteCheckpointError, match="model.txt has changed"):
        checkpoints.verify(folder)


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".writing-checkpoint-2").mkdir()
    (tmp_path / ".removing-checkpoint-0").mkdir()
    (tmp_path / "notes").mkdir()
    checkpoints.remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "notes"]


def test_publishing_replaces_an_older_folder_of_the_step(tmp_path):
    write(tmp_path, 1, text="old")
    assert (write(tmp_path, 1, text="new") / "model.txt").read_text() == "new"


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step)
    checkpoints.rotate(tmp_path, 2, keep=tmp_path / "checkpoint-1")
    left = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint-1", "checkpoint-5"} <= left
    assert len(left) == 2
    checkpoints.rotate(tmp_path, None)
    checkpoints.rotate(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-5"}


def trained(kind, steps=3, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": [*model[1].parameters(), *model[2].parameters()]},
    ]
    optimizer = kind(groups, lr=1e-3, **options)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps):
    for index in range(steps):
        inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_an_optimizer_comes_back_to_the_bit(tmp_path, kind, options):
    model, optimizer = trained(kind, **options)
    checkpoints.save_optimizer(optimizer, model, tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, optimizer, 2)

    other, fresh = trained(kind, steps=0, **options)
    other.load_state_dict(weights)
    checkpoints.load_optimizer(fresh, other, tmp_path)
    step(other, fresh, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_an_optimizer_with_other_groups_is_refused(tmp_path):
    model, optimizer = trained(torch.optim.AdamW)
    checkpoints.save_optimizer(optimizer, model, tmp_path)
    with pytest.raises(ValueError, match="only in the checkpoint.*2.bias"):
        checkpoints.load_optimizer(torch.optim.AdamW(model[:2].parameters()), model, tmp_path)
    with pytest.raises(ValueError, match="the split over groups differs"):
        checkpoints.load_optimizer(torch.optim.AdamW(model.parameters()), model, tmp_path)


def test_state_that_only_pickle_could_hold_is_refused(tmp_path):
    model, optimizer = trained(torch.optim.AdamW)
    next(iter(optimizer.state.values()))["extra"] = object()
    with pytest.raises(TypeError, match="'extra' of '0.weight'"):
        checkpoints.save_optimizer(optimizer, model, tmp_path)


def draws():
    return random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()


def test_random_states_come_back(tmp_path):
    # An odd number of normal draws leaves one cached in each generator.
    random.gauss(0, 1)
    np.random.randn()
    checkpoints.save_random_state(tmp_path, rank=1)
    expected = draws()
    draws()
    checkpoints.load_random_state(tmp_path, rank=1)
    assert draws() == expected
    with pytest.raises(FileNotFoundError, match="fewer processes"):
        checkpoints.load_random_state(tmp_path, rank=2)


def test_changed_settings_name_what_differs():
    saved = {"a": 1, "model": {"width": 8, "layers": [1, 2]}, "gone": True}
    now = {"a": 1, "model": {"width": 9, "layers": [1, 2]}, "new": 0.5}
    assert checkpoints.changed_settings(saved, now) == [
        "gone: True -> None",
        "model.width: 8 -> 9",
        "new: None -> 0.5",
    ]
    assert checkpoints.changed_settings(saved, json.loads(json.dumps(saved))) == []


def test_plain_makes_settings_comparable():
    value = {"t": (1, 2), 3: {"b", "a"}, "n": np.float64(0.5), "x": torch.ones(2), "p": 1e-4}
    assert checkpoints.plain(value) == {"t": [1, 2], "3": ["a", "b"], "n": 0.5, "x": [1.0, 1.0], "p": 1e-4}
