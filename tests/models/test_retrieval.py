"""Encoded images as the architectures hand them on: one behaviour, whichever file the class lives in."""

from importlib import import_module

import pytest
import torch

OWNERS = (
    "hf_vlp.models.retrieval",
    "hf_vlp.models.clip_resnet.modeling_clip_resnet",
    "hf_vlp.models.eva_clip.modeling_eva_clip",
    "hf_vlp.models.albef.modeling_albef",
)


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("index", [slice(1, 3), torch.tensor([2, 0]), torch.tensor([], dtype=torch.long)])
def test_encoded_images_are_counted_and_chosen(owner: str, index: slice | torch.Tensor) -> None:
    kind = import_module(owner).ImageEmbeds
    itc, states = torch.arange(8.0).view(4, 2), torch.arange(24.0).view(4, 3, 2)
    both, features = kind(itc, states), kind(itc)
    assert len(both) == len(features) == 4
    chosen = both[index]
    assert type(chosen) is kind
    assert len(chosen) == len(itc[index])
    assert torch.equal(chosen.itc, itc[index])
    assert torch.equal(chosen.states, states[index])
    assert features[index].states is None
    with pytest.raises(AttributeError):
        both.itc = itc
