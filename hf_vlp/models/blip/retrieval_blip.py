"""Fine-tuning BLIP for retrieval: ITC with image ids and ITM (arXiv 2201.12086, section 5.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.blip.momentum_blip import BlipMomentumModel
from hf_vlp.models.blip.text_blip import image_pass
from hf_vlp.models.momentum import Contrast, check_extras
from hf_vlp.objectives.distributed import batch_sizes, gather, offset_of, world
from hf_vlp.objectives.matching import HardNegatives, matching_loss
from hf_vlp.objectives.precision import full_precision, without_autocast


@dataclass
class BlipRetrievalOutput(ModelOutput):
    """
    Args:
        loss: sum of the terms.
        loss_itc: image-text contrast with all texts of an image as its positives. A term is absent when it is not
            trained.
        loss_itm: matching of pairs and hard negatives.
        alpha: weight of momentum distillation.
        temperature: detached.
        contrast: features, similarities and targets.
        similarities: (B, G) of own images with the texts that negatives are drawn from, over the temperature, and of
            own texts with the images.
        weights_i2t: (B, G) weights with which negative texts were drawn.
        weights_t2i: (B, G) the same for images.
        itm_logits: (P, 2), see `BlipMomentumModel.matching_rows`.
        itm_labels: (P,).
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    alpha: float | None = None
    temperature: Tensor | None = None
    contrast: Contrast | None = None
    similarities: tuple[Tensor, Tensor] | None = None
    weights_i2t: Tensor | None = None
    weights_t2i: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None


class BlipForRetrievalFineTuning(BlipMomentumModel):
    """ITC and ITM on a captioning data set: all texts of an image, also in the queue, are its positives.

    Negatives of matching are drawn by the similarity of the online features, over all ranks.
    """

    _with_ids = True
    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True, "momentum": False}}

    def pretraining_extras(self) -> dict[str, Tensor]:
        """Nothing: twin and queue are of no use once the task is learnt."""
        return {}

    def load_extras(self, state: Mapping[str, Tensor]) -> None:
        """Takes twin, queue and temperature of a pretraining, as the original does; its queue knows no image ids.

        Steps are counted anew: `alpha` warms up again.

        Raises:
            ValueError: the side file is of another model or of other settings.
        """
        parts = ("momentum.", "queue.", "temperature")
        own = {name: value for name, value in self.state_dict().items() if name.startswith(parts)}
        known = {name: value for name, value in state.items() if name in own}
        check_extras(own, known, optional={"queue.ids"})
        self.load_state_dict(known, strict=False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
    ) -> BlipRetrievalOutput:
        """One step.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids: (B, L), starting with [CLS].
            attention_mask: (B, L).
            image_ids: (B,) which image each pair is of.
            alpha: weight of distillation; default: by `settings` and the number of steps made.
            negatives: (negative image of each text, negative text of each image) instead of drawn ones.
            generator: source of the draws, in the same state on all ranks.
            return_loss: only tells `Trainer` that a loss comes without labels.

        Raises:
            ValueError: image ids are missing.
        """
        if image_ids is None:
            raise ValueError(
                "image_ids are missing: retrieval fine-tuning needs to know which texts belong to one image "
                "(the column image_id of the data)"
            )
        if self.training:
            self.clamp_temperature()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        alpha = self.current_alpha() if alpha is None else alpha
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        image_states, features = self.online_features(pixel_values, texts)
        if self.training:
            self.follow()
        contrast = self.contrast(features, self.momentum_features(pixel_values, texts), alpha, image_ids)
        wanted = self.settings.objectives
        terms: dict[str, Tensor] = {"loss_itc": contrast.itc.loss} if "itc" in wanted else {}
        drawn = rows = itm_logits = similarities = None
        if "itm" in wanted:
            image_gather = not self.joined() and self.settings.negative_all_rank and world()[1] > 1
            similarities, drawn = self.draw_by_features(features, image_ids, generator, negatives, image_gather)
            rows = self.matching_rows(texts, image_states, (input_ids, attention_mask), drawn, image_gather)
            (first,) = image_pass([self.matching_branch(rows)], rows.image_states)
            itm_logits = self.model.itm_head(first)
            terms["loss_itm"] = matching_loss(itm_logits, rows.labels)
        if self.training:
            self.steps += 1
        return BlipRetrievalOutput(
            loss=sum(terms.values()),
            **terms,
            alpha=alpha,
            temperature=self.temperature.detach(),
            contrast=contrast,
            similarities=similarities,
            weights_i2t=None if drawn is None else drawn.weights_i2t,
            weights_t2i=None if drawn is None else drawn.weights_t2i,
            itm_logits=itm_logits,
            itm_labels=None if rows is None else rows.labels,
        )

    @torch.no_grad()
    def draw_by_features(
        self,
        features: tuple[Tensor, Tensor],
        image_ids: Tensor,
        generator: torch.Generator | None,
        given: tuple[Tensor, Tensor] | None,
        image_gather: bool,
    ) -> tuple[tuple[Tensor, Tensor], HardNegatives | None]:
        """Similarities of the online features, and negatives drawn by their softmax with true pairs set to 0."""
        image, text = (full_precision(one) for one in features)
        every = self.joined() or image_gather
        with without_autocast(image.device):
            all_image, all_text = (gather(one) for one in (image, text)) if every else (image, text)
            similarities = image @ all_text.t() / self.temperature, text @ all_image.t() / self.temperature
        drawn = self.drawn_by(
            similarities,
            image_ids,
            generator,
            given,
            offset=offset_of(batch_sizes(len(image), image.device)) if every else 0,
            gathered=every,
        )
        return similarities, drawn


__all__ = ["BlipForRetrievalFineTuning", "BlipRetrievalOutput"]
