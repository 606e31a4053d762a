"""What training with a momentum twin and a queue is in ALBEF (arXiv 2107.07651) and BLIP (2201.12086) alike."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_vlp.nn.momentum import update_twin
from hf_vlp.nn.queue import FeatureQueue
from hf_vlp.objectives.contrastive import ContrastiveOutput, contrastive_loss
from hf_vlp.objectives.distillation import distilled_targets
from hf_vlp.objectives.distributed import batch_sizes, gather, offset_of, world
from hf_vlp.objectives.matching import HardNegatives, NoNegativesError, hard_negatives
from hf_vlp.objectives.precision import full_precision, without_autocast


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


class MomentumContrastMixin:
    """Contrast with momentum keys, hard negatives and the schedule of distillation.

    Attributes:
        settings: has `momentum`, `alpha`, `alpha_warmup_steps`, `distill`, `across_ranks`, `negatives`, `objectives`.
        momentum: the twin.
        queue: of the twin's features.
        steps: training steps made.
    """

    settings: Any
    momentum: nn.Module
    queue: FeatureQueue
    steps: Tensor
    # Whether the queue keeps image ids.
    _with_ids: ClassVar[bool] = False
    # Added to the weights that negatives are drawn with.
    _negative_epsilon: ClassVar[float] = 0.0

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


__all__ = ["Contrast", "MomentumContrastMixin"]
