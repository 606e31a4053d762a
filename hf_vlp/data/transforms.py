"""Image augmentation for training whose randomness comes from the record, not from the process."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox
from PIL import Image, ImageEnhance, ImageOps


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, optional flip, optional colour jitter, as one callable (image, seed) -> image.

    The crop is the one that CLIP-style training uses: an area of `scale` of the picture and an aspect ratio of
    `ratio`, both drawn; ten tries, then the largest centred crop of an allowed ratio. The same image with the same
    seed gives the same pixels in any process.

    Attributes:
        size: side of the square result, in pixels.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width over height; drawn log-uniformly.
        flip: probability of a mirror image. 0 by default, because captions say left and right.
        color_jitter: largest relative change of brightness, contrast and saturation; 0 is off.

    Raises:
        ValueError: sizes or shares outside their range.
    """

    size: int
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: need 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={self.ratio}: need 0 < smallest <= largest")
        if not 0 <= self.flip <= 1 or not 0 <= self.color_jitter < 1:
            raise ValueError(f"flip={self.flip}, color_jitter={self.color_jitter}: each is a share between 0 and 1")

    def __call__(self, image: Image.Image, seed: int) -> Image.Image:
        """Augments one RGB image.

        Args:
            image: RGB picture of any size.
            seed: the record's seed of this epoch, non-negative.
        """
        draws = Generator(Philox(key=seed))
        box = self._crop(image.width, image.height, draws)
        # Always drawn, so that switching one option on does not change what the others draw.
        mirrored = draws.random() < self.flip
        factors = 1.0 + self.color_jitter * (2.0 * draws.random(3) - 1.0)
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if mirrored:
            image = ImageOps.mirror(image)
        if self.color_jitter:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for enhancer, factor in zip(enhancers, factors.tolist()):
                image = enhancer(image).enhance(factor)
        return image

    def _crop(self, width: int, height: int, draws: Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in whole pixels."""
        low, high = (math.log(bound) for bound in self.ratio)
        for area, logratio, across, down in draws.random((10, 4)).tolist():
            target = width * height * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + logratio * (high - low))
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
                return left, top, left + w, top + h
        ratio = float(np.clip(width / height, *self.ratio))
        w = min(width, max(1, round(height * ratio)))
        h = min(height, max(1, round(width / ratio)))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h
