"""ALBEF's heads for visual entailment, reasoning over two images and question answering (section 5 of the paper)."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .configuration_albef import AlbefConfig
from .modeling_albef import AlbefModel, AlbefPreTrainedModel
from .modeling_albef_packing import PackedTexts
from .modeling_albef_text import AlbefTextDecoder


@dataclass
class AlbefAnswerOutput(ModelOutput):
    """Output of `AlbefForQuestionAnswering`.

    Args:
        loss: sum over answers of weight times `answer_loss`, divided by the number of questions.
        answer_loss: (A,) negative log likelihood of each answer, summed over its tokens.
        logits: (T, vocabulary) at the positions that predict a token, answer after answer.
        labels: (T,) what they should predict.
        question_states: (N, L, D).
    """

    loss: Tensor | None = None
    answer_loss: Tensor | None = None
    logits: Tensor | None = None
    labels: Tensor | None = None
    question_states: Tensor | None = None


@dataclass
class AlbefRankingOutput(ModelOutput):
    """Output of `AlbefForQuestionAnswering.rank_answers`, k candidates a question.

    Args:
        answer_index: (N, k) rows of the candidate list, best first.
        probabilities: (N, k) softmax of the scores.
        shortlist: (N, k) candidates in the order of their first token's probability.
        scores: (N, k) in the order of `shortlist`.
        answer_loss: (N, k) negative log likelihood of the shortlisted candidates.
        first_token_logits: (N, vocabulary).
        first_token_probabilities: (N, candidates).
    """

    answer_index: Tensor | None = None
    probabilities: Tensor | None = None
    shortlist: Tensor | None = None
    scores: Tensor | None = None
    answer_loss: Tensor | None = None
    first_token_logits: Tensor | None = None
    first_token_probabilities: Tensor | None = None


def check_labels(labels: Tensor, number: int, classes: int) -> None:
    """Raises `ValueError` unless there is a label in 0..classes-1 for each of `number` rows."""
    if labels.shape != (number,):
        raise ValueError(f"labels must hold one class for each of {number} texts, but has shape {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, but reach from {low} to {high}: check the label map")


def name_labels(config: AlbefConfig, names: tuple[str, ...]) -> None:
    """Gives a config that names no classes of its own those of the task, in the original's order."""
    own = config.id2label or {}
    if len(own) in (0, 2, len(names)) and all(name == f"LABEL_{i}" for i, name in own.items()):
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}


def classification_head(hidden_size: int, classes: int) -> nn.Sequential:
    """Two layers on the first token's fused state."""
    return nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, classes))


class AlbefForVisualEntailment(AlbefPreTrainedModel):
    """Does the image entail the text? Three classes (SNLI-VE: contradiction, neutral, entailment), section 5."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        self.albef = AlbefModel(config)
        name_labels(config, ("contradiction", "neutral", "entailment"))
        self.classifier = classification_head(config.text_config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Classifies pair i = (image i, text i).

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L).
            attention_mask: (N, L).
            labels: (N,) classes; gives the mean cross-entropy as `loss`.
            return_dict: return a `SequenceClassifierOutput` rather than a tuple.
        """
        states = self.albef.encode_images(pixel_values)
        logits = self.classifier(self.albef.fuse_first(states, input_ids, attention_mask))
        loss = None
        if labels is not None:
            check_labels(labels, *logits.shape)
            loss = F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


class AlbefForVisualReasoning(AlbefPreTrainedModel):
    """Is the statement true of the two images (NLVR2)? Twin fusion layers share keys and values, section 5."""

    _auto_class = "AutoModel"

    def __init__(self, config: AlbefConfig) -> None:
        super().__init__(config)
        if config.text_config.images_per_text != 2:
            raise ValueError("AlbefForVisualReasoning needs images_per_text=2 in its text_config")
        self.albef = AlbefModel(config)
        name_labels(config, ("false", "true"))
        self.classifier = classification_head(config.text_config.hidden_size, config.num_labels)
        self.post_init()

    def encode_image_pairs(self, pixel_values: Tensor) -> Tensor:
        """(N, 2, 3, H, W) to tokens (2N, K, width), all first images before all second ones.

        Raises:
            ValueError: not two images a text.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                "a statement is about exactly two images: pixel_values must be (texts, 2, 3, height, width), "
                f"but has shape {tuple(pixel_values.shape)}"
            )
        return self.albef.encode_images(pixel_values.transpose(0, 1).flatten(0, 1))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutput | tuple:
        """Classifies statement i about its two images.

        Args:
            pixel_values: (N, 2, 3, H, W).
            input_ids: (N, L).
            attention_mask: (N, L).
            labels: (N,) 1 = true; gives the mean cross-entropy as `loss`.
            return_dict: return a `SequenceClassifierOutput` rather than a tuple.
        """
        states = self.encode_image_pairs(pixel_values)
        logits = self.classifier(self.albef.fuse_first(states, input_ids, attention_mask))
        loss = None
        if labels is not None:
            check_labels(labels, *logits.shape)
            loss = F.cross_entropy(logits.float(), labels)
        output = SequenceClassifierOutput(loss=loss, logits=logits)
        return output if return_dict else output.to_tuple()


class AlbefForQuestionAnswering(AlbefPreTrainedModel, GenerationMixin):
    """Answers a question about an image with a decoder over the fused states of the question, section 5.

    Answers are ranked in a closed list, as in the paper, or generated.
    """

    _auto_class = "AutoModel"
    _more_auto_classes = ("AutoModelForVisualQuestionAnswering",)

    def __init__(self, config: AlbefConfig) -> None:
        if config.decoder_config is None:
            config = config.with_decoder()
        super().__init__(config)
        self.albef = AlbefModel(config)
        self.decoder = AlbefTextDecoder(config.decoder_config)
        self.post_init()

    def start_heads(self) -> None:
        self.initialise_decoder()

    def initialise_decoder(self, head: dict[str, Tensor] | None = None) -> None:
        """Copies the fusion layers and the text embeddings into the decoder, as fine-tuning begins.

        Args:
            head: state of the MLM head (`transform.dense.weight`, …); None leaves the decoder's head as it is.
        """
        text = self.config.text_config
        # Differs from the original, which needs both towers to be of one width: where they are not, the decoder's
        # projections of text states cannot start from those of image tokens and stay new.
        unequal = self.config.decoder_config.encoder_width != text.encoder_width
        if unequal:
            warnings.warn(
                f"the image tower is {text.encoder_width} wide, the text tower {text.hidden_size}: keys and values of "
                "the decoder's cross-attention start at random",
                stacklevel=2,
            )
        source = self.albef.text_model.state_dict()
        state = {name: value for name, value in source.items() if name.startswith("embeddings.")}
        for name, value in source.items():
            parts = name.split(".")
            if parts[:2] == ["encoder", "layer"] and int(parts[2]) >= text.fusion_layer:
                if unequal and parts[3:5] == ["crossattention", "self"] and parts[5] in ("key", "value"):
                    continue
                parts[2] = str(int(parts[2]) - text.fusion_layer)
                state[".".join(parts)] = value
        self.decoder.text_model.load_state_dict(state, strict=not unequal)
        if head is not None:
            own = {name: value for name, value in head.items() if not name.startswith("decoder.")}
            missing, unexpected = self.decoder.lm_head.load_state_dict(own, strict=False)
            if unexpected or any(not name.startswith("decoder.") for name in missing):
                raise ValueError(f"the MLM head does not fit: missing {missing}, unexpected {unexpected}")

    def encode_questions(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fused states (N, L, D) of questions and their mask (N, L) bool; image i belongs to question i."""
        image_states = self.albef.encode_images(pixel_values)
        texts = PackedTexts.from_padded(input_ids, attention_mask)
        if image_states.shape[0] != len(texts):
            raise ValueError(f"there are {image_states.shape[0]} images for {len(texts)} questions")
        fused = self.albef.fuse_pairs(texts, self.albef.text_model.encode(texts), image_states)
        mask = texts.rows.mask
        states = texts.rows.pad(fused)
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        return states, mask

    def score_answers(
        self,
        question_states: Tensor,
        question_mask: Tensor,
        answers: PackedTexts,
        question_index: Tensor,
        key_values: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher-forced answers.

        Args:
            question_states: (N, L, D).
            question_mask: (N, L).
            answers: packed answers, each starting with the start token.
            question_index: (A,) CPU, question of each answer.
            key_values: the decoder's keys and values of the questions, if they are projected already.

        Returns:
            logits (T, vocabulary) at the positions that predict a token, labels (T,), and the answer of each (T,).
        """
        hidden = self.decoder.hidden(answers, question_states, question_mask, question_index, key_values)
        row = torch.repeat_interleave(torch.arange(len(answers)), answers.counts)
        last = answers.counts.cumsum(0) - 1
        predicts = torch.ones(len(row), dtype=torch.bool)
        predicts[last] = False
        at = predicts.nonzero().flatten()
        device = hidden.device
        logits = self.decoder.lm_head(hidden.index_select(0, at.to(device)))
        return logits, answers.input_ids.index_select(0, (at + 1).to(device)), row[at].to(device)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        labels_attention_mask: Tensor | None = None,
        answers_per_question: Tensor | None = None,
        answer_weights: Tensor | None = None,
        return_dict: bool = True,
    ) -> AlbefAnswerOutput | tuple:
        """Loss of answers to questions.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) questions.
            attention_mask: (N, L).
            labels: (A, La) answers of all questions one after another, each starting with the start token ([CLS])
                and ending with [SEP]; padding may be -100.
            labels_attention_mask: (A, La), non-zero at tokens; default: where `labels` is neither -100 nor padding.
            answers_per_question: (N,) how many of the answers belong to each question; default one.
            answer_weights: (A,) default 1.
            return_dict: return `AlbefAnswerOutput` rather than a tuple.

        Raises:
            ValueError: answers are missing, or their numbers do not fit.
        """
        if labels is None:
            raise ValueError(
                "answers are missing: pass them as labels; to answer questions call generate() or rank_answers()"
            )
        states, mask = self.encode_questions(pixel_values, input_ids, attention_mask)
        answers, question, weights = self.pack_answers(
            len(states), labels, labels_attention_mask, answers_per_question, answer_weights
        )
        logits, targets, row = self.score_answers(states, mask, answers, question)
        nll = F.cross_entropy(logits.float(), targets, reduction="none")
        answer_loss = nll.new_zeros(len(answers)).index_add(0, row, nll)
        loss = (answer_loss * weights).sum() / len(states)
        output = AlbefAnswerOutput(
            loss=loss, answer_loss=answer_loss, logits=logits, labels=targets, question_states=states
        )
        return output if return_dict else output.to_tuple()

    def pack_answers(
        self,
        number: int,
        labels: Tensor,
        mask: Tensor | None,
        answers_per_question: Tensor | None,
        weights: Tensor | None,
    ) -> tuple[PackedTexts, Tensor, Tensor]:
        """Checks the answers of `number` questions: packed answers, question of each (CPU), weights."""
        if mask is None:
            mask = (labels != -100) & (labels != self.config.decoder_config.pad_token_id)
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
        question = torch.repeat_interleave(torch.arange(number), per_question)
        return answers, question, weights

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
    ) -> AlbefRankingOutput:
        """Ranks a closed list of answers: the k with the likeliest first token, then by the decoder's likelihood.

        As in the original, a score is the log probability of the first token plus that of the whole answer, in which
        the first token counts again.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) questions.
            attention_mask: (N, L).
            candidate_ids: (C, La) answers, each starting with the start token and ending with [SEP].
            candidate_attention_mask: (C, La); default: where they are not padding.
            top_k: length of the shortlist, at most C.
        """
        states, mask = self.encode_questions(pixel_values, input_ids, attention_mask)
        if candidate_attention_mask is None:
            candidate_attention_mask = candidate_ids != self.config.decoder_config.pad_token_id
        candidates = PackedTexts.from_padded(candidate_ids, candidate_attention_mask)
        if not 1 <= top_k <= len(candidates):
            raise ValueError(f"top_k is {top_k}, but there are {len(candidates)} candidate answers")
        number, device = len(states), states.device
        key_values = self.decoder.text_model.project_images(states)
        every = torch.arange(number)
        start = PackedTexts.from_padded(candidate_ids[:1, :1].expand(number, 1))
        first = self.decoder.lm_head(self.decoder.hidden(start, states, mask, every, key_values))
        probabilities = first.float().softmax(dim=-1)[:, candidate_ids[:, 1]]
        short_probabilities, shortlist = probabilities.topk(top_k, dim=1)
        answers = candidates.select(shortlist.flatten().cpu())
        logits, targets, row = self.score_answers(
            states, mask, answers, every.repeat_interleave(top_k), key_values=key_values
        )
        nll = F.cross_entropy(logits.float(), targets, reduction="none")
        answer_loss = torch.zeros(number * top_k, device=device).index_add(0, row, nll).view(number, top_k)
        scores = short_probabilities.log() - answer_loss
        order = scores.argsort(dim=1, descending=True)
        return AlbefRankingOutput(
            answer_index=shortlist.gather(1, order),
            probabilities=scores.softmax(dim=1).gather(1, order),
            shortlist=shortlist,
            scores=scores,
            answer_loss=answer_loss,
            first_token_logits=first,
            first_token_probabilities=probabilities,
        )

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **generation_kwargs: Any,
    ) -> Tensor:
        """Free answers.

        Args:
            pixel_values: (N, 3, H, W).
            input_ids: (N, L) questions.
            attention_mask: (N, L).
            generation_kwargs: of `GenerationMixin.generate` (`num_beams`, `max_new_tokens`, …).

        Returns:
            (N, at most 1 + max_new_tokens) token ids, starting with the start token.
        """
        decoder = self.config.decoder_config
        ids = {"bos_token_id": decoder.bos_token_id, "eos_token_id": decoder.eos_token_id}
        for name in ids:
            ids[name] = generation_kwargs.pop(name, ids[name])
            if ids[name] is None:
                raise ValueError(
                    f"{name} is unknown: set config.decoder_config.{name} ([CLS] for bos, [SEP] for eos) or pass it"
                )
        states, mask = self.encode_questions(pixel_values, input_ids, attention_mask)
        start = torch.full((len(states), 1), ids["bos_token_id"], dtype=torch.long, device=states.device)
        generation_kwargs.setdefault("max_new_tokens", 10)
        generation_kwargs.setdefault("pad_token_id", decoder.pad_token_id)
        return self.decoder.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=states,
            encoder_attention_mask=mask.long(),
            **ids,
            **generation_kwargs,
        )


__all__ = ["AlbefForQuestionAnswering", "AlbefForVisualEntailment", "AlbefForVisualReasoning"]
