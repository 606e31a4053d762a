"""CogVLM's processor: square images, the conversation formats of the released models, and boxes in text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature, ProcessorMixin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

# Format of a conversation -> words in front of the answer; None: the text as it is.
ANSWER_WORDS: dict[str, str | None] = {"chat": "Answer:", "vqa": "Short answer:", "base": None}
# What the grounding models are asked (section 2.4 of the paper); {} is a phrase or a box.
GROUNDING_PROMPTS = {
    "locate": "Where is {}? Answer in [[x0,y0,x1,y1]] format.",
    "describe": "What is in the area {}?",
    "caption": "Describe the image, with the box [[x0,y0,x1,y1]] of each object.",
}
_IGNORED = -100
_BOX = r"\d{3}(?:,\d{3}){3}"
_BOXES = re.compile(rf"\[\[({_BOX}(?:;{_BOX})*)\]\]")
_COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "white")
# Format of a conversation -> template of `apply_chat_template`. As in training, pictures stand in front of everything,
# and a single question without words is not written.
_CHAT_TEMPLATE = (
    "{%- set flat = namespace(images='', turns=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['user', 'assistant'] -%}"
    "{{ raise_exception('CogVLM knows the roles user and assistant only') }}"
    "{%- endif -%}"
    "{%- if message['content'] is string -%}"
    "{%- set texts = message['content'].split('<image>') -%}"
    "{%- set flat.images = flat.images ~ '<image>' * (texts | length - 1) -%}"
    "{%- else -%}"
    "{%- set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list -%}"
    "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list -%}"
    "{%- set flat.images = flat.images ~ '<image>' * (pictures | length) -%}"
    "{%- endif -%}"
    "{%- set text = texts | select | map('trim') | join(' ') -%}"
    "{%- set flat.turns = flat.turns + [{'role': message['role'], 'text': text}] -%}"
    "{%- endfor -%}"
    "{%- set asked = flat.turns | selectattr('role', 'equalto', 'user') | list -%}"
    "{%- set bare = asked | length == 1 and not asked[0]['text'] -%}"
    "{{ flat.images }}"
    "{%- for turn in flat.turns -%}"
    "{%- if turn['role'] == 'user' -%}{{ '' if bare else 'Question: ' ~ turn['text'] }}"
    "{%- else -%}"
    "{{ '' if bare else ' Answer: ' }}{% generation %}{{ turn['text'] }}{% endgeneration %}"
    "{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt and not bare -%}{{ ' Answer:' }}{%- endif -%}"
)
CHAT_TEMPLATES = {
    "chat": _CHAT_TEMPLATE,
    "vqa": _CHAT_TEMPLATE.replace(" Answer:", f" {ANSWER_WORDS['vqa']}"),
    "base": _CHAT_TEMPLATE,
}

Box = tuple[float, float, float, float]


class BoxError(ValueError):
    """A box that is not inside its image."""


def format_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> str:
    """Boxes as text: `[[x0,y0,x1,y1;...]]` in thousandths of the image, three digits each.

    Args:
        boxes: (left, top, right, bottom) in pixels.
        size: (width, height) of the image in pixels.

    Raises:
        BoxError: no box, a box that reaches out of the image, or one whose corners are in the wrong order.
    """
    if not len(boxes):
        raise BoxError("there is no box to write")
    written = []
    for box in boxes:
        check_box(box, size)
        sides = [value / size[i % 2] for i, value in enumerate(box)]
        written.append(",".join(f"{min(round(1000 * float(side)), 999):03d}" for side in sides))
    return f"[[{';'.join(written)}]]"


def check_box(box: Sequence[float], size: tuple[int, int]) -> None:
    """Refuses a box (left, top, right, bottom) in pixels that is not inside an image of `size` (width, height)."""
    width, height = size
    if len(box) != 4:
        raise BoxError(f"a box is (left, top, right, bottom), not {list(box)}")
    left, top, right, bottom = (float(value) for value in box)
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise BoxError(
            f"box {[left, top, right, bottom]} is not inside the image of {width} x {height} pixels: expected 0 <= "
            f"left < right <= {width} and 0 <= top < bottom <= {height}"
        )


@dataclass(frozen=True)
class GroundedPhrase:
    """A place in a text that names boxes.

    Attributes:
        phrase: the words in front, from the boxes before or the last sentence end.
        boxes: (left, top, right, bottom) in pixels of the given size, or in shares of the image.
        span: of the boxes' text, in characters.
    """

    phrase: str
    boxes: tuple[Box, ...]
    span: tuple[int, int]


def parse_boxes(text: str, size: tuple[int, int] | None = None) -> list[GroundedPhrase]:
    """The boxes in a text that a model has written; text that only looks alike is left alone.

    Args:
        text: as generated.
        size: (width, height) of the image in pixels; None gives shares in [0, 1).
    """
    width, height = size or (1, 1)
    found, end = [], 0
    for match in _BOXES.finditer(text):
        boxes = []
        for part in match.group(1).split(";"):
            x0, y0, x1, y1 = (int(value) / 1000 for value in part.split(","))
            # A model may name the corners in any order.
            boxes.append((min(x0, x1) * width, min(y0, y1) * height, max(x0, x1) * width, max(y0, y1) * height))
        before = re.split(r"[.;:!?\n]", text[end : match.start()])[-1]
        found.append(GroundedPhrase(before.strip(" ,"), tuple(boxes), match.span()))
        end = match.end()
    return found


def draw_boxes(image: Image.Image, text: str, width: int | None = None) -> Image.Image:
    """A copy of the image with the boxes of a text, one colour a phrase, and the phrase beside the first box."""
    picture = image.convert("RGB").copy()
    drawing = ImageDraw.Draw(picture)
    width = width or max(1, round(min(picture.size) / 150))
    for number, grounded in enumerate(parse_boxes(text, picture.size)):
        colour = _COLOURS[number % len(_COLOURS)]
        for box in grounded.boxes:
            drawing.rectangle(box, outline=colour, width=width)
        if grounded.phrase:
            left, top = grounded.boxes[0][:2]
            drawing.text((left + width + 1, top + width + 1), grounded.phrase, fill=colour)
    return picture


def conversation_prompt(query: str, history: Sequence[tuple[str, str]] = (), template: str = "chat") -> str:
    """The text of a turn in one of the released models' formats.

    Args:
        query: what is asked now.
        history: (question, answer) of the turns before; `"base"` has no place for them.
        template: `"chat"`, `"vqa"` or `"base"`.

    Raises:
        ValueError: an unknown format, or a history with `"base"`.
    """
    if template not in ANSWER_WORDS:
        raise ValueError(f"template is {template!r}; CogVLM knows {sorted(ANSWER_WORDS)}")
    words = ANSWER_WORDS[template]
    if words is None:
        if history:
            raise ValueError("the template 'base' is the text alone and has no place for a history; take 'chat'")
        return query
    turns = [f"Question: {asked} {words} {answer}\n" for asked, answer in history]
    return "".join([*turns, f"Question: {query} {words}"])


class CogVLMProcessor(ProcessorMixin):
    """Images and texts to the inputs of CogVLM.

    A row is the begin token, the tokens of its image, and the text. Texts that contain `image_token` have their
    images there instead; each place becomes `num_image_tokens` tokens.

    Args:
        image_processor: resizes to a square (bicubic) and normalises; `for_model` makes it.
        tokenizer: of the language model, with `image_token` among its special tokens.
        num_image_tokens: of an image: `CogVLMConfig.num_image_tokens`.
        image_token: stands for an image token.
        template: format of questions: `"chat"`, `"vqa"` or `"base"`.
        chat_template: for `apply_chat_template`; by default that of `template`, for `"base"` that of `"chat"`.
        answer_space: what stands between a question and the answer that is learnt. Nothing, as in the released code;
            what `for_model` finds for a language model that has not learnt to answer without it.

    Raises:
        ValueError: the tokenizer has no such token, or no end token.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1227,
        image_token: str = "<image>",
        template: str = "chat",
        chat_template: str | None = None,
        answer_space: str = "",
        **kwargs: Any,
    ) -> None:
        conversation_prompt("", template=template)
        if tokenizer is not None:
            known = tokenizer.convert_tokens_to_ids(image_token)
            if known is None or (known == tokenizer.unk_token_id and image_token != tokenizer.unk_token):
                raise ValueError(
                    f"the tokenizer has no image token {image_token!r}: make the processor with "
                    "CogVLMProcessor.for_model, which adds it (the language model's vocabulary stays as it is)"
                )
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no end token, by which an answer would end; set its eos_token")
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.template = template
        self.answer_space = answer_space
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATES[template], **kwargs)

    @classmethod
    def for_model(
        cls, tokenizer: Any, config: Any, *, answer_space: str | None = "", **kwargs: Any
    ) -> "CogVLMProcessor":
        """The processor of a model; adds the image token to a tokenizer that has none.

        The new token's id may lie beyond the language model's vocabulary: it is never looked up there. Set the
        model's `config.image_token_id` to `processor.image_token_id`.

        Args:
            tokenizer: of the language model.
            config: the `CogVLMConfig`.
            answer_space: of the constructor. None, for experts that are new in a language model: a space, unless the
                tokenizer begins every text with the token of a word behind a space, as SentencePiece does. With
                byte-level BPE (Llama 3) "Answer:red" is not what a language model has read, and, frozen, it will
                not learn to say it.
            kwargs: of the constructor.
        """
        if answer_space is None:
            alone, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a a"))
            answer_space = "" if behind == alone + alone else " "
        token = kwargs.get("image_token", "<image>")
        if token not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        size = config.vision_config.image_size
        images = BlipImageProcessorPil(size={"height": size, "width": size})
        return cls(images, tokenizer, num_image_tokens=config.num_image_tokens, answer_space=answer_space, **kwargs)

    @property
    def image_token_id(self) -> int:
        """Id of an image token."""
        return self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        return ["pixel_values", "input_ids", "token_type_ids", "attention_mask"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        history: Sequence[Any] | None = None,
        template: str | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes a batch of prompts.

        Args:
            images: None, or one image a text (nested lists for texts with several); with no text at all, each image
                is captioned.
            text: one text or several: questions that the format is put around, or, where a text holds `image_token`
                or there is no image for it, the prompt itself.
            history: (question, answer) pairs of the turns before, one list a text.
            template: instead of the processor's own.
            padding: False, True (to the longest) or `"max_length"`, on the tokenizer's side.
            truncation: refuse prompts longer than `max_length`; nothing is cut.
            max_length: in tokens, those of the images included.
            return_tensors: `"pt"`, or None for lists.
            kwargs: of the image processor.

        Raises:
            ValueError: images and texts do not fit, or a prompt is too long.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        pictures = _flat(images)
        if text is None:
            template = "base" if template is None else template
            text = [""] * len(pictures)
        texts = [text] if isinstance(text, str) else list(text)
        placed = sum(one.count(self.image_token) for one in texts)
        histories = [()] * len(texts) if history is None else list(history)
        if isinstance(text, str) and history is not None:
            histories = [history]
        if len(histories) != len(texts):
            raise ValueError(f"there are {len(texts)} texts, but histories of {len(histories)}")
        if placed and placed != len(pictures):
            raise ValueError(f"the texts have places for {placed} images ({self.image_token}), {len(pictures)} came")
        if not placed and pictures and len(pictures) != len(texts):
            raise ValueError(
                f"{len(pictures)} images came for {len(texts)} texts: give one a text, or write {self.image_token} "
                "into the texts where the images belong"
            )
        rows = []
        for one, turns in zip(texts, histories, strict=True):
            if placed or (not pictures and template is None and not turns):
                rows.append(self._pieces(one))
            else:
                prompt = conversation_prompt(one, turns, template or self.template)
                rows.append(self._pieces((self.image_token if pictures else "") + prompt))
        longest = max(map(len, rows))
        if truncation and max_length is not None and longest > max_length:
            raise ValueError(
                f"a prompt has {longest} tokens, {max_length} are allowed; it is not cut, as the end is where the "
                "answer begins and the front is the image: shorten the text, or raise max_length"
            )
        features: dict[str, Any] = dict(self._padded(rows, padding, max_length, return_tensors))
        if pictures:
            features |= self.image_processor(pictures, return_tensors=return_tensors, **kwargs)
        return BatchFeature(features, tensor_type=None)

    def conversation(
        self,
        query: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        answer: str | None = None,
        image: bool = True,
        template: str | None = None,
    ) -> dict[str, list[int]]:
        """Ids of one conversation, as the released code builds them.

        Args:
            query: the last question.
            history: the turns before.
            answer: to learn; it is tokenized by itself and ends with the end token.
            image: whether there is one.
            template: format, the processor's own by default.

        Returns:
            `input_ids`, `token_type_ids`, `attention_mask` and, with an answer, `labels`, -100 in front of it.
        """
        prompt = conversation_prompt(query, history, template or self.template)
        ids = self._pieces((self.image_token if image else "") + prompt)
        reply = []
        if answer is not None:
            said = (self.answer_space if prompt else "") + answer
            reply = [*self.tokenizer(said, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        row = {
            "input_ids": ids + reply,
            "token_type_ids": [int(one == self.image_token_id) for one in ids] + [0] * len(reply),
            "attention_mask": [1] * (len(ids) + len(reply)),
        }
        return row | ({"labels": [_IGNORED] * len(ids) + reply} if answer is not None else {})

    def training_inputs(
        self,
        images: Any,
        texts: Sequence[str],
        prompt: str = "",
        max_length: int | None = None,
        template: str = "base",
    ) -> BatchFeature:
        """A batch of images and what is to be said of them, for the first stage.

        Args:
            images: one a text; None leaves `pixel_values` out (features from a cache).
            texts: captions; cut at `max_length`, and then still ended.
            prompt: in front of each, read but not learnt.
            max_length: in tokens, those of the image included.
            template: format.

        Returns:
            `pixel_values`, `input_ids`, `token_type_ids`, `attention_mask`, `labels`; padded on the right.

        Raises:
            ValueError: `max_length` leaves no room behind the image.
        """
        rows, labels = [], []
        for text in texts:
            row = self.conversation(prompt, answer=text, template=template)
            front = row["labels"].count(_IGNORED)
            if max_length is not None and len(row["input_ids"]) > max_length:
                if front + 2 > max_length:
                    raise ValueError(
                        f"max_length {max_length} leaves no room for a text: image and prompt take {front} tokens"
                    )
                for name in ("input_ids", "labels"):
                    row[name] = [*row[name][: max_length - 1], self.tokenizer.eos_token_id]
            rows.append(row["input_ids"])
            labels.append(row["labels"])
        features = dict(self._padded(rows, True, None, "pt", side="right"))
        longest = features["input_ids"].shape[1]
        features["labels"] = torch.tensor([one + [_IGNORED] * (longest - len(one)) for one in labels])
        if images is not None:
            features |= self.image_processor(list(images), return_tensors="pt")
        return BatchFeature(features, tensor_type=None)

    def prepare_images(self, images: Sequence[Image.Image]) -> tuple[BatchFeature, list[int]]:
        """Pixels of the images of a batch, in order, and how many image tokens each becomes."""
        features = self.image_processor(list(images), return_tensors="pt") if images else BatchFeature({})
        return BatchFeature(dict(features), tensor_type=None), [self.num_image_tokens] * len(images)

    def complete_conversations(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds `token_type_ids` to a batch of conversations."""
        seen = (batch["input_ids"] == self.image_token_id) & (batch["attention_mask"] != 0)
        return {**batch, "token_type_ids": seen.long()}

    def decode_answers(self, ids: Any) -> list[str]:
        """Texts of generated tokens, without special ones."""
        return [one.strip() for one in self.batch_decode(ids, skip_special_tokens=True)]

    def post_process_grounding(self, text: str, size: tuple[int, int] | None = None) -> list[GroundedPhrase]:
        """Boxes of a generated text, see `parse_boxes`."""
        return parse_boxes(text, size)

    def _pieces(self, text: str) -> list[int]:
        """The begin token, and the text piece by piece between its images, as the released code tokenizes."""
        bos = self.tokenizer.bos_token_id
        if self.tokenizer.bos_token:
            text = text.removeprefix(self.tokenizer.bos_token)
        ids = [] if bos is None else [bos]
        for number, piece in enumerate(text.split(self.image_token)):
            if number:
                ids += [self.image_token_id] * self.num_image_tokens
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _padded(
        self,
        rows: list[list[int]],
        padding: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        side: str | None = None,
    ) -> BatchFeature:
        masks = [[1] * len(row) for row in rows]
        padded = self.tokenizer.pad(
            {"input_ids": rows, "attention_mask": masks},
            padding=padding,
            max_length=max_length if padding == "max_length" else None,
            padding_side=side,
        )
        token = self.image_token_id
        padded["token_type_ids"] = [
            [int(one == token and bool(real)) for one, real in zip(ids, mask, strict=True)]
            for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)
        ]
        return BatchFeature(dict(padded), tensor_type=return_tensors)


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [picture for one in images for picture in _flat(one)]
    return [images]


__all__ = ["CogVLMProcessor", "draw_boxes", "format_boxes", "parse_boxes"]
