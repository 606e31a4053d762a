import logging
import math

import pytest
import torch

from hf_vlp.data import ImageTextCollator
from hf_vlp.training import checkpoints
from hf_vlp.training.sanity import SanityPass, TermCheck, chance_levels_of, check_batch, permuted_images, warnings_of
from tests.tiny import blip2 as tiny_blip2
from tests.training import runs


def clip_batch(count=6):
    model, processor = runs.clip_model()
    records = [{**row, "text": row["text"][0]} for row in runs.rows(count)]
    batch = ImageTextCollator(processor)(records)
    batch.pop("record_report")
    return model, batch


def test_permuting_swaps_images_alone():
    batch = {"pixel_values": torch.arange(3.0)[:, None], "input_ids": torch.arange(3), "labels": torch.arange(3)}
    permuted = permuted_images(batch)
    assert permuted["pixel_values"].flatten().tolist() == [2, 0, 1]
    assert permuted["input_ids"] is batch["input_ids"]
    assert permuted["labels"] is batch["labels"]


def test_values_are_those_of_an_evaluation_step():
    model, batch = clip_batch()
    (check,) = check_batch(model, batch, chance_levels=model.chance_levels)
    model.eval()
    with torch.no_grad():
        assert check.value == pytest.approx(model(**batch).loss.item())
        assert check.permuted == pytest.approx(model(**permuted_images(batch)).loss.item())
    assert check.chance == pytest.approx(math.log(6))
    assert check.name == "loss_itc"


def test_only_the_first_rows_are_looked_at():
    model, batch = clip_batch()
    (check,) = check_batch(model, batch, chance_levels=model.chance_levels, max_rows=4)
    assert check.chance == pytest.approx(math.log(4))
    (single,) = check_batch(model, batch, chance_levels=model.chance_levels, max_rows=1)
    assert single.permuted is None


def test_generators_weights_and_gradients_are_left_alone():
    model, batch = clip_batch()
    before, state = runs.weights(model), checkpoints.random_state()
    check_batch(model, batch)
    assert torch.equal(checkpoints.random_state()["torch"], state["torch"])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_stage_1_terms_stand_beside_their_chance_levels():
    model = tiny_blip2.pretraining_model()
    checks = {check.name: check for check in check_batch(
        model, tiny_blip2.pretraining_batch(), chance_levels=chance_levels_of(model),
        forward_arguments=lambda: {"generator": torch.Generator().manual_seed(0)},
    )}  # fmt: skip
    assert set(checks) == {"loss_itc", "loss_itm", "loss_itg"}
    assert checks["loss_itc"].chance == pytest.approx(math.log(4))
    assert checks["loss_itm"].chance == pytest.approx(0.6365, abs=1e-4)
    assert checks["loss_itg"].chance == pytest.approx(math.log(model.config.qformer_config.vocab_size))


def test_a_language_model_has_the_logarithm_of_its_vocabulary():
    model = tiny_blip2.generation_model()
    levels = chance_levels_of(model)
    assert levels({"labels": None}) == {"loss": pytest.approx(math.log(330))}
    assert levels({}) == {}


def check(value, permuted, chance=2.0):
    return TermCheck("loss_itc", value, permuted, chance)


def test_a_model_that_does_not_see_the_images_is_told_at_once():
    (warning,) = warnings_of([check(1.5, 1.5)], warmed_up=False)
    assert "does not see them" in warning
    assert not warnings_of([check(2.1, 2.1001)], warmed_up=False)
    assert not warnings_of([check(1.5, None)], warmed_up=False)


def test_after_the_warm_up_losses_have_to_leave_chance_and_use_the_images():
    assert not warnings_of([check(1.0, 2.5)], warmed_up=True)
    (warning,) = warnings_of([check(1.0, 1.001)], warmed_up=True)
    assert "texts alone" in warning
    (warning,) = warnings_of([check(1.999, 2.5)], warmed_up=True)
    assert "no better than knowing nothing" in warning
    assert not warnings_of([check(1.0, 2.0, chance=None)], warmed_up=True)


def test_when_the_pass_is_due():
    assert [step for step in range(300) if SanityPass(2, 0, 50).is_due(step)] == [0, 1, 100]
    assert [step for step in range(300) if SanityPass(1, 0, 200).is_due(step)] == [0, 200]
    assert [step for step in range(300) if SanityPass(0, 7, 200).is_due(step)] == [7]


def test_a_run_is_the_same_with_and_without_the_pass(tmp_path, capsys):
    states = []
    for sanity in (False, True):
        trainer = runs.clip_trainer(tmp_path / str(sanity), sanity=sanity, dropout=0.3, sanity_check_step=2)
        trainer.train()
        states.append(runs.weights(trainer.model))
    assert runs.fingerprint(states[0]) == runs.fingerprint(states[1])
    printed = capsys.readouterr().out
    assert printed.count("sanity pass before step") == 3
    assert "images permuted" in printed


def test_stage_1_is_the_same_with_and_without_the_pass(tmp_path):
    states = []
    for sanity in (False, True):
        trainer = runs.stage1_trainer(tmp_path / str(sanity), sanity=sanity, max_steps=2)
        trainer.train()
        states.append(runs.weights(trainer.model))
    assert runs.fingerprint(states[0]) == runs.fingerprint(states[1])


def test_blind_training_is_warned_of(tmp_path, caplog):
    blind = [{**row, "image": runs.rows(1)[0]["image"]} for row in runs.rows()]
    with caplog.at_level(logging.WARNING):
        runs.clip_trainer(tmp_path, data=blind, sanity=True, max_steps=2).train()
    assert any("does not see them" in record.message for record in caplog.records)
