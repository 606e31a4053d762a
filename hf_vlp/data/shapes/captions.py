"""Captions of a scene, captions that do not describe it, and how right a given caption is."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .draws import Draws
from .scenes import Pair, Scene, SceneObject, ShapesConfig, objects_of
from .vocabulary import (
    COLOR_SYNONYMS,
    COLOR_WORDS,
    SHAPE_SYNONYMS,
    SHAPE_WORDS,
    SIZE_SYNONYMS,
    TEXTURE_SYNONYMS,
)

_OPENERS = ("", "", "", "there is ", "an image of ", "a picture of ", "a scene with ", "this image shows ")
_RELATIONS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class CaptionScore:
    """How a caption fits a scene.

    Attributes:
        correct: for each object of the scene, whether the caption names its colour and its shape together.
        spurious: combinations that the caption names and the scene lacks (`None` where a shape has no colour).
    """

    correct: tuple[bool, ...]
    spurious: tuple[tuple[str | None, str], ...]

    @property
    def accuracy(self) -> float:
        """Share of the scene's objects that the caption gets right."""
        return sum(self.correct) / len(self.correct) if self.correct else 1.0

    @property
    def exact(self) -> bool:
        """Every object is right and nothing else is named."""
        return all(self.correct) and not self.spurious


def caption(config: ShapesConfig, scene: Scene, draws: Draws) -> str:
    """A true sentence about the scene that names colour and shape of every object."""
    plain = config.wording == "plain"
    things = list(scene.objects)
    if config.order == "reading":
        things.sort(key=lambda thing: (thing.row, thing.column))
    else:
        things = draws.shuffled(things)
    said = [name for name in config.details if draws.below(2)] if config.details else []
    names = [noun_phrase(thing, said, None if plain else draws) for thing in things]
    if "relation" in said and len(things) > 1:
        held = draws.choice(scene.relation(things[0], things[1]))
        words = held if plain else draws.choice(_RELATIONS[held])
        # The relation stands last: "a star and a box above a ring" leaves the ring to one of them, the box.
        names = [*names[2:], f"{names[0]} {words} {names[1]}"]
    elif "place" in said:
        names = [f"{name} {place_phrase(scene.place(thing))}" for name, thing in zip(names, things)]
    body = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if "background" in said:
        body = f"{body} on {_with_article(scene.background)} background"
    return body if plain else draws.choice(_OPENERS) + body


def noun_phrase(thing: SceneObject, said: Sequence[str], draws: Draws | None) -> str:
    """ "a small striped red circle". Without `draws` the canonical words are used, with it synonyms as well."""
    words = []
    if "size" in said:
        words.append(_word(thing.size, SIZE_SYNONYMS, draws))
    if "texture" in said:
        words.append(_word(thing.texture, TEXTURE_SYNONYMS, draws))
    words.append(_word(thing.color, COLOR_SYNONYMS, draws))
    words.append(_word(thing.shape, SHAPE_SYNONYMS, draws))
    return _with_article(" ".join(words))


def place_phrase(place: str) -> str:
    """ "in the top left corner", "at the bottom", "on the left", "in the center"."""
    if " " in place:
        return f"in the {place} corner"
    return {"center": "in the center", "top": "at the top", "bottom": "at the bottom"}.get(place, f"on the {place}")


def _word(name: str, synonyms: Mapping[str, tuple[str, ...]], draws: Draws | None) -> str:
    if draws is None:
        return name
    others = synonyms.get(name)
    # The canonical word is said half of the time, so that it stays the usual one.
    return draws.choice(others) if others and draws.below(2) else name


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def parse_caption(text: str) -> list[tuple[str | None, str]]:
    """The (colour, shape) combinations that a sentence names, in order.

    A shape word takes the last colour word since the shape word before it; synonyms and plurals count; a shape
    without a colour gives `(None, shape)`.
    """
    named: list[tuple[str | None, str]] = []
    color = None
    for word in _WORD.findall(text.lower()):
        if word in COLOR_WORDS:
            color = COLOR_WORDS[word]
        elif word in SHAPE_WORDS:
            named.append((color, SHAPE_WORDS[word]))
            color = None
    return named


def score_caption(text: str, scene: Scene | Mapping[str, Any] | list[Mapping[str, Any]]) -> CaptionScore:
    """Which objects of a scene a caption gets right: colour and shape, each mention counted for one object.

    Args:
        text: any sentence, such as a model's output.
        scene: the scene, a row of the dataset, or the row's `objects`.
    """
    named = Counter(parse_caption(text))
    correct = []
    for pair in objects_of(scene):
        correct.append(named[pair] > 0)
        named[pair] -= correct[-1]
    return CaptionScore(tuple(correct), tuple(pair for pair, count in named.items() for _ in range(max(0, count))))


def altered_scene(scene: Scene, draws: Draws, pairs: Sequence[Pair]) -> Scene:
    """The scene with the colour or the shape of one object changed, so that a caption of it is false of `scene`.

    Args:
        pairs: combinations that the changed object may become; the ones of the scene are left out.
    """
    present = set(objects_of(scene))
    position = draws.below(len(scene.objects))
    thing = scene.objects[position]
    near = [
        pair for pair in pairs if pair not in present and (pair[0] == thing.color) != (pair[1] == thing.shape)
    ] or [pair for pair in pairs if pair not in present]
    if not near:
        raise ValueError("caption_noise needs a combination of colour and shape that is not in the scene; add colors")
    color, shape = draws.choice(near)
    objects = list(scene.objects)
    objects[position] = replace(thing, color=color, shape=shape)
    return replace(scene, objects=tuple(objects))
