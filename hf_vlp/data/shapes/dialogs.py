"""Dialogs about a scene with candidate answers, and expressions that refer to one object of it."""

from dataclasses import dataclass

from .captions import noun_phrase, parse_caption, place_phrase
from .draws import Draws
from .questions import ask
from .scenes import Pair, Scene, SceneObject, ShapesConfig
from .vocabulary import BACKGROUNDS, COLOR_SYNONYMS, SHAPE_SYNONYMS, SIZE_SYNONYMS, TEXTURE_SYNONYMS

# What an answer that is partly right counts, beside 1 for the right one and for its synonyms.
PARTLY = 0.5


@dataclass(frozen=True)
class Turn:
    """A question with its answer, candidate answers in random order, and how right each of them is, 0 to 1."""

    question: str
    answer: str
    candidates: tuple[str, ...]
    relevance: tuple[float, ...]


def dialog(
    config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...], turns: int, candidates: int
) -> tuple[str, list[Turn]]:
    """A caption and `turns` questions.

    The caption names one object by colour and shape. Questions about "it" are about the object that was named last,
    so that they need the history.

    Args:
        pairs: combinations that a question about something absent may name.
        turns: number of questions.
        candidates: candidate answers a question, the right one among them.
    """
    first = draws.choice(scene.objects)
    caption = f"there is {noun_phrase(first, (), None)}"
    # What "it" means: the object that was named last, None where several or none were.
    topic: SceneObject | None = first
    asked: list[tuple[str, str, str]] = []
    used: set[tuple[str, SceneObject | None]] = set()
    attempts = 0
    while len(asked) < turns:
        attempts += 1
        about_it = _about_it(config, scene, topic, draws) if topic is not None and draws.below(2) else None
        kind, question, answer = about_it or _general(config, scene, draws, pairs)
        mark = (question, topic if about_it else None)
        # Small scenes run out of questions: then they may come again.
        if mark in used and attempts < 20 * turns:
            continue
        used.add(mark)
        asked.append((kind, question, answer))
        if not about_it:
            named = parse_caption(question)
            topic = next((thing for thing in scene.objects if named == [(thing.color, thing.shape)]), None)
    return caption, [
        _with_candidates(config, scene, kind, question, answer, draws, candidates) for kind, question, answer in asked
    ]


def _general(config: ShapesConfig, scene: Scene, draws: Draws, pairs: tuple[Pair, ...]) -> tuple[str, str, str]:
    asked = ask(config, scene, draws, pairs, 1)[0]
    return asked.kind, asked.question, asked.answer


def _about_it(config: ShapesConfig, scene: Scene, thing: SceneObject, draws: Draws) -> tuple[str, str, str] | None:
    possible = []
    if len(config.sizes) > 1:
        possible.append(("size", "what size is it?", thing.size))
    if len(config.textures) > 1:
        possible.append(("texture", "what pattern does it have?", thing.texture))
    if scene.grid > 1:
        possible.append(("place", "where is it?", scene.place(thing)))
    return draws.choice(possible) if possible else None


_SYNONYMS = {
    "color": COLOR_SYNONYMS,
    "shape": SHAPE_SYNONYMS,
    "size": SIZE_SYNONYMS,
    "texture": TEXTURE_SYNONYMS,
}
_KINDS = ("exist", "color", "shape", "size", "texture", "place", "count")
_PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def _answers_of(config: ShapesConfig, kind: str) -> tuple[str, ...]:
    """What a question of a kind can be answered by."""
    return {
        "exist": ("yes", "no"),
        "relation": ("yes", "no"),
        "color": config.colors,
        "shape": config.shapes,
        "size": config.sizes,
        "texture": config.textures,
        "place": _PLACES,
        "count": tuple(str(number) for number in range(config.max_objects + 1)),
        "background": tuple(BACKGROUNDS),
    }[kind]


def _with_candidates(
    config: ShapesConfig, scene: Scene, kind: str, question: str, answer: str, draws: Draws, count: int
) -> Turn:
    """The right answer, words of its kind (with their synonyms) as far as there is room, then others.

    Which words stand beside the right one does not depend on it, so that the candidates alone do not give it away.
    """
    synonyms = _SYNONYMS.get(kind, {})
    near = [word for one in _answers_of(config, kind) for word in (one, *synonyms.get(one, ()))]
    others = [word for word in near if word != answer]
    chosen = [answer, *draws.sample(others, min(len(others), count - 1))]
    far = sorted({one for other in _KINDS for one in _answers_of(config, other)} - set(near))
    chosen += draws.sample(far, min(len(far), count - len(chosen)))
    if len(chosen) < count:
        raise ValueError(f"candidates={count}: Shapes has only {len(chosen)} different answers here; ask for fewer")
    chosen = draws.shuffled(chosen)
    right = {answer, *synonyms.get(answer, ())}
    relevance = tuple(
        1.0 if one in right else PARTLY if kind == "place" and _partly(one, answer) else 0.0 for one in chosen
    )
    return Turn(question, answer, tuple(chosen), relevance)


def _partly(place: str, right: str) -> bool:
    """ "top" is partly right for "top left", and the other way round; "top right" is not."""
    words, wanted = set(place.split()), set(right.split())
    return words != wanted and (words < wanted or wanted < words)


def referring(config: ShapesConfig, scene: Scene, draws: Draws) -> tuple[str, SceneObject]:
    """An expression that fits exactly one object of the scene, and that object.

    Colour and shape together always do; where one word, or a place, is enough, it is said half of the time.
    """
    thing = draws.choice(scene.objects)
    others = [one for one in scene.objects if one is not thing]
    short = []
    if all(one.shape != thing.shape for one in others):
        short.append(f"the {thing.shape}")
    if all(one.color != thing.color for one in others):
        short.append(f"the {thing.color} object")
    if others:
        short.append(f"the object {place_phrase(scene.place(thing))}")
    if short and draws.below(2):
        return draws.choice(short), thing
    return f"the {thing.color} {thing.shape}", thing
