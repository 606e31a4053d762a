"""What training with a momentum twin and a queue is in ALBEF (arXiv 2107.07651) and BLIP (2201.12086) alike."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.models.pretraining import EXTRAS_FILE
from hf_vlp.nn.momentum import update_twin
from hf_vlp.nn.queue import FeatureQueue
from hf_vlp.objectives.contrastive import ContrastiveOutput, contrastive_loss
from hf_vlp.objectives.distillation import distilled_targets
from hf_vlp.objectives.distributed import batch_sizes, gather, offset_of, world
from hf_vlp.objectives.matching import HardNegatives, NoNegativesError, hard_negatives
from hf_vlp.objectives.precision import full_precision, without_autocast

# Bounds of the temperature (the originals clamp it at the start of a step).
TEMPERATURE_RANGE = (0.001, 0.5)


@dataclass
class TwinSettings:
    """How a momentum twin follows and is listened to.

    Attributes:
        momentum: share of itself that the twin keeps in a step.
        alpha: weight of the twin's opinion in the targets once warmed up.
        alpha_warmup_steps: training steps over which `alpha` grows linearly from 0.
        distill: whether the twin's opinion enters the targets at all.

    Raises:
        ValueError: a value out of range.
    """

    momentum: float = 0.995
    alpha: float = 0.4
    alpha_warmup_steps: int = 0
    distill: bool = True
    # Fields that are shares.
    _shares: ClassVar[tuple[str, ...]] = ("momentum", "alpha")

    def __post_init__(self) -> None:
        for name in self._shares:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], but is {getattr(self, name)}")

    def alpha_at(self, step: int) -> float:
        """Weight of the twin's opinion after `step` steps: 0 at first, `alpha` after the warm-up."""
        if not self.distill:
            return 0.0
        return self.alpha * (min(1.0, step / self.alpha_warmup_steps) if self.alpha_warmup_steps else 1.0)


@dataclass
class ContrastSettings(TwinSettings):
    """How contrast and matching are computed beside a twin.

    Attributes:
        momentum, alpha, alpha_warmup_steps, distill: see `TwinSettings`.
        queue_size: pairs in the queue of momentum features.
        across_ranks: `"joined"`: keys and negatives are those of all ranks, and loss and gradient those of one
            process with the joined batch. `"local"`: each rank contrasts and matches within its own batch, as the
            originals do; the queue is shared in both.
        negatives: `"hard"`: negatives of matching are drawn by similarity; `"random"`: all alike.
        objectives: which terms make up the loss, out of those that the class has.
    """

    queue_size: int = 65536
    across_ranks: Literal["joined", "local"] = "joined"
    negatives: Literal["hard", "random"] = "hard"
    objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.objectives = tuple(self.objectives)
        for name, known in (("negatives", ("hard", "random")), ("across_ranks", ("joined", "local"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {known[0]!r} or {known[1]!r}, not {getattr(self, name)!r}")


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


def check_extras(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], optional: Collection[str] = ()) -> None:
    """Compares the state of a training with what an export kept of one.

    Args:
        own: name -> tensor that is to be filled.
        stored: the side file's.
        optional: names that the side file may lack.

    Raises:
        ValueError: the side file is of another model or of other settings; the message names shapes.
    """
    wrong = [f"{name}, which is unknown here" for name in stored if name not in own]
    wrong += [
        f"{name} of {tuple(value.shape)}, here {tuple(own[name].shape)}"
        for name, value in stored.items()
        if name in own and own[name].shape != value.shape
    ]
    lacking = sorted(set(own) - set(stored) - set(optional))
    if wrong or lacking:
        raise ValueError(
            f"{EXTRAS_FILE} does not fit: it has {'; '.join(wrong[:3]) or 'nothing else'} and lacks {lacking[:3]}. Go "
            "on with the settings that it was written with (queue_size, …), or move it away to start with a new twin "
            "and queue"
        )


class MomentumContrastMixin:
    """Contrast with momentum keys, hard negatives and the schedule of distillation.

    Attributes:
        settings: see `ContrastSettings`.
        momentum: the twin.
        queue: of the twin's features.
        steps: training steps made.
    """

    settings: ContrastSettings
    momentum: nn.Module
    queue: FeatureQueue
    steps: Tensor
    # The terms of the loss that the class has.
    terms: ClassVar[tuple[str, ...]] = ("itc", "itm")
    # What keyword arguments of the constructors may set.
    settings_class: ClassVar[type[ContrastSettings]] = ContrastSettings
    # Whether the queue keeps image ids.
    _with_ids: ClassVar[bool] = False
    # Added to the weights that negatives are drawn with.
    _negative_epsilon: ClassVar[float] = 0.0

    @classmethod
    def chosen_settings(cls, config: Any, given: Mapping[str, Any]) -> ContrastSettings:
        """Settings from the `pretraining` entry of a config, and those that were given, which come first.

        Raises:
            ValueError: a value out of range, or objectives that the class does not have.
        """
        stored = getattr(config, "pretraining", None) or {}
        stored = {name: value for name, value in stored.items() if name in cls.settings_class.__dataclass_fields__}
        chosen = cls.settings_class(**{"objectives": cls.terms, **stored, **given})
        if not chosen.objectives or set(chosen.objectives) - set(cls.terms):
            named = ", ".join(map(repr, cls.terms))
            raise ValueError(f"objectives of {cls.__name__} must be some of {named}, not {chosen.objectives}")
        return chosen

    @property
    def temperature_parameter(self) -> Tensor:
        """The learned number that similarities are divided by."""
        raise NotImplementedError

    def _followed(self) -> nn.Module:
        """The modules that the twin follows."""
        raise NotImplementedError

    def reset_momentum(self) -> None:
        """Sets the twin to the trained weights, as at the start of a training."""
        update_twin(self.momentum, self._followed(), 0.0)

    def current_alpha(self) -> float:
        """Weight of the twin's opinion at this step."""
        return self.settings.alpha_at(int(self.steps))

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Brings the temperature back into its range, in place."""
        self.temperature_parameter.clamp_(*TEMPERATURE_RANGE)

    def joined(self) -> bool:
        """Whether keys and negatives come from several ranks."""
        return self.settings.across_ranks == "joined" and world()[1] > 1

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the twin; once a training step, before its features are computed."""
        update_twin(self.momentum, self._followed(), self.settings.momentum)

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
        scale = 1 / self.temperature_parameter
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
        return self.drawn_by(
            (itc.logits_per_image, itc.logits_per_text),
            image_ids,
            generator,
            given,
            offset=itc.offset if self.joined() else 0,
            gathered=self.joined(),
        )

    def drawn_by(
        self,
        similarities: tuple[Tensor, Tensor],
        image_ids: Tensor | None,
        generator: torch.Generator | None,
        given: tuple[Tensor, Tensor] | None,
        *,
        offset: int,
        gathered: bool,
    ) -> HardNegatives | None:
        """Negatives drawn by the softmax of similarities with true pairs set to 0; random ones by equal weights.

        Args:
            similarities: (B, G) of own images with texts, and of own texts with images, over the temperature.
            image_ids: (B,) pairs of one id are never each other's negatives.
            generator: source of the draws.
            given: (negative images, negative texts) instead of drawn ones.
            offset: column of the first own pair.
            gathered: whether the columns are those of all ranks.

        Returns:
            None where nothing can be mismatched.
        """
        if self.settings.negatives == "random":
            similarities = torch.zeros_like(similarities[0]), torch.zeros_like(similarities[1])
        ids = gather(image_ids) if gathered and image_ids is not None else image_ids
        try:
            return hard_negatives(
                *similarities,
                offset=offset,
                image_ids=image_ids,
                gathered_ids=ids,
                generator=generator,
                epsilon=self._negative_epsilon,
                softmax_over_positives=True,
                image_index=None if given is None else given[0],
                text_index=None if given is None else given[1],
            )
        except NoNegativesError:
            return None

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


__all__ = [
    "TEMPERATURE_RANGE",
    "Contrast",
    "ContrastSettings",
    "MomentumContrastMixin",
    "TwinSettings",
    "check_extras",
]
