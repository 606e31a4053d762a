import pytest
import torch
from transformers.utils import ModelOutput

from hf_vlp.training.terms import TermMeter, loss_terms


def test_only_scalars_called_loss_something_are_terms():
    output = ModelOutput(
        loss=torch.tensor(3.0), loss_itc=torch.tensor(1.0, requires_grad=True), loss_itm=torch.tensor([2.0]),
        loss_per_row=torch.ones(4), logits=torch.ones(2, 2),
    )  # fmt: skip
    terms = loss_terms(output)
    assert set(terms) == {"loss_itc", "loss_itm"}
    assert not terms["loss_itc"].requires_grad


def test_means_are_weighted():
    meter = TermMeter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, weight=3)
    meter.add({"a": torch.tensor(5.0)}, weight=1)
    assert meter.means() == {"a": 2.0, "b": 5.0}


def test_means_over_ranks_weigh_by_what_each_rank_has_seen():
    meter = TermMeter()
    meter.add({"a": torch.tensor(1.0)}, weight=1)
    other = torch.tensor([[9.0, 3.0]], dtype=torch.float64)  # sum 9 with weight 3
    assert meter.means(lambda own: torch.cat([own, other])) == {"a": 2.5}


def test_state_comes_back_exactly():
    meter = TermMeter()
    for value in (0.1, 0.2, 0.30000001):
        meter.add({"a": torch.tensor(value)})
    other = TermMeter()
    other.load_state(meter.state())
    assert other.means() == meter.means()
    other.clear()
    assert other.means() == {}


def test_nothing_seen_gives_nothing():
    assert TermMeter().means(pytest.fail) == {}
