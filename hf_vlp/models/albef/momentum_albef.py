"""What ALBEF's training objectives share: momentum twins, contrast with a queue, hard negatives (arXiv 2107.07651)."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.momentum import Contrast, ContrastSettings, MomentumContrastMixin, check_extras
from hf_vlp.models.pretraining import PreTrainingMixin, hub_arguments, read_extras
from hf_vlp.nn.momentum import momentum_twin
from hf_vlp.nn.queue import FeatureQueue
from hf_vlp.objectives.distributed import batch_sizes, exchange_integers, gather, offset_of, world
from hf_vlp.objectives.matching import HardNegatives

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefForImageTextRetrieval, AlbefPreTrainedModel, unit_vectors
from .modeling_albef_packing import PackedTexts


@dataclass
class AlbefMomentumSettings(ContrastSettings):
    """How the objectives are computed; kept in the checkpoint's config under `pretraining`.

    The warm-up of `alpha` takes the paper's first epoch; random negatives are the ablation of its table 1.

    Attributes:
        mlm_probability: share of tokens that are masked.
        others: see `hf_vlp.models.momentum.ContrastSettings`.
    """

    mlm_probability: float = 0.15
    _shares: ClassVar[tuple[str, ...]] = ("momentum", "alpha", "mlm_probability")


class MatchingRows(NamedTuple):
    """The rows of the fusion encoder that the matching loss needs.

    Attributes:
        states: (T, D) text states that come in.
        texts: which texts they are of.
        source: (P,) CPU, text of each row.
        image: (P,) CPU, own image of each row.
        labels: (P,) 1 for matched rows, which come first; -100 for all where nothing is mismatched.
    """

    states: Tensor
    texts: PackedTexts
    source: Tensor
    image: Tensor
    labels: Tensor


class AlbefMomentumModel(MomentumContrastMixin, PreTrainingMixin, AlbefPreTrainedModel):
    """A retrieval model with its momentum twin and queue; base of pretraining and of retrieval fine-tuning.

    The twin follows in every training step, before its features are computed; the queue takes the features of all
    ranks after the contrast. Neither moves in eval mode.
    """

    inference_attribute = "retrieval"
    base_model_prefix = ""
    _auto_class = None
    settings_class: ClassVar[type[ContrastSettings]] = AlbefMomentumSettings
    stages: ClassVar[dict[str, dict[str, bool]]] = {"pretrain": {"": True, "momentum": False}}

    def __init__(
        self, config: AlbefConfig, retrieval: AlbefForImageTextRetrieval | None = None, **settings: Any
    ) -> None:
        """
        Args:
            config: of the inference model; its `pretraining` entry holds settings that `settings` overrides.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `AlbefMomentumSettings`.
        """
        own = copy.deepcopy(config)
        chosen = self.chosen_settings(own, settings)
        own.pretraining = asdict(chosen)
        super().__init__(own)
        self.settings = chosen
        inner = copy.deepcopy(config)
        if hasattr(inner, "pretraining"):
            del inner.pretraining
        self.retrieval = AlbefForImageTextRetrieval(inner) if retrieval is None else retrieval
        self._add_heads(inner)
        self.momentum = momentum_twin(self._followed())
        self.queue = FeatureQueue(
            self.settings.queue_size, config.projection_dim, with_ids=self._with_ids, start="random"
        )
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def _add_heads(self, config: AlbefConfig) -> None:
        """Heads that only training has."""

    def _followed(self) -> nn.ModuleDict:
        """The modules that the twin follows: everything but the matching head and the temperature."""
        return nn.ModuleDict(
            {
                "albef": self.retrieval.albef,
                "vision_projection": self.retrieval.vision_projection,
                "text_projection": self.retrieval.text_projection,
            }
        )

    @classmethod
    def from_inference_model(cls, model: AlbefForImageTextRetrieval, **settings: Any) -> "AlbefMomentumModel":
        """Wraps an inference model, which keeps its weights; the twin starts as its copy."""
        wrapped = cls(model.config, retrieval=model, **settings)
        wrapped.reset_momentum()
        return wrapped

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "AlbefMomentumModel":
        """Continues from a checkpoint of this class, or starts from an inference folder.

        Args:
            pretrained_model_name_or_path: folder or Hub id. The side file of an exported pretraining gives twin and
                queue (and to `AlbefForPreTraining` its MLM head and step count) back; a folder without it gets a
                copy as its twin, a fresh queue and a fresh MLM head.
            image_size: interpolate the position embeddings to it.
            kwargs: fields of `AlbefMomentumSettings`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given, as optimisers need full-precision weights.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.settings_class.__dataclass_fields__}
        image_size = kwargs.pop("image_size", None)
        kwargs.setdefault("dtype", torch.float32)
        where = hub_arguments(kwargs)
        config = kwargs.pop("config", None) or AlbefConfig.from_pretrained(pretrained_model_name_or_path, **where)
        if cls.__name__ in (config.architectures or []):
            model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
        else:
            retrieval = AlbefForImageTextRetrieval.from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
            state = read_extras(pretrained_model_name_or_path, **where)
            if "queue.images" in state:
                settings.setdefault("queue_size", len(state["queue.images"]))
            model = cls.from_inference_model(retrieval, **settings)
            if state:
                model.load_extras(state)
        if image_size is not None and image_size != model.config.vision_config.image_size:
            model.set_image_size(image_size)
        return model

    def pretraining_extras(self) -> dict[str, Tensor]:
        """What `export` keeps beside the inference model; tensors that are tied to others are not stored twice."""
        tied = set(self.all_tied_weights_keys)
        return {name: value for name, value in super().pretraining_extras().items() if name not in tied}

    def load_extras(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `export` kept beside the inference model.

        Raises:
            ValueError: the side file is of another model or of other settings.
        """
        check_extras(self.pretraining_extras(), state)
        self.load_state_dict(dict(state), strict=False)

    @property
    def albef_model(self) -> Any:
        return self.retrieval.albef

    @property
    def temperature_parameter(self) -> Tensor:
        return self.retrieval.temperature

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embeddings of the model and of its twin."""
        self.retrieval.set_image_size(image_size)
        self.config.vision_config.image_size = image_size
        self.momentum["albef"].set_image_size(image_size)

    @torch.no_grad()
    def momentum_features(self, image_states: Tensor, first_states: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features of the twin from its image tokens (B, K, width) and its [CLS] states (B, hidden)."""
        image = unit_vectors(self.momentum["vision_projection"](image_states[:, 0]))
        return image, unit_vectors(self.momentum["text_projection"](first_states))

    def matching_rows(self, texts: PackedTexts, states: Tensor, negatives: HardNegatives | None) -> MatchingRows:
        """Pairs to match: own pairs, then (text, its negative image), then (negative text, own image).

        On several ranks a text travels to the rank that holds its negative image, never an image: its keys and values
        are projected where it is, once. A rank then has more or fewer than 3B rows; the loss is a mean over all.

        Args:
            texts: own texts (B).
            states: (T, D) their states from the text encoder.
            negatives: indices into the joined batch, or the own one where ranks are on their own; None: own pairs
                alone, which do not count.
        """
        number, device = len(texts), states.device
        own = torch.arange(number)
        if negatives is None:
            uncounted = torch.full((number,), -100, device=device)
            return MatchingRows(states, texts, own, own, uncounted)
        image_index, text_index = torch.stack([negatives.image_index, negatives.text_index]).cpu()
        if not self.joined():
            source = torch.cat([own, own, text_index])
            image = torch.cat([own, image_index, own])
        else:
            sizes = batch_sizes(number, device)
            offset = offset_of(sizes)
            states = gather(states)
            counts = gather(texts.counts.to(device)).cpu()
            every_image = gather(negatives.image_index).cpu()
            here = ((every_image >= offset) & (every_image < offset + number)).nonzero().flatten()
            source = torch.cat([own + offset, here, text_index])
            image = torch.cat([own, every_image[here] - offset, own])
            used, source = source.unique(return_inverse=True)
            everyone = PackedTexts.of_counts(counts, device)
            states = states.index_select(0, everyone.tokens_of(used).to(device))
            texts = everyone.select(used)
        labels = torch.zeros(len(source), dtype=torch.long, device=device)
        labels[:number] = 1
        return MatchingRows(states, texts, source, image, labels)

    def matching_logits(self, rows: MatchingRows, image_states: Tensor) -> Tensor:
        """(P, 2) of the matching head on [CLS] of each row."""
        counts = rows.texts.counts[rows.source]
        fused = self.retrieval.albef.fuse_pairs(
            rows.texts,
            rows.states,
            image_states,
            rows.image,
            source=rows.source,
            keep=counts.cumsum(0) - counts,
        )
        return self.retrieval.itm_head(fused)


def joined_texts(input_ids: Tensor, attention_mask: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor, slice]:
    """The texts of all ranks, padded to the longest of all, and which rows are own.

    Random draws made on them are those that one process would make on the joined batch.
    """
    if world()[1] == 1:
        return input_ids, attention_mask, slice(0, len(input_ids))
    everyone = exchange_integers([len(input_ids), input_ids.shape[1]], input_ids.device)
    longest = max(length for _, length in everyone)
    offset = offset_of([rows for rows, _ in everyone])
    more = (0, longest - input_ids.shape[1])
    ids = gather(F.pad(input_ids, more, value=pad_token_id))
    mask = gather(F.pad(attention_mask, more))
    return ids, mask, slice(offset, offset + len(input_ids))


def prediction_head_ties(prefix: str, embeddings: str) -> dict[str, str]:
    """`_tied_weights_keys` of a `BertLMPredictionHead` at `prefix` whose matrix is the embedding at `embeddings`."""
    return {f"{prefix}.decoder.weight": embeddings, f"{prefix}.decoder.bias": f"{prefix}.bias"}


__all__ = [
    "AlbefMomentumModel",
    "AlbefMomentumSettings",
    "Contrast",
    "MatchingRows",
    "joined_texts",
    "prediction_head_ties",
]
