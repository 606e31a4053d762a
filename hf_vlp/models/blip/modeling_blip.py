"""BLIP's inference models (arXiv 2201.12086), in exactly the format of transformers' `blip` type.

Each subclasses the class of the same name in transformers: parameters, config and saved folder are the native ones.
They take the ways of `vision_blip.py` and `text_blip.py` through those modules, and follow the original authors' code
(github.com/salesforce/BLIP, BSD-3-Clause) where the native classes depart from it; docs/blip.md lists where.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGenerationModelOutput,
    BlipImageTextMatchingModelOutput,
)
from transformers.utils import ModelOutput

from hf_vlp.models.albef.modeling_albef import unit_vectors
from hf_vlp.models.albef.modeling_albef_packing import PackedTexts
from hf_vlp.models.blip.backbone_blip import LABEL_SMOOTHING, BlipBackboneMixin
from hf_vlp.models.blip.generation_blip import BlipTextDecoder
from hf_vlp.models.blip.text_blip import (
    ImageKeys,
    fuse,
    grid,
    project_images,
    text_pass,
    with_first,
    without_last,
)
from hf_vlp.models.retrieval import ImageEmbeds
from hf_vlp.objectives.distributed import global_mean
from hf_vlp.objectives.language import language_modeling_loss
from hf_vlp.objectives.precision import full_precision


@dataclass
class BlipFeatures(ModelOutput):
    """Features of `BlipForImageTextRetrieval.extract_features`; fields are None where their input was not given.

    Attributes:
        image_embeds: (I, K, width) image tokens.
        text_embeds: (N, L, D) of the unimodal encoder ([CLS]), zero at padding.
        multimodal_embeds: (N, L, D) of the image-grounded encoder ([ENC]), zero at padding.
    """

    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    multimodal_embeds: Tensor | None = None


class BlipForImageTextRetrieval(BlipBackboneMixin, transformers.BlipForImageTextRetrieval):
    """Contrastive features and the matching head: retrieval with re-ranking, zero-shot classification.

    `forward` gives what the native class gives. `matching_scores` puts [ENC] first, as in training and in the
    original's evaluation; `forward` leaves the first token as it is given ([CLS] from the native processor), as the
    native class and the original's `BLIP_ITM` do.
    """

    supports_matching: ClassVar[bool] = True

    def project_image(self, image_states: Tensor) -> Tensor:
        """(I, K, width) image tokens to normalised features (I, D) of the class token."""
        return unit_vectors(self.vision_proj(image_states[:, 0]))

    def project_text(self, first_states: Tensor) -> Tensor:
        """(T, hidden) text states of [CLS] to normalised features (T, D)."""
        return unit_vectors(self.text_proj(first_states))

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> ImageEmbeds:
        """Features of images (I, 3, H, W), or of their tokens (I, K, width) if they are encoded already."""
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("pass either pixel_values or image_embeds")
        states = self.encode_images(pixel_values) if image_embeds is None else image_embeds
        return ImageEmbeds(self.project_image(states), states)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Normalised features (T, D) of texts (T, L), of the first token as it is given."""
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        return self.project_text(text_pass(self.text_encoder, texts, keep=texts.first))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Normalised features (I, D) of images (I, 3, H, W)."""
        return self.embed_images(pixel_values).itc

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Normalised features (T, D) of texts (T, L)."""
        return self.embed_texts(input_ids, attention_mask)

    def similarity(self, images: ImageEmbeds | Tensor, text_itc: Tensor) -> Tensor:
        """Cosine similarities (I, T) in float32, not divided by a temperature."""
        itc = images.itc if hasattr(images, "itc") else images
        return itc.float() @ text_itc.float().t()

    def matching_logits(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        rows_at_once: int = 512,
    ) -> Tensor:
        """ITM logits (P, 2) of pairs, class 1 = match, with [ENC] as the texts' first token.

        An image's keys and values are projected once; the first self-attention runs once a distinct text.

        Args:
            images: `embed_images(...)`, or image tokens (I, K, width).
            image_index: (P,) image of each pair.
            input_ids: (P, L) text of each pair.
            attention_mask: (P, L).
            rows_at_once: pairs that are computed together; bounds memory.

        Raises:
            ValueError: shapes do not fit, or an index is out of range.
        """
        states = images.states if hasattr(images, "states") else images
        if states is None:
            raise ValueError("these image features have no states to match with: make them with embed_images()")
        if image_index.ndim != 1 or image_index.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"image_index must name one image for each of the {input_ids.shape[0]} texts, "
                f"but has shape {tuple(image_index.shape)}"
            )
        index = image_index.cpu()
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < states.shape[0]):
            raise ValueError(f"image_index must lie in 0..{states.shape[0] - 1}, but reaches {int(index.max())}")
        if not len(index):
            return self.itm_head.weight.new_empty(0, 2)
        texts, source = distinct_texts(input_ids, attention_mask)
        texts = with_first(texts, self.enc_token_id)
        order = torch.argsort(index, stable=True)
        scored: list[Tensor] = []
        keys, projected = None, None
        for start in range(0, len(order), rows_at_once):
            pairs = order[start : start + rows_at_once]
            wanted, local = index[pairs].unique(return_inverse=True)
            if projected is None or not torch.equal(wanted, projected):
                # Rows are in the order of their images, so a long run of one image's rows projects it once.
                keys = project_images(self.text_encoder, states[wanted.to(states.device)])
                projected = wanted
            chosen, rows = source[pairs].unique(return_inverse=True)
            part = texts.select(chosen)
            counts = part.counts[rows]
            keep = counts.cumsum(0) - counts
            first = fuse(self.text_encoder, part, local, image_keys=keys, source=rows, keep=keep)
            scored.append(self.itm_head(first))
        return torch.cat(scored).index_select(0, order.argsort().to(scored[0].device))

    def matching_scores(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logit of "match" for P pairs. The original ranks by it plus the similarity. See `matching_logits`."""
        return self.matching_logits(images, image_index, input_ids, attention_mask)[:, 1]

    def matching_probabilities(
        self,
        images: ImageEmbeds | Tensor,
        image_index: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Probabilities (P,) that the texts match their images. See `matching_logits`."""
        return self.matching_logits(images, image_index, input_ids, attention_mask).float().softmax(dim=-1)[:, 1]

    def extract_features(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> BlipFeatures:
        """Image, text and, where both are given, multimodal features (the three modes of the original's `BLIP_Base`).

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L); text i goes with image i in the multimodal features.
            attention_mask: (N, L).
        """
        output = BlipFeatures()
        if pixel_values is not None:
            output.image_embeds = self.encode_images(pixel_values)
        if input_ids is not None:
            texts = PackedTexts.from_padded(input_ids, attention_mask)
            length = input_ids.shape[1]
            output.text_embeds = grid(text_pass(self.text_encoder, texts), texts, length)
            if pixel_values is not None:
                check_pairs(len(output.image_embeds), len(texts))
                texts = with_first(texts, self.enc_token_id)
                states = fuse(self.text_encoder, texts, torch.arange(len(texts)), output.image_embeds)
                output.multimodal_embeds = grid(states, texts, length)
        return output

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        use_itm_head: bool | None = True,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BlipImageTextMatchingModelOutput | tuple[Any, ...]:
        """Matching logits of pairs (i, i), or cosines of all images with all texts.

        Args:
            input_ids: (T, L).
            pixel_values: (I, 3, H, W).
            use_itm_head: True: `itm_score` (T, 2), the first token of the texts being left as given. False:
                `itm_score` (I, T).
            attention_mask: (T, L), non-zero at tokens.
            interpolate_pos_encoding: resize the position table to the images.
            return_dict: return the native output rather than a tuple.
        """
        if "labels" in kwargs:
            raise ValueError("this class computes no loss and would ignore `labels`; train with BlipForPreTraining")
        states = self.encode_images(pixel_values, interpolate_pos_encoding)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        if use_itm_head:
            check_pairs(len(states), len(texts))
            packed = fuse(self.text_encoder, texts, torch.arange(len(texts)), states)
            hidden = grid(packed, texts, input_ids.shape[1])
            score = self.itm_head(hidden[:, 0])
        else:
            hidden = grid(text_pass(self.text_encoder, texts), texts, input_ids.shape[1])
            score = self.project_image(states) @ self.project_text(hidden[:, 0]).t()
        output = BlipImageTextMatchingModelOutput(itm_score=score, last_hidden_state=states, question_embeds=hidden)
        return output if return_dict else output.to_tuple()


class BlipForConditionalGeneration(BlipBackboneMixin, transformers.BlipForConditionalGeneration):
    """Captioning with the image-grounded decoder (role "captioning").

    `forward` with `labels` gives the language modelling loss at supervised positions; `generate` gives captions.
    """

    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True}}
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.label_smoothing = config.text_config.label_smoothing or LABEL_SMOOTHING
        adopt_decoder(self.text_decoder)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> BlipForConditionalGenerationModelOutput | tuple[Any, ...]:
        """Loss of captions, or the next tokens' logits.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) captions; the first token is replaced by [DEC]. Default: [DEC] alone.
            attention_mask: (N, L), non-zero at tokens.
            labels: (N, L) the captions, -100 at the prompt ([DEC] included) and at padding. With them `loss` is the
                mean over the supervised tokens of all ranks, and no logits are returned.
            interpolate_pos_encoding: resize the position table to the images.
            return_dict: return the native output rather than a tuple.

        Raises:
            AllLabelsIgnoredError: no position is supervised.
            PaddingInLabelsError: padding is supervised.
        """
        states = self.encode_images(pixel_values, interpolate_pos_encoding)
        if input_ids is None:
            input_ids = torch.full((len(states), 1), self.dec_token_id, device=states.device)
        if labels is None:
            texts = PackedTexts.from_padded(input_ids, attention_mask)
            texts = with_first(texts, self.dec_token_id)
            check_pairs(len(states), len(texts))
            hidden = fuse(self.text_decoder.bert, texts, torch.arange(len(texts)), states, causal=True)
            logits = grid(self.text_decoder.cls(hidden), texts, input_ids.shape[1])
            output = BlipForConditionalGenerationModelOutput(logits=logits)
        else:
            output = BlipForConditionalGenerationModelOutput(
                loss=caption_loss(
                    self.text_decoder,
                    input_ids,
                    attention_mask,
                    labels,
                    states,
                    dec_token_id=self.dec_token_id,
                    label_smoothing=self.label_smoothing,
                )
            )
        output.image_embeds = output.last_hidden_state = states
        return output if return_dict else output.to_tuple()

    def chance_levels(self, batch: dict[str, Any]) -> dict[str, float]:
        """ln of the vocabulary."""
        return {"loss": float(torch.tensor(float(self.config.text_config.vocab_size)).log())}

    def export(self, folder: Any, **save_kwargs: Any) -> None:
        """Writes the native folder; see `PreTrainingMixin.export`."""
        self.save_pretrained(folder, **save_kwargs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        count_prompt: bool = True,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Captions, as the original generates them.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) a prompt as the tokenizer gives it: the first token is replaced by [DEC], the last one
                ([SEP]) dropped. Default: no prompt.
            attention_mask: (N, L).
            interpolate_pos_encoding: resize the position table to the images.
            count_prompt: score beams by their whole length, the prompt included and the end token not, as the
                original; False: by the generated length, as transformers 5.
            generate_kwargs: of `GenerationMixin.generate`. Sampling has, unless given, the original's
                `repetition_penalty` 1.1 and `top_k` 50 before `top_p`.

        Returns:
            Token ids, [DEC] and prompt included.
        """
        images = project_images(self.text_decoder.bert, self.encode_images(pixel_values, interpolate_pos_encoding))
        text = self.config.text_config
        if input_ids is None:
            input_ids = torch.full((len(images), 1), self.dec_token_id, device=pixel_values.device)
            attention_mask = None
        else:
            input_ids = torch.as_tensor(input_ids, device=pixel_values.device)
            check_pairs(len(images), len(input_ids))
            input_ids = input_ids[:, :-1] if input_ids.shape[1] > 1 else input_ids
            attention_mask = None if attention_mask is None else attention_mask[:, : input_ids.shape[1]]
            input_ids = torch.cat([torch.full_like(input_ids[:, :1], self.dec_token_id), input_ids[:, 1:]], dim=1)
        if generate_kwargs.get("do_sample"):
            generate_kwargs.setdefault("repetition_penalty", 1.1)
            generate_kwargs.setdefault("top_k", 50)
        generate_kwargs.setdefault("eos_token_id", text.sep_token_id)
        generate_kwargs.setdefault("pad_token_id", text.pad_token_id)
        return self.text_decoder.generate(
            input_ids=input_ids,
            attention_mask=attention_mask if attention_mask is not None else torch.ones_like(input_ids),
            images=images,
            count_prompt=count_prompt,
            **generate_kwargs,
        )


@dataclass
class BlipAnswerOutput(ModelOutput):
    """Output of `BlipForQuestionAnswering`.

    Args:
        loss: sum over answers of weight times `answer_loss`, divided by the number of questions of all ranks.
        loss_vqa: the same, under the name that is logged.
        answer_loss: (A,) label-smoothed negative log likelihood of each answer, summed over its tokens.
        logits: (T, vocabulary) at the positions that predict a token, answer after answer.
        labels: (T,) what they should predict.
        question_states: (N, L, D).
    """

    loss: Tensor | None = None
    loss_vqa: Tensor | None = None
    answer_loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    question_states: Tensor | None = None


@dataclass
class BlipRankingOutput(ModelOutput):
    """Output of `BlipForQuestionAnswering.rank_answers`, k candidates a question.

    Args:
        answer_index: (N, k) rows of the candidate list, best first.
        probabilities: (N, k) softmax of the scores.
        shortlist: (N, k) candidates in the order of their first token's probability.
        scores: (N, k) minus the smoothed answer loss, in the order of `shortlist`.
        first_token_logits: (N, vocabulary).
        first_token_probabilities: (N, candidates).
    """

    answer_index: Tensor | None = None
    probabilities: Tensor | None = None
    shortlist: Tensor | None = None
    scores: Tensor | None = None
    first_token_logits: Tensor | None = None
    first_token_probabilities: Tensor | None = None


class QuestionAnsweringMixin:
    """Answers questions with any `vision_model`, `text_encoder` and `text_decoder`."""

    label_smoothing: float

    def encode_questions(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """States (N, L, D) of questions that look at their images, and their mask (N, L) bool; [ENC] comes first."""
        image_states = self.encode_images(pixel_values, interpolate_pos_encoding)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        check_pairs(len(image_states), len(texts))
        texts = with_first(texts, self.enc_token_id)
        states = texts.rows.pad(fuse(self.text_encoder, texts, torch.arange(len(texts)), image_states))
        mask = texts.rows.mask
        return states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if mask is None else mask

    def score_answers(
        self, questions: ImageKeys, answers: PackedTexts, question_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced answers: logits (T, vocabulary), labels (T,) and the answer of each (T,)."""
        inputs, targets = without_last(with_first(answers, self.dec_token_id))
        hidden = fuse(self.text_decoder.bert, inputs, question_index, image_keys=questions, causal=True)
        row = torch.repeat_interleave(torch.arange(len(answers)), inputs.counts).to(hidden.device)
        return self.text_decoder.cls(hidden), targets, row

    def pack_answers(
        self,
        number: int,
        labels: Tensor,
        mask: Tensor | None,
        answers_per_question: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[PackedTexts, Tensor, Tensor]:
        """Checks the answers of `number` questions: packed answers, question of each (CPU), weights."""
        pad = self.config.text_config.pad_token_id
        if mask is None:
            mask = labels != -100
            mask[:, 1:] &= labels[:, 1:] != pad
            # The first label may be ignored: it only says where decoding starts.
            mask[:, 0] = True
        answers = PackedTexts.from_padded(labels.clamp(min=0), mask)
        per_question = torch.ones(number, dtype=torch.long)
        if answers_per_question is not None:
            per_question = answers_per_question.cpu()
        if per_question.shape != (number,) or int(per_question.sum()) != len(answers):
            raise ValueError(
                f"there are {len(answers)} answers, but answers_per_question {per_question.tolist()} for {number} "
                "questions: it must have one entry a question and sum to the number of answers"
            )
        short = (answers.counts < 2).nonzero().flatten().tolist()
        if short:
            raise ValueError(f"answers {short} have no token after the start token: nothing to predict")
        if weights is None:
            weights = torch.ones(len(answers), device=labels.device)
        if weights.shape != (len(answers),):
            raise ValueError(f"answer_weights must have one entry for each of {len(answers)} answers")
        return answers, torch.repeat_interleave(torch.arange(number), per_question), weights

    def _token_losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(full_precision(logits), targets, reduction="none", label_smoothing=self.label_smoothing)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        labels_attention_mask: Tensor | None = None,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = True,
    ) -> BlipAnswerOutput | tuple[Any, ...]:
        """Loss of answers to questions (figure 5a of the paper).

        Args:
            input_ids: (N, L) questions; the first token is replaced by [ENC].
            pixel_values: (N, 3, H, W).
            attention_mask: (N, L).
            labels: (A, La) answers of all questions one after another; the first token is replaced by [DEC], the
                last one is [SEP]; padding may be -100.
            labels_attention_mask: (A, La), non-zero at tokens; default: where `labels` is neither -100 nor padding.
            answers_per_question: (N,) how many of the answers belong to each question; default one.
            answer_weights: (A,) default 1.
            interpolate_pos_encoding: resize the position table to the images.
            return_dict: return `BlipAnswerOutput` rather than a tuple.

        Raises:
            ValueError: answers are missing, or their numbers do not fit.
        """
        if labels is None:
            raise ValueError(
                "answers are missing: pass them as labels; to answer questions call generate() or rank_answers()"
            )
        states, mask = self.encode_questions(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
        answers, question, weights = self.pack_answers(
            len(states), labels, labels_attention_mask, answers_per_question, answer_weights
        )
        keys = project_images(self.text_decoder.bert, states, mask)
        logits, targets, row = self.score_answers(keys, answers, question)
        losses = self._token_losses(logits, targets)
        answer_loss = losses.new_zeros(len(answers)).index_add(0, row, losses)
        loss = global_mean((answer_loss * weights).sum(), len(states))
        output = BlipAnswerOutput(
            loss=loss, loss_vqa=loss, answer_loss=answer_loss, logits=logits, labels=targets, question_states=states
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def rank_answers(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        candidate_ids: Tensor,
        candidate_attention_mask: Tensor | None = None,
        top_k: int = 128,
    ) -> BlipRankingOutput:
        """Ranks a closed list of answers: the k with the likeliest first token, then by the decoder's loss.

        As in the original the loss keeps its label smoothing here.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) questions.
            attention_mask: (N, L).
            candidate_ids: (C, La) answers, each ending with [SEP]; the first token is replaced by [DEC].
            candidate_attention_mask: (C, La); default: where they are not padding.
            top_k: length of the shortlist, at most C.
        """
        states, mask = self.encode_questions(pixel_values, input_ids, attention_mask)
        if candidate_attention_mask is None:
            candidate_attention_mask = candidate_ids != self.config.text_config.pad_token_id
        candidates = with_first(PackedTexts.from_padded(candidate_ids, candidate_attention_mask), self.dec_token_id)
        if not 1 <= top_k <= len(candidates):
            raise ValueError(f"top_k is {top_k}, but there are {len(candidates)} candidate answers")
        number, device = len(states), states.device
        keys = project_images(self.text_decoder.bert, states, mask)
        every = torch.arange(number)
        start = PackedTexts.from_padded(torch.full((number, 1), self.dec_token_id, device=device))
        first = self.text_decoder.cls(fuse(self.text_decoder.bert, start, every, image_keys=keys, causal=True))
        probabilities = full_precision(first).softmax(dim=-1)[:, candidate_ids[:, 1]]
        shortlist = probabilities.topk(top_k, dim=1).indices
        answers = candidates.select(shortlist.flatten().cpu())
        logits, targets, row = self.score_answers(keys, answers, every.repeat_interleave(top_k))
        losses = self._token_losses(logits, targets)
        scores = -losses.new_zeros(number * top_k).index_add(0, row, losses).view(number, top_k)
        order = scores.argsort(dim=1, descending=True, stable=True)
        return BlipRankingOutput(
            answer_index=shortlist.gather(1, order),
            probabilities=scores.softmax(dim=1).gather(1, order),
            shortlist=shortlist,
            scores=scores,
            first_token_logits=first,
            first_token_probabilities=probabilities,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attend_padding: bool = False,
        count_prompt: bool = True,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Free answers.

        Args:
            input_ids: (N, L) questions.
            pixel_values: (N, 3, H, W).
            attention_mask: (N, L).
            interpolate_pos_encoding: resize the position table to the images.
            attend_padding: let the decoder look at padded question positions, as the original and the native class
                do in generation (and only there): an answer then depends on what else is in the batch.
            count_prompt: as in `BlipForConditionalGeneration.generate`.
            generate_kwargs: of `GenerationMixin.generate`.

        Returns:
            Token ids, starting with [DEC].
        """
        if attend_padding and attention_mask is not None:
            states = self._padded_states(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
            mask = None
        else:
            states, mask = self.encode_questions(pixel_values, input_ids, attention_mask, interpolate_pos_encoding)
            mask = None if mask.all() else mask
        text = self.config.text_config
        start = torch.full((len(states), 1), self.dec_token_id, device=states.device)
        generate_kwargs.setdefault("eos_token_id", text.sep_token_id)
        generate_kwargs.setdefault("pad_token_id", text.pad_token_id)
        if "max_length" not in generate_kwargs:
            generate_kwargs.setdefault("max_new_tokens", 9)
        return self.text_decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            images=project_images(self.text_decoder.bert, states, mask),
            count_prompt=count_prompt,
            **generate_kwargs,
        )

    def _padded_states(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, interpolate_pos_encoding: bool
    ) -> Tensor:
        image_states = self.encode_images(pixel_values, interpolate_pos_encoding)
        texts = PackedTexts.from_padded(input_ids, attention_mask, keep_padding=True)
        texts = with_first(texts, self.enc_token_id)
        check_pairs(len(image_states), len(texts))
        return texts.rows.pad(fuse(self.text_encoder, texts, torch.arange(len(texts)), image_states))

    def chance_levels(self, batch: dict[str, Any]) -> dict[str, float]:
        """ln of the vocabulary for each token of an answer, with its weight, a question."""
        mask = batch.get("labels_attention_mask")
        labels = batch["labels"]
        if mask is None:
            mask = (labels != -100) & (labels != self.config.text_config.pad_token_id)
        tokens = mask.bool().sum(dim=1) - 1
        weights = batch.get("answer_weights")
        weighted = float((tokens * (1.0 if weights is None else weights)).sum())
        vocabulary = torch.tensor(float(self.config.text_config.vocab_size))
        return {"loss_vqa": float(vocabulary.log()) * weighted / len(batch["input_ids"])}

    def export(self, folder: Any, **save_kwargs: Any) -> None:
        """Writes the inference folder; see `PreTrainingMixin.export`."""
        self.save_pretrained(folder, **save_kwargs)


class BlipForQuestionAnswering(QuestionAnsweringMixin, BlipBackboneMixin, transformers.BlipForQuestionAnswering):
    """Answers a question about an image: question encoder, then answer decoder (roles "vqa" and "finetune_vqa").

    Answers are ranked in a closed list or generated. Image and text towers must be of one width, as in the native
    class; `BlipTasksForQuestionAnswering` takes any.
    """

    stages: ClassVar[dict[str, dict[str, bool]]] = {"finetune": {"": True}}
    accepts_loss_kwargs = False

    def __init__(self, config: PreTrainedConfig) -> None:
        if config.vision_config.hidden_size != config.text_config.hidden_size:
            raise ValueError(
                f"the vision width is {config.vision_config.hidden_size}, the text width "
                f"{config.text_config.hidden_size}: the native class would give the answer decoder the vision width; "
                "use BlipTasksForQuestionAnswering (model_type 'blip_tasks')"
            )
        super().__init__(config)
        self.label_smoothing = config.text_config.label_smoothing or LABEL_SMOOTHING
        adopt_decoder(self.text_decoder)


def adopt_decoder(decoder: nn.Module) -> None:
    """Gives a native decoder our way of generating; its modules and weights stay as they are."""
    decoder.__class__ = BlipTextDecoder


def check_pairs(images: int, texts: int) -> None:
    """Raises `ValueError` unless there is one image a text."""
    if images != texts:
        raise ValueError(f"there are {images} images for {texts} texts: pass pairs")


def distinct_texts(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[PackedTexts, Tensor]:
    """The different texts among (P, L), and which of them each row is, (P,) on the CPU."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    mask = attention_mask.bool()
    unique, source = torch.cat([torch.where(mask, input_ids, -1), mask], dim=1).unique(dim=0, return_inverse=True)
    ids, mask = unique.split(input_ids.shape[1], dim=1)
    return PackedTexts.from_padded(ids.clamp(min=0), mask), source.cpu()


def caption_loss(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    image_states: Tensor,
    *,
    dec_token_id: int,
    label_smoothing: float,
) -> Tensor:
    """Language modelling loss of captions, in which only supervised positions reach the vocabulary.

    Raises:
        ValueError: labels that do not fit the texts.
    """
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, input_ids {tuple(input_ids.shape)}")
    texts = PackedTexts.from_padded(input_ids, attention_mask)
    check_pairs(len(image_states), len(texts))
    inputs, targets = next_token_targets(texts, labels, attention_mask)
    inputs = with_first(inputs, dec_token_id)
    hidden = fuse(decoder.bert, inputs, torch.arange(len(inputs)), image_states, causal=True)
    return packed_language_loss(decoder, hidden, targets, label_smoothing)


def next_token_targets(
    texts: PackedTexts, labels: Tensor, attention_mask: Tensor | None
) -> tuple[PackedTexts, Tensor]:
    """Decoder inputs (the texts less their last tokens) and the label of the next token of each (T - N,).

    Raises:
        ValueError: a label stands at padding.
    """
    tokens = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if bool(((labels != -100) & ~tokens).any()):
        raise ValueError(
            f"{int(((labels != -100) & ~tokens).sum())} labels count PAD tokens in the loss; set them to -100 "
            "(labels[attention_mask == 0] = -100)"
        )
    shorter, _ = without_last(texts)
    starts = torch.zeros(int(texts.counts.sum()), dtype=torch.bool)
    starts[texts.first] = True
    return shorter, labels[tokens][~starts.to(labels.device)]


def packed_language_loss(decoder: nn.Module, hidden: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the supervised tokens of all ranks; `hidden` (T, D), `targets` (T,) with -100."""
    return language_modeling_loss(
        hidden[None], decoder.cls, targets[None], shift=False, label_smoothing=label_smoothing
    )


__all__: Sequence[str] = [
    "BlipForConditionalGeneration",
    "BlipForImageTextRetrieval",
    "BlipForQuestionAnswering",
]
