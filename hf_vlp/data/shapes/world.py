"""The rows of Shapes: scenes, pictures and captions by index, as datasets of the `datasets` library."""

from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL.Image import Image as PilImage

from .captions import altered_scene, caption
from .drawing import draw
from .draws import Draws
from .scenes import SPLITS, Scene, ShapesConfig, draw_scene, objects_of

DEFAULT_SIZES: dict[str, int] = {"train": 20_000, "validation": 1_000, "test": 1_000, "heldout": 1_000}
SHARD_ROWS = 1_000
# Purposes that draw on an index independently of each other, so that no option of one changes another.
_LAYOUT, _CAPTIONS, _NOISE, _QUESTIONS = range(4)


class ShapesWorld:
    """Scenes of one split by index. Cheap to make, picklable, and without state.

    Args:
        config: what may occur in a scene.
        split: one of `SPLITS`; splits have scenes of their own, and `"heldout"` has the combinations that
            no other has.
        seed: another seed, other scenes.

    Raises:
        ValueError: unknown split, or `"heldout"` without held-out combinations.
    """

    def __init__(self, config: ShapesConfig | None = None, split: str = "train", seed: int = 0) -> None:
        self.config = config or ShapesConfig()
        if split not in SPLITS:
            raise ValueError(f"Shapes has no split {split!r}; its splits are {', '.join(SPLITS)}")
        self.split, self.seed = split, seed
        self.pairs = self.config.heldout_pairs if split == "heldout" else self.config.trained_pairs
        if not self.pairs:
            raise ValueError("split 'heldout' is empty because heldout=0; hold some combinations out")

    def draws(self, purpose: int, index: int) -> Draws:
        return Draws(self.seed, SPLITS.index(self.split) * 16 + purpose, index)

    def scene(self, index: int) -> Scene:
        """Scene number `index`, 0 to 2**48 - 1."""
        return draw_scene(self.config, self.draws(_LAYOUT, index), self.pairs)

    def image(self, scene: Scene) -> PilImage:
        """Its picture, RGB."""
        return draw(scene)

    def captions(self, index: int, scene: Scene) -> list[str]:
        """Its `config.captions` true sentences."""
        draws = self.draws(_CAPTIONS, index)
        return [caption(self.config, scene, draws) for _ in range(self.config.captions)]

    def noisy_captions(self, index: int, scene: Scene, texts: list[str]) -> tuple[list[str], list[str]]:
        """The sentences after the noise dial, and what became of each: `""`, `"replaced"` or `"altered"`."""
        if not self.config.caption_noise or self.split != "train":
            return texts, [""] * len(texts)
        draws = self.draws(_NOISE, index)
        texts, kinds = list(texts), []
        for position in range(len(texts)):
            struck = draws.chance(self.config.caption_noise)
            replaced, other_index = draws.below(2), draws.below(1 << 47)
            kinds.append("" if not struck else "replaced" if replaced else "altered")
            if not struck:
                continue
            if replaced:
                other = self.scene((1 << 47) + other_index)
                if set(objects_of(other)) <= set(objects_of(scene)):
                    other = altered_scene(self.config, scene, Draws(self.seed, 64, other_index), self.pairs)
                    kinds[-1] = "altered"
            else:
                other = altered_scene(self.config, scene, Draws(self.seed, 64, other_index), self.pairs)
            texts[position] = caption(self.config, other, Draws(self.seed, 65, other_index))
        return texts, kinds

    def row(self, index: int) -> dict[str, Any]:
        """Everything about scene `index`: the picture (PNG bytes), its texts, and the truth about it."""
        scene = self.scene(index)
        texts, noise = self.noisy_captions(index, scene, self.captions(index, scene))
        return {
            "image": {"bytes": png(draw(scene)), "path": None},
            "text": texts,
            "image_id": self.content_id(scene),
            "source": f"shapes/{self.split}",
            "key": str(index),
            "objects": scene.columns(),
            "background": scene.background,
            "noise": noise,
        }

    def content_id(self, scene: Scene) -> str:
        """Same for two scenes exactly when no caption of this configuration could tell them apart."""
        return scene.content_id(self.config.said_attributes, "background" in self.config.details)


def png(image: PilImage) -> bytes:
    """The picture as a PNG file, lightly compressed: flat pictures are small anyway."""
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def features() -> Features:
    """Columns of a Shapes dataset."""
    text = Value("string")
    thing = dict.fromkeys(("shape", "color", "size", "texture", "place"), text) | {"box": List(Value("int32"))}
    return Features(
        {
            "image": Image(decode=False),
            "text": List(text),
            "image_id": text,
            "source": text,
            "key": text,
            "objects": List(thing),
            "background": text,
            "noise": List(text),
        }
    )


def load_shapes(
    split: str = "train",
    *,
    streaming: bool = False,
    size: int | None = None,
    seed: int = 0,
    preset: str = "default",
    **options: Any,
) -> Dataset | IterableDataset:
    """Shapes as a dataset.

    Args:
        split: `"train"`, `"validation"`, `"test"` or `"heldout"`.
        streaming: give an `IterableDataset` that draws as it goes; otherwise all rows are drawn now, into memory
            (about 1 KB each at 64 px).
        size: number of scenes; 20,000 for train and 1,000 for the others if left out.
        seed: another seed, other scenes. The held-out combinations do not depend on it.
        preset: `"default"` or `"simple"`.
        options: fields of `ShapesConfig` in place of the preset's.

    Raises:
        ValueError: unknown split, preset or value.
        TypeError: unknown option.
    """
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    size = DEFAULT_SIZES[split] if size is None else size
    if size < 1:
        raise ValueError(f"size={size}: at least one scene")
    ranges = [(start, min(start + SHARD_ROWS, size)) for start in range(0, size, SHARD_ROWS)]
    if streaming:
        return IterableDataset.from_generator(
            _rows, features=features(), gen_kwargs={"world": world, "ranges": ranges}
        )
    return Dataset.from_list(list(_rows(world, ranges)), features=features())


def _rows(world: ShapesWorld, ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for start, stop in ranges:
        for index in range(start, stop):
            yield world.row(index)
