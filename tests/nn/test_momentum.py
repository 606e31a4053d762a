"""Momentum twins."""

import pytest
import torch
from torch import nn

from hf_vlp.nn.momentum import momentum_twin, update_twin


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_the_twin_follows_slowly_and_is_never_trained() -> None:
    online = network()
    twin = momentum_twin(online)
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert all(parameter.requires_grad for parameter in online.parameters())
    start = {name: value.clone() for name, value in twin.state_dict().items()}
    online(torch.randn(8, 3))
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(1.0)
    now = {name: value.clone() for name, value in online.state_dict().items()}
    update_twin(twin, online, 0.9)
    for name, value in twin.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert value == 1
        else:
            assert torch.allclose(value, 0.9 * start[name] + 0.1 * now[name])
        assert torch.equal(online.state_dict()[name], now[name])


def test_the_ends_of_the_range() -> None:
    online = network()
    twin = momentum_twin(online)
    with torch.no_grad():
        online[0].weight.add_(1.0)
    before = twin[0].weight.clone()
    update_twin(twin, online, 1.0)
    assert torch.equal(twin[0].weight, before)
    update_twin(twin, online, 0.0)
    assert torch.equal(twin[0].weight, online[0].weight)


def test_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in"):
        update_twin(nn.Linear(3, 4), nn.Linear(3, 5), 0.9)
    with pytest.raises(ValueError, match="2.bias"):
        update_twin(network(), network()[:2], 0.9)
    with pytest.raises(ValueError, match="momentum"):
        update_twin(network(), network(), 1.5)
