"""Shapes as instructions: every answer is true of its scene, and the scorer accepts it and nothing else."""

from collections import Counter

import pytest

from hf_vlp.data.conversations import ConversationCollator, load_conversations
from hf_vlp.data.shapes import ShapesConfig
from hf_vlp.data.shapes.instructions import KINDS, load_shapes_instructions, score_answer

from .conversations import TinyProcessor


@pytest.fixture(scope="module")
def rows():
    return list(load_shapes_instructions(size=150, max_turns=4, two_images=0.1, text_only=0.2))


def _said(row):
    return ["".join(entry["text"] or "<image>" for entry in message["content"]) for message in row["messages"]]


def test_every_answer_is_true_of_its_scene(rows):
    for row in rows:
        said = _said(row)
        assert len(said) == 2 * len(row["answers"])
        for number, truth in enumerate(row["answers"]):
            question, answer = said[2 * number], said[2 * number + 1]
            objects = row["scenes"][truth["scene"]]["objects"]
            assert answer == truth["answer"]
            assert score_answer(truth["kind"], answer, truth["answer"], objects)
            if truth["kind"] == "color" and not truth["followup"]:
                named = [thing for thing in objects if thing["shape"] in question.split(". ")[-1]]
                assert [thing["color"] for thing in named] == [answer], (question, answer)
            if truth["kind"] == "count":
                colors = [thing["color"] for thing in objects]
                asked = question.split(". ")[-1]
                known = [color for color in ShapesConfig().colors if color in asked]
                assert int(answer) == (sum(color == known[0] for color in colors) if known else len(objects))


def test_conversations_are_of_all_kinds(rows):
    kinds = Counter(truth["kind"] for row in rows for truth in row["answers"])
    assert set(kinds) == set(KINDS)
    assert {len(row["images"]) for row in rows} == {0, 1, 2}
    assert {row["kind"] for row in rows} == {"conversation", "detail"}
    assert any(truth["followup"] for row in rows for truth in row["answers"])
    first = [_said(row)[0] for row in rows if len(row["images"]) == 1]
    assert any(text.startswith("<image>") for text in first) and any(text.endswith("<image>") for text in first)
    for row in rows:
        topics = _said(row)[::2]
        assert len(set(topics)) == len(topics)
        if not row["images"]:
            assert all(truth["kind"] != "relation" for truth in row["answers"])


def test_followups_need_their_history():
    rows = load_shapes_instructions(size=80, min_turns=2, max_turns=2, kinds=("color",))
    found = [(row, truth) for row in rows for truth in row["answers"] if truth["followup"]]
    assert found
    for row, truth in found:
        question = _said(row)[2]
        assert question.startswith("and the ")
        shape = question.removeprefix("and the ").removesuffix("?")
        objects = row["scenes"][0]["objects"]
        assert [thing["color"] for thing in objects if thing["shape"] == shape] == [truth["answer"]]


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("color", "purple", ["purple", "It is violet.", "PURPLE"], ["red", "purple or red", ""]),
        ("shape", "circle", ["a circle", "disc"], ["square", "circle and square"]),
        ("count", "2", ["2", "There are two."], ["3", "2 or 3", "", "many"]),
        ("relation", "yes", ["yes", "Yes, it is."], ["no", "yes and no", ""]),
        ("relation", "the red star", ["the red star", "a crimson star"], ["the red circle", "star", "yes"]),
    ],
)
def test_scores(kind, answer, right, wrong):
    assert all(score_answer(kind, text, answer) for text in right)
    assert not any(score_answer(kind, text, answer) for text in wrong)


def test_descriptions_are_scored_by_their_objects():
    objects = [{"color": "red", "shape": "star"}, {"color": "blue", "shape": "circle"}]
    assert score_answer("description", "a blue disc and a red star", "", objects)
    assert not score_answer("description", "a blue star and a red circle", "", objects)
    assert not score_answer("description", "a red star", "", objects)
    with pytest.raises(ValueError, match="objects"):
        score_answer("description", "a", "b")
    with pytest.raises(ValueError, match="none of color"):
        score_answer("mood", "a", "b")


def test_held_out_combinations_are_in_no_other_split():
    config = ShapesConfig()
    for split, pairs in (("train", config.trained_pairs), ("heldout", config.heldout_pairs)):
        rows = load_shapes_instructions(split, size=30)
        seen = {(thing["color"], thing["shape"]) for row in rows for one in row["scenes"] for thing in one["objects"]}
        assert seen <= set(pairs)


def test_rows_do_not_depend_on_how_they_are_read():
    options = {"size": 12, "seed": 3, "preset": "simple"}
    whole = list(load_shapes_instructions(**options))
    assert list(load_shapes_instructions(streaming=True, **options)) == whole
    assert list(load_conversations("shapes:simple", "train[:5]", size=12, seed=3)) == whole[:5]
    assert list(load_shapes_instructions(**{**options, "seed": 4})) != whole
    with pytest.raises(ValueError, match="kinds"):
        load_shapes_instructions(kinds=("mood",))
    with pytest.raises(ValueError, match="more than all"):
        load_shapes_instructions(text_only=0.7, two_images=0.7)
    with pytest.raises(ValueError, match="min_turns=3"):
        load_shapes_instructions(min_turns=3, max_turns=2)


def test_they_make_batches(rows):
    batch = ConversationCollator(TinyProcessor(), pack_to=6_000)(rows[:20])
    assert batch["record_report"].bad_total == 0
    assert batch["pixel_values"].shape[0] == sum(len(row["images"]) for row in rows[:20])
