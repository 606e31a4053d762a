"""Packed, streamed and length-grouped conversations under the trainer: a resumed run is the unbroken one."""

from pathlib import Path

import datasets
import pytest
import torch

from hf_vlp.data.conversations import ConversationCollator, ConversationDataset, ConversationIterableDataset
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training.instructions import conversation_dataset, stop_at_turns
from tests.tiny import llava as tiny
from tests.training import runs
from tests.training.llava_runs import conversations


def _trainer(folder: Path, kind: str, **changes) -> VLPTrainer:
    model, processor = tiny.llava(seed=3)
    apply_stage(model, "stage2")
    rows = conversations()
    if "stream" in kind:
        streamed = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": [rows[:12], rows[12:]]})
        data = ConversationIterableDataset(streamed, seed=1, buffer_size=5)
    else:
        data = ConversationDataset(rows, seed=1, group_by_length="grouped" in kind, image_tokens=4)
    collator = ConversationCollator(processor, pack_to=256 if "packed" in kind else None)
    return VLPTrainer(model, runs.arguments(folder, **changes), collator, data, processing_class=processor)


def _rows(shards):
    for shard in shards:
        yield from shard


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "packed stream", "grouped"])
def test_a_resumed_run_is_an_unbroken_one(kind: str, tmp_path: Path) -> None:
    # Seven steps are more than one epoch of 22 rows in batches of 6.
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "max_steps": 7}
    whole = _trainer(tmp_path / "whole", kind, **saving)
    whole.train()
    resumed = _trainer(tmp_path / "resumed", kind, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = runs.weights(whole.model)
    for name, value in runs.weights(resumed.model).items():
        assert torch.equal(value, expected[name]), name
    fresh = runs.weights(_trainer(tmp_path / "fresh", kind, **saving).model)
    assert any(not torch.equal(value, expected[name]) for name, value in fresh.items())


def test_grouping_is_asked_for_with_the_processor() -> None:
    _, processor = tiny.llava()
    rows = conversations()
    assert conversation_dataset(rows, seed=1).epoch_order(0, 6, 1) is None
    grouped = conversation_dataset(rows, seed=1, group_for=processor)
    expected = ConversationDataset(rows, seed=1, group_by_length=True, image_tokens=4)
    assert torch.equal(grouped.epoch_order(2, 6, 2), expected.epoch_order(2, 6, 2))
    stream = datasets.IterableDataset.from_generator(_rows, gen_kwargs={"shards": [rows]})
    with pytest.raises(ValueError, match="--group_by_length needs all lengths"):
        conversation_dataset(stream, seed=1, group_for=processor)


def test_generation_stops_at_the_end_of_a_turn() -> None:
    model, processor = tiny.llava()
    stop_at_turns(model, processor, "vicuna_v1")
    assert model.generation_config.eos_token_id == 2
    # `<|im_end|>` is no token of the vocabulary yet.
    stop_at_turns(model, processor, "mpt")
    assert model.generation_config.eos_token_id == 2
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.eos_token_id = [2, 3]
    stop_at_turns(model, processor, "mpt")
    assert model.generation_config.eos_token_id == [2, 3, end]
