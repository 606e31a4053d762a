from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Image

from hf_vlp.evaluation.labelled import load_labelled
from tests.evaluation.fakes import numbered_image


def parquet(path: Path, column: str = "image", label: str = "label") -> Path:
    features = Features({column: Image(), label: ClassLabel(names=["cat", "dog"])})
    rows = [{column: numbered_image(i), label: i % 2} for i in range(3)]
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def test_class_labels_keep_their_names_and_pictures_stay_undecoded(tmp_path: Path):
    rows = load_labelled(parquet(tmp_path / "pets_test.parquet"))
    assert rows.features["label"].names == ["cat", "dog"]
    assert rows[1]["label"] == 1
    assert rows[0]["image"]["bytes"].startswith(b"\x89PNG")
    assert len(load_labelled(tmp_path)) == 3
    with pytest.raises(ValueError, match="no split 'validation'; it has test"):
        load_labelled(tmp_path, "validation")


def test_columns_are_renamed(tmp_path: Path):
    path = parquet(tmp_path / "pets_test.parquet", "img", "fine")
    assert set(load_labelled(path).column_names) == {"image", "fine"}
    assert set(load_labelled(path, columns={"label": "fine"}).column_names) == {"image", "label"}
    with pytest.raises(ValueError, match="no column 'kind' for 'label'; it has.*'fine'"):
        load_labelled(path, columns={"label": "kind"})


def test_a_folder_a_class(tmp_path: Path):
    for split in ("train", "test"):
        for number, name in enumerate(["cat", "dog"]):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            numbered_image(number).save(folder / "a.png")
    rows = load_labelled(tmp_path, "test")
    assert [rows.features["label"].names[row["label"]] for row in rows] == ["cat", "dog"]
    assert all(Path(row["image"]["path"]).parts[-3] == "test" for row in rows)


def test_records_of_files(tmp_path: Path):
    for number in range(2):
        numbered_image(number).save(tmp_path / f"{number}.png")
    lines = [f'{{"image": "{n}.png", "text": "t", "label": "a{n}", "kind": "k{n}"}}' for n in range(2)]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(lines))
    assert load_labelled(file)["label"][:] == ["a0", "a1"]
    rows = load_labelled(file, columns={"label": "kind"})
    assert rows["label"][:] == ["k0", "k1"]
    assert Path(rows[1]["image"]["path"]).name == "1.png"
    with pytest.raises(ValueError, match="no column 'class'"):
        load_labelled(file, columns={"label": "class"})
    with pytest.raises(FileNotFoundError):
        load_labelled("./nothing.json")


def test_saved_datasets_and_shapes(tmp_path: Path):
    load_labelled(parquet(tmp_path / "pets_test.parquet")).save_to_disk(tmp_path / "saved")
    assert load_labelled(tmp_path / "saved").features["label"].names == ["cat", "dog"]
    assert load_labelled("shapes", size=2).num_rows == 2
