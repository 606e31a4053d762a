"""Sources of the tasks: annotation files as their makers publish them, typed data, Shapes; and what is refused."""

import json
import pickle
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from PIL import Image

from hf_vlp.data import load_task, parse_caption, task_records
from hf_vlp.data.columns import ENTAILMENT
from hf_vlp.data.tasks import TASKS, dialog_text
from hf_vlp.data.tasks.dialogs import fitted_text
from tests.data.hostile import encoded, picture


def put(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(path: Path, records: list[dict]) -> Path:
    return put(path, "".join(json.dumps(record) + "\n" for record in records))


def picture_at(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(), "PNG"))
    return str(path)


def vqa_files(folder: Path, split: str = "train2014") -> Path:
    for number in (9, 25):
        picture_at(folder / split / f"COCO_{split}_{number:012d}.jpg")
    questions = [
        {"image_id": 9, "question": "What color?", "question_id": 90},
        {"image_id": 25, "question": "How many?", "question_id": 250},
        {"image_id": 25, "question": "Is it?", "question_id": 251},
    ]
    annotations = [
        {
            "question_id": number,
            "image_id": number // 10,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(said)
            ],
            "question_type": kind,
            "answer_type": "other",
            "multiple_choice_answer": said[0],
        }
        for number, said, kind in ((250, ["2"] * 9 + ["two"], "how many"), (90, ["red"] * 10, "what color"))
    ]
    put(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": annotations, "data_subtype": split})
    return put(
        folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
        {"questions": questions, "data_type": "mscoco", "data_subtype": split, "task_type": "Open-Ended"},
    )


def test_vqa_questions_find_their_answers_and_images(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    for spec in (file, tmp_path):
        rows = load_task("vqa", spec)
        assert rows["question"] == ["What color?", "How many?", "Is it?"]
        assert rows["answers"] == [["red"] * 10, ["2"] * 9 + ["two"], []]
        assert rows["question_id"] == ["90", "250", "251"] and rows["question_type"][1] == "how many"
        assert [Path(image["path"]).is_file() for image in rows["image"]] == [True] * 3
    streamed = load_task("vqa", file, streaming=True)
    assert isinstance(streamed, IterableDataset) and [row["key"] for row in streamed] == ["90", "250", "251"]
    assert load_task("vqa", file, "train[1:2]")["key"] == ["250"]


def test_vqa_without_answers(tmp_path: Path) -> None:
    file = vqa_files(tmp_path)
    answers = tmp_path / "v2_mscoco_train2014_annotations.json"
    with pytest.raises(ValueError, match="give the file of questions as the source"):
        load_task("vqa", answers)
    moved = answers.rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="answers are missing.*v2_mscoco_train2014_annotations.json"):
        load_task("vqa", file)
    assert load_task("vqa", file, annotations=moved)["answers"][0] == ["red"] * 10
    alone = load_task("vqa", file, annotations="none")
    assert alone["answers"] == [[], [], []]
    with pytest.raises(ValueError, match="none of the first 3 rows has answers"):
        task_records("vqa", alone)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        load_task("vqa", file, annotations=tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match="is no annotation file that another one goes with"):
        load_task("vqa", "shapes", annotations="none")


def test_nlvr2_lines(tmp_path: Path) -> None:
    records = []
    for number, label in (("0-0", "True"), ("1-0", "False")):
        pair = number.split("-")[0]
        for side in range(2):
            picture_at(tmp_path / "images" / "train" / "70" / f"train-101-{pair}-img{side}.png")
        records.append(
            {
                "identifier": f"train-101-{number}",
                "sentence": "Both birds fly.",
                "label": label,
                "directory": 70,
                "left_url": "http://x/l.png",
                "right_url": "http://x/r.png",
            }
        )
    file = lines(tmp_path / "train.json", records)
    rows = load_task("visual_reasoning", file)
    assert rows["label"] == [1, 0] and rows.features["label"].names == ["false", "true"]
    assert rows["text"] == ["Both birds fly."] * 2 and rows["key"] == ["train-101-0-0", "train-101-1-0"]
    # The two pairs of images of one sentence are one group.
    assert rows["sentence_id"] == ["train-101-0"] * 2
    assert Path(rows[0]["image_1"]["path"]).name == "train-101-0-img1.png"
    assert all(Path(rows[i][f"image_{side}"]["path"]).is_file() for i in range(2) for side in range(2))
    assert [row["label"] for row in load_task("visual_reasoning", file, streaming=True)] == [1, 0]
    assert load_task("visual_reasoning", tmp_path, "train")["label"] == [1, 0]


def test_statements_with_another_number_of_images(tmp_path: Path) -> None:
    names = [picture_at(tmp_path / f"{name}.png") for name in "abc"]
    records = [{"images": names[:count], "sentence": "x", "label": count % 2 == 0} for count in (2, 3, 1)]
    for file in (put(tmp_path / "x.json", records), lines(tmp_path / "x.jsonl", records)):
        rows = load_task("visual_reasoning", file)
        assert rows["problem"] == [
            None,
            "image_count: a statement is about two images, not 3",
            "image_count: a statement is about two images, not 1",
        ]
        assert rows[0]["label"] == 1 and rows[0]["image_1"]["path"] == names[1]


def test_snli_ve_lines(tmp_path: Path) -> None:
    picture_at(tmp_path / "images" / "24.jpg")
    labels = ["contradiction", "neutral", "entailment", "-"]
    records = [
        {
            "Flickr30K_ID": "24",
            "sentence1": "a premise",
            "sentence2": f"hypothesis {i}",
            "gold_label": label,
            "pairID": f"24.jpg#{i}",
        }
        for i, label in enumerate(labels)
    ]
    rows = load_task("visual_entailment", lines(tmp_path / "snli_ve_train.jsonl", records))
    assert rows["label"] == [0, 1, 2, None] and rows["text"][2] == "hypothesis 2"
    assert rows["problem"][3].startswith("label_outside: '-' is none of 0 to 2")
    assert Path(rows[0]["image"]["path"]).is_file() and rows["image_id"] == ["24"] * 4
    assert rows["key"][1] == "24.jpg#1"
    with pytest.raises(ValueError, match="no split 'test'"):
        load_task("visual_entailment", tmp_path / "snli_ve_train.jsonl", "test")


def visdial_file(folder: Path, split: str = "val") -> Path:
    picture_at(folder / f"VisualDialog_{split}2018" / f"VisualDialog_{split}2018_{7:012d}.jpg")
    turns = [
        {"question": 1, "answer": 2, "answer_options": [0, 2, 1], "gt_index": 1},
        {"question": 0, "answer": 0, "answer_options": [1, 0], "gt_index": 1},
    ]
    data = {
        "questions": ["is it day", "what animal"],
        "answers": ["yes", "no", "a dog"],
        "dialogs": [
            {"image_id": 7, "caption": "a dog in a park", "dialog": turns},
            {"image_id": 7, "caption": "x", "dialog": [{"question": 9, "answer": 0}]},
            {"image_id": 7, "caption": "x", "dialog": [{**turns[0], "gt_index": 0}]},
        ],
    }
    put(
        folder / f"visdial_1.0_{split}_dense_annotations.json",
        [{"image_id": 7, "round_id": 2, "gt_relevance": [0.2, 1.0]}],
    )
    return put(folder / f"visdial_1.0_{split}.json", {"version": "1.0", "split": split, "data": data})


@pytest.mark.parametrize("streaming", [False, True])
def test_visdial(tmp_path: Path, streaming: bool) -> None:
    file = visdial_file(tmp_path)
    for spec in (file, tmp_path):
        rows = list(load_task("dialog", spec, "validation", streaming=streaming))
        assert [row["caption"] for row in rows] == ["a dog in a park", None, None]
        first, second = rows[0]["turns"]
        assert first == {
            "question": "what animal",
            "answer": "a dog",
            "candidates": ["yes", "a dog", "no"],
            "relevance": None,
        }
        assert second["candidates"] == ["no", "yes"] and second["relevance"] == [0.2, 1.0]
        assert rows[1]["problem"].startswith("turns_wrong: IndexError")
        assert rows[2]["problem"] == "turns_wrong: ValueError: gt_index names 'yes', the answer is 'a dog'"
        assert Path(rows[0]["image"]["path"]).is_file()


def test_a_dialog_without_candidates(tmp_path: Path) -> None:
    image = picture_at(tmp_path / "a.png")
    turns = [{"question": "is it?", "answer": "yes"}]
    rows = load_task("dialog", lines(tmp_path / "d.jsonl", [{"image": image, "caption": "c", "turns": turns}]))
    assert rows[0]["turns"] == [{"question": "is it?", "answer": "yes", "candidates": None, "relevance": None}]
    with pytest.raises(ValueError, match="dialog without candidates.*add `candidates` to each turn"):
        task_records("dialog", rows)
    with pytest.raises(ValueError, match="dialog without candidates"):
        task_records("dialog", load_task("dialog", tmp_path / "d.jsonl", streaming=True))


def refs_files(folder: Path) -> Path:
    picture_at(folder / "train2014" / "COCO_train2014_000000000005.jpg")
    instances = {
        "images": [{"id": 5, "file_name": "COCO_train2014_000000000005.jpg"}],
        "annotations": [{"id": 70, "bbox": [10, 20, 30, 5]}, {"id": 71}],
    }
    put(folder / "instances.json", instances)
    refs = [
        {
            "ref_id": 1,
            "ann_id": 70,
            "image_id": 5,
            "split": "val",
            "file_name": "COCO_train2014_000000000005_3.jpg",
            "sentences": [{"sent": "left dog", "raw": "Left dog"}, {"sent": "the dog", "raw": "the dog"}],
        },
        {"ref_id": 2, "ann_id": 71, "image_id": 5, "split": "testA", "sentences": [{"sent": "cat"}]},
        {"ref_id": 3, "ann_id": 70, "image_id": 6, "split": "testA", "sentences": [{"sent": "cow"}]},
    ]
    return put(folder / "refs(unc).json", refs)


def test_refcoco(tmp_path: Path) -> None:
    file = refs_files(tmp_path)
    rows = load_task("grounding", file, "val")
    assert rows["text"] == ["left dog", "the dog"] and rows["key"] == ["1.0", "1.1"]
    assert rows["boxes"] == [[[10.0, 20.0, 40.0, 25.0]]] * 2
    assert Path(rows[0]["image"]["path"]).is_file()
    problems = load_task("grounding", tmp_path, "testA")["problem"]
    assert [problem.partition(":")[0] for problem in problems] == ["box_missing", "image_missing"]
    with pytest.raises(ValueError, match="no split 'testB'; it has testA, validation"):
        load_task("grounding", file, "testB")


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "opened",))

    refs = tmp_path / "refs(unc).p"
    refs.write_bytes(pickle.dumps(Bomb()))
    for spec in (refs, tmp_path):
        with pytest.raises(ValueError, match="is a pickle.*json.dump\\(pickle.load"):
            load_task("grounding", spec)
    assert not (tmp_path / "opened").exists()


def test_plain_boxes(tmp_path: Path) -> None:
    image = picture_at(tmp_path / "a.png")
    boxes = [[1, 2, 11, 12], [[1, 2, 3, 4], [5, 6, 8, 9]], [10, 20, 5, 4], "box", None]
    file = lines(tmp_path / "boxes.jsonl", [{"image": image, "expression": "it", "bbox": box} for box in boxes])
    rows = load_task("grounding", file)
    assert rows["boxes"][:2] == [[[1, 2, 11, 12]], [[1, 2, 3, 4], [5, 6, 8, 9]]]
    assert "then say box_format='xywh'" in rows["problem"][2] and rows["problem"][3].startswith("box_wrong")
    assert load_task("grounding", file, box_format="xywh")["boxes"][2] == [[10, 20, 15, 24]]
    with pytest.raises(ValueError, match="box_format='yxyx' is none of"):
        load_task("grounding", file, box_format="yxyx")


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_typed_data_follow_their_names(tmp_path: Path, streaming: bool) -> None:
    image = {"bytes": encoded(picture(), "PNG"), "path": None}
    own = ClassLabel(names=["entailment", "neutral", "contradiction"])
    data = {"img": [image] * 3, "hypothesis": ["a", "b", "c"], "label": [0, 1, 2]}
    features = Features({"img": {"bytes": Value("binary"), "path": Value("string")}, "hypothesis": Value("string")})
    Dataset.from_dict(data, features=Features({**features, "label": own})).to_parquet(tmp_path / "named.parquet")
    rows = list(load_task("visual_entailment", tmp_path / "named.parquet", streaming=streaming))
    assert [row["label"] for row in rows] == [2, 1, 0]
    words = {**data, "label": ["Entailment", "neutral", "huh"]}
    Dataset.from_dict(words, features=Features({**features, "label": Value("string")})).to_parquet(
        tmp_path / "words.parquet"
    )
    rows = list(load_task("visual_entailment", tmp_path / "words.parquet", streaming=streaming))
    assert [row["label"] for row in rows] == [2, 1, None]
    assert rows[2]["problem"].startswith("label_outside: 'huh'")
    odd = ClassLabel(names=["cat", "dog", "cow"])
    Dataset.from_dict(data, features=Features({**features, "label": odd})).to_parquet(tmp_path / "odd.parquet")
    with pytest.raises(ValueError, match="the classes of the label are cat, dog, cow"):
        load_task("visual_entailment", tmp_path / "odd.parquet", streaming=streaming)


def test_typed_boxes_and_dialogs(tmp_path: Path) -> None:
    image = {"bytes": encoded(picture(), "PNG"), "path": None}
    stored = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "text": Value("string")})
    boxes = Features({**stored, "bbox": List(Value("float32"))})
    Dataset.from_dict({"image": [image], "text": ["it"], "bbox": [[1, 2, 3, 4]]}, features=boxes).to_parquet(
        tmp_path / "boxes.parquet"
    )
    assert load_task("grounding", tmp_path / "boxes.parquet")["boxes"] == [[[1, 2, 3, 4]]]
    assert load_task("grounding", tmp_path / "boxes.parquet", box_format="xywh")["boxes"] == [[[1, 2, 4, 6]]]
    dialogs = load_task("dialog", "shapes", size=3)
    dialogs.to_parquet(tmp_path / "dialogs.parquet")
    again = load_task("dialog", tmp_path / "dialogs.parquet")
    assert again["turns"] == dialogs["turns"] and again["image"] == dialogs["image"]


def test_what_there_is_no_task_for() -> None:
    with pytest.raises(ValueError, match="no task 'nlvr2'; there are retrieval, captioning, vqa"):
        load_task("nlvr2", "shapes")
    with pytest.raises(ValueError, match="no task 'nlvr2'"):
        task_records("nlvr2", [])
    with pytest.raises(ValueError, match="lack label and have image_0, image_1, text"):
        rows = load_task("visual_reasoning", "shapes", size=4).select_columns(["image_0", "image_1", "text"])
        task_records("visual_reasoning", rows)


@pytest.mark.parametrize("task", sorted(set(TASKS) - {"retrieval", "captioning"}))
@pytest.mark.parametrize("preset", ["default", "simple"])
def test_shapes_rows_are_a_function_of_seed_and_index(task: str, preset: str) -> None:
    rows = load_task(task, f"shapes:{preset}", "validation", size=26, seed=3)
    assert len(rows) == 26
    assert list(load_task(task, f"shapes:{preset}", "validation", size=26, seed=3, streaming=True)) == list(rows)
    # The first rows do not depend on how many there are.
    assert list(load_task(task, f"shapes:{preset}", "validation[:10]", seed=3)) == list(rows.select(range(10)))
    other = load_task(task, f"shapes:{preset}", "validation", size=26, seed=4)
    assert other[0] != rows[0]


def test_statements_cannot_be_guessed_from_the_text_or_from_the_images() -> None:
    rows = load_task("visual_reasoning", "shapes", size=240)
    by_text, by_images, groups = defaultdict(list), defaultdict(list), defaultdict(list)
    for row in rows:
        by_text[row["text"]].append(row["label"])
        by_images[row["image_0"]["bytes"] + row["image_1"]["bytes"]].append(row["label"])
        groups[row["sentence_id"]].append((row["text"], row["label"]))
    assert all(2 * sum(labels) == len(labels) for labels in (*by_text.values(), *by_images.values()))
    # A group is one text, once true and once false.
    assert len(groups) == 120
    assert all(len(set(texts)) == 1 for texts in ([text for text, _ in group] for group in groups.values()))
    assert len(set(rows["identifier"])) == 240
    assert set(rows["statement_type"]) >= {"side", "one", "sides", "total", "more"}
    # Some statements are about which image is which.
    assert any(row["image_0"] == other["image_1"] for row in rows for other in rows if row["text"] == other["text"])


def test_hypotheses_cannot_be_guessed_from_the_text() -> None:
    rows = load_task("visual_entailment", "shapes", size=240)
    labels = defaultdict(Counter)
    for row in rows:
        labels[row["text"]][row["label"]] += 1
    assert all(set(count) == {0, 1, 2} and len(set(count.values())) == 1 for count in labels.values())
    assert set(rows["hypothesis_type"]) == {"size", "texture", "place"}
    assert rows.features["label"].names == list(ENTAILMENT.labels)
    with pytest.raises(ValueError, match="entailment needs something that can differ"):
        load_task("visual_entailment", "shapes:simple", size=3, grid=1, max_objects=1, image_size=20)


def test_dialogs_hold_the_answer_once_and_the_candidates_do_not_give_it_away() -> None:
    rows = load_task("dialog", "shapes", size=150, turns=4, candidates=8)
    places = Counter()
    for row in rows:
        assert len(row["turns"]) == 4
        for turn in row["turns"]:
            assert len(set(turn["candidates"])) == 8 == len(turn["relevance"])
            assert turn["relevance"][turn["candidates"].index(turn["answer"])] == 1
            places[turn["candidates"].index(turn["answer"])] += 1
    assert max(places.values()) < 2 * min(places.values())
    questions = [turn["question"] for row in rows for turn in row["turns"]]
    assert any(" it" in question for question in questions)
    # "it" is never asked before something was named.
    for row in rows:
        named = True
        for turn in row["turns"]:
            if " it" in turn["question"]:
                assert named, row["turns"]
            else:
                pairs = parse_caption(turn["question"])
                named = len(pairs) == 1 and pairs[0][0] is not None
    assert {value for row in rows for turn in row["turns"] for value in turn["relevance"]} == {0, 0.5, 1}
    with pytest.raises(ValueError, match="candidates=900"):
        load_task("dialog", "shapes", size=1, candidates=900)


def test_boxes_hold_the_object_that_the_expression_names() -> None:
    rows = load_task("grounding", "shapes", size=60, backgrounds=("white",), textures=("solid",))
    for row in rows:
        ((left, top, right, bottom),) = row["boxes"]
        assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
        image = Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")
        inside = image.crop((left, top, right, bottom))
        assert len(set(inside.getdata())) > 1
    assert any("object" in text for text in rows["text"])


def test_records_of_dialogs_read_each_turn_once_a_round() -> None:
    rows = load_task("dialog", "shapes", size=4, turns=3)
    records = task_records("dialog", rows, seed=1)
    seen = defaultdict(list)
    for epoch in range(3):
        records.set_epoch(epoch)
        for index in range(len(records)):
            seen[index].append(records[index]["turn_index"])
    assert all(sorted(turns) == [0, 1, 2] for turns in seen.values())
    every = task_records("dialog", rows, all_turns=True)
    assert len(every) == 12
    assert [every[index]["turn_index"] for index in range(12)] == [0, 1, 2] * 4
    stream = task_records("dialog", load_task("dialog", "shapes", size=4, turns=3, streaming=True), all_turns=True)
    assert Counter(record["turn_index"] for record in stream) == {0: 4, 1: 4, 2: 4}


def test_what_a_model_reads_of_a_dialog() -> None:
    history = [("what animal", "a dog"), ("is it big?", "no.")]
    text = dialog_text("a park", history, "is it day")
    assert text == "a park. what animal? a dog. is it big? no. is it day?"

    def fitting(words: int) -> str:
        return fitted_text("a park", history, "is it day", lambda one: len(one.split()) <= words)

    assert fitting(13) == text
    # The oldest turn goes first, the caption last, and the question stays.
    assert fitting(12) == "a park. is it big? no. is it day?"
    assert fitting(5) == "a park. is it day?"
    assert fitting(4) == fitting(1) == "is it day?"
