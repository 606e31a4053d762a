"""`AlbefForPreTraining`: twin, queue, warm-up, checkpoints, and several ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTModel

from hf_vlp.models.albef.finetuning_albef import AlbefForQuestionAnsweringFineTuning, AlbefForRetrievalFineTuning
from hf_vlp.models.albef.modeling_albef import AlbefForImageTextRetrieval
from hf_vlp.models.albef.pretraining_albef import AlbefForPreTraining
from hf_vlp.models.pretraining import EXTRAS_FILE
from hf_vlp.objectives.language import MaskedTokens
from tests.distributed import run_ranks
from tests.tiny import albef as tiny
from tests.tiny.cached import as_repository

LENGTHS = [5, 9, 4, 7, 6, 8]


def build(cls: type = AlbefForPreTraining, double: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"queue_size": 16, "momentum": 0.9, "mlm_probability": 0.4} | settings
    model = tiny.spread_weights(cls(tiny.albef_config(), **settings))
    model.tie_weights()
    model.reset_momentum()
    return (model.double() if double else model).train()


def batch(number: int = len(LENGTHS), seed: int = 0) -> dict[str, Tensor]:
    ids, mask = tiny.texts(LENGTHS[:number], seed)
    return {"pixel_values": tiny.images(number, seed).double(), "input_ids": ids, "attention_mask": mask}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def twin_state(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.momentum.state_dict().items()}


def test_twin_starts_as_a_copy_and_follows_only_in_training() -> None:
    model = build()
    followed = model._followed().state_dict()
    assert all(torch.equal(value, followed[name]) for name, value in model.momentum.state_dict().items())
    assert not any(p.requires_grad for p in model.momentum.parameters())
    with torch.no_grad():
        for parameter in model.retrieval.parameters():
            parameter.add_(1.0)
    before, queue = twin_state(model), model.queue.images.clone()
    model.eval()(**batch(), generator=generator())
    assert all(torch.equal(value, before[name]) for name, value in model.momentum.state_dict().items())
    assert torch.equal(model.queue.images, queue) and int(model.steps) == 0
    model.train()(**batch(), generator=generator())
    online = model._followed().state_dict()
    for name, value in model.momentum.state_dict().items():
        torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name])
    assert int(model.steps) == 1 and int(model.queue.position) == len(LENGTHS)
    changed = (model.queue.images != queue).any(dim=1)
    assert changed.tolist() == [True] * len(LENGTHS) + [False] * (16 - len(LENGTHS))


def test_tied_head_moves_once() -> None:
    """The head's matrix is the word embeddings' in twin and model, so a step must not move it twice."""
    model = build()
    words = model.retrieval.albef.text_model.embeddings.word_embeddings.weight
    assert model.mlm_head.decoder.weight is words
    twin_words = model.momentum["albef"].text_model.embeddings.word_embeddings.weight
    assert model.momentum["mlm_head"].decoder.weight is twin_words
    with torch.no_grad():
        words.add_(1.0)
    before = twin_words.clone()
    model.follow()
    torch.testing.assert_close(twin_words, before + 0.1)


def test_same_generator_same_loss() -> None:
    losses = [build()(**batch(), generator=generator(7)).loss for _ in range(2)]
    assert torch.equal(*losses)
    assert build()(**batch(), generator=generator(8)).loss != losses[0]


def test_terms_add_up_and_all_parameters_get_a_gradient() -> None:
    model = build(alpha=0.4)
    output = model(**batch(), generator=generator())
    torch.testing.assert_close(output.loss, output.loss_itc + output.loss_itm + output.loss_mlm)
    output.loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_alpha_warms_up_over_the_first_steps() -> None:
    model = build(alpha=0.4, alpha_warmup_steps=4)
    alphas = [model(**batch(), generator=generator(step)).alpha for step in range(6)]
    assert alphas == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert build(distill=False)(**batch(), generator=generator()).alpha == 0.0


def test_without_distillation_the_targets_are_the_pairs() -> None:
    model = build()
    output = model(**batch(), alpha=0.0, generator=generator())
    assert output.mlm_logits_m is None
    expected = torch.eye(len(LENGTHS), len(LENGTHS) + 16, dtype=torch.float64)
    assert torch.equal(output.contrast.targets[0], expected)


def test_temperature_is_kept_in_its_range() -> None:
    model = build()
    model.retrieval.temperature.data.fill_(0.9)
    assert model(**batch(), generator=generator()).temperature == 0.5
    model.eval()
    model.retrieval.temperature.data.fill_(0.9)
    assert model(**batch(), generator=generator()).temperature == 0.9


def test_masking_spares_padding_and_cls_but_not_sep() -> None:
    model = build(mlm_probability=1.0)
    data = batch()
    masked = model.mask(data["input_ids"], data["attention_mask"], generator())
    maskable = data["attention_mask"].bool()
    maskable[:, 0] = False
    assert torch.equal(masked.labels != -100, maskable)
    assert torch.equal(masked.input_ids[~maskable], data["input_ids"][~maskable])


def test_a_text_without_masked_tokens_is_no_problem_nor_is_a_batch() -> None:
    model = build()
    data = batch()
    labels = torch.full_like(data["input_ids"], -100)
    output = model(**data, masked_tokens=MaskedTokens(data["input_ids"], labels), generator=generator())
    assert output.loss_mlm == 0
    output.loss.backward()
    labels[1, 2] = 9
    output = model(**data, masked_tokens=MaskedTokens(data["input_ids"], labels), generator=generator())
    assert output.mlm_logits.shape == (1, tiny.VOCAB_SIZE) and output.loss_mlm > 0


def test_pairs_of_one_image_are_no_negatives() -> None:
    model = build()
    ids = torch.tensor([5, 5, 5, 6, 6, 5])
    for seed in range(5):
        output = model(**batch(), image_ids=ids, generator=generator(seed))
        assert not output.weights_i2t[ids[:, None] == ids[None]].any()
    output = model(**batch(), image_ids=torch.zeros(6, dtype=torch.long), generator=generator())
    assert output.loss_itm == 0 and output.loss.isfinite()
    output.loss.backward()
    single = model(**batch(1), generator=generator())
    assert single.loss_itm == 0 and single.loss.isfinite()


def test_chance_levels_are_those_of_a_model_that_knows_nothing() -> None:
    model = build()
    with torch.no_grad():
        for part in (model.retrieval.itm_head, model.mlm_head.transform.dense):
            part.weight.zero_()
            part.bias.zero_()
        model.mlm_head.transform.LayerNorm.weight.zero_()
        model.retrieval.itm_head.bias.copy_(torch.tensor([2 / 3, 1 / 3]).log())
        model.queue.texts.zero_()
        model.queue.images.zero_()
        model.momentum["vision_projection"].weight.zero_()
        model.momentum["vision_projection"].bias.zero_()
        model.momentum["text_projection"].weight.zero_()
        model.momentum["text_projection"].bias.zero_()
    model.eval()
    output = model(**batch(), alpha=0.0, generator=generator())
    for name, level in model.chance_levels(batch()).items():
        assert getattr(output, name).item() == pytest.approx(level, rel=1e-6), name
    assert model.chance_levels(batch())["loss_itm"] == pytest.approx(0.6365, abs=1e-4)


def test_export_opens_as_the_inference_model_and_training_goes_on(tmp_path: Path) -> None:
    model = build(double=False)
    data = batch() | {"pixel_values": batch()["pixel_values"].float()}
    for step in range(3):
        model(**data, generator=generator(step))
    model.export(tmp_path)
    assert not any("momentum" in name for name in (path.name for path in tmp_path.iterdir()))
    retrieval = AlbefForImageTextRetrieval.from_pretrained(tmp_path)
    assert not hasattr(retrieval.config, "pretraining")
    assert torch.equal(retrieval.temperature, model.retrieval.temperature)
    again = AlbefForPreTraining.from_pretrained(tmp_path, momentum=0.9, mlm_probability=0.4).train()
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    outputs = [one(**data, generator=generator(9)).loss for one in (model, again)]
    assert torch.equal(*outputs)
    (tmp_path / EXTRAS_FILE).unlink()
    fresh = AlbefForPreTraining.from_pretrained(tmp_path, queue_size=8)
    assert torch.equal(
        fresh.momentum["albef"].text_model.embeddings.word_embeddings.weight,
        model.retrieval.albef.text_model.embeddings.word_embeddings.weight,
    )


def test_whole_checkpoint_restores_everything(tmp_path: Path) -> None:
    model = build(double=False, alpha_warmup_steps=5)
    data = batch() | {"pixel_values": batch()["pixel_values"].float()}
    for step in range(3):
        model(**data, generator=generator(step))
    model.save_pretrained(tmp_path)
    again = AlbefForPreTraining.from_pretrained(tmp_path).train()
    assert again.settings == model.settings
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    assert again.mlm_head.decoder.weight is again.retrieval.albef.text_model.embeddings.word_embeddings.weight


def test_wrapping_keeps_the_weights() -> None:
    retrieval = AlbefForImageTextRetrieval(tiny.albef_config())
    before = {name: value.clone() for name, value in retrieval.state_dict().items()}
    model = AlbefForPreTraining.from_inference_model(retrieval, queue_size=8)
    assert model.retrieval is retrieval
    assert all(torch.equal(value, before[name]) for name, value in retrieval.state_dict().items())
    twin = model.momentum["albef"].state_dict()
    assert all(torch.equal(value, before[f"albef.{name}"]) for name, value in twin.items())


def test_starts_from_towers_with_the_mlm_head(tmp_path: Path) -> None:
    config = tiny.albef_config()
    ViTModel(ViTConfig(**config.vision_config.to_dict())).save_pretrained(tmp_path / "vit")
    fields = {name: value for name, value in config.text_config.to_dict().items() if name in BertConfig().to_dict()}
    bert = BertForMaskedLM(BertConfig(**{**fields, "model_type": "bert"}))
    tiny.spread_weights(bert).save_pretrained(tmp_path / "bert")
    model = AlbefForPreTraining.from_vision_text_pretrained(
        str(tmp_path / "vit"), str(tmp_path / "bert"), image_size=48, queue_size=8
    )
    assert torch.equal(model.mlm_head.transform.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.momentum["mlm_head"].bias, bert.cls.predictions.bias)
    assert model.momentum["albef"].encode_images(tiny.images(1, size=48)).shape == (1, 10, 32)
    with pytest.raises(ValueError, match="mask_token_id is not set"):
        model(tiny.images(2, size=48), *tiny.texts([4, 5]))


def test_retrieval_finetuning_starts_from_a_pretraining(tmp_path: Path) -> None:
    pretraining = build(double=False)
    data = batch() | {"pixel_values": batch()["pixel_values"].float()}
    for step in range(3):
        pretraining(**data, generator=generator(step))
    pretraining.export(tmp_path)
    model = AlbefForRetrievalFineTuning.from_pretrained(tmp_path, image_size=48, momentum=0.9).train()
    assert torch.equal(model.queue.images, pretraining.queue.images)
    assert torch.equal(model.queue.position, pretraining.queue.position) and model.queue.ids.eq(-100).all()
    assert int(model.steps) == 0
    name = "albef.text_model.encoder.layer.3.output.dense.weight"
    assert torch.equal(model.momentum.state_dict()[name], pretraining.momentum.state_dict()[name])
    data["pixel_values"] = tiny.images(6, size=48)
    ids = torch.tensor([5, 5, 6, 6, 7, 7])
    output = model(**data, image_ids=ids, generator=generator())
    assert output.contrast.hard_targets[0, :2].tolist() == [0.5, 0.5]
    assert model.queue.ids.ne(-100).sum() == 6
    assert model.pretraining_extras() == {}
    again = model(**data, image_ids=ids, generator=generator())
    assert again.contrast.hard_targets[0].gt(0).sum() == 4
    for cls in (AlbefForRetrievalFineTuning, AlbefForPreTraining):
        with pytest.raises(ValueError, match=r"queue.images of \(16, 24\), here \(4, 24\).*queue_size"):
            cls.from_pretrained(tmp_path, queue_size=4)


def test_training_checkpoints_keep_the_names_of_the_modules(tmp_path: Path) -> None:
    """`Trainer` loads them with `load_state_dict`, which knows nothing of transformers' conversions of old names."""
    model = build(double=False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == set(model.state_dict()) - set(model.all_tied_weights_keys)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (AlbefForPreTraining, {"momentum": 1.5}, "momentum must lie in"),
        (AlbefForPreTraining, {"mlm_probability": -0.1}, "mlm_probability must lie in"),
        (AlbefForPreTraining, {"across_ranks": "some"}, "'joined' or 'local'"),
        (AlbefForPreTraining, {"negatives": "soft"}, "'hard' or 'random'"),
        (AlbefForPreTraining, {"objectives": ()}, "some of 'itc', 'itm', 'mlm'"),
        (AlbefForRetrievalFineTuning, {"objectives": ("itc", "mlm")}, "some of 'itc', 'itm', not"),
    ],
)
def test_settings_are_checked(cls: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(tiny.albef_config(), **settings)


def test_a_repository_of_the_hub_gives_head_twin_and_queue_back(tmp_path: Path) -> None:
    model = build(double=False)
    data = batch() | {"pixel_values": batch()["pixel_values"].float()}
    model(**data, generator=generator())
    model.export(tmp_path / "exported")
    where = as_repository(tmp_path / "exported", tmp_path / "cache")
    again = AlbefForPreTraining.from_pretrained("org/model", **where)
    own, loaded = model.state_dict(), again.state_dict()
    assert own.keys() == loaded.keys() and all(torch.equal(own[name], loaded[name]) for name in own)
    tuned = AlbefForRetrievalFineTuning.from_pretrained("org/model", **where)
    assert torch.equal(tuned.queue.images, model.queue.images)
    answering = AlbefForQuestionAnsweringFineTuning.from_pretrained("org/model", **where).model
    assert torch.equal(answering.decoder.lm_head.transform.dense.weight, model.mlm_head.transform.dense.weight)


def test_inputs_are_checked() -> None:
    model = build()
    with pytest.raises(ValueError, match="5 images for 6 texts"):
        model(**(batch() | {"pixel_values": batch(5)["pixel_values"]}))
    data = batch()
    with pytest.raises(ValueError, match="masked_tokens have shapes"):
        model(**data, masked_tokens=MaskedTokens(data["input_ids"][:2], data["input_ids"][:2]))
    retrieval = build(AlbefForRetrievalFineTuning)
    with pytest.raises(ValueError, match="image_ids are missing"):
        retrieval(**data)


def steps_on_ranks(cls: type, sizes: list[int], across_ranks: str, steps: int) -> dict[str, Any]:
    """Training on joined batches of which rank r has `sizes[r]` rows; without a process group, all rows."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = build(cls, across_ranks=across_ranks, alpha_warmup_steps=2)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank]) if world > 1 else slice(0, sum(sizes))
    losses, first = [], {}
    for step in range(steps):
        data = {name: value[rows] for name, value in batch(sum(sizes), seed=step).items()}
        if cls is AlbefForRetrievalFineTuning:
            data["image_ids"] = (torch.arange(sum(sizes)) // 2 + step)[rows]
        optimizer.zero_grad()
        output = wrapped(**data, generator=generator(step))
        output.loss.backward()
        losses.append({name: output[name].item() for name in output if name.startswith("loss")})
        first = first or gradients(model)
        optimizer.step()
    return {"losses": losses, "gradients": first, "state": model.state_dict()}


# What the ranks run, one after another in one pair of processes.
JOBS = {
    "pretraining": (AlbefForPreTraining, [3, 3], "joined", 3),
    "pretraining, uneven": (AlbefForPreTraining, [4, 2], "joined", 3),
    "retrieval, uneven": (AlbefForRetrievalFineTuning, [4, 2], "joined", 3),
    "20 steps": (AlbefForPreTraining, [3, 3], "joined", 20),
    "20 local steps": (AlbefForPreTraining, [3, 3], "local", 20),
}


def all_jobs() -> dict[str, Any]:
    return {name: steps_on_ranks(*job) for name, job in JOBS.items()}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(all_jobs, 2)


@pytest.mark.slow
@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if job[3] == 3])
def test_two_ranks_are_one_process(job: str, ranks: list[dict[str, Any]]) -> None:
    one = steps_on_ranks(*JOBS[job])
    for step, wanted in enumerate(one["losses"]):
        for name, value in wanted.items():
            found = sum(rank[job]["losses"][step][name] for rank in ranks) / 2
            assert found == pytest.approx(value, rel=1e-9), (step, name)
    for rank in ranks:
        assert rank[job]["gradients"].keys() == one["gradients"].keys()
        for name, gradient in one["gradients"].items():
            torch.testing.assert_close(rank[job]["gradients"][name], gradient, rtol=1e-8, atol=1e-11)
        for name, value in one["state"].items():
            torch.testing.assert_close(rank[job]["state"][name], value, rtol=1e-8, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("job", [name for name, job in JOBS.items() if job[3] == 20])
def test_queues_pointers_and_twins_are_identical_on_ranks(job: str, ranks: list[dict[str, Any]]) -> None:
    states = [rank[job]["state"] for rank in ranks]
    assert int(states[0]["queue.position"]) == 20 * 6 % 16 and int(states[0]["steps"]) == 20
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert all(math.isfinite(value) for rank in ranks for step in rank[job]["losses"] for value in step.values())


@pytest.mark.slow
def test_local_ranks_contrast_within_their_batch(ranks: list[dict[str, Any]]) -> None:
    """What the original does: the contrast of a rank is that of its own batch and the shared queue."""
    for rank, found in enumerate(ranks):
        alone = build(across_ranks="local", alpha_warmup_steps=2)
        data = {name: value[3 * rank : 3 * rank + 3] for name, value in batch(6).items()}
        wanted = alone(**data, generator=generator(0))
        assert found["20 local steps"]["losses"][0]["loss_itc"] == pytest.approx(wanted.loss_itc.item(), rel=1e-9)
