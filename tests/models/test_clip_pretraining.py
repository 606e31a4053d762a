"""`CLIPForPreTraining`: losses, temperature, checkpoints, stages, gradient caching and several ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hf_vlp.models.clip.modeling_clip import CLIPModel
from hf_vlp.models.clip.pretraining_clip import CLIPForPreTraining, ContrastiveSettings
from hf_vlp.models.pretraining import EXTRAS_FILE
from hf_vlp.objectives.gradient_cache import cached_step
from hf_vlp.training.freezing import apply_stage
from tests.distributed import run_ranks
from tests.tiny import clip as tiny

KINDS = sorted(tiny.CONFIGS)


def build(kind: str = "clip", seed: int = 0, **settings: Any) -> CLIPForPreTraining:
    torch.manual_seed(seed)
    return CLIPForPreTraining(tiny.config_of(kind), **settings)


def build_double(kind: str = "clip", **settings: Any) -> CLIPForPreTraining:
    """In float64, where equal computations differ by next to nothing."""
    return build(kind, **settings).double().train()


def double_batch(pairs: int = 4, image_ids: list[int] | None = None) -> dict[str, Tensor]:
    batch = tiny.batch(pairs=pairs)
    batch["pixel_values"] = batch["pixel_values"].double()
    return batch if image_ids is None else batch | {"image_ids": torch.tensor(image_ids)}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_equals_the_native_loss_of_one_process(kind: str) -> None:
    model, batch = build(kind).eval(), tiny.batch()
    expected = model.model(**batch, return_loss=True)
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(output.loss_itc, expected.loss)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.logits_per_text, expected.logits_per_text, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds)
    torch.testing.assert_close(output.text_embeds, expected.text_embeds, atol=1e-6, rtol=1e-5)


def test_sigmoid_loss_is_siglips() -> None:
    model, batch = build(loss="sigmoid", init_logit_bias=-3.0).eval(), tiny.batch()
    output = model(**batch)
    cosines = output.image_embeds @ output.text_embeds.T
    logits = model.model.logit_scale.exp() * cosines - 3.0
    signs = 2 * torch.eye(4) - 1
    torch.testing.assert_close(output.loss, -torch.nn.functional.logsigmoid(signs * logits).sum() / 4)
    output.loss.backward()
    assert model.logit_bias.grad is not None and model.logit_bias.grad != 0


def test_tiles_change_nothing() -> None:
    batch = double_batch(pairs=5)
    results = []
    for tile_size in (None, 2):
        model = build_double(tile_size=tile_size)
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


def test_pairs_of_one_image_are_positives_of_each_other() -> None:
    model, batch = build().eval(), tiny.batch()
    batch["pixel_values"][1] = batch["pixel_values"][0]
    logits = model(**batch).logits_per_image
    ids = torch.tensor([7, 7, 8, 9])
    targets = (ids[:, None] == ids).float()
    targets /= targets.sum(dim=1, keepdim=True)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    torch.testing.assert_close(model(**batch, image_ids=ids).loss, expected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_chance_level_is_the_best_constant_guess(loss: str) -> None:
    model = build(loss=loss).eval()
    batch = tiny.batch(pairs=6)
    chance = model.chance_levels(batch)["loss_itc"]
    # Embeddings at right angles leave logits equal to the bias alone, which the best constant sets to logit(1 / G).
    images, texts = torch.eye(24)[:6], torch.eye(24)[6:12]
    if loss == "sigmoid":
        model.logit_bias.data.fill_(math.log(1 / 6) - math.log(5 / 6))
    assert model.objective(images, texts).loss.item() == pytest.approx(chance, abs=1e-5)


def test_a_single_pair_warns() -> None:
    model = build().train()
    with pytest.warns(UserWarning, match="no negatives"):
        output = model(**tiny.batch(pairs=1))
    assert output.loss.item() == 0


def test_temperature_is_clamped_as_the_recipe_does() -> None:
    """A clamp after each step and our clamp before the next give the same losses and weights."""
    batch = tiny.batch()

    def run(after_step: bool) -> tuple[list[float], float]:
        model = build(init_logit_scale=4.59).train()
        if after_step:
            model.clamp_temperature = lambda: None
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        losses = []
        for _ in range(3):
            output = model(**batch)
            losses.append(output.loss.item())
            optimizer.zero_grad()
            output.loss.backward()
            # Pushes the temperature over its limit whatever the batch says.
            model.model.logit_scale.grad.fill_(-0.05)
            optimizer.step()
            if after_step:
                model.model.logit_scale.data.clamp_(0, math.log(100))
        model.clamp_temperature()
        return losses, model.model.logit_scale.item()

    ours, recipe = run(False), run(True)
    assert ours == recipe
    assert ours[1] == pytest.approx(math.log(100))


def test_temperature_is_in_range_in_what_is_saved(tmp_path: Path) -> None:
    model = build()
    model.model.logit_scale.data.fill_(9.0)
    model.save_pretrained(tmp_path / "checkpoint")
    assert load_file(tmp_path / "checkpoint" / "model.safetensors")["model.logit_scale"].item() <= math.log(100) + 1e-6
    model.model.logit_scale.data.fill_(-1.0)
    model.export(tmp_path / "inference")
    assert transformers.CLIPModel.from_pretrained(tmp_path / "inference").logit_scale.item() == 0
    model.eval()
    model.model.logit_scale.data.fill_(9.0)
    model(**tiny.batch())
    assert model.model.logit_scale.item() == 9.0


def test_align_keeps_its_divisor() -> None:
    model = build("align", init_logit_scale=math.log(20)).train()
    assert model.model.temperature.item() == pytest.approx(0.05)
    assert model.settings.label_smoothing == 0.1
    model.model.temperature.data.fill_(-0.5)
    output = model(**tiny.batch())
    assert output.logit_scale.item() == pytest.approx(100)
    assert model.model.temperature.item() == pytest.approx(0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_checkpoint_brings_back_everything(kind: str, loss: str, tmp_path: Path) -> None:
    model = build(kind, loss=loss, tile_size=3)
    if loss == "sigmoid":
        model.logit_bias.data.fill_(-4.0)
    model.save_pretrained(tmp_path)
    loaded = CLIPForPreTraining.from_pretrained(tmp_path)
    assert loaded.settings == model.settings
    assert type(loaded.model) is type(model.model)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_export_is_the_inference_model_and_starts_training_again(kind: str, tmp_path: Path) -> None:
    model = build(kind, loss="sigmoid")
    model.logit_bias.data.fill_(-4.0)
    model.export(tmp_path)
    assert (tmp_path / EXTRAS_FILE).is_file()
    assert "pretraining" not in (tmp_path / "config.json").read_text()
    again = CLIPForPreTraining.from_pretrained(tmp_path, loss="sigmoid")
    assert again.logit_bias.item() == -4.0
    batch = tiny.batch()
    torch.testing.assert_close(again.eval()(**batch).loss, model.eval()(**batch).loss)
    softmax = CLIPForPreTraining.from_pretrained(tmp_path)
    assert softmax.logit_bias is None and softmax.settings.loss == "softmax"


def test_softmax_checkpoint_can_go_on_with_the_sigmoid_loss(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    model = CLIPForPreTraining.from_pretrained(tmp_path, loss="sigmoid", init_logit_bias=-7.0)
    assert model.logit_bias.item() == -7.0


def test_starts_from_a_native_folder(tmp_path: Path) -> None:
    native = transformers.CLIPModel(tiny.clip_config()).half()
    native.save_pretrained(tmp_path)
    model = CLIPForPreTraining.from_pretrained(tmp_path)
    assert type(model.model) is CLIPModel
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for name, value in native.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], value.float()), name


def test_wrapping_keeps_the_model_and_its_config() -> None:
    inner = CLIPModel(tiny.clip_config())
    model = CLIPForPreTraining.from_inference_model(inner, label_smoothing=0.2)
    assert model.model is inner and not hasattr(inner.config, "pretraining")
    assert model.config.pretraining["label_smoothing"] == 0.2


def test_incomplete_or_foreign_checkpoints_raise(tmp_path: Path) -> None:
    native = transformers.CLIPModel(tiny.clip_config())
    state = native.state_dict()
    del state["visual_projection.weight"]
    native.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match="missing.*visual_projection"):
        CLIPForPreTraining.from_pretrained(tmp_path / "part")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="bert"):
        CLIPForPreTraining.from_pretrained(tmp_path / "bert")
    transformers.Blip2Config().save_pretrained(tmp_path / "blip-2")
    with pytest.raises(ValueError, match="trains .*'clip'.*"):
        CLIPForPreTraining.from_pretrained(tmp_path / "blip-2")
    with pytest.raises(ValueError, match="not a config of type 'bert'"):
        CLIPForPreTraining(transformers.BertConfig())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="'softmax' or 'sigmoid'"):
        ContrastiveSettings(loss="hinge")
    with pytest.raises(ValueError, match="label_smoothing"):
        build(loss="sigmoid", label_smoothing=0.1)
    with pytest.raises(TypeError, match="temperature"):
        build(temperature=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_locked_image_tower_stays_as_it_is(kind: str) -> None:
    model = build(kind)
    apply_stage(model, "locked_image")
    model.train()
    assert not model.model.vision_model.training and model.model.text_model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tiny.batch()).loss.backward()
        optimizer.step()
    after = model.state_dict()
    frozen = ("model.vision_model.", "model.text_model.pooler")
    for name, value in before.items():
        if name.startswith(frozen) or not value.is_floating_point():
            assert torch.equal(value, after[name]), name
        else:
            assert not torch.equal(value, after[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_pretrain_stage_gives_every_trainable_parameter_a_gradient(kind: str) -> None:
    """A parameter that trains but gets no gradient would stop DistributedDataParallel."""
    for loss in ("softmax", "sigmoid"):
        model = build(kind, loss=loss).train()
        apply_stage(model, "pretrain")
        model(**tiny.batch()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_cached_tower_outputs_train_like_pixels() -> None:
    model, batch = build(), tiny.batch()
    apply_stage(model, "locked_image")
    model.train()
    pixels = batch.pop("pixel_values")
    with torch.no_grad():
        cached = model.model.vision_model(pixels).pooler_output
    losses = [model(pixel_values=pixels, **batch).loss, model(image_embeds=cached, **batch).loss]
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.parametrize("kind", ["clip", "eva_clip"])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_gradient_caching_equals_the_plain_step(kind: str, loss: str) -> None:
    batch = double_batch(7, [1, 2, 3, 3, 4, 5, 6])
    plain, cached = build_double(kind, loss=loss), build_double(kind, loss=loss)
    expected = plain(**batch)
    expected.loss.backward()
    output = cached_step(cached, batch, chunk_size=3)
    torch.testing.assert_close(output.loss, expected.loss)
    assert_same_gradients(gradients(cached), gradients(plain))


def test_gradient_caching_refuses_batch_norm() -> None:
    with pytest.raises(ValueError, match="normalises over the batch"):
        cached_step(build("clip_resnet").train(), tiny.batch(), chunk_size=2)


def test_gradient_checkpointing_reaches_the_towers() -> None:
    batch = double_batch()
    results = []
    for checkpointing in (False, True):
        model = build_double()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.vision_model.encoder.layers[0].gradient_checkpointing
        model(**batch).loss.backward()
        results.append(gradients(model))
    assert_same_gradients(results[1], results[0])


def _rank_steps(batch: dict[str, Tensor], splits: list[int]) -> dict[tuple[str, bool], tuple[Tensor, dict]]:
    """One step of a rank on its part of the batch, of every kind; gradients as DDP averages them."""
    rank = dist.get_rank()
    start = sum(splits[:rank])
    own = {name: value[start : start + splits[rank]] for name, value in batch.items()}
    results = {}
    for loss in ("softmax", "sigmoid"):
        for caching in (False, True):
            model = DistributedDataParallel(build_double(loss=loss))
            if caching:
                value = cached_step(model, own, chunk_size=2).loss
            else:
                value = model(**own).loss
                value.backward()
            results[loss, caching] = value.detach(), gradients(model.module)
    return results


@pytest.mark.slow
def test_two_ranks_equal_one_process() -> None:
    """Softmax and sigmoid, with and without gradient caching, on uneven parts of a batch with repeated images."""
    batch = double_batch(7, [1, 2, 3, 3, 4, 5, 1])
    ranks = run_ranks(_rank_steps, 2, batch, [4, 3])
    for loss, caching in ranks[0]:
        model = build_double(loss=loss)
        expected = model(**batch).loss
        expected.backward()
        mean = torch.stack([rank[loss, caching][0] for rank in ranks]).mean()
        torch.testing.assert_close(mean, expected.detach())
        for rank in ranks:
            assert_same_gradients(rank[loss, caching][1], gradients(model))


@pytest.mark.parametrize("kind", ["clip", "clip_resnet", "eva_clip"])
def test_processor_that_fits_passes(kind: str) -> None:
    processor = tiny.processor()
    config = tiny.config_of(kind)
    for name, value in tiny.text_config_of(processor).items():
        setattr(config.text_config, name, value)
    CLIPForPreTraining(config).check_processor(processor)


def test_processor_that_does_not_fit_raises() -> None:
    processor = tiny.processor()
    size = len(processor.tokenizer)
    model = build()
    with pytest.raises(ValueError, match=f"{size} ids, text_config.vocab_size is {tiny.VOCAB_SIZE}"):
        model.check_processor(processor)
    config = tiny.clip_config()
    for name, value in tiny.text_config_of(processor).items():
        setattr(config.text_config, name, value)
    config.text_config.eos_token_id = size - 2
    with pytest.raises(ValueError, match=rf"pools text_config.eos_token_id \({size - 2}\).*id {size - 1}"):
        CLIPForPreTraining(config).check_processor(processor)
    config.text_config.eos_token_id = size - 1
    config.vision_config.image_size = 48
    with pytest.raises(ValueError, match="crops images to 32 x 32, vision_config.image_size is 48"):
        CLIPForPreTraining(config).check_processor(processor)
    # A legacy config pools the highest id, so its wrong end id is no conflict.
    config.text_config.eos_token_id, config.vision_config.image_size = 2, 32
    CLIPForPreTraining(config).check_processor(processor)


def test_bfloat16_autocast_keeps_the_loss_in_float32() -> None:
    model, batch = build().train(), tiny.batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == output.image_embeds.dtype == torch.float32
    output.loss.backward()
    full = build().train()(**batch).loss
    torch.testing.assert_close(output.loss, full, atol=0.05, rtol=0.05)


def test_training_learns_the_pairs() -> None:
    for kind in ("clip", "eva_clip"):
        model, batch = build(kind).train(), tiny.batch(pairs=8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(25):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.2 * model.chance_levels(batch)["loss_itc"], kind
