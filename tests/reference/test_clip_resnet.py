"""CLIP with a ResNet tower against the original code."""

import torch

from hf_vlp.models.clip.conversion_clip import to_original
from tests.reference.cases import Case, reference
from tests.reference.test_clip_vit import build, compare_outputs


@reference("clip/resnet")
def test_resnet(case: Case) -> None:
    model = build(case)
    compare_outputs(case, model)
    maps = model.vision_model(case.inputs["image"], output_hidden_states=True).hidden_states
    for name, states in zip(("stem", "layer1", "layer2", "layer3", "layer4"), maps, strict=True):
        case.compare(f"stage_{name}", states)


@reference("clip/resnet", complete=False)
def test_original_weights_survive_the_round_trip(case: Case) -> None:
    back = to_original(build(case).state_dict(), "clip_resnet")
    assert back.keys() == case.weights.keys()
    for name, value in case.weights.items():
        assert torch.equal(back[name], value), name
