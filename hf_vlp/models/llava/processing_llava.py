"""Pictures and conversations to the inputs of LLaVA; saved as the native `LlavaProcessor` and `LlavaNextProcessor`.

A picture is a run of image tokens, as long as its features. `prepare_images` gives the pictures' tensors and these
lengths, which is all that the collators of `hf_vlp.data.conversations` ask of a processor.
"""

from collections.abc import Sequence
from typing import Any, Literal

import transformers
from PIL import Image
from transformers import BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.tokenization_utils_base import AddedToken

from hf_vlp.models.llava.anyres_llava import MAX_TILES, check_grids, grids
from hf_vlp.models.llava.templates_llava import CHAT_TEMPLATES, IMAGE_TOKEN, flatten


class ImageTokenMissingError(ValueError):
    """The tokenizer has no token that could stand for a picture."""


def add_image_token(tokenizer: PreTrainedTokenizerBase, token: str = IMAGE_TOKEN) -> int:
    """Id of the tokenizer's image token, which is added if there is none; sets a padding token if there is none.

    Raises:
        ValueError: the tokenizer has neither a padding nor an end token.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding, unknown or end token to pad with; set tokenizer.pad_token")
    if token not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(token)


def chat_template_of(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """A chat template that takes pictures.

    Args:
        template: name in `CHAT_TEMPLATES` ("vicuna_v1", "llama_2", …), "chat" for the tokenizer's own, or a template
            in Jinja; by default the tokenizer's own if it has one, else Vicuna's.

    Raises:
        ValueError: an unknown name, or "chat" for a tokenizer without a template.
    """
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if template is None:
        template = "chat" if own else "vicuna_v1"
    if template == "chat":
        if not own:
            raise ValueError(
                "the tokenizer has no chat template; name one (vicuna_v1, …) or set tokenizer.chat_template"
            )
        # A template that goes through the parts of a message itself is left as it is.
        return own if "'image'" in own or '"image"' in own else flatten() + own
    if template in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[template]
    if "{" in template:
        return template
    raise ValueError(
        f"unknown template {template!r}; LLaVA has {', '.join(sorted(CHAT_TEMPLATES))}, and chat for the tokenizer's "
        "own; for one of your own put its Jinja into hf_vlp.models.llava.templates_llava.CHAT_TEMPLATES"
    )


def use_template(processor: Any, template: str) -> Any:
    """Has a processor prompt as the model is trained to answer; returns the processor.

    Args:
        template: name of a training template (`hf_vlp.data.conversations`).

    Raises:
        ValueError: LLaVA does not know it; or it is "chat" and the language model came without a template, so that
            there is none but one of `CHAT_TEMPLATES`, which is then to be named.
    """
    own = processor.tokenizer.chat_template or processor.chat_template
    if template == "chat":
        given = _name_of(own, processor.image_token)
        if given != "chat":
            raise ValueError(
                f"the language model came without a chat template: this processor's is {given!r}. Name it instead of "
                "'chat', or set tokenizer.chat_template"
            )
    if template != "chat" or processor.tokenizer.chat_template or not own:
        chosen = chat_template_of(processor.tokenizer, template)
        processor.chat_template = chosen.replace(IMAGE_TOKEN, processor.image_token)
    return processor


def trained_template(processor: Any) -> str:
    """Name of the training template whose prompts a processor writes, "chat" if it has one of its own."""
    return _name_of(processor.chat_template, processor.image_token)


def _name_of(source: Any, image_token: str) -> str:
    known = {jinja.replace(IMAGE_TOKEN, image_token): name for name, jinja in CHAT_TEMPLATES.items()}
    return known.get(source, "chat") if isinstance(source, str) else "chat"


class LlavaProcessorMixin:
    """What both processors add to the native ones."""

    # Every argument by name: transformers saves those that it finds in the signature.
    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = IMAGE_TOKEN,
        num_additional_image_tokens: int = 0,
        **kwargs: Any,
    ) -> None:
        token = getattr(tokenizer, "image_token", None) or image_token
        if tokenizer is not None and str(token) not in tokenizer.get_vocab():
            raise ImageTokenMissingError(
                f"the tokenizer {tokenizer.name_or_path!r} has no token {str(token)!r} to stand for a picture; make "
                f"the processor with {type(self).__name__}.for_language_model, which adds it"
            )
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, images: Any = None, text: str | Sequence[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: one image or a list.
            text: one text or a list, with one image token a picture; without it each picture is a text of its own.
            kwargs: as for transformers' processors. Several texts are padded if tensors are asked for.

        Raises:
            ValueError: the numbers of pictures and of image tokens in the texts differ.
        """
        if images is not None and text is None:
            count = len(images) if isinstance(images, list | tuple) else 1
            text = [self.image_token] * count
        if text is not None and not isinstance(text, str):
            text = list(text)
            if kwargs.get("return_tensors") is not None and len(text) > 1:
                kwargs.setdefault("padding", True)
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            wanted = sum(one.count(self.image_token) for one in texts)
            flat = [] if images is None else _flat(images)
            if wanted != len(flat):
                raise ValueError(
                    f"{len(flat)} pictures for {wanted} {self.image_token} tokens in {len(texts)} texts "
                    f"({[one.count(self.image_token) for one in texts][:8]} a text); give one {self.image_token} for "
                    "each picture"
                )
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_images(self, images: Sequence[Image.Image]) -> tuple[BatchFeature, list[int]]:
        """Tensors of pictures, and how many image tokens each of them takes.

        Args:
            images: in the order of their placeholders, over a whole batch.

        Returns:
            `pixel_values` (and `image_sizes` for NeXT) as the model takes them, and one number a picture.
        """
        features = self.image_processor(list(images), return_tensors="pt")
        sizes = [(image.height, image.width) for image in images]
        return features, self._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        # transformers saves what a tokenizer was made with, not what was set later.
        self.tokenizer.init_kwargs["padding_side"] = self.tokenizer.padding_side
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            # A fast tokenizer saves the padding and truncation of its last call as everyone's default.
            backend.no_truncation()
            backend.no_padding()
        return super().save_pretrained(*args, **kwargs)


class LlavaProcessor(LlavaProcessorMixin, transformers.LlavaProcessor):
    """transformers' `LlavaProcessor`, with the inputs of training."""

    @classmethod
    def for_language_model(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        vision_config: PreTrainedConfig,
        *,
        image_processor: Any = None,
        aspect: Literal["pad", "crop"] = "pad",
        num_additional_image_tokens: int = 1,
        vision_feature_select_strategy: str = "default",
        template: str | None = None,
    ) -> "LlavaProcessor":
        """For a language model's tokenizer: adds `<image>`, and pads on the left for generation.

        Args:
            vision_config: of the tower; tells image and patch size.
            image_processor: of the tower; its colours are taken over. CLIP's by default.
            aspect: "pad" fills a picture up to a square with the mean colour (v1.5), "crop" cuts the middle out (v1).
            num_additional_image_tokens: tokens of the tower beside the patches (the class token).
            vision_feature_select_strategy: "default" drops the first token, "full" keeps all.
            template: of conversations; see `chat_template_of`.
        """
        if aspect not in ("pad", "crop"):
            raise ValueError(f"aspect may be 'pad' or 'crop', not {aspect!r}")
        add_image_token(tokenizer)
        tokenizer.padding_side = "left"
        size = square_size(vision_config)
        return cls(
            LlavaImageProcessorPil(**_image_settings(size, image_processor), do_pad=aspect == "pad"),
            tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            num_additional_image_tokens=num_additional_image_tokens,
            chat_template=chat_template_of(tokenizer, template),
        )


class LlavaNextProcessor(LlavaProcessorMixin, transformers.LlavaNextProcessor):
    """transformers' `LlavaNextProcessor`, with the inputs of training."""

    @classmethod
    def for_language_model(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        vision_config: PreTrainedConfig,
        *,
        image_processor: Any = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        max_tiles: int = MAX_TILES,
        num_additional_image_tokens: int = 1,
        vision_feature_select_strategy: str = "default",
        template: str | None = None,
    ) -> "LlavaNextProcessor":
        """As `LlavaProcessor.for_language_model`, for images in tiles.

        Args:
            image_grid_pinpoints: (height, width) resolutions; by default those of up to `max_tiles` tiles.
            max_tiles: most tiles of an image, the base picture not counted.

        Raises:
            TileError: a resolution takes more tiles, or is not made up of whole ones.
        """
        size = square_size(vision_config)
        pinpoints = image_grid_pinpoints or grids(size, max_tiles)
        check_grids(pinpoints, size, max_tiles)
        add_image_token(tokenizer)
        tokenizer.padding_side = "left"
        return cls(
            LlavaNextImageProcessorPil(**_image_settings(size, image_processor), image_grid_pinpoints=pinpoints),
            tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            num_additional_image_tokens=num_additional_image_tokens,
            chat_template=chat_template_of(tokenizer, template),
        )


def square_size(vision_config: PreTrainedConfig) -> int:
    """Side in pixels of a tower's square pictures.

    Raises:
        ValueError: they are not square.
    """
    size = vision_config.image_size
    if isinstance(size, int):
        return size
    if len(set(size)) != 1:
        raise ValueError(f"the vision tower takes pictures of {tuple(size)}; LLaVA's are square")
    return size[0]


def _image_settings(size: int, image_processor: Any) -> dict[str, Any]:
    """Settings of a picture of `size` pixels in the colours of a tower's own image processor."""
    settings: dict[str, Any] = {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }
    for name in ("image_mean", "image_std", "rescale_factor", "resample"):
        value = getattr(image_processor, name, None)
        if value is not None:
            settings[name] = value
    return settings


def _flat(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for item in images for one in (_flat(item) if isinstance(item, list | tuple) else [item])]
    return list(images) if getattr(images, "ndim", 3) == 4 else [images]


__all__ = [
    "CHAT_TEMPLATES",
    "ImageTokenMissingError",
    "LlavaNextProcessor",
    "LlavaProcessor",
    "add_image_token",
    "chat_template_of",
    "trained_template",
    "use_template",
]
