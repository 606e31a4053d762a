"""What BLIP's pretraining and its retrieval fine-tuning share: the twin, the queue, hard negatives across ranks."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BlipConfig
from transformers import initialization as init
from transformers.models.blip.modeling_blip import BlipPreTrainedModel

from hf_vlp.models.albef.modeling_albef import unit_vectors
from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.albef.momentum_albef import joined_texts
from hf_vlp.models.blip.backbone_blip import resize_tower
from hf_vlp.models.blip.modeling_blip import BlipForImageTextRetrieval
from hf_vlp.models.blip.text_blip import Branch, text_pass, with_first
from hf_vlp.models.blip.vision_blip import encode_images
from hf_vlp.models.momentum import ContrastSettings, MomentumContrastMixin, check_extras
from hf_vlp.models.pretraining import PreTrainingMixin, hub_arguments, read_extras
from hf_vlp.nn.momentum import momentum_twin
from hf_vlp.nn.queue import FeatureQueue
from hf_vlp.objectives.distributed import gather, world
from hf_vlp.objectives.matching import HardNegatives


@dataclass
class BlipMomentumSettings(ContrastSettings):
    """How the objectives are computed; kept in the checkpoint's config under `pretraining`.

    The warm-up of `alpha` takes two epochs in the original's pretraining, one in its fine-tuning.

    Attributes:
        negative_all_rank: with `across_ranks="local"`, whether retrieval fine-tuning draws the negatives of matching
            from all ranks, as the original does by default. Pretraining then draws them from its own batch.
        label_smoothing: of the next-token targets.
        temperature: initial value of the learned divisor of the similarities.
        others: see `hf_vlp.models.momentum.ContrastSettings`.
    """

    queue_size: int = 57600
    negative_all_rank: bool = True
    label_smoothing: float = 0.1
    temperature: float = 0.07
    _shares: ClassVar[tuple[str, ...]] = ("momentum", "alpha", "label_smoothing")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")


class MatchingRows(NamedTuple):
    """The rows of the image-grounded encoder that the matching loss needs.

    Attributes:
        texts: distinct texts, [CLS] still first.
        source: (P,) CPU, text of each row.
        image: (P,) CPU, image of each row.
        image_states: (I, K, width) of the images that rows name.
        labels: (P,) 1 for matched rows, which come first; -100 for all where nothing is mismatched.
    """

    texts: PackedTexts
    source: Tensor
    image: Tensor
    image_states: Tensor
    labels: Tensor


class BlipMomentumModel(MomentumContrastMixin, PreTrainingMixin, BlipPreTrainedModel):
    """An inference model with its momentum twin and queue.

    The twin follows in every training step, before its features are computed; the queue takes the features of all
    ranks after the contrast. Neither moves in eval mode.
    """

    inference_attribute = "model"
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    settings_class: ClassVar[type[ContrastSettings]] = BlipMomentumSettings
    # Class of the inference model.
    _model_class: ClassVar[type[BlipForImageTextRetrieval]] = BlipForImageTextRetrieval
    stages: ClassVar[dict[str, dict[str, bool]]] = {"pretrain": {"": True, "momentum": False}}

    def __init__(self, config: BlipConfig, model: BlipForImageTextRetrieval | None = None, **settings: Any) -> None:
        """
        Args:
            config: of the inference model; its `pretraining` entry holds settings that `settings` overrides.
            model: an existing inference model; by default one is drawn from `config`.
            settings: fields of `BlipMomentumSettings`.
        """
        own = copy.deepcopy(config)
        chosen = self.chosen_settings(own, settings)
        own.pretraining = asdict(chosen)
        super().__init__(own)
        self.settings = chosen
        inner = copy.deepcopy(config)
        if hasattr(inner, "pretraining"):
            del inner.pretraining
        self.model = self._model_class(inner) if model is None else model
        self.temperature = nn.Parameter(torch.tensor(float(chosen.temperature)))
        self.momentum = momentum_twin(self._followed())
        self.queue = FeatureQueue(
            chosen.queue_size, config.image_text_hidden_size, with_ids=self._with_ids, start="random"
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.reset_momentum()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.constant_(self.temperature, self.settings.temperature)

    def _followed(self) -> nn.ModuleDict:
        """The modules that the twin follows: everything but the matching head, the decoder and the temperature."""
        names = ("vision_model", "text_encoder", "vision_proj", "text_proj")
        return nn.ModuleDict({name: getattr(self.model, name) for name in names})

    @property
    def temperature_parameter(self) -> Tensor:
        return self.temperature

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @classmethod
    def from_inference_model(cls, model: BlipForImageTextRetrieval, **settings: Any) -> "BlipMomentumModel":
        """Wraps an inference model, which keeps its weights; the twin starts as its copy."""
        wrapped = cls(model.config, model=model, **settings)
        wrapped.reset_momentum()
        return wrapped

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "BlipMomentumModel":
        """Continues from a checkpoint of this class, or starts from an inference folder.

        Args:
            pretrained_model_name_or_path: folder or Hub id. The side file of an exported pretraining gives twin, queue
                and temperature back; a folder without it gets a copy as its twin and a fresh queue.
            image_size: interpolate the position embeddings to it.
            kwargs: fields of `BlipMomentumSettings`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given, as optimisers need full-precision weights.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.settings_class.__dataclass_fields__}
        image_size = kwargs.pop("image_size", None)
        kwargs.setdefault("dtype", torch.float32)
        where = hub_arguments(kwargs)
        config = kwargs.pop("config", None) or BlipConfig.from_pretrained(pretrained_model_name_or_path, **where)
        if cls.__name__ in (config.architectures or []):
            model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
        else:
            inner = cls._model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
            state = read_extras(pretrained_model_name_or_path, **where)
            if "queue.images" in state:
                settings.setdefault("queue_size", len(state["queue.images"]))
            model = cls.from_inference_model(inner, **settings)
            if state:
                model.load_extras(state)
        if image_size is not None and image_size != model.config.vision_config.image_size:
            model.set_image_size(image_size)
        return model

    def load_extras(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `export` kept beside the inference model.

        Raises:
            ValueError: the side file is of another model or of other settings.
        """
        prefix = f"{self.inference_attribute}."
        own = {name: value for name, value in self.state_dict().items() if not name.startswith(prefix)}
        check_extras(own, state)
        self.load_state_dict(dict(state), strict=False)

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embeddings of the model and of its twin."""
        self.model.set_image_size(image_size)
        self.config.vision_config.image_size = image_size
        resize_tower(self.momentum["vision_model"], image_size)

    def online_features(self, pixel_values: Tensor, texts: PackedTexts) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Image tokens (B, K, width), and normalised features of images and texts, (B, D) each."""
        if pixel_values.shape[0] != len(texts):
            raise ValueError(f"there are {pixel_values.shape[0]} images for {len(texts)} texts: pass pairs")
        states = self.model.encode_images(pixel_values)
        first = text_pass(self.model.text_encoder, texts, keep=texts.first)
        return states, (self.model.project_image(states), self.model.project_text(first))

    @torch.no_grad()
    def momentum_features(self, pixel_values: Tensor, texts: PackedTexts) -> tuple[Tensor, Tensor]:
        """Normalised features of the twin, (B, D) each."""
        twin = self.momentum
        image = twin["vision_proj"](encode_images(twin["vision_model"], pixel_values)[:, 0])
        text = twin["text_proj"](text_pass(twin["text_encoder"], texts, keep=texts.first))
        return unit_vectors(image), unit_vectors(text)

    def matching_rows(
        self,
        texts: PackedTexts,
        image_states: Tensor,
        padded: tuple[Tensor, Tensor],
        negatives: HardNegatives | None,
        image_gather: bool = False,
    ) -> MatchingRows:
        """Pairs to match: own pairs, then (text, its negative image), then (negative text, own image).

        On several ranks the ids of a text travel to the rank that holds its negative image, never an image: its keys
        and values are projected where it is, once. A rank then has more or fewer than 3B rows; the loss is a mean
        over all. With `image_gather` the images' tokens travel instead, as in the original.

        Args:
            texts: own texts (B).
            image_states: (B, K, width).
            padded: ids and mask of the texts (B, L).
            negatives: indices into the joined batch, or the own one where ranks are on their own.
            image_gather: see above; with `across_ranks="local"` alone.
        """
        number, device = len(texts), image_states.device
        own = torch.arange(number)
        source, image = own, own
        if negatives is not None:
            image_index, text_index = torch.stack([negatives.image_index, negatives.text_index]).cpu()
            source, image = torch.cat([own, own, text_index]), torch.cat([own, image_index, own])
            if world()[1] > 1 and (self.joined() or image_gather):
                ids, mask, mine = joined_texts(*padded, self.config.text_config.pad_token_id or 0)
                offset = mine.start
                if image_gather:
                    image_states = gather(image_states)
                    source = torch.cat([own + offset, own + offset, text_index])
                    image = torch.cat([own + offset, image_index, own + offset])
                    used, image = image.unique(return_inverse=True)
                    image_states = image_states.index_select(0, used.to(device))
                else:
                    every = gather(negatives.image_index).cpu()
                    here = ((every >= offset) & (every < offset + number)).nonzero().flatten()
                    source = torch.cat([own + offset, here, text_index])
                    image = torch.cat([own, every[here] - offset, own])
                used, source = source.unique(return_inverse=True)
                used = used.to(device)
                texts = PackedTexts.from_padded(ids[used], mask[used])
        labels = torch.zeros(len(source), dtype=torch.long, device=device)
        labels[:number] = 1 if negatives is not None else -100
        return MatchingRows(texts, source, image, image_states, labels)

    def matching_branch(self, rows: MatchingRows) -> Branch:
        """The rows on their way through the image-grounded encoder, of which [ENC] is wanted."""
        texts = with_first(rows.texts, self.model.enc_token_id)
        counts = texts.counts[rows.source]
        keep = counts.cumsum(0) - counts
        return Branch(self.model.text_encoder, texts, rows.image, rows.source, keep)


__all__ = ["BlipMomentumModel", "BlipMomentumSettings", "MatchingRows"]
