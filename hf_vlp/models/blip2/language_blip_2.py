"""The language model behind the Q-Former: loading any, logits at supervised positions, checks of its labels."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_vlp.models.blip2.processing_blip_2 import Blip2Processor
from hf_vlp.models.catalog import saved_settings
from hf_vlp.models.generation_settings import drop_idle_settings
from hf_vlp.models.loading import load_backbone


class LabelError(ValueError):
    """Labels that would train the wrong thing: image tokens, padding, or tokens that the model never sees."""


def load_language_model(name: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """A causal or an encoder-decoder language model.

    Args:
        name: folder, Hub id, or the model itself.
        kwargs: for `from_pretrained` (`dtype`, `quantization_config`, ...).

    Raises:
        FileNotFoundError: a folder that holds no saved model.
        MissingWeightsError: the checkpoint lacks weights.
    """
    if not isinstance(name, str):
        return name
    saved_settings(name)  # raises for a folder that is none
    config = AutoConfig.from_pretrained(name)
    auto = AutoModelForCausalLM if is_decoder_only(config) else AutoModelForSeq2SeqLM
    return load_backbone(auto, name, **kwargs)


def prepare_language_model(language_model: PreTrainedModel, processor: Blip2Processor) -> None:
    """Tells a language model which token ends a caption, and makes room for the image token, in place.

    Raises:
        ValueError: its embeddings are not as wide as its hidden states, which the native format cannot say.
    """
    text_config = language_model.config.get_text_config()
    width = embedding_width(language_model)
    if width != text_config.hidden_size:
        raise ValueError(
            f"the embeddings of {type(language_model).__name__} are {width} wide, its hidden states "
            f"{text_config.hidden_size} (opt-350m is such a model); transformers' BLIP-2 needs both alike: use "
            "another language model"
        )
    drop_idle_settings(language_model.generation_config)
    for config in (text_config, language_model.generation_config):
        config.eos_token_id = processor.stop_token_id
        if config.pad_token_id is None:
            config.pad_token_id = processor.tokenizer.pad_token_id
    if processor.image_token_id >= language_model.get_input_embeddings().num_embeddings:
        _make_room(language_model, processor.image_token_id + 1)
        # The new row of the output head is untrained, and must not be written.
        language_model.generation_config.suppress_tokens = [processor.image_token_id]


@torch.no_grad()
def _make_room(language_model: PreTrainedModel, size: int) -> None:
    """Enlarges the vocabulary. New rows are the mean of the old ones, so that a new token is never the likeliest."""
    old = language_model.get_input_embeddings().num_embeddings
    language_model.resize_token_embeddings(size, mean_resizing=False)
    for module in (language_model.get_input_embeddings(), language_model.get_output_embeddings()):
        module.weight[old:] = module.weight[:old].float().mean(dim=0).to(module.weight.dtype)
        if getattr(module, "bias", None) is not None:
            module.bias[old:] = module.bias[:old].mean()


def is_decoder_only(config: PreTrainedConfig) -> bool:
    """Whether the native `Blip2Config` will take this for a causal language model."""
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def embedding_width(language_model: nn.Module) -> int:
    """Width of the language model's token embeddings, which is what the projected queries must have."""
    return language_model.get_input_embeddings().weight.shape[-1]


@contextmanager
def head_on_rows(language_model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, the output head of `language_model` sees only the positions `rows` (B, L) bool.

    Its logits then have shape (1, number of rows, vocabulary). What a model does before its head (T5's rescaling) and
    after (a soft cap, a scale) stays its own business, which is why the head is not simply called from here.
    """
    head = language_model.get_output_embeddings()

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *others = arguments
        return (states[rows][None], *others)

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def copies_a_prompt(language_model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Into how many sequences `generate` will copy each prompt (beams, or samples), 1 if it is not a plain search.

    Args:
        options: arguments of `generate`.
    """
    settings = options.get("generation_config") or language_model.generation_config

    def option(name: str) -> Any:
        return options[name] if name in options else getattr(settings, name, None)

    plain = option("use_cache") is not False and not any(
        option(name)
        for name in ("cache_implementation", "prompt_lookup_num_tokens", "penalty_alpha", "prefill_chunk_size")
    )
    peft = getattr(language_model, "active_peft_config", None)
    if peft is not None and peft.is_prompt_learning:
        return 1
    given = any(options.get(name) is not None for name in ("past_key_values", "assistant_model", "custom_generate"))
    if not plain or given or language_model._is_stateful or language_model.config.is_encoder_decoder:
        return 1
    return max(option("num_beams") or 1, option("num_return_sequences") or 1)


def read_prompt_once(
    language_model: PreTrainedModel, inputs_embeds: Tensor, attention_mask: Tensor, copies: int
) -> DynamicCache:
    """Keys and values of all prompt tokens but the last, read once a prompt and then copied for its beams.

    `generate` by itself copies the prompt first and reads each copy, although the copies are alike up to here.

    Args:
        inputs_embeds: (B, L, width).
        attention_mask: (B, L).
        copies: sequences that each prompt becomes.

    Returns:
        A cache of B x `copies` sequences of L - 1 tokens.
    """
    cache = DynamicCache(config=language_model.config)
    inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds[:, :-1], "attention_mask": attention_mask[:, :-1]}
    unwrapped = language_model.get_base_model() if hasattr(language_model, "active_peft_config") else language_model
    if "position_ids" in inspect.signature(unwrapped.forward).parameters:
        positions = (attention_mask.long().cumsum(dim=-1) - 1).masked_fill(attention_mask == 0, 0)
        inputs["position_ids"] = positions[:, :-1]
    with head_on_rows(language_model, torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)):
        language_model(**inputs, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(copies)
    return cache


def shifted(labels: Tensor) -> Tensor:
    """Labels of next-token prediction: position t holds the token that t predicts, -100 at the end."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), -100)], dim=1)


def check_labels(
    labels: Tensor, *, image_mask: Tensor | None, attention_mask: Tensor | None, pad_token_id: int | None
) -> None:
    """Refuses labels that count image tokens or padding.

    Args:
        labels: (B, L), -100 where nothing is to be learnt.
        image_mask: (B, L) bool, True at image tokens; `None` for a decoder of its own.
        attention_mask: (B, L), 0 at padding; `None` if not known.
        pad_token_id: the padding token, unless it doubles as a token that is meant to be learnt (end of text).

    Raises:
        LabelError: a supervised position is an image token or padding; the message counts them.
    """
    supervised = labels != -100
    if image_mask is not None and bool((supervised & image_mask).any()):
        raise LabelError(
            f"{int((supervised & image_mask).sum())} labels stand on image tokens, which the model does not "
            "predict; set them to -100, or build the batch with Blip2Processor.training_inputs"
        )
    padding = torch.zeros_like(supervised)
    if attention_mask is not None:
        padding = attention_mask == 0
    if pad_token_id is not None:
        padding = padding | (labels == pad_token_id)
    wrong = supervised & padding
    if bool(wrong.any()):
        raise LabelError(
            f"{int(wrong.sum())} labels count PAD tokens in the loss; set them to -100 (labels[attention_mask == "
            "0] = -100), or build the batch with Blip2Processor.training_inputs"
        )


def pad_token_of(config: PreTrainedConfig) -> int | None:
    """The padding token of a language model, `None` where it doubles as its begin or end token."""
    config = config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    ends = getattr(config, "eos_token_id", None)
    ends = ends if isinstance(ends, list | tuple) else [ends]
    return None if pad in [*ends, getattr(config, "bos_token_id", None)] else pad
