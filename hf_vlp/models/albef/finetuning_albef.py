"""Fine-tuning ALBEF on its tasks with momentum distillation (arXiv 2107.07651, section 3.5 and appendix).

Each class holds the inference model of its task and what only training needs; `export` writes the inference model.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from hf_vlp.objectives.matching import matching_loss

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefForImageTextRetrieval
from .modeling_albef_packing import PackedTexts
from .momentum_albef import AlbefMomentumModel, Contrast


@dataclass
class AlbefRetrievalOutput(ModelOutput):
    """
    Args:
        loss: sum of the terms.
        loss_itc: image-text contrast with all texts of an image as its positives.
        loss_itm: matching of pairs and hard negatives.
        alpha: weight of momentum distillation.
        temperature: detached.
        contrast: features, similarities and targets.
        weights_i2t: (B, G) weights with which negative texts were drawn.
        weights_t2i: (B, G) the same for images.
        itm_logits: (P, 2), see `AlbefMomentumModel.matching_rows`.
        itm_labels: (P,).
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    alpha: float | None = None
    temperature: Tensor | None = None
    contrast: Contrast | None = None
    weights_i2t: Tensor | None = None
    weights_t2i: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None


class AlbefForRetrievalFineTuning(AlbefMomentumModel):
    """ITC and ITM on a captioning data set: all texts of an image, also in the queue, are its positives.

    As in the original, the temperature is not clamped here.
    """

    _with_ids = True
    _defaults: ClassVar[dict[str, Any]] = {"queue_size": 65536}
    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True, "momentum": False}}

    def __init__(
        self, config: AlbefConfig, retrieval: AlbefForImageTextRetrieval | None = None, **settings: Any
    ) -> None:
        """
        Args:
            config: of the inference model.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `MomentumSettings`.
        """
        super().__init__(config, retrieval, **settings)
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.reset_momentum()

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
    ) -> AlbefRetrievalOutput:
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
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        if pixel_values.shape[0] != len(texts):
            raise ValueError(f"there are {pixel_values.shape[0]} images for {len(texts)} texts: pass pairs")
        albef = self.retrieval.albef
        image_states = albef.encode_images(pixel_values)
        states = albef.text_model.encode(texts)
        first = states.index_select(0, texts.first.to(states.device))
        features = self.retrieval.project_image(image_states), self.retrieval.project_text(first)
        if self.training:
            self.follow()
        with torch.no_grad():
            twin = self.momentum["albef"]
            image_states_m = twin.encode_images(pixel_values)
            first_m = twin.text_model.encode(texts, keep=texts.first)
        if not self.settings.distill:
            alpha = 0.0
        alpha = self.current_alpha() if alpha is None else alpha
        contrast = self.contrast(features, self.momentum_features(image_states_m, first_m), alpha, image_ids)
        drawn = self.draw_negatives(contrast.itc, image_ids, generator, negatives)
        rows = self.matching_rows(texts, states, drawn)
        counts = rows.texts.counts[rows.source]
        fused = albef.fuse_pairs(
            rows.texts,
            rows.states,
            image_states,
            rows.image,
            source=rows.source,
            keep=counts.cumsum(0) - counts,
        )
        itm_logits = self.retrieval.itm_head(fused)
        loss_itm = matching_loss(itm_logits, rows.labels if drawn is not None else rows.labels.fill_(-100))
        loss_itc = contrast.itc.loss
        if self.training:
            self.steps += 1
        return AlbefRetrievalOutput(
            loss=loss_itc + loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            alpha=alpha,
            temperature=self.retrieval.temperature.detach(),
            contrast=contrast,
            weights_i2t=None if drawn is None else drawn.weights_i2t,
            weights_t2i=None if drawn is None else drawn.weights_t2i,
            itm_logits=itm_logits,
            itm_labels=rows.labels,
        )
