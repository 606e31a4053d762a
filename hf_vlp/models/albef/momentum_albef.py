"""What ALBEF's training objectives share: momentum twins, contrast with a queue, hard negatives (arXiv 2107.07651)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.pretraining import EXTRAS_FILE, PreTrainingMixin
from hf_vlp.nn.momentum import momentum_twin, update_twin
from hf_vlp.nn.queue import FeatureQueue
from hf_vlp.objectives.contrastive import ContrastiveOutput, contrastive_loss
from hf_vlp.objectives.distillation import distilled_targets
from hf_vlp.objectives.distributed import batch_sizes, exchange_integers, gather, offset_of, world
from hf_vlp.objectives.matching import HardNegatives, NoNegativesError, hard_negatives
from hf_vlp.objectives.precision import full_precision, without_autocast

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefForImageTextRetrieval, AlbefPreTrainedModel, unit_vectors
from .modeling_albef_packing import PackedTexts


@dataclass
class MomentumSettings:
    """How the objectives are computed; kept in the checkpoint's config under `pretraining`.

    Attributes:
        queue_size: pairs in the queue of momentum features.
        momentum: share of itself that a twin keeps in a step.
        alpha: weight of the twin's opinion in the targets once warmed up.
        alpha_warmup_steps: training steps over which `alpha` grows linearly from 0; the paper's first epoch.
        mlm_probability: share of tokens that are masked.
        distill: whether the twin's opinion enters the targets at all.
        across_ranks: `"joined"`: keys and negatives are those of all ranks, and loss and gradient those of one
            process with the joined batch. `"local"`: each rank contrasts and matches within its own batch, as the
            original does; the queue is shared in both.
        negatives: `"hard"`: negatives of matching are drawn by similarity (section 3.2); `"random"`: all alike, the
            ablation of the paper's table 1.
        objectives: which of `"itc"`, `"itm"`, `"mlm"` make up the loss; retrieval fine-tuning has the first two.
    """

    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_warmup_steps: int = 0
    mlm_probability: float = 0.15
    distill: bool = True
    across_ranks: Literal["joined", "local"] = "joined"
    negatives: Literal["hard", "random"] = "hard"
    objectives: tuple[str, ...] = ("itc", "itm", "mlm")

    def __post_init__(self) -> None:
        self.objectives = tuple(self.objectives)
        unknown = set(self.objectives) - {"itc", "itm", "mlm"}
        if unknown or not self.objectives:
            raise ValueError(f"objectives must be some of 'itc', 'itm', 'mlm', not {self.objectives}")
        if self.negatives not in ("hard", "random"):
            raise ValueError(f"negatives must be 'hard' or 'random', not {self.negatives!r}")
        for name in ("momentum", "alpha", "mlm_probability"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], but is {getattr(self, name)}")
        if self.across_ranks not in ("joined", "local"):
            raise ValueError(f"across_ranks must be 'joined' or 'local', not {self.across_ranks!r}")


class Contrast(NamedTuple):
    """Features and similarities of a step.

    Attributes:
        itc: loss and logits; image-text contrast of own rows against momentum keys.
        image_features: (B, D) of the online encoder.
        text_features: (B, D).
        image_features_m: (B, D) of the momentum twin.
        text_features_m: (B, D).
        targets: (B, keys) for image-to-text and text-to-image.
        hard_targets: (B, keys).
    """

    itc: ContrastiveOutput
    image_features: Tensor
    text_features: Tensor
    image_features_m: Tensor
    text_features_m: Tensor
    targets: tuple[Tensor, Tensor]
    hard_targets: Tensor


class MatchingRows(NamedTuple):
    """The rows of the fusion encoder that the matching loss needs.

    Attributes:
        states: (T, D) text states that come in.
        texts: which texts they are of.
        source: (P,) CPU, text of each row.
        image: (P,) CPU, own image of each row.
        labels: (P,) 1 for matched rows, which come first.
    """

    states: Tensor
    texts: PackedTexts
    source: Tensor
    image: Tensor
    labels: Tensor


class AlbefMomentumModel(PreTrainingMixin, AlbefPreTrainedModel):
    """A retrieval model with its momentum twin and queue; base of pretraining and of retrieval fine-tuning.

    The twin follows in every training step, before its features are computed; the queue takes the features of all
    ranks after the contrast. Neither moves in eval mode.
    """

    inference_attribute = "retrieval"
    base_model_prefix = ""
    _auto_class = None
    # What keyword arguments of the constructors may set.
    settings_class: ClassVar[type] = MomentumSettings
    # Whether the queue keeps image ids.
    _with_ids: ClassVar[bool] = False
    # Fields that differ from `MomentumSettings` by default.
    _defaults: ClassVar[dict[str, Any]] = {}
    stages: ClassVar[dict[str, dict[str, bool]]] = {"pretrain": {"": True, "momentum": False}}

    def __init__(
        self, config: AlbefConfig, retrieval: AlbefForImageTextRetrieval | None = None, **settings: Any
    ) -> None:
        """
        Args:
            config: of the inference model; its `pretraining` entry holds settings that `settings` overrides.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `MomentumSettings`.
        """
        own = type(config).from_dict(config.to_dict())
        stored = getattr(own, "pretraining", None) or {}
        known = {name: value for name, value in stored.items() if name in MomentumSettings.__dataclass_fields__}
        self_settings = MomentumSettings(**{**self._defaults, **known, **settings})
        own.pretraining = asdict(self_settings)
        super().__init__(own)
        self.settings = self_settings
        inner = type(config).from_dict(config.to_dict())
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

    def reset_momentum(self) -> None:
        """Sets the twin to the trained weights, as at the start of a training."""
        update_twin(self.momentum, self._followed(), 0.0)

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
            kwargs: fields of `MomentumSettings`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given, as optimisers need full-precision weights.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in MomentumSettings.__dataclass_fields__}
        image_size = kwargs.pop("image_size", None)
        kwargs.setdefault("dtype", torch.float32)
        config = kwargs.pop("config", None) or AlbefConfig.from_pretrained(pretrained_model_name_or_path)
        if cls.__name__ in (config.architectures or []):
            model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
        else:
            retrieval = AlbefForImageTextRetrieval.from_pretrained(
                pretrained_model_name_or_path, *args, config=config, **kwargs
            )
            extras = Path(pretrained_model_name_or_path) / EXTRAS_FILE
            state = load_file(extras) if extras.is_file() else {}
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
        own = self.pretraining_extras()
        wrong = [name for name in state if name not in own or own[name].shape != state[name].shape]
        lacking = sorted(set(own) - set(state))
        if wrong or lacking:
            raise ValueError(f"{EXTRAS_FILE} does not fit: it has {wrong[:3]} and lacks {lacking[:3]}")
        self.load_state_dict(dict(state), strict=False)

    @property
    def albef_model(self) -> Any:
        return self.retrieval.albef

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embeddings of the model and of its twin."""
        self.retrieval.set_image_size(image_size)
        self.config.vision_config.image_size = image_size
        self.momentum["albef"].set_image_size(image_size)

    def current_alpha(self) -> float:
        """Weight of the twin's opinion at this step: 0 at the first one, `alpha` after the warm-up."""
        if not self.settings.distill:
            return 0.0
        warmup = self.settings.alpha_warmup_steps
        share = 1.0 if not warmup else min(1.0, int(self.steps) / warmup)
        return self.settings.alpha * share

    def joined(self) -> bool:
        """Whether keys and negatives come from several ranks."""
        return self.settings.across_ranks == "joined" and world()[1] > 1

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the twin; once a training step, before its features are computed."""
        update_twin(self.momentum, self._followed(), self.settings.momentum)

    @torch.no_grad()
    def momentum_features(self, image_states: Tensor, first_states: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised features of the twin from its image tokens (B, K, width) and its [CLS] states (B, hidden)."""
        image = unit_vectors(self.momentum["vision_projection"](image_states[:, 0]))
        return image, unit_vectors(self.momentum["text_projection"](first_states))

    def contrast(
        self,
        features: tuple[Tensor, Tensor],
        features_m: tuple[Tensor, Tensor],
        alpha: float,
        image_ids: Tensor | None = None,
    ) -> Contrast:
        """Image-text contrast against momentum keys (equations 1, 2 and 6), and the queue's move.

        Args:
            features: (B, D) of images and of texts, online.
            features_m: the same of the twin.
            alpha: weight of the twin's similarities in the targets.
            image_ids: (B,) equal ids, also in the queue, are positives of each other; None: the own pair alone.
        """
        image, text = features
        image_m, text_m = features_m
        scale = 1 / self.retrieval.temperature
        local = not self.joined()
        all_image_m, all_text_m = (image_m, text_m) if local else (gather(image_m), gather(text_m))
        offset = 0 if local else offset_of(batch_sizes(len(image), image.device))
        image_keys = torch.cat([all_image_m, self.queue.image_embeds])
        text_keys = torch.cat([all_text_m, self.queue.text_embeds])
        rows = torch.arange(len(image), device=image.device)
        if image_ids is None:
            hard = full_precision(F.one_hot(rows + offset, len(text_keys)).to(image.dtype))
        else:
            every = image_ids if local else gather(image_ids)
            equal = image_ids[:, None] == torch.cat([every, self.queue.image_ids])[None, :]
            hard = full_precision(equal.to(image.dtype)) / equal.sum(dim=1, keepdim=True)
        targets = (hard, hard)
        if alpha > 0:
            with torch.no_grad(), without_autocast(image.device):
                towards_texts = full_precision(image_m) @ full_precision(text_keys).t() * scale
                towards_images = full_precision(text_m) @ full_precision(image_keys).t() * scale
            targets = (distilled_targets(towards_texts, hard, alpha), distilled_targets(towards_images, hard, alpha))
        itc = contrastive_loss(
            image,
            text,
            scale,
            gather_keys="local" if local else "detached",
            queue=self.queue,
            soft_targets=targets,
            image_keys=image_m,
            text_keys=text_m,
        )
        if self.training:
            self.queue.enqueue(image_m, text_m, image_ids if self._with_ids else None)
        return Contrast(itc, image, text, image_m, text_m, targets, hard)

    def draw_negatives(
        self,
        itc: ContrastiveOutput,
        image_ids: Tensor | None,
        generator: torch.Generator | None,
        given: tuple[Tensor, Tensor] | None,
    ) -> HardNegatives | None:
        """Negatives of own pairs (section 3.2); None for a joined batch in which nothing can be mismatched.

        The weights are the softmax over this step's keys (online queries, momentum keys) with true pairs set to 0;
        of random negatives, equal ones.
        """
        ids = None
        similarities = itc.logits_per_image, itc.logits_per_text
        if self.settings.negatives == "random":
            similarities = tuple(torch.zeros_like(logits) for logits in similarities)
        if image_ids is not None and self.joined():
            ids = gather(image_ids)
        try:
            return hard_negatives(
                *similarities,
                offset=itc.offset if self.joined() else 0,
                image_ids=image_ids,
                gathered_ids=ids if self.joined() else image_ids,
                generator=generator,
                softmax_over_positives=True,
                image_index=None if given is None else given[0],
                text_index=None if given is None else given[1],
            )
        except NoNegativesError:
            return None

    def matching_rows(self, texts: PackedTexts, states: Tensor, negatives: HardNegatives | None) -> MatchingRows:
        """Pairs to match: own pairs, then (text, its negative image), then (negative text, own image).

        On several ranks a text travels to the rank that holds its negative image, never an image: its keys and values
        are projected where it is, once. A rank then has more or fewer than 3B rows; the loss is a mean over all.

        Args:
            texts: own texts (B).
            states: (T, D) their states from the text encoder.
            negatives: indices into the joined batch, or the own one where ranks are on their own.
        """
        number, device = len(texts), states.device
        own = torch.arange(number)
        if negatives is None:
            return MatchingRows(states, texts, own, own, torch.ones(number, dtype=torch.long, device=device))
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

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """Contrast: ln of the number of keys. Matching: the entropy of one match in three, 0.637."""
        ranks = world()[1] if self.settings.across_ranks == "joined" else 1
        keys = len(batch["input_ids"]) * ranks + len(self.queue)
        third = torch.tensor([1 / 3, 2 / 3])
        levels = {
            "loss_itc": float(torch.tensor(float(keys)).log()),
            "loss_itm": float(-(third * third.log()).sum()),
        }
        return {name: level for name, level in levels.items() if name[5:] in self.settings.objectives}


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
    "Contrast",
    "MatchingRows",
    "MomentumSettings",
    "joined_texts",
    "prediction_head_ties",
]
