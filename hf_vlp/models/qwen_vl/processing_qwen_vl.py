"""Images, text and boxes to the inputs of Qwen-VL, and back from what it writes."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import BatchFeature, ProcessorMixin
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.tokenization_utils_base import AddedToken

IMAGE_START, IMAGE_END, IMAGE_TOKEN = "<img>", "</img>", "<imgpad>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
# In the order in which the original numbers them.
TOKENS = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", IMAGE_START, IMAGE_END, IMAGE_TOKEN)
# Coordinates are whole numbers from 0 to 999 (section 2.2, "normalised to the range [0, 1000)").
SCALE = 1000

_SPAN = re.compile(re.escape(IMAGE_START) + r"(.*?)" + re.escape(IMAGE_END), re.DOTALL)
_POINT = r"\((-?\d+)\s*,\s*(-?\d+)\)"
_REF = r"(?:<ref>(?P<ref>(?:(?!</?ref>|<box>|<quad>).)*)</ref>)?\s*"
_REGION = re.compile(_REF + r"(?:<box>(?P<box>.*?)</box>|<quad>(?P<quad>.*?)</quad>)", re.DOTALL)

# ChatML as the authors' fine-tuning and chat code write it. Images are numbered through the conversation; each ends
# with a line break, which words behind it need not bring along.
CHAT_TEMPLATE = (
    "{%- set pictures = namespace(count=0) -%}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- set last = namespace(image=false) -%}{%- for entry in message['content'] -%}"
    "{%- if entry['type'] == 'image' -%}"
    "{%- set last.image = true -%}"
    "{%- set pictures.count = pictures.count + 1 -%}"
    "{{- 'Picture ' ~ pictures.count ~ ': <img><imgpad></img>\n' -}}"
    "{%- else -%}"
    "{{- entry['text'][1:] if last.image and entry['text'][:1] == '\n' else entry['text'] -}}"
    "{%- set last.image = false -%}"
    "{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


class BoxError(ValueError):
    """A box that lies outside of its image, or whose corners are not in order."""


@dataclass(frozen=True)
class Region:
    """A place in an image that a text names.

    Args:
        label: what stands in `<ref>` before it, None where nothing does.
        points: corners in thousandths of width and height: two of a `<box>` (top left, bottom right), four of a
            `<quad>`.
        span: [start, end) of its characters in the text.
    """

    label: str | None
    points: tuple[tuple[int, int], ...]
    span: tuple[int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) around the points, 0 to 999."""
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) around the points, in pixels of an image of this size."""
        x1, y1, x2, y2 = self.box
        return x1 / SCALE * width, y1 / SCALE * height, x2 / SCALE * width, y2 / SCALE * height


def box_text(box: Sequence[float], width: int, height: int, label: str | None = None) -> str:
    """`<ref>label</ref><box>(x1,y1),(x2,y2)</box>` of a box in pixels.

    Args:
        box: x1, y1, x2, y2 in pixels.
        width, height: of the image, in pixels.
        label: what is in the box; without it the box alone.

    Raises:
        BoxError: the box lies (in part) outside of the image, or its corners are not in order.
    """
    if len(box) != 4:
        raise BoxError(f"a box is x1, y1, x2, y2, not {list(box)}")
    x1, y1, x2, y2 = box
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise BoxError(
            f"box {tuple(box)} of {label!r} does not lie in the image of {width} x {height} pixels, or its corners "
            "are not (left, top), (right, bottom); clip it, or leave the record out"
        )
    scaled = [min(int(value / size * SCALE), SCALE - 1) for value, size in zip(box, (width, height) * 2, strict=True)]
    text = "<box>({},{}),({},{})</box>".format(*scaled)
    return text if label is None else f"<ref>{label}</ref>{text}"


def parse_regions(text: str, *, strict: bool = True) -> list[Region]:
    """The boxes and quadrangles that a text names, in order.

    Args:
        text: with its special tokens (decoded with `skip_special_tokens=False`).
        strict: raise on a malformed or outlying region; with False such regions are left out.

    Raises:
        BoxError: a region has another number of points, or one outside of 0 to 999.
    """
    regions = []
    for found in _REGION.finditer(text):
        kind = "box" if found["box"] is not None else "quad"
        points = tuple((int(x), int(y)) for x, y in re.findall(_POINT, found[kind]))
        problem = None
        if len(points) != {"box": 2, "quad": 4}[kind]:
            problem = f"has {len(points)} points"
        elif any(not 0 <= value < SCALE for point in points for value in point):
            problem = f"lies outside of the image, whose coordinates are 0 to {SCALE - 1}"
        elif kind == "box" and (points[0][0] > points[1][0] or points[0][1] > points[1][1]):
            problem = "does not name its top left corner first"
        if problem is None:
            regions.append(Region(found["ref"], points, found.span()))
        elif strict:
            raise BoxError(f"{found[0]!r} {problem}")
    return regions


def draw_regions(image: Image.Image, text: str, *, color: str = "red", width: int = 3) -> Image.Image:
    """A copy of the image with the regions of a text drawn and labelled.

    Args:
        text: as of `parse_regions`; malformed regions are not drawn.
    """
    picture = image.convert("RGB").copy()
    pen = ImageDraw.Draw(picture)
    for region in parse_regions(text, strict=False):
        scaled = [(x / SCALE * picture.width, y / SCALE * picture.height) for x, y in region.points]
        if len(scaled) == 2:
            pen.rectangle([*scaled[0], *scaled[1]], outline=color, width=width)
        else:
            pen.line([*scaled, scaled[0]], fill=color, width=width)
        if region.label:
            pen.text((scaled[0][0] + width, scaled[0][1] + width), region.label, fill=color)
    return picture


def image_span(path: str, length: int, image_token_id: int) -> list[int]:
    """What the original puts between `<img>` and `</img>`: the bytes of the path as ids, then padding.

    Like all text of the original, the path is in the Unicode form NFC.

    Nothing of it reaches the network; for comparison with the original's batches.

    Raises:
        ValueError: the path has more bytes than there is room.
    """
    written = list(unicodedata.normalize("NFC", path).encode("utf-8"))
    if len(written) > length:
        raise ValueError(f"the path {path!r} has {len(written)} bytes, an image has room for {length}")
    return written + [image_token_id] * (length - len(written))


class QwenVLProcessor(ProcessorMixin):
    """Images and texts with `<img></img>` where an image goes.

    Whatever a text has between `<img>` and `</img>` (a path, as in the authors' data) stands for one image; the
    processor puts `num_query_tokens` places there. `apply_chat_template` writes conversations (ChatML).

    Args:
        image_processor: resizes to a square, whatever the aspect ratio, and normalises; `for_image_size` makes it.
        tokenizer: of the language model; tokens that it lacks are added (resize the model's embeddings then).
        num_query_tokens: places of an image.
        chat_template: Jinja source; by default the authors' format.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_query_tokens: int = 256,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.num_query_tokens = num_query_tokens
        self.image_token = IMAGE_TOKEN
        if tokenizer is not None:
            known = tokenizer.get_vocab()
            added = [token for token in (TURN_START, TURN_END, *TOKENS) if token not in known]
            if added:
                special = [AddedToken(token, normalized=False, special=True) for token in added]
                tokenizer.add_tokens(special, special_tokens=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or TURN_END
            self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
            self.image_start_token_id = tokenizer.convert_tokens_to_ids(IMAGE_START)
            self.image_end_token_id = tokenizer.convert_tokens_to_ids(IMAGE_END)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def for_image_size(cls, tokenizer: Any, image_size: int = 448, **kwargs: Any) -> "QwenVLProcessor":
        """The authors' image settings: bicubic to a square, CLIP's mean and standard deviation.

        Args:
            tokenizer: of the language model; it is set to pad on the left, for generation.
            image_size: in pixels: 224 in pretraining, 448 in the other stages.
            kwargs: of the constructor.
        """
        tokenizer.padding_side = "left"
        return cls(BlipImageProcessorPil(size={"height": image_size, "width": image_size}), tokenizer, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    @property
    def stop_token_ids(self) -> list[int]:
        """What ends an answer: the end of the turn, and the tokenizer's end of text."""
        stops = [self.tokenizer.convert_tokens_to_ids(TURN_END), self.tokenizer.eos_token_id]
        return list(dict.fromkeys(stop for stop in stops if stop is not None))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Makes a batch.

        Args:
            images: one image, a list of them in reading order over all texts, or a list of lists, one a text.
            text: a string or several. Without it each image alone, `<img></img>`; with as many texts as images and no
                `<img>` in any, each image stands in front of its text.
            padding: as for tokenizers; by default on if there are several texts and tensors are asked for.
            truncation: cut texts at `max_length` tokens.
            max_length: in tokens, image places included.
            return_tensors: `"pt"`, or None for lists.
            kwargs: of the image processor.

        Raises:
            ValueError: neither images nor text; the texts name more or fewer images than there are; an image would
                be cut.
        """
        if images is None and text is None:
            raise ValueError("give images, text, or both")
        pictures = _flat(images)
        if text is None:
            text = [IMAGE_START + IMAGE_END] * len(pictures)
        texts = [text] if isinstance(text, str) else list(text)
        if pictures and len(pictures) == len(texts) and not any(IMAGE_START in one for one in texts):
            texts = [IMAGE_START + IMAGE_END + one for one in texts]
        expanded, found = [], 0
        for one in texts:
            spans = len(_SPAN.findall(one))
            found += spans
            places = IMAGE_START + IMAGE_TOKEN * self.num_query_tokens + IMAGE_END
            expanded.append(_SPAN.sub(lambda _, places=places: places, one))
        if images is not None and found != len(pictures):
            raise ValueError(
                f"the texts have {found} <img></img>, but {len(pictures)} images were given; write one for each "
                "image, or use apply_chat_template"
            )
        if padding is None:
            padding = return_tensors is not None and len(texts) > 1
        encoded = dict(
            self.tokenizer(
                expanded,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_token_type_ids=False,
            )
        )
        if truncation and max_length is not None:
            self._check_cut(encoded["input_ids"])
        if isinstance(text, str) and return_tensors is None:
            encoded = {name: value[0] for name, value in encoded.items()}
        if pictures:
            encoded |= self.image_processor(pictures, return_tensors=return_tensors, **kwargs)
        return BatchFeature(encoded)

    def _check_cut(self, rows: Any) -> None:
        for number, row in enumerate(rows):
            ids = row.tolist() if hasattr(row, "tolist") else row
            if ids.count(self.image_start_token_id) != ids.count(self.image_end_token_id):
                raise ValueError(f"text {number}: max_length cuts through an image; make it larger")

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # transformers saves what a tokenizer was made with, not what was set later; padded on the right, a batch of
        # prompts would be continued from its padding.
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        return super().save_pretrained(*args, **kwargs)

    def prepare_images(self, images: Sequence[Image.Image]) -> tuple[BatchFeature, list[int]]:
        """`pixel_values` (images, 3, H, W), and how many image tokens each image stands for."""
        features = BatchFeature(dict(self.image_processor(list(images), return_tensors="pt")))
        return features, [self.num_query_tokens] * len(images)

    def training_inputs(
        self, images: Any, texts: Sequence[str], prompt: str | Sequence[str] = "", max_length: int | None = None
    ) -> BatchFeature:
        """A batch of captions, as in the first stage: `<img>…</img>prompt caption<eos>`, padded on the right.

        Args:
            images: B images.
            texts: B captions.
            prompt: what stands before a caption and is not learnt, one for all or one an image.
            max_length: longest row in tokens, image places included; a longer caption is cut and loses its end.

        Returns:
            `pixel_values` (B, 3, H, W), `input_ids`, `attention_mask`, `labels` (B, L): the caption and its end token,
            -100 elsewhere.

        Raises:
            ValueError: the numbers of images, captions and prompts differ, or the tokenizer has no end token.
        """
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else list(prompt)
        pictures = _flat(images)
        if not len(pictures) == len(texts) == len(prompts):
            raise ValueError(f"{len(pictures)} images, {len(texts)} captions and {len(prompts)} prompts; give as many")
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError("the tokenizer has no eos_token, with which a caption ends; set one")
        opening = self.tokenizer(IMAGE_START + IMAGE_TOKEN * self.num_query_tokens + IMAGE_END)["input_ids"]
        opening = opening[: opening.index(self.image_end_token_id) + 1]
        rows, targets = [], []
        for text, asked in zip(texts, prompts, strict=True):
            asked_ids = self.tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
            said = f" {text.strip()}" if asked and not asked[-1:].isspace() else text.strip()
            caption = self.tokenizer(said, add_special_tokens=False)["input_ids"]
            row = [*opening, *asked_ids, *caption, end][:max_length]
            rows.append(row)
            targets.append(([-100] * (len(opening) + len(asked_ids)) + [*caption, end])[:max_length])
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "labels": torch.tensor([row + [-100] * (width - len(row)) for row in targets]),
        }
        return BatchFeature({**batch, **self.image_processor(pictures, return_tensors="pt")})

    def decode_answer(self, ids: Any) -> str:
        """The words of an answer with its `<ref>`, `<box>` and `<quad>` tags, up to the end of its turn."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        stops = [TURN_END, TURN_START, *([self.tokenizer.eos_token] if self.tokenizer.eos_token else [])]
        ends = [place for place in (text.find(stop) for stop in stops) if place >= 0]
        return text[: min(ends, default=len(text))].replace(IMAGE_TOKEN, "").strip()


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return list(images) if getattr(images, "ndim", 3) == 4 else [images]
    return [one for entry in images for one in (entry if isinstance(entry, list | tuple) else [entry])]


__all__ = [
    "BoxError",
    "QwenVLProcessor",
    "Region",
    "box_text",
    "draw_regions",
    "image_span",
    "parse_regions",
]
