"""The two inference models: equal to the native classes, loud where those are silent, saved in the native format."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from hf_vlp.models.blip2.backbone_blip_2 import ImageTokenError, MissingWeightsError
from hf_vlp.models.blip2.language_blip_2 import LabelError, copies_a_prompt, read_prompt_once
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval
from hf_vlp.models.retrieval import ImageEmbeds
from hf_vlp.objectives.language import AllLabelsIgnoredError
from tests.tiny.blip2 import (
    LANGUAGE_MODELS,
    QUERIES,
    TEXTS,
    generation_model,
    generation_processor,
    images,
    opt_config,
    pixels,
    pretraining_batch,
    pretraining_model,
    retrieval_model,
    retrieval_processor,
    text_batch,
)

KINDS = list(LANGUAGE_MODELS)


def language_model(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LANGUAGE_MODELS[kind][0](**changes)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def native_like(ours: PreTrainedModel) -> PreTrainedModel:
    native = getattr(transformers, type(ours).__name__)(ours.config).eval()
    native.load_state_dict(ours.state_dict())
    return native


def training_batch(kind: str, prompt: str = "a photo of") -> dict[str, Tensor]:
    return dict(generation_processor(kind).training_inputs(images(), TEXTS, prompt=prompt))


def stage2(kind: str = "opt", **changes: Any) -> Blip2ForConditionalGeneration:
    """Frozen tower and language model, in training."""
    model = generation_model(kind, **changes)
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    model.language_model.requires_grad_(False)
    return model.train()


# Retrieval


def test_retrieval_forward_equals_native() -> None:
    ours = retrieval_model()
    native = native_like(ours)
    batch = pretraining_batch()
    for matching in (False, True):
        expected = native(**batch, use_image_text_matching_head=matching)
        output = ours(**batch, use_image_text_matching_head=matching)
        for name in ("logits_per_image", "logits_per_text", "image_embeds"):
            torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-5)
        real = batch["attention_mask"].bool()
        if matching:
            real = torch.cat([torch.ones(4, QUERIES, dtype=torch.bool), real], dim=1)
            torch.testing.assert_close(output.text_embeds[real], expected.text_embeds[real], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(output.text_embeds, expected.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            output.vision_model_output.last_hidden_state, expected.vision_model_output.last_hidden_state
        )
    as_tuple = ours(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], ours(**batch).logits_per_image)


def test_image_tokens_of_native_processors_are_taken_off() -> None:
    model = retrieval_model()
    batch = text_batch()
    plain = model(pixels(), **batch).logits_per_image
    token = model.config.qformer_config.vocab_size
    model.config.image_token_index = token
    image = torch.full((4, QUERIES), token)
    ids = torch.cat([image, batch["input_ids"]], dim=1)
    mask = torch.cat([torch.ones_like(image), batch["attention_mask"]], dim=1)
    torch.testing.assert_close(model(pixels(), ids, mask).logits_per_image, plain)
    torch.testing.assert_close(model(pixels(), **batch).logits_per_image, plain)
    with pytest.raises(ImageTokenError, match=rf"\[{QUERIES - 1}\] image tokens.*{QUERIES} query tokens"):
        model(pixels(), ids[:, 1:], mask[:, 1:])


def test_scores_of_any_pairs_equal_one_pair_at_a_time() -> None:
    model = retrieval_model()
    batch = text_batch()
    embeds = model.embed_images(pixels())
    index = torch.tensor([3, 0, 0, 1])
    scores = model.matching_scores(embeds, index, **batch)
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        expected = model(pixels()[index[row]][None], **one, use_image_text_matching_head=True).logits_per_image[0, 1]
        torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-5)
    subset = model.matching_scores(embeds[1:2], torch.zeros(4, dtype=torch.long), **batch)
    assert subset.shape == (4,)
    assert len(embeds) == 4


def test_retrieval_inputs_that_do_not_fit() -> None:
    model = retrieval_model()
    batch = text_batch()
    with pytest.raises(ValueError, match="computes no loss.*Blip2ForPreTraining"):
        model(pixels(), **batch, labels=torch.zeros(4))
    with pytest.raises(TypeError, match=r"does not know the arguments \['return_loss'\]"):
        model(pixels(), **batch, return_loss=True)
    with pytest.raises(ValueError, match="input_ids are missing"):
        model(pixels())
    with pytest.raises(ValueError, match="for 4 texts; give one image a text"):
        model.matching_scores(model.embed_images(pixels()), torch.zeros(2, dtype=torch.long), **batch)
    with pytest.raises(ValueError, match="images have no states"):
        model.matching_scores(ImageEmbeds(torch.zeros(1, 2)), torch.zeros(4, dtype=torch.long), **batch)
    with pytest.raises(ValueError, match="no text branch"):
        retrieval_model(use_qformer_text_input=False)


# Language modelling


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_logits_equal_native(kind: str) -> None:
    ours = generation_model(kind)
    native = native_like(ours)
    batch = training_batch(kind)
    expected, output = native(**batch), ours(**batch)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-4)
    model = stage2(kind)
    trained = model(**batch)
    torch.testing.assert_close(trained.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert trained.logits is None


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_made_at_supervised_positions_only(kind: str) -> None:
    model = stage2(kind)
    batch = training_batch(kind)
    rows = []
    model.language_model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: rows.append(output.shape[:-1].numel())
    )
    model(**batch)
    assert rows == [(batch["labels"] != -100).sum().item()]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_trains_and_leave_the_rest(kind: str) -> None:
    model = stage2(kind)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**training_batch(kind)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    optimizer.step()
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert not model.language_model.training
    assert not model.vision_model.encoder.training
    assert model.qformer.training
    # Frozen and in eval: the loss does not depend on the dropout of the language model.
    assert torch.equal(model(**training_batch(kind)).loss, model(**training_batch(kind)).loss)


def test_cached_tower_outputs_stand_for_pixels() -> None:
    model = generation_model()
    batch = training_batch("opt")
    states = model.tower_states(batch["pixel_values"])
    expected = model(**batch)
    batch.pop("pixel_values")
    assert torch.equal(model(image_embeds=states, **batch).loss, expected.loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_learns_a_few_captions_by_heart(kind: str) -> None:
    model = stage2(kind)
    model.language_model.requires_grad_(True)
    rate = 1e-2 if kind == "t5" else 3e-3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    batch = {**training_batch(kind), "pixel_values": pixels()}
    for _ in range(120 if kind == "t5" else 80):
        loss = model.train()(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    learnt = model(**batch).loss.item()
    shuffled = model(**{**batch, "pixel_values": batch["pixel_values"].roll(1, dims=0)}).loss.item()
    # By the texts alone it could come to ln 4 a caption, 0.1 a token.
    assert learnt < 0.1
    assert shuffled > 3 * learnt


def test_low_rank_adapters_on_the_language_model(tmp_path: Path) -> None:
    model = stage2("llama")
    plain = model.eval()(**training_batch("llama")).loss
    base = {name: value.clone() for name, value in model.language_model.state_dict().items()}
    model.language_model = get_peft_model(
        model.language_model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    model.train()
    output = model(**training_batch("llama"))
    torch.testing.assert_close(output.loss, plain, rtol=1e-5, atol=1e-6)
    output.loss.backward()
    adapters = [name for name, p in model.language_model.named_parameters() if p.requires_grad]
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert all(model.language_model.get_parameter(name).grad is not None for name in adapters)
    with torch.no_grad():
        for name in adapters:
            model.language_model.get_parameter(name).add_(0.05)
    model.eval()
    inputs = generation_processor("llama")(images(), return_tensors="pt")
    beams = model.generate(**inputs, num_beams=3, max_new_tokens=5)
    model.language_model = model.language_model.merge_and_unload()
    assert torch.equal(model.generate(**inputs, num_beams=3, max_new_tokens=5), beams)
    changed = [n for n, v in model.language_model.state_dict().items() if not torch.equal(v, base[n])]
    assert changed
    assert all(".q_proj." in name or ".v_proj." in name for name in changed)


# Silent errors


@pytest.mark.parametrize("found", [0, QUERIES - 1, QUERIES + 1])
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_image_tokens_must_be_as_many_as_query_tokens(found: int, call: str) -> None:
    model = generation_model()
    token = model.config.image_token_index
    ids = torch.tensor([[token] * found + [2, 5, 6]]).repeat(2, 1)
    with pytest.raises(
        ImageTokenError, match=rf"\[{found}\] image tokens.*has {QUERIES} query tokens.*Blip2Processor"
    ):
        getattr(model, call)(pixel_values=pixels(2), input_ids=ids)
    # The native class goes on, and with no token at all it never sees the picture.
    native = native_like(model)
    if call == "forward" and found == 0:
        first, second = (native(pixel_values=pixels(2, seed), input_ids=ids).logits for seed in (1, 2))
        assert torch.equal(first, second)


def test_image_token_must_be_known() -> None:
    model = generation_model()
    model.config.image_token_index = None
    with pytest.raises(ImageTokenError, match="config.image_token_index is not set"):
        model(**training_batch("opt"))
    with pytest.raises(ImageTokenError, match="config.image_token_index is not set"):
        model.generate(pixels())


def test_padding_in_labels_is_refused() -> None:
    model = stage2()
    batch = training_batch("opt")
    wrong = {
        **batch,
        "labels": batch["input_ids"].masked_fill(batch["input_ids"] == model.config.image_token_id, -100),
    }
    with pytest.raises(LabelError, match="count PAD tokens in the loss"):
        model(**wrong)
    wrong.pop("attention_mask")
    with pytest.raises(LabelError, match="count PAD tokens in the loss"):
        model(**wrong)
    with pytest.raises(LabelError, match="labels stand on image tokens"):
        model(**{**batch, "labels": batch["input_ids"]})
    with pytest.raises(LabelError, match="labels must cover the image tokens"):
        model(**{**batch, "labels": batch["labels"][:, QUERIES:]})
    batch = training_batch("t5")
    with pytest.raises(LabelError, match="count PAD tokens in the loss"):
        stage2("t5")(**{**batch, "labels": batch["labels"].masked_fill(batch["labels"] == -100, 0)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_labels_to_learn_is_refused(kind: str) -> None:
    batch = training_batch(kind)
    for model in (stage2(kind), generation_model(kind)):
        with pytest.raises(AllLabelsIgnoredError):
            model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})


@pytest.mark.parametrize("part", ["qformer", "language_projection"])
def test_half_precision_master_weights_are_refused_in_training(part: str) -> None:
    model = stage2()
    getattr(model, part).half()
    with pytest.raises(TypeError, match=f"{part}.*float16 master weight"):
        model(**training_batch("opt"))


def test_mixed_dtypes_work_where_they_are_meant_to() -> None:
    model = stage2()
    model.language_model.bfloat16()
    model.vision_model.embeddings.bfloat16()
    model.vision_model.encoder.bfloat16()
    model(**training_batch("opt")).loss.backward()
    assert model.query_tokens.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stage2()(**training_batch("opt")).loss.backward()


def test_a_language_model_of_another_width() -> None:
    model = generation_model()
    model.language_model = language_model("llama")
    with pytest.raises(ValueError, match="gives 28 numbers a query.*LlamaForCausalLM are 32 wide.*from_stage1"):
        model.generate(pixels())
    narrow = AutoModelForCausalLM.from_config(opt_config(word_embed_proj_dim=20))
    with pytest.raises(ValueError, match="embeddings of OPTForCausalLM are 20 wide, its hidden states 28"):
        Blip2ForConditionalGeneration.from_stage1(retrieval_model(), narrow, generation_processor())


@pytest.mark.parametrize("part", ["vision_model.encoder", "qformer", "language_model", "query_tokens"])
def test_a_part_that_did_not_load(part: str, tmp_path: Path) -> None:
    model = generation_model()
    partial = {name: value for name, value in model.state_dict().items() if not name.startswith(part)}
    native_like(model).save_pretrained(tmp_path, state_dict=partial)
    with pytest.raises(MissingWeightsError, match=rf"lacks weights.*{part.split('.')[0]}") as caught:
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert all(name.startswith(part) for name in caught.value.names)
    _, info = Blip2ForConditionalGeneration.from_pretrained(tmp_path, allow_missing=True, output_loading_info=True)
    assert set(info["missing_keys"]) == set(caught.value.names)


# Stage 1 to stage 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["export", "checkpoint", "model"])
def test_stage_2_starts_from_stage_1(kind: str, start: str, tmp_path: Path) -> None:
    stage1 = pretraining_model()
    if start == "checkpoint":
        stage1.save_pretrained(tmp_path / "stage1")
    else:
        stage1.export(tmp_path / "stage1")
    source = stage1 if start == "model" else tmp_path / "stage1"
    language, processor = language_model(kind), generation_processor(kind)
    before = {name: value.clone() for name, value in language.state_dict().items()}
    model = Blip2ForConditionalGeneration.from_stage1(source, language, processor).eval()
    assert model.config.image_token_index == processor.image_token_id
    assert not model.config.qformer_config.use_qformer_text_input
    assert not any(parameter.is_meta for parameter in model.parameters())
    for name, value in model.qformer.state_dict().items():
        assert torch.equal(value, stage1.retrieval.qformer.state_dict()[name])
    assert all(torch.equal(model.language_model.state_dict()[name], value) for name, value in before.items())
    retrieval = stage1.retrieval.eval()
    _, queries = model.query_outputs(pixels())
    torch.testing.assert_close(queries, retrieval.extract_features(pixels()).image_embeds)
    model.save_pretrained(tmp_path / "stage2")
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "stage2")
    batch = training_batch(kind)
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)


def test_stage_2_refuses_what_is_not_stage_1(tmp_path: Path) -> None:
    generation_model().save_pretrained(tmp_path / "stage2")
    with pytest.raises(ValueError, match="holds Blip2ForConditionalGeneration.*starts from a stage-1 checkpoint"):
        Blip2ForConditionalGeneration.from_stage1(tmp_path / "stage2", language_model("opt"), generation_processor())
    language_model("opt").save_pretrained(tmp_path / "opt")
    with pytest.raises(ValueError, match="holds OPTForCausalLM of type 'opt'"):
        Blip2ForConditionalGeneration.from_stage1(tmp_path / "opt", language_model("opt"), generation_processor())
    with pytest.raises(ValueError, match="OPTForCausalLM is not a stage-1 model"):
        Blip2ForConditionalGeneration.from_stage1(language_model("opt"), language_model("opt"), generation_processor())
    with pytest.raises(ValueError, match="give `processor`"):
        Blip2ForConditionalGeneration.from_stage1(retrieval_model(), language_model("opt"))
    pretraining_model().export(tmp_path / "stage1")
    with pytest.raises(MissingWeightsError, match="stage-1 checkpoint.*Blip2ForConditionalGeneration.from_stage1"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path / "stage1")
    with pytest.raises(MissingWeightsError, match="stage-2 checkpoints have no retrieval heads"):
        Blip2ForImageTextRetrieval.from_pretrained(
            tmp_path / "stage2", qformer_config={"use_qformer_text_input": True}
        )


def test_language_model_by_name_and_without_stage_1(tmp_path: Path) -> None:
    language, tokenizer = language_model("llama"), LANGUAGE_MODELS["llama"][1]()
    language.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    model = Blip2ForConditionalGeneration.from_stage1(retrieval_model(), str(tmp_path / "llama"), dtype=torch.bfloat16)
    assert model.language_model.dtype == torch.bfloat16
    assert model.language_projection.weight.dtype == torch.float32
    bare = Blip2ForConditionalGeneration.from_vision_qformer_language_pretrained(
        retrieval_model().vision_model,
        transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40),
        str(tmp_path / "llama"),
        num_query_tokens=QUERIES,
    )
    assert bare(**training_batch("llama")).loss.isfinite()


def test_room_is_made_for_the_image_token(tmp_path: Path) -> None:
    language = language_model("llama", vocab_size=300)
    before = language.get_input_embeddings().weight.clone()
    processor = generation_processor("llama")
    assert processor.image_token_id >= 300
    model = Blip2ForConditionalGeneration.from_stage1(retrieval_model(), language, processor).eval()
    weight = model.get_input_embeddings().weight
    assert len(weight) == processor.image_token_id + 1
    assert torch.equal(weight[:300], before)
    assert model.generation_config.suppress_tokens == [processor.image_token_id]
    # Plain transformers does not read that list, but the new row's logit is the mean of all, and so never the largest.
    inputs = processor(images(), return_tensors="pt")
    logits = model(**inputs).logits
    torch.testing.assert_close(logits[..., 300], logits[..., :300].mean(dim=-1), rtol=1e-3, atol=1e-3)
    model.save_pretrained(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        # Even where the untrained row would win.
        model.language_model.lm_head.weight[processor.image_token_id] = 100 * model.language_model.lm_head.weight[7]
    ids = model.generate(**inputs, max_new_tokens=8, num_beams=2)
    assert not (ids[:, QUERIES + 1 :] == processor.image_token_id).any()


# Generation


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}, {"use_cache": False}],
)
def test_generation_equals_native(kind: str, options: dict[str, Any]) -> None:
    model, processor = generation_model(kind), generation_processor(kind)
    native = native_like(model)
    inputs = processor(
        images(), text=["a", "two big", "nothing but a", "Question: what? Answer:"], return_tensors="pt"
    )
    expected = native.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False, **options), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nucleus_sampling_equals_native(kind: str) -> None:
    model, processor = generation_model(kind), generation_processor(kind)
    native = native_like(model)
    inputs = processor(images(), return_tensors="pt")
    results = []
    for side in (native, model):
        torch.manual_seed(5)
        results.append(
            side.generate(**inputs, do_sample=True, top_p=0.9, top_k=0, num_return_sequences=3, max_new_tokens=5)
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_do_not_depend_on_the_batch(kind: str) -> None:
    model, processor = generation_model(kind), generation_processor(kind)
    prompts = ["a", "two big", "nothing but a", "Question: what? Answer:"]
    inputs = processor(images(), text=prompts, return_tensors="pt")
    together = model.generate(**inputs, max_new_tokens=5, num_beams=2)
    for row in range(4):
        one = processor([images()[row]], text=[prompts[row]], return_tensors="pt")
        alone = model.generate(**one, max_new_tokens=5, num_beams=2)
        if kind != "t5":
            assert torch.equal(together[row, inputs["input_ids"].shape[1] :], alone[0, one["input_ids"].shape[1] :])
        else:
            assert torch.equal(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_generation_without_ids_is_the_unprompted_caption(kind: str) -> None:
    model, processor = generation_model(kind), generation_processor(kind)
    inputs = processor(images(), return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4)
    assert torch.equal(model.generate(inputs["pixel_values"], max_new_tokens=4), expected)
    states = model.tower_states(inputs["pixel_values"])
    assert torch.equal(model.generate(image_embeds=states, max_new_tokens=4), expected)


def test_a_prompt_is_read_once_for_all_its_beams() -> None:
    model, processor = generation_model("opt"), generation_processor("opt")
    inputs = processor(images(), return_tensors="pt")
    widths = []
    model.language_model.model.decoder.layers[0].register_forward_pre_hook(
        lambda module, arguments: widths.append(tuple(arguments[0].shape[:2]))
    )
    model.generate(**inputs, num_beams=3, max_new_tokens=3, min_new_tokens=3)
    assert widths[0] == (4, QUERIES)
    assert all(width == (12, 1) for width in widths[1:])
    options = {"num_beams": 3}
    assert copies_a_prompt(model.language_model, options) == 3
    assert copies_a_prompt(model.language_model, {**options, "use_cache": False}) == 1
    assert copies_a_prompt(generation_model("t5").language_model, options) == 1
    cache = read_prompt_once(model.language_model, torch.randn(2, 4, 28), torch.ones(2, 4, dtype=torch.long), 3)
    assert (cache.get_seq_length(), cache.layers[0].keys.shape[0]) == (3, 6)


def test_stops_at_the_token_that_ends_captions(tmp_path: Path) -> None:
    """OPT begins every text with its end token, so captions end in a newline, also for plain transformers."""
    processor = generation_processor("opt")
    model = Blip2ForConditionalGeneration.from_stage1(retrieval_model(), language_model("opt"), processor)
    newline = processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for loaded in (
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path),
        Blip2ForConditionalGeneration.from_pretrained(tmp_path),
    ):
        assert loaded.generation_config.eos_token_id == newline
        assert loaded.language_model.generation_config.eos_token_id == newline
        assert loaded.config.text_config.eos_token_id == newline


# Plain transformers


SCRIPT = """
import sys
import torch
import transformers
assert "hf_vlp" not in sys.modules
folder = sys.argv[1]
retrieval = transformers.Blip2ForImageTextRetrieval.from_pretrained(folder + "/retrieval").eval()
generation = transformers.AutoModelForImageTextToText.from_pretrained(folder + "/generation").eval()
inputs = torch.load(folder + "/inputs.pt")
with torch.no_grad():
    logits = retrieval(**inputs["retrieval"], use_image_text_matching_head=True).logits_per_image
ids = generation.generate(**inputs["generation"], num_beams=2, max_new_tokens=5)
names = [type(x).__module__ for x in (retrieval, generation)]
names += [type(transformers.AutoProcessor.from_pretrained(folder + "/" + x)).__module__ for x in inputs]
torch.save({"retrieval": logits, "generation": ids, "names": names}, folder + "/out.pt")
"""


@pytest.mark.slow
def test_folders_open_in_plain_transformers(tmp_path: Path) -> None:
    retrieval, generation = retrieval_model(), generation_model()
    processors = {"retrieval": retrieval_processor(), "generation": generation_processor()}
    inputs = {
        "retrieval": dict(processors["retrieval"](images(), list(TEXTS), return_tensors="pt")),
        "generation": dict(processors["generation"](images(), return_tensors="pt")),
    }
    for name, model in (("retrieval", retrieval), ("generation", generation)):
        model.save_pretrained(tmp_path / name)
        processors[name].save_pretrained(tmp_path / name)
    torch.save(inputs, tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "out.pt")
    assert all(name.startswith("transformers.models.blip_2.") for name in result["names"])
    with torch.no_grad():
        expected = retrieval(**inputs["retrieval"], use_image_text_matching_head=True).logits_per_image
    torch.testing.assert_close(result["retrieval"], expected, rtol=1e-4, atol=1e-5)
    expected = generation.generate(**inputs["generation"], num_beams=2, max_new_tokens=5)
    assert torch.equal(result["generation"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_native_folders_pass_through_unchanged(kind: str, tmp_path: Path) -> None:
    native = native_like(generation_model(kind))
    native.save_pretrained(tmp_path / "native")
    Blip2ForConditionalGeneration.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "ours")
    transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("native", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / file).read_text() == (tmp_path / "again" / file).read_text()


def test_units_for_sharding_are_modules_that_are_called() -> None:
    for model in (retrieval_model(), generation_model(), pretraining_model()):
        assert "Blip2EncoderLayer" in model._no_split_modules
        assert not {"Blip2QFormerMultiHeadAttention", "Blip2TextEmbeddings"} & set(model._no_split_modules)
    assert "OPTDecoderLayer" in generation_model()._no_split_modules
