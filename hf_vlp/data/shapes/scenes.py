"""What a Shapes scene is, and how one is drawn at random from (seed, split, index).

A scene is a background and a few objects on a grid; an object has a shape, a colour, a size, a texture and a place.
Everything that is ever said about a scene (captions, questions, boxes, relations) is derived from these, so it is
true by construction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from .draws import Draws
from .vocabulary import BACKGROUNDS, COLORS, SHAPES, SIZES, TEXTURES

SPLITS: tuple[str, ...] = ("train", "validation", "test", "heldout")
# Size -> radius in thousandths of half a grid cell.
RADII: dict[str, int] = {"small": 540, "medium": 740, "large": 960}
DETAILS: tuple[str, ...] = ("size", "texture", "place", "relation", "background")
JITTER = 12

Pair = tuple[str, str]


@dataclass(frozen=True)
class ShapesConfig:
    """What may occur in a scene and in what is said about it.

    Attributes:
        image_size: side of the square image, in pixels.
        grid: cells a side; at most one object stands in a cell, so objects never overlap.
        rows: rows of cells, where there are not as many as `grid`; 1 puts the objects side by side, at any height.
        min_objects, max_objects: how many objects a scene has, both ends included.
        colors, shapes, sizes, textures, backgrounds: what is drawn from, names of `vocabulary`.
        heldout: combinations of colour and shape that occur in split `"heldout"` only (there, every object is one)
            and in no other. A number n stands for n diagonals of the colour x shape table, so that each colour and
            each shape loses about as many combinations as the others. Or the pairs themselves.
        details: what captions may mention besides colour and shape: any of `DETAILS`.
        wording: `"varied"` draws sentence forms and synonyms, `"plain"` always says "a red circle and a blue star".
        order: `"random"`, or `"reading"`: objects are named row by row, left to right.
        captions: texts an image.
        caption_noise: share of the captions of split `"train"` that do not describe their image. Half of them are
            another scene's caption, half have the colour or shape of one object changed. The other splits are clean.

    Raises:
        ValueError: an unknown name, an empty choice, more objects than cells or combinations.
    """

    image_size: int = 64
    grid: int = 3
    min_objects: int = 1
    max_objects: int = 3
    colors: tuple[str, ...] = tuple(COLORS)[:8]
    shapes: tuple[str, ...] = SHAPES[:8]
    sizes: tuple[str, ...] = SIZES
    textures: tuple[str, ...] = TEXTURES
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    heldout: int | tuple[Pair, ...] = 1
    details: tuple[str, ...] = DETAILS
    wording: Literal["varied", "plain"] = "varied"
    order: Literal["random", "reading"] = "random"
    captions: int = 3
    caption_noise: float = 0.0
    rows: int | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("colors", COLORS),
            ("shapes", SHAPES),
            ("sizes", SIZES),
            ("textures", TEXTURES),
            ("backgrounds", BACKGROUNDS),
            ("details", DETAILS),
        ):
            chosen = tuple(getattr(self, name))
            object.__setattr__(self, name, chosen)
            unknown = [value for value in chosen if value not in known]
            if unknown or len(set(chosen)) != len(chosen) or not (chosen or name == "details"):
                raise ValueError(f"{name}={chosen!r}: give different names out of {tuple(known)}")
        for name, known in (("wording", ("varied", "plain")), ("order", ("random", "reading"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {known}")
        if not isinstance(self.heldout, int):
            object.__setattr__(self, "heldout", tuple((color, shape) for color, shape in self.heldout))
        if self.captions < 1:
            raise ValueError(f"captions={self.captions}: at least one text an image")
        if not 0.0 <= self.caption_noise <= 1.0:
            raise ValueError(f"caption_noise={self.caption_noise} is not a share between 0 and 1")
        if self.grid < 1 or self.image_size < 6 * self.grid:
            raise ValueError(f"image_size={self.image_size}: at least 6 pixels for each of the grid={self.grid} cells")
        if self.rows is not None and not 1 <= self.rows <= self.grid:
            raise ValueError(f"rows={self.rows}: from 1 to as many as the grid={self.grid} has columns")
        if not 1 <= self.min_objects <= self.max_objects <= self.cells:
            raise ValueError(
                f"min_objects={self.min_objects}, max_objects={self.max_objects}: need 1 <= min <= max <= "
                f"{self.cells} cells"
            )
        for name, pairs in (("heldout", self.heldout_pairs), ("other", self.trained_pairs)):
            if len(pairs) < self.max_objects and (name == "other" or pairs):
                raise ValueError(
                    f"{len(pairs)} {name} combinations of colour and shape are too few for max_objects="
                    f"{self.max_objects} different objects; change heldout={self.heldout!r}, colors or shapes"
                )

    @property
    def cells(self) -> int:
        """Places for objects, counted row by row."""
        return self.grid * (self.rows or self.grid)

    @classmethod
    def preset(cls, name: str, **options: Any) -> "ShapesConfig":
        """The named settings, with `options` in place of single fields.

        Args:
            name: `"default"`; `"simple"`: 40 px, one or two plain objects of one size on white, one caption in plain
                words that names them row by row; or `"row"`: the same with eleven colours and the objects side by
                side, named from left to right. The last is learnable in minutes on a CPU.

        Raises:
            ValueError: unknown preset.
            TypeError: unknown option.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: the presets of Shapes are {tuple(PRESETS)}")
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise TypeError(f"Shapes has no option {', '.join(unknown)}; its options are {sorted(known)}")
        return replace(PRESETS[name], **options)

    @cached_property
    def heldout_pairs(self) -> tuple[Pair, ...]:
        """The (colour, shape) combinations that only split `"heldout"` has."""
        if not isinstance(self.heldout, int):
            for color, shape in self.heldout:
                if color not in self.colors or shape not in self.shapes:
                    raise ValueError(f"heldout: ({color!r}, {shape!r}) is not in colors x shapes")
            return self.heldout
        side = max(len(self.colors), len(self.shapes))
        return tuple(
            (color, shape)
            for row, color in enumerate(self.colors)
            for column, shape in enumerate(self.shapes)
            # Counted from 3 so that the first colour does not lose the first shape.
            if (row + column - 3) % side < self.heldout
        )

    @cached_property
    def trained_pairs(self) -> tuple[Pair, ...]:
        """The (colour, shape) combinations of every split but `"heldout"`."""
        heldout = set(self.heldout_pairs)
        return tuple((color, shape) for color in self.colors for shape in self.shapes if (color, shape) not in heldout)

    @cached_property
    def said_attributes(self) -> tuple[str, ...]:
        """Attributes of an object that a caption can mention."""
        relative = ("place",) if {"place", "relation"} & set(self.details) else ()
        return ("color", "shape", *(name for name in ("size", "texture") if name in self.details), *relative)


PRESETS: dict[str, ShapesConfig] = {
    "default": ShapesConfig(),
    "simple": ShapesConfig(
        image_size=40,
        grid=2,
        max_objects=2,
        sizes=("large",),
        textures=("solid",),
        backgrounds=("white",),
        details=(),
        wording="plain",
        order="reading",
        captions=1,
    ),
}
PRESETS["row"] = replace(PRESETS["simple"], rows=1, colors=tuple(name for name in COLORS if name != "white"))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. `x`, `y`, `radius` in pixels; `row`, `column` count the grid's cells from the top left."""

    shape: str
    color: str
    size: str
    texture: str
    row: int
    column: int
    x: int
    y: int
    radius: int
    rgb: tuple[int, int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels, right and bottom excluded."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)

    def is_left_of(self, other: "SceneObject") -> bool:
        return self.column < other.column

    def is_above(self, other: "SceneObject") -> bool:
        return self.row < other.row


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and the objects on it, in random order."""

    image_size: int
    grid: int
    rows: int
    background: str
    background_rgb: tuple[int, int, int]
    objects: tuple[SceneObject, ...]

    def place(self, thing: SceneObject) -> str:
        """Where an object stands: "top left", "bottom", "center", ..."""
        return place_name(thing.row, thing.column, self.rows, self.grid)

    def relation(self, first: SceneObject, second: SceneObject) -> tuple[str, ...]:
        """What holds of the first towards the second, out of left of, right of, above, below; never empty."""
        held = []
        if first.column != second.column:
            held.append("left of" if first.is_left_of(second) else "right of")
        if first.row != second.row:
            held.append("above" if first.is_above(second) else "below")
        return tuple(held)

    def columns(self) -> list[dict[str, Any]]:
        """The objects as plain values, the `objects` column of a row."""
        return [
            {
                "shape": thing.shape,
                "color": thing.color,
                "size": thing.size,
                "texture": thing.texture,
                "place": self.place(thing),
                "box": list(thing.box),
            }
            for thing in self.objects
        ]

    def content_id(self, attributes: tuple[str, ...], with_background: bool) -> str:
        """What can be said of the scene, as a string: scenes that no caption can tell apart have the same one."""
        named = []
        for thing in self.objects:
            values = [self.place(thing) if name == "place" else getattr(thing, name) for name in attributes]
            named.append(" ".join(values))
        named.sort()
        return "; ".join([*named, self.background] if with_background else named)


def place_name(row: int, column: int, rows: int, columns: int) -> str:
    """Words for a cell: the outer rows and columns have names, those between them are the middle."""
    vertical = "" if rows == 1 else "top" if row == 0 else "bottom" if row == rows - 1 else ""
    horizontal = "" if columns == 1 else "left" if column == 0 else "right" if column == columns - 1 else ""
    return f"{vertical} {horizontal}".strip() or "center"


def draw_scene(config: ShapesConfig, draws: Draws, pairs: tuple[Pair, ...]) -> Scene:
    """A random scene whose objects are different members of `pairs`.

    Args:
        config: what may occur.
        draws: the scene's own stream; how much of it is used depends on `config` only.
        pairs: (colour, shape) combinations to draw from, without repetition.
    """
    count = draws.between(config.min_objects, config.max_objects)
    kinds = draws.sample(pairs, count)
    cells = draws.sample(range(config.cells), count)
    taken = {color for color, _ in kinds}
    backgrounds = [name for name in config.backgrounds if name not in taken] or list(config.backgrounds)
    background = draws.choice(backgrounds)
    shade = draws.between(-JITTER, 0 if background == "white" else JITTER)
    objects = []
    for (color, shape), cell in zip(kinds, cells):
        size, jitter = draws.choice(config.sizes), draws.word()
        texture = draws.choice(config.textures)
        objects.append(laid_out(config, draws, color, shape, size, texture, cell, jitter))
    red, green, blue = BACKGROUNDS[background]
    shaded = (red + shade, green + shade, blue + shade)
    return Scene(config.image_size, config.grid, config.rows or config.grid, background, shaded, tuple(objects))


def laid_out(
    config: ShapesConfig, draws: Draws, color: str, shape: str, size: str, texture: str, cell: int, jitter: int
) -> SceneObject:
    """An object somewhere in a cell, counted row by row. Draws two numbers.

    Args:
        jitter: 48 random bits that the shade of its colour depends on.
    """
    row, column = divmod(cell, config.grid)
    rows = config.rows or config.grid
    top, bottom = row * config.image_size // rows, (row + 1) * config.image_size // rows
    left, right = column * config.image_size // config.grid, (column + 1) * config.image_size // config.grid
    half = config.image_size // config.grid // 2
    radius = max(2, half * RADII[size] // 1000)
    red, green, blue = COLORS[color]
    return SceneObject(
        shape=shape,
        color=color,
        size=size,
        texture=texture,
        row=row,
        column=column,
        x=draws.between(left + radius, right - radius),
        y=draws.between(top + radius, bottom - radius),
        radius=radius,
        rgb=(_jittered(red, jitter), _jittered(green, jitter >> 16), _jittered(blue, jitter >> 32)),
    )


def _jittered(channel: int, bits: int) -> int:
    return min(255, max(0, channel + ((bits & 0xFFFF) * (2 * JITTER + 1) >> 16) - JITTER))


def objects_of(scene: "Scene | Mapping[str, Any] | list[Mapping[str, Any]]") -> list[Pair]:
    """(colour, shape) of each object of a scene, of a dataset row, or of a row's `objects`."""
    if isinstance(scene, Scene):
        return [(thing.color, thing.shape) for thing in scene.objects]
    listed = scene["objects"] if isinstance(scene, Mapping) else scene
    return [(thing["color"], thing["shape"]) for thing in listed]
