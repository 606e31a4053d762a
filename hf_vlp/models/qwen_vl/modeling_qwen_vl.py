"""Qwen-VL (Bai et al. 2023, arXiv 2308.12966): image features between `<img>` and `</img>` in a text.

Computes what the authors' code computes (the remote code of Qwen/Qwen-VL-Chat) with the same weights; the language
model is any causal one of transformers. `labels -> loss` is the loss of all three training stages (section 3).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_qwen_vl import QwenVLConfig
from .modeling_qwen_vl_visual import QwenVLResampler, QwenVLVisionTower, sine_table

IGNORED = -100


class ImageSpanError(ValueError):
    """The places for images in `input_ids` and the images given do not fit."""


@dataclass
class QwenVLCausalLMOutput(ModelOutput):
    """Output of `QwenVLForConditionalGeneration`.

    Args:
        loss: mean over the supervised tokens of all processes.
        logits: (B, L, V); in training, with labels, not returned.
        past_key_values: the cache.
        hidden_states: of the language model, if asked for; the first are the inputs with the image features in place.
        attentions: of the language model, if asked for.
        image_features: (images, queries, D).
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_features: Tensor | None = None


class QwenVLPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and capabilities."""

    config: QwenVLConfig
    base_model_prefix = "qwen_vl"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["QwenVLVisionLayer", "QwenVLResampler"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QwenVLVisionTower):
            init.normal_(module.position_embedding, std=module.config.hidden_size**-0.5)
        elif isinstance(module, QwenVLResampler):
            init.trunc_normal_(module.query, std=module.config.initializer_range)
            table = sine_table(module.config.output_dim, math.isqrt(module.config.num_query_tokens))
            init.copy_(module.position_table, table)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a parameter that the checkpoint lacks is an error, not a random value.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            allow_missing (`bool`): initialise parameters that the checkpoint lacks at random.
            args, kwargs: see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: the checkpoint lacks parameters of this class.
        """
        allowed = kwargs.pop("allow_missing", False)
        with_information = kwargs.pop("output_loading_info", False)
        model, information = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        missing = sorted(information["missing_keys"])
        if missing and not allowed:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} is no whole {cls.__name__}: it lacks {shown}. Pass "
                "allow_missing=True to start these at random"
            )
        return (model, information) if with_information else model


class QwenVLForConditionalGeneration(QwenVLPreTrainedModel, GenerationMixin):
    """Text from images, text and boxes."""

    _auto_class = "AutoModelForImageTextToText"
    # Section 3 and figure 3 of the paper. Path -> does it train?
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "pretrain": {"": True, "language_model": False},
        "multitask": {"": True},
        # The paper freezes the visual encoder; the authors' `--fix_vit` also freezes what stands behind the attention
        # of the resampler. Differs from the original: that switch makes the fixed position table trainable.
        "sft": {"": True, "vision_model": False, "resampler.post_layernorm": False, "resampler.projection": False},
    }
    # The loss is a mean over the supervised tokens of all processes; `Trainer` divides it by the accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: QwenVLConfig) -> None:
        super().__init__(config)
        if config.vision_config._attn_implementation is None:
            # transformers asks parts that are models of their own only.
            config.vision_config._attn_implementation = config._attn_implementation
        self.vision_model = QwenVLVisionTower(config.vision_config)
        self.resampler = QwenVLResampler(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        # Of the prompt that is being continued, see `long_context`.
        self._prompt_alpha = 1.0
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def frozen_parts(self) -> dict[str, nn.Module]:
        """Tower and language model, while none of their weights (or adapters) train: they stay in eval mode."""
        parts = {"vision_model": self.vision_model, "language_model": self.language_model}
        return {name: part for name, part in parts.items() if not trains(part)}

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for part in self.frozen_parts().values():
            part.eval()
        return self

    def tower_states(self, pixel_values: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch states (images, patches, hidden) and the grid of patches; without autograd if the tower is frozen."""
        frozen = not trains(self.vision_model)
        with torch.no_grad() if frozen else nullcontext():
            return self.vision_model(pixel_values)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(images, 3, H, W), of any size, to (images, queries, D): what stands in the text for them."""
        return self.resampler(*self.tower_states(pixel_values))

    def image_mask(self, input_ids: Tensor, images: int) -> Tensor:
        """(B, L) bool, True strictly between `<img>` and `</img>`.

        Args:
            input_ids: (B, L); whatever ids stand between the two are not read.
            images: number of images given, over all rows.

        Raises:
            ImageSpanError: a marker without its partner, a span that is not `num_query_tokens` long, or another
                number of spans than images; the message names the row.
        """
        starts, ends = input_ids == self.config.image_start_token_id, input_ids == self.config.image_end_token_id
        first, last = starts.nonzero(), ends.nonzero()
        odd = (starts.sum(dim=1) != ends.sum(dim=1)).nonzero().flatten().tolist()
        if odd:
            raise ImageSpanError(f"rows {odd} of input_ids have an <img> without its </img>, or the reverse")
        length = self.config.vision_config.num_query_tokens
        wrong = ((first[:, 0] != last[:, 0]) | (last[:, 1] - first[:, 1] - 1 != length)).nonzero().flatten()
        if len(wrong):
            row, column = first[wrong[0]].tolist()
            raise ImageSpanError(
                f"row {row} of input_ids: after the <img> at position {column} its </img> must follow {length} tokens "
                "later, one for each query of the image; make the inputs with QwenVLProcessor"
            )
        if len(first) != images:
            per_row = starts.sum(dim=1).tolist()
            raise ImageSpanError(
                f"{images} images were given, but input_ids have places for {len(first)} ({per_row} by row): pass "
                "pixel_values of exactly the images in the text, in reading order"
            )
        return ((starts.int().cumsum(dim=1) - ends.int().cumsum(dim=1)) > 0) & ~starts

    def embed(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, image_features: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Word embeddings (B, L, D) with image features in place; and the features (images, queries, D).

        Args:
            input_ids: (B, L).
            pixel_values: (images, 3, H, W) of all rows in reading order, or `image_features`, what they gave before.
        """
        if image_features is None and pixel_values is not None:
            image_features = self.get_image_features(pixel_values)
        mask = self.image_mask(input_ids, 0 if image_features is None else len(image_features))
        embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        if image_features is not None:
            return embeds.masked_scatter(mask[..., None], image_features.to(embeds.dtype)), image_features
        if self.training and (trains(self.vision_model) or trains(self.resampler)):
            # Every process must have a gradient for the same parameters, also one without an image.
            side = self.config.vision_config.patch_size
            blank = embeds.new_zeros(1, 3, side, side)
            embeds = embeds + 0.0 * self.get_image_features(blank).sum()
        return embeds, None

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        image_features: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QwenVLCausalLMOutput | tuple[Any, ...]:
        """Language modelling on interleaved images and text.

        Args:
            input_ids: (B, L), `num_query_tokens` ids between each `<img>` and `</img>`, as `QwenVLProcessor` gives.
            pixel_values: (images, 3, H, W) of all rows in reading order; or `image_features` (images, queries, D).
            attention_mask: (B, L), 0 at padding.
            position_ids: (B, L); by default 0, 1, 2, ... (restarting with each sequence of a packed row).
            labels: (B, L), -100 where nothing is to be learnt.
            sequence_ids: (B, L) of packed rows: 1, 2, 3, ... for the conversations of a row, 0 at padding. Tokens see
                their own conversation only.
            kwargs: for the language model.

        Raises:
            ImageSpanError: see `image_mask`.
            ValueError: neither or both of `input_ids` and `inputs_embeds`; labels that are all ignored, name image
                places, or do not have the shape of `input_ids`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is None:
            self._check_labels(input_ids, labels)
            if past and pixel_values is None and image_features is None:
                # An <img> that the model wrote itself is no place for an image.
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds, image_features = self.embed(input_ids, pixel_values, image_features)
        elif labels is not None and labels.shape != inputs_embeds.shape[:2]:
            raise ValueError(f"labels are {tuple(labels.shape)} for inputs of {tuple(inputs_embeds.shape[:2])}")
        if sequence_ids is not None:
            if position_ids is None:
                position_ids = restarting_positions(sequence_ids)
            attention_mask = self._packed_mask(sequence_ids, inputs_embeds)

        supervised_only = self.training and labels is not None
        targets = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        rows = None if targets is None else targets != IGNORED
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            kwargs["logits_to_keep"] = logits_to_keep
        scaling = self.long_context(inputs_embeds.shape[1], past, position_ids)
        with scaling, head_on_rows(self.language_model, rows) if supervised_only else nullcontext():
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=False if supervised_only else use_cache,
                return_dict=True,
                **kwargs,
            )
        loss = None
        if targets is not None:
            if not supervised_only and outputs.logits.shape[1] != targets.shape[1]:
                raise ValueError("labels need all logits: leave out logits_to_keep")
            logits = outputs.logits[0] if supervised_only else outputs.logits[rows]
            loss = token_loss(logits, targets[rows])
        output = QwenVLCausalLMOutput(
            loss=loss,
            logits=None if supervised_only else outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_features=image_features,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def _check_labels(self, input_ids: Tensor, labels: Tensor | None) -> None:
        if labels is None:
            return
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels are {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}; they go together")
        pads = (labels == self.config.image_token_id) & (labels != IGNORED)
        if bool(pads.any()):
            raise ValueError(
                f"{int(pads.sum())} labels stand at image places, which the model does not predict; set them to -100, "
                "or make the batch with QwenVLProcessor"
            )

    def _packed_mask(self, sequence_ids: Tensor, inputs_embeds: Tensor) -> Tensor | None:
        """(B, 1, L, L) additive mask: causal, and inside one conversation. None where positions say it (flash)."""
        implementation = self.language_model.config._attn_implementation
        if "flash" in implementation:
            if len(sequence_ids) > 1 or bool((sequence_ids == 0).any()):
                raise ValueError("with flash attention pack into one row without padding (batch size 1)")
            return None
        return packed_mask(sequence_ids, inputs_embeds.dtype)

    @contextmanager
    def long_context(self, length: int, past: int, position_ids: Tensor | None) -> Iterator[None]:
        """Inside, the language model reads beyond the length that it was trained with, as Qwen does.

        In eval mode, for prompts longer than `config.seq_length`: the base of the rotary positions grows with the
        length of the prompt (dynamic NTK), and stays as it is while the prompt is continued; queries at positions
        beyond `seq_length` are multiplied by the logarithm of their position to the base `seq_length`.

        Args:
            length: tokens of this call.
            past: tokens in the cache.
            position_ids: (B, length) or (length,), or None for `past`, `past` + 1, ...

        Raises:
            ValueError: the language model has no rotary positions or no `q_proj` layers; the message says which
                setting to turn off.
        """
        trained = self.config.seq_length
        if trained is None or self.training:
            yield
            return
        total = past + length
        if not past:
            self._prompt_alpha = max(2.0 ** math.ceil(math.log2(total / trained) + 1) - 1.0, 1.0)
        handles, buffers = [], []
        try:
            if self.config.use_dynamic_ntk and self._prompt_alpha > 1.0:
                rotary = [m for m in self.language_model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
                if not rotary:
                    raise ValueError("this language model has no rotary positions to stretch: use_dynamic_ntk=False")
                for module in rotary:
                    buffers.append((module, module.inv_freq))
                    half = len(module.inv_freq)
                    steps = torch.arange(half, device=module.inv_freq.device) * 2.0 / (2 * half - 2)
                    module.inv_freq = module.inv_freq * (self._prompt_alpha**-steps).to(module.inv_freq.dtype)
            if self.config.use_logn_attn and total > trained:
                layers = [m for n, m in self.language_model.named_modules() if n.endswith(".q_proj")]
                if not layers:
                    raise ValueError("this language model has no q_proj layers to scale: use_logn_attn=False")
                positions = position_ids
                if positions is None:
                    positions = torch.arange(past, total, device=self.device)
                factor = ((positions + 1).float().log() / math.log(trained)).clamp(min=1.0)
                factor = factor.reshape(-1, length, 1)

                def scale(module: nn.Module, inputs: Any, queries: Tensor) -> Tensor:
                    return queries * factor.to(queries)

                handles = [layer.register_forward_hook(scale) for layer in layers]
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, buffer in buffers:
                module.inv_freq = buffer

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues prompts, left-padded if of unequal length; an image is encoded once, however many beams.

        Args:
            input_ids: (B, L), from `QwenVLProcessor`.
            pixel_values: (images, 3, H, W), or `image_features`.
            kwargs: as of `generate` in transformers (`attention_mask`, `max_new_tokens`, `streamer`, ...).

        Returns:
            As in transformers: ids (B, L + new) that start with `input_ids`.
        """
        if input_ids is not None and (pixel_values is not None or image_features is not None):
            kwargs["inputs_embeds"], _ = self.embed(input_ids, pixel_values, image_features)
        if input_ids is not None:
            kwargs["input_ids"] = input_ids
        return super().generate(**kwargs)


def trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@contextmanager
def head_on_rows(language_model: nn.Module, rows: Tensor) -> Iterator[None]:
    """Inside, the output head sees only the positions `rows` (B, L) bool: its logits are (1, rows, V)."""
    head = language_model.get_output_embeddings()

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][rows][None], *arguments[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of logits (S, V) and tokens (S,), mean over the tokens of all processes.

    On N processes the value is such that its mean over them, and the mean of its gradients, is that of one process
    with all tokens.

    Raises:
        ValueError: there is no token on any process.
    """
    count = torch.tensor(len(targets), device=logits.device)
    world = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    if int(count) == 0:
        raise ValueError(
            "all labels are -100: nothing would be learnt; check the texts and that max_length leaves room"
        )
    return F.cross_entropy(logits.float(), targets, reduction="sum") * (world / int(count))


def packed_mask(sequence_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) ids of the sequences in packed rows to the additive mask (B, 1, L, L) that keeps them apart."""
    length = sequence_ids.shape[1]
    same = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=sequence_ids.device).tril()
    # Padding sees padding, so that no row of the softmax is empty; nothing else sees it.
    seen = (same & causal)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def restarting_positions(sequence_ids: Tensor) -> Tensor:
    """(B, L) positions that begin at 0 where the sequence changes."""
    index = torch.arange(sequence_ids.shape[1], device=sequence_ids.device).expand_as(sequence_ids)
    change = torch.ones_like(sequence_ids, dtype=torch.bool)
    change[:, 1:] = sequence_ids[:, 1:] != sequence_ids[:, :-1]
    return index - index.masked_fill(~change, 0).cummax(dim=1).values


__all__ = ["ImageSpanError", "QwenVLForConditionalGeneration", "QwenVLPreTrainedModel"]
