"""The rows of Shapes: scenes, pictures and captions by index, as datasets of the `datasets` library."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL.Image import Image as PilImage

from ..splits import NoSplitError
from ..tables import in_memory
from .captions import altered_scene, caption
from .drawing import draw
from .draws import Draws
from .questions import Question, ask
from .scenes import SPLITS, Scene, ShapesConfig, draw_scene, objects_of

DEFAULT_SIZES: dict[str, int] = {"train": 20_000, "validation": 1_000, "test": 1_000, "heldout": 1_000}
SHARD_ROWS = 1_000
# Purposes that draw on an index independently of each other, so that no option of one changes another.
_LAYOUT, _CAPTIONS, _NOISE, _QUESTIONS = range(4)
# Purposes 4 to 7 are those of `tasks`.
# Scenes from here on are in no dataset: borrowed for captions that do not fit, and for text without pictures.
_UNSEEN = 1 << 47
# Answers a question, as many as in VQA.
ANSWERS = 10


class ShapesWorld:
    """Scenes of one split by index. Cheap to make, picklable, and without state.

    Args:
        config: what may occur in a scene.
        split: one of `SPLITS`; splits have scenes of their own, and `"heldout"` has the combinations that
            no other has.
        seed: another seed, other scenes.

    Raises:
        NoSplitError: unknown split.
        ValueError: `"heldout"` without held-out combinations.
    """

    def __init__(self, config: ShapesConfig | None = None, split: str = "train", seed: int = 0) -> None:
        self.config = config or ShapesConfig()
        if split not in SPLITS:
            raise NoSplitError("Shapes", split, SPLITS)
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
        """The sentences after the noise dial, and what became of each: `""`, `"replaced"` or `"altered"`.

        Turning the dial up strikes the captions that a lower setting strikes, and more.
        """
        if not self.config.caption_noise or self.split != "train":
            return texts, [""] * len(texts)
        draws = self.draws(_NOISE, index)
        said, kinds = [], []
        for text in texts:
            struck, replaced, other_index = (
                draws.chance(self.config.caption_noise),
                draws.below(2),
                draws.below(_UNSEEN),
            )
            if not struck:
                said.append(text)
                kinds.append("")
                continue
            other = self.scene(_UNSEEN + other_index)
            if replaced and not set(objects_of(other)) <= set(objects_of(scene)):
                kinds.append("replaced")
            else:
                other = altered_scene(scene, self.draws(_NOISE, _UNSEEN + other_index), self.pairs)
                kinds.append("altered")
            said.append(caption(self.config, other, self.draws(_CAPTIONS, _UNSEEN + other_index)))
        return said, kinds

    def questions(self, index: int, scene: Scene, count: int) -> list[Question]:
        """`count` questions about scene `index`."""
        return ask(self.config, scene, self.draws(_QUESTIONS, index), self.pairs, count)

    def question_rows(self, index: int, count: int) -> list[dict[str, Any]]:
        """`count` rows of the VQA schema about scene `index`; the ten answers of each agree."""
        row = self.row(index)
        scene = self.scene(index)
        return [
            {
                "image": row["image"],
                "question": asked.question,
                "answers": [asked.answer] * ANSWERS,
                "question_type": asked.kind,
                "image_id": row["image_id"],
                "source": row["source"],
                "key": f"{index}.{number}",
                "objects": row["objects"],
            }
            for number, asked in enumerate(self.questions(index, scene, count))
        ]

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
    """An RGB picture as a PNG file: every line unfiltered, lightly compressed. Half the time of Pillow's writer, and
    flat pictures come out as small."""
    width, height = image.size
    raw, stride = image.tobytes(), 3 * width
    lines = b"".join([b"\0" + raw[start : start + stride] for start in range(0, stride * height, stride)])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))
        for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 1)), (b"IEND", b""))
    )


def _features(**columns: Any) -> Features:
    text = Value("string")
    thing = dict.fromkeys(("shape", "color", "size", "texture", "place"), text) | {"box": List(Value("int32"))}
    return Features(
        {
            "image": Image(decode=False),
            "image_id": text,
            "source": text,
            "key": text,
            "objects": List(thing),
            **columns,
        }
    )


def pair_features() -> Features:
    """Columns of a Shapes dataset of pairs."""
    text = Value("string")
    return _features(text=List(text), background=text, noise=List(text))


def question_features() -> Features:
    """Columns of a Shapes dataset of questions."""
    text = Value("string")
    return _features(question=text, answers=List(text), question_type=text)


def load_shapes(
    split: str = "train",
    *,
    streaming: bool = False,
    size: int | None = None,
    seed: int = 0,
    preset: str = "default",
    unique: bool = False,
    **options: Any,
) -> Dataset | IterableDataset:
    """Shapes as a dataset of pairs.

    Args:
        split: `"train"`, `"validation"`, `"test"` or `"heldout"`.
        streaming: give an `IterableDataset` that draws as it goes; otherwise all rows are drawn now, into memory
            (1 to 2 KB each at 64 px).
        size: number of scenes; 20,000 for train and 1,000 for the others if left out.
        seed: another seed, other scenes. The held-out combinations do not depend on it.
        preset: `"default"`, `"simple"` or `"row"`.
        unique: leave out a scene that no caption could tell from an earlier one of the dataset, and draw on until
            there are `size`; for retrieval, where such a twin is no mistake but counts as one. Not while streaming.
        options: fields of `ShapesConfig` in place of the preset's.

    Raises:
        ValueError: unknown split, preset or value; more unique scenes asked for than can be found.
        TypeError: unknown option.
    """
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    size = _checked_size(split, size)
    if unique:
        if streaming:
            raise ValueError("unique=True needs the scenes before it in memory; it does not go with streaming=True")
        indices = _unique_indices(world, size)
        return in_memory((world.row(index) for index in indices), pair_features())
    ranges = _ranges(size)
    if streaming:
        return IterableDataset.from_generator(
            _pair_rows, features=pair_features(), gen_kwargs={"world": world, "ranges": ranges}
        )
    return in_memory(_pair_rows(world, ranges), pair_features())


def load_shapes_questions(
    split: str = "train",
    *,
    streaming: bool = False,
    size: int | None = None,
    seed: int = 0,
    preset: str = "default",
    questions: int = 1,
    **options: Any,
) -> Dataset | IterableDataset:
    """Shapes as a dataset of questions: `image`, `question`, `answers` (ten equal ones), `question_type`.

    Args:
        size: number of scenes; the dataset has `size * questions` rows.
        questions: questions a scene.
        split, streaming, seed, preset, options: as in `load_shapes`.
    """
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    if questions < 1:
        raise ValueError(f"questions={questions}: at least one a scene")
    ranges = _ranges(_checked_size(split, size))
    if streaming:
        return IterableDataset.from_generator(
            _question_rows,
            features=question_features(),
            gen_kwargs={"world": world, "ranges": ranges, "questions": questions},
        )
    return in_memory(_question_rows(world, ranges, questions), question_features())


def shapes_texts(
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    preset: str = "default",
    questions: bool = False,
    all_combinations: bool = False,
    sentences: int = 1,
    separator: str = ". ",
    **options: Any,
) -> Iterator[str]:
    """Sentences of scenes that are in no dataset: text to train a tokenizer or a language model on.

    Args:
        count: number of texts.
        split, seed, preset, options: as in `load_shapes`.
        questions: every other text is "Question: ... Answer: ...".
        all_combinations: draw from the held-out combinations as well, so that the language model has read of every
            combination that a picture will ever show; otherwise it knows of them no more than the vision model does.
        sentences: sentences about the same scene in a text. From texts of several sentences a language model learns to
            say again in other words what it has just read, as it does from text at large; a model that can be told
            what to say is what a frozen language model needs to be.
        separator: between the sentences.
    """
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    if all_combinations:
        world.pairs = world.config.trained_pairs + world.config.heldout_pairs
    for number in range(count):
        index = _UNSEEN + number
        scene = world.scene(index)
        if questions and number % 2:
            asked = world.questions(index, scene, 1)[0]
            yield f"Question: {asked.question} Answer: {asked.answer}"
        else:
            draws = world.draws(_CAPTIONS, index)
            yield separator.join(caption(world.config, scene, draws) for _ in range(sentences))


def _pair_rows(world: ShapesWorld, ranges: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for start, stop in ranges:
        for index in range(start, stop):
            yield world.row(index)


def _question_rows(world: ShapesWorld, ranges: Sequence[tuple[int, int]], questions: int) -> Iterator[dict[str, Any]]:
    for start, stop in ranges:
        for index in range(start, stop):
            yield from world.question_rows(index, questions)


def _checked_size(split: str, size: int | None) -> int:
    size = DEFAULT_SIZES[split] if size is None else size
    if size < 1:
        raise ValueError(f"size={size}: at least one scene")
    return size


def _ranges(size: int) -> list[tuple[int, int]]:
    return [(start, min(start + SHARD_ROWS, size)) for start in range(0, size, SHARD_ROWS)]


def _unique_indices(world: ShapesWorld, size: int) -> list[int]:
    indices, seen, index = [], set(), 0
    while len(indices) < size:
        # So many in vain in a row: nearly all there is has been found.
        if index - (indices[-1] if indices else 0) > 10_000:
            raise ValueError(
                f"only {len(indices)} of size={size} scenes of split {world.split!r} differ in what captions can say; "
                f"ask for fewer, or add colors, shapes, objects or details"
            )
        name = world.content_id(world.scene(index))
        if name not in seen:
            seen.add(name)
            indices.append(index)
        index += 1
    return indices
