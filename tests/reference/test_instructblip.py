"""InstructBLIP against LAVIS: the merged inputs, losses, gradients, candidate scores and generated text."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, T5Config

from hf_vlp.models.instructblip.conversion_instructblip import model_from_original, to_original
from hf_vlp.models.instructblip.modeling_instructblip import InstructBlipForConditionalGeneration
from hf_vlp.models.instructblip.processing_instructblip import InstructBlipProcessor
from tests.reference.cases import Case, reference
from tests.reference.test_blip2_stage2 import compare_ids, compare_scores, limits

Model = InstructBlipForConditionalGeneration


def build(case: Case, kind: str) -> tuple[Model, InstructBlipProcessor]:
    """The recorded model with all that LAVIS trains trainable; and the processor that goes with it."""
    config = case.config
    tokenizers = case.folder / "tokenizers"
    processor = InstructBlipProcessor.for_language_model(
        AutoTokenizer.from_pretrained(tokenizers / kind),
        AutoTokenizer.from_pretrained(tokenizers / "bert"),
        config["qformer"]["num_query_tokens"],
        image_size=config["vision"]["image_size"],
    )
    known = dict(config["language_model"])
    for name in ("kind", "dense_act_fn_effective"):
        known.pop(name, None)
    known["vocab_size"] = known.pop("vocab_size_after_adding_PAD", known["vocab_size"])
    text_config: PreTrainedConfig = {"llama": LlamaConfig, "t5": T5Config}[kind](**known)
    model = model_from_original(
        case.weights,
        text_config=text_config,
        image_token_id=processor.image_token_id,
        vision_heads=config["vision"]["heads"],
        qformer_heads=config["qformer"]["num_attention_heads"],
    )
    model.requires_grad_(True)
    model.language_model.requires_grad_(False)
    model.vision_model.requires_grad_(False)
    model.vision_model.post_layernorm.requires_grad_(True)
    return model, processor


def pictures(count: int) -> list[Image.Image]:
    """Any images: only the texts that the processor makes beside them are looked at."""
    return [Image.new("RGB", (8, 8))] * count


class DummyIdPenalty(LogitsProcessor):
    """The recorded search began with a dummy id, which the repetition penalty counted as written."""

    def __init__(self, token: int, penalty: float) -> None:
        self.token, self.penalty = token, penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        score = scores[:, self.token]
        penalised = torch.where(score < 0, score * self.penalty, score / self.penalty)
        written = (input_ids == self.token).any(dim=1)
        return scores.index_copy(1, torch.tensor([self.token]), torch.where(written, score, penalised)[:, None])


def widen(batch: dict[str, Tensor], width: int, fill: dict[str, int]) -> dict[str, Tensor]:
    """The batch padded on the right to the recorded width, which counts paddings of both parts of a row."""
    return {
        name: nn.functional.pad(value, (0, width - value.shape[1]), value=fill[name]) if name in fill else value
        for name, value in batch.items()
    }


def compare_gradients(case: Case, model: Model, kind: str) -> None:
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    original = to_original(gradients, language_model=kind)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, original[name.removeprefix("grad/")])


def compare_training(case: Case, model: Model, batch: dict[str, Tensor], kind: str) -> Any:
    """Outputs and gradients of one batch; loss and gradients in training mode too, where logits are cut down."""
    image = case.inputs["image"]
    output = model(pixel_values=image, **batch)
    case.compare("loss", output.loss)
    case.compare("logits", output.logits)
    features = model.image_features(image)
    queries, text = model.instructed_queries(
        features, batch["qformer_input_ids"], batch["qformer_attention_mask"], queries_only=False
    )
    expected, mask = case.outputs["qformer_output"], batch["qformer_attention_mask"]
    # We compute nothing at padding, LAVIS does; nobody reads it.
    text = torch.where(mask[..., None] == 1, text, expected[:, queries.shape[1] :])
    case.compare("qformer_output", torch.cat([queries, text], dim=1))
    torch.testing.assert_close(output.qformer_outputs.last_hidden_state, queries)
    embeds = model._embed(batch["input_ids"], model.image_token_mask(batch["input_ids"]), model.soft_prompt(queries))
    case.compare("llm_inputs_embeds", embeds)
    case.compare("llm_attention_mask", batch["attention_mask"])
    case.compare("labels", batch["labels"])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.train()(pixel_values=image, **batch).loss.backward()
    model.eval()
    compare_gradients(case, model, kind)
    return output


def asked_of(case: Case, processor: InstructBlipProcessor) -> Any:
    """Inputs of `generate` for the recorded prompts. LAVIS cuts them for the Q-Former only."""
    prompts, count = case.spec["texts"]["prompt"], len(case.inputs["image"])
    made = processor(images=pictures(count), text=prompts, return_tensors="pt")
    made.pop("pixel_values")
    cut = processor.training_inputs(None, [""] * count, prompt=prompts, max_prompt_length=case.config["max_txt_len"])
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        made[name] = cut[name]
        assert torch.equal(made[name], case.inputs[f"generate_{name}"])
    return made


def compare_classes(case: Case, model: Model, processor: InstructBlipProcessor, kind: str) -> None:
    prompt, candidates = case.spec["texts"]["class_prompt"], case.spec["texts"]["candidates"]
    batch = len(case.inputs["image"])
    asked = processor.training_inputs(None, [""] * batch, prompt=prompt, max_prompt_length=case.config["max_txt_len"])
    assert torch.equal(asked["qformer_input_ids"][:1], case.inputs["class_prompt_qformer_ids"])
    # LAVIS does not cut the language model's prompt here.
    processor.tokenizer.padding_side = "right"
    made = processor(images=pictures(batch), text=[prompt] * batch, return_tensors="pt")
    queries = model.config.num_query_tokens
    assert torch.equal(made["input_ids"][:1, queries:], case.inputs[f"class_prompt_{kind}_ids"])
    ids, mask = case.inputs["candidate_ids"], case.inputs["candidate_attention_mask"]
    again = processor.tokenizer(candidates, padding=True, return_tensors="pt")
    assert torch.equal(again["input_ids"], ids)
    if model.config.use_decoder_only_language_model:
        ids, mask = ids[:, 1:], mask[:, 1:]
    losses = model.candidate_losses(
        case.inputs["image"],
        asked["qformer_input_ids"],
        asked["qformer_attention_mask"],
        made["input_ids"],
        made["attention_mask"],
        ids,
        mask,
        chunk_size=2,
    )
    if model.config.use_decoder_only_language_model:
        # LAVIS divides by the padded length, which depends on how the candidates are put together.
        segments, count = case.config["predict_class"]["n_segments"], len(candidates)
        size = count // segments
        for first in range(0, size * segments, size):
            last = count if first == size * (segments - 1) else first + size
            longest = int(mask[first:last].sum(dim=1).max())
            losses[:, first:last] /= made["input_ids"].shape[1] + longest - 1
    case.compare("predict_class/losses", losses)
    case.compare("predict_class/ranks", losses.argsort(dim=-1))


@reference("instructblip/vicuna")
def test_vicuna(case: Case) -> None:
    model, processor = build(case, "llama")
    inputs, texts, queries = case.inputs, case.spec["texts"], case.config["qformer"]["num_query_tokens"]
    pad = processor.tokenizer.pad_token_id
    made = processor.training_inputs(
        None,
        texts["text_output"],
        prompt=texts["text_input"],
        max_length=case.config["max_output_txt_len"],
        max_prompt_length=case.config["max_txt_len"],
    )
    assert torch.equal(made["qformer_input_ids"], inputs["qformer_input_ids"])
    assert torch.equal(made["qformer_attention_mask"], inputs["qformer_attention_mask"])
    width = case.outputs["labels"].shape[1]
    batch = widen(dict(made), width, {"input_ids": pad, "attention_mask": 0, "labels": -100})
    case.compare("concat/input_ids", batch["input_ids"][:, queries:])
    case.compare("concat/attention_mask", batch["attention_mask"][:, queries:])
    supervised = (batch["labels"] != -100).int()
    case.compare("concat/input_part_targets_len", supervised.argmax(dim=1) - queries)
    compare_training(case, model, batch, "vicuna")
    compare_classes(case, model, processor, "llm")

    processor.tokenizer.padding_side = "left"
    asked = asked_of(case, processor)
    assert torch.equal(asked["input_ids"][:, queries:], inputs["generate_llm_input_ids"])
    case.compare("generate/first_attention_mask", asked["attention_mask"])
    seen: dict[str, Tensor] = {}

    def first_step(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.update(inputs_embeds=kwargs["inputs_embeds"], position_ids=kwargs["position_ids"])

    handle = model.language_model.register_forward_pre_hook(first_step, with_kwargs=True)
    settings, stop = case.config["generate"], case.config["token_ids"]["llama"]["eos"]
    new_tokens = settings["max_length"] - 1  # the recorded length counts the dummy first id
    dummy = case.config["language_model"]["bos_token_id"]
    penalties = LogitsProcessorList([DummyIdPenalty(dummy, settings["repetition_penalty"])])
    weight = float(settings.get("length_penalty", 1.0))
    for name, options, penalty in (
        ("generate_greedy", {}, 1.0),
        ("generate_beam3", {"num_beams": settings["num_beams"], "length_penalty": weight}, weight),
        ("generate_beam3_lp0", {"num_beams": settings["num_beams"], "length_penalty": 0.0}, 0.0),
    ):
        output = model.generate(
            inputs["image"],
            **asked,
            **limits(settings, new_tokens),
            **options,
            repetition_penalty=settings["repetition_penalty"],
            logits_processor=penalties,
            prompt_in_output=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = output.sequences
        compare_ids(case, f"{name}/ids", torch.cat([case.outputs[f"{name}/ids"][:, :1], tokens], dim=1), stop)
        if output.get("sequences_scores") is not None:
            compare_scores(case, f"{name}/beam_scores", output.sequences_scores, tokens, stop, penalty)
        if handle is not None:
            handle.remove()
            handle = None
            case.compare("generate/first_inputs_embeds", seen["inputs_embeds"])
            padding = asked["attention_mask"] == 0
            case.compare("generate/first_position_ids", seen["position_ids"].masked_fill(padding, 1))

    frames = inputs["video"].shape[2]
    image = torch.full((len(inputs["video"]), queries * (frames - 1)), processor.image_token_id)
    tokens = model.generate(
        inputs["video"],
        qformer_input_ids=asked["qformer_input_ids"],
        qformer_attention_mask=asked["qformer_attention_mask"],
        input_ids=torch.cat([image, asked["input_ids"]], dim=1),
        attention_mask=torch.cat([torch.ones_like(image), asked["attention_mask"]], dim=1),
        **limits(settings, new_tokens),
        repetition_penalty=settings["repetition_penalty"],
        logits_processor=penalties,
        prompt_in_output=False,
    )
    name = "generate_video_greedy/ids"
    compare_ids(case, name, torch.cat([case.outputs[name][:, :1], tokens], dim=1), stop)


@reference("instructblip/t5")
def test_t5(case: Case) -> None:
    model, processor = build(case, "t5")
    assert processor.is_encoder_decoder
    inputs, texts, queries = case.inputs, case.spec["texts"], case.config["qformer"]["num_query_tokens"]
    made = processor.training_inputs(
        None,
        texts["text_output"],
        prompt=texts["text_input"],
        max_length=case.config["max_output_txt_len"],
        max_prompt_length=case.config["max_txt_len"],
    )
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        assert torch.equal(made[name], inputs[name])
    assert torch.equal(made["input_ids"][:, queries:], inputs["t5_input_ids"])
    assert torch.equal(made["attention_mask"][:, queries:], inputs["t5_attention_mask"])
    assert torch.equal(made["decoder_attention_mask"], inputs["t5_output_attention_mask"])
    output = compare_training(case, model, dict(made), "t5")
    case.compare("encoder_last_hidden_state", output.language_model_outputs.encoder_last_hidden_state)
    compare_classes(case, model, processor, "t5")

    asked = asked_of(case, processor)
    assert torch.equal(asked["input_ids"][:, queries:], inputs["generate_t5_input_ids"])
    settings, stop = case.config["generate"], case.config["token_ids"]["t5"]["eos"]
    weight = float(settings.get("length_penalty", 1.0))
    for name, options, penalty in (
        ("generate_greedy", {}, 1.0),
        ("generate_beam3", {"num_beams": settings["num_beams"], "length_penalty": weight}, weight),
        ("generate_beam3_lp0", {"num_beams": settings["num_beams"], "length_penalty": 0.0}, 0.0),
    ):
        output = model.generate(
            inputs["image"],
            **asked,
            **limits(settings, settings["max_length"]),
            **options,
            repetition_penalty=settings["repetition_penalty"],
            return_dict_in_generate=True,
            output_scores=True,
        )
        tokens = output.sequences
        compare_ids(case, f"{name}/ids", tokens, stop)
        if output.get("sequences_scores") is not None:
            compare_scores(case, f"{name}/beam_scores", output.sequences_scores, tokens[:, 1:], stop, penalty)
