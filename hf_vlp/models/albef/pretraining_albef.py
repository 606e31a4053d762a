"""ALBEF's pretraining: image-text contrast, matching and masked language modelling with momentum distillation.

Li et al. 2021, arXiv 2107.07651, sections 3.2 and 3.3. The three terms need one pass of the text encoder (texts and
masked texts together) and one of the fusion encoder (matched, mismatched and masked rows together), in which the keys
and values of an image are projected once a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM
from transformers.models.bert.modeling_bert import BertLMPredictionHead
from transformers.utils import ModelOutput

from hf_vlp.objectives.distillation import distillation_loss
from hf_vlp.objectives.language import MaskedTokens, mask_tokens
from hf_vlp.objectives.matching import matching_loss

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefForImageTextRetrieval
from .modeling_albef_packing import PackedTexts, fusion_layouts
from .momentum_albef import (
    AlbefMomentumModel,
    AlbefMomentumSettings,
    Contrast,
    MatchingRows,
    joined_texts,
    prediction_head_ties,
)


@dataclass
class AlbefForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss: sum of the terms; its mean over ranks is the loss of the joined batch.
        loss_itc: image-text contrast, mean of the two directions. A term is absent when it is not trained.
        loss_itm: matching of pairs and negatives.
        loss_mlm: masked language modelling.
        alpha: weight of momentum distillation in this step.
        temperature: detached.
        image_embeds: (B, K, width) image tokens.
        contrast: features, similarities and targets of the contrast.
        weights_i2t: (B, G) weights with which negative texts were drawn.
        weights_t2i: (B, G) the same for images.
        itm_logits: (P, 2) of matched pairs, then (text, negative image), then (negative text, image).
        itm_labels: (P,).
        masked_input_ids: (B, L).
        mlm_labels: (B, L), -100 where nothing was masked.
        mlm_logits: (M, vocabulary) at the masked positions, text by text.
        mlm_logits_m: the same of the twin; absent when alpha is 0.
    """

    loss: Tensor | None = None
    loss_itc: Tensor | None = None
    loss_itm: Tensor | None = None
    loss_mlm: Tensor | None = None
    alpha: float | None = None
    temperature: Tensor | None = None
    image_embeds: Tensor | None = None
    contrast: Contrast | None = None
    weights_i2t: Tensor | None = None
    weights_t2i: Tensor | None = None
    itm_logits: Tensor | None = None
    itm_labels: Tensor | None = None
    masked_input_ids: Tensor | None = None
    mlm_labels: Tensor | None = None
    mlm_logits: Tensor | None = None
    mlm_logits_m: Tensor | None = None


class AlbefForPreTraining(AlbefMomentumModel):
    """ITC + ITM + MLM with momentum distillation.

    Holds the inference model `retrieval`, the MLM head (tied to the word embeddings), the momentum twin and the queue.

    A training step, in the original's order: clamp the temperature, online features, the twin follows, its features,
    contrast, enqueue, matching, masked language modelling.

    Example:
        model = AlbefForPreTraining.from_vision_text_pretrained("google/vit-base-patch16-224", "bert-base-uncased")
        loss = model(**collator(rows)).loss
        model.export("my-albef")  # opens as AlbefForImageTextRetrieval
    """

    terms = ("itc", "itm", "mlm")
    _tied_weights_keys = {
        **prediction_head_ties("mlm_head", "retrieval.albef.text_model.embeddings.word_embeddings.weight"),
        **prediction_head_ties("momentum.mlm_head", "momentum.albef.text_model.embeddings.word_embeddings.weight"),
    }

    def __init__(
        self, config: AlbefConfig, retrieval: AlbefForImageTextRetrieval | None = None, **settings: Any
    ) -> None:
        """
        Args:
            config: of the inference model; a `pretraining` entry holds settings that `settings` overrides.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `AlbefMomentumSettings`.
        """
        super().__init__(config, retrieval, **settings)
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.reset_momentum()

    def _add_heads(self, config: AlbefConfig) -> None:
        self.mlm_head = BertLMPredictionHead(config.text_config)

    def _followed(self) -> nn.ModuleDict:
        followed = super()._followed()
        followed["mlm_head"] = self.mlm_head
        return followed

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        *,
        tokenizer: Any = None,
        fusion_layer: int | None = None,
        image_size: int | None = None,
        projection_dim: int = 256,
        **settings: Any,
    ) -> "AlbefForPreTraining":
        """Starts from a ViT and a BERT with its MLM head, as the paper does (section 3.1).

        Args:
            vision_model_name_or_path: see `AlbefPreTrainedModel.from_vision_text_pretrained`.
            text_model_name_or_path: a BERT; its MLM head is taken over if the checkpoint has one.
            tokenizer: of this BERT; tells the ids of the special tokens.
            fusion_layer: first layer with cross-attention; default: half of the layers.
            image_size: in pixels; default: the vision model's.
            projection_dim: width of the contrastive space.
            settings: fields of `AlbefMomentumSettings`.
        """
        retrieval = AlbefForImageTextRetrieval.from_vision_text_pretrained(
            vision_model_name_or_path,
            text_model_name_or_path,
            fusion_layer=fusion_layer,
            image_size=image_size,
            projection_dim=projection_dim,
        )
        if tokenizer is not None:
            retrieval.config.use_tokenizer(tokenizer)
        model = cls(retrieval.config, retrieval=retrieval, **settings)
        masked, information = AutoModelForMaskedLM.from_pretrained(
            text_model_name_or_path, dtype=torch.float32, output_loading_info=True
        )
        if not any(name.startswith("cls.") for name in information["missing_keys"]):
            model._load_head(masked.cls.predictions.state_dict())
        model.tie_weights()
        model.reset_momentum()
        return model

    def _load_head(self, state: Mapping[str, Tensor]) -> None:
        own = {name: value for name, value in state.items() if not name.startswith("decoder.")}
        self.mlm_head.load_state_dict(own, strict=False)

    def mask(
        self, input_ids: Tensor, attention_mask: Tensor, generator: torch.Generator | None = None
    ) -> MaskedTokens:
        """Masks tokens for MLM: any but padding and [CLS]; [SEP] may be masked, as in the original.

        The draws are those for the joined batch of all ranks, each rank takes its rows.
        """
        text = self.config.text_config
        if text.mask_token_id is None:
            raise ValueError(
                "config.text_config.mask_token_id is not set: call config.use_tokenizer(tokenizer) before building "
                "the model"
            )
        ids, mask, own = joined_texts(input_ids, attention_mask, text.pad_token_id or 0)
        masked = mask_tokens(
            ids,
            mask_token_id=text.mask_token_id,
            vocab_size=text.vocab_size,
            special_mask=(mask == 0) | (ids == ids[:, :1]),
            probability=self.settings.mlm_probability,
            generator=generator,
        )
        length = input_ids.shape[1]
        return MaskedTokens(masked.input_ids[own, :length], masked.labels[own, :length])

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        alpha: float | None = None,
        masked_tokens: MaskedTokens | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
    ) -> AlbefForPreTrainingOutput:
        """One step.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids: (B, L), starting with [CLS].
            attention_mask: (B, L), non-zero at tokens.
            image_ids: (B,) pairs of one id are never each other's negatives in matching. The contrast takes the own
                pair alone as positive, as the original; its soft targets are there for the others.
            alpha: weight of distillation; default: by `settings` and the number of steps made.
            masked_tokens: ids and labels (B, L) instead of drawn ones.
            negatives: (negative image of each text, negative text of each image) instead of drawn ones.
            generator: source of all draws, in the same state on all ranks.
            return_loss: only tells `Trainer` that a loss comes without labels.
        """
        if self.training:
            self.clamp_temperature()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        alpha = self.current_alpha() if alpha is None else alpha
        wanted = self.settings.objectives
        text_model = self.retrieval.albef.text_model
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        if pixel_values.shape[0] != len(texts):
            raise ValueError(f"there are {pixel_values.shape[0]} images for {len(texts)} texts: pass pairs")
        masked = labels = masked_states = None
        both = texts
        if "mlm" in wanted:
            if masked_tokens is None:
                masked_tokens = self.mask(input_ids, attention_mask, generator)
            masked, labels = self._pack_masked(texts, attention_mask, masked_tokens)
            both = PackedTexts.join(texts, masked)
        image_states = self.retrieval.albef.encode_images(pixel_values)
        states = text_model.encode(both)
        if masked is not None:
            states, masked_states = states.chunk(2)
        first = states.index_select(0, texts.first.to(states.device))
        features = self.retrieval.project_image(image_states), self.retrieval.project_text(first)
        if self.training:
            self.follow()
        twin = self._momentum_states(pixel_values, texts, None if masked is None else both, alpha)
        image_states_m, first_m, masked_states_m = twin
        contrast = self.contrast(features, self.momentum_features(image_states_m, first_m), alpha)
        terms: dict[str, Tensor] = {"loss_itc": contrast.itc.loss} if "itc" in wanted else {}
        drawn = rows = at = mlm_logits_m = None
        if "itm" in wanted:
            drawn = self.draw_negatives(contrast.itc, image_ids, generator, negatives)
            rows = self.matching_rows(texts, states, drawn)
        if masked is not None:
            at = (labels != -100).nonzero().flatten().cpu()
        itm_logits, mlm_logits = self._fuse(rows, masked, masked_states, image_states, at)
        if rows is not None:
            terms["loss_itm"] = matching_loss(itm_logits, rows.labels)
        if masked is not None:
            if alpha > 0:
                mlm_logits_m = self._momentum_mlm(masked, masked_states_m, image_states_m, at)
            teacher = mlm_logits.detach() if mlm_logits_m is None else mlm_logits_m
            targets = labels.index_select(0, at.to(labels.device))
            terms["loss_mlm"] = distillation_loss(mlm_logits, teacher, targets, alpha)
        if self.training:
            self.steps += 1
        return AlbefForPreTrainingOutput(
            loss=sum(terms.values()),
            **terms,
            alpha=alpha,
            temperature=self.retrieval.temperature.detach(),
            image_embeds=image_states,
            contrast=contrast,
            weights_i2t=None if drawn is None else drawn.weights_i2t,
            weights_t2i=None if drawn is None else drawn.weights_t2i,
            itm_logits=itm_logits,
            itm_labels=None if rows is None else rows.labels,
            masked_input_ids=None if masked is None else masked_tokens.input_ids,
            mlm_labels=None if masked is None else masked_tokens.labels,
            mlm_logits=mlm_logits,
            mlm_logits_m=mlm_logits_m,
        )

    @staticmethod
    def _pack_masked(texts: PackedTexts, attention_mask: Tensor, masked: MaskedTokens) -> tuple[PackedTexts, Tensor]:
        """The masked texts in the places of the originals, and their labels (T,)."""
        if masked.input_ids.shape != attention_mask.shape or masked.labels.shape != attention_mask.shape:
            raise ValueError(
                f"masked_tokens have shapes {tuple(masked.input_ids.shape)} and {tuple(masked.labels.shape)}, the "
                f"texts {tuple(attention_mask.shape)}"
            )
        tokens = attention_mask.flatten().bool()
        return replace(texts, input_ids=masked.input_ids.flatten()[tokens]), masked.labels.flatten()[tokens]

    @torch.no_grad()
    def _momentum_states(
        self, pixel_values: Tensor, texts: PackedTexts, both: PackedTexts | None, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The twin's image tokens, its [CLS] states, and its states of the masked texts where alpha asks for them.

        `both`: texts, then masked texts; None without masked language modelling.
        """
        albef = self.momentum["albef"]
        image_states = albef.encode_images(pixel_values)
        if alpha <= 0 or both is None:
            return image_states, albef.text_model.encode(texts, keep=texts.first), None
        # Of the texts only [CLS] is needed, of the masked texts everything.
        tokens = int(texts.counts.sum())
        keep = torch.cat([texts.first, torch.arange(tokens, 2 * tokens)])
        states = albef.text_model.encode(both, keep=keep)
        first, masked = states.split([len(texts), tokens])
        return image_states, first, masked

    def _fuse(
        self,
        rows: MatchingRows | None,
        masked: PackedTexts | None,
        masked_states: Tensor | None,
        image_states: Tensor,
        at: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Matching logits of `rows`, and MLM logits at the tokens `at` of the masked texts, in one pass."""
        if masked is None:
            return None if rows is None else self.matching_logits(rows, image_states), None
        if rows is None:
            return None, self.mlm_head(self.retrieval.albef.fuse_pairs(masked, masked_states, image_states, keep=at))
        number, matched = len(masked), len(rows.source)
        inputs = PackedTexts.join(rows.texts, masked)
        source = torch.cat([rows.source, len(rows.texts) + torch.arange(number)])
        image = torch.cat([rows.image, torch.arange(number)])
        counts = inputs.counts[source]
        starts = counts.cumsum(0) - counts
        keep = torch.cat([starts[:matched], int(counts[:matched].sum()) + at])
        text_model = self.retrieval.albef.text_model
        layouts = fusion_layouts(inputs, text_model.config.num_fusion_layers, image, number, source=source, keep=keep)
        fused = text_model.fuse(torch.cat([rows.states, masked_states]), layouts, image_states)
        matching, predicted = fused.split([matched, len(at)])
        return self.retrieval.itm_head(matching), self.mlm_head(predicted)

    @torch.no_grad()
    def _momentum_mlm(self, masked: PackedTexts, states: Tensor, image_states: Tensor, at: Tensor) -> Tensor:
        fused = self.momentum["albef"].fuse_pairs(masked, states, image_states, keep=at)
        return self.momentum["mlm_head"](fused)

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """As the base class; MLM: ln of the vocabulary."""
        levels = super().chance_levels(batch)
        if "mlm" in self.settings.objectives:
            levels["loss_mlm"] = math.log(self.config.text_config.vocab_size)
        return levels


__all__ = ["AlbefForPreTraining", "AlbefForPreTrainingOutput", "AlbefMomentumSettings"]
