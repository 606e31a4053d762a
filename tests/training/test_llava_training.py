"""LLaVA in training: resumed runs, two ranks, adapters saved alone and merged."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from hf_vlp.cli.errors import EXIT_FAILED
from hf_vlp.cli.main import main
from hf_vlp.models.llava.modeling_llava import LlavaForConditionalGeneration
from hf_vlp.training.adapters import AdapterFolderError, base_of, load_adapters, merge_folder, save_adapters
from hf_vlp.training.lora import LoraArguments, add_lora
from tests.distributed import run_ranks
from tests.tiny import llava as tiny
from tests.training import runs
from tests.training.llava_runs import llava_trainer
from tests.training.test_two_ranks import as_rank

LORA = {"lora_r": 2, "pack_to": 160}


def weights_after(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    trainer = llava_trainer(folder, **options)
    trainer.train()
    return runs.weights(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("options", [LORA, {"pack_to": 160}, {"tiles": True}], ids=["lora", "packed", "tiles"])
def test_a_resumed_run_is_an_unbroken_one(options: dict[str, Any], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = weights_after(tmp_path / "whole", **options, **saving)
    folder = tmp_path / "broken"
    first = llava_trainer(folder, **options, **saving)
    stop = type("Stop", (transformers.TrainerCallback,), {"on_step_end": _stop_at_two})
    first.add_callback(stop())
    first.train()
    assert first.state.global_step == 2
    resumed = weights_after(folder, **options, **saving)
    assert set(resumed) == set(whole)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def _stop_at_two(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    if state.global_step == 2:
        control.should_training_stop = True


RANKS: dict[str, dict[str, Any]] = {
    "tower tuned, packed": {"stage": "stage2_vision", "pack_to": 160},
    "tiles": {"tiles": True, "stage": "stage1"},
    "grouped by length": {"group_by_length": True},
}


def train_on_ranks() -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    """Losses and trained weights of every setting, on this rank (or alone)."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        as_rank()
    found = {}
    for name, options in RANKS.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = llava_trainer(
                folder,
                per_device_train_batch_size=4 // size,
                optim="sgd",
                learning_rate=0.05,
                max_grad_norm=0.0,
                **options,
            )
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
        found[name] = (losses, trained)
    return found


@pytest.mark.slow
def test_two_ranks_are_one() -> None:
    """Conversations without a picture, with one and with two: a rank may have none in its part of a batch."""
    expected = train_on_ranks()
    for found in run_ranks(train_on_ranks, 2, timeout=300):
        for name, (losses, weights) in expected.items():
            assert found[name][0] == pytest.approx(losses, rel=1e-5), name
            for path, value in weights.items():
                torch.testing.assert_close(found[name][1][path], value, atol=2e-6, rtol=1e-4)


# Adapters


def trained_with_adapters(folder: Path) -> tuple[Any, Any]:
    """A model whose adapters and projector are far from their start, and its base's folder."""
    model, processor = tiny.llava()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    add_lora(model, LoraArguments(lora_r=2, lora_targets=["q_proj", "up_proj"]))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval(), processor


def test_adapters_are_small_and_merge_to_the_same_outputs(tmp_path: Path) -> None:
    model, processor = trained_with_adapters(tmp_path / "base")
    folder = save_adapters(model, tmp_path / "adapters", base=tmp_path / "base")
    saved = load_file(folder / "trained.safetensors")
    assert set(saved) == {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    batch = tiny.batch(processor)
    batch.pop("labels")
    with torch.no_grad():
        expected = model(**batch).logits

    again = load_adapters(LlavaForConditionalGeneration.from_pretrained(tmp_path / "base"), folder).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)

    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    native, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(native(**batch).logits, expected, atol=1e-5, rtol=1e-4)
        plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert type(plain) is transformers.LlavaForConditionalGeneration
    base = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert all("projector" in name or "q_proj" in name or "up_proj" in name for name in changed)
    assert not any(name.startswith("vision_tower") for name in changed)


def test_folders_that_cannot_be_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = trained_with_adapters(tmp_path / "base")
    folder = save_adapters(model, tmp_path / "adapters", base=tmp_path / "base")
    assert Path(base_of(folder)) == (tmp_path / "base").resolve()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterFolderError, match="--base"):
        base_of(folder)
    assert merge_folder(folder, tmp_path / "merged", base=tmp_path / "elsewhere").is_dir()
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == EXIT_FAILED
    assert "exists" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "elsewhere"), str(tmp_path / "out")]) == EXIT_FAILED
    assert "adapters.json" in capsys.readouterr().err
    other, _ = tiny.llava(lm=tiny.language_model(len(tiny.tokenizer()), width=32))
    with pytest.raises(AdapterFolderError, match="does not fit the base"):
        load_adapters(other, folder)
    wrong, _ = tiny.llava(tiles=True)
    with pytest.raises(AdapterFolderError, match="'llava'"):
        load_adapters(wrong, folder)


def test_targets_that_match_nothing() -> None:
    model, _ = tiny.llava()
    with pytest.raises(ValueError, match="match no layer"):
        add_lora(model, LoraArguments(lora_r=2, lora_targets=["c_attn"]))
