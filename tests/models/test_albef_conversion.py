"""Original checkpoints of ALBEF: files, sizes, other image sizes, and files that are none."""

from pathlib import Path

import pytest
import torch

from hf_vlp.models.albef.conversion_albef import (
    convert,
    inference_model,
    layout_of,
    read_original,
    to_original,
    training_model,
    training_state_to_original,
)
from hf_vlp.models.albef.finetuning_albef import AlbefForTextAssignment
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from tests.tiny import albef as tiny

HEADS = {"vision_heads": 2, "text_heads": 2}


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    """A pretraining state under the original names."""
    torch.manual_seed(0)
    model = tiny.spread_weights(AlbefForPreTraining(tiny.albef_config(), queue_size=8))
    model.tie_weights()
    return training_state_to_original(model)


def test_pretraining_file_becomes_a_folder(original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save({"model": original, "epoch": 3}, tmp_path / "ALBEF.pth")
    converted = convert(tmp_path / "ALBEF.pth", tmp_path / "hub", **HEADS)
    loaded = AlbefForImageTextRetrieval.from_pretrained(tmp_path / "hub").eval()
    ids, mask = tiny.texts([4, 6])
    outputs = [one(tiny.images(2), ids, mask, matching=True) for one in (converted, loaded)]
    assert torch.equal(outputs[0].logits_per_image, outputs[1].logits_per_image)
    assert torch.equal(outputs[0].itm_logits, outputs[1].itm_logits)
    config = loaded.config
    assert (config.vision_config.image_size, config.vision_config.patch_size) == (32, 16)
    assert (config.text_config.fusion_layer, config.text_config.num_hidden_layers) == (2, 4)
    assert config.projection_dim == 24 and config.vision_config.layer_norm_eps == 1e-6


def test_training_goes_on_and_comes_back(original: dict[str, torch.Tensor]) -> None:
    model = training_model(original, **HEADS)
    back = training_state_to_original(model)
    assert back.keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in back.items())


def test_other_image_sizes_interpolate_model_and_twin(original: dict[str, torch.Tensor]) -> None:
    assert (
        inference_model(original, image_size=64, **HEADS).albef.encode_images(tiny.images(1, size=64)).shape[1] == 17
    )
    model = training_model(original, **HEADS)
    model.set_image_size(48)
    output = model.train()(
        tiny.images(2, size=48),
        *tiny.texts([4, 6]),
        alpha=0.5,
        masked_tokens=None if model.config.text_config.mask_token_id else _nothing_masked(),
    )
    assert output.loss.isfinite()


def _nothing_masked():
    from hf_vlp.objectives.language import MaskedTokens

    ids, _ = tiny.texts([4, 6])
    return MaskedTokens(ids, torch.full_like(ids, -100))


def test_text_assignment_comes_back(original: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = AlbefForTextAssignment(tiny.albef_config(images_per_text=2))
    names = {f"albef.{n}": v for n, v in model.reasoning.albef.state_dict().items()}
    names |= {f"{n}": v for n, v in model.state_dict().items() if not n.startswith("reasoning.")}
    from hf_vlp.models.albef.conversion_albef import Layout

    state = to_original(names, Layout("text_assignment", 2, True))
    again = training_model(state, **HEADS)
    assert layout_of(state).kind == "text_assignment"
    for name, value in again.state_dict().items():
        if "classifier" not in name:
            assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(ValueError, match="no inference head"):
        inference_model(state, **HEADS)


def test_what_is_no_checkpoint_is_refused(original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ALBEF checkpoint"):
        layout_of({"encoder.weight": torch.zeros(1)})
    headless = {name: value for name, value in original.items() if "itm_head" not in name and ".cls." not in name}
    with pytest.raises(ValueError, match="has no head"):
        layout_of(headless)
    lacking = {name: value for name, value in original.items() if "layer.1.output" not in name}
    with pytest.raises(ValueError, match="lacks"):
        inference_model(lacking, **HEADS)
    with pytest.raises(ValueError, match="unknown tensor 'gamma'"):
        inference_model(original | {"visual_encoder.gamma": torch.zeros(1)}, **HEADS)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="does not hold a state dict"):
        read_original(tmp_path / "list.pth")


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_pickles_do_not_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"weight": _Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match="(?i)weights.only"):
        read_original(tmp_path / "evil.pth")
    assert "executed" not in capsys.readouterr().out


def test_safetensors_are_read(original: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous().clone() for name, value in original.items()}, tmp_path / "a.safetensors")
    assert read_original(tmp_path / "a.safetensors").keys() == original.keys()
