"""LLaVA 1, 1.5 and NeXT in exactly the format of transformers' `llava` and `llava_next` types.

Both classes subclass the one of the same name in transformers: parameters, config and saved folder are the native
ones. They add packed batches, a loss that is computed at supervised positions only and is exact over ranks, frozen
parts that stay frozen, and errors where the native classes go on silently with a wrong result.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextCausalLMOutputWithPast,
    LlavaNextModel,
    LlavaNextPreTrainedModel,
)
from transformers.utils import ModelOutput

from hf_vlp.models.blip2.backbone_blip_2 import ImageTokenError, MissingWeightsError, trains
from hf_vlp.models.blip2.language_blip_2 import LabelError
from hf_vlp.models.llava.anyres_llava import MERGE_TYPES, MergeType, TileError, grid_shape, merge_tiles
from hf_vlp.models.llava.packing_llava import flattened, packed_mask, packed_positions, supervised_labels
from hf_vlp.objectives.language import language_modeling_loss

# Logits that exist at a time in training; more are computed in pieces.
LOGITS_AT_A_TIME = 2**25
# Positions that a piece has at least.
SMALLEST_PIECE = 64


class LlavaMixin:
    """What both classes share: the way from tokens and pictures to the loss."""

    # The loss is a mean over the supervised tokens of all ranks; `Trainer` divides it by the accumulation steps.
    accepts_loss_kwargs = False
    _output_class: ClassVar[type[ModelOutput]]

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        allow_missing: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, except that weights which the checkpoint lacks are an error.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the native format.
            allow_missing: initialise missing weights at random, as transformers does.

        Raises:
            MissingWeightsError: the checkpoint lacks weights; the message names them.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing and not allow_missing:
            shown = ", ".join(missing[:6]) + (f", … ({len(missing)} in all)" if len(missing) > 6 else "")
            raise MissingWeightsError(
                f"{pretrained_model_name_or_path} lacks weights of {cls.__name__}: {shown}. Training would go on with "
                "random ones; check that it is a whole checkpoint (adapters alone are merged into one by `hf-vlp "
                "merge`), or pass allow_missing=True if that is meant",
                missing,
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def from_vision_language_pretrained(
        cls,
        vision: str | PreTrainedModel,
        language_model: str | PreTrainedModel,
        processor: Any = None,
        **options: Any,
    ) -> Any:
        """The model before stage 1; see `hf_vlp.models.llava.initialization_llava`."""
        from hf_vlp.models.llava.initialization_llava import model_from_parts

        return model_from_parts(cls, vision, language_model, processor, **options)

    # Which parts learn

    @property
    def stages(self) -> dict[str, dict[str, bool]]:
        """What trains in each stage (2304.08485, section 4.2), as tables of `hf_vlp.training.freezing`.

        `stage1`: the projector. `stage2`: projector and language model. `stage2_vision`: the vision tower as well.
        `stage2_lora`: the projector; adapters are added behind it. The second layer of a linear projector (v1) is the
        identity and stays it.
        """
        connector = {"model.multi_modal_projector": True}
        if hasattr(self.model, "image_newline"):
            connector["model.image_newline"] = True
        if self.linear_projector:
            connector["model.multi_modal_projector.linear_2"] = False
        unused = dict.fromkeys(self.unused_tower_parts(), False)
        return {
            "stage1": {"": False, **connector},
            "stage2": {"": True, "model.vision_tower": False, **connector},
            "stage2_vision": {"": True, "model.vision_tower": True, **unused, **connector},
            "stage2_lora": {"": False, **connector},
        }

    @property
    def linear_projector(self) -> bool:
        """Whether the projector is v1's single layer: no activation, and the identity as second layer."""
        second = self.model.multi_modal_projector.linear_2
        if self.config.projector_hidden_act != "linear" or second.weight.is_meta:
            return self.config.projector_hidden_act == "linear"
        identity = torch.eye(*second.weight.shape, dtype=second.weight.dtype, device=second.weight.device)
        return torch.equal(second.weight, identity) and (second.bias is None or not bool(second.bias.any()))

    def unused_tower_parts(self) -> list[str]:
        """Paths of the tower's modules behind the layer whose output is used; they get no gradient."""
        tower, layers = self.model.vision_tower, self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        stacks = {
            name: module
            for name, module in tower.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == getattr(tower.config, "num_hidden_layers", -1)
        }
        if len(stacks) != 1:
            return []
        path, stack = next(iter(stacks.items()))
        # Entry 0 of the hidden states is the embedding, entry n the output of layer n.
        used = max(layer if layer >= 0 else len(stack) + 1 + layer for layer in layers)
        unused = [f"{path}.{index}" for index in range(used, len(stack))]
        if used < len(stack):
            unused += [name for name, _ in tower.named_children() if name in AFTER_THE_LAYERS]
            inner = path.rpartition(".")[0].rpartition(".")[0]
            if inner:
                unused += [
                    f"{inner}.{name}"
                    for name, _ in tower.get_submodule(inner).named_children()
                    if name in AFTER_THE_LAYERS
                ]
        else:
            unused += [name for name, _ in tower.named_children() if name in ("head", "pooler")]
        # What masked pretraining puts in the place of hidden patches (DINOv2, BEiT).
        unused += [name for name, _ in tower.named_parameters() if name.rpartition(".")[2] == "mask_token"]
        return [f"model.vision_tower.{name}" for name in dict.fromkeys(unused)]

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for part in (self.model.vision_tower, self.model.language_model):
            if mode and not trains(part):
                part.eval()
        return self

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ln of the vocabulary: the loss of a model that knows nothing."""
        return {"loss": math.log(self.config.text_config.vocab_size)} if "labels" in batch else {}

    # From pictures to features

    def tower_states(self, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) pictures or tiles to (N, tokens, vision width) features of `vision_feature_layer`.

        The class token is dropped with the strategy "default". No autograd graph is built for a frozen tower.
        """
        tower = self.model.vision_tower
        layers = self.config.vision_feature_layer
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower)):
            states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
            chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            if self.config.vision_feature_select_strategy == "default":
                chosen = [state[:, 1:] for state in chosen]
            return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def project(self, states: Tensor) -> Tensor:
        """(N, tokens, vision width) to (N, tokens, language width)."""
        return self.model.multi_modal_projector(states.to(self.model.multi_modal_projector.linear_1.weight.dtype))

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Features of each picture in the language model's space, (tokens, width) each.

        Args:
            pixel_values: (I, 3, H, W), all pictures of the batch in the order of their placeholders.
        """
        self._check_pixels(pixel_values, 4)
        return list(self.project(self.tower_states(pixel_values)))

    def _check_pixels(self, pixel_values: Tensor, dimensions: int) -> None:
        size = self.config.vision_config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        if pixel_values.dim() != dimensions or tuple(pixel_values.shape[-2:]) != size:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}, the vision tower takes pictures of {size} in a "
                f"tensor of {dimensions} dimensions; make them with the processor saved with this model"
            )

    # From tokens and features to the language model's input

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        image_features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Token embeddings (B, L, width), with the features of the pictures at the image tokens.

        Args:
            input_ids: (B, L), each picture as a run of image tokens of the length of its features.
            pixel_values, image_sizes: the pictures, or `image_features`, what `image_features` gave for them.

        Raises:
            ImageTokenError: image tokens and features do not match, row by row.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if image_features is None and pixel_values is not None and len(pixel_values):
            image_features = self.image_features(pixel_values, image_sizes)
        mask = input_ids == self.config.image_token_id
        self._check_image_tokens(mask, image_features)
        if image_features:
            features = torch.cat(list(image_features)).to(embeds.device, embeds.dtype)
            return embeds.masked_scatter(mask[..., None], features)
        if self.training and torch.is_grad_enabled():
            embeds = embeds + self._no_pictures().to(embeds.dtype)
        return embeds

    def _check_image_tokens(self, mask: Tensor, features: Sequence[Tensor] | None) -> None:
        found = mask.sum(dim=1).tolist()
        lengths = [len(feature) for feature in features or []]
        ends = {0}
        for length in lengths:
            ends.add(max(ends) + length)
        position = 0
        for row, count in enumerate(found):
            position += count
            if position not in ends or position > sum(lengths):
                raise ImageTokenError(
                    f"row {row} has {count} image tokens (id {self.config.image_token_id}), which are not the "
                    f"features of whole pictures: the {len(lengths)} pictures of the batch have {lengths[:8]} "
                    f"features, its rows {found[:8]} image tokens. Make the inputs with the processor saved with this "
                    "model, and do not cut a text inside a picture"
                )
        if position != sum(lengths):
            raise ImageTokenError(
                f"{len(lengths)} pictures with {sum(lengths)} features for {position} image tokens: the last pictures "
                "would not be seen. Put one image placeholder into the text for each picture"
            )

    def _no_pictures(self) -> Tensor:
        """0, connected to every weight that pictures would have used: all ranks must give them a gradient."""
        connector = [p for p in self.model.multi_modal_projector.parameters() if p.requires_grad]
        newline = getattr(self.model, "image_newline", None)
        zero = torch.zeros((), device=self.device)
        tower = self.model.vision_tower
        if trains(tower):
            size = self.config.vision_config.image_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            pixels = torch.zeros(
                1, self.config.vision_config.num_channels, *size, device=self.device, dtype=self.dtype
            )
            zero = zero + self.project(self.tower_states(pixels))[:, :0].sum()
        elif connector:
            first = self.model.multi_modal_projector.linear_1
            zero = zero + self.project(first.weight.new_zeros(1, 1, first.in_features))[:, :0].sum()
        if newline is not None and newline.requires_grad:
            zero = zero + newline[:0].sum()
        return zero

    # The loss

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Language modelling on texts and pictures.

        Args:
            input_ids: (B, L), each picture as image tokens; or `inputs_embeds` (B, L, width), as `embed` gives them.
            pixel_values: pictures of all rows in the order of their placeholders: (I, 3, H, W) for LLaVA 1 and 1.5,
                (I, tiles, 3, H, W) for NeXT.
            image_sizes: (I, 2) original height and width; NeXT only.
            attention_mask: (B, L), 0 at padding on either side.
            labels: (B, L), -100 where nothing is to be learnt.
            sequence_ids: (B, L) packed rows: 1, 2, … for the conversations of a row, 0 at padding. No token sees
                another conversation, and positions start anew in each.
            logits_to_keep: as in transformers; without `labels` only.
            kwargs: for the language model.

        Returns:
            `loss`, the mean over the supervised tokens of all ranks, and `logits` (B, L, vocabulary). In training
            logits exist only at supervised positions, a piece at a time, and are not returned.

        Raises:
            ImageTokenError: image tokens and pictures do not match.
            LabelError: labels on image tokens or padding, or of another shape.
            AllLabelsIgnoredError: nothing to learn on any rank.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        self._reject_overrides(kwargs)
        features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            features = mm_encoder_outputs["image"].pooler_output
        if labels is not None:
            self._check_labels(labels, input_ids, inputs_embeds, attention_mask, sequence_ids)
        if inputs_embeds is None:
            reading = past_key_values is not None and past_key_values.get_seq_length() > 0
            if reading and pixel_values is None and features is None:
                # Tokens that were generated, or further text behind cached pictures.
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.embed(input_ids, pixel_values, image_sizes, features)
        elif pixel_values is not None:
            raise ValueError("pixel_values need input_ids, which say where the pictures go; inputs_embeds do not")

        if labels is not None and self.training:
            kwargs["use_cache"] = False
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        if sequence_ids is None:
            outputs = self.model.language_model(**inputs, past_key_values=past_key_values, **kwargs)
            hidden = outputs.last_hidden_state
        else:
            outputs = self._read_packed(inputs_embeds, position_ids, sequence_ids, past_key_values, kwargs)
            hidden = outputs.last_hidden_state.view(inputs_embeds.shape)

        loss = logits = None
        if labels is not None:
            loss = self._loss(hidden, supervised_labels(labels, sequence_ids))
        if labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept, :])
        output = self._output_class(
            loss=loss,
            logits=logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=None if features is None else torch.cat(list(features)),
        )
        return_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _reject_overrides(self, kwargs: dict[str, Any]) -> None:
        """The native call can override how pictures are read; the processor counted tokens by the config."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given = kwargs.pop(name, None)
            if given is not None and given != getattr(self.config, name):
                raise ValueError(
                    f"{name}={given!r} differs from config.{name}={getattr(self.config, name)!r}; set it there"
                )

    def _read_packed(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor | None,
        sequence_ids: Tensor,
        past_key_values: Any,
        kwargs: dict[str, Any],
    ) -> ModelOutput:
        if past_key_values is not None:
            raise ValueError("packed rows (sequence_ids) are for training; they cannot go on from past_key_values")
        language_model = self.model.language_model
        positions = packed_positions(sequence_ids, position_ids, language_model)
        if flattened(language_model):
            # Variable-length flash attention reads one long row and finds the borders in its positions.
            inputs_embeds, positions = inputs_embeds.flatten(0, 1)[None], positions.flatten()[None]
        mask = packed_mask(sequence_ids, language_model, inputs_embeds.dtype)
        return language_model(
            inputs_embeds=inputs_embeds, position_ids=positions, attention_mask=mask, **{**kwargs, "use_cache": False}
        )

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self._training_head()
        vocabulary = self.lm_head.weight.shape[0]
        supervised = int((labels[:, 1:] != -100).sum())
        # A frozen head in float16 or the like is used as it is; the loss is taken in float32.
        pieces = max(SMALLEST_PIECE, LOGITS_AT_A_TIME // max(vocabulary, 1))
        return language_modeling_loss(hidden, head, labels, chunk_size=pieces if supervised > pieces else None)

    def _training_head(self) -> Any:
        """The output layer as the loss sees it: without the image token where that is no word of the model.

        A placeholder that was added to a language model (its generation config suppresses it) is never a target and
        never written. The original has no such row, so it must not take probability from the words.
        """
        token = self.config.image_token_id
        head = self.lm_head
        if token not in (self.generation_config.suppress_tokens or []):
            return head
        plain = type(head) is nn.Linear and not (head._forward_hooks or head._forward_pre_hooks)
        if plain and token == head.out_features - 1 and type(head.weight) is nn.Parameter:
            words = nn.Linear(head.in_features, token, bias=False, device="meta")
            del words.weight
            words.weight = head.weight[:token]
            return words
        return lambda states: head(states).index_fill(-1, torch.tensor([token], device=states.device), -torch.inf)

    def _check_labels(
        self,
        labels: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        sequence_ids: Tensor | None,
    ) -> None:
        shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        if labels.shape != shape:
            raise LabelError(
                f"labels have shape {tuple(labels.shape)}, the tokens {tuple(shape)}; labels must cover the image "
                "tokens too (with -100), as ConversationCollator makes them"
            )
        supervised = labels != -100
        wrong = {"image tokens": supervised & (labels == self.config.image_token_id)}
        if attention_mask is not None and attention_mask.shape == labels.shape:
            wrong["padding"] = supervised & (attention_mask == 0)
        if sequence_ids is not None:
            wrong["padding"] = supervised & (sequence_ids == 0)
        for kind, where in wrong.items():
            count = int(where.sum())
            if count:
                raise LabelError(f"{count} labels stand on {kind}; set them to -100, as ConversationCollator does")


# Modules of vision towers behind the last layer, by the names that transformers gives them.
AFTER_THE_LAYERS = ("post_layernorm", "layernorm", "head", "pooler")


class LlavaForConditionalGeneration(LlavaMixin, transformers.LlavaForConditionalGeneration):
    """LLaVA 1 and 1.5 (native `llava`): one feature a patch, through one or two linear layers.

    Example:
        model = LlavaForConditionalGeneration.from_vision_language_pretrained(vision, language_model, processor)
        loss = model(**ConversationCollator(processor, template="plain")(rows)).loss
    """

    _output_class = LlavaCausalLMOutputWithPast


class MergingLlavaNextModel(LlavaNextModel):
    """The native model without head, with all three ways of the original to join an image's tiles."""

    merge_type: MergeType = "spatial_unpad"

    def pack_image_features(
        self,
        image_features: Sequence[Tensor],
        image_sizes: Tensor,
        vision_feature_select_strategy: str | None = None,
        image_newline: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """As the native method: features of the tiles of each image to one sequence an image, and their lengths."""
        tile = self.config.vision_config.image_size
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        merged = [
            merge_tiles(
                tiles, size, grid_shape(size, self.config.image_grid_pinpoints, tile), image_newline, self.merge_type
            )
            for tiles, size in zip(image_features, sizes, strict=True)
        ]
        return merged, torch.tensor([len(one) for one in merged], device=image_features[0].device)


class LlavaNextForConditionalGeneration(LlavaMixin, transformers.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT (native `llava_next`): an image as a base picture and tiles, unpadded, with a newline a row.

    Args:
        config: native.
        merge_type: how tiles are joined; the native format knows "spatial_unpad" alone, and only that is saved.
    """

    _output_class = LlavaNextCausalLMOutputWithPast

    def __init__(self, config: PreTrainedConfig, merge_type: MergeType = "spatial_unpad") -> None:
        if merge_type not in MERGE_TYPES:
            raise ValueError(f"merge_type may be one of {list(MERGE_TYPES)}, not {merge_type!r}")
        LlavaNextPreTrainedModel.__init__(self, config)
        self.model = MergingLlavaNextModel(config)
        self.model.merge_type = merge_type
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: tiles are joined in a way that the native format cannot say.
        """
        if self.model.merge_type != "spatial_unpad":
            raise ValueError(
                f"the native format joins tiles by 'spatial_unpad' only; a model that joins them by "
                f"{self.model.merge_type!r} would be opened as another one"
            )
        super().save_pretrained(*args, **kwargs)

    def image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Features of each picture in the language model's space, (tokens, width) each.

        Args:
            pixel_values: (I, tiles, 3, H, W), the base picture first, zero tiles behind those of a smaller grid.
            image_sizes: (I, 2) original height and width.

        Raises:
            TileError: an image needs more tiles than are given.
        """
        if image_sizes is None:
            raise ValueError("image_sizes are missing: LLaVA-NeXT cuts an image by its original height and width")
        self._check_pixels(pixel_values, 5)
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else [list(size) for size in image_sizes]
        if len(sizes) != len(pixel_values):
            raise ValueError(f"{len(sizes)} image_sizes for {len(pixel_values)} pictures")
        tile = self.config.vision_config.image_size
        counts = []
        for index, size in enumerate(sizes):
            rows, columns = grid_shape(size, self.config.image_grid_pinpoints, tile)
            counts.append(1 + rows * columns)
            if counts[-1] > pixel_values.shape[1]:
                raise TileError(
                    f"picture {index} of {size[0]} x {size[1]} pixels is cut into {rows} x {columns} tiles and a base "
                    f"picture, but pixel_values hold {pixel_values.shape[1]}; processor and model have different "
                    "image_grid_pinpoints"
                )
        tiles = torch.cat([picture[:count] for picture, count in zip(pixel_values, counts, strict=True)])
        features = self.project(self.tower_states(tiles)).split(counts)
        newline = self.model.image_newline if self.model.merge_type == "spatial_unpad" else None
        return self.model.pack_image_features(features, sizes, image_newline=newline)[0]


__all__ = ["LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"]
