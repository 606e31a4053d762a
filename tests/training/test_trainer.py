import logging

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import CLIPModel

from hf_vlp.data import ErrorRateExceeded, PairDataset, PairIterableDataset, RecordLimits
from hf_vlp.training import VLPTrainer
from hf_vlp.training.evaluators import RetrievalEvaluator
from tests.training import runs

TRAINERS = {
    "clip": runs.clip_trainer,
    "clip_locked": lambda folder, **changes: runs.clip_trainer(folder, stage="locked_image", **changes),
    "stage1": runs.stage1_trainer,
    "stage2": runs.stage2_trainer,
    "stage2_lora": lambda folder, **changes: runs.stage2_trainer(folder, lora_r=2, **changes),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_what_is_frozen_stays_to_the_bit_and_what_trains_changes(tmp_path, kind):
    trainer = TRAINERS[kind](tmp_path, max_steps=2)
    before = runs.weights(trainer.model)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= trained
    # Biases of keys have no gradient (softmax ignores them), and a loss may not reach every embedding row.
    assert {name for name in trained - changed if "k_proj.bias" not in name and "key.bias" not in name} == set()
    if kind.startswith("stage2"):
        frozen = {name for name in before if name.startswith("language_model") and ".lora_" not in name}
        assert frozen
        assert not frozen & changed


def test_terms_are_logged_under_their_names(tmp_path):
    trainer = runs.stage1_trainer(tmp_path, max_steps=3)
    trainer.train()
    for entry in trainer.state.log_history[:3]:
        assert entry["loss"] == pytest.approx(sum(entry[f"loss_{term}"] for term in ("itc", "itm", "itg")), rel=1e-5)
        assert 0 < entry["temperature"] < 1


def test_a_log_line_is_the_mean_of_its_steps(tmp_path):
    every = runs.stage1_trainer(tmp_path / "1", max_steps=4, logging_steps=1)
    every.train()
    seldom = runs.stage1_trainer(tmp_path / "4", max_steps=4, logging_steps=4, logging_first_step=False)
    seldom.train()
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg"):
        (mean,) = runs.losses(seldom, name)
        assert mean == pytest.approx(sum(runs.losses(every, name)) / 4, rel=1e-5)


def test_draws_of_an_objective_depend_on_the_step_alone(tmp_path):
    found = []
    for noise in (0, 1):
        trainer = runs.stage1_trainer(tmp_path / str(noise), max_steps=3)
        torch.manual_seed(noise)
        trainer.train()
        found.append(runs.fingerprint(runs.weights(trainer.model)))
    assert found[0] == found[1]


def test_accumulation_over_tokens_is_the_large_batch(tmp_path):
    options = {"optim": "sgd", "max_steps": 2, "learning_rate": 0.1, "max_grad_norm": 0.0}
    whole = runs.stage2_trainer(tmp_path / "whole", per_device_train_batch_size=6, **options)
    parts = runs.stage2_trainer(
        tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=3, **options
    )
    whole.train()
    parts.train()
    assert runs.losses(parts) == pytest.approx(runs.losses(whole), rel=1e-5)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(parts.model.state_dict()[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradient_caching_is_the_plain_step(tmp_path, loss):
    options = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "model_settings": {"loss": loss}}
    plain = runs.clip_trainer(tmp_path / "plain", **options)
    cached = runs.clip_trainer(tmp_path / "cached", grad_cache_chunk_size=2, **options)
    plain.train()
    cached.train()
    assert runs.losses(cached, "loss_itc") == pytest.approx(runs.losses(plain, "loss_itc"), rel=1e-5)
    assert runs.losses(cached) == pytest.approx(runs.losses(plain), rel=1e-5)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(cached.model.state_dict()[name], value, atol=2e-6, rtol=1e-5)


def test_gradient_caching_needs_the_two_halves(tmp_path):
    with pytest.raises(ValueError, match="has no embed/objective halves"):
        runs.stage1_trainer(tmp_path, grad_cache_chunk_size=2)


def test_accumulating_a_contrastive_loss_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        runs.clip_trainer(tmp_path, gradient_accumulation_steps=2)
    assert "--grad_cache_chunk_size is" in caplog.text
    caplog.clear()
    runs.stage2_trainer(tmp_path, gradient_accumulation_steps=2)
    assert "contrastive" not in caplog.text


def test_fewer_records_than_a_batch_are_an_error_before_training(tmp_path):
    with pytest.raises(ValueError, match="5 records do not fill one batch of 6"):
        runs.clip_trainer(tmp_path, data=runs.rows(5), dataloader_drop_last=True)


def test_an_uneven_last_batch_is_trained_on(tmp_path):
    trainer = runs.clip_trainer(tmp_path, max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 8, "22 records in batches of 6 are 4 steps an epoch"
    assert trainer.records.seen == 44


def test_bad_records_are_counted_named_and_survive(tmp_path, caplog):
    trainer = runs.clip_trainer(tmp_path, data=runs.rows(bad=(3, 8)), max_steps=-1, num_train_epochs=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.records.bad == {"image_not_an_image": 4}
    assert runs.losses(trainer, "records_bad")[-1] == 4
    assert "44 records seen, 40 used, 4 left out" in caplog.text
    assert "tiny [3]" in caplog.text


def test_a_batch_without_good_records_is_skipped_and_the_rest_trained(tmp_path):
    bad = tuple(range(22))[1:]
    limits = {"limits": RecordLimits(max_bad_rate=1.0)}
    trainer = runs.clip_trainer(
        tmp_path, data=runs.rows(bad=bad), max_steps=-1, num_train_epochs=1, collator_options=limits,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    before = runs.weights(trainer.model)
    with pytest.warns(UserWarning, match="batch of one pair"):
        trainer.train()
    assert trainer.skipped_batches == 3
    assert trainer.records.good == 1
    assert runs.losses(trainer, "batches_skipped")[-1] == 3
    assert set(before) == set(trainer.model.state_dict())


def test_too_many_bad_records_stop_the_run(tmp_path):
    limits = {"limits": RecordLimits(max_bad_rate=0.1, min_records=10)}
    trainer = runs.clip_trainer(tmp_path, data=runs.rows(bad=(0, 1, 2, 3)), collator_options=limits)
    with pytest.raises(ErrorRateExceeded, match="image_not_an_image"):
        trainer.train()


def test_the_rate_is_judged_over_all_workers(tmp_path):
    # Each worker alone sees too few records to judge.
    limits = {"limits": RecordLimits(max_bad_rate=0.1, min_records=15)}
    trainer = runs.clip_trainer(
        tmp_path, data=runs.rows(bad=(0, 1, 2, 3)), collator_options=limits, dataloader_num_workers=2,
        max_steps=-1, num_train_epochs=1,
    )  # fmt: skip
    with pytest.raises(ErrorRateExceeded):
        trainer.train()


def test_workers_change_nothing(tmp_path):
    found = []
    for workers in (0, 2):
        trainer = runs.clip_trainer(tmp_path / str(workers), dataloader_num_workers=workers, max_steps=6, dropout=0.2)
        trainer.train()
        found.append(runs.fingerprint(runs.weights(trainer.model)))
    assert found[0] == found[1]


def test_evaluation_gives_the_terms_and_the_evaluators_metrics(tmp_path):
    options = {"eval_dataset": PairDataset(runs.rows(6), seed=2), "evaluator": lambda model: {"t2i_r1": 0.5}}
    trainer = runs.clip_trainer(tmp_path, trainer_options=options, per_device_eval_batch_size=6)
    metrics = trainer.evaluate()
    model = trainer.model.eval()
    records = [options["eval_dataset"][index] for index in range(6)]
    batch = trainer.data_collator(records)
    batch.pop("record_report")
    with torch.no_grad():
        expected = model(**batch).loss_itc.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_loss_itc"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_t2i_r1"] == 0.5


def test_evaluating_during_training_changes_nothing(tmp_path):
    found = []
    for strategy in ("no", "steps"):
        trainer = runs.clip_trainer(
            tmp_path / strategy, dropout=0.2, eval_strategy=strategy, eval_steps=1,
            trainer_options={"eval_dataset": {"a": PairDataset(runs.rows(6)), "b": PairDataset(runs.rows(7))}},
        )  # fmt: skip
        trainer.train()
        found.append(runs.fingerprint(runs.weights(trainer.model)))
    assert found[0] == found[1]
    assert len(runs.losses(trainer, "eval_b_loss_itc")) == 4


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = runs.clip_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.visual_projection.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        trainer.train()


def test_parts_learn_at_their_own_rates(tmp_path):
    trainer = runs.clip_trainer(
        tmp_path, part_learning_rates=["model.text_model=1e-9"], lr_scheduler_type="constant", max_steps=2
    )
    before = runs.weights(trainer.model)
    trainer.train()
    moved = {name: (value - before[name]).abs().max().item() for name, value in trainer.model.state_dict().items()}
    assert max(value for name, value in moved.items() if name.startswith("model.text_model")) < 1e-7
    assert moved["model.visual_projection.weight"] > 1e-4
    assert trainer.state.log_history[0]["learning_rate_model.text_model"] == pytest.approx(1e-9)
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)


def test_the_temperature_is_clamped_after_each_step(tmp_path):
    trainer = runs.clip_trainer(tmp_path, learning_rate=5.0, max_steps=3)
    trainer.train()
    assert 0 <= trainer.model.model.logit_scale.item() <= 4.6052
    assert all(1 <= value <= 100.001 for value in runs.losses(trainer, "logit_scale"))


def test_a_stream_is_trained_on_over_several_epochs(tmp_path):
    model, processor = runs.clip_model()
    trainer = VLPTrainer(
        model, runs.arguments(tmp_path, max_steps=9), runs.clip_trainer(tmp_path).data_collator,
        PairIterableDataset(runs.rows(), seed=1, buffer_size=8), processing_class=processor,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.records.seen == 6 * 3 + 4 + 6 * 3 + 4 + 6


def test_a_stream_needs_a_number_of_steps(tmp_path):
    model, processor = runs.clip_model()
    with pytest.raises(ValueError, match="max_steps"):
        VLPTrainer(
            model, runs.arguments(tmp_path, max_steps=-1), runs.clip_trainer(tmp_path).data_collator,
            PairIterableDataset(runs.rows()),
        )  # fmt: skip


def test_export_is_what_transformers_loads(tmp_path):
    trainer = runs.clip_trainer(tmp_path, max_steps=1)
    trainer.train()
    folder = trainer.export(metrics={"eval_t2i_r1_itc": 0.25, "eval_runtime": 3.0, "epoch": 0.5})
    native = CLIPModel.from_pretrained(folder)
    own = trainer.model.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in native.state_dict().items() if name in own)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    card = (folder / "README.md").read_text()
    assert "t2i_r1_itc" in card
    assert "learning_rate" in card
    assert "eval_runtime" not in card
    metadata = ModelCard(card).data
    assert metadata.model_name == tmp_path.name
    assert [result.metric_type for result in metadata.eval_results] == ["t2i_r1_itc"]


def test_the_card_names_what_was_evaluated_and_what_it_started_from(tmp_path):
    evaluator = RetrievalEvaluator(None, [{**row, "source": "elsewhere/test"} for row in runs.rows(2)])
    start = {
        "vision_model": "org/clip",
        "qformer": "scratch",
        "language_model": str(tmp_path),
        "tokenizer": "org/words",
    }
    settings = {"data": {"train_data": "org/pairs"}, "model_arguments": start}
    trainer = runs.clip_trainer(tmp_path, trainer_options={"evaluator": evaluator, "settings": settings})
    card = (trainer.export(metrics={"eval_t2i_r1_itc": 0.25}) / "README.md").read_text()
    assert "**Data.** org/pairs" in card
    assert "| t2i_r1_itc | 0.25 | elsewhere/test |" in card
    metadata = ModelCard(card).data
    assert metadata.base_model == ["org/clip"]
    assert metadata.eval_results[0].dataset_name == "elsewhere/test"
    # Without rows that tell, it is the training data.
    trainer.evaluator = None
    assert (
        "| t2i_r1_itc | 0.25 | org/pairs |" in (trainer.export(metrics={"t2i_r1_itc": 0.25}) / "README.md").read_text()
    )


def test_tensorboard_gets_the_terms(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = runs.stage1_trainer(tmp_path, max_steps=2, report_to=["tensorboard"])
    trainer.train()
    (events,) = tmp_path.rglob("events.out*")
    read = EventAccumulator(str(events.parent)).Reload()
    assert {"train/loss_itc", "train/loss_itm", "train/loss_itg"} <= set(read.Tags()["scalars"])


@pytest.mark.parametrize("chunk", [0, 2])
def test_bfloat16_autocast_keeps_float32_weights(tmp_path, chunk):
    exact = runs.clip_trainer(tmp_path / "32", optim="sgd", max_steps=2)
    mixed = runs.clip_trainer(tmp_path / "16", optim="sgd", max_steps=2, bf16=True, grad_cache_chunk_size=chunk)
    exact.train()
    mixed.train()
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    assert runs.losses(mixed) != runs.losses(exact), "nothing was computed in 16 bits"
    assert runs.losses(mixed) == pytest.approx(runs.losses(exact), rel=0.05)


def test_pushing_at_the_end(tmp_path, monkeypatch):
    from hf_vlp.hub import pushing

    trainer = runs.clip_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.args.push_to_hub, trainer.args.hub_model_id = True, "org/name"
    pushed = []
    monkeypatch.setattr(pushing, "push", lambda folder, name, **options: pushed.append((folder, name)) or "address")
    trainer.finish()
    assert pushed == [(tmp_path / "model", "org/name")]
