"""Shapes as data of the tasks on top: statements about two images, entailment, dialogs, referring expressions."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, Value

from ..columns import DIALOGS, ENTAILMENT, GROUNDING, STATEMENTS, Schema
from ..rows import features_for
from ..tables import in_memory
from .dialogs import dialog, referring
from .drawing import draw
from .scenes import Scene, ShapesConfig
from .statements import hypotheses, statements
from .world import DEFAULT_SIZES, SHARD_ROWS, ShapesWorld, png

# Purposes of draws, beside those of `world`.
_STATEMENTS, _ENTAILMENT, _DIALOG, _GROUNDING = range(4, 8)
# Scenes from here on serve where the ones of a group cannot be told apart.
_SPARE = 1 << 46
_TRIES = 100

Row = dict[str, Any]


def _picture(scene: Scene) -> Row:
    return {"bytes": png(draw(scene)), "path": None}


def _common(world: ShapesWorld, key: str) -> Row:
    return {"source": f"shapes/{world.split}", "key": key, "problem": None}


def statement_rows(world: ShapesWorld, group: int) -> list[Row]:
    """Four rows: two statements about the same two pairs of images, each true of one pair."""
    draws = world.draws(_STATEMENTS, group)
    first = (world.scene(4 * group), world.scene(4 * group + 1))
    second = (world.scene(4 * group + 2), world.scene(4 * group + 3))
    made = statements(world.config, first, second, draws)
    for _ in range(_TRIES):
        if made is not None:
            break
        second = (world.scene(_SPARE + draws.below(_SPARE)), world.scene(_SPARE + draws.below(_SPARE)))
        made = statements(world.config, first, second, draws)
    else:
        raise ValueError("no statement tells two pairs of scenes apart: Shapes has too little variety in this setting")
    return [
        {
            "image_0": _picture(one.scenes[0]),
            "image_1": _picture(one.scenes[1]),
            "text": one.text,
            "label": int(one.true),
            "sentence_id": f"{world.split}-{group}-{one.group}",
            "identifier": f"{world.split}-{group}-{int(one.true == (one.group == 1))}-{one.group}",
            "statement_type": one.kind,
            **_common(world, f"{group}.{number}"),
        }
        for number, one in enumerate(made)
    ]


def entailment_rows(world: ShapesWorld, group: int) -> list[Row]:
    """Three rows: one hypothesis with three images."""
    three = hypotheses(world.config, world.scene(group), world.draws(_ENTAILMENT, group), world.pairs)
    return [
        {
            "image": _picture(one.scene),
            "text": one.text,
            "label": one.label,
            "image_id": f"{group}.{number}",
            "hypothesis_type": one.kind,
            **_common(world, f"{group}.{number}"),
        }
        for number, one in enumerate(three)
    ]


def dialog_rows(world: ShapesWorld, index: int, turns: int = 5, candidates: int = 10) -> list[Row]:
    """One row."""
    scene = world.scene(index)
    caption, asked = dialog(world.config, scene, world.draws(_DIALOG, index), world.pairs, turns, candidates)
    return [
        {
            "image": _picture(scene),
            "caption": caption,
            "turns": [
                {
                    "question": turn.question,
                    "answer": turn.answer,
                    "candidates": list(turn.candidates),
                    "relevance": list(turn.relevance),
                }
                for turn in asked
            ],
            "image_id": str(index),
            **_common(world, str(index)),
        }
    ]


def grounding_rows(world: ShapesWorld, index: int) -> list[Row]:
    """One row."""
    scene = world.scene(index)
    text, thing = referring(world.config, scene, world.draws(_GROUNDING, index))
    return [
        {
            "image": _picture(scene),
            "text": text,
            "boxes": [[float(edge) for edge in thing.box]],
            "proposals": [[float(edge) for edge in one.box] for one in scene.objects],
            "image_id": str(index),
            **_common(world, str(index)),
        }
    ]


# Task -> rows of a group, rows a group, schema, and columns beyond it.
_TASKS: dict[str, tuple[Callable[..., list[Row]], int, Schema, tuple[str, ...]]] = {
    "visual_reasoning": (statement_rows, 4, STATEMENTS, ("statement_type",)),
    "visual_entailment": (entailment_rows, 3, ENTAILMENT, ("hypothesis_type",)),
    "dialog": (dialog_rows, 1, DIALOGS, ()),
    "grounding": (grounding_rows, 1, GROUNDING, ()),
}


def load_shapes_task(
    task: str,
    split: str = "train",
    *,
    streaming: bool = False,
    size: int | None = None,
    seed: int = 0,
    preset: str = "default",
    turns: int = 5,
    candidates: int = 10,
    **options: Any,
) -> Dataset | IterableDataset:
    """Shapes as rows of a task.

    Args:
        task: `"visual_reasoning"`, `"visual_entailment"`, `"dialog"` or `"grounding"`.
        size: number of rows; 20,000 for train and 1,000 for the others if left out.
        turns, candidates: of dialogs: questions a scene, and candidate answers a question.
        split, streaming, seed, preset, options: as in `load_shapes`.

    Raises:
        ValueError: unknown task, split, preset or value; a setting in which the task has nothing to ask.
        TypeError: unknown option.
    """
    if task not in _TASKS:
        raise ValueError(f"Shapes has no task {task!r}; it has {', '.join(_TASKS)}")
    world = ShapesWorld(ShapesConfig.preset(preset, **options), split, seed)
    make, group, schema, extra = _TASKS[task]
    arguments: dict[str, int] = {}
    if task == "dialog":
        if turns < 1 or candidates < 2:
            raise ValueError(f"turns={turns}, candidates={candidates}: a dialog needs a turn and two candidates")
        arguments = {"turns": turns, "candidates": candidates}
    size = DEFAULT_SIZES[split] if size is None else size
    if size < 1:
        raise ValueError(f"size={size}: at least one row")
    features = Features(
        {
            **features_for({role: role for role in schema if role != "pair_id"}, schema),
            **{name: Value("string") for name in extra},
        }
    )
    # Whole groups a shard, so that shards can be drawn apart.
    length = SHARD_ROWS // group * group
    ranges = [(start, min(start + length, size)) for start in range(0, size, length)]
    given = {"world": world, "task": task, "ranges": ranges, "arguments": arguments}
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=given)
    return in_memory(_rows(**given), features)


def _rows(
    world: ShapesWorld, task: str, ranges: Sequence[tuple[int, int]], arguments: dict[str, int]
) -> Iterator[Row]:
    make, group, _, _ = _TASKS[task]
    for start, stop in ranges:
        for number in range(start // group, -(-stop // group)):
            yield from make(world, number, **arguments)[: stop - number * group]
