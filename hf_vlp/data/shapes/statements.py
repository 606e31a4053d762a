"""Statements about two images (NLVR2) and hypotheses about one (entailment): the text alone never says the label.

A statement comes twice, once where it is true and once where it is false, with two pairs of images that each carry one
true and one false statement; so neither the text nor the images alone say anything about the label. A hypothesis comes
three times, with a scene that shows it, one that contradicts it, and one that says nothing about it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .captions import place_phrase
from .draws import Draws
from .scenes import Pair, Scene, SceneObject, ShapesConfig, laid_out, objects_of

ScenePair = tuple[Scene, Scene]


@dataclass(frozen=True)
class Statement:
    """A sentence about the images left and right, its group (texts that are the same one), and whether it is true."""

    kind: str
    text: str
    group: int
    scenes: ScenePair
    true: bool


def statements(
    config: ShapesConfig, first: ScenePair, second: ScenePair, draws: Draws
) -> tuple[Statement, Statement, Statement, Statement] | None:
    """Two sentences about two pairs of scenes: the first true of the first pair only, the second of the second only.

    Half of the time the second pair is the first one with its images exchanged, where some sentence can tell the two.

    Returns:
        All four combinations in random order, or None where nothing tells the pairs apart.
    """
    swapped = (first[1], first[0])
    for pair in (swapped, second) if draws.below(2) else (second,):
        for kind in draws.shuffled(tuple(_KINDS)):
            said, other = _KINDS[kind](config, *first), _KINDS[kind](config, *pair)
            only_first, only_second = sorted(said - other), sorted(other - said)
            if only_first and only_second:
                texts = (draws.choice(only_first), draws.choice(only_second))
                four = [
                    Statement(kind, text, group, scenes, group == number)
                    for group, text in enumerate(texts)
                    for number, scenes in enumerate((first, pair))
                ]
                return tuple(draws.shuffled(four))  # type: ignore[return-value]
    return None


def _names(scene: Scene) -> set[str]:
    """What can be said to be in a scene: "a red circle", "a circle", "a red object"."""
    named = set()
    for color, shape in objects_of(scene):
        named |= {f"{color} {shape}", shape, f"{color} object"}
    return named


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _side(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    there = {"left": _names(left), "right": _names(right)}
    return {f"the {side} image contains {_a(name)}" for side, names in there.items() for name in names}


def _both(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    return {f"there is {_a(name)} in both images" for name in _names(left) & _names(right)}


def _one(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    return {f"exactly one image contains {_a(name)}" for name in _names(left) ^ _names(right)}


def _sides(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    return {
        f"there is {_a(first[1])} on the left and {_a(second[1])} on the right"
        for first in objects_of(left)
        for second in objects_of(right)
    }


def _total(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    both = (*objects_of(left), *objects_of(right))
    texts = {f"there are {len(both)} objects in total"}
    for color in {color for color, _ in both}:
        number = sum(one == color for one, _ in both)
        texts.add(f"exactly {number} {'object is' if number == 1 else 'objects are'} {color}")
    return texts


def _more(config: ShapesConfig, left: Scene, right: Scene) -> set[str]:
    here, there = len(left.objects), len(right.objects)
    if here == there:
        return {"both images show the same number of objects"}
    side, other = ("left", "right") if here > there else ("right", "left")
    return {f"there are more objects in the {side} image than in the {other} one"}


_KINDS: dict[str, Callable[[ShapesConfig, Scene, Scene], set[str]]] = {
    "side": _side,
    "both": _both,
    "one": _one,
    "sides": _sides,
    "total": _total,
    "more": _more,
}


@dataclass(frozen=True)
class Hypothesis:
    """A sentence about an object, a scene, and whether the scene contradicts it (0), leaves it open (1) or shows
    it (2)."""

    kind: str
    text: str
    scene: Scene
    label: int


def hypotheses(
    config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]
) -> tuple[Hypothesis, Hypothesis, Hypothesis]:
    """A sentence such as "the red circle is large" with three scenes, in random order.

    It is shown by a scene with a large red circle, contradicted by one with a small red circle, and left open by one
    without a red circle, which instead has an object that shares its colour or its shape.

    Raises:
        ValueError: all objects of this configuration have one size, one texture and one place.
    """
    position = draws.below(len(scene.objects))
    thing = scene.objects[position]
    free = [
        cell
        for cell in range(config.cells)
        if all((one.row, one.column) != divmod(cell, config.grid) for one in scene.objects)
    ]
    kinds = [
        kind
        for kind, possible in (
            ("size", len(config.sizes) > 1),
            ("texture", len(config.textures) > 1),
            ("place", bool(free)),
        )
        if possible
    ]
    if not kinds:
        raise ValueError(
            "entailment needs something that can differ between two objects of the same colour and shape: give "
            "several sizes or textures, or a grid with a free cell"
        )
    kind = draws.choice(kinds)
    cell = thing.row * config.grid + thing.column
    jitter = draws.word()
    if kind == "place":
        other_cell = draws.choice(free)
        changed = laid_out(config, draws, thing.color, thing.shape, thing.size, thing.texture, other_cell, jitter)
    else:
        values = config.sizes if kind == "size" else config.textures
        value = draws.choice([one for one in values if one != getattr(thing, kind)])
        looks = {"size": thing.size, "texture": thing.texture, kind: value}
        changed = laid_out(config, draws, thing.color, thing.shape, looks["size"], looks["texture"], cell, jitter)
    contradicting = _with(scene, position, changed)
    shown, contradicting = (scene, contradicting) if draws.below(2) else (contradicting, scene)
    told = shown.objects[position]
    said = {
        "size": f"is {told.size}",
        "texture": f"is {told.texture}",
        "place": f"is {place_phrase(shown.place(told))}",
    }[kind]
    text = f"the {thing.color} {thing.shape} {said}"

    # The scene that leaves it open is as likely to be made of either of the two.
    base = scene if draws.below(2) else _with(scene, position, changed)
    old = base.objects[position]
    present = set(objects_of(scene))
    absent = [pair for pair in pairs if pair not in present]
    near = [pair for pair in absent if (pair[0] == thing.color) != (pair[1] == thing.shape)]
    if not absent:
        raise ValueError("entailment needs a combination of colour and shape that is not in the scene; add colors")
    color, shape = draws.choice(near or absent)
    old_cell = old.row * config.grid + old.column
    stranger = laid_out(config, draws, color, shape, old.size, old.texture, old_cell, draws.word())
    three = (
        Hypothesis(kind, text, contradicting, 0),
        Hypothesis(kind, text, _with(base, position, stranger), 1),
        Hypothesis(kind, text, shown, 2),
    )
    return tuple(draws.shuffled(three))  # type: ignore[return-value]


def _with(scene: Scene, position: int, thing: SceneObject) -> Scene:
    objects = list(scene.objects)
    objects[position] = thing
    return replace(scene, objects=tuple(objects))
