import json
import shutil

import pytest
import torch

from hf_vlp.data import ImageTextCollator, PairDataset, PairIterableDataset
from hf_vlp.training import VLPTrainer, apply_stage
from hf_vlp.training.checkpoints import IncompleteCheckpointError
from hf_vlp.training.feature_cache import use_cache
from tests.tiny import blip2 as tiny_blip2
from tests.training import runs

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}


def streamed(folder, **changes):
    model, processor = runs.clip_model()
    return VLPTrainer(
        model, runs.arguments(folder, **changes), ImageTextCollator(processor),
        PairIterableDataset(runs.rows(), seed=1, buffer_size=8), processing_class=processor,
    )  # fmt: skip


def cached(folder, **changes):
    model, processor = tiny_blip2.pretraining_model(seed=3), tiny_blip2.retrieval_processor()
    apply_stage(model, "stage1")
    args, data = runs.arguments(folder, **changes), PairDataset(runs.rows(), seed=1)
    collator = use_cache(model, ImageTextCollator(processor), [data], folder.parent / "cache", args=args)
    return VLPTrainer(model, args, collator, data, processing_class=processor)


def augmented(folder, **changes):
    from hf_vlp.data import TrainTransform

    model, processor = runs.clip_model()
    data = PairDataset(runs.rows(), seed=1, transform=TrainTransform(32, scale=(0.4, 1.0), flip=0.5, color_jitter=0.3))
    return VLPTrainer(
        model, runs.arguments(folder, **changes), ImageTextCollator(processor), data, processing_class=processor
    )


TRAINERS = {
    "clip with dropout": lambda folder, **changes: runs.clip_trainer(folder, dropout=0.3, **changes),
    "clip, sigmoid, gradient cache": lambda folder, **changes: runs.clip_trainer(
        folder, dropout=0.3, grad_cache_chunk_size=2, model_settings={"loss": "sigmoid"}, **changes
    ),
    "clip with bad records": lambda folder, **changes: runs.clip_trainer(
        folder, data=runs.rows(bad=(2, 9)), **changes
    ),
    "clip, augmented": augmented,
    "clip from a stream": streamed,
    "stage 1 with dropout": lambda folder, **changes: runs.stage1_trainer(folder, dropout=0.2, **changes),
    "stage 1 from the feature cache": cached,
    "stage 2 with LoRA, accumulated": lambda folder, **changes: runs.stage2_trainer(
        folder, lora_r=2, gradient_accumulation_steps=2, **changes
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path, kind):
    whole = TRAINERS[kind](tmp_path / "whole", max_steps=6, logging_steps=3, **SAVING)
    whole.train()
    # Step 4 is the end of an epoch, step 2 the middle of one.
    for step in (2, 4) if kind in ("clip with dropout", "clip from a stream") else (2,):
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        torch.manual_seed(step)
        resumed = TRAINERS[kind](folder, max_steps=6, logging_steps=3, **SAVING)
        resumed.train()
        assert runs.fingerprint(runs.weights(resumed.model)) == runs.fingerprint(runs.weights(whole.model))
        for name in ("loss", "grad_norm", "learning_rate"):
            assert runs.losses(resumed, name) == runs.losses(whole, name)
        assert resumed.records.seen == whole.records.seen
        assert resumed.records.bad == whole.records.bad


def test_checkpoints_hold_no_pickle(tmp_path):
    runs.stage2_trainer(tmp_path, lora_r=2, max_steps=2, **SAVING).train()
    suffixes = {path.suffix for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt", ".py", ".md"}


def test_the_number_of_checkpoints_is_kept(tmp_path):
    runs.clip_trainer(tmp_path, max_steps=7, **{**SAVING, "save_total_limit": 2}).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_the_same_command_again_trains_nothing_and_has_the_weights(tmp_path):
    first = runs.clip_trainer(tmp_path, max_steps=3, **SAVING)
    first.train()
    again = runs.clip_trainer(tmp_path, max_steps=3, **SAVING)
    again.model.model.logit_scale.data.zero_()
    output = again.train()
    assert output.global_step == 3
    assert runs.fingerprint(runs.weights(again.model)) == runs.fingerprint(runs.weights(first.model))
    assert again.train(resume_from_checkpoint=True).global_step == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 2e-3}, "arguments.learning_rate: 0.001 -> 0.002"),
        ({"per_device_train_batch_size": 4}, "arguments.per_device_train_batch_size: 6 -> 4"),
        ({"seed": 8}, "arguments.seed: 7 -> 8"),
        ({"max_steps": 9}, "arguments.max_steps: 4 -> 9"),
        ({"data": runs.rows(20)}, "train_dataset.records: 22 -> 20"),
        ({"dropout": 0.5}, "model.config.text_config.attention_dropout: 0.0 -> 0.5"),
        ({"model_settings": {"loss": "sigmoid"}}, "model.config.pretraining.loss: 'softmax' -> 'sigmoid'"),
        ({"trainer_options": {"settings": {"data": {"train_data": "other"}}}}, "data: None -> "),
    ],
)
def test_other_settings_are_an_error_that_lists_them(tmp_path, changes, named):
    runs.clip_trainer(tmp_path, **SAVING).train()
    with pytest.raises(ValueError) as error:
        runs.clip_trainer(tmp_path, **{**SAVING, **changes}).train()
    assert named in str(error.value)
    assert "--allow_changed_settings" in str(error.value)


def test_changed_settings_can_be_allowed(tmp_path, caplog):
    runs.clip_trainer(tmp_path, **SAVING).train()
    longer = runs.clip_trainer(tmp_path, max_steps=6, allow_changed_settings=True, **SAVING)
    assert longer.train().global_step == 6
    assert "arguments.max_steps: 4 -> 6" in caplog.text


def test_what_does_not_decide_the_result_may_change(tmp_path):
    runs.clip_trainer(tmp_path, **SAVING).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    other = runs.clip_trainer(tmp_path, **{**SAVING, "save_steps": 1}, logging_steps=2, sanity=True, sanity_steps=1)
    assert other.train().global_step == 4


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    whole = runs.clip_trainer(tmp_path, **SAVING)
    whole.train()
    newest = tmp_path / "checkpoint-4"
    (newest / "optimizer.safetensors").unlink()
    (tmp_path / ".writing-checkpoint-3").mkdir()
    again = runs.clip_trainer(tmp_path, **SAVING)
    again.train()
    assert again._resumed_from == tmp_path / "checkpoint-2"
    assert runs.fingerprint(runs.weights(again.model)) == runs.fingerprint(runs.weights(whole.model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_a_named_checkpoint_has_to_be_whole(tmp_path):
    runs.clip_trainer(tmp_path, **SAVING).train()
    weights = tmp_path / "checkpoint-2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(IncompleteCheckpointError, match="model.safetensors has changed"):
        runs.clip_trainer(tmp_path, resume=str(tmp_path / "checkpoint-2"), **SAVING).train()
    with pytest.raises(IncompleteCheckpointError, match="manifest.json is missing"):
        runs.clip_trainer(tmp_path, resume=str(tmp_path / "nowhere"), **SAVING).train()


def test_starting_anew_does_not_mix_two_runs(tmp_path):
    runs.clip_trainer(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match="has checkpoints of an earlier run"):
        runs.clip_trainer(tmp_path, resume="never", **SAVING).train()
    runs.clip_trainer(tmp_path / "other", resume="never", **SAVING).train()
    with pytest.raises(ValueError, match="no whole checkpoint to resume from"):
        runs.clip_trainer(tmp_path / "empty", **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    runs.clip_trainer(tmp_path, **SAVING).train()
    settings = tmp_path / "checkpoint-4" / "settings.json"
    assert json.loads(settings.read_text())["model"]["class"] == "CLIPForPreTraining"
    with pytest.raises(ValueError, match="model.class: 'CLIPForPreTraining' -> 'Blip2ForPreTraining'"):
        runs.stage1_trainer(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match="the checkpoint does not fit Blip2ForPreTraining"):
        runs.stage1_trainer(tmp_path, allow_changed_settings=True, max_steps=9, **SAVING).train()


def test_the_best_checkpoint_is_kept(tmp_path):
    options = {"eval_dataset": PairDataset(runs.rows(6))}
    trainer = runs.clip_trainer(
        tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=0.5, trainer_options=options, **{**SAVING, "save_total_limit": 1},
    )  # fmt: skip
    trainer.train()
    best = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    assert trainer.state.best_model_checkpoint == str(best)
    assert best.is_dir()


def test_checkpoints_without_the_frozen_weights(tmp_path):
    whole = runs.stage2_trainer(tmp_path / "whole", lora_r=2, **SAVING)
    whole.train()
    small = runs.stage2_trainer(tmp_path / "small", lora_r=2, save_frozen=False, **SAVING)
    small.train()
    sizes = [(tmp_path / name / "checkpoint-2" / "model.safetensors").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.7 * sizes[0]
    shutil.rmtree(tmp_path / "small" / "checkpoint-4")
    resumed = runs.stage2_trainer(tmp_path / "small", lora_r=2, save_frozen=False, **SAVING)
    resumed.train()
    assert runs.fingerprint(runs.weights(resumed.model)) == runs.fingerprint(runs.weights(whole.model))

    shutil.rmtree(tmp_path / "small" / "checkpoint-4")
    other = runs.stage2_trainer(tmp_path / "small", lora_r=2, save_frozen=False, **SAVING)
    other.model.language_model.model.decoder.layers[0].fc1.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match="those loaded now are others: 1 differ.*fc1.weight"):
        other.train()
