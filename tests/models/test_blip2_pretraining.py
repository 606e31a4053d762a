"""Stage 1: losses, gradients, ranks, starting points, checkpoints, captions by the Q-Former."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertModel, Blip2VisionConfig, Blip2VisionModel

from hf_vlp.models.blip2.backbone_blip_2 import MissingWeightsError
from hf_vlp.models.blip2.initialization_blip_2 import load_vision_tower, qformer_from_bert, resize_positions
from hf_vlp.models.blip2.pretraining_blip_2 import Blip2ForPreTraining
from hf_vlp.models.eva_clip.modeling_eva_clip import EvaCLIPModel
from hf_vlp.models.pretraining import EXTRAS_FILE
from hf_vlp.objectives.matching import NoNegativesError
from tests.distributed import run_ranks
from tests.tiny.blip2 import (
    QUERIES,
    bert_tokenizer,
    blip2_config,
    generation_model,
    pixels,
    pretraining_batch,
    pretraining_model,
    retrieval_processor,
    text_batch,
    vision_config,
)
from tests.tiny.clip import eva_clip_config

DEC_AND_SEP = {"eos_token_id": 3}


def frozen_tower(model: Blip2ForPreTraining) -> Blip2ForPreTraining:
    model.retrieval.vision_model.requires_grad_(False)
    model.retrieval.vision_model.post_layernorm.requires_grad_(True)
    return model


def tiny_bert(cls: type = BertForMaskedLM, **changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(4)
    config = {
        "vocab_size": len(bert_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    return cls(BertConfig(**(config | changes)))


def tiny_tower(**changes: Any) -> Blip2VisionModel:
    torch.manual_seed(5)
    return Blip2VisionModel(Blip2VisionConfig(**vision_config(**changes)))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_terms_are_named_and_add_up() -> None:
    model = frozen_tower(pretraining_model()).train()
    output = model(**pretraining_batch(), generator=torch.Generator().manual_seed(0))
    assert output.loss.item() == pytest.approx(sum(output[f"loss_{t}"].item() for t in ("itc", "itm", "itg")))
    assert output.itm_logits.shape == (12, 2)
    assert output.itm_labels.tolist() == [1] * 4 + [0] * 8
    own = torch.arange(4)
    assert not (output.negative_image_index == own).any()
    assert not (output.negative_text_index == own).any()


def test_every_trainable_weight_gets_a_gradient_and_no_other() -> None:
    model = frozen_tower(pretraining_model()).train()
    model(**pretraining_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert not model.retrieval.vision_model.encoder.training
    assert model.retrieval.qformer.training


def test_untrained_model_stands_at_chance() -> None:
    torch.manual_seed(0)
    config = blip2_config(initializer_range=0.02)
    model = Blip2ForPreTraining(config, itg_label_smoothing=0.0, temperature=1.0)
    with torch.no_grad():
        model.retrieval.vision_projection.weight.mul_(1e-3)
        model.retrieval.vision_projection.bias.fill_(1.0)
        model.retrieval.itm_head.weight.zero_()
        model.retrieval.itm_head.bias.copy_(torch.tensor([math.log(2.0), 0.0]))
        model.retrieval.embeddings.word_embeddings.weight.mul_(1e-4)
    batch = pretraining_batch()
    output, levels = model(**batch), model.chance_levels(batch)
    assert levels == {
        "loss_itc": pytest.approx(math.log(4)),
        "loss_itm": pytest.approx(0.6365, abs=1e-4),
        "loss_itg": pytest.approx(math.log(config.qformer_config.vocab_size)),
    }
    for name, level in levels.items():
        assert output[name].item() == pytest.approx(level, abs=0.02), name


def test_the_generator_decides_the_negatives() -> None:
    model = pretraining_model().eval()
    batch = pretraining_batch()
    draws = [model(**batch, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2, 3, 4, 5)]
    indices = [torch.cat([o.negative_image_index, o.negative_text_index]) for o in draws]
    assert torch.equal(indices[0], indices[1])
    assert any(not torch.equal(indices[0], other) for other in indices[2:])
    given = model(
        **batch,
        negative_image_index=draws[0].negative_image_index,
        negative_text_index=draws[0].negative_text_index,
    )
    assert torch.equal(given.loss, draws[0].loss)


def test_pairs_of_one_image_are_no_negatives() -> None:
    model = pretraining_model().eval()
    batch = pretraining_batch()
    ids = torch.tensor([7, 7, 8, 8])
    for seed in range(5):
        output = model(**batch, image_ids=ids, generator=torch.Generator().manual_seed(seed))
        assert not (ids[output.negative_image_index] == ids).any()
        assert not (ids[output.negative_text_index] == ids).any()
    with pytest.raises(NoNegativesError):
        model(**batch, image_ids=torch.full((4,), 7))


def test_cached_tower_outputs_stand_for_pixels() -> None:
    model = frozen_tower(pretraining_model()).train()
    batch = pretraining_batch()
    ring = {"negative_image_index": torch.tensor([1, 2, 3, 0]), "negative_text_index": torch.tensor([3, 0, 1, 2])}
    expected = model(**batch, **ring)
    states = model.retrieval.tower_states(batch.pop("pixel_values"))
    assert not states.requires_grad
    assert torch.equal(model(image_embeds=states, **batch, **ring).loss, expected.loss)
    half = model(image_embeds=states.half(), **batch, **ring)
    assert half.loss.item() == pytest.approx(expected.loss.item(), abs=0.05)


def test_inputs_that_do_not_fit() -> None:
    model = pretraining_model()
    batch = pretraining_batch()
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        model(**text_batch())
    with pytest.raises(ValueError, match="either pixel_values or image_embeds"):
        model(**batch, image_embeds=torch.zeros(4, 5, 24))
    with pytest.raises(ValueError, match="23 wide, this model's vision tower 24"):
        model(image_embeds=torch.zeros(4, 5, 23), **text_batch())
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model(**{**batch, "pixel_values": pixels(size=24)})
    model(**{**batch, "pixel_values": pixels(size=24)}, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="objectives must be some of"):
        pretraining_model(objectives=("itc", "mlm"))
    with pytest.raises(ValueError, match="gather_keys must be"):
        pretraining_model(gather_keys="none")


def test_objectives_can_be_left_out() -> None:
    for chosen in (("itc",), ("itm", "itg"), ("itg",)):
        model = pretraining_model(objectives=chosen)
        output = model(**pretraining_batch())
        assert {name for name in ("itc", "itm", "itg") if f"loss_{name}" in output} == set(chosen)
        assert set(model.chance_levels(pretraining_batch())) == {f"loss_{name}" for name in chosen}


@pytest.mark.parametrize("where", ["qformer", "embeddings"])
def test_half_precision_master_weights_are_refused_in_training(where: str) -> None:
    model = frozen_tower(pretraining_model()).train()
    getattr(model.retrieval, where).half()
    with pytest.raises(TypeError, match=f"{where}.*float16 master weight.*mixed precision"):
        model(**pretraining_batch())


def test_gradient_checkpointing_gives_the_same_step() -> None:
    ring = {"negative_image_index": torch.tensor([1, 2, 3, 0]), "negative_text_index": torch.tensor([3, 0, 1, 2])}
    gradients = []
    for checkpointed in (False, True):
        model = frozen_tower(pretraining_model()).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(**pretraining_batch(), **ring).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["itc", "itm", "itg"])
def test_each_objective_learns_a_few_pairs_by_heart(term: str) -> None:
    model = frozen_tower(
        pretraining_model(objectives=(term,), itc_label_smoothing=0.0, itg_label_smoothing=0.0)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    batch = pretraining_batch()
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        loss = model(**batch, generator=generator).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def joined_batch() -> dict[str, Tensor]:
    batch = pretraining_batch(4, seed=2)
    more = {"pixel_values": pixels(1, seed=9), **text_batch(("a photo of the circle",))}
    width = batch["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask"):
        more[name] = torch.nn.functional.pad(more[name], (0, width - more[name].shape[1]))
    batch = {name: torch.cat([value, more[name]]) for name, value in batch.items()}
    batch["image_ids"] = torch.tensor([11, 12, 13, 12, 15])
    return batch


def local_step(settings: dict[str, Any], sizes: list[int], given: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Values of a rank and its gradients after the average of DDP."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    size = dist.get_world_size() if dist.is_initialized() else 1
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    batch = {name: value[own] for name, value in joined_batch().items()}
    # A rank pads to its own longest text.
    longest = int(batch["attention_mask"].sum(dim=1).max())
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:, :longest]
    if given:
        batch["negative_image_index"] = torch.tensor([1, 4, 0, 2, 3])[own]
        batch["negative_text_index"] = torch.tensor([4, 2, 3, 0, 1])[own]
    model = frozen_tower(pretraining_model(**settings)).train()
    output = model(**batch, generator=torch.Generator().manual_seed(3))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {name: output[name].item() for name in ("loss", "loss_itc", "loss_itm", "loss_itg")}
    for gradient in gradients.values():
        if size > 1:
            dist.all_reduce(gradient)
            gradient /= size
    return values, gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sizes", "given"), [({}, [3, 2], True), ({"gather_keys": "detached"}, [1, 4], False)]
)
def test_two_ranks_equal_one_process(settings: dict[str, Any], sizes: list[int], given: bool) -> None:
    values, gradients = local_step(settings, [5], given)
    ranks = run_ranks(local_step, 2, settings, sizes, given)
    for name, expected in values.items():
        mean = sum(rank[0][name] for rank in ranks) / 2
        assert mean == pytest.approx(expected, rel=1e-5), name
    for rank in ranks:
        assert rank[1].keys() == gradients.keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(rank[1][name], expected, rtol=1e-3, atol=2e-5, msg=name)


def test_qformer_starts_from_bert() -> None:
    bert, tower, tokenizer = tiny_bert(), tiny_tower(), bert_tokenizer()
    words = len(tokenizer)
    model = Blip2ForPreTraining.from_vision_qformer_pretrained(
        tower, bert, tokenizer=tokenizer, num_query_tokens=QUERIES, cross_attention_frequency=2
    )
    config = model.config.qformer_config
    assert (config.vocab_size, config.cross_attention_frequency) == (words + 1, 2)
    assert (config.encoder_hidden_size, config.use_qformer_text_input) == (24, True)
    assert model.settings.decoder_start_token_id == words == tokenizer.bos_token_id
    assert model.settings.eos_token_id == tokenizer.sep_token_id
    retrieval = model.retrieval
    assert torch.equal(
        retrieval.embeddings.word_embeddings.weight[:words], bert.bert.embeddings.word_embeddings.weight
    )
    assert retrieval.embeddings.word_embeddings.weight[words].abs().sum() > 0
    for layer, source in zip(retrieval.qformer.encoder.layer, bert.bert.encoder.layer, strict=True):
        assert torch.equal(layer.attention.attention.query.weight, source.attention.self.query.weight)
        for branch in (layer.intermediate, layer.intermediate_query):
            assert torch.equal(branch.dense.weight, source.intermediate.dense.weight)
        for branch in (layer.output, layer.output_query):
            assert torch.equal(branch.LayerNorm.weight, source.output.LayerNorm.weight)
    assert torch.equal(model.itg_head.dense.weight, bert.cls.predictions.transform.dense.weight)
    assert torch.equal(model.itg_head.bias[:words], bert.cls.predictions.bias)
    same_weights(retrieval.vision_model, tower)
    # Queries that were all alike would get the same gradient for ever.
    assert retrieval.query_tokens.std() > 0.01


def test_text_of_the_new_qformer_is_bert_without_segments() -> None:
    bert = tiny_bert(BertModel).eval()
    with torch.no_grad():
        bert.embeddings.token_type_embeddings.weight.zero_()
    model = Blip2ForPreTraining.from_vision_qformer_pretrained(tiny_tower(), bert, tokenizer=bert_tokenizer()).eval()
    batch = text_batch()
    expected = bert(**batch).last_hidden_state
    states = model.retrieval.extract_features(**batch).text_embeds
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(states[real], expected[real], rtol=1e-4, atol=1e-5)


def test_towers_are_cut_and_resized() -> None:
    tower = tiny_tower(num_hidden_layers=3)
    config, state = load_vision_tower(tower, drop_last_layers=1)
    assert config.num_hidden_layers == 2
    assert not [name for name in state if name.startswith(("encoder.layers.2.", "post_layernorm"))]
    with pytest.raises(ValueError, match="cannot drop 3 of 3"):
        load_vision_tower(tower, drop_last_layers=3)
    model = Blip2ForPreTraining.from_vision_qformer_pretrained(tower, tiny_bert(), image_size=32, drop_last_layers=1)
    assert model.config.vision_config.image_size == 32
    output = model(**{**pretraining_batch(), "pixel_values": pixels(size=32)})
    assert output.loss.isfinite()
    small = model.retrieval.eval().tower_states(pixels(size=32))
    cut = Blip2ForPreTraining.from_vision_qformer_pretrained(tower, tiny_bert(), drop_last_layers=1).retrieval.eval()
    torch.testing.assert_close(small, cut.tower_states(pixels(size=32), interpolate_pos_encoding=True))


def test_tower_of_an_eva_clip_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eva = EvaCLIPModel(eva_clip_config())
    eva.save_pretrained(tmp_path)
    model = Blip2ForPreTraining.from_vision_qformer_pretrained(str(tmp_path), tiny_bert(), num_query_tokens=QUERIES)
    assert model.config.model_type == "blip-2"
    tower = model.retrieval.vision_model
    depth = eva.config.vision_config.num_hidden_layers
    # The last block has specialised in its own objective; the norm behind it goes with it.
    assert len(tower.encoder.layers) == depth - 1
    assert torch.equal(tower.post_layernorm.weight, torch.ones_like(tower.post_layernorm.weight))
    own = eva.vision_model.state_dict()
    for name, value in tower.state_dict().items():
        if not name.startswith("post_layernorm."):
            assert torch.equal(value, own[name]), name


def test_resizing_positions() -> None:
    table = torch.randn(5, 3)
    assert torch.equal(resize_positions(table, (2, 2)), table)
    larger = resize_positions(table, (4, 6))
    assert larger.shape == (25, 3)
    assert torch.equal(larger[0], table[0])
    corners = resize_positions(table, (3, 3), align_corners=True)[1:].view(3, 3, 3)
    torch.testing.assert_close(corners[0, 0], table[1])
    torch.testing.assert_close(corners[2, 2], table[4])
    with pytest.raises(ValueError, match="form no square grid"):
        resize_positions(torch.zeros(4, 3), (2, 2))


def test_only_bert_makes_a_qformer() -> None:
    with pytest.raises(ValueError, match="starts from BERT, not from a model of type 'opt'"):
        Blip2ForPreTraining.from_vision_qformer_pretrained(tiny_tower(), transformers.OPTConfig())
    with pytest.raises(ValueError, match="no .*sep_token"):
        tokenizer = bert_tokenizer()
        tokenizer.sep_token = None
        Blip2ForPreTraining.from_vision_qformer_pretrained(tiny_tower(), tiny_bert(), tokenizer=tokenizer)


def test_bert_head_is_taken_where_there_is_one() -> None:
    assert qformer_from_bert(tiny_bert(BertModel).state_dict())[1] == {}
    assert set(qformer_from_bert(tiny_bert().state_dict())[1]) == {
        "dense.weight",
        "dense.bias",
        "LayerNorm.weight",
        "LayerNorm.bias",
        "bias",
    }


def test_a_tower_from_scratch_is_alive() -> None:
    """The native default would start it at a standard deviation of 1e-10."""
    config = blip2_config()
    config.vision_config.initializer_range = 1e-10
    model = Blip2ForPreTraining(config)
    native = transformers.Blip2ForImageTextRetrieval(copy.deepcopy(config))
    assert native.vision_model.encoder.layers[0].mlp.fc1.weight.std() < 1e-9
    assert model.retrieval.vision_model.encoder.layers[0].mlp.fc1.weight.std() > 0.01
    assert model.retrieval.vision_model.embeddings.position_embedding.std() > 0.005
    assert model.config.vision_config.initializer_range == 1e-10
    model(**pretraining_batch()).loss.backward()
    assert model.retrieval.vision_model.embeddings.patch_embedding.weight.grad.abs().max() > 0


def test_checkpoint_and_export_round_trips(tmp_path: Path) -> None:
    model = pretraining_model(eos_token_id=3, itg_label_smoothing=0.2)
    with torch.no_grad():
        model.temperature.fill_(0.05)
    model.save_pretrained(tmp_path / "checkpoint")
    again = Blip2ForPreTraining.from_pretrained(tmp_path / "checkpoint")
    same_weights(model, again)
    assert again.settings == model.settings

    model.export(tmp_path / "export")
    native = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "export").eval()
    same_weights(model.retrieval, native)
    assert not hasattr(native.config, "pretraining")
    expected = native(**pretraining_batch()).logits_per_image
    torch.testing.assert_close(model.retrieval.eval()(**pretraining_batch()).logits_per_image, expected)
    same_weights(model, Blip2ForPreTraining.from_pretrained(tmp_path / "export"))
    assert set(load_file(tmp_path / "export" / EXTRAS_FILE)) == set(model.pretraining_extras())


def test_starts_from_a_native_folder_and_gives_it_back_unchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = transformers.Blip2ForImageTextRetrieval(blip2_config())
    native.save_pretrained(tmp_path / "native")
    model = Blip2ForPreTraining.from_pretrained(tmp_path / "native", temperature=0.1)
    assert model.temperature.item() == pytest.approx(0.1)
    model.export(tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # Plain transformers writes the dtype into the parts' configs when it saves what it has loaded.
    transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "again")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("again", "ours")]
    assert configs[0] == configs[1]


def test_stage_1_before_its_first_step_from_a_model_that_generates(tmp_path: Path) -> None:
    """Tower, queries and their side of the Q-Former are taken over; the text side is BERT's, or new."""
    made = generation_model("opt")
    made.save_pretrained(tmp_path / "made")
    taken = {n: v for n, v in made.state_dict().items() if n.startswith(("vision_model.", "qformer.", "query_tokens"))}
    bert = tiny_bert()
    bert.save_pretrained(tmp_path / "bert")
    words = bert_tokenizer()
    for source in (None, str(tmp_path / "bert")):
        model = Blip2ForPreTraining.from_generation_pretrained(str(tmp_path / "made"), source, tokenizer=words)
        state = model.retrieval.state_dict()
        assert all(torch.equal(state[name], value) for name, value in taken.items())
        assert len(state["embeddings.word_embeddings.weight"]) == len(words)
        assert model.settings.decoder_start_token_id == words.bos_token_id == len(words) - 1
        new = set(state) - set(taken)
        assert {name.split(".")[0] for name in new} >= {"embeddings", "itm_head", "qformer", "text_projection"}
        for name in new:
            constant = name.endswith(("bias", "LayerNorm.weight"))
            assert state[name].isfinite().all() and (constant or state[name].std() > 0.005), name
        output = model(**pretraining_batch())
        output.loss.backward()
        assert output.loss.isfinite()
    theirs, head = qformer_from_bert(bert.state_dict())
    rows = bert.config.vocab_size
    assert torch.equal(state["embeddings.word_embeddings.weight"][:rows], theirs["embeddings.word_embeddings.weight"])
    for name in ("intermediate.dense.weight", "output.LayerNorm.bias"):
        assert torch.equal(state[f"qformer.encoder.layer.1.{name}"], theirs[f"qformer.encoder.layer.1.{name}"])
    assert torch.equal(model.itg_head.dense.weight, head["dense.weight"])


def test_stage_1_from_a_model_that_does_not_fit_or_is_not_whole(tmp_path: Path) -> None:
    made = generation_model("opt")
    made.save_pretrained(tmp_path / "made")
    tiny_bert(intermediate_size=52).save_pretrained(tmp_path / "bert")
    options = {"tokenizer": bert_tokenizer()}
    with pytest.raises(ValueError, match="intermediate_size 48, .*bert has 52"):
        Blip2ForPreTraining.from_generation_pretrained(str(tmp_path / "made"), str(tmp_path / "bert"), **options)
    lost = "qformer.encoder.layer.0.output_query."
    state = {name: value for name, value in made.state_dict().items() if not name.startswith(lost)}
    made.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(MissingWeightsError, match=lost):
        Blip2ForPreTraining.from_generation_pretrained(str(tmp_path / "part"), **options)


def test_incomplete_checkpoints_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    native = transformers.Blip2ForImageTextRetrieval(blip2_config())
    partial = {name: value for name, value in native.state_dict().items() if not name.startswith("vision_model.")}
    native.save_pretrained(tmp_path, state_dict=partial)
    with pytest.raises(MissingWeightsError, match=r"vision_model.*allow_missing=True") as caught:
        Blip2ForPreTraining.from_pretrained(tmp_path)
    assert any(name.startswith("vision_model.encoder.layers.0.") for name in caught.value.names)
    Blip2ForPreTraining.from_pretrained(tmp_path, allow_missing=True)


def test_extras_of_another_model_are_refused(tmp_path: Path) -> None:
    model = pretraining_model()
    extras = model.pretraining_extras()
    with pytest.raises(ValueError, match="does not fit the model"):
        model.load_extras({**extras, "itg_head.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="does not fit the model"):
        model.load_extras({"temperature": extras["temperature"]})


def test_generation_equals_scoring_every_continuation() -> None:
    """Greedy captions by the generation loop and by running the whole text again for each token."""
    model = pretraining_model(**DEC_AND_SEP).eval()
    images = pixels()
    ids = model.generate(images, max_new_tokens=6, do_sample=False)
    retrieval = model.retrieval
    from hf_vlp.models.blip2.qformer import generation_pass, project_images, query_pass

    keys = project_images(retrieval.qformer, retrieval.image_features(images))
    cache = query_pass(retrieval.qformer, retrieval.query_tokens, keys, with_cache=True).cache
    written = torch.full((4, 1), model.settings.decoder_start_token_id)
    alive = torch.ones(4, dtype=torch.bool)
    for position in range(1, ids.shape[1]):
        texts = retrieval.texts(written)
        states = texts.pad(generation_pass(retrieval.qformer, retrieval.embeddings, texts, cache))
        best = model.token_logits(states[:, -1]).argmax(dim=-1)
        assert torch.equal(ids[alive, position], best[alive])
        written = torch.cat([written, ids[:, position : position + 1]], dim=1)
        alive &= ids[:, position] != model.settings.eos_token_id


def test_beams_samples_prompts_and_caches() -> None:
    model = pretraining_model(**DEC_AND_SEP).eval()
    images = pixels()
    beams = model.generate(images, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert beams.shape[0] == 8
    torch.manual_seed(0)
    sampled = model.generate(images, do_sample=True, top_p=0.9, max_new_tokens=5)
    assert (sampled[:, 0] == model.settings.decoder_start_token_id).all()
    states = model.retrieval.tower_states(images)
    assert torch.equal(model.generate(image_embeds=states, num_beams=3, max_new_tokens=5), beams[::2])
    plain = model.generate(images, max_new_tokens=5, use_cache=False)
    assert torch.equal(plain, model.generate(images, max_new_tokens=5))

    prompts = dict(retrieval_processor()(text=["two", "a large yellow", "a", "nothing but"], return_tensors="pt"))
    together = model.generate(images, **prompts, max_new_tokens=4)
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in prompts.items()}
        length = int(one["attention_mask"].sum())
        one = {name: value[:, :length] for name, value in one.items()}
        alone = model.generate(images[row : row + 1], **one, max_new_tokens=4)
        assert alone[0, 0] == model.settings.decoder_start_token_id
        assert torch.equal(alone[0, 1 : length - 1], one["input_ids"][0, 1:-1])
        written = alone[0][alone[0] != 0]
        assert torch.equal(together[row][together[row] != 0][: len(written)], written)


def test_captions_need_an_end_token() -> None:
    model = pretraining_model()
    with pytest.raises(ValueError, match="eos_token_id=tokenizer.sep_token_id"):
        model.generate(pixels(), max_new_tokens=2)
    model.generate(pixels(), max_new_tokens=2, eos_token_id=3)


def test_text_is_as_long_as_the_longest_whatever_the_padding() -> None:
    model = pretraining_model().eval()
    ring = {"negative_image_index": torch.tensor([1, 2, 3, 0]), "negative_text_index": torch.tensor([3, 0, 1, 2])}
    batch = pretraining_batch()
    expected = model(**batch, **ring).loss
    padded = {name: torch.nn.functional.pad(batch[name], (0, 7)) for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(pixels(), **padded, **ring).loss, expected)
