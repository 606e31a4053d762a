"""Shapes as instructions: conversations about scenes whose every answer is true by construction and can be checked."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value

from ..tables import in_memory
from .captions import caption, score_caption
from .drawing import draw
from .draws import Draws
from .scenes import Scene, SceneObject, ShapesConfig
from .vocabulary import COLOR_WORDS, SHAPE_WORDS
from .world import DEFAULT_SIZES, SHARD_ROWS, ShapesWorld, png

# Purpose of draws, beside those of `world` (0 to 3) and `tasks` (4 to 7).
_INSTRUCTIONS = 8
# Second pictures of a conversation are scenes from here on.
_SECOND = 1 << 45

KINDS = ("color", "shape", "count", "relation", "description")
_SIDES = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SHORT = "Answer with a single word or phrase."

# Kind -> ways to ask. The first one is the plain wording.
_WORDINGS: dict[str, tuple[str, ...]] = {
    "color": ("what color is the {shape}?", "which color does the {shape} have?", "tell me the color of the {shape}."),
    "shape": (
        "what shape is the {color} object?",
        "which shape does the {color} object have?",
        "name the shape of the {color} object.",
    ),
    "count_all": (
        "how many objects are there?",
        "how many objects do you see?",
        "count the objects.",
    ),
    "count_color": (
        "how many {color} objects are there?",
        "how many objects are {color}?",
        "count the {color} objects.",
    ),
    "relation_is": (
        "is the {first} {side} the {second}?",
        "does the {first} stand {side} the {second}?",
    ),
    "relation_what": (
        "what is {side} the {second}?",
        "which object stands {side} the {second}?",
    ),
    "description": (
        "describe the image.",
        "what does the image show?",
        "give a description of the image.",
        "what can you see in the image?",
    ),
}


@dataclass(frozen=True)
class Exchange:
    """A question with its answer.

    Attributes:
        kind: one of `KINDS`.
        question, answer: as text.
        topic: what is asked, however it is worded.
        followup: the question can only be understood together with the one before it.
    """

    kind: str
    question: str
    answer: str
    topic: str
    followup: bool = False


def converse(
    config: ShapesConfig, scene: Scene, draws: Draws, turns: int, kinds: Sequence[str] = KINDS
) -> list[Exchange]:
    """`turns` different questions about a scene and their answers; fewer if no more can be asked.

    Where an earlier answer was about one object, the next question may be "and the star?".

    Args:
        kinds: what is asked for, out of `KINDS`.
    """
    asked: list[Exchange] = []
    for _ in range(turns):
        made = None
        if asked and asked[-1].kind in ("color", "shape") and asked[-1].kind in kinds and draws.below(2):
            made = _followup(scene, draws, asked)
        for kind in draws.shuffled(tuple(kinds)):
            if made is None or _asked_before(made, asked):
                made = _ASK[kind](config, scene, draws)
        if made is not None and not _asked_before(made, asked):
            asked.append(made)
    return asked


def _asked_before(made: Exchange, asked: Sequence[Exchange]) -> bool:
    return any(made.topic == other.topic for other in asked)


def _worded(config: ShapesConfig, draws: Draws, wording: str, **words: str) -> str:
    forms = _WORDINGS[wording]
    form = forms[0] if config.wording == "plain" else draws.choice(forms)
    return form.format(**words)


def _named(thing: SceneObject) -> str:
    return f"{thing.color} {thing.shape}"


def _alone_in(scene: Scene, attribute: str) -> list[SceneObject]:
    values = [getattr(thing, attribute) for thing in scene.objects]
    return [thing for thing, value in zip(scene.objects, values) if values.count(value) == 1]


def _ask_color(config: ShapesConfig, scene: Scene, draws: Draws) -> Exchange | None:
    things = _alone_in(scene, "shape")
    if not things:
        return None
    thing = draws.choice(things)
    return Exchange("color", _worded(config, draws, "color", shape=thing.shape), thing.color, f"color {thing.shape}")


def _ask_shape(config: ShapesConfig, scene: Scene, draws: Draws) -> Exchange | None:
    things = _alone_in(scene, "color")
    if not things:
        return None
    thing = draws.choice(things)
    return Exchange("shape", _worded(config, draws, "shape", color=thing.color), thing.shape, f"shape {thing.color}")


def _ask_count(config: ShapesConfig, scene: Scene, draws: Draws) -> Exchange:
    if draws.below(2):
        return Exchange("count", _worded(config, draws, "count_all"), str(len(scene.objects)), "count")
    color = draws.choice(scene.objects).color if draws.below(2) else draws.choice(config.colors)
    count = sum(thing.color == color for thing in scene.objects)
    return Exchange("count", _worded(config, draws, "count_color", color=color), str(count), f"count {color}")


def _ask_relation(config: ShapesConfig, scene: Scene, draws: Draws) -> Exchange | None:
    if len(scene.objects) < 2:
        return None
    first, second = draws.sample(scene.objects, 2)
    true = scene.relation(first, second)
    # Half of the questions are about what holds, as "yes" would otherwise be rarer than "no".
    side = draws.choice(true) if draws.below(2) else draws.choice(tuple(_SIDES))
    there = [thing for thing in scene.objects if thing is not second and side in scene.relation(thing, second)]
    if draws.below(2) and len(there) == 1:
        question = _worded(config, draws, "relation_what", side=_SIDES[side], second=_named(second))
        return Exchange("relation", question, f"the {_named(there[0])}", f"{side} {_named(second)}")
    question = _worded(config, draws, "relation_is", first=_named(first), side=_SIDES[side], second=_named(second))
    topic = f"{_named(first)} {side} {_named(second)}"
    return Exchange("relation", question, "yes" if side in true else "no", topic)


def _ask_description(config: ShapesConfig, scene: Scene, draws: Draws) -> Exchange:
    return Exchange("description", _worded(config, draws, "description"), caption(config, scene, draws), "all")


def _followup(scene: Scene, draws: Draws, asked: Sequence[Exchange]) -> Exchange | None:
    """ "and the star?" after a question for the colour of something else."""
    kind = asked[-1].kind
    known = "shape" if kind == "color" else "color"
    topics = {exchange.topic for exchange in asked}
    things = [thing for thing in _alone_in(scene, known) if f"{kind} {getattr(thing, known)}" not in topics]
    if not things:
        return None
    thing = draws.choice(things)
    name = f"the {thing.shape}" if kind == "color" else f"the {thing.color} one"
    return Exchange(kind, f"and {name}?", getattr(thing, kind), f"{kind} {getattr(thing, known)}", followup=True)


_ASK = {
    "color": _ask_color,
    "shape": _ask_shape,
    "count": _ask_count,
    "relation": _ask_relation,
    "description": _ask_description,
}


def score_answer(kind: str, prediction: str, answer: str, objects: Any = None) -> bool:
    """Whether an answer is right.

    Right is: for `color` and `shape`, that it names this one and no other; for `count`, the number, in figures or
    letters, and no other; for `relation`, the same yes or no, or the same object; for `description`, that it names
    every object with its colour and nothing that is not there.

    Args:
        kind: one of `KINDS`.
        prediction: what the model said.
        answer: what is true.
        objects: of the scene, as in a row's `objects`; needed for descriptions.

    Raises:
        ValueError: unknown kind, or a description without objects.
    """
    if kind == "description":
        if objects is None:
            raise ValueError("a description is judged by the objects of its scene; give objects")
        return score_caption(prediction, objects).exact
    words = re.findall(r"[a-z]+|\d+", prediction.lower())
    true = re.findall(r"[a-z]+|\d+", answer.lower())
    if kind == "color":
        return _members(words, COLOR_WORDS) == _members(true, COLOR_WORDS)
    if kind == "shape":
        return _members(words, SHAPE_WORDS) == _members(true, SHAPE_WORDS)
    if kind == "count":
        return _numbers(words) == _numbers(true)
    if kind == "relation":
        if true in (["yes"], ["no"]):
            return {word for word in words if word in ("yes", "no")} == set(true)
        return all(_members(words, known) == _members(true, known) for known in (COLOR_WORDS, SHAPE_WORDS))
    raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")


def _members(words: Sequence[str], known: Mapping[str, str]) -> set[str]:
    return {known[word] for word in words if word in known}


def _numbers(words: Sequence[str]) -> set[int]:
    return {
        int(word) if word.isdecimal() else _NUMBERS.index(word)
        for word in words
        if word.isdecimal() or word in _NUMBERS
    }


@dataclass(frozen=True)
class InstructionOptions:
    """What conversations are like.

    Attributes:
        min_turns, max_turns: questions of a conversation.
        kinds: what is asked for, out of `KINDS`.
        text_only: share of conversations without a picture, in which the user tells what there is.
        two_images: share of conversations about two pictures, asked about one after the other.
        image_last: share of conversations whose picture stands behind the first question instead of before it.
        short: adds a request for a short answer to the first question.

    Raises:
        ValueError: an unknown kind, or numbers out of range.
    """

    min_turns: int = 1
    max_turns: int = 3
    kinds: tuple[str, ...] = KINDS
    text_only: float = 0.0
    two_images: float = 0.0
    image_last: float = 0.5
    short: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "kinds", tuple(self.kinds))
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ValueError(f"kinds={self.kinds!r}: give some of {', '.join(KINDS)}")
        if not 1 <= self.min_turns <= self.max_turns:
            raise ValueError(f"min_turns={self.min_turns}, max_turns={self.max_turns}: need 1 <= min <= max")
        for name in ("text_only", "two_images", "image_last"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not a share between 0 and 1")
        if self.text_only + self.two_images > 1.0:
            raise ValueError(f"text_only={self.text_only} and two_images={self.two_images} make up more than all")


def instruction_row(world: ShapesWorld, index: int, options: InstructionOptions) -> dict[str, Any]:
    """Conversation number `index`, with the truth about its scenes."""
    draws = world.draws(_INSTRUCTIONS, index)
    config = world.config
    scenes = [world.scene(index)]
    turns = draws.between(options.min_turns, options.max_turns)
    last, lot = draws.chance(options.image_last), draws.below(1 << 20) / (1 << 20)
    text_only = lot < options.text_only
    if not text_only and lot < options.text_only + options.two_images:
        scenes.append(world.scene(_SECOND + index))
    exchanges: list[tuple[int, Exchange]] = []
    # Words alone do not always say where things stand.
    kinds = [kind for kind in options.kinds if not (text_only and kind == "relation")]
    for number, scene in enumerate(scenes):
        exchanges += [(number, made) for made in converse(config, scene, draws, turns, kinds)]
    if not exchanges:  # Such as a scene of one object asked for relations only.
        exchanges = [(0, _ask_count(config, scenes[0], draws))]
    messages: list[dict[str, Any]] = []
    for place, (number, exchange) in enumerate(exchanges):
        question = exchange.question
        if len(scenes) > 1 and not exchange.followup:
            question = f"in the {('first', 'second')[number]} image: {question}"
        if text_only and place == 0:
            question = f"{caption(config, scenes[0], draws)}. {question}"
        if options.short and place == 0 and all(made.kind != "description" for _, made in exchanges):
            question = f"{question} {_SHORT}"
        pictures = 0 if text_only or place else len(scenes)
        messages.append({"role": "user", "content": _content(question, pictures, last)})
        messages.append({"role": "assistant", "content": _content(exchange.answer, 0, False)})
    single = len(exchanges) == 1
    kind = "detail" if single and exchanges[0][1].kind == "description" else "conversation"
    return {
        "images": [] if text_only else [{"bytes": png(draw(scene)), "path": None} for scene in scenes],
        "messages": messages,
        "kind": kind,
        "source": f"shapes/{world.split}",
        "key": str(index),
        "problem": None,
        "answers": [
            {"kind": made.kind, "answer": made.answer, "followup": made.followup, "scene": number}
            for number, made in exchanges
        ],
        "scenes": [{"objects": scene.columns()} for scene in scenes],
    }


def _content(text: str, images: int, last: bool) -> list[dict[str, Any]]:
    words = {"type": "text", "text": text}
    pictures = [{"type": "image", "text": None}] * images
    if not images:
        return [words]
    if last:
        return [{**words, "text": f"{text}\n"}, *pictures]
    return [*pictures, {**words, "text": f"\n{text}"}]


def instruction_features() -> Features:
    """Columns of a Shapes dataset of conversations."""
    text = Value("string")
    thing = dict.fromkeys(("shape", "color", "size", "texture", "place"), text) | {"box": List(Value("int32"))}
    return Features(
        {
            "images": List(Image(decode=False)),
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "kind": text,
            "source": text,
            "key": text,
            "problem": text,
            "answers": List({"kind": text, "answer": text, "followup": Value("bool"), "scene": Value("int32")}),
            "scenes": List({"objects": List(thing)}),
        }
    )


def load_shapes_instructions(
    split: str = "train",
    *,
    streaming: bool = False,
    size: int | None = None,
    seed: int = 0,
    preset: str = "default",
    min_turns: int = 1,
    max_turns: int = 3,
    kinds: Sequence[str] = KINDS,
    text_only: float = 0.0,
    two_images: float = 0.0,
    image_last: float = 0.5,
    short: bool = False,
    **options: Any,
) -> Dataset | IterableDataset:
    """Shapes as a dataset of conversations.

    A row has `images`, `messages`, `kind` (`"conversation"` or `"detail"`), `source`, `key`, and the truth: `answers`
    (`kind`, `answer`, `followup`, `scene` of each answer in turn) and `scenes` (the `objects` of each picture).

    Args:
        split: `"train"`, `"validation"`, `"test"`, or `"heldout"`: combinations of colour and shape that no other
            split has.
        size: number of conversations.
        min_turns, max_turns, kinds, text_only, two_images, image_last, short: see `InstructionOptions`.
        streaming, seed, preset, options: as in `load_shapes`.

    Raises:
        ValueError: unknown split, preset, kind or value.
        TypeError: unknown option.
    """
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    wanted = InstructionOptions(min_turns, max_turns, tuple(kinds), text_only, two_images, image_last, short)
    size = DEFAULT_SIZES[split] if size is None else size
    if size < 1:
        raise ValueError(f"size={size}: at least one conversation")
    ranges = [(start, min(start + SHARD_ROWS, size)) for start in range(0, size, SHARD_ROWS)]
    if streaming:
        return IterableDataset.from_generator(
            _instruction_rows,
            features=instruction_features(),
            gen_kwargs={"world": world, "ranges": ranges, "options": wanted},
        )
    return in_memory(_instruction_rows(world, ranges, wanted), instruction_features())


def _instruction_rows(
    world: ShapesWorld, ranges: Sequence[tuple[int, int]], options: InstructionOptions
) -> Iterator[dict[str, Any]]:
    for start, stop in ranges:
        for index in range(start, stop):
            yield instruction_row(world, index, options)
