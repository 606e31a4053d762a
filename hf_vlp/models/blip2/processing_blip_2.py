"""Images and texts to the inputs of BLIP-2, for both stages; saved as transformers' own `Blip2Processor`.

One class, two forms. For stage 1 and retrieval the tokenizer is BERT's with [DEC] added, and `num_query_tokens` is
None. For stage 2 it is the language model's with `<image>` added, and every text is preceded by `num_query_tokens` of
them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import BatchFeature, PreTrainedTokenizerBase, logging
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

logger = logging.get_logger(__name__)

DECODER_TOKEN = "[DEC]"
IMAGE_TOKEN = "<image>"
QUESTION_PROMPT = "Question: {} Answer:"


def add_decoder_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a BERT tokenizer the [DEC] token with which the Q-Former starts to write a text, as its `bos_token`.

    Raises:
        ValueError: the tokenizer has no [CLS], [SEP] or padding token, which stage 1 reads.
    """
    missing = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name, None) is None]
    if missing:
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}, which the Q-Former's texts need ([CLS] text [SEP]); use a "
            "BERT tokenizer for stage 1"
        )
    if tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": DECODER_TOKEN})
    return tokenizer


def image_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the tokenizer's image token, which is added if there is none."""
    token = getattr(tokenizer, "image_token", None)
    if token is None:
        token = IMAGE_TOKEN
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(str(token))


class LanguageModelTokensMixin:
    """What a processor knows of the language model behind the Q-Former: image token, stop token, kind, padding.

    Attributes:
        encoder_decoder: whether texts go to an encoder and answers to a decoder; None: see `is_encoder_decoder`.
        stop_token: what ends an answer; None: see `stop_token_id`.
    """

    encoder_decoder: bool | None = None
    stop_token: str | None = None

    @property
    def image_token_id(self) -> int:
        """Id of the image token; to be the model's `config.image_token_index`."""
        return self.tokenizer.convert_tokens_to_ids(str(self.image_token))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether captions go to a decoder of their own."""
        if self.encoder_decoder is not None:
            return self.encoder_decoder
        return self.tokenizer.eos_token_id in self._ends()[1]

    @property
    def stop_token_id(self) -> int:
        """The token that ends a caption; to be the language model's `eos_token_id` in generation."""
        stop = self.stop_token
        if stop is None and self.tokenizer.eos_token_id in self._ends()[0] and not self.is_encoder_decoder:
            stop = "\n"
        if stop is None:
            if self.tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no end token; give the processor a stop_token that ends captions")
            return self.tokenizer.eos_token_id
        ids = self.tokenizer(stop, add_special_tokens=False)["input_ids"]
        # LAVIS makes </s> the unknown token of Llama too.
        if not ids or (ids[0] == self.tokenizer.unk_token_id and stop != self.tokenizer.unk_token):
            raise ValueError(f"the tokenizer has no token for the stop token {stop!r}; give another stop_token")
        return ids[0]

    def _ends(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        mask = pad_rows([[1] * len(ids) for ids in rows], 0)
        return {"input_ids": pad_rows(rows, self.tokenizer.pad_token_id), "attention_mask": mask}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # transformers saves what a tokenizer was made with, not what was set later; padded on the right, a batch of
        # prompts would be continued from its padding.
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # A fast tokenizer saves the padding and truncation of its last call, which would then be everyone's
            # default.
            backend.no_truncation()
            backend.no_padding()
        return super().save_pretrained(*args, **kwargs)


class Blip2Processor(LanguageModelTokensMixin, transformers.Blip2Processor):
    """transformers' `Blip2Processor`, with the inputs of training and of unprompted captioning.

    Args:
        image_processor: any image processor.
        tokenizer: BERT's with [DEC] (stage 1) or the language model's (stage 2).
        num_query_tokens: how many image tokens stand before a text; None for stage 1 and retrieval.
        encoder_decoder: whether the language model has an encoder (T5), so that the prompt goes to the encoder and the
            caption to the decoder. By default: whether the tokenizer puts its end token behind each text.
        stop_token: what ends a caption. By default the tokenizer's end token, or a newline if the tokenizer begins
            every text with its end token, as OPT's does.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int | None = None,
        encoder_decoder: bool | None = None,
        stop_token: str | None = None,
        **kwargs: Any,
    ) -> None:
        if num_query_tokens is not None:
            super().__init__(image_processor, tokenizer, num_query_tokens)
        else:
            # The native constructor adds an image token here too, with an id that the Q-Former has no embedding for.
            tokenizer.return_token_type_ids = False
            self.image_token = getattr(
                tokenizer, "image_token", AddedToken(IMAGE_TOKEN, normalized=False, special=True)
            )
            self.num_query_tokens = None
            ProcessorMixin.__init__(self, image_processor, tokenizer)
        self.encoder_decoder = encoder_decoder
        self.stop_token = stop_token

    @classmethod
    def for_retrieval(
        cls, tokenizer: PreTrainedTokenizerBase, *, image_size: int = 224, image_processor: Any = None
    ) -> "Blip2Processor":
        """For stage 1: adds [DEC] to a BERT tokenizer.

        Args:
            image_size: pixels a side that the vision tower takes.
            image_processor: instead of BLIP's with that size.
        """
        return cls(image_processor or default_image_processor(image_size), add_decoder_token(tokenizer))

    @classmethod
    def for_language_model(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        num_query_tokens: int,
        *,
        image_size: int = 224,
        image_processor: Any = None,
        encoder_decoder: bool | None = None,
        stop_token: str | None = None,
    ) -> "Blip2Processor":
        """For stage 2: adds `<image>` to the tokenizer of a language model and sets its padding side for generation.

        Args:
            num_query_tokens: of the model.
            image_size: pixels a side that the vision tower takes.
            image_processor: instead of BLIP's with that size.
        """
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        image_token_id(tokenizer)
        image_processor = image_processor or default_image_processor(image_size)
        processor = cls(image_processor, tokenizer, num_query_tokens, encoder_decoder, stop_token)
        tokenizer.padding_side = "right" if processor.is_encoder_decoder else "left"
        return processor

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Inputs of the model from images, texts or both.

        Args:
            images: one image or a list of images.
            text: one text or a list of texts. In the form for stage 2 images alone are given an empty text, so that
                the result has the image tokens and is all that `generate` needs.
            kwargs: as for transformers' processors (`return_tensors`, `padding`, `truncation`, `max_length`, ...).
                Several texts are padded if tensors are asked for.
        """
        if images is not None and text is None and self.num_query_tokens is not None:
            count = len(images) if isinstance(images, list | tuple) else 1
            if getattr(images, "ndim", 3) == 4:
                count = len(images)
            text = [""] * count
        if text is not None and not isinstance(text, str):
            text = list(text)
            if kwargs.get("return_tensors") is not None and len(text) > 1:
                kwargs.setdefault("padding", True)
        if self.num_query_tokens is not None:
            return super().__call__(images=images, text=text, **kwargs)
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        # Not through the native call, which subtracts the image tokens from `max_length` even where there are none.
        arguments = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        tensors = arguments["text_kwargs"].pop("return_tensors", None)
        arguments["images_kwargs"].pop("return_tensors", None)
        encoding = {}
        if text is not None:
            encoding |= self.tokenizer([text] if isinstance(text, str) else text, **arguments["text_kwargs"])
        if images is not None:
            encoding |= self.image_processor(images, **arguments["images_kwargs"])
        return BatchFeature(encoding, tensor_type=tensors)

    def training_inputs(
        self,
        images: Any,
        texts: Sequence[str],
        prompt: str | Sequence[str] = "",
        max_length: int | None = None,
    ) -> BatchFeature:
        """A batch of stage 2: captions (or answers) with their labels.

        Args:
            images: B images, or None if their features are cached.
            texts: B captions, without the prompt.
            prompt: what the model is given before the caption, one for all or one an image; not learnt.
            max_length: longest text in tokens, prompt and stop token included, image tokens not. A longer caption is
                cut and so loses its stop token (as in LAVIS), which is logged. Of an encoder-decoder language model:
                longest prompt and longest caption, each with its end token, which it keeps.

        Returns:
            `pixel_values` (B, 3, H, W), `input_ids` (B, L) image tokens first, `attention_mask` (B, L) and `labels`,
            all padded on the right. Causal language models: `labels` (B, L), -100 at image tokens, prompt and
            padding, the stop token last; without a prompt the token with which the tokenizer begins a text is learnt
            too, as in LAVIS. Encoder-decoder ones: the prompt is in `input_ids`, the caption in `labels` (B, target
            length).

        Raises:
            ValueError: this is a processor for stage 1, or the numbers of images, texts and prompts differ.
        """
        if self.num_query_tokens is None:
            raise ValueError(
                "this processor is for stage 1 (num_query_tokens is None); make one for the language model with "
                "Blip2Processor.for_language_model"
            )
        texts = list(texts)
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(texts):
            raise ValueError(f"{len(prompts)} prompts for {len(texts)} texts; give one prompt, or one for each text")
        if images is not None and isinstance(images, list | tuple) and len(images) != len(texts):
            raise ValueError(f"{len(images)} images for {len(texts)} texts; give one text an image")
        encode = self._encoder_decoder_batch if self.is_encoder_decoder else self._causal_batch
        batch = encode(texts, prompts, max_length)
        if images is not None:
            batch["pixel_values"] = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return BatchFeature(batch)

    def _causal_batch(self, texts: list[str], prompts: list[str], max_length: int | None) -> dict[str, torch.Tensor]:
        stop = self.stop_token_id
        rows, targets = [], []
        for text, prompt in zip(texts, prompts, strict=True):
            ids, masked = self._prompted(prompt.strip(), text.strip())
            ids = [*ids, stop]
            rows.append(ids)
            targets.append([-100] * masked + ids[masked:])
        rows, targets = self._cut(rows, max_length), self._cut(targets, max_length, log=False)
        image = [self.image_token_id] * self.num_query_tokens
        rows = [image + ids for ids in rows]
        targets = [[-100] * len(image) + ids for ids in targets]
        return {**self._padded(rows), "labels": pad_rows(targets, -100)}

    def _encoder_decoder_batch(
        self, texts: list[str], prompts: list[str], max_length: int | None
    ) -> dict[str, torch.Tensor]:
        image = [self.image_token_id] * self.num_query_tokens
        # By the tokenizer, which cuts the text and leaves the end token behind it.
        truncation = {} if max_length is None else {"truncation": True, "max_length": max_length}
        rows = [image + self.tokenizer(prompt.strip(), **truncation)["input_ids"] for prompt in prompts]
        labels = pad_rows([self.tokenizer(text.strip(), **truncation)["input_ids"] for text in texts], -100)
        return {**self._padded(rows), "labels": labels, "decoder_attention_mask": (labels != -100).long()}

    def _prompted(self, prompt: str, text: str) -> tuple[list[int], int]:
        """Ids of the prompt followed by the text, and how many of them belong to the prompt."""
        if not prompt:
            return self.tokenizer(text)["input_ids"], 0
        whole = f"{prompt} {text}" if text else prompt
        ids = self.tokenizer(whole)["input_ids"]
        own = self.tokenizer(prompt)["input_ids"]
        if ids[: len(own)] == own:
            return ids, len(own)
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"the prompt {prompt!r} is tokenized differently in front of {text!r}, and this slow tokenizer "
                "cannot say where it ends; use the fast tokenizer"
            )
        # A token may straddle the border; what begins inside the prompt counts as prompt.
        offsets = self.tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
        first = next((i for i, (start, end) in enumerate(offsets) if end > start and start >= len(prompt)), len(ids))
        return ids, first

    def _cut(self, rows: list[list[int]], max_length: int | None, *, log: bool = True) -> list[list[int]]:
        if max_length is None:
            return rows
        long = sum(len(ids) > max_length for ids in rows)
        if long and log:
            logger.warning_once(
                f"{long} of {len(rows)} captions are longer than max_length={max_length} tokens: they are cut and "
                "lose their stop token, so the model does not learn to end them; raise max_length (said once)"
            )
        return [ids[:max_length] for ids in rows]

    @staticmethod
    def question(question: str, history: Sequence[tuple[str, str]] = ()) -> str:
        """The prompt with which BLIP-2 is asked about an image, after earlier turns of a conversation over it.

        Args:
            question: to be answered.
            history: earlier (question, answer) pairs, oldest first.
        """
        turns = [f"{QUESTION_PROMPT.format(asked.strip())} {answer.strip().rstrip('.')}." for asked, answer in history]
        return " ".join([*turns, QUESTION_PROMPT.format(question.strip())])


def default_image_processor(image_size: int) -> BlipImageProcessorPil:
    """BLIP-2's image preprocessing: bicubic resize to a square, CLIP's mean and deviation; with Pillow alone."""
    return BlipImageProcessorPil(size={"height": image_size, "width": image_size})


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of ids as a matrix (B, longest), padded on the right with `value`."""
    longest = max(map(len, rows), default=0)
    return torch.tensor([ids + [value] * (longest - len(ids)) for ids in rows], dtype=torch.long)


__all__ = [
    "Blip2Processor",
    "LanguageModelTokensMixin",
    "add_decoder_token",
    "default_image_processor",
    "image_token_id",
    "pad_rows",
]
