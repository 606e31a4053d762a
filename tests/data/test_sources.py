"""Every kind of source gives the same rows of the same pairs, map-style and streaming, or an error that helps."""

import csv
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, List, Value
from torch.utils.data import DataLoader

from hf_vlp.data import (
    ImageTextCollator,
    PairDataset,
    PairIterableDataset,
    RecordLimits,
    decode_image,
    load_pairs,
    load_questions,
)
from hf_vlp.data.splits import NoSplitError
from tests.data.fakes import TinyProcessor
from tests.data.hostile import encoded, picture

NAMES = [f"{number:03}" for number in range(6)]
TEXTS = [f"picture {name}" for name in NAMES]
EMOJI = os.environ.get("HF_VLP_EMOJI") or str(Path(__file__).resolve().parents[3] / "shared" / "data" / "emoji")


def content(name: str) -> bytes:
    return encoded(picture(size=(8 + int(name), 8)), "PNG")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.png").write_bytes(content(name))
    return folder


def write_lines(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, held in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(held)
            archive.addfile(info, io.BytesIO(held))
    return path


def jsonl(folder: Path, images: Path) -> Path:
    return write_lines(
        folder / "pairs.jsonl", [{"image": f"images/{n}.png", "caption": t} for n, t in zip(NAMES, TEXTS)]
    )


def json_list(folder: Path, images: Path) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps([{"image": f"images/{n}.png", "caption": [t]} for n, t in zip(NAMES, TEXTS)]))
    return path


def json_lines_called_json(folder: Path, images: Path) -> Path:
    return jsonl(folder, images).rename(folder / "pairs.json")


def csv_file(folder: Path, images: Path) -> Path:
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *((f"images/{n}.png", t) for n, t in zip(NAMES, TEXTS))])
    return folder / "pairs.csv"


def tsv_file(folder: Path, images: Path) -> Path:
    path = folder / "pairs.tsv"
    path.write_text("\ufefffilepath\ttitle\n" + "".join(f"images/{n}.png\t{t}\n" for n, t in zip(NAMES, TEXTS)))
    return path


def metadata_jsonl(folder: Path, images: Path) -> Path:
    write_lines(images / "metadata.jsonl", [{"file_name": f"{n}.png", "text": t} for n, t in zip(NAMES, TEXTS)])
    return images


def metadata_csv(folder: Path, images: Path) -> Path:
    lines = ["file_name,text", *(f"{n}.png,{t}" for n, t in zip(NAMES, TEXTS))]
    (images / "metadata.csv").write_text("\n".join(lines))
    return folder


def text_files(folder: Path, images: Path) -> Path:
    for name, text in zip(NAMES, TEXTS):
        (images / f"{name}.txt").write_text(text + "\n")
    return images


def parquet_bytes(folder: Path, images: Path) -> Path:
    table = {"image": [{"bytes": content(n), "path": None} for n in NAMES], "text": TEXTS}
    Dataset.from_dict(table).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_plain_bytes(folder: Path, images: Path) -> Path:
    pq.write_table(pa.table({"jpg": [content(name) for name in NAMES], "txt": TEXTS}), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def parquet_paths(folder: Path, images: Path) -> Path:
    pq.write_table(pa.table({"path": [f"images/{n}.png" for n in NAMES], "caption": TEXTS}), folder / "pairs.parquet")
    return folder


def tar_txt(folder: Path, images: Path) -> Path:
    members = {}
    for name, text in zip(NAMES, TEXTS):
        members |= {f"{name}.png": content(name), f"{name}.txt": text.encode()}
    return write_tar(folder / "pairs-0000.tar", members)


def tar_json_gz(folder: Path, images: Path) -> Path:
    members = {}
    for name, text in zip(NAMES, TEXTS):
        members |= {f"a/{name}.json": json.dumps({"caption": text}).encode(), f"a/{name}.png": content(name)}
    return write_tar(folder / "pairs.tar.gz", members)


def tar_folder(folder: Path, images: Path) -> Path:
    shards = folder / "shards"
    shards.mkdir()
    for start in (0, 3):
        members = {}
        for name, text in list(zip(NAMES, TEXTS))[start : start + 3]:
            members |= {f"{name}.png": content(name), f"{name}.txt": text.encode()}
        write_tar(shards / f"{start:05}.tar", members)
    return shards


def coco(folder: Path, images: Path) -> Path:
    path = folder / "captions.json"
    listed = [{"id": number + 100, "file_name": f"images/{name}.png"} for number, name in enumerate(NAMES)]
    said = [{"id": number, "image_id": number + 100, "caption": text} for number, text in enumerate(TEXTS)]
    path.write_text(json.dumps({"info": {}, "images": listed, "annotations": said[::-1]}))
    return path


def karpathy(folder: Path, images: Path) -> Path:
    path = folder / "dataset_coco.json"
    splits = ["train", "restval"] * 3
    listed = [
        {"filepath": "images", "filename": f"{n}.png", "cocoid": i, "split": s, "sentences": [{"raw": t}]}
        for i, (n, t, s) in enumerate(zip(NAMES, TEXTS, splits))
    ]
    listed.append({"filename": "other.png", "imgid": 99, "split": "val", "sentences": [{"raw": "other"}]})
    path.write_text(json.dumps({"images": listed, "dataset": "coco"}))
    return path


def saved(folder: Path, images: Path) -> Path:
    rows = Dataset.from_dict({"picture": [content(name) for name in NAMES], "caption": TEXTS})
    rows = rows.cast_column("picture", Image())
    DatasetDict({"train": rows, "val": rows.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = [
    jsonl,
    json_list,
    json_lines_called_json,
    csv_file,
    tsv_file,
    metadata_jsonl,
    metadata_csv,
    text_files,
    parquet_bytes,
    parquet_plain_bytes,
    parquet_paths,
    tar_txt,
    tar_json_gz,
    tar_folder,
    coco,
    karpathy,
    saved,
]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("write", SOURCES)
def test_every_kind_of_source_gives_its_pairs(write: Any, streaming: bool, tmp_path: Path, images: Path) -> None:
    rows = load_pairs(write(tmp_path, images), streaming=streaming)
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert {"image", "text", "source"} <= set(rows.features)
    found = {}
    for row in rows:
        assert isinstance(row["image"], dict)
        (text,) = [row["text"]] if isinstance(row["text"], str) else row["text"]
        found[text.strip()] = decode_image(row["image"]).size
        assert row["source"] and not row.get("problem")
    assert found == {text: (8 + int(name), 8) for text, name in zip(TEXTS, NAMES)}
    dataset = PairIterableDataset(rows) if streaming else PairDataset(rows)
    records = list(dataset) if streaming else [dataset[index] for index in range(6)]
    batch = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=0))(records)
    assert len(batch["pixel_values"]) == 6
    assert len({record["key"] for record in records}) == 6


def test_images_are_not_decoded_while_loading(tmp_path: Path) -> None:
    table = {"image": [{"bytes": b"not an image", "path": None}] * 3, "other": [{"bytes": b"x", "path": None}] * 3}
    features = datasets.Features({"image": Image(), "other": Image(), "text": Value("string")})
    Dataset.from_dict({**table, "text": TEXTS[:3]}, features=features).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        rows = list(load_pairs(tmp_path, streaming=streaming))
        assert [row["image"]["bytes"] for row in rows] == [b"not an image"] * 3


def test_ids_and_several_texts_of_coco(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "captions_val2017.json"
    listed = [{"id": 7, "file_name": "000.png"}, {"id": 9, "file_name": "001.png"}]
    said = [{"image_id": 7, "caption": text} for text in ("a", "b", "c")] + [{"image_id": 404, "caption": "lost"}]
    path.write_text(json.dumps({"images": listed, "annotations": said}))
    rows = load_pairs(path, "validation", image_root=images)
    assert rows["text"][:2] == [["a", "b", "c"], []] and rows["image_id"][:2] == ["7", "9"]
    assert rows["problem"][2].startswith("image_missing")
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=1))
    dataset = PairDataset(rows, all_texts=True)
    batch = collator([dataset[index] for index in range(len(dataset))])
    assert len(set(batch["image_ids"].tolist())) == 1 and len(batch["image_ids"]) == 3
    assert collator.report.bad == {"text_missing": 1, "image_missing": 1}
    with pytest.raises(ValueError, match="no split 'train'; it has validation"):
        load_pairs(path, image_root=images)


def test_karpathy_splits(tmp_path: Path, images: Path) -> None:
    path = karpathy(tmp_path, images)
    assert len(load_pairs(path)) == 6
    assert load_pairs(path, "all")["image_id"][:] == ["0", "1", "2", "3", "4", "5", "99"]
    with pytest.raises(ValueError, match="no split 'test'; it has train, validation"):
        load_pairs(path, "test")


def test_a_text_that_the_file_cannot_give_is_a_bad_record(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps({"image": "images/000.png", "text": "good"}).encode(),
        b'{"image": "images/000.png", "text": "cut o',
        b"[1, 2]",
        json.dumps({"image": "images/000.png", "text": 5}).encode(),
        json.dumps({"image": "images/000.png", "text": None}).encode(),
        json.dumps({"image": "images/000.png"}).encode(),
        json.dumps({"image": "images/000.png", "text": ["", None, 3]}).encode(),
        b'{"image": "images/000.png", "text": "\xff\xfe"}',
        b'{"image": "images/000.png", "text": "\\ud800"}',
        json.dumps({"image": 7, "text": "number"}).encode(),
        json.dumps({"text": "no image"}).encode(),
        json.dumps({"image": "images/none.png", "text": "no file"}).encode(),
        b"[" * 100_000,
        b"",
    ]
    path.write_bytes(b"\n".join(lines))
    for streaming in (False, True):
        rows = load_pairs(path, streaming=streaming)
        dataset = PairIterableDataset(rows) if streaming else PairDataset(rows)
        records = list(dataset) if streaming else [dataset[index] for index in range(len(dataset))]
        collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=1, max_examples=9))
        collator(records)
        assert collator.report.seen == 13 and collator.report.good == 1
        assert collator.report.bad == {
            "record_unparsable": 3,
            "text_not_string": 2,
            "text_missing": 2,
            "text_not_unicode": 2,
            "image_wrong_type": 1,
            "image_missing": 2,
        }
        unparsable = collator.report.examples["record_unparsable"]
        assert {example.key for example in unparsable} == {"line 2", "line 3", "line 13"}
        assert collator.report.examples["image_missing"][0].source == str(path)


def test_csv_lines_of_another_length_are_bad_records(tmp_path: Path, images: Path) -> None:
    (tmp_path / "a.csv").write_text('image,text\nimages/000.png,"a, b"\nimages/000.png\nimages/000.png,a,b\n\n')
    rows = load_pairs(tmp_path / "a.csv")
    assert rows["text"][:] == [["a, b"], [], []]
    assert [bool(problem) for problem in rows["problem"]] == [False, True, True]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_tar_that_was_cut_off_is_reported_wherever_it_was_cut(streaming: bool, packed: bool, tmp_path: Path) -> None:
    whole = tar_txt(tmp_path, tmp_path).read_bytes()
    with tarfile.open(tmp_path / "pairs-0000.tar") as archive:
        members = archive.getmembers()
    offsets = [member.offset for member in members]
    last = members[-1].offset_data + 512 * -(-members[-1].size // 512)
    for number, cut in enumerate([*offsets[2:5], offsets[4] + 100, offsets[4] + 600, last - 1, last, last + 100]):
        path = tmp_path / f"cut-{number}.tar"
        path.write_bytes(gzip.compress(whole[:cut]) if packed else whole[:cut])
        rows = list(load_pairs(path, streaming=streaming))
        assert rows[-1]["problem"].startswith("shard_broken"), cut
        good = [row for row in rows[:-1] if row["text"] and row["image"]]
        complete = sum(offset <= cut for offset in [*offsets[2::2], last])
        assert [row["text"][0] for row in good] == TEXTS[:complete], cut
    assert all(not row["problem"] for row in load_pairs(tmp_path / "pairs-0000.tar", streaming=streaming))


def test_a_packed_tar_that_was_cut_off(tmp_path: Path) -> None:
    path = tar_json_gz(tmp_path, tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    rows = list(load_pairs(path))
    assert rows[-1]["problem"].startswith("shard_broken")
    assert [row["text"] for row in rows[:-1]] == [[text] for text in TEXTS[: len(rows) - 1]]


def test_odd_members_of_a_tar(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar",
        {
            "0.PNG": content("000"),
            "0.txt": b"capital letters",
            "1.txt": b"no image",
            "2.png": content("000"),
            "3.png": content("000"),
            "3.json": b'{"caption": ',
            "4.png": content("000"),
            "4.txt": b"\xff\xfe",
            "5.png": content("000"),
            "5.txt": b"good",
            "5.npy": b"\x93NUMPY",
        },
    )
    collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=1))
    dataset = PairDataset(load_pairs(path))
    collator([dataset[index] for index in range(len(dataset))])
    assert collator.report.good == 2
    assert collator.report.bad == {
        "image_missing": 1,
        "text_missing": 1,
        "record_unparsable": 1,
        "text_not_unicode": 1,
    }


@pytest.mark.parametrize("held", [b"", b"no tar at all" * 100])
def test_a_file_that_is_no_tar_is_reported(held: bytes, tmp_path: Path) -> None:
    tar_txt(tmp_path, tmp_path)
    (tmp_path / "pairs-0001.tar").write_bytes(held)
    rows = load_pairs(tmp_path)
    assert [bool(problem) for problem in rows["problem"]] == [False] * 6 + [True]


def test_a_tar_that_changed_is_read_anew(tmp_path: Path) -> None:
    path = tar_txt(tmp_path, tmp_path)
    assert len(load_pairs(path)) == 6
    write_tar(path, {"0.png": content("000"), "0.txt": b"new"})
    assert load_pairs(path)["text"][:] == [["new"]]


def test_splits_follow_from_names(tmp_path: Path, images: Path) -> None:
    for split, name in (("train", "000"), ("val", "001"), ("test", "002")):
        folder = tmp_path / "set" / split
        write_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "text": split}])
        (folder / "a.png").write_bytes(content(name))
    for split, expected in (("train", "train"), ("validation", "val"), ("dev", "val"), ("test", "test")):
        assert load_pairs(tmp_path / "set", split)["text"][:] == [[expected]]
    assert len(load_pairs(tmp_path / "set", "all")) == 3
    with pytest.raises(ValueError, match="no split 'heldout'; it has test, train, validation"):
        load_pairs(tmp_path / "set", "heldout")


def test_shards_of_several_splits(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        table = pa.table({"image": [content("000")] * 2, "text": [name] * 2})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
    assert len(load_pairs(tmp_path)) == 4 and len(load_pairs(tmp_path, "validation")) == 2
    assert load_pairs(tmp_path, streaming=True).num_shards == 2
    pq.write_table(pa.table({"image": [b"x"], "text": ["x"]}), tmp_path / "data" / "extra.parquet")
    with pytest.raises(ValueError, match="extra.parquet names no split but other files do"):
        load_pairs(tmp_path)


@pytest.mark.parametrize(
    ("part", "expected"), [("[:2]", [0, 1]), ("[4:]", [4, 5]), ("[-1:]", [5]), ("[:50%]", [0, 1, 2]), ("[9:]", [])]
)
def test_parts_of_a_split(part: str, expected: list[int], tmp_path: Path, images: Path) -> None:
    path = jsonl(tmp_path, images)
    assert [text for (text,) in load_pairs(path, f"train{part}")["text"]] == [TEXTS[number] for number in expected]
    if "-" not in part and "%" not in part:
        streamed = load_pairs(path, f"train{part}", streaming=True)
        assert [row["text"] for row in streamed] == [[TEXTS[number]] for number in expected]
    else:
        with pytest.raises(ValueError, match="no known length"):
            load_pairs(path, f"train{part}", streaming=True)


def test_parts_that_make_no_sense(tmp_path: Path, images: Path) -> None:
    for split in ("train[1]", "train[a:b]", "train[", "train[:2]x"):
        with pytest.raises(ValueError, match="train|bounds|neither"):
            load_pairs(jsonl(tmp_path, images), split)
    assert len(load_pairs("shapes", "train[:7]")) == 7
    assert load_pairs("shapes", "train[3:7]")["key"][:] == ["3", "4", "5", "6"]
    streamed = load_pairs("shapes", "train[900:1100]", streaming=True)
    for workers in (0, 2):
        loader = DataLoader(
            PairIterableDataset(streamed), batch_size=None, num_workers=workers, collate_fn=lambda r: r
        )
        assert sorted(int(record["key"]) for record in loader) == list(range(900, 1100))


def test_columns_can_be_named(tmp_path: Path, images: Path) -> None:
    records = [{"img": "images/000.png", "text": "english", "text_zh": "中文", "number": 3}]
    path = write_lines(tmp_path / "a.jsonl", records)
    assert load_pairs(path, columns={"text": "text_zh"})["text"][:] == [["中文"]]
    assert load_pairs(path)["text"][:] == [["english"]]
    assert load_pairs(path, columns={"image_id": "number"})["image_id"][:] == ["3"]
    for columns, named in (
        ({"text": "text_de"}, "no column 'text_de'.*'img', 'text', 'text_zh', 'number'"),
        ({"caption": "text"}, "'caption' is no role.*image, text, image_id"),
    ):
        with pytest.raises(ValueError, match=named):
            load_pairs(path, columns=columns)


def test_roles_may_change_places(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [content("000")], "image": ["said"]}), tmp_path / "a.parquet")
    for streaming in (False, True):
        (row,) = load_pairs(tmp_path, streaming=streaming, columns={"image": "text", "text": "image"})
        assert row["text"] == "said" and decode_image(row["image"]).size == (8, 8)


def test_columns_that_cannot_be_guessed_are_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"foto": "a.png", "tekst": "b"}])
    with pytest.raises(ValueError, match=r"looks like the image.*'foto', 'tekst'.*columns=\{\"image\": "):
        load_pairs(path)
    with pytest.raises(ValueError, match="looks like the text"):
        load_pairs(path, columns={"image": "foto"})
    path = write_lines(tmp_path / "b.jsonl", [{"url": "https://a/b.png", "caption": "b"}])
    with pytest.raises(ValueError, match="img2dataset"):
        load_pairs(path)
    path = write_lines(tmp_path / "c.jsonl", [{"image": "https://a/b.png", "caption": "b"}])
    with pytest.raises(ValueError, match="img2dataset"):
        load_pairs(path)


def test_columns_of_the_wrong_type(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [1], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'image' holds Value.*int64.*must be images"):
        load_pairs(tmp_path)
    pq.write_table(pa.table({"image": [b"x"], "text": [1.5]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="column 'text' holds Value.*must be strings"):
        load_pairs(tmp_path)
    pq.write_table(pa.table({"image": [b"x"], "text": [["a", "b"]]}), tmp_path / "a.parquet")
    assert load_pairs(tmp_path)["text"][:] == [["a", "b"]]


def test_images_are_found_below_the_root(tmp_path: Path, images: Path) -> None:
    path = write_lines(tmp_path / "elsewhere" / "a.jsonl", [{"image": "000.png", "text": "a"}])
    with pytest.raises(ValueError, match="none of the first 1 images is there.*image_root"):
        load_pairs(path)
    row = load_pairs(path, image_root=images)[0]
    assert decode_image(row["image"]).size == (8, 8)
    with pytest.raises(ValueError, match="image_root.*not a folder"):
        load_pairs(path, image_root=tmp_path / "none")


def test_sources_that_are_none(tmp_path: Path, images: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"a": 1}')
    (tmp_path / "bad.parquet").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "header.csv").write_text("image,text\n")
    (tmp_path / "semi.csv").write_text("image;text\na.png;hello\n")
    (tmp_path / "bad.tar").write_text("x")
    for spec, error, named in (
        (tmp_path / "none.jsonl", FileNotFoundError, "no file or folder"),
        ("./none", FileNotFoundError, "no file or folder"),
        (tmp_path / "notes.md", ValueError, "parquet, json, jsonl"),
        (tmp_path / "bad.json", ValueError, "bad.json is not JSON"),
        (tmp_path / "odd.json", ValueError, "neither a list of records"),
        (tmp_path / "bad.parquet", ValueError, "bad.parquet is not a parquet file"),
        (tmp_path / "empty", ValueError, "nothing that can be read"),
        (tmp_path / "empty.jsonl", ValueError, "empty.jsonl holds no record that can be read$"),
        (tmp_path / "header.csv", ValueError, "header.csv holds no record that can be read$"),
        (tmp_path / "semi.csv", ValueError, "separated by semicolons"),
        (tmp_path / "bad.tar", ValueError, r"bad.tar holds no record that can be read \(shard_broken: ReadError"),
        (images, ValueError, "6 images but nothing that is said"),
    ):
        with pytest.raises(error, match=named):
            load_pairs(spec)
    with pytest.raises(TypeError, match="size.*only Shapes"):
        load_pairs(jsonl(tmp_path, images), size=5)


def test_a_name_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(FileNotFoundError, match="'org/none' is neither 'shapes', nor a file or folder.*doesn't exist"):
        load_pairs("org/none")


@pytest.mark.parametrize(
    "message",
    [
        "Unknown split \"test\". Should be one of ['train', 'dev'].",
        "Bad split: test. Available splits: ['train', 'dev']",
    ],
)
def test_a_split_that_the_hub_does_not_have(message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_split(*args: Any, **options: Any) -> None:
        raise ValueError(message)

    monkeypatch.setattr(datasets, "load_dataset", without_split)
    with pytest.raises(NoSplitError, match="org/name has no split 'test'; it has train, dev$"):
        load_pairs("org/name", "test")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_the_hub(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None = None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split))
        table = {"photo": [content(n) for n in NAMES], "captions": [[t, t + "!"] for t in TEXTS], "url": ["u"] * 6}
        rows = Dataset.from_dict(table).cast_column("photo", Image())
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_pairs("org/name:plain", "test[:4]", streaming=streaming)
    assert asked == [("org/name", "plain", "test")]
    assert [row["text"] for row in rows] == [[text, text + "!"] for text in TEXTS[:4]]
    assert next(iter(rows))["source"] == "org/name:plain" and next(iter(rows))["url"] == "u"


def test_questions_of_files(tmp_path: Path, images: Path) -> None:
    records = [
        {"image": "images/000.png", "question": "what?", "answers": ["a", "b"]},
        {"image": "images/001.png", "question": "who?", "answers": [{"answer": "c", "answer_id": 1}]},
        {"image": "images/002.png", "question": "why?", "answers": "d"},
    ]
    rows = load_questions(write_lines(tmp_path / "a.jsonl", records))
    assert rows["question"][:] == ["what?", "who?", "why?"]
    assert rows["answers"][:] == [["a", "b"], ["c"], ["d"]]
    table = {"image": [content("000")], "question": ["q"], "answers": [[{"answer": "x"}, {"answer": "y"}]]}
    Dataset.from_dict(table).to_parquet(tmp_path / "b.parquet")
    for streaming in (False, True):
        (row,) = load_questions(tmp_path / "b.parquet", streaming=streaming)
        assert row["answers"] == ["x", "y"]
    hidden = write_lines(tmp_path / "test.jsonl", [{"image": "images/000.png", "question": "q", "question_id": 4}])
    (row,) = load_questions(hidden, "test")
    assert row["question_id"] == "4" and "answers" not in row
    with pytest.raises(ValueError, match="looks like the question"):
        load_questions(jsonl(tmp_path, images))


@pytest.mark.skipif(not Path(EMOJI).is_dir(), reason="the emoji set is not here; HF_VLP_EMOJI names its folder")
def test_the_emoji_set() -> None:
    sizes = {split: len(load_pairs(EMOJI, split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 1524, "validation": 116, "test": 209}
    # A few emoji have no keywords.
    for columns, missing in ((None, 0), ({"text": "text_zh"}, 0), ({"text": "keywords"}, 6)):
        dataset = PairDataset(load_pairs(EMOJI, "test", columns=columns))
        collator = ImageTextCollator(TinyProcessor(), limits=RecordLimits(max_bad_rate=missing / 209))
        batch = collator([dataset[index] for index in range(len(dataset))])
        assert len(batch["pixel_values"]) == 209 - missing
    assert load_pairs(EMOJI, "test", columns={"text": "keywords"}).features["text"] == List(Value("string"))
    rows = load_pairs(EMOJI, "train", streaming=True)
    assert sum(1 for _ in PairIterableDataset(rows, buffer_size=100)) == 1524
