"""Fine-tuning ALBEF on its tasks with momentum distillation (arXiv 2107.07651, section 5 and appendix).

Each class holds the inference model of its task and what only training needs; `export` writes the inference model.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from hf_vlp.models.momentum import TwinSettings, check_extras
from hf_vlp.models.pretraining import PreTrainingMixin, hub_arguments, read_extras
from hf_vlp.nn.momentum import momentum_twin, update_twin
from hf_vlp.objectives.distillation import distillation_loss
from hf_vlp.objectives.distributed import global_mean
from hf_vlp.objectives.matching import matching_loss
from hf_vlp.objectives.precision import full_precision

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefForImageTextRetrieval, AlbefModel, AlbefPreTrainedModel, unit_vectors
from .modeling_albef_packing import PackedTexts
from .modeling_albef_tasks import (
    AlbefForQuestionAnswering,
    AlbefForVisualEntailment,
    AlbefForVisualReasoning,
    check_labels,
)
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
    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True, "momentum": False}}

    def __init__(
        self, config: AlbefConfig, retrieval: AlbefForImageTextRetrieval | None = None, **settings: Any
    ) -> None:
        """
        Args:
            config: of the inference model.
            retrieval: an existing inference model; by default one is drawn from `config`.
            settings: fields of `AlbefMomentumSettings`.
        """
        super().__init__(config, retrieval, **settings)
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.reset_momentum()

    def pretraining_extras(self) -> dict[str, Tensor]:
        """Nothing: twin and queue are of no use once the task is learnt."""
        return {}

    def load_extras(self, state: Mapping[str, Tensor]) -> None:
        """Takes twin and queue of a pretraining, as the original does; its queue knows no image ids.

        Raises:
            ValueError: the side file is of another model or of other settings.
        """
        own = {name: value for name, value in self.state_dict().items() if name.startswith(("momentum.", "queue."))}
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
        alpha = self.current_alpha() if alpha is None else alpha
        contrast = self.contrast(features, self.momentum_features(image_states_m, first_m), alpha, image_ids)
        wanted = self.settings.objectives
        terms: dict[str, Tensor] = {"loss_itc": contrast.itc.loss} if "itc" in wanted else {}
        drawn = rows = itm_logits = None
        if "itm" in wanted:
            drawn = self.draw_negatives(contrast.itc, image_ids, generator, negatives)
            rows = self.matching_rows(texts, states, drawn)
            itm_logits = self.matching_logits(rows, image_states)
            terms["loss_itm"] = matching_loss(itm_logits, rows.labels)
        if self.training:
            self.steps += 1
        return AlbefRetrievalOutput(
            loss=sum(terms.values()),
            **terms,
            alpha=alpha,
            temperature=self.retrieval.temperature.detach(),
            contrast=contrast,
            weights_i2t=None if drawn is None else drawn.weights_i2t,
            weights_t2i=None if drawn is None else drawn.weights_t2i,
            itm_logits=itm_logits,
            itm_labels=None if rows is None else rows.labels,
        )


@dataclass
class AlbefClassificationOutput(ModelOutput):
    """
    Args:
        loss: scalar.
        loss_classification: the same, under the name that is logged.
        logits: (N, classes).
        logits_m: (N, classes) of the twin; absent when alpha is 0.
        alpha: weight of momentum distillation.
    """

    loss: Tensor | None = None
    loss_classification: Tensor | None = None
    logits: Tensor | None = None
    logits_m: Tensor | None = None
    alpha: float | None = None


class AlbefTaskFineTuning(PreTrainingMixin, AlbefPreTrainedModel):
    """A task's inference model with a momentum twin of all of it; base of the classes below."""

    inference_attribute = "model"
    base_model_prefix = ""
    _auto_class = None
    # What keyword arguments of the constructors may set. Without `distill` there is no twin at all.
    settings_class: ClassVar[type[TwinSettings]] = TwinSettings
    # Class of the inference model.
    task_class: ClassVar[type[AlbefPreTrainedModel]]
    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True, "momentum": False}}

    def __init__(self, config: AlbefConfig, model: AlbefPreTrainedModel | None = None, **settings: Any) -> None:
        """
        Args:
            config: of the inference model; its `pretraining` entry holds settings that `settings` overrides.
            model: an existing inference model; by default one is drawn from `config`.
            settings: fields of `TwinSettings`.
        """
        inner = copy.deepcopy(config)
        stored = getattr(inner, "pretraining", None) or {}
        if hasattr(inner, "pretraining"):
            del inner.pretraining
        network = self.task_class(inner) if model is None else model
        # The inference class may have completed its config (decoder, number of labels).
        own = copy.deepcopy(network.config)
        known = {name: value for name, value in stored.items() if name in TwinSettings.__dataclass_fields__}
        chosen = TwinSettings(**{**known, **settings})
        own.pretraining = asdict(chosen)
        super().__init__(own)
        self.settings = chosen
        self.model = network
        self.momentum = momentum_twin(network) if chosen.distill else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.reset_momentum()

    @classmethod
    def from_inference_model(cls, model: AlbefPreTrainedModel, **settings: Any) -> "AlbefTaskFineTuning":
        """Wraps an inference model, which keeps its weights; the twin starts as its copy."""
        wrapped = cls(model.config, model=model, **settings)
        wrapped.reset_momentum()
        return wrapped

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> "AlbefTaskFineTuning":
        """Continues a fine-tuning, or starts one from any ALBEF folder (see `start_task`).

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            kwargs: fields of `TwinSettings`, `image_size`, and keyword arguments of `PreTrainedModel.from_pretrained`.
                `dtype` is float32 unless given.
        """
        settings = {key: kwargs.pop(key) for key in list(kwargs) if key in TwinSettings.__dataclass_fields__}
        kwargs.setdefault("dtype", torch.float32)
        where = hub_arguments(kwargs)
        config = kwargs.pop("config", None) or AlbefConfig.from_pretrained(pretrained_model_name_or_path, **where)
        image_size = kwargs.pop("image_size", None)
        if cls.__name__ in (config.architectures or []):
            model = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **settings, **kwargs)
            if image_size is not None and image_size != model.config.vision_config.image_size:
                model.set_image_size(image_size)
            return model
        model = start_task(
            cls.task_class, pretrained_model_name_or_path, config=config, image_size=image_size, **kwargs
        )
        return cls.from_inference_model(model, **settings)

    @property
    def albef_model(self) -> Any:
        return self.model.albef

    def reset_momentum(self) -> None:
        """Sets the twin to the trained weights, as at the start of a training."""
        if self.momentum is not None:
            update_twin(self.momentum, self.model, 0.0)

    def pretraining_extras(self) -> dict[str, Tensor]:
        """Nothing: the twin is of no use once the task is learnt."""
        return {}

    def set_image_size(self, image_size: int) -> None:
        """Interpolates the position embeddings of the model and of its twin."""
        self.model.set_image_size(image_size)
        self.config.vision_config.image_size = image_size
        if self.momentum is not None:
            self.momentum.set_image_size(image_size)

    def step_alpha(self, alpha: float | None) -> float:
        """Weight of distillation in this step; moves the twin and counts the step when training."""
        if self.momentum is None:
            return 0.0
        alpha = self.settings.alpha_at(int(self.steps)) if alpha is None else alpha
        if self.training:
            update_twin(self.momentum, self.model, self.settings.momentum)
            self.steps += 1
        return alpha


class AlbefClassificationFineTuning(AlbefTaskFineTuning):
    """The classification tasks: cross-entropy with the label and with the twin's opinion."""

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        alpha: float | None = None,
    ) -> AlbefClassificationOutput:
        """One step.

        Args:
            pixel_values: as the inference model takes them.
            input_ids: (N, L).
            attention_mask: (N, L).
            labels: (N,) classes.
            alpha: weight of distillation; default: by `settings` and the number of steps made.

        Raises:
            ValueError: labels are missing or out of range.
        """
        if labels is None:
            raise ValueError("labels are missing: fine-tuning needs the class of each text")
        logits = self.model(pixel_values, input_ids, attention_mask).logits
        check_labels(labels, *logits.shape)
        alpha = self.step_alpha(alpha)
        logits_m = None
        if alpha > 0:
            with torch.no_grad():
                logits_m = self.momentum(pixel_values, input_ids, attention_mask).logits
        loss = distillation_loss(logits, logits.detach() if logits_m is None else logits_m, labels, alpha)
        return AlbefClassificationOutput(
            loss=loss, loss_classification=loss, logits=logits, logits_m=logits_m, alpha=alpha
        )

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ln of the number of classes."""
        return {"loss_classification": math.log(self.model.classifier[-1].out_features)}


class AlbefForVisualEntailmentFineTuning(AlbefClassificationFineTuning):
    """Visual entailment with momentum distillation."""

    task_class = AlbefForVisualEntailment


class AlbefForVisualReasoningFineTuning(AlbefClassificationFineTuning):
    """Reasoning over two images with momentum distillation."""

    task_class = AlbefForVisualReasoning


@dataclass
class AlbefAnsweringOutput(ModelOutput):
    """
    Args:
        loss: weighted sum of the answers' losses over the number of questions of all ranks.
        loss_vqa: the same, under the name that is logged.
        answer_loss: (A,) of each answer, summed over its tokens.
        logits: (T, vocabulary) where a token is predicted, answer after answer.
        logits_m: the same of the twin; absent when alpha is 0.
        labels: (T,).
        alpha: weight of momentum distillation.
    """

    loss: Tensor | None = None
    loss_vqa: Tensor | None = None
    answer_loss: Tensor | None = None
    logits: Tensor | None = None
    logits_m: Tensor | None = None
    labels: Tensor | None = None
    alpha: float | None = None


class AlbefForQuestionAnsweringFineTuning(AlbefTaskFineTuning):
    """Question answering with weighted answers and momentum distillation."""

    task_class = AlbefForQuestionAnswering

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        labels_attention_mask: Tensor | None = None,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
        alpha: float | None = None,
    ) -> AlbefAnsweringOutput:
        """One step; arguments as in `AlbefForQuestionAnswering.forward`, and `alpha`."""
        if labels is None:
            raise ValueError("answers are missing: pass them as labels, one after another for all questions")
        states, mask = self.model.encode_questions(pixel_values, input_ids, attention_mask)
        answers, question, weights = self.model.pack_answers(
            len(states), labels, labels_attention_mask, answers_per_question, answer_weights
        )
        logits, targets, row = self.model.score_answers(states, mask, answers, question)
        alpha = self.step_alpha(alpha)
        logits = full_precision(logits)
        token_loss = (1 - alpha) * F.cross_entropy(logits, targets, reduction="none")
        logits_m = None
        if alpha > 0:
            with torch.no_grad():
                states_m, _ = self.momentum.encode_questions(pixel_values, input_ids, attention_mask)
                logits_m, _, _ = self.momentum.score_answers(states_m, mask, answers, question)
            soft = F.cross_entropy(logits, full_precision(logits_m).softmax(dim=-1), reduction="none")
            token_loss = token_loss + alpha * soft
        answer_loss = token_loss.new_zeros(len(answers)).index_add(0, row, token_loss)
        loss = global_mean((answer_loss * weights).sum(), len(states))
        return AlbefAnsweringOutput(
            loss=loss,
            loss_vqa=loss,
            answer_loss=answer_loss,
            logits=logits,
            logits_m=logits_m,
            labels=targets,
            alpha=alpha,
        )

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ln of the vocabulary for each token of an answer, with its weight, a question."""
        labels = batch["labels"]
        mask = batch.get("labels_attention_mask")
        if mask is None:
            mask = (labels != -100) & (labels != self.config.decoder_config.pad_token_id)
        tokens = mask.bool().sum(dim=1) - 1
        weights = batch.get("answer_weights")
        weighted = float((tokens * (1.0 if weights is None else weights)).sum())
        vocabulary = self.config.decoder_config.vocab_size
        return {"loss_vqa": math.log(vocabulary) * weighted / len(batch["input_ids"])}


def start_task(
    task_class: type[AlbefPreTrainedModel],
    folder: str | Path,
    *,
    config: AlbefConfig | None = None,
    image_size: int | None = None,
    **kwargs: Any,
) -> AlbefPreTrainedModel:
    """A task's inference model as fine-tuning begins: from its own checkpoint, or with new heads from any other.

    From another head's checkpoint the classifier is new; the fusion layers become pairs of twins for two images
    (each layer twice, sharing keys and values); the answer decoder starts as the fusion encoder, its head as the MLM
    head that `export` keeps beside a pretrained model.

    Args:
        task_class: one of the inference classes.
        folder: what `export` or `save_pretrained` of an ALBEF model wrote, or a Hub id.
        config: instead of the folder's.
        image_size: interpolate the position embedding to it.
        kwargs: of `PreTrainedModel.from_pretrained`.

    Raises:
        ValueError: the checkpoint is for pairs of images and the task for one.
    """
    where = hub_arguments(kwargs)
    config = config or AlbefConfig.from_pretrained(folder, **where)
    own = task_class.__name__ in (config.architectures or [])
    wants_pairs = task_class is AlbefForVisualReasoning
    if wants_pairs and config.text_config.images_per_text == 1:
        model = _with_twins(folder, config, **kwargs)
    else:
        if not wants_pairs and config.text_config.images_per_text == 2:
            raise ValueError(f"{folder} has twin layers for pairs of images; {task_class.__name__} takes one image")
        model = task_class.from_pretrained(folder, config=config, allow_missing=not own, **kwargs)
    if isinstance(model, AlbefForQuestionAnswering) and not own:
        state = read_extras(folder, **where)
        head = {n.removeprefix("mlm_head."): v for n, v in state.items() if n.startswith("mlm_head.")}
        model.initialise_decoder(head or None)
    if image_size is not None and image_size != model.config.vision_config.image_size:
        model.set_image_size(image_size)
    return model


def _with_twins(folder: str | Path, config: AlbefConfig, **kwargs: Any) -> AlbefForVisualReasoning:
    """Each fusion layer of a one-image checkpoint becomes both layers of a pair."""
    single = AlbefModel.from_pretrained(folder, config=config, **kwargs)
    paired = copy.deepcopy(single.config)
    paired.text_config.images_per_text = 2
    paired.num_labels = 2
    model = AlbefForVisualReasoning(paired)
    model.albef.load_towers(single.vision_model, single.text_model)
    return model


@dataclass
class AlbefAssignmentOutput(ModelOutput):
    """
    Args:
        loss: cross-entropy of the three classes.
        loss_ta: the same, under the name that is logged.
        logits: (B, 3).
        labels: (B,) 0: the text belongs to the first image, 1: to the second, 2: to neither.
        image_index: (2, B) own images that are given as first and second.
        image_features: (B, D) normalised.
        image_embeds: (B, K, width) image tokens.
        sampling_weights: (B, B) softmax of the images' similarities, the own one set to 0.
    """

    loss: Tensor | None = None
    loss_ta: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    image_index: Tensor | None = None
    image_features: Tensor | None = None
    image_embeds: Tensor | None = None
    sampling_weights: Tensor | None = None


class AlbefForTextAssignment(PreTrainingMixin, AlbefPreTrainedModel):
    """Pretraining of the two-image model: to which of two images does a text belong? Section 5 (NLVR2).

    With equal odds a text belongs to the first, to the second, or to neither of two images; the others are drawn from
    the batch, the more similar the likelier. `export` writes an `AlbefForVisualReasoning` whose classifier is new.
    """

    inference_attribute = "reasoning"
    base_model_prefix = ""
    _auto_class = None
    stages: ClassVar[dict[str, dict[str, bool]]] = {
        "pretrain": {"": True, "reasoning.classifier": False, "vision_projection": False}
    }
    # A constant in the original.
    sampling_temperature = 0.07

    def __init__(self, config: AlbefConfig, reasoning: AlbefForVisualReasoning | None = None) -> None:
        """
        Args:
            config: with `images_per_text` 2.
            reasoning: an existing inference model; by default one is drawn from `config`.
        """
        super().__init__(config)
        self.reasoning = AlbefForVisualReasoning(config) if reasoning is None else reasoning
        # The contrastive projection only chooses the other images here; it comes from the one-image pretraining.
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.assignment_head = nn.Linear(config.text_config.hidden_size, 3)
        self.post_init()

    @classmethod
    def from_retrieval(
        cls, folder: str | Path, *, image_size: int | None = None, **kwargs: Any
    ) -> "AlbefForTextAssignment":
        """Starts from a pretrained `AlbefForImageTextRetrieval` folder, whose projection chooses the images.

        Args:
            folder: or Hub id.
            image_size: interpolate the position embedding to it.
            kwargs: of `PreTrainedModel.from_pretrained`.
        """
        retrieval = AlbefForImageTextRetrieval.from_pretrained(folder, **kwargs)
        reasoning = start_task(AlbefForVisualReasoning, folder, image_size=image_size, **kwargs)
        model = cls(reasoning.config, reasoning)
        model.vision_projection.load_state_dict(retrieval.vision_projection.state_dict())
        return model

    @property
    def albef_model(self) -> Any:
        return self.reasoning.albef

    @torch.no_grad()
    def sampling_weights(self, image_features: Tensor) -> Tensor:
        """(B, B): softmax over the cosines of images at the constant temperature, the diagonal set to 0."""
        similarity = image_features @ image_features.t() / self.sampling_temperature
        return similarity.softmax(dim=1).fill_diagonal_(0)

    @staticmethod
    def assign(weights: Tensor, branch: Tensor, order: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and images of texts from draws.

        Args:
            weights: (B, B), for its device.
            branch: (B,) uniform; above 1/3 the own image is one of the two.
            order: (B,) uniform; above 1/2 it is the first.
            others: (B, 2) two other images; the second is only used without the own one.

        Returns:
            labels (B,) and image index (2, B).
        """
        own = torch.arange(len(weights), device=weights.device)
        labels = torch.where(branch > 1 / 3, torch.where(order > 0.5, 0, 1), 2)
        first = torch.where(labels == 0, own, others[:, 0])
        second = torch.where(labels == 0, others[:, 0], torch.where(labels == 1, own, others[:, 1]))
        return labels, torch.stack([first, second])

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        draws: tuple[Tensor, Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
    ) -> AlbefAssignmentOutput:
        """One step. The other images are those of this rank, as in the original; the loss is a mean over all ranks.

        Args:
            pixel_values: (B, 3, H, W), B at least 3 unless `draws` are given.
            input_ids: (B, L).
            attention_mask: (B, L).
            image_ids: (B,) images of one id are never each other's other image, if there is any else.
            draws: `branch`, `order` and `others` of `assign` instead of drawn ones.
            generator: source of the draws.
            return_loss: only tells `Trainer` that a loss comes without labels.

        Raises:
            ValueError: fewer than three images to draw two others from.
        """
        albef = self.reasoning.albef
        number = len(pixel_values)
        if draws is None and number < 3:
            raise ValueError(
                f"text assignment draws two other images of the batch, but it has {number}: use 3 or more"
            )
        image_states = albef.encode_images(pixel_values)
        features = unit_vectors(self.vision_projection(image_states[:, 0]))
        weights = self.sampling_weights(features)
        if image_ids is not None:
            weights = weights.masked_fill(image_ids[:, None] == image_ids[None, :], 0.0)
        if draws is None:
            device = torch.device("cpu") if generator is None else generator.device
            branch, order = torch.rand(2, number, generator=generator, device=device).to(weights.device)
            # Images too far away for their weight to be a number may still be needed as the second one.
            odds = weights.clamp(min=torch.finfo(weights.dtype).tiny).fill_diagonal_(0)
            others = torch.multinomial(odds.to(device), 2, generator=generator).to(weights.device)
        else:
            branch, order, others = draws
        labels, image_index = self.assign(weights, branch, order, others)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        fused = albef.fuse_pairs(
            texts, albef.text_model.encode(texts), image_states, image_index.cpu(), keep=texts.first
        )
        logits = self.assignment_head(fused)
        loss = global_mean(F.cross_entropy(full_precision(logits), labels, reduction="sum"), number)
        return AlbefAssignmentOutput(
            loss=loss,
            loss_ta=loss,
            logits=logits,
            labels=labels,
            image_index=image_index,
            image_features=features,
            image_embeds=image_states,
            sampling_weights=weights,
        )

    def chance_levels(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """ln 3."""
        return {"loss_ta": math.log(3)}


__all__ = [
    "AlbefForQuestionAnsweringFineTuning",
    "AlbefForRetrievalFineTuning",
    "AlbefForTextAssignment",
    "AlbefForVisualEntailmentFineTuning",
    "AlbefForVisualReasoningFineTuning",
    "TwinSettings",
    "start_task",
]
