"""ALBEF, "Align before Fuse" (Li et al. 2021, arXiv 2107.07651): the network and its inference heads.

A ViT encodes the image, the lower layers of BERT the text; its upper layers fuse them by cross-attention on all image
tokens. Follows the authors' code (github.com/salesforce/ALBEF, BSD-3-Clause) in what it computes; the image tower is
transformers' own.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_albef import AlbefConfig
from .modeling_albef_grounding import GroundingOutput, contrastive_grounding, heat_picture, matching_grounding
from .modeling_albef_packing import PackedTexts, fusion_layouts
from .modeling_albef_text import AlbefTextModel, initialise_text_buffers


@dataclass
class AlbefModelOutput(ModelOutput):
    """Output of `AlbefModel`.

    Args:
        last_hidden_state: (N, L, D) fused states, zero at padding.
        image_embeds: (I, K, width) image tokens, the class token first.
        text_embeds: (N, L, D) states of the text encoder, zero at padding.
    """

    last_hidden_state: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


@dataclass
class AlbefImageTextOutput(ModelOutput):
    """Output of `AlbefForImageTextRetrieval`.

    Args:
        logits_per_image: (I, T) similarities divided by the temperature.
        logits_per_text: (T, I).
        image_embeds: (I, D) normalised.
        text_embeds: (T, D) normalised.
        itm_logits: (T, 2) of pair i = (image i, text i), class 1 = match; only with `matching=True`.
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    itm_logits: Tensor | None = None


@dataclass(frozen=True)
class ImageEmbeds:
    """What retrieval keeps of I images.

    Args:
        itc: (I, D) normalised features for the contrastive similarity.
        states: (I, K, width) image tokens for matching, or None.
    """

    itc: Tensor
    states: Tensor | None = None

    def __len__(self) -> int:
        return len(self.itc)

    def __getitem__(self, index: Tensor | slice) -> "ImageEmbeds":
        return ImageEmbeds(self.itc[index], None if self.states is None else self.states[index])


class AlbefPreTrainedModel(PreTrainedModel):
    """Loading, initialisation and capabilities of every ALBEF model."""

    config: AlbefConfig
    base_model_prefix = "albef"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTLayer", "AlbefTextLayer", "AlbefTwinLayer", "BertEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Auto classes besides `AutoModel` that open a folder of this class.
    _more_auto_classes: tuple[str, ...] = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialise_text_buffers(module)
        if isinstance(module, AlbefForImageTextRetrieval):
            init.constant_(module.temperature, self.config.temperature_init_value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a parameter that the checkpoint lacks is an error, not a random value.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            allow_missing (`bool`): initialise parameters that the checkpoint lacks at random, to train a new head.
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
                f"{pretrained_model_name_or_path} has no {cls.__name__}: it lacks {shown}. Load it with the class "
                "that saved it (see `architectures` in config.json), or pass allow_missing=True to train from scratch"
            )
        return (model, information) if with_information else model

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        fusion_layer: int | None = None,
        image_size: int | None = None,
        **config_kwargs: Any,
    ) -> Any:
        """Starts from a ViT and a BERT; cross-attention, projections and heads are new (section 3.1 of the paper).

        Args:
            vision_model_name_or_path: folder or Hub id of a vision model of transformers (or of a model that has one).
            text_model_name_or_path: folder or Hub id of a BERT.
            fusion_layer: first layer with cross-attention; default: half of the layers.
            image_size: pixels; the position embedding is interpolated to it. Default: the vision model's.
            config_kwargs: other fields of `AlbefConfig`; `images_per_text` goes to the text tower.

        Raises:
            ValueError: a tower's checkpoint lacks parameters, or is not a BERT.
        """
        vision = _load_tower(vision_model_name_or_path)
        vision = getattr(vision, "vision_model", vision)
        text = _load_tower(text_model_name_or_path)
        if text.config.model_type != "bert":
            raise ValueError(
                f"{text_model_name_or_path} is a {text.config.model_type!r} model; ALBEF's text side is a BERT "
                "(model_type 'bert')"
            )
        fields = {name: value for name, value in text.config.to_dict().items() if name != "model_type"}
        layers = text.config.num_hidden_layers
        fields["fusion_layer"] = layers // 2 if fusion_layer is None else fusion_layer
        fields["images_per_text"] = config_kwargs.pop("images_per_text", 1)
        fields.update(is_decoder=False, add_cross_attention=False)
        config = AlbefConfig(vision_config=vision.config.to_dict(), text_config=fields, **config_kwargs)
        model = cls(config)
        model.albef_model.load_towers(vision, text)
        if image_size is not None:
            model.set_image_size(image_size)
        model.start_heads()
        return model

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers; the folder also opens through the Auto classes of its task."""
        if self._auto_class is None:
            # A training checkpoint: `Trainer` reads it back by the names that the modules have.
            kwargs.setdefault("save_original_format", False)
        else:
            reference = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            auto_map = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = auto_map | dict.fromkeys(self._more_auto_classes, reference)
        super().save_pretrained(save_directory, **kwargs)

    def start_heads(self) -> None:
        """Called once the towers are loaded; heads that do not start at random override it."""

    @property
    def albef_model(self) -> "AlbefModel":
        """The network without heads."""
        return self if isinstance(self, AlbefModel) else self.albef

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embedding for images of another size (bicubic, as the original does on loading).

        Args:
            image_size: new height and width in pixels, a multiple of the patch size.
        """
        tower = self.albef_model.vision_model
        embeddings = tower.embeddings
        patch = self.config.vision_config.patch_size
        if image_size % patch:
            raise ValueError(f"image_size {image_size} is not a multiple of the patch size {patch}")
        resized = interpolate_positions(embeddings.position_embeddings.data, (image_size // patch) ** 2)
        requires_grad = embeddings.position_embeddings.requires_grad
        embeddings.position_embeddings = nn.Parameter(resized, requires_grad=requires_grad)
        for holder in (embeddings, getattr(embeddings, "patch_embeddings", None)):
            if hasattr(holder, "image_size"):
                holder.image_size = (image_size, image_size)
            if hasattr(holder, "num_patches"):
                holder.num_patches = (image_size // patch) ** 2
        self.config.vision_config.image_size = tower.config.image_size = image_size


def interpolate_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Resizes a position embedding (1, 1 + old, D) to (1, 1 + num_patches, D); both grids are square.

    The class token's row stays; the grid is resized bicubically without antialiasing.
    """
    grid = positions[:, 1:]
    old, new = round(grid.shape[1] ** 0.5), round(num_patches**0.5)
    if old * old != grid.shape[1] or new * new != num_patches:
        raise ValueError(f"position embeddings of {grid.shape[1]} and {num_patches} patches are not square grids")
    if old == new:
        return positions.clone()
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(new, new), mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def _load_tower(name: str) -> PreTrainedModel:
    model, information = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    missing = [key for key in information["missing_keys"] if "pooler" not in key]
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} parameters of {type(model).__name__}, such as {missing[0]}")
    return model


class AlbefModel(AlbefPreTrainedModel):
    """Image encoder, text encoder and fusion encoder, without heads."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        network = AutoModel._model_mapping[type(config.vision_config)]
        # ALBEF reads all tokens of the final norm: a pooler would be an unused parameter.
        accepted = inspect.signature(network.__init__).parameters
        options = {"add_pooling_layer": False} if "add_pooling_layer" in accepted else {}
        self.vision_model = AutoModel.from_config(config.vision_config, **options)
        self.text_model = AlbefTextModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def load_towers(self, vision: PreTrainedModel, text: PreTrainedModel) -> None:
        """Copies the weights of a vision model and of a BERT; cross-attention keeps its own."""
        own = self.vision_model.state_dict()
        state = {name: value for name, value in vision.state_dict().items() if name in own}
        self.vision_model.load_state_dict(state)
        state = {}
        twins = self.config.text_config.images_per_text == 2
        for name, value in text.state_dict().items():
            if name.startswith("pooler."):
                continue
            parts = name.split(".")
            if twins and name.startswith("encoder.layer.") and int(parts[2]) >= self.config.text_config.fusion_layer:
                for twin in ("first", "second"):
                    state[".".join([*parts[:3], twin, *parts[3:]])] = value
            else:
                state[name] = value
        missing, unexpected = self.text_model.load_state_dict(state, strict=False)
        missing = [name for name in missing if "crossattention" not in name]
        if missing or unexpected:
            raise ValueError(f"the BERT does not fit: missing {missing[:3]}, unexpected {unexpected[:3]}")

    def encode_images(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """(I, 3, H, W) to all tokens of the image encoder (I, K, width), the class token first."""
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (images, 3, height, width), but has {tuple(pixel_values.shape)}")
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        return self.vision_model(pixel_values, **options).last_hidden_state

    def fuse_pairs(
        self,
        texts: PackedTexts,
        text_states: Tensor,
        image_states: Tensor,
        image_index: Tensor | None = None,
        *,
        source: Tensor | None = None,
        keep: Tensor | None = None,
        key_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Fused states of packed texts with images; see `fusion_layouts` for the arguments.

        Without `image_index`, text i looks at image i, and for pairs at image N + i as well.
        """
        number = len(texts) if source is None else len(source)
        if image_index is None:
            count = self.config.text_config.images_per_text
            image_index = torch.arange(count * number).view(count, number)
        layouts = fusion_layouts(
            texts,
            self.config.text_config.num_fusion_layers,
            image_index,
            image_states.shape[0],
            source=source,
            keep=keep,
        )
        states = None if key_values is not None else image_states
        return self.text_model.fuse(text_states, layouts, states, key_values)

    def fuse_first(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """(N, D) fused states of the texts' first tokens, which the classification heads read."""
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        expected = len(texts) * self.config.text_config.images_per_text
        if image_states.shape[0] != expected:
            raise ValueError(f"{len(texts)} texts need {expected} images, but there are {image_states.shape[0]}")
        return self.fuse_pairs(texts, self.text_model.encode(texts), image_states, keep=texts.first)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = True,
    ) -> AlbefModelOutput | tuple:
        """Encodes images, texts, or fuses both.

        Args:
            pixel_values: (N, 3, H, W); for pairs (2N, 3, H, W), all first images before all second ones.
            input_ids: (N, L), starting with [CLS].
            attention_mask: (N, L), non-zero at tokens.
            image_embeds: (N, K, width) tokens of images that are encoded already, instead of `pixel_values`.
            interpolate_pos_encoding: let the vision model interpolate its position embedding to the images' size.
            return_dict: return `AlbefModelOutput` rather than a tuple.
        """
        if pixel_values is None and image_embeds is None and input_ids is None:
            raise ValueError("pass pixel_values (or image_embeds), input_ids, or both")
        if pixel_values is not None:
            image_embeds = self.encode_images(pixel_values, interpolate_pos_encoding)
        output = AlbefModelOutput(image_embeds=image_embeds)
        if input_ids is not None:
            texts = PackedTexts.from_padded(input_ids, attention_mask)
            states = self.text_model.encode(texts)
            output.text_embeds = self.text_model.grid(states, texts, input_ids.shape[1])
            if image_embeds is not None:
                expected = len(texts) * self.config.text_config.images_per_text
                if image_embeds.shape[0] != expected:
                    raise ValueError(f"{len(texts)} texts need {expected} images, there are {image_embeds.shape[0]}")
                fused = self.fuse_pairs(texts, states, image_embeds)
                output.last_hidden_state = self.text_model.grid(fused, texts, input_ids.shape[1])
        return output if return_dict else output.to_tuple()


class AlbefForImageTextRetrieval(AlbefPreTrainedModel):
    """Contrastive features and the matching head: retrieval with re-ranking, zero-shot classification, grounding.

    `temperature` divides the similarities, as in the paper's equation 1; it is not exponentiated.
    """

    supports_matching = True
    # The authors' evaluation ranks by the logit of "match" alone; BLIP's and BLIP-2's add the similarity.
    rerank_by = "itm"
    _auto_class = "AutoModel"
    _more_auto_classes = ("AutoModelForZeroShotImageClassification",)

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        self.albef = AlbefModel(config)
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.itm_head = nn.Linear(config.text_config.hidden_size, 2)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value)))
        self.post_init()

    def project_image(self, image_states: Tensor) -> Tensor:
        """(I, K, width) image tokens to normalised features (I, D) of the class token."""
        return unit_vectors(self.vision_projection(image_states[:, 0]))

    def project_text(self, first_states: Tensor) -> Tensor:
        """(T, hidden) text states of [CLS] to normalised features (T, D)."""
        return unit_vectors(self.text_projection(first_states))

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Features of images (I, 3, H, W), or of their tokens (I, K, width) if they are encoded already."""
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("pass either pixel_values or image_embeds")
        states = self.albef.encode_images(pixel_values) if image_embeds is None else image_embeds
        return ImageEmbeds(self.project_image(states), states)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Normalised features (T, D) of texts (T, L)."""
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        return self.project_text(self.albef.text_model.encode(texts, keep=texts.first))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised features (I, D) of images (I, 3, H, W)."""
        return self.embed_images(pixel_values).itc

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Normalised features (T, D) of texts (T, L)."""
        return self.embed_texts(input_ids, attention_mask)

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosine similarities (I, T) in float32, not divided by the temperature."""
        itc = images.itc if hasattr(images, "itc") else images
        return itc.float() @ text_itc.float().t()

    def matching_logits(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows_at_once: int = 512,
    ) -> Tensor:
        """ITM logits (P, 2) of pairs, class 1 = match.

        A text that several pairs name is encoded once, an image's keys and values are projected once.

        Args:
            images: `embed_images(...)`, or image tokens (I, K, width).
            image_index: (P,) image of each pair.
            input_ids: (P, L) text of each pair.
            attention_mask: (P, L).
            rows_at_once: pairs that are fused together; bounds memory.

        Raises:
            ValueError: shapes do not fit, or an index is out of range.
        """
        states = images.states if hasattr(images, "states") else images
        if states is None:
            raise ValueError("these image features have no states to match with: make them with embed_images()")
        if image_index.ndim != 1 or image_index.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"image_index must name one image for each of the {input_ids.shape[0]} texts, "
                f"but has shape {tuple(image_index.shape)}"
            )
        index = image_index.cpu()
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < states.shape[0]):
            raise ValueError(f"image_index must lie in 0..{states.shape[0] - 1}, but reaches {int(index.max())}")
        if not len(index):
            return self.itm_head.weight.new_empty(0, 2)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        keys = torch.cat([torch.where(attention_mask.bool(), input_ids, -1), attention_mask.bool()], dim=1)
        unique, source = keys.unique(dim=0, return_inverse=True)
        ids, mask = unique.split(input_ids.shape[1], dim=1)
        texts = PackedTexts.from_padded(ids.clamp(min=0), mask)
        text_states = self.albef.text_model.encode(texts)
        source = source.cpu()
        order = torch.argsort(index, stable=True)
        scored: list[Tensor] = []
        for images_here, rows in _groups(index[order], rows_at_once):
            key_values = self.albef.text_model.project_images(states[images_here.to(states.device)])
            for start in range(rows.start, rows.stop, rows_at_once):
                pairs = order[start : min(start + rows_at_once, rows.stop)]
                local = torch.searchsorted(images_here, index[pairs])
                scored.append(self._match(texts, text_states, source[pairs], local, key_values))
        return torch.cat(scored).index_select(0, order.argsort().to(scored[0].device))

    def _match(
        self,
        texts: PackedTexts,
        text_states: Tensor,
        source: Tensor,
        image_index: Tensor,
        key_values: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        chosen, source = source.unique(return_inverse=True)
        part = texts.select(chosen)
        part_states = text_states.index_select(0, texts.tokens_of(chosen).to(text_states.device))
        counts = part.counts[source]
        fused = self.albef.fuse_pairs(
            part,
            part_states,
            key_values[0][0],
            image_index,
            source=source,
            keep=counts.cumsum(0) - counts,
            key_values=key_values,
        )
        return self.itm_head(fused)

    def matching_scores(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Scores (P,) for re-ranking: the logit of "match", as the original ranks. See `matching_logits`."""
        return self.matching_logits(images, image_index, input_ids, attention_mask)[:, 1]

    def matching_probabilities(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (P,) that the texts match their images. See `matching_logits`."""
        return self.matching_logits(images, image_index, input_ids, attention_mask).float().softmax(dim=-1)[:, 1]

    def grounding_maps(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        layer: int | None = None,
        source: str = "matching",
    ) -> GroundingOutput:
        """Where in image i is what text i says? Grad-CAM, section 6.4 of the paper.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L).
            attention_mask: (N, L).
            layer: for `"matching"` a layer of the text stack from `fusion_layer` on (default: the third fusion
                layer, as released); for `"contrastive"` a block of the ViT (default: the last but two).
            source: `"matching"`: cross-attention and its gradient of the matching score; `"contrastive"`: the class
                token's attention in the ViT and its gradient of the similarity.
        """
        if source == "matching":
            return matching_grounding(self, pixel_values, input_ids, attention_mask, layer)
        if source == "contrastive":
            return contrastive_grounding(self, pixel_values, input_ids, attention_mask, layer)
        raise ValueError(f"source is {source!r}; choose 'matching' or 'contrastive'")

    @staticmethod
    def grounding_picture(image: Image.Image, heat: Tensor | Sequence, strength: float = 0.6) -> Image.Image:
        """A picture of a map (h, w) over its image."""
        return heat_picture(image, heat, strength)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        matching: bool = False,
        return_dict: bool = True,
    ) -> AlbefImageTextOutput | tuple:
        """Similarities of all images with all texts, and with `matching=True` the ITM logits of pairs (i, i).

        Args:
            pixel_values: (I, 3, H, W).
            input_ids: (T, L), starting with [CLS].
            attention_mask: (T, L), non-zero at tokens.
            matching: also run the fusion encoder on pairs; I must equal T.
            return_dict: return `AlbefImageTextOutput` rather than a tuple.
        """
        if pixel_values is None or input_ids is None:
            raise ValueError("pass pixel_values and input_ids")
        images = self.embed_images(pixel_values)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        if matching and len(texts) != images.itc.shape[0]:
            raise ValueError(
                f"matching=True pairs image i with text i, but there are {images.itc.shape[0]} images and "
                f"{len(texts)} texts; use matching_scores() for other pairs"
            )
        states = self.albef.text_model.encode(texts, keep=None if matching else texts.first)
        first = states.index_select(0, texts.first.to(states.device)) if matching else states
        text_itc = self.project_text(first)
        logits = images.itc @ text_itc.t() / self.temperature
        itm = (
            self.itm_head(self.albef.fuse_pairs(texts, states, images.states, keep=texts.first)) if matching else None
        )
        output = AlbefImageTextOutput(
            logits_per_image=logits,
            logits_per_text=logits.t(),
            image_embeds=images.itc,
            text_embeds=text_itc,
            itm_logits=itm,
        )
        return output if return_dict else output.to_tuple()


def unit_vectors(x: Tensor) -> Tensor:
    """Rows of length one, in float32 at least, whatever the autocast dtype."""
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=-1)


def _groups(sorted_index: Tensor, rows_at_once: int) -> list[tuple[Tensor, range]]:
    """Cuts sorted image indices into runs of whole images of about `rows_at_once` rows: (distinct images, rows)."""
    images, counts = sorted_index.unique_consecutive(return_counts=True)
    groups, first, start, rows = [], 0, 0, 0
    for i, count in enumerate(counts.tolist()):
        if rows and rows + count > rows_at_once:
            groups.append((images[first:i], range(start, start + rows)))
            first, start, rows = i, start + rows, 0
        rows += count
    if rows:
        groups.append((images[first:], range(start, start + rows)))
    return groups


__all__ = ["AlbefForImageTextRetrieval", "AlbefModel", "AlbefPreTrainedModel"]
