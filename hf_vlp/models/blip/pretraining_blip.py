"""BLIP's pretraining: image-text contrast, matching and language modelling on one MED (arXiv 2201.12086, section 3.2).

An image is encoded once. The texts that look at it (matched, mismatched and generated ones) go through one run, in
which its cross-attention keys and values are projected once a layer, for the tied encoder and decoder together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig
from transformers.utils import ModelOutput

from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.blip.med_blip import BlipMED
from hf_vlp.models.blip.modeling_blip import packed_language_loss
from hf_vlp.models.blip.momentum_blip import BlipMomentumModel, BlipMomentumSettings
from hf_vlp.models.blip.text_blip import Branch, image_pass, with_first, without_last
from hf_vlp.models.momentum import Contrast
from hf_vlp.objectives.matching import matching_loss


@dataclass
class BlipForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: sum of the terms; its mean over ranks is the loss of the joined batch.
        loss_itc: image-text contrast, mean of the two directions. A term is absent when it is not trained.
        loss_itm: matching of pairs and negatives.
        loss_lm: language modelling, label-smoothed.
        alpha: weight of momentum distillation in this step.
        temperature: detached.
        image_embeds: (B, K, width) image tokens.
        contrast: features, similarities and targets of the contrast.
        weights_i2t: (B, G) weights with which negative texts were drawn.
        weights_t2i: (B, G) the same for images.
        itm_logits: (P, 2) of matched pairs, then (text, negative image), then (negative text, image).
        itm_labels: (P,).
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_lm: Tensor | None = None
    alpha: float | None = None
    temperature: Tensor | None = None
    image_embeds: Tensor | None = None
    contrast: Contrast | None = None
    weights_i2t: Tensor | None = None
    weights_t2i: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None


class BlipForPreTraining(BlipMomentumModel):
    """ITC + ITM + LM with momentum distillation of ITC.

    Holds the inference model `model` (a `BlipMED`), the temperature, the momentum twin and the queue.

    A training step, in the original's order: clamp the temperature, online features, the twin follows, its features,
    contrast, enqueue, matching, language modelling.

    Example:
        model = BlipForPreTraining.from_vision_text_pretrained("google/vit-base-patch16-224", "bert-base-uncased")
        loss = model(**collator(rows)).loss
        model.export("my-blip")  # opens as transformers.BlipForImageTextRetrieval, …ConditionalGeneration, …
    """

    terms = ("itc", "itm", "lm")
    _model_class = BlipMED
    # Added to the softmax in pretraining alone.
    _negative_epsilon = 1e-4

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        tokenizer: Any = None,
        image_size: int | None = None,
        image_text_hidden_size: int = 256,
        **settings: Any,
    ) -> "BlipForPreTraining":
        """Starts from a ViT and a BERT, as the paper does (section 4.1); see `BlipMED.from_vision_text_pretrained`.

        Args:
            settings: fields of `BlipMomentumSettings`.
        """
        model = BlipMED.from_vision_text_pretrained(
            vision_model_name_or_path,
            text_model_name_or_path,
            tokenizer=tokenizer,
            image_size=image_size,
            image_text_hidden_size=image_text_hidden_size,
        )
        return cls.from_inference_model(model, **settings)

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
    ) -> BlipForPreTrainingOutput:
        """One step.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids: (B, L) as the tokenizer gives them, [CLS] first: the first token is replaced by [ENC] for
                matching and by [DEC] for language modelling.
            attention_mask: (B, L), non-zero at tokens.
            image_ids: (B,) pairs of one id are never each other's negatives in matching.
            alpha: weight of distillation; default: by `settings` and the number of steps made.
            negatives: (negative image of each text, negative text of each image) instead of drawn ones.
            generator: source of the draws, in the same state on all ranks.
            return_loss: only tells `Trainer` that a loss comes without labels.
        """
        if self.training:
            self.clamp_temperature()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        alpha = self.current_alpha() if alpha is None else alpha
        wanted = self.settings.objectives
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        image_states, features = self.online_features(pixel_values, texts)
        if self.training:
            self.follow()
        contrast = self.contrast(features, self.momentum_features(pixel_values, texts), alpha)
        terms: dict[str, Tensor] = {"loss_itc": contrast.itc.loss} if "itc" in wanted else {}
        branches: list[Branch] = []
        drawn = rows = itm_logits = next_tokens = None
        if "itm" in wanted:
            drawn = self.draw_negatives(contrast.itc, image_ids, generator, negatives)
            rows = self.matching_rows(texts, image_states, (input_ids, attention_mask), drawn)
            branches.append(self.matching_branch(rows))
        if "lm" in wanted:
            inputs, next_tokens = without_last(texts)
            inputs = with_first(inputs, self.model.dec_token_id)
            branches.append(Branch(self.model.text_decoder.bert, inputs, torch.arange(len(inputs)), causal=True))
        states = list(image_pass(branches, image_states)) if branches else []
        if rows is not None:
            itm_logits = self.model.itm_head(states.pop(0))
            terms["loss_itm"] = matching_loss(itm_logits, rows.labels)
        if next_tokens is not None:
            smoothing = self.settings.label_smoothing
            terms["loss_lm"] = packed_language_loss(self.model.text_decoder, states.pop(0), next_tokens, smoothing)
        if self.training:
            self.steps += 1
        return BlipForPreTrainingOutput(
            loss=sum(terms.values()),
            **terms,
            alpha=alpha,
            temperature=self.temperature.detach(),
            image_embeds=image_states,
            contrast=contrast,
            weights_i2t=None if drawn is None else drawn.weights_i2t,
            weights_t2i=None if drawn is None else drawn.weights_t2i,
            itm_logits=itm_logits,
            itm_labels=None if rows is None else rows.labels,
        )

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """As the base class; LM: ln of the vocabulary."""
        levels = super().chance_levels(batch)
        if "lm" in self.settings.objectives:
            levels["loss_lm"] = math.log(self.config.text_config.vocab_size)
        return levels


__all__ = ["BlipConfig", "BlipForPreTraining", "BlipForPreTrainingOutput", "BlipMomentumSettings"]
