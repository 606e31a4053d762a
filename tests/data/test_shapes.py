"""Shapes is true by construction, the same everywhere, and cheap."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_vlp.data import (
    ShapesConfig,
    ShapesWorld,
    load_pairs,
    load_questions,
    load_shapes,
    parse_caption,
    score_caption,
    shapes_texts,
)
from hf_vlp.data.shapes import drawing
from hf_vlp.data.shapes.draws import Draws
from hf_vlp.data.shapes.scenes import Scene, SceneObject, objects_of
from hf_vlp.data.shapes.vocabulary import (
    BACKGROUNDS,
    COLOR_WORDS,
    COLORS,
    SHAPES,
    SIZE_SYNONYMS,
    SIZES,
    TEXTURE_SYNONYMS,
    TEXTURES,
)
from hf_vlp.data.shapes.world import png

EVERYTHING = {"colors": tuple(COLORS), "shapes": SHAPES, "grid": 3, "max_objects": 5}
_FINGERPRINT = """
import hashlib, json
from hf_vlp.data import ShapesWorld, ShapesConfig
digest = hashlib.sha256()
for split in ("train", "heldout"):
    world = ShapesWorld(ShapesConfig(caption_noise=0.3), split, seed=11)
    for index in (0, 1, 999, 10**12):
        scene = world.scene(index)
        row = world.row(index)
        digest.update(json.dumps([row["text"], row["noise"], row["objects"], row["background"]]).encode())
        digest.update(repr(world.questions(index, scene, 4)).encode())
        digest.update(world.image(scene).tobytes())
print(digest.hexdigest())
"""
FINGERPRINT = "123e8813751cf506508ddc87f7f6dc69d1858140919473fd52c5d27ee8f07f4e"


def scenes(world: ShapesWorld, count: int = 300):
    return [world.scene(index) for index in range(count)]


@pytest.mark.slow
def test_the_same_in_every_process_and_for_ever() -> None:
    command = [sys.executable, "-c", _FINGERPRINT]
    environment = {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    runs = [
        subprocess.run(command, capture_output=True, text=True, check=True, env=environment | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]
    assert {run.stdout.strip() for run in runs} == {FINGERPRINT}


def test_a_scene_does_not_depend_on_those_before_it() -> None:
    world = ShapesWorld()
    backwards = {index: world.row(index) for index in reversed(range(20))}
    assert [backwards[index] for index in range(20)] == [ShapesWorld().row(index) for index in range(20)]


def test_no_global_random_state_is_read_or_written() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = ShapesWorld().row(3)
    np.random.seed(1)
    assert ShapesWorld().row(3) == first
    np.random.seed(0)
    ShapesWorld().row(3)
    assert (np.random.get_state()[1] == before).all()


def test_splits_and_seeds_have_scenes_of_their_own() -> None:
    pictures = [
        picture["bytes"]
        for split in ("train", "validation", "test", "heldout")
        for seed in (0, 1)
        for picture in load_shapes(split, size=100, seed=seed)["image"]
    ]
    assert len(set(pictures)) > 0.99 * len(pictures)


def test_held_out_combinations_never_occur_in_other_splits() -> None:
    config = ShapesConfig(caption_noise=1.0)
    heldout = set(config.heldout_pairs)
    assert len(heldout) == 8
    for split in ("train", "validation", "test"):
        rows = load_shapes(split, size=400, caption_noise=1.0)
        said = {pair for row in rows for text in row["text"] for pair in parse_caption(text)}
        assert not heldout & said
        assert not heldout & {pair for row in rows for pair in objects_of(row)}
    shown = {pair for row in load_shapes("heldout", size=400) for pair in objects_of(row)}
    assert shown == heldout
    told = {pair for text in shapes_texts(2000, questions=True) for pair in parse_caption(text)}
    assert not heldout & told
    assert heldout <= {pair for text in shapes_texts(2000, all_combinations=True) for pair in parse_caption(text)}


@pytest.mark.parametrize("options", [{}, {"colors": tuple(COLORS), "heldout": 2}, {"shapes": SHAPES}])
def test_no_colour_or_shape_is_held_out_altogether(options: dict) -> None:
    config = ShapesConfig(**options)
    assert set(config.trained_pairs).isdisjoint(config.heldout_pairs)
    assert len(config.trained_pairs) + len(config.heldout_pairs) == len(config.colors) * len(config.shapes)
    for position in (0, 1):
        lost = Counter(pair[position] for pair in config.heldout_pairs)
        assert max(lost.values()) <= 2
        assert {pair[position] for pair in config.trained_pairs} == set((config.colors, config.shapes)[position])


def test_held_out_combinations_can_be_named() -> None:
    config = ShapesConfig(heldout=(("red", "circle"), ("blue", "star")), max_objects=2)
    assert config.heldout_pairs == (("red", "circle"), ("blue", "star"))
    with pytest.raises(ValueError, match="red.*moon"):
        ShapesConfig(heldout=(("red", "moon"),))


@pytest.mark.parametrize("preset", ["default", "simple"])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_caption_is_right_about_every_object(preset: str, split: str) -> None:
    world = ShapesWorld(ShapesConfig.preset(preset, captions=4, max_objects=3 if preset == "default" else 2), split)
    for index, scene in enumerate(scenes(world)):
        for text in world.captions(index, scene):
            score = score_caption(text, scene)
            assert score.exact and score.accuracy == 1, text


def _thing(scene: Scene, phrase: str) -> SceneObject:
    ((color, shape),) = parse_caption(phrase)
    return next(thing for thing in scene.objects if (thing.color, thing.shape) == (color, shape))


def test_everything_else_that_captions_say_is_true_too() -> None:
    world = ShapesWorld(ShapesConfig(captions=4, max_objects=4))
    synonyms = {**SIZE_SYNONYMS, **TEXTURE_SYNONYMS}
    canonical = {word: name for name, words in synonyms.items() for word in words}
    relations = {
        "left of": lambda a, b: a.column < b.column,
        "right of": lambda a, b: a.column > b.column,
        "above": lambda a, b: a.row < b.row,
        "over": lambda a, b: a.row < b.row,
        "below": lambda a, b: a.row > b.row,
        "under": lambda a, b: a.row > b.row,
    }
    found = Counter()
    for index, scene in enumerate(scenes(world)):
        for text in world.captions(index, scene):
            body = text
            if match := re.search(r" on an? (\w+) background$", text):
                assert match[1] == scene.background
                found["background"] += 1
                body = text[: match.start()]
            for phrase in re.split(r", (?=an? )| and (?=an? )", body):
                match = re.search(r" ((?:to the )?(?:left|right) of|above|over|below|under) ", phrase)
                if match:
                    first, second = _thing(scene, phrase[: match.start()]), _thing(scene, phrase[match.end() :])
                    assert relations[match[1].removeprefix("to the ")](first, second), text
                    found["relation"] += 1
                    continue
                thing = _thing(scene, phrase)
                words = [canonical.get(word, word) for word in re.findall(r"[a-z-]+", phrase)]
                for word in words:
                    if word in SIZES:
                        assert word == thing.size
                        found["size"] += 1
                    if word in TEXTURES:
                        assert word == thing.texture
                        found["texture"] += 1
                if match := re.search(r" (in|at|on) the ([a-z ]+?)( corner)?$", phrase):
                    assert match[2] == scene.place(thing)
                    found["place"] += 1
    assert min(found[name] for name in ("background", "relation", "size", "texture", "place")) > 100


def test_rows_put_objects_side_by_side_at_any_height() -> None:
    scenes = load_shapes("train", size=100, grid=3, rows=1, max_objects=3, image_size=60, sizes=("small",))
    boxes = [thing["box"] for row in scenes for thing in row["objects"]]
    assert {box[0] // 20 for box in boxes} == {0, 1, 2} == {(box[1] + 5) // 20 for box in boxes}
    places = {thing["place"] for row in scenes for thing in row["objects"]}
    assert places == {"left", "center", "right"}
    with pytest.raises(ValueError, match="3 cells"):
        load_shapes("train", size=1, grid=3, rows=1, max_objects=4)
    with pytest.raises(ValueError, match="rows=4"):
        load_shapes("train", size=1, grid=3, rows=4)


def test_wording_varies_and_plain_does_not() -> None:
    varied = {text for row in load_shapes(size=300) for text in row["text"]}
    assert len(varied) > 800
    assert {word for text in varied for word in text.split()} >= {"disc", "violet", "crimson", "chequered", "tiny"}
    for row in [*load_pairs("shapes:simple", size=200), *load_pairs("shapes:row", size=200)]:
        things = sorted(row["objects"], key=lambda thing: (thing["place"].startswith("bottom"), thing["box"][0]))
        names = [f"{'an' if t['color'][0] in 'aeiou' else 'a'} {t['color']} {t['shape']}" for t in things]
        assert row["text"] == [" and ".join(names)]


def test_objects_are_different_inside_and_do_not_touch() -> None:
    for config in (ShapesConfig(), ShapesConfig(**EVERYTHING), ShapesConfig.preset("simple")):
        world = ShapesWorld(config)
        for scene in scenes(world, 200):
            assert config.min_objects <= len(scene.objects) <= config.max_objects
            assert len(set(objects_of(scene))) == len(scene.objects)
            covered = np.zeros((config.image_size, config.image_size), int)
            for thing in scene.objects:
                left, top, right, bottom = thing.box
                assert 0 <= left < right <= config.image_size and 0 <= top < bottom <= config.image_size
                covered[top:bottom, left:right] += 1
            assert covered.max() == 1
            assert scene.background not in {thing.color for thing in scene.objects} or set(BACKGROUNDS) <= {
                thing.color for thing in scene.objects
            }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("texture", TEXTURES)
def test_the_picture_shows_the_object_in_its_box(shape: str, texture: str) -> None:
    thing = SceneObject(shape, "red", "large", texture, 0, 0, 20, 22, 16, (200, 30, 30))
    image = np.asarray(drawing.draw(Scene(64, 1, 1, "white", (240, 240, 240), (thing,)))).astype(int)
    changed = (image != 240).any(axis=2)
    rows, columns = np.nonzero(changed.any(axis=1))[0], np.nonzero(changed.any(axis=0))[0]
    left, top, right, bottom = thing.box
    assert top <= rows[0] and rows[-1] < bottom and left <= columns[0] and columns[-1] < right
    assert len(rows) >= 24 and len(columns) >= 20
    # Most of what is drawn is red or a tint of it.
    drawn = image[changed]
    assert (drawn[:, 0] > drawn[:, 1]).mean() > 0.9
    assert ((image == (200, 30, 30)).all(axis=2)).sum() > 0.25 * changed.sum()


def test_shapes_look_different() -> None:
    masks = {shape: np.asarray(drawing._masks(shape, 10, "solid")[0]).astype(float) / 255 for shape in SHAPES}
    for first in SHAPES:
        for second in SHAPES:
            if first < second:
                assert abs(masks[first] - masks[second]).mean() > 0.04, (first, second)


def test_left_and_right_are_mirrored_where_they_should_be() -> None:
    for shape in SHAPES:
        mask = np.asarray(drawing._masks(shape, 9, "solid")[0])
        symmetric = (mask == mask[:, ::-1]).mean() > 0.98
        assert symmetric == (shape not in ("crescent", "arrow")), shape


def test_the_noise_dial() -> None:
    rows = {dial: load_shapes(size=500, caption_noise=dial) for dial in (0.0, 0.2, 0.6, 1.0)}
    for dial, noisy in rows.items():
        kinds = [kind for row in noisy for kind in row["noise"]]
        struck = sum(kind != "" for kind in kinds) / len(kinds)
        assert abs(struck - dial) < 0.05
        if dial:
            assert 0.3 < kinds.count("replaced") / (len(kinds) - kinds.count("")) < 0.6
        for row, clean in zip(noisy, rows[0.0]):
            assert row["image"] == clean["image"] and row["objects"] == clean["objects"]
            for text, kind, true in zip(row["text"], row["noise"], clean["text"]):
                assert (text == true) if kind == "" else not score_caption(text, row).exact
                if kind == "altered":
                    assert sum(score_caption(text, row).correct) == len(row["objects"]) - 1
                    assert len(score_caption(text, row).spurious) == 1
    struck_more = zip(rows[0.2]["noise"], rows[0.6]["noise"])
    assert all(more for few, many in struck_more for less, more in zip(few, many) if less)
    assert all(kind == "" for row in load_shapes("test", size=100, caption_noise=1.0) for kind in row["noise"])


def test_scores_count_what_is_said() -> None:
    scene = [{"color": "red", "shape": "circle"}, {"color": "purple", "shape": "star"}]
    for text, correct, spurious in (
        ("a red circle and a purple star", (True, True), ()),
        ("a VIOLET star, a crimson disc", (True, True), ()),
        ("a purple circle and a red star", (False, False), (("purple", "circle"), ("red", "star"))),
        ("a red circle and a red circle", (True, False), (("red", "circle"),)),
        ("two red circles", (True, False), ()),
        ("a circle that is red and a purple star", (False, False), ((None, "circle"), ("purple", "star"))),
        ("", (False, False), ()),
    ):
        score = score_caption(text, scene)
        if "that is" not in text:
            assert (score.correct, score.spurious) == (correct, spurious), text
    # Naming everything is no way to be right.
    everything = " and ".join(f"a {color} {shape}" for color in COLORS for shape in SHAPES)
    assert score_caption(everything, scene).accuracy == 1 and not score_caption(everything, scene).exact
    assert score_caption("a red circle", {"objects": scene}).accuracy == 0.5


@settings(max_examples=200, deadline=None)
@given(st.text() | st.lists(st.sampled_from([*COLOR_WORDS, *SHAPES, "and", "a", "of"])).map(" ".join))
def test_any_sentence_can_be_scored(text: str) -> None:
    scene = [{"color": "red", "shape": "circle"}]
    score = score_caption(text, scene)
    assert sum(score.correct) + len(score.spurious) == len(parse_caption(text))


def test_questions_have_true_answers() -> None:
    world = ShapesWorld(ShapesConfig(max_objects=4))
    kinds, yes = Counter(), Counter()
    for index, scene in enumerate(scenes(world)):
        for asked in world.questions(index, scene, 8):
            kinds[asked.kind] += 1
            assert asked.answer == _answer(scene, asked.question), (asked, scene)
            if asked.answer in ("yes", "no"):
                yes[asked.kind] += 2 * (asked.answer == "yes") - 1
    assert set(kinds) == {"exist", "color", "shape", "size", "texture", "place", "count", "relation", "background"}
    assert abs(yes["exist"]) < 0.25 * kinds["exist"]
    assert abs(yes["relation"]) < 0.5 * kinds["relation"]


def _answer(scene: Scene, question: str) -> str:
    """Answers by reading the question, independently of how it was made."""
    things = scene.objects
    if question == "what color is the background?":
        return scene.background
    if question == "how many objects are there?":
        return str(len(things))
    if match := re.fullmatch(r"how many (\w+) objects are there\?", question):
        return str(sum(thing.color == match[1] for thing in things))
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        (thing,) = [thing for thing in things if thing.shape == match[1]]
        return thing.color
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        (thing,) = [thing for thing in things if thing.color == match[1]]
        return thing.shape
    if match := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return "yes" if match.groups() in objects_of(scene) else "no"
    if match := re.fullmatch(r"is the (\w+ \w+) (?:to the )?(left of|right of|above|below) the (\w+ \w+)\?", question):
        first, second = _thing(scene, match[1]), _thing(scene, match[3])
        holds = {
            "left of": first.x < second.x and first.column != second.column,
            "right of": first.x > second.x and first.column != second.column,
            "above": first.y < second.y and first.row != second.row,
            "below": first.y > second.y and first.row != second.row,
        }
        return "yes" if holds[match[2]] else "no"
    for pattern, attribute in (
        (r"what size is the (\w+ \w+)\?", "size"),
        (r"what pattern does the (\w+ \w+) have\?", "texture"),
    ):
        if match := re.fullmatch(pattern, question):
            return getattr(_thing(scene, match[1]), attribute)
    match = re.fullmatch(r"where is the (\w+ \w+)\?", question)
    return scene.place(_thing(scene, match[1]))


def test_images_that_no_caption_can_tell_apart_share_their_id() -> None:
    rows = load_pairs("shapes:simple", size=3000)
    by_id: dict[str, set] = {}
    for row in rows.remove_columns("image"):
        by_id.setdefault(row["image_id"], set()).add(frozenset(objects_of(row)))
    assert all(len(contents) == 1 for contents in by_id.values())
    assert len(by_id) == len({frozenset(objects_of(row)) for row in rows.remove_columns("image")}) < 3000
    assert len(set(load_shapes(size=500)["image_id"])) > 470


def test_unique_leaves_twins_out() -> None:
    rows = load_shapes("test", size=400, preset="simple", unique=True)
    assert len(rows) == len(set(rows["image_id"])) == 400
    with pytest.raises(ValueError, match="only 56 of size=100"):
        load_shapes("test", size=100, preset="simple", max_objects=1, unique=True)
    with pytest.raises(ValueError, match="streaming"):
        load_shapes("test", unique=True, streaming=True)


def test_map_style_and_streaming_are_the_same_rows() -> None:
    rows, stream = load_pairs("shapes", size=2100), load_pairs("shapes", size=2100, streaming=True)
    assert isinstance(rows, Dataset) and isinstance(stream, IterableDataset)
    assert stream.features == rows.features and stream.num_shards == 3
    assert list(stream.skip(1990).take(20)) == [rows[index] for index in range(1990, 2010)]
    row = rows[0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)
    assert (row["source"], row["key"]) == ("shapes/train", "0")


def test_questions_as_rows() -> None:
    rows = load_questions("shapes", "validation", size=10, questions=3)
    stream = load_questions("shapes", "validation", size=10, questions=3, streaming=True)
    assert len(rows) == 30 and list(stream) == list(rows)
    pairs = load_pairs("shapes", "validation", size=10)
    assert [rows[3 * index]["image"] for index in range(10)] == pairs["image"][:]
    assert rows[0]["answers"] == rows[0]["answers"][:1] * 10
    assert len({row["key"] for row in rows}) == 30


def test_a_row_costs_a_bounded_number_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scenes a second depend on the machine; what a scene asks of it does not."""
    counts = Counter()
    raw, paste = Draws.word, Image.Image.paste

    def counted(name: str, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    world = ShapesWorld()
    for index in range(2000):
        world.image(world.scene(index))  # Fills the cache of masks.
    monkeypatch.setattr(Draws, "word", counted("words", raw))
    monkeypatch.setattr(Image.Image, "paste", counted("pastes", paste))
    before = drawing._masks.cache_info()
    for index in range(1000):
        scene = world.scene(index)
        world.image(scene)
        world.captions(index, scene)
    after = drawing._masks.cache_info()
    assert after.misses == before.misses
    assert counts["pastes"] <= 2 * 2 * 1000
    assert counts["words"] <= 2 * 64 * 1000


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"colors": ("red", "mauve")}, "mauve"),
        ({"colors": ("red", "red")}, "colors"),
        ({"shapes": ()}, "shapes"),
        ({"details": ("weight",)}, "weight"),
        ({"wording": "florid"}, "florid"),
        ({"order": "sorted"}, "order"),
        ({"captions": 0}, "captions"),
        ({"caption_noise": 1.5}, "caption_noise"),
        ({"image_size": 8}, "image_size"),
        ({"max_objects": 10}, "max_objects"),
        ({"min_objects": 0}, "min_objects"),
        ({"colors": ("red",), "shapes": ("circle", "star"), "max_objects": 2}, "too few"),
        ({"size": 0}, "size=0"),
        ({"preset": "hard"}, "hard"),
    ],
)
def test_settings_that_make_no_sense_are_named(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_pairs("shapes", **options)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(TypeError, match="colour.*colors"):
        load_pairs("shapes", colour="red")
    with pytest.raises(ValueError, match="train, validation, test, heldout"):
        load_pairs("shapes", "dev2")
    with pytest.raises(ValueError, match="heldout=0"):
        load_pairs("shapes", "heldout", heldout=0)
    with pytest.raises(ValueError, match="columns"):
        load_pairs("shapes", columns={"text": "caption"})


def test_draws_are_the_words_of_philox_in_any_thread() -> None:
    def words(key: tuple[int, int, int]) -> list[int]:
        draws = Draws(*key)
        return [draws.word() for _ in range(200)]

    keys = [(seed, stream, 7 * index) for seed in (0, -3, 2**63) for stream in (0, 65) for index in range(20)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(words, keys * 5))
    for key, drawn in zip(keys * 5, found):
        seed, stream, index = key
        raw = np.random.Philox(key=(((stream << 48) | index) << 64) | (seed % 2**64)).random_raw(256).tolist()
        expected = [word for start in range(0, 256, 64) for word in reversed(raw[start : start + 64])]
        assert drawn == expected[:200]


def test_a_picture_is_written_as_it_is() -> None:
    for world in (ShapesWorld(), ShapesWorld(ShapesConfig(image_size=37))):
        image = world.image(world.scene(0))
        Image.open(io.BytesIO(png(image))).verify()
        assert Image.open(io.BytesIO(png(image))).tobytes() == image.tobytes()


def test_draws_are_uniform_and_without_repetition() -> None:
    draws = Draws(5, 0, 0)
    counts = Counter(draws.below(7) for _ in range(7000))
    assert set(counts) == set(range(7)) and max(counts.values()) < 1.15 * min(counts.values())
    assert {draws.between(3, 5) for _ in range(100)} == {3, 4, 5}
    firsts = Counter(tuple(draws.sample("abcd", 2)) for _ in range(2400))
    assert len(firsts) == 12 and min(firsts.values()) > 140
    assert sorted(draws.shuffled(range(9))) == list(range(9))
    with pytest.raises(ValueError, match="index"):
        Draws(0, 0, -1)
    assert Draws(-1, 0, 0).word() == Draws(2**64 - 1, 0, 0).word()


def test_the_scene_survives_json() -> None:
    row = load_shapes(size=1).remove_columns("image")[0]
    assert json.loads(json.dumps(row)) == row
