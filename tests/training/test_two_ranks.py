"""Two ranks train as one process with the joined batch: losses step by step, and weights at the end."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_vlp.data import ErrorRateExceeded, ImageTextCollator, PairDataset, PairIterableDataset, RecordLimits
from hf_vlp.training import VLPTrainer
from tests.distributed import run_ranks
from tests.training import runs

pytestmark = pytest.mark.slow
# Plain SGD: Adam divides by the gradient's size, which would blow rounding up where a gradient is all but zero.
SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 5}
# Where such steps would be too large for rounding to stay small.
GENTLE = {"learning_rate": 0.01}


def language_model(folder, **changes):
    """A foreign model, whose loss is a mean over the tokens of one rank."""
    from transformers import OPTForCausalLM

    from hf_vlp.training.text import TextCollator, TextDataset
    from tests.tiny import blip2 as tiny

    torch.manual_seed(3)
    model = tiny.wake(OPTForCausalLM(tiny.opt_config(dropout=0.0)))
    return VLPTrainer(
        model, runs.arguments(folder, **changes), TextCollator(tiny.opt_tokenizer()), TextDataset(runs.rows(), seed=1)
    )


def streamed(folder, **changes):
    model, processor = runs.clip_model()
    return VLPTrainer(
        model, runs.arguments(folder, **changes), ImageTextCollator(processor),
        PairIterableDataset(runs.rows(), seed=1, buffer_size=8), processing_class=processor,
    )  # fmt: skip


def evaluated(folder, **changes):
    return runs.clip_trainer(
        folder, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=8 // dist_size(),
        trainer_options={"eval_dataset": PairDataset(runs.rows(15), seed=2)}, **changes,
    )  # fmt: skip


def with_bad_records(folder, **changes):
    return runs.clip_trainer(
        folder, data=runs.rows(bad=(1, 4, 17)), collator_options={"limits": RecordLimits(max_bad_rate=0.5)}, **changes
    )


TRAINERS = {
    "clip": runs.clip_trainer,
    "clip, sigmoid": lambda folder, **changes: runs.clip_trainer(
        folder, model_settings={"loss": "sigmoid"}, **changes
    ),
    "clip, gradient cache": lambda folder, **changes: runs.clip_trainer(folder, grad_cache_chunk_size=2, **changes),
    "clip, evaluated": evaluated,
    "clip, bad records": with_bad_records,
    "clip, streamed": streamed,
    "stage 1": runs.stage1_trainer,
    "stage 2": runs.stage2_trainer,
    "stage 2, accumulated": lambda folder, **changes: runs.stage2_trainer(
        folder, gradient_accumulation_steps=2, **changes
    ),
    "language model": language_model,
    "albef": lambda folder, **changes: runs.albef_trainer(folder, **(changes | GENTLE)),
    "blip": lambda folder, **changes: runs.blip_trainer(folder, **(changes | GENTLE)),
    "albef, random negatives": lambda folder, **changes: runs.albef_trainer(
        folder, model_settings={"negatives": "random", "objectives": ("itc", "itm")}, **(changes | GENTLE)
    ),
}


STEPS = 20
MOMENTUM = [(kind, across) for kind in ("albef", "blip") for across in ("joined", "local")]


def dist_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def as_rank() -> None:
    """What a launcher puts into the environment."""
    for name, value in {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist_size()}.items():
        os.environ[name] = str(value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def train_rank(kind: str, folder: str) -> dict:
    trainer = TRAINERS[kind](folder, per_device_train_batch_size=4, **SGD)
    trainer.train()
    return {"log": trainer.state.log_history, "weights": runs.weights(trainer.model), "seen": trainer._seen_and_bad}


def everything(folder: str) -> dict:
    """All that the tests below look at, in one pair of processes: starting them costs more than the training."""
    as_rank()
    results: dict = {kind: train_rank(kind, f"{folder}/{number}") for number, kind in enumerate(TRAINERS)}
    results["skipping"] = skip_rank(f"{folder}/skip")
    results["stopping"] = stop_rank(f"{folder}/stop")
    results["whole"] = resume_rank(f"{folder}/whole", 0)
    results["broken"] = resume_rank(f"{folder}/broken", 3)
    results["resumed"] = resume_rank(f"{folder}/broken", 0)
    for kind, across in MOMENTUM:
        results[f"{kind}, {across}"] = momentum_rank(f"{folder}/{kind}_{across}", kind, across)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(everything, 2, str(tmp_path_factory.mktemp("ranks")), timeout=580)


@pytest.mark.parametrize("kind", TRAINERS)
def test_two_ranks_are_one_process(tmp_path: Path, ranks: list[dict], kind: str):
    one = TRAINERS[kind](tmp_path / "one", per_device_train_batch_size=8, **SGD)
    one.train()
    first, second = (rank[kind] for rank in ranks)
    for name, value in one.model.state_dict().items():
        assert torch.equal(first["weights"][name], second["weights"][name]), "the ranks agree to the bit"
        torch.testing.assert_close(first["weights"][name], value, atol=2e-6, rtol=2e-5)
    compared = 0
    for ours, theirs in zip(one.state.log_history, first["log"], strict=True):
        for name in ours:
            if "loss" in name and name != "train_loss":
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5), name
                compared += 1
    assert compared >= 5
    assert first["seen"] == one._seen_and_bad


def skip_rank(folder: str) -> dict:
    # Rank 1 gets the second half of each batch of four: the last batch leaves it without a good record.
    data = runs.rows(12, bad=(10, 11))
    trainer = runs.clip_trainer(
        folder, data=data, per_device_train_batch_size=2, max_steps=-1, num_train_epochs=1,
        collator_options={"limits": RecordLimits(max_bad_rate=0.5)},
    )  # fmt: skip
    trainer.train_dataset.set_epoch(0)
    loader = trainer.get_train_dataloader()
    loader.batch_sampler.shuffle = False
    trainer.get_train_dataloader = lambda: loader
    trainer.train()
    return {"skipped": trainer.skipped_batches, "weights": runs.weights(trainer.model), "bad": trainer.record_report()}


def test_a_batch_that_one_rank_cannot_use_is_skipped_by_all(ranks: list[dict]):
    first, second = (rank["skipping"] for rank in ranks)
    assert first["skipped"] == second["skipped"] == 1
    assert first["bad"].seen == second["bad"].seen == 12
    assert first["bad"].bad == {"image_not_an_image": 2}
    assert runs.fingerprint(first["weights"]) == runs.fingerprint(second["weights"])


def stop_rank(folder: str) -> str:
    # No rank alone sees enough records to judge; the two together do.
    trainer = runs.clip_trainer(
        folder, data=runs.rows(bad=tuple(range(0, 22, 3))), per_device_train_batch_size=4, max_steps=5,
        collator_options={"limits": RecordLimits(max_bad_rate=0.1, min_records=15)},
    )  # fmt: skip
    try:
        trainer.train()
    except ErrorRateExceeded as error:
        return str(error)
    return "went on"


def test_too_many_bad_records_stop_all_ranks_with_the_account_of_all(ranks: list[dict]):
    messages = [rank["stopping"] for rank in ranks]
    assert messages[0] == messages[1]
    assert "of 16 records are bad" in messages[0]


def resume_rank(folder: str, steps: int) -> dict:
    trainer = runs.stage1_trainer(
        folder, dropout=0.2, per_device_train_batch_size=3, max_steps=6, save_strategy="steps", save_steps=2
    )
    if steps:
        stop_after(trainer, steps)
    trainer.train()
    return {"weights": runs.weights(trainer.model), "step": trainer.state.global_step}


def stop_after(trainer: VLPTrainer, steps: int) -> None:
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= steps

    trainer.add_callback(Stop())


def test_two_ranks_resume_to_the_bit_with_dropout(ranks: list[dict]):
    for rank in ranks:
        assert [rank[name]["step"] for name in ("whole", "broken", "resumed")] == [6, 3, 6]
    whole, broken, resumed = (runs.fingerprint(ranks[0][name]["weights"]) for name in ("whole", "broken", "resumed"))
    assert whole == resumed
    assert whole != broken


def momentum_rank(folder: str, kind: str, across: str) -> dict:
    """AdamW and dropout: queue, pointer and twin have to agree although the ranks' masks differ."""
    make = {"albef": runs.albef_trainer, "blip": runs.blip_trainer}[kind]
    settings = {"across_ranks": across}
    trainer = make(folder, dropout=0.1, model_settings=settings, per_device_train_batch_size=4, max_steps=STEPS)
    before = runs.weights(trainer.model)
    trainer.train()
    return {"before": before, "weights": runs.weights(trainer.model)}


@pytest.mark.parametrize(("kind", "across"), MOMENTUM)
def test_queue_pointer_and_twin_agree_after_twenty_steps(ranks: list[dict], kind: str, across: str):
    first, second = (rank[f"{kind}, {across}"]["weights"] for rank in ranks)
    before = ranks[0][f"{kind}, {across}"]["before"]
    assert set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert int(first["steps"]) == STEPS
    # 22 rows: six epochs of 8, 8 and 6 pairs, and two batches of 8 more.
    assert int(first["queue.position"]) == (6 * 22 + 16) % 13
    moved = {name.split(".")[0] for name, value in first.items() if not torch.equal(value, before[name])}
    assert {"queue", "momentum", "retrieval" if kind == "albef" else "model"} <= moved
