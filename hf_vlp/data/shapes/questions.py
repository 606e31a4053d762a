"""Questions about a scene with their answers: single words or short phrases, true by construction."""

from collections.abc import Callable
from dataclasses import dataclass

from .draws import Draws
from .scenes import Pair, Scene, SceneObject, ShapesConfig, objects_of


@dataclass(frozen=True)
class Question:
    """A question, its one right answer, and what it asks for (a key of `KINDS`)."""

    kind: str
    question: str
    answer: str


def ask(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...], count: int) -> list[Question]:
    """`count` questions about a scene; kinds come in random order, so that few are of one kind.

    Args:
        pairs: combinations that a question about something absent may name.
    """
    asked: list[Question] = []
    while len(asked) < count:
        before = len(asked)
        for kind in draws.shuffled(tuple(KINDS)):
            question = KINDS[kind](config, scene, draws, pairs)
            if question is not None:
                asked.append(Question(kind, *question))
        if len(asked) == before:
            raise ValueError("nothing can be asked about this scene")
    return asked[:count]


_Asked = tuple[str, str] | None


def _exist(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    present = objects_of(scene)
    absent = [pair for pair in pairs if pair not in present]
    if absent and draws.below(2):
        # What is asked for shares a word with something that is there, so that neither word alone gives it away.
        near = [pair for pair in absent if any(pair[0] == color or pair[1] == shape for color, shape in present)]
        color, shape = draws.choice(near or absent)
        answer = "no"
    else:
        (color, shape), answer = draws.choice(present), "yes"
    return f"is there {_a(color)} {color} {shape}?", answer


def _color(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    things = _unique(scene, "shape")
    if not things or len(config.colors) < 2:
        return None
    thing = draws.choice(things)
    return f"what color is the {thing.shape}?", thing.color


def _shape(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    things = _unique(scene, "color")
    if not things or len(config.shapes) < 2:
        return None
    thing = draws.choice(things)
    return f"what shape is the {thing.color} object?", thing.shape


def _size(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if len(config.sizes) < 2:
        return None
    thing = draws.choice(scene.objects)
    return f"what size is the {thing.color} {thing.shape}?", thing.size


def _texture(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if len(config.textures) < 2:
        return None
    thing = draws.choice(scene.objects)
    return f"what pattern does the {thing.color} {thing.shape} have?", thing.texture


def _place(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if scene.grid == 1:
        return None
    thing = draws.choice(scene.objects)
    return f"where is the {thing.color} {thing.shape}?", scene.place(thing)


def _count(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if draws.below(2):
        return "how many objects are there?", str(len(scene.objects))
    color = draws.choice(config.colors)
    if draws.below(2):
        color = draws.choice(scene.objects).color
    return f"how many {color} objects are there?", str(sum(thing.color == color for thing in scene.objects))


def _relation(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if len(scene.objects) < 2:
        return None
    first, second = draws.sample(scene.objects, 2)
    asked = draws.choice(_SIDES)
    true = scene.relation(first, second)
    # Half of the questions are about what holds, as "yes" would otherwise be rarer than "no".
    if draws.below(2):
        asked = draws.choice(true)
    question = f"is the {first.color} {first.shape} {_SAID.get(asked, asked)} the {second.color} {second.shape}?"
    return question, "yes" if asked in true else "no"


def _background(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> _Asked:
    if len(config.backgrounds) < 2:
        return None
    return "what color is the background?", scene.background


_SIDES = ("left of", "right of", "above", "below")
_SAID = {"left of": "to the left of", "right of": "to the right of"}
KINDS: dict[str, Callable[[ShapesConfig, Scene, Draws, tuple[Pair, ...]], _Asked]] = {
    "exist": _exist,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "texture": _texture,
    "place": _place,
    "count": _count,
    "relation": _relation,
    "background": _background,
}


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    """Objects that this attribute alone tells from the others."""
    values = [getattr(thing, attribute) for thing in scene.objects]
    return [thing for thing, value in zip(scene.objects, values) if values.count(value) == 1]


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
