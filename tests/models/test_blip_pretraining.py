"""BLIP's pretraining: terms, sharing, ranks, checkpoints, native folders, fine-tuning, retrieval on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from hf_vlp.models.blip.backbone_blip import MissingWeightsError
from hf_vlp.models.blip.med_blip import BlipMED, tied_names
from hf_vlp.models.blip.modeling_blip import BlipForConditionalGeneration, BlipForImageTextRetrieval
from hf_vlp.models.blip.pretraining_blip import BlipForPreTraining
from hf_vlp.models.blip.retrieval_blip import BlipForRetrievalFineTuning
from hf_vlp.models.blip.tasks_blip import (
    BlipForQuestionAnsweringFineTuning,
    BlipForVisualDialog,
    BlipTasksForQuestionAnswering,
    BlipTasksForVisualReasoning,
)
from hf_vlp.models.pretraining import EXTRAS_FILE
from tests.distributed import run_ranks
from tests.tiny.blip import blip_config, images, spread_weights, texts, towers
from tests.tiny.cached import as_repository

LENGTHS = [5, 7, 3, 6, 4, 8]


def pretraining(seed: int = 0, **settings: Any) -> BlipForPreTraining:
    model = BlipForPreTraining(blip_config(vision_width=48), **({"queue_size": 12} | settings))
    spread_weights(model.model, seed)
    model.model.tie_weights()
    model.reset_momentum()
    return model.train()


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    ids, mask = texts(LENGTHS)
    return {"pixel_values": images(6)[rows], "input_ids": ids[rows], "attention_mask": mask[rows]}


def test_the_shared_tensors_exist_once():
    model = pretraining()
    med = model.model
    parameters = dict(med.named_parameters(remove_duplicate=False))
    for decoder, encoder in tied_names(med.config).items():
        assert parameters[decoder] is parameters[encoder]
    apart = {n for n in parameters if n.startswith("text_decoder.bert.") and n not in tied_names(med.config)}
    assert apart and all(".attention." in name for name in apart)


def test_a_step_has_three_terms_and_trains_everything_but_the_twin():
    model = pretraining()
    before = {name: value.clone() for name, value in model.momentum.state_dict().items()}
    output = model(**batch(), alpha=0.4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output.loss, output.loss_itc + output.loss_itm + output.loss_lm)
    assert output.itm_logits.shape == (18, 2) and output.itm_labels.sum() == 6
    output.loss.backward()
    lacking = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not lacking
    assert all(torch.equal(before[name], value) for name, value in model.momentum.state_dict().items())
    assert int(model.queue.position) == 6 and int(model.steps) == 1
    levels = model.chance_levels(batch())
    assert set(levels) == {"loss_itc", "loss_itm", "loss_lm"}


@pytest.mark.parametrize("objectives", [("itc",), ("itc", "itm"), ("itc", "lm"), ("itm", "lm"), ("lm",)])
def test_terms_can_be_left_out_and_stay_the_same(objectives: tuple[str, ...]):
    every = pretraining()(**batch(), alpha=0.0, generator=torch.Generator().manual_seed(0))
    model = pretraining(objectives=objectives)
    some = model(**batch(), alpha=0.0, generator=torch.Generator().manual_seed(0))
    for name in objectives:
        torch.testing.assert_close(some[f"loss_{name}"], every[f"loss_{name}"])
    assert {key for key in some if key.startswith("loss_")} == {f"loss_{name}" for name in objectives}


@pytest.mark.parametrize("objectives", [("itc",), ("itm",)])
def test_fine_tuning_leaves_terms_out_too(objectives: tuple[str, ...]):
    def step(**settings: Any) -> Any:
        model = BlipForRetrievalFineTuning(blip_config(vision_width=48), queue_size=12, **settings)
        spread_weights(model.model)
        model.reset_momentum()
        draws = torch.Generator().manual_seed(0)
        return model.train()(**batch(), image_ids=torch.arange(6), alpha=0.0, generator=draws)

    every, some = step(), step(objectives=objectives)
    (name,) = objectives
    assert {key for key in some if key.startswith("loss_")} == {f"loss_{name}"}
    torch.testing.assert_close(some.loss, every[f"loss_{name}"])
    with pytest.raises(ValueError, match="some of 'itc', 'itm', not"):
        step(objectives=("itc", "lm"))


def test_padding_and_checkpointing_change_nothing():
    negatives = (torch.tensor([1, 2, 3, 4, 5, 0]), torch.tensor([2, 3, 4, 5, 0, 1]))
    plain = pretraining()
    expected = plain(**batch(), negatives=negatives)
    expected.loss.backward()
    other = pretraining()
    other.gradient_checkpointing_enable()
    inputs = batch()
    inputs["input_ids"] = torch.nn.functional.pad(inputs["input_ids"], (0, 4))
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 4))
    found = other(**inputs, negatives=negatives)
    found.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss)
    for (name, one), (_, two) in zip(other.named_parameters(), plain.named_parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_images_are_projected_once_for_all_their_texts():
    model = pretraining()
    seen: list[int] = []
    layer = model.model.text_encoder.encoder.layer[0].crossattention.self.key
    layer.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    decoder = model.model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    decoder.register_forward_hook(lambda module, inputs, output: seen.append(-1))
    model(**batch())
    assert seen == [6]


def test_the_temperature_is_clamped_and_pairs_of_one_image_are_no_negatives():
    model = pretraining(temperature=0.9)
    ids = torch.tensor([1, 1, 1, 2, 2, 2])
    output = model(**batch(), image_ids=ids)
    assert float(output.temperature) == pytest.approx(0.5)
    assert output.weights_i2t[ids[:, None] == ids[None]].eq(0).all()
    with pytest.raises(ValueError, match="true pairs"):
        model(**batch(), negatives=(torch.arange(6), torch.arange(6)))
    with pytest.raises(ValueError, match="5 images for 6 texts"):
        model(**(batch() | {"pixel_values": images(5)}))
    with pytest.raises(ValueError, match="objectives"):
        pretraining(objectives=("itc", "mlm"))


def test_the_exported_folder_opens_as_every_native_class(tmp_path: Path):
    model = BlipForPreTraining(blip_config(), queue_size=12)
    spread_weights(model.model)
    model.model.tie_weights()
    model.eval()
    model.export(tmp_path)
    parameters = dict(model.model.named_parameters(remove_duplicate=False))
    for native in (
        transformers.BlipForImageTextRetrieval,
        transformers.BlipForConditionalGeneration,
        transformers.BlipForQuestionAnswering,
    ):
        opened, information = native.from_pretrained(tmp_path, output_loading_info=True)
        assert not information["missing_keys"]
        assert all(torch.equal(value, parameters[name]) for name, value in opened.named_parameters())
    back = BlipForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())
    assert back.model.text_decoder.bert.embeddings.word_embeddings.weight is (
        back.model.text_encoder.embeddings.word_embeddings.weight
    )


def test_a_repository_of_the_hub_gives_twin_queue_and_temperature_back(tmp_path: Path):
    model = pretraining(temperature=0.05)
    model(**batch(), generator=torch.Generator().manual_seed(0))
    model.export(tmp_path / "exported")
    where = as_repository(tmp_path / "exported", tmp_path / "cache")
    back = BlipForPreTraining.from_pretrained("org/model", **where)
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_training_checkpoint_holds_shared_tensors_once(tmp_path: Path):
    model = pretraining()
    model(**batch(), generator=torch.Generator().manual_seed(0)).loss.backward()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert not stored & {f"model.{name}" for name in tied_names(model.config)}
    back = BlipForPreTraining.from_pretrained(tmp_path)
    assert all(torch.equal(back.state_dict()[name], value) for name, value in model.state_dict().items())
    assert back.settings == model.settings
    assert back.model.text_decoder.bert.encoder.layer[0].output.dense.weight is (
        back.model.text_encoder.encoder.layer[0].output.dense.weight
    )


def test_native_folders_train_on(tmp_path: Path):
    transformers.BlipForImageTextRetrieval(blip_config()).save_pretrained(tmp_path / "retrieval")
    transformers.BlipForConditionalGeneration(blip_config()).save_pretrained(tmp_path / "captioning")
    with pytest.warns(UserWarning, match="text_decoder"):
        model = BlipForPreTraining.from_pretrained(tmp_path / "retrieval", queue_size=12)
    layers = model.model.text_encoder.encoder.layer, model.model.text_decoder.bert.encoder.layer
    assert torch.equal(layers[0][1].attention.self.query.weight, layers[1][1].attention.self.query.weight)
    model(**batch()).loss.backward()
    with pytest.warns(UserWarning, match="itm_head"):
        model = BlipForPreTraining.from_pretrained(tmp_path / "captioning", queue_size=12)
    native = transformers.BlipForConditionalGeneration.from_pretrained(tmp_path / "captioning")
    ours = dict(model.model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(value, ours[name]) for name, value in native.named_parameters())
    torch.testing.assert_close(
        model.model.text_encoder.encoder.layer[0].attention.self.key.weight,
        native.text_decoder.bert.encoder.layer[0].attention.self.key.weight,
    )
    transformers.BlipVisionModel(blip_config().vision_config).save_pretrained(tmp_path / "vision")
    retrieval = BlipForRetrievalFineTuning.from_pretrained(tmp_path / "retrieval", queue_size=12, image_size=64)
    assert retrieval.momentum["vision_model"].embeddings.position_embedding.shape[1] == 17
    with pytest.raises(MissingWeightsError):
        BlipForRetrievalFineTuning.from_pretrained(tmp_path / "captioning", queue_size=12)


def test_starts_from_a_vit_and_a_bert(tmp_path: Path):
    vit, bert = towers(tmp_path)
    model = BlipForPreTraining.from_vision_text_pretrained(vit, bert, queue_size=12, image_size=64)
    source = transformers.AutoModelForMaskedLM.from_pretrained(bert)
    words = source.bert.embeddings.word_embeddings.weight
    assert model.config.text_config.vocab_size == len(words) + 2
    assert torch.equal(model.model.text_decoder.bert.embeddings.word_embeddings.weight[: len(words)], words)
    assert torch.equal(
        model.model.text_decoder.cls.predictions.transform.dense.weight, source.cls.predictions.transform.dense.weight
    )
    for stack in (model.model.text_encoder, model.model.text_decoder.bert):
        assert torch.equal(
            stack.encoder.layer[1].attention.self.query.weight,
            source.bert.encoder.layer[1].attention.self.query.weight,
        )
    model.set_image_size(32)
    tower = transformers.AutoModel.from_pretrained(vit, add_pooling_layer=False).eval()
    small = BlipMED.from_vision_text_pretrained(vit, bert)
    torch.testing.assert_close(
        small.encode_images(images(2)), tower(images(2)).last_hidden_state, rtol=1e-4, atol=1e-5
    )
    assert model(**batch()).loss.isfinite()
    with pytest.raises(ValueError, match="BLIP's text side is a BERT"):
        BlipMED.from_vision_text_pretrained(vit, vit)


@pytest.mark.parametrize("width", [32, 48])
def test_every_task_starts_from_the_pretrained_folder(tmp_path: Path, width: int):
    model = BlipForPreTraining(blip_config(vision_width=width), queue_size=12)
    spread_weights(model.model)
    model.model.tie_weights()
    model.steps.fill_(7)
    with torch.no_grad():
        model.temperature.fill_(0.05)
    model.export(tmp_path)
    parameters = dict(model.model.named_parameters(remove_duplicate=False))
    captioner = BlipForConditionalGeneration.from_pretrained(tmp_path, image_size=64)
    assert captioner.config.vision_config.image_size == 64
    if width == 32:
        answering = BlipForQuestionAnsweringFineTuning.from_pretrained(tmp_path)
    else:
        with pytest.warns(UserWarning, match="widths differ"):
            answering = BlipForQuestionAnsweringFineTuning.from_pretrained(tmp_path)
        assert isinstance(answering, BlipTasksForQuestionAnswering)
    name = "text_decoder.bert.encoder.layer.1.attention.self.query.weight"
    assert torch.equal(dict(answering.named_parameters())[name], parameters[name])
    answering.export(tmp_path / "vqa")
    again = BlipForQuestionAnsweringFineTuning.from_pretrained(tmp_path / "vqa")
    assert all(torch.equal(again.state_dict()[name], value) for name, value in answering.state_dict().items())
    reasoning = BlipTasksForVisualReasoning.from_pretrained(tmp_path)
    twins = reasoning.text_encoder.encoder.layer[0].crossattention
    assert torch.equal(twins.self0.key.weight, twins.self1.key.weight)
    reasoning.export(tmp_path / "nlvr")
    assert BlipTasksForVisualReasoning.from_pretrained(tmp_path / "nlvr").config.merge_from == 1
    BlipForVisualDialog.from_pretrained(tmp_path)
    retrieval = BlipForRetrievalFineTuning.from_pretrained(tmp_path, alpha=0.4, alpha_warmup_steps=4)
    assert torch.equal(retrieval.queue.images, model.queue.images) and len(retrieval.queue.image_ids) == 12
    assert torch.equal(retrieval.temperature, model.temperature)
    assert int(retrieval.steps) == 0 and retrieval.current_alpha() == 0, "alpha warms up anew"
    with pytest.raises(ValueError, match=r"queue.images of \(12, 24\), here \(4, 24\).*queue_size"):
        BlipForRetrievalFineTuning.from_pretrained(tmp_path, queue_size=4)
    retrieval.export(tmp_path / "retrieval")
    assert not (tmp_path / "retrieval" / EXTRAS_FILE).exists()
    assert isinstance(BlipForImageTextRetrieval.from_pretrained(tmp_path / "retrieval"), BlipForImageTextRetrieval)


def test_retrieval_needs_image_ids_and_masks_them():
    model = BlipForRetrievalFineTuning(blip_config(), queue_size=12).train()
    spread_weights(model.model)
    with pytest.raises(ValueError, match="image_ids are missing"):
        model(**batch())
    ids = torch.tensor([1, 1, 2, 3, 4, 5])
    output = model(**batch(), image_ids=ids)
    torch.testing.assert_close(output.contrast.hard_targets[0, :2], torch.full((2,), 0.5))
    assert output.weights_t2i[0, 1] == 0
    assert model.queue.image_ids[:6].tolist() == ids.tolist()
    same = model(**batch(), image_ids=torch.ones(6, dtype=torch.long))
    assert float(same.loss_itm.detach()) == 0


def ranks(kind: str, splits: list[slice], steps: int, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Some training steps on this rank's rows; what must agree, and the last gradient, averaged over ranks."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if kind == "pretraining":
        model = pretraining(**settings)
    else:
        model = BlipForRetrievalFineTuning(blip_config(vision_width=48), queue_size=12, **settings).train()
        spread_weights(model.model)
        model.reset_momentum()
    rows = splits[rank]
    extra = {} if kind == "pretraining" else {"image_ids": torch.tensor([1, 2, 3, 1, 4, 5])[rows]}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    loss = None
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(**batch(rows), **extra, alpha=0.4, generator=generator)
        output.loss.backward()
        loss = output.loss.detach()
        if size > 1:
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]) / size
            torch.distributed.all_reduce(flat)
            for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
                parameter.grad = gradient.view_as(parameter)
        optimizer.step()
    if size > 1:
        torch.distributed.all_reduce(loss)
    found = {f"grad.{name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: value.clone() for name, value in model.state_dict().items()}
    return found | {"loss": loss / size}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretraining", "retrieval"])
def test_two_ranks_of_uneven_batches_equal_one_process(kind: str):
    splits = [slice(0, 4), slice(4, 6)]
    both = run_ranks(ranks, 2, kind, splits, 2, {})
    one = ranks(kind, [slice(0, 6)], 2, {})
    for name, value in one.items():
        torch.testing.assert_close(both[0][name], value, rtol=2e-3, atol=2e-5, msg=name)
        torch.testing.assert_close(both[1][name], both[0][name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretraining", "retrieval"])
def test_ranks_of_the_original_algorithm_agree_after_20_steps(kind: str):
    splits = [slice(0, 3), slice(3, 6)]
    first, second = run_ranks(ranks, 2, kind, splits, 20, {"across_ranks": "local"})
    assert int(first["queue.position"]) == 20 * 6 % 12
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.slow
def test_it_learns_its_batch():
    torch.manual_seed(0)
    model = BlipForPreTraining(blip_config(), queue_size=6, momentum=0.5).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    first = None
    for _ in range(80):
        output = model(**batch(), alpha=0.0, generator=generator)
        first = first or {name: output[name].item() for name in ("loss_itc", "loss_itm", "loss_lm")}
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss_lm.item() < first["loss_lm"] / 1.5
    assert output.loss_itc.item() < first["loss_itc"]
