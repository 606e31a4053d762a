"""Images, instructions and answers to the inputs of InstructBLIP; saved as transformers' own processor."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import BatchFeature, PreTrainedTokenizerBase, logging

from hf_vlp.models.blip2.processing_blip_2 import (
    LanguageModelTokensMixin,
    add_decoder_token,
    default_image_processor,
    image_token_id,
    pad_rows,
)

logger = logging.get_logger(__name__)

_NO_LENGTH = 1 << 30
# What a tokenizer is told by the caller of a processor.
_TEXT_OPTIONS = ("padding", "truncation", "max_length", "pad_to_multiple_of", "return_tensors")


class InstructBlipProcessor(LanguageModelTokensMixin, transformers.InstructBlipProcessor):
    """transformers' `InstructBlipProcessor`, with the inputs of training and of images without an instruction.

    Args:
        image_processor: any image processor.
        tokenizer: of the language model, with `<image>`.
        qformer_tokenizer: BERT's with [DEC], as the Q-Former's embeddings were trained.
        num_query_tokens: image tokens in front of a text.
        encoder_decoder: whether the language model has an encoder (T5); by default whether its tokenizer puts its end
            token behind each text.
        stop_token: what ends an answer; by default the tokenizer's end token.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        encoder_decoder: bool | None = None,
        stop_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, qformer_tokenizer, num_query_tokens)
        # Its positions are counted from the left of the row, padding included.
        qformer_tokenizer.padding_side = "right"
        self.encoder_decoder = encoder_decoder
        # LAVIS ends every answer with </s>, also where the tokenizer begins texts with it.
        self.stop_token = stop_token or tokenizer.eos_token

    @property
    def answer_space(self) -> str:
        """What stands between an instruction and its answer in one text: a space or nothing.

        Differs from LAVIS, which has nothing: SentencePiece (Vicuna) begins an answer with the token of a word behind
        a space by itself, but with byte-level BPE (OPT, GPT-2, Qwen, Llama 3) "what is it?" and "a cat" would become
        "what is it?a cat", which no language model has read.
        """
        if self.is_encoder_decoder:
            return ""
        alone = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        behind = self.tokenizer("a a", add_special_tokens=False)["input_ids"]
        return "" if behind == alone + alone else " "

    @classmethod
    def for_language_model(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        qformer_tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int,
        *,
        image_size: int = 224,
        image_processor: Any = None,
        encoder_decoder: bool | None = None,
        stop_token: str | None = None,
    ) -> "InstructBlipProcessor":
        """Adds `<image>` to the language model's tokenizer, [DEC] to the Q-Former's, and sets the padding side.

        Args:
            num_query_tokens: of the model.
            image_size: pixels a side that the vision tower takes.
            image_processor: instead of BLIP's with that size.
        """
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_token_id(tokenizer)
        add_decoder_token(qformer_tokenizer)
        image_processor = image_processor or default_image_processor(image_size)
        processor = cls(image_processor, tokenizer, qformer_tokenizer, num_query_tokens, encoder_decoder, stop_token)
        tokenizer.padding_side = "right" if processor.is_encoder_decoder else "left"
        return processor

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Inputs of the model from images, instructions or both.

        Args:
            images: one image or a list of images.
            text: one instruction or one an image. Images alone are given an empty one.
            kwargs: as for transformers' processors. Several texts are padded if tensors are asked for.
        """
        if images is not None and text is None:
            count = len(images) if isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4 else 1
            text = [""] * count
        if text is not None and not isinstance(text, str):
            text = list(text)
            if kwargs.get("return_tensors") is not None and len(text) > 1:
                kwargs.setdefault("padding", True)
        made = super().__call__(images=images, text=text, **kwargs)
        if isinstance(text, list) and kwargs.get("padding"):
            # Differs from transformers: its processor hands the language model's padding side on to the Q-Former's
            # tokenizer, so that with padding on the left the instructions of a batch get other positions than alone.
            options = {name: kwargs[name] for name in _TEXT_OPTIONS if name in kwargs}
            asked = self.qformer_tokenizer(text, padding_side="right", return_token_type_ids=False, **options)
            made["qformer_input_ids"], made["qformer_attention_mask"] = asked["input_ids"], asked["attention_mask"]
        ids = made.get("qformer_input_ids")
        if isinstance(ids, torch.Tensor) and ids.shape[-1] > self.qformer_tokenizer.model_max_length:
            # The Q-Former has no position for more; the language model reads all of it, as with LAVIS' `max_txt_len`.
            made.update(self._asked([text] if isinstance(text, str) else text, None))
        return made

    def training_inputs(
        self,
        images: Any,
        texts: Sequence[str],
        prompt: str | Sequence[str] = "",
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        frames: int = 1,
    ) -> BatchFeature:
        """A batch of instruction tuning.

        Args:
            images: B images, or None if their features are cached.
            texts: B answers.
            prompt: the instruction, one for all or one an image: read by the Q-Former and by the language model, not
                learnt.
            max_length: longest answer in tokens, the end token included (LAVIS' `max_output_txt_len`). A longer one
                is cut on the right; a causal language model's then loses its end token, as in LAVIS, which is logged.
            max_prompt_length: longest instruction in tokens of either tokenizer, special ones included (LAVIS'
                `max_txt_len`). A longer one loses its beginning.
            frames: images a row, for video: so many times `num_query_tokens` image tokens.

        Returns:
            `pixel_values`, `qformer_input_ids`, `qformer_attention_mask` (B, Lq), `input_ids`, `attention_mask` (B, L)
            and `labels`, all padded on the right. Causal language models: instruction and answer in one row, `labels`
            (B, L), -100 on image tokens, instruction and padding. Encoder-decoder ones: the answer in `labels` (B,
            target length), and `decoder_attention_mask`.

        Raises:
            ValueError: the numbers of images, answers and instructions differ.
        """
        texts = [text.strip() for text in texts]
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(texts):
            raise ValueError(
                f"{len(prompts)} instructions for {len(texts)} answers; give one instruction, or one for each answer"
            )
        if images is not None and isinstance(images, list | tuple) and len(images) != len(texts) * frames:
            raise ValueError(f"{len(images)} images for {len(texts)} answers; give one answer an image")
        prompts = [one.strip() for one in prompts]
        batch = self._asked(prompts, max_prompt_length)
        instructions = [cut_left(self.tokenizer, one, max_prompt_length) for one in prompts]
        encode = self._encoder_decoder_batch if self.is_encoder_decoder else self._causal_batch
        batch |= encode(instructions, texts, max_length, [self.image_token_id] * self.num_query_tokens * frames)
        if images is not None:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return BatchFeature(batch)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self.qformer_tokenizer.init_kwargs["padding_side"] = "right"
        return super().save_pretrained(*args, **kwargs)

    def prepare_images(self, images: Sequence[Any]) -> tuple[BatchFeature, list[int]]:
        """`pixel_values` (images, 3, H, W), and how many image tokens each image stands for."""
        features = BatchFeature(dict(self.image_processor(list(images), return_tensors="pt")))
        return features, [self.num_query_tokens] * len(images)

    def complete_conversations(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds the instruction for the Q-Former to a batch of `prompt_batch`: what its texts say.

        Raises:
            ValueError: the batch has labels, so its texts hold answers; train with `InstructionCollator`.
        """
        if "labels" in batch:
            raise ValueError(
                "the Q-Former must not read the answers that are to be learnt: train InstructBLIP with "
                "hf_vlp.data.InstructionCollator"
            )
        rows = [ids[mask.bool() & (ids != self.image_token_id)] for ids, mask in _rows(batch)]
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return {**batch, **self._asked(texts, None)}

    def _asked(self, texts: list[str], max_length: int | None) -> dict[str, torch.Tensor]:
        """Instructions for the Q-Former, none longer than its tokenizer's `model_max_length` (see `from_stage1`)."""
        longest = min(max_length or _NO_LENGTH, self.qformer_tokenizer.model_max_length)
        asked = [cut_left(self.qformer_tokenizer, one, longest) for one in texts]
        return {
            "qformer_input_ids": pad_rows(asked, self.qformer_tokenizer.pad_token_id),
            "qformer_attention_mask": pad_rows([[1] * len(ids) for ids in asked], 0),
        }

    def _causal_batch(
        self, instructions: list[list[int]], texts: list[str], max_length: int | None, image: list[int]
    ) -> dict[str, torch.Tensor]:
        start = len(self._ends()[0])
        # Behind the begin token alone, an answer is the first word of a text.
        spaces = [self.answer_space if len(asked) > start else "" for asked in instructions]
        whole = [
            [*self.tokenizer(space + text)["input_ids"], self.stop_token_id]
            for space, text in zip(spaces, texts, strict=True)
        ]
        long = sum(max_length is not None and len(ids) > max_length for ids in whole)
        if long:
            logger.warning_once(
                f"{long} of {len(texts)} answers are longer than max_length={max_length} tokens: they are cut and "
                "lose their end token, so the model does not learn to end them; raise max_length (said once)"
            )
        answers = [ids[:max_length][start:] for ids in whole]
        rows = [image + asked + answer for asked, answer in zip(instructions, answers, strict=True)]
        labels = [
            [-100] * (len(image) + len(asked)) + answer for asked, answer in zip(instructions, answers, strict=True)
        ]
        return {**self._padded(rows), "labels": pad_rows(labels, -100)}

    def _encoder_decoder_batch(
        self, instructions: list[list[int]], texts: list[str], max_length: int | None, image: list[int]
    ) -> dict[str, torch.Tensor]:
        truncation = {} if max_length is None else {"truncation": True, "max_length": max_length}
        labels = pad_rows([self.tokenizer(text, **truncation)["input_ids"] for text in texts], -100)
        rows = [image + asked for asked in instructions]
        return {**self._padded(rows), "labels": labels, "decoder_attention_mask": (labels != -100).long()}


def _rows(batch: dict[str, Any]) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def cut_left(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int | None) -> list[int]:
    """Ids of a text with its special tokens, at most `max_length` of them; what is too much goes from its beginning.

    Raises:
        ValueError: `max_length` leaves no room beside the special tokens.
    """
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer(text)["input_ids"]
    if max_length is None or len(whole) <= max_length:
        return whole
    special = len(whole) - len(bare)
    room = max_length - special
    if room < 1:
        raise ValueError(f"max_prompt_length={max_length} leaves no room beside {special} special tokens; raise it")
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start] + bare[-room:] + whole[start + len(bare) :]


__all__ = ["InstructBlipProcessor", "cut_left"]
