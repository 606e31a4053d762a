"""CLIP's image preprocessing, pixel for pixel as the original does it, on Pillow alone.

Saved under the native class name, so that plain transformers opens it (and then differs by one pixel of offset at odd
margins, and on images with alpha or a palette).
"""

from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import SizeDict

# The native class that works without torchvision; its name is public under the first only from some version on.
_NativePil = getattr(transformers, "CLIPImageProcessorPil", None)
if _NativePil is None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil as _NativePil


def resized_size(size: tuple[int, int], shortest_edge: int) -> tuple[int, int]:
    """Width and height that bring the shorter side to `shortest_edge`; the longer one is truncated, not rounded."""
    width, height = size
    if width <= height:
        return shortest_edge, int(shortest_edge * height / width)
    return int(shortest_edge * width / height), shortest_edge


def center_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of an image; what a smaller image lacks is black. Half pixels go to the even offset."""

    def offset(have: int, want: int) -> int:
        return round((have - want) / 2) if have >= want else -((want - have) // 2)

    left, top = offset(image.width, width), offset(image.height, height)
    if (left, top) == (0, 0) and image.size == (width, height):
        return image
    return image.crop((left, top, left + width, top + height))


def resize_and_crop(
    image: Image.Image,
    size: SizeDict | None,
    crop_size: SizeDict | None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Resize and crop in the image's own mode, then RGB.

    The order matters: a palette is resized by nearest neighbour, and alpha weighs the colours before it is dropped.

    Args:
        image: any mode.
        size: with `shortest_edge`, or `height` and `width`; None leaves the size.
        crop_size: with `height` and `width`; None crops nothing.
        resample: filter for modes that can be interpolated.

    Raises:
        ValueError: a size of another form.
    """
    if size is not None:
        if size.shortest_edge and not size.longest_edge:
            target = resized_size(image.size, size.shortest_edge)
        elif size.height and size.width:
            target = (size.width, size.height)
        else:
            raise ValueError(f"size must hold 'shortest_edge' or 'height' and 'width', not {dict(size)}")
        if image.size != target:
            image = image.resize(target, resample)
    if crop_size is not None:
        image = center_crop(image, crop_size.width, crop_size.height)
    return image.convert("RGB")


class CLIPImageProcessorPil(_NativePil):
    """The native image processor with the original's geometry.

    Arrays and tensors that are not bytes cannot become Pillow images and go the native way.
    """

    @classmethod
    def from_native(cls, image_processor: Any) -> "CLIPImageProcessorPil":
        """Same settings as a native `CLIPImageProcessor` of either backend."""
        settings = image_processor.to_dict()
        return cls(**{key: value for key, value in settings.items() if key in cls.valid_kwargs.__annotations__})

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        images = [_as_pil(image) for image in self._prepare_images_structure(images)]
        if kwargs.get("do_convert_rgb") and all(isinstance(image, Image.Image) for image in images):
            size = kwargs["size"] if kwargs.get("do_resize") else None
            crop_size = kwargs["crop_size"] if kwargs.get("do_center_crop") else None
            resample = kwargs["resample"] if kwargs.get("resample") is not None else self.resample
            images = [resize_and_crop(image, size, crop_size, Image.Resampling(int(resample))) for image in images]
            kwargs |= {"do_resize": False, "do_center_crop": False}
        return super()._preprocess_image_like_inputs(images, *args, **kwargs)


def _as_pil(image: Any) -> Any:
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[-1] in (3, 4)):
        return Image.fromarray(image)
    return image


__all__ = ["CLIPImageProcessorPil", "center_crop", "resize_and_crop", "resized_size"]
