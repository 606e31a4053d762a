"""CogVLM, "Visual Expert for Pretrained Language Models" (Wang et al. 2023, arXiv 2311.03079), and CogVLM2.

The language model is transformers' own and stays as it is: text alone runs through its own forward. Image tokens have
matrices of their own in every layer, see `modeling_cogvlm_experts`.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_cogvlm import LANGUAGE_MODEL_TYPES, CogVLMConfig, CogVLMVisionConfig
from .modeling_cogvlm_experts import CogVLMVisualExpert, ImageTokenError, Route, block_mask, sliding_window_of
from .modeling_cogvlm_vision import CogVLMProjector, CogVLMVisionModel

_IGNORED = -100


@dataclass
class CogVLMOutput(ModelOutput):
    """Output of `CogVLMForConditionalGeneration`.

    Args:
        loss: mean over the supervised tokens, with `labels`.
        logits: (B, L, vocabulary), or of the last `logits_to_keep` positions; zero at padding in front of images'
            rows. None with `labels`: they are made at supervised positions only.
        past_key_values: of all tokens so far.
        hidden_states: (B, L, D) each, on request: the embeddings, each layer's output, the last after the final norm.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class CogVLMPreTrainedModel(PreTrainedModel):
    config_class = CogVLMConfig
    base_model_prefix = "cogvlm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CogVLMVisionLayer", "CogVLMVisualExpert"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CogVLMProjector):
            init.zeros_(module.begin)
            init.zeros_(module.end)


class CogVLMForConditionalGeneration(CogVLMPreTrainedModel, GenerationMixin):
    """A language model with a visual expert in every layer, behind EVA2-CLIP and an adapter.

    Role "captioning", "vqa" and "chat". Submodules: `vision_model`, `projector`, `language_model` (as transformers
    has it), `visual_experts` (one a layer).
    """

    _auto_class = "AutoModelForImageTextToText"
    # Trained parts by stage; the language model never learns, so that its texts stay its own.
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "stage1": {"": False, "visual_experts": True, "projector": True},
        "stage2": {"": False, "visual_experts": True, "projector": True},
        "sft": {"": False, "visual_experts": True, "projector": True, "vision_model": True},
    }

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.vision_model = CogVLMVisionModel(config.vision_config)
        self.projector = CogVLMProjector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.visual_experts = nn.ModuleList(
            CogVLMVisualExpert(layer, config.visual_expert_qkv_bias) for layer in self.language_model.model.layers
        )
        # As a language model has it: adapters find their targets by its type.
        self.visual_experts.config = config.text_config
        self.post_init()

    @classmethod
    def from_language_pretrained(
        cls,
        language_model: str | PathLike[str] | PreTrainedModel,
        *,
        vision_config: CogVLMVisionConfig | dict[str, Any] | None = None,
        image_token_id: int | None = None,
        downsample: int = 1,
        visual_expert_qkv_bias: bool = False,
        projector_hidden_size: int | None = None,
        **kwargs: Any,
    ) -> "CogVLMForConditionalGeneration":
        """Gives a language model visual experts, which start as copies of its own matrices (section 2.1).

        The vision encoder and the adapter are new: see `hf_vlp.models.cogvlm.conversion_cogvlm` for published ones.

        Args:
            language_model: folder, Hub id or model of one of `LANGUAGE_MODEL_TYPES`; a model is taken over, not
                copied.
            vision_config: of the image encoder; the published one by default.
            image_token_id: of the processor that will be used.
            downsample, visual_expert_qkv_bias, projector_hidden_size: see `CogVLMConfig`.
            kwargs: of `AutoModelForCausalLM.from_pretrained` (`dtype`, ...).

        Raises:
            ValueError: the language model is of another type, its checkpoint lacks weights, or features do not cover
                an image.
        """
        source = None
        missing: list[str] = []
        if not isinstance(language_model, PreTrainedModel):
            kwargs.setdefault("dtype", torch.float32)
            source = language_model
            language_model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **kwargs)
            missing = sorted(info["missing_keys"])
        text_config = language_model.config
        if text_config.model_type not in LANGUAGE_MODEL_TYPES or not hasattr(language_model, "lm_head"):
            raise ValueError(
                f"{type(language_model).__name__} (type {text_config.model_type!r}) can't be given visual experts: "
                f"its layers must be Llama's, as in a causal language model of the types {list(LANGUAGE_MODEL_TYPES)}"
            )
        if missing:
            # transformers draws them at random and logs it; the experts would be copies of noise.
            shown = ", ".join(missing[:6]) + (f", … ({len(missing)} in all)" if len(missing) > 6 else "")
            raise ValueError(
                f"{source} lacks weights of {type(language_model).__name__}: {shown}. They would stay random; check "
                "that it is a whole checkpoint, and of this kind of model"
            )
        if isinstance(vision_config, CogVLMVisionConfig):
            vision_config = vision_config.to_dict()
        config = cls.config_class(
            vision_config=vision_config,
            text_config=text_config.to_dict(),
            image_token_id=image_token_id,
            downsample=downsample,
            visual_expert_qkv_bias=visual_expert_qkv_bias,
            projector_hidden_size=projector_hidden_size,
        )
        config.check_image_size(config.vision_config.image_size)
        # Shapes are all that the second language model is made for.
        with torch.device("meta"):
            shell = cls(config)
        model = shell.to_empty(device=language_model.device)
        model.language_model = language_model
        model.vision_model.apply(model.vision_model._init_weights)
        model.projector.apply(model._init_weights)
        for expert, layer in zip(model.visual_experts, language_model.model.layers, strict=True):
            expert.copy_language(layer)
        model.config.text_config = language_model.config
        model.generation_config = language_model.generation_config
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_output_embeddings(value)

    def resize_images(self, image_size: int) -> None:
        """Goes over to images of another size; the processor has to be made for it as well.

        Args:
            image_size: side in pixels.

        Raises:
            ValueError: no multiple of the patch size (times `downsample`).
        """
        self.config.check_image_size(image_size)
        self.vision_model.resize_images(image_size)
        self.config.vision_config.image_size = image_size

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, H, W) to the tower's states (I, 1 + patches, vision width): what `image_embeds` stands for."""
        return self.vision_model(pixel_values)

    def get_image_features(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """What the language model reads of images: (I, K, D), begin and end included.

        Args:
            pixel_values: (I, 3, H, W).
            image_embeds: the tower's states instead, see `encode_images`.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("give either pixel_values or image_embeds, not both")
        return self.projector(self.encode_images(pixel_values) if image_embeds is None else image_embeds)

    def token_types(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """(B, L), 1 at image tokens: as given, or the places of `config.image_token_id`."""
        if token_type_ids is not None:
            return token_type_ids
        if self.config.image_token_id is None:
            raise ImageTokenError(
                "where the image tokens are is not known: pass token_type_ids (1 at image tokens) or set "
                "config.image_token_id"
            )
        return (input_ids == self.config.image_token_id).long()

    def route(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Route:
        """Which expert each token goes through, and where the images are; arguments as of `forward`."""
        if sequence_ids is not None:
            tokens = sequence_ids > 0
        elif attention_mask is not None and attention_mask.ndim == 2:
            tokens = attention_mask[:, -input_ids.shape[1] :] != 0
        else:
            tokens = torch.ones_like(input_ids, dtype=torch.bool)
        return Route.of(self.token_types(input_ids, token_type_ids), tokens, self.config.num_image_tokens)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        image_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> CogVLMOutput | tuple[Any, ...]:
        """Reads texts with any number of images, in the order of their tokens.

        Args:
            input_ids: (B, L).
            pixel_values: (I, 3, H, W), the images of all rows one after another.
            attention_mask: (B, L), with a cache (B, past + L); 0 at padding.
            token_type_ids: (B, L), 1 at image tokens; by default the places of `config.image_token_id`.
            position_ids: (B, L); by default those of the original, see `Route.positions`. Ignored with
                `sequence_ids`.
            past_key_values: of earlier tokens.
            labels: (B, L) token ids, -100 where nothing is to be learnt; position t is predicted by t - 1.
            sequence_ids: (B, L) of packed rows: 1, 2, ... a conversation, 0 at padding. Conversations do not see each
                other.
            image_embeds: (I, 1 + patches, vision width) instead of `pixel_values`.
            use_cache: give `past_key_values` back.
            output_hidden_states: give `hidden_states` back.
            logits_to_keep: make logits for the last positions only; 0 for all.
            return_dict: a `CogVLMOutput` rather than a tuple.

        Raises:
            ImageTokenError: image tokens and images do not fit.
            ValueError: `labels` that supervise nothing, image tokens or padding.
        """
        if input_ids is None or input_ids.ndim != 2:
            raise ValueError("input_ids (B, L) are missing")
        if pixel_values is None and image_embeds is None:
            self._refuse_lonely_tokens(input_ids, token_type_ids)
            output = self._read_text(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                sequence_ids=sequence_ids,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                logits_to_keep=logits_to_keep,
            )
        else:
            features = self.get_image_features(pixel_values, image_embeds)
            output = self._read_images(
                input_ids,
                features,
                self.token_types(input_ids, token_type_ids),
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                sequence_ids=sequence_ids,
                use_cache=use_cache,
                output_hidden_states=output_hidden_states,
                logits_to_keep=logits_to_keep,
            )
        return output.to_tuple() if return_dict is False else output

    def _refuse_lonely_tokens(self, input_ids: Tensor, token_type_ids: Tensor | None) -> None:
        if input_ids.shape[1] == 1:
            # A step of generation: looking would cost a synchronization a token.
            return
        # The padding token may stand for image tokens (published checkpoints): then only types tell.
        known = self.config.image_token_id is not None and self.config.image_token_id != self._pad_token_id
        if token_type_ids is not None:
            found = int((token_type_ids == 1).sum())
        else:
            found = int((input_ids == self.config.image_token_id).sum()) if known else 0
        if found:
            raise ImageTokenError(f"the texts have {found} image tokens, but no pixel_values (or image_embeds) came")

    @property
    def _pad_token_id(self) -> int | None:
        return self.config.text_config.pad_token_id

    def _read_text(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        sequence_ids: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        logits_to_keep: int,
    ) -> CogVLMOutput:
        """Text alone: the language model's own forward, bit for bit."""
        tokens = None
        if sequence_ids is not None:
            route = Route.of(torch.zeros_like(input_ids), sequence_ids > 0, self.config.num_image_tokens)
            position_ids, tokens = route.positions(sequence_ids), route.tokens
            attention_mask = self._mask(tokens, None, sequence_ids, 0, None, blocks=True)
        options: dict[str, Any] = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
        }
        options = {name: value for name, value in options.items() if value is not None}
        if labels is None:
            out = self.language_model(input_ids, logits_to_keep=logits_to_keep, **options)
            return CogVLMOutput(None, out.logits, out.past_key_values, out.hidden_states)
        out = self.language_model.model(input_ids, **options)
        if tokens is None and attention_mask is not None and attention_mask.ndim == 2:
            tokens = attention_mask[:, -input_ids.shape[1] :] != 0
        _check_labels(labels, input_ids, tokens, None)
        predicted = labels[:, 1:] != _IGNORED
        loss = self._loss(out.last_hidden_state[:, :-1][predicted], labels[:, 1:][predicted], images=False)
        return CogVLMOutput(loss, None, out.past_key_values, out.hidden_states)

    def _read_images(
        self,
        input_ids: Tensor,
        features: Tensor,
        token_types: Tensor,
        *,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        labels: Tensor | None,
        sequence_ids: Tensor | None,
        use_cache: bool | None,
        output_hidden_states: bool | None,
        logits_to_keep: int,
    ) -> CogVLMOutput:
        length = input_ids.shape[1]
        padded = attention_mask is not None and attention_mask.ndim == 2 and sequence_ids is None
        route = self.route(input_ids, token_types, attention_mask, sequence_ids)
        tokens = route.tokens
        if len(route.images) != len(features):
            raise ImageTokenError(
                f"the texts have the tokens of {len(route.images)} images, but {len(features)} images came; rows with "
                f"images: {sorted(set((route.images[:, 0] // length).tolist()))}"
            )
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None or sequence_ids is not None:
            if past:
                raise ValueError("an image behind cached tokens needs position_ids; `generate` makes them")
            position_ids = route.positions(sequence_ids)
        model = self.language_model.model
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.text_config)
        keys_mask = attention_mask != 0 if padded else None
        given = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None

        states = self._embed(input_ids, features, route)
        rotary = model.rotary_emb(states[None], position_ids)
        masks: dict[int | None, Tensor | None] = {}
        seen: list[Tensor] = []
        for expert, layer in zip(self.visual_experts, model.layers, strict=True):
            window = sliding_window_of(layer.self_attn)
            if window not in masks:
                masks[window] = self._mask(tokens, keys_mask, sequence_ids, past, window) if given is None else given
            if output_hidden_states:
                seen.append(self._on_grid(states, route))
            states = expert(states, layer, route, rotary, masks[window], past_key_values=past_key_values)
        output = CogVLMOutput(past_key_values=past_key_values if use_cache else None)
        if labels is not None:
            _check_labels(labels, input_ids, tokens, token_types)
            if output_hidden_states:
                states = model.norm(states)
                seen.append(self._on_grid(states, route))
            ahead = torch.full_like(labels, _IGNORED)
            ahead[:, :-1] = labels[:, 1:]
            at = (ahead.flatten() != _IGNORED).nonzero()[:, 0]
            rows = states.index_select(0, route.place[at])
            rows = rows if output_hidden_states else model.norm(rows)
            output.loss = self._loss(rows, ahead.flatten()[at], images=True)
        else:
            states = self._on_grid(model.norm(states), route)
            seen.append(states)
            output.logits = self.language_model.lm_head(states[:, -logits_to_keep:] if logits_to_keep else states)
        if output_hidden_states:
            output.hidden_states = tuple(seen)
        return output

    def _embed(self, input_ids: Tensor, features: Tensor, route: Route) -> Tensor:
        """(N, D) inputs of the first layer in the order of `route`; image tokens are not looked up."""
        flat = features.flatten(0, 1)
        source = torch.full_like(route.place, -1)
        at = route.images.flatten()
        source[at] = torch.arange(len(at), device=at.device)
        texts = (route.tokens.flatten() & (source < 0)).nonzero()[:, 0]
        source[texts] = torch.arange(len(at), len(at) + len(texts), device=at.device)
        words = self.get_input_embeddings()(input_ids.flatten()[texts])
        return torch.cat([flat.to(words.dtype), words]).index_select(0, source[route.order])

    @staticmethod
    def _on_grid(states: Tensor, route: Route) -> Tensor:
        return route.to_grid(states) * route.tokens[..., None].to(states.dtype)

    def _mask(
        self,
        tokens: Tensor,
        keys_mask: Tensor | None,
        sequence_ids: Tensor | None,
        past: int,
        window: int | None,
        blocks: bool = False,
    ) -> Tensor | None:
        kind = self.config.text_config._attn_implementation or "eager"
        if kind.startswith("flash"):
            if sequence_ids is not None:
                raise ValueError("packed batches need attn_implementation 'sdpa' or 'eager'")
            return None if keys_mask is None or bool(keys_mask.all()) else keys_mask
        eager = self.dtype if kind == "eager" else None
        if blocks:
            window = getattr(self.config.text_config, "sliding_window", None)
        return block_mask(tokens, sequence_ids, past, keys_mask, window, eager)

    def _loss(self, rows: Tensor, targets: Tensor, images: bool) -> Tensor:
        """Mean cross-entropy of the supervised positions (S, D); on several processes each its own.

        Args:
            rows: normed states.
            targets: (S,).
            images: whether the batch has any.
        """
        if len(targets) == 0:
            if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
                raise ValueError("all labels are -100: nothing would be learnt; check the length limit and the masks")
            loss = self.language_model.lm_head(rows).float().sum()
        else:
            loss = F.cross_entropy(self.language_model.lm_head(rows).float(), targets)
        if torch.is_grad_enabled() and not images:
            # What a batch without images leaves out needs a gradient all the same: other ranks wait for it.
            parts = (self.projector, self.visual_experts, self.vision_model)
            idle = [p for part in parts for p in part.parameters() if p.requires_grad]
            loss = loss + sum((0.0 * p.flatten()[0] for p in idle), loss.new_zeros(()))
        return loss

    # Generation

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers, from `input_ids` with image tokens and `pixel_values` (or `image_embeds`).

        Prompts of several lengths are padded on the left. What comes back begins with the prompt as it was given.
        """
        ids = kwargs.pop("input_ids", inputs) if inputs is None else inputs
        given = ids
        images = kwargs.get("pixel_values") is not None or kwargs.get("image_embeds") is not None
        if ids is not None and images:
            kwargs["token_type_ids"] = self.token_types(ids, kwargs.get("token_type_ids"))
            if kwargs.get("pixel_values") is not None:
                # Once an image, however many beams will read it.
                with torch.no_grad():
                    kwargs["image_embeds"] = self.encode_images(kwargs.pop("pixel_values"))
            found = int((kwargs["token_type_ids"] == 1).sum())
            count = len(kwargs["image_embeds"])
            if found != count * self.config.num_image_tokens:
                raise ImageTokenError(
                    f"the prompts have {found} image tokens, but {count} images came, which take "
                    f"{self.config.num_image_tokens} each"
                )
            # Image tokens may lie beyond the vocabulary, and logits processors look up the prompt among the logits.
            beyond = (ids >= self.config.text_config.vocab_size) & (kwargs["token_type_ids"] == 1)
            ids = ids.masked_fill(beyond, self._pad_token_id or 0)
        elif ids is not None:
            self._refuse_lonely_tokens(ids, kwargs.pop("token_type_ids", None))
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not bool(mask[:, -1].all()):
            raise ValueError("generate continues each row at its end: pad prompts on the left (padding_side='left')")
        made = super().generate(ids, **kwargs)
        if given is not ids:
            sequences = made if isinstance(made, Tensor) else made.sequences
            sequences[:, : given.shape[1]] = given.repeat_interleave(len(sequences) // len(given), dim=0)
        return made

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The parent's inputs; what belongs to the images goes in once, with the prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("pixel_values", "image_embeds", "token_type_ids"):
                inputs.pop(name, None)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        types = model_kwargs.get("token_type_ids")
        if types is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        mask = model_kwargs.get("attention_mask")
        tokens = torch.ones_like(types, dtype=torch.bool) if mask is None else mask != 0
        return Route.of(types, tokens, self.config.num_image_tokens).positions()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """The parent's copies of rows; a row's images are copied as a whole, in their order."""
        types, images = kwargs.get("token_type_ids"), kwargs.pop("image_embeds", None)
        if images is not None and expand_size > 1:
            counts = (types == 1).sum(dim=1).div(self.config.num_image_tokens, rounding_mode="floor").tolist()
            numbers = torch.arange(len(images), device=images.device).split(counts)
            images = images[torch.cat([row for row in numbers for _ in range(expand_size)])]
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs if images is None else {**kwargs, "image_embeds": images}

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], is_encoder_decoder: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        types = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, **kwargs
        )
        if types is not None:
            # What is written is text, also right behind an image.
            new = kwargs.get("num_new_tokens", 1)
            model_kwargs["token_type_ids"] = torch.cat([types, types.new_zeros(len(types), new)], dim=1)
        return model_kwargs


def _check_labels(labels: Tensor, input_ids: Tensor, tokens: Tensor | None, token_types: Tensor | None) -> None:
    """Refuses labels on padding or image tokens, which would teach what can't be meant.

    Args:
        tokens: (B, L) bool, False at padding.
        token_types: (B, L), 1 at image tokens.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels are {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}")
    for name, wrong in (
        ("padding", None if tokens is None else ~tokens),
        ("image tokens", None if token_types is None else token_types == 1),
    ):
        count = 0 if wrong is None else int(((labels != _IGNORED) & wrong).sum())
        if count:
            raise ValueError(f"{count} labels stand on {name}; set them to -100, as the package's collators do")


__all__ = ["CogVLMForConditionalGeneration", "CogVLMPreTrainedModel", "ImageTokenError"]
