"""What every pretraining model has in common: it goes on from the Hub with the state that only training needs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining
from tests.tiny import blip2
from tests.tiny import clip as tiny_clip


def stage1() -> Blip2ForPreTraining:
    torch.manual_seed(0)
    model = Blip2ForPreTraining(blip2.blip2_config())
    with torch.no_grad():
        model.itg_head.bias.uniform_()
        model.temperature.fill_(0.31)
    return model


def sigmoid_clip() -> CLIPForPreTraining:
    torch.manual_seed(0)
    model = CLIPForPreTraining(tiny_clip.clip_config(), loss="sigmoid")
    with torch.no_grad():
        model.logit_bias.fill_(-3.5)
    return model


def downloaded(folder: Path, cache: Path, name: str, revision: str) -> None:
    """Puts a folder where the Hub's client keeps what it has downloaded."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / revision).write_text(commit)


@pytest.mark.parametrize(("make", "options"), [(stage1, {}), (sigmoid_clip, {"loss": "sigmoid"})])
@pytest.mark.parametrize("revision", ["main", "v2"])
def test_training_goes_on_from_an_exported_model_of_the_hub(
    tmp_path: Path, make: Any, options: dict[str, Any], revision: str
) -> None:
    model = make()
    model.export(tmp_path / "folder")
    downloaded(tmp_path / "folder", tmp_path / "cache", "org/model", revision)
    where = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "revision": revision}
    again = type(model).from_pretrained("org/model", **where, **options)
    own = model.pretraining_extras()
    assert own
    for name, value in again.pretraining_extras().items():
        torch.testing.assert_close(value, own[name], rtol=0, atol=0, msg=name)
