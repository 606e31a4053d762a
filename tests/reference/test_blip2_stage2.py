"""BLIP-2 stage 2 against LAVIS: losses, what the language model is given, and generated text, with OPT and T5."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, OPTConfig, PreTrainedConfig, T5Config

from hf_vlp.models.blip2.conversion_blip_2 import model_from_original, to_original
from hf_vlp.models.blip2.modeling_blip_2 import Blip2ForConditionalGeneration
from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from tests.reference.cases import Case, reference


def stage2(case: Case, kind: str) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """The recorded model, frozen tower and language model, no dropout; and the processor that goes with it."""
    config = case.config
    processor = Blip2Processor.for_language_model(
        AutoTokenizer.from_pretrained(case.folder / "tokenizers" / kind),
        config["qformer"]["num_query_tokens"],
        image_size=config["vision"]["image_size"],
    )
    known = {k: v for k, v in config["language_model"].items() if k not in ("kind", "dense_act_fn_effective")}
    text_config: PreTrainedConfig = {"opt": OPTConfig, "t5": T5Config}[kind](**known)
    text_config.eos_token_id = processor.stop_token_id
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


def without_prompt(texts: list[str], prompt: str) -> list[str]:
    """The captions that a dataset holds, which put behind the prompt give the recorded texts."""
    assert all(text.startswith(prompt) for text in texts)
    return [text.removeprefix(prompt) for text in texts]


def compare_gradients(case: Case, model: Blip2ForConditionalGeneration, kind: str) -> None:
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    original = to_original(gradients, language_model=kind)
    for name in case.output_names:
        if name.startswith("grad/"):
            case.compare(name, original[name.removeprefix("grad/")])


def generate(model: Blip2ForConditionalGeneration, image: Tensor, **inputs: Any) -> tuple[Tensor, Tensor | None]:
    """New tokens (B, T), and the scores of the beams if there are any."""
    output = model.generate(image, return_dict_in_generate=True, output_scores=True, **inputs)
    tokens = output.sequences
    if model.config.use_decoder_only_language_model:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    return tokens, output.get("sequences_scores")


def limits(settings: dict[str, Any], new_tokens: int) -> dict[str, int]:
    """Recorded lengths as numbers of new tokens; the recorded minimum counts the first id, which is not written."""
    smallest = settings.get("min_length", settings.get("min_len", 1)) - 1
    return {"max_new_tokens": new_tokens, **({"min_new_tokens": smallest} if smallest > 0 else {})}


def writes_the_same(case: Case, name: str) -> bool:
    """Whether today's library finds the text that the older one found, as the case states; if not, leaves it out.

    With a length penalty the two searches may stop at different lengths.
    """
    stated = case.spec.get("generation_reproduced_by_transformers_5_23", {})
    if stated.get(name.split("/")[0], True):
        return True
    case.leave_out(name, "today's transformers writes another text, as the case says")
    return False


def compare_ids(case: Case, name: str, tokens: Tensor, stop: int) -> None:
    """Compares ids up to the first stop token, behind which libraries pad as they like."""
    if not writes_the_same(case, name):
        return
    expected = case.outputs[name]
    written = torch.full_like(expected, -1)
    width = min(tokens.shape[1], expected.shape[1])
    written[:, :width] = tokens[:, :width]
    stops = (tokens == stop).int()
    over = torch.cat([torch.zeros_like(stops[:, :1]), stops.cumsum(dim=1)[:, :-1]], dim=1).bool()
    finished = torch.ones_like(expected, dtype=torch.bool)
    finished[:, :width] = over[:, :width]
    if not stops.any(dim=1).all():
        assert tokens.shape[1] == expected.shape[1], f"{name}: unfinished texts of another length"
    case.compare(name, torch.where(finished, expected, written))


def compare_scores(case: Case, name: str, scores: Tensor, tokens: Tensor, stop: int, penalty: float) -> None:
    """Compares beam scores; the recorded search divided texts that did not end by one more than today's does."""
    if not writes_the_same(case, name):
        return
    ended = (tokens == stop).any(dim=1)
    count = float(tokens.shape[1])
    case.compare(name, torch.where(ended, scores, scores * (count / (count + 1)) ** penalty))


@reference("blip2/stage2_opt")
def test_opt(case: Case) -> None:
    model, processor = stage2(case, "opt")
    inputs, stop = case.inputs, case.config["token_ids"]["opt"]["newline"]
    assert processor.stop_token_id == stop
    texts, prompt = case.spec["texts"]["text_input"], case.config["prompt"]
    queries = case.config["qformer"]["num_query_tokens"]

    plain = processor.training_inputs(None, texts, max_length=case.config["max_txt_len"])
    assert torch.equal(plain["input_ids"][:, queries:], inputs["opt_input_ids"])
    assert torch.equal(plain["attention_mask"][:, queries:], inputs["opt_attention_mask"])
    case.compare("no_prompt/labels", plain["labels"])
    case.compare("llm_attention_mask", plain["attention_mask"])
    output = model(pixel_values=inputs["image"], **plain)
    case.compare("no_prompt/loss", output.loss)
    case.compare("logits", output.logits)
    case.compare("query_output", output.qformer_outputs.last_hidden_state)
    embeds = model._embed(
        plain["input_ids"],
        model.image_token_mask(plain["input_ids"]),
        model.soft_prompt(output.qformer_outputs.last_hidden_state),
    )
    case.compare("llm_inputs_embeds", embeds)
    prompted = processor.training_inputs(
        None, without_prompt(texts, prompt), prompt=prompt, max_length=case.config["max_txt_len"]
    )
    assert torch.equal(prompted["input_ids"], plain["input_ids"])
    case.compare("prompt/labels", prompted["labels"])
    # In training mode, where logits are made at supervised positions only; the recording had no dropout.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    prompted_output = model.train()(pixel_values=inputs["image"], **prompted)
    case.compare("prompt/loss", prompted_output.loss)
    prompted_output.loss.backward()
    model.eval()
    compare_gradients(case, model, "opt")

    image = processor.image_token_id
    batch = len(texts)
    ids = torch.cat([torch.full((batch, queries), image), inputs["prompt_ids"].expand(batch, -1)], dim=1)
    made = processor(text=[prompt], return_tensors="pt")["input_ids"]
    assert torch.equal(made, inputs["prompt_ids"])
    settings = case.config["generate"]
    # The recorded lengths count a dummy first id.
    new_tokens = settings["max_length"] - 1
    for name, options, penalty in (
        ("generate_greedy", {}, 1.0),
        ("generate_beam3", {"num_beams": settings["num_beams"]}, 1.0),
        ("generate_beam3_lp0", {"num_beams": settings["num_beams"], "length_penalty": 0.0}, 0.0),
    ):
        tokens, scores = generate(model, inputs["image"], input_ids=ids, **limits(settings, new_tokens), **options)
        compare_ids(case, f"{name}/ids", torch.cat([case.outputs[f"{name}/ids"][:, :1], tokens], dim=1), stop)
        if scores is not None:
            compare_scores(case, f"{name}/beam_scores", scores, tokens, stop, penalty)

    settings = case.config["predict_answers"]
    questions = [settings["prompt"].format(question) for question in case.spec["texts"]["questions"]]
    # The native processor counts the image tokens too.
    longest = queries + case.config["max_txt_len"]
    asked = processor(text=questions, return_tensors="pt", truncation=True, max_length=longest)
    assert torch.equal(asked["input_ids"], inputs["vqa_input_ids"])
    assert torch.equal(asked["attention_mask"], inputs["vqa_attention_mask"])
    ids = torch.cat([torch.full((batch, queries), image), asked["input_ids"]], dim=1)
    mask = torch.cat([torch.ones(batch, queries, dtype=torch.long), asked["attention_mask"]], dim=1)
    case.compare("predict_answers/first_step_attention_mask", mask)
    tokens, scores = generate(
        model,
        inputs["image"],
        input_ids=ids,
        attention_mask=mask,
        **limits(settings, settings["max_len"]),
        num_beams=settings["num_beams"],
        length_penalty=float(settings["length_penalty"]),
    )
    name = "predict_answers/ids"
    compare_ids(case, name, torch.cat([case.outputs[name][:, :1], tokens], dim=1), stop)
    compare_scores(case, "predict_answers/beam_scores", scores, tokens, stop, float(settings["length_penalty"]))
    name = "predict_answers_greedy/ids"
    new_tokens = case.outputs[name].shape[1] - 1
    tokens, _ = generate(model, inputs["image"], input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
    compare_ids(case, name, torch.cat([case.outputs[name][:, :1], tokens], dim=1), stop)


@reference("blip2/stage2_t5")
def test_t5(case: Case) -> None:
    model, processor = stage2(case, "t5")
    inputs, stop = case.inputs, case.config["token_ids"]["t5"]["eos"]
    assert processor.stop_token_id == stop
    assert processor.is_encoder_decoder
    questions, answers = case.spec["texts"]["text_input"], case.spec["texts"]["text_output"]
    queries, batch = case.config["qformer"]["num_query_tokens"], len(questions)

    made = processor.training_inputs(None, answers, prompt=questions, max_length=case.config["max_txt_len"])
    assert torch.equal(made["input_ids"][:, queries:], inputs["t5_input_ids"])
    assert torch.equal(made["attention_mask"][:, queries:], inputs["t5_attention_mask"])
    assert torch.equal(made["decoder_attention_mask"], inputs["t5_output_attention_mask"])
    case.compare("labels", made["labels"])
    case.compare("llm_attention_mask", made["attention_mask"])
    output = model(pixel_values=inputs["image"], **made)
    case.compare("loss", output.loss)
    case.compare("logits", output.logits)
    case.compare("query_output", output.qformer_outputs.last_hidden_state)
    case.compare("encoder_last_hidden_state", output.language_model_outputs.encoder_last_hidden_state)
    embeds = model._embed(
        made["input_ids"],
        model.image_token_mask(made["input_ids"]),
        model.soft_prompt(output.qformer_outputs.last_hidden_state),
    )
    case.compare("llm_inputs_embeds", embeds)
    output.loss.backward()
    compare_gradients(case, model, "t5")

    prefix = torch.full((batch, queries), processor.image_token_id)
    settings = case.config["generate"]
    assert torch.equal(processor(text=[case.config["prompt"]], return_tensors="pt")["input_ids"], inputs["prompt_ids"])
    ids = torch.cat([prefix, inputs["prompt_ids"].expand(batch, -1)], dim=1)
    for name, options, penalty in (
        ("generate_greedy", {}, 1.0),
        ("generate_beam3", {"num_beams": settings["num_beams"]}, 1.0),
        ("generate_beam3_lp0", {"num_beams": settings["num_beams"], "length_penalty": 0.0}, 0.0),
    ):
        tokens, scores = generate(
            model, inputs["image"], input_ids=ids, **limits(settings, settings["max_length"]), **options
        )
        compare_ids(case, f"{name}/ids", tokens, stop)
        if scores is not None:
            compare_scores(case, f"{name}/beam_scores", scores, tokens[:, 1:], stop, penalty)

    settings = case.config["predict_answers"]
    texts = [settings["prompt"].format(question) for question in questions]
    asked = processor(text=texts, return_tensors="pt")
    assert torch.equal(asked["input_ids"], inputs["vqa_input_ids"])
    tokens, scores = generate(
        model,
        inputs["image"],
        input_ids=torch.cat([prefix, asked["input_ids"]], dim=1),
        attention_mask=torch.cat([torch.ones_like(prefix), asked["attention_mask"]], dim=1),
        **limits(settings, settings["max_len"]),
        num_beams=settings["num_beams"],
        length_penalty=float(settings["length_penalty"]),
    )
    compare_ids(case, "predict_answers/ids", tokens, stop)
    compare_scores(case, "predict_answers/beam_scores", scores, tokens[:, 1:], stop, float(settings["length_penalty"]))
