"""Qwen-VL and InstructBLIP in training: two ranks, what is exported."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_vlp.models.qwen_vl.modeling_qwen_vl import QwenVLForConditionalGeneration
from hf_vlp.models.qwen_vl.processing_qwen_vl import QwenVLProcessor
from tests.distributed import run_ranks
from tests.training import runs
from tests.training.qwen_vl_runs import TRAINERS, qwen_vl_trainer
from tests.training.test_two_ranks import as_rank

# Plain SGD: Adam divides by the gradient's size, which would blow rounding up where a gradient is all but zero.
RANKS = (
    ("qwen_vl", {"pack_to": 160, "stage": "multitask"}),
    ("qwen_vl", {"stage": "pretrain"}),
    ("instructblip", {}),
)
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


def train_on_ranks() -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    """All of `RANKS` in one group of processes: starting them costs more than the training."""
    size = 1
    if dist.is_initialized():
        size = dist.get_world_size()
        as_rank()
    found = []
    for kind, options in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            trainer = TRAINERS[kind](folder, per_device_train_batch_size=6 // size, **SGD, **options)
            trainer.train()
            trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
            found.append((runs.losses(trainer), trained))
    return found


@pytest.mark.slow
def test_two_ranks_are_one() -> None:
    one = train_on_ranks()
    for rank in run_ranks(train_on_ranks, 2, timeout=400):
        for (losses, expected), (found_losses, found) in zip(one, rank, strict=True):
            assert found_losses == pytest.approx(losses, rel=1e-4)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4)


def test_what_a_run_with_adapters_exports_is_merged(tmp_path: Path) -> None:
    trainer = qwen_vl_trainer(tmp_path, lora_r=2, pack_to=160, max_steps=2)
    trainer.train()
    trainer.export(tmp_path / "model")
    model = QwenVLForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = QwenVLProcessor.from_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in model.state_dict())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    trained = trainer.model.eval()
    torch.testing.assert_close(model(**batch).logits, trained(**batch).logits, atol=1e-5, rtol=1e-4)
    assert processor.num_query_tokens == model.config.vision_config.num_query_tokens
    files = {path.name for path in (tmp_path / "model").iterdir()}
    code = {"configuration_qwen_vl.py", "modeling_qwen_vl.py", "modeling_qwen_vl_visual.py", "processing_qwen_vl.py"}
    assert code <= files
