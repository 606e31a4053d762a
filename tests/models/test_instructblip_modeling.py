"""InstructBLIP: equal to the native class, start from stage 1, what trains, cached images, candidates, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from hf_vlp.models.blip2.backbone_blip_2 import ImageTokenError, MissingWeightsError
from hf_vlp.models.blip2.language_blip_2 import LabelError
from hf_vlp.models.blip2.qformer import joint_pass, project_images
from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor
from hf_vlp.nn.packing import PackedTexts
from hf_vlp.training import apply_stage
from tests.tiny import blip2 as tiny_blip2
from tests.tiny import instructblip as tiny
from tests.tiny.blip2 import images, pixels

KINDS = ("llama", "opt", "t5")


def asked(kind: str) -> dict[str, Tensor]:
    made = dict(tiny.processor(kind)(images=images(3), text=list(tiny.INSTRUCTIONS[:3]), return_tensors="pt"))
    made["pixel_values"] = pixels(3)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_native_class_opens_our_folder_with_the_same_outputs(tmp_path: Path, kind: str) -> None:
    model = tiny.model(kind)
    model.save_pretrained(tmp_path)
    tiny.processor(kind).save_pretrained(tmp_path)
    native = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert type(native) is transformers.InstructBlipForConditionalGeneration
    theirs = transformers.InstructBlipProcessor.from_pretrained(tmp_path)
    made = theirs(images=images(3), text=list(tiny.INSTRUCTIONS[:3]), padding=True, return_tensors="pt")
    ours = tiny.processor(kind)(images=images(3), text=list(tiny.INSTRUCTIONS[:3]), return_tensors="pt")
    for name, value in made.items():
        # Theirs pads the Q-Former's text on the side of the language model, and so shifts its positions.
        if not name.startswith("qformer"):
            assert torch.equal(value, ours[name]), name
    assert made["qformer_attention_mask"].sum() == ours["qformer_attention_mask"].sum()
    batch = {"pixel_values": pixels(4), **tiny.batch(kind)}
    expected = native(**batch)
    got = model(**batch)
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.loss, expected.loss, atol=1e-5, rtol=1e-4)
    options = {"max_new_tokens": 6, "do_sample": False}
    inputs = asked(kind)
    assert torch.equal(model.generate(**inputs, **options), native.generate(**inputs, **options))
    beams = {**options, "num_beams": 3}
    assert torch.equal(model.generate(**inputs, **beams), native.generate(**inputs, **beams))
    # And the other way round.
    native.save_pretrained(tmp_path / "native")
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "native").eval()
    assert torch.equal(again(**batch).logits, got.logits)
    assert again.state_dict().keys() == native.state_dict().keys()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_start_from_stage_1(tmp_path: Path, kind: str) -> None:
    stage1 = tiny_blip2.pretraining_model()
    stage1.export(tmp_path)
    config, tokenizer = tiny_blip2.LANGUAGE_MODELS[kind]
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    language = auto.from_config(config())
    processor = InstructBlipProcessor.for_language_model(
        tokenizer(), tiny_blip2.retrieval_processor().tokenizer, tiny_blip2.QUERIES, image_size=tiny_blip2.IMAGE_SIZE
    )
    model = InstructBlipForConditionalGeneration.from_stage1(str(tmp_path), language, processor).eval()
    assert not [name for name, p in model.named_parameters() if p.is_meta]
    made = processor.training_inputs(images(4), tiny.ANSWERS, prompt=list(tiny.INSTRUCTIONS))
    features = model.image_features(made["pixel_values"])
    queries, _ = model.instructed_queries(features, made["qformer_input_ids"], made["qformer_attention_mask"])
    retrieval = stage1.retrieval.eval()
    texts = PackedTexts.from_padded(made["qformer_input_ids"], made["qformer_attention_mask"])
    keys = project_images(retrieval.qformer, retrieval.image_features(made["pixel_values"]))
    expected, _ = joint_pass(retrieval.qformer, retrieval.embeddings, retrieval.query_tokens, texts, keys)
    torch.testing.assert_close(queries, expected)
    # The instruction matters.
    other, _ = model.instructed_queries(features, made["qformer_input_ids"].roll(1, 0), None)
    assert not torch.allclose(other, queries, atol=1e-3)
    # All that the table freezes stays as it was, and the language model tells nothing else without an image.
    apply_stage(model, "instruct")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**made).loss.backward()
    optimizer.step()
    trained = ("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm.")
    for name, value in model.state_dict().items():
        if not name.startswith(trained):
            assert torch.equal(value, before[name]), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"query_tokens", "qformer.embeddings.word_embeddings.weight", "language_projection.bias"} <= changed
    assert not model.language_model.training and model.qformer.training
    model.save_pretrained(tmp_path / "out")
    transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_start_is_refused_from_anything_else(tmp_path: Path) -> None:
    language = transformers.LlamaForCausalLM(tiny_blip2.llama_config())
    with pytest.raises(ValueError, match="not a stage-1 model"):
        InstructBlipForConditionalGeneration.from_stage1(tiny.model(), language, tiny.processor())
    with pytest.raises(ValueError, match="its embeddings 12"):
        stage1 = tiny_blip2.retrieval_model(vocab_size=12)
        InstructBlipForConditionalGeneration.from_stage1(stage1, language, tiny.processor())
    model = tiny.model()
    state = {name: value for name, value in model.state_dict().items() if "crossattention" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MissingWeightsError, match="crossattention"):
        InstructBlipForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_the_same_where_logits_are_cut_down(kind: str) -> None:
    model = tiny.model(kind, hidden_dropout_prob=0.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    batch = {"pixel_values": pixels(4), **tiny.batch(kind)}
    model(**batch).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output = model.train()(**batch)
    assert output.logits is None
    output.loss.backward()
    for name, value in plain.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name].grad, value, atol=1e-6, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_cached_image_features_and_video() -> None:
    model, inputs = tiny.model(), asked("llama")
    pixel_values = inputs.pop("pixel_values")
    states = model.tower_states(pixel_values)
    options = {"max_new_tokens": 5, "do_sample": False}
    whole = model.generate(pixel_values, **inputs, **options)
    assert torch.equal(model.generate(image_embeds=states, **inputs, **options), whole)
    short = model.generate(pixel_values, **inputs, **options, prompt_in_output=False)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(short, whole[:, length:])
    # A video of one frame twice: its queries twice.
    video = pixel_values[:, :, None].repeat(1, 1, 2, 1, 1)
    _, queries = model.query_outputs(
        video, qformer_input_ids=inputs["qformer_input_ids"], qformer_attention_mask=inputs["qformer_attention_mask"]
    )
    _, once = model.query_outputs(
        pixel_values,
        qformer_input_ids=inputs["qformer_input_ids"],
        qformer_attention_mask=inputs["qformer_attention_mask"],
    )
    torch.testing.assert_close(queries, torch.cat([once, once], dim=1))
    with pytest.raises(ImageTokenError, match=r"\[5\] image tokens"):
        model.generate(video, **inputs, **options)
    frames = tiny.batch(frames=2)
    assert model(video[:3], **{name: value[:3] for name, value in frames.items()}).loss.isfinite()


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_candidates_are_scored_as_one_by_one(kind: str) -> None:
    model, processor, inputs = tiny.model(kind), tiny.processor(kind), asked(kind)
    pixel_values = inputs.pop("pixel_values")
    words = ["black", "two green triangles", "a star"]
    ids = [processor.tokenizer(word, add_special_tokens=kind == "t5")["input_ids"] for word in words]
    longest = max(map(len, ids))
    candidates = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    arguments = (pixel_values, inputs["qformer_input_ids"], inputs["qformer_attention_mask"])
    losses = model.candidate_losses(*arguments, inputs["input_ids"], inputs["attention_mask"], candidates, mask)
    again = model.candidate_losses(
        *arguments, inputs["input_ids"], inputs["attention_mask"], candidates, mask, chunk_size=2
    )
    torch.testing.assert_close(again, losses)
    for image in range(3):
        for number, row in enumerate(ids):
            kept = inputs["attention_mask"][image].bool()
            prompt = inputs["input_ids"][image][kept][None]
            one = {
                "pixel_values": pixel_values[image : image + 1],
                "qformer_input_ids": inputs["qformer_input_ids"][image : image + 1],
                "qformer_attention_mask": inputs["qformer_attention_mask"][image : image + 1],
            }
            answer = torch.tensor([row])
            if kind == "t5":
                labels, whole = answer, prompt
            else:
                whole = torch.cat([prompt, answer], dim=1)
                labels = torch.cat([torch.full_like(prompt, -100), answer], dim=1)
            logits = model(**one, input_ids=whole, labels=labels).logits
            shift = 0 if kind == "t5" else 1
            targets = labels[:, shift:]
            kept_logits = logits[:, : targets.shape[1]]
            expected = F.cross_entropy(kept_logits[targets != -100], targets[targets != -100], reduction="sum")
            torch.testing.assert_close(losses[image, number], expected, atol=1e-4, rtol=1e-4)


def test_silent_errors_are_loud() -> None:
    model, batch = tiny.model(), {"pixel_values": pixels(4), **tiny.batch()}
    with pytest.raises(ValueError, match="qformer_input_ids are missing"):
        model(**{name: value for name, value in batch.items() if not name.startswith("qformer")})
    with pytest.raises(ValueError, match="3 images for 4 instructions"):
        model(**{**batch, "pixel_values": pixels(3)})
    with pytest.raises(ImageTokenError, match="InstructBlipProcessor"):
        model(**{**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 320, 5)})
    image = batch["input_ids"] == model.config.image_token_id
    with pytest.raises(LabelError, match="image tokens"):
        model(**{**batch, "labels": batch["input_ids"].masked_fill(~image, -100)})
    with pytest.raises(ValueError, match="16.*pixels|pixels"):
        model(**{**batch, "pixel_values": pixels(4, size=24)})
    model.half().train()
    with pytest.raises(TypeError, match="float16 master weight"):
        model(**batch)


def test_stages() -> None:
    model: Any = tiny.model()
    report = apply_stage(model, "qformer")
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"query_tokens", "qformer", "language_projection"}
    assert report.trainable_parameters < apply_stage(model, "instruct").trainable_parameters
