"""Written files open as pairs, are the same bytes for the same rows, and are never there in part."""

import json
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hf_vlp.bootstrapping.writing import FORMATS, png_bytes, suffix, write_atomically, write_pairs
from hf_vlp.data import decode_image, load_pairs
from tests.bootstrapping.fakes import picture


def row(number: int, content: bytes) -> dict[str, Any]:
    return {
        "image": {"bytes": content, "path": None},
        "text": [f"text {number}", "ein roter Kreis · 红"],
        "image_id": f"id{number}",
        "source": "here",
        "key": f"key{number}",
        "origin": ["web", "synthetic"],
        "itm": [0.5, None],
        "itc": [None, 0.25],
        "sampling_seed": [None, 2**62 + 1],
        "captioner": [None, "cap"],
        "filter": ["fil", "fil"],
    }


def encoded(kind: str) -> bytes:
    buffer = BytesIO()
    picture(3).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read(tmp_path: Path, kind: str):
    contents = [encoded("JPEG"), encoded("PNG"), encoded("ICO"), encoded("WEBP")]
    rows = [row(number, content) for number, content in enumerate(contents)]
    write_pairs(tmp_path / f"train-a{suffix(kind)}", rows, kind)
    read = load_pairs(tmp_path)
    assert [one["text"] for one in read] == [one["text"] for one in rows]
    assert [one["image_id"] for one in read] == ["id0", "id1", "id2", "id3"]
    for one, content in zip(read, contents, strict=True):
        assert decode_image(one["image"]).tobytes() == decode_image(content).tobytes()
    # JPEG, PNG and WebP files as they were; the others where readers of tars would not know them as PNG.
    stored = [one["image"]["bytes"] == content for one, content in zip(read, contents, strict=True)]
    assert stored == [True, True, kind == "parquet", True]


def test_a_tar_carries_every_column(tmp_path: Path):
    write_pairs(tmp_path / "train-a.tar", [row(1, encoded("PNG"))], "webdataset")
    with tarfile.open(tmp_path / "train-a.tar") as archive:
        names = archive.getnames()
        entries = json.loads(archive.extractfile("000000.json").read())
    assert names == ["000000.png", "000000.json"]
    assert entries == {name: value for name, value in row(1, b"").items() if name != "image"}


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_are_the_same_bytes(tmp_path: Path, kind: str):
    rows = [row(number, png_bytes(picture(number))) for number in range(5)]
    first = write_pairs(tmp_path / "a" / "x", rows, kind)
    second = write_pairs(tmp_path / "b" / "x", rows, kind)
    assert first == second
    assert (tmp_path / "a" / "x").read_bytes() == (tmp_path / "b" / "x").read_bytes()
    assert first[0] == (tmp_path / "a" / "x").stat().st_size


def test_a_failure_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    write_atomically(path, lambda file: file.write(b"old"))

    def broken(file: Any) -> None:
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="parquet"):
        suffix("csv")


def test_pictures_in_memory_become_png():
    assert Image.open(BytesIO(png_bytes(picture(2)))).format == "PNG"
