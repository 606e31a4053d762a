"""Arguments of the recipes with a momentum twin."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest

from hf_vlp.training.momentum import (
    MomentumArguments,
    ObjectiveArguments,
    accepted_settings,
    given,
    steps_of_an_epoch,
)


def run(batch: int = 4, ranks: int = 1, drop_last: bool = False) -> SimpleNamespace:
    return SimpleNamespace(train_batch_size=batch, world_size=ranks, dataloader_drop_last=drop_last)


EPOCHS = [(8, 1, False, 2), (9, 1, False, 3), (9, 1, True, 2), (9, 2, False, 2), (1, 2, True, 1)]


@pytest.mark.parametrize(("rows", "ranks", "drop_last", "steps"), EPOCHS)
def test_steps_of_an_epoch(rows, ranks, drop_last, steps):
    assert steps_of_an_epoch(range(rows), run(ranks=ranks, drop_last=drop_last)) == steps


def test_what_is_left_out_keeps_the_models_own_value():
    arguments = MomentumArguments(momentum=0.9)
    assert given(arguments) == {"momentum": 0.9}
    assert arguments.settings(range(9), run()) == {"momentum": 0.9, "alpha_warmup_steps": 3}
    assert arguments.settings(range(9), run(), epochs=2)["alpha_warmup_steps"] == 6
    assert ObjectiveArguments().settings() == {}
    assert ObjectiveArguments(objectives=["itc"], queue_size=7).settings() == {"objectives": ["itc"], "queue_size": 7}


def test_without_distillation_there_is_no_warm_up():
    assert MomentumArguments(distill=False).settings(iter(()), run()) == {"distill": False}


def test_a_stream_has_no_epoch_to_warm_up_over():
    with pytest.raises(ValueError, match="alpha_warmup_steps is needed"):
        MomentumArguments().settings(iter(()), run())
    assert MomentumArguments(alpha_warmup_steps=5).settings(iter(()), run()) == {"alpha_warmup_steps": 5}


def test_the_terms_that_are_trained():
    assert ObjectiveArguments().chosen("mlm") == ("itc", "itm", "mlm")
    assert ObjectiveArguments(objectives=["itc"]).chosen("mlm") == ("itc",)


@dataclass
class Settings:
    alpha: float = 0.4


class WithTwin:
    settings_class: ClassVar[type] = Settings


class Plain:
    pass


def test_settings_that_a_class_does_not_know_are_refused_only_if_asked_for():
    settings = {"alpha": 0.3, "alpha_warmup_steps": 4}
    assert accepted_settings(WithTwin, settings, required={"alpha": 0.3}) == {"alpha": 0.3}
    assert accepted_settings(Plain, {"alpha_warmup_steps": 4}, required={}) == {}
    with pytest.raises(ValueError, match="Plain has no setting 'alpha'; it has none: leave --alpha out"):
        accepted_settings(Plain, settings, required={"alpha": 0.3})
