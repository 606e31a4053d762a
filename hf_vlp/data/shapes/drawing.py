"""Draws a scene with Pillow.

The mask of each (shape, radius, texture) is made once, by counting which of 8 x 8 points in every pixel lie inside
the shape. All of it is integer arithmetic, so that a scene has the same pixels on every platform; drawing one is
then a `paste` or two an object.
"""

import math
from functools import lru_cache

import numpy as np
from PIL import Image

from .scenes import Scene

_SAMPLES = 8
_UNIT = 1000


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `scene.image_size` pixels square."""
    image = Image.new("RGB", (scene.image_size, scene.image_size), scene.background_rgb)
    for thing in scene.objects:
        body, pattern = _masks(thing.shape, thing.radius, thing.texture)
        corner = (thing.x - thing.radius, thing.y - thing.radius)
        image.paste(thing.rgb, (*corner, corner[0] + body.width, corner[1] + body.height), body)
        if pattern is not None:
            image.paste(_tint(thing.rgb), (*corner, corner[0] + body.width, corner[1] + body.height), pattern)
    return image


def _tint(rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    """The second colour of a texture: a light tint, or a dark shade where a tint would not show."""
    light = min(rgb) > 190
    return tuple(channel * 2 // 5 if light else (2 * channel + 3 * 255) // 5 for channel in rgb)


@lru_cache(maxsize=4096)
def _masks(shape: str, radius: int, texture: str) -> tuple[Image.Image, Image.Image | None]:
    """Coverage of the shape, and of the part of it that has the texture's second colour."""
    inside = _inside(shape, radius)
    if texture == "solid":
        return _coverage(inside, radius), None
    return _coverage(inside, radius), _coverage(inside & _pattern(texture, radius), radius)


def _coverage(points: np.ndarray, radius: int) -> Image.Image:
    side = 2 * radius
    counts = points.reshape(side, _SAMPLES, side, _SAMPLES).sum(axis=(1, 3), dtype=np.int64)
    return Image.fromarray((counts * 255 // _SAMPLES**2).astype(np.uint8))


def _inside(shape: str, radius: int) -> np.ndarray:
    """Which sample points lie in the shape: (2 * radius * 8, 2 * radius * 8) bool."""
    scale = 2 * _SAMPLES * radius
    # Odd numbers: the points stand in the middle of their cells, symmetric about the centre.
    line = (2 * np.arange(scale, dtype=np.int64) + 1 - scale) * _UNIT
    x, y = line[None, :], line[:, None]
    unit = _UNIT * scale

    def disc(center: int, reach: int) -> np.ndarray:
        return (x - center * scale) ** 2 + y**2 <= (reach * scale) ** 2

    if shape == "circle":
        return disc(0, 1000)
    if shape == "ring":
        return disc(0, 1000) & ~disc(0, 540)
    if shape == "crescent":
        return disc(0, 1000) & ~disc(450, 800)
    if shape == "square":
        return (abs(x) <= unit * 82 // 100) & (abs(y) <= unit * 82 // 100)
    if shape == "cross":
        reach, arm = unit * 96 // 100, unit * 32 // 100
        return ((abs(x) <= arm) & (abs(y) <= reach)) | ((abs(y) <= arm) & (abs(x) <= reach))
    return _polygon(x, y, [(across * scale, down * scale) for across, down in _CORNERS[shape]])


def _polygon(x: np.ndarray, y: np.ndarray, corners: list[tuple[int, int]]) -> np.ndarray:
    """Even-odd rule with integer cross products."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1]):
        crosses = (y0 > y) != (y1 > y)
        side = (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)
        inside ^= crosses & (side < 0 if y1 > y0 else side > 0)
    return inside


def _pattern(texture: str, radius: int) -> np.ndarray:
    """Which sample points have the second colour, before the shape cuts them out."""
    points = np.arange(2 * radius * _SAMPLES, dtype=np.int64)
    x, y = points[None, :], points[:, None]
    width = max(2, radius // 3) * _SAMPLES
    if texture == "striped":
        return np.broadcast_to((y // width) % 2 == 0, (len(points), len(points)))
    if texture == "checkered":
        return (x // width + y // width) % 2 == 0
    if texture == "dotted":
        pitch = max(3, radius // 2) * _SAMPLES
        across, down = 2 * (x % pitch) + 1 - pitch, 2 * (y % pitch) + 1 - pitch
        return (across**2 + down**2) * 9 <= 4 * pitch**2
    raise ValueError(f"unknown texture {texture!r}")


def _regular(count: int, turn: float = -math.pi / 2) -> list[tuple[int, int]]:
    angles = [turn + 2 * math.pi * step / count for step in range(count)]
    return [(round(_UNIT * math.cos(angle)), round(_UNIT * math.sin(angle))) for angle in angles]


def _star() -> list[tuple[int, int]]:
    outer, inner = _regular(5), _regular(5, math.pi / 5 - math.pi / 2)
    return [
        corner for tip, notch in zip(outer, inner) for corner in (tip, (notch[0] * 42 // 100, notch[1] * 42 // 100))
    ]


def _heart() -> list[tuple[int, int]]:
    corners = []
    for step in range(48):
        angle = 2 * math.pi * step / 48
        across = 16 * math.sin(angle) ** 3
        up = 13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)
        corners.append((round(across * 60), round(-(up + 2.5) * 60)))
    return corners


# Corners in thousandths of the radius, y downwards.
_CORNERS: dict[str, list[tuple[int, int]]] = {
    "triangle": [(0, -960), (960, 760), (-960, 760)],
    "diamond": [(0, -1000), (720, 0), (0, 1000), (-720, 0)],
    "arrow": [(-1000, -280), (100, -280), (100, -800), (1000, 0), (100, 800), (100, 280), (-1000, 280)],
    "hexagon": _regular(6, 0.0),
    "pentagon": _regular(5),
    "star": _star(),
    "heart": _heart(),
}
