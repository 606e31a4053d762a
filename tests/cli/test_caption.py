"""`hf-vlp caption`: files, folders, what can't be read, and the form of the output."""

import json
from pathlib import Path

import pytest
from transformers import pipeline

from hf_vlp.cli.caption import find_images, line
from hf_vlp.cli.errors import EXIT_FAILED, EXIT_PARTIAL, EXIT_USAGE, UsageError
from hf_vlp.cli.main import main
from tests.hub import tiny

COLOURS = ("red", "blue", "green")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tiny.blip2(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deeper").mkdir()
    for index, colour in enumerate(COLOURS):
        tiny.image(colour).save(folder / ("deeper" if index == 2 else ".") / f"{index}.png")
    (folder / "notes.txt").write_text("not an image, and not asked for")
    return folder


@pytest.fixture(scope="module")
def captions(model: str) -> list[str]:
    captioner = pipeline("image-to-text", model=model)
    return [captioner(tiny.image(colour))[0]["generated_text"] for colour in COLOURS]


def records(text: str) -> list[dict]:
    return [json.loads(row) for row in text.splitlines()]


def test_a_folder(model: str, photos: Path, captions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["caption", model, str(photos), "--batch_size", "2"]) == 0
    rows = records(capsys.readouterr().out)
    names = [str(photos / "0.png"), str(photos / "1.png"), str(photos / "deeper" / "2.png")]
    assert rows == [{"image": name, "caption": text} for name, text in zip(names, captions, strict=True)]


def test_files_to_a_file(model: str, photos: Path, captions: list[str], tmp_path: Path) -> None:
    output = tmp_path / "captions.jsonl"
    files = [str(photos / "1.png"), str(photos / "0.png")]
    assert main(["caption", model, *files, "--output", str(output)]) == 0
    assert [row["caption"] for row in records(output.read_text())] == [captions[1], captions[0]]


def test_options(model: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(photos / "0.png")
    assert main(["caption", model, picture, "--num_beams", "3", "--num_return_sequences", "2"]) == 0
    assert len(records(capsys.readouterr().out)[0]["caption"]) == 2
    assert main(["caption", model, picture, "--max_new_tokens", "2"]) == 0
    assert len(records(capsys.readouterr().out)[0]["caption"].split()) <= 2
    assert main(["caption", model, picture, "--question", "what colour is it ?"]) == 0
    assert set(records(capsys.readouterr().out)[0]) == {"image", "answer"}
    captioner = pipeline("image-to-text", model=model)
    assert main(["caption", model, picture, "--prompt", "a red"]) == 0
    expected = captioner(picture, text="a red")[0]["generated_text"]
    assert records(capsys.readouterr().out)[0]["caption"] == expected
    drawn = []
    for _ in range(2):
        assert main(["caption", model, picture, "--do_sample", "--seed", "3"]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]


def test_what_cannot_be_read_is_named_and_left_out(
    model: str, photos: Path, captions: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, empty = tmp_path / "broken.png", tmp_path / "empty.jpg"
    broken.write_text("a text file")
    empty.write_bytes(b"")
    assert main(["caption", model, str(broken), str(photos / "1.png"), str(empty)]) == EXIT_PARTIAL
    printed = capsys.readouterr()
    assert [row["caption"] for row in records(printed.out)] == [captions[1]]
    assert f"skipped {broken}: can't read the image" in printed.err
    assert f"skipped {empty}: can't read the image" in printed.err
    assert "2 of 3 image(s) skipped" in printed.err
    assert main(["caption", model, str(broken)]) == EXIT_FAILED


def test_sources(photos: Path, tmp_path: Path) -> None:
    assert list(find_images(["http://example.org/x.png"])) == ["http://example.org/x.png"]
    assert len(list(find_images([str(photos), str(photos / "0.png")]))) == 4
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png is no file, no folder"):
        list(find_images(["nowhere.png"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no image"):
        list(find_images([str(tmp_path / "empty")]))


def test_records() -> None:
    assert line("a.png", [{"generated_text": "x"}]) == {"image": "a.png", "caption": "x"}
    assert line("a.png", [{"answer": "x"}, {"answer": "y"}]) == {"image": "a.png", "answer": ["x", "y"]}


def test_failures(model: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(photos / "0.png")
    assert main(["caption", model]) == EXIT_USAGE
    assert main(["caption", model, picture, "--batch_size", "0"]) == EXIT_USAGE
    assert "--batch_size must be at least 1, got 0" in capsys.readouterr().err
    assert main(["caption", model, picture, "--prompt", "a", "--question", "b"]) == EXIT_USAGE
    capsys.readouterr()
    assert main(["caption", model, "nowhere.png"]) == EXIT_FAILED
    assert capsys.readouterr().err.count("\n") == 1
    # A folder without a config, and a model that can't write.
    assert main(["caption", str(tmp_path), picture]) == EXIT_FAILED
    assert str(tmp_path) in capsys.readouterr().err
    clip = tiny.save(tiny.clip(), tmp_path / "clip")
    capsys.readouterr()
    assert main(["caption", clip, picture]) == EXIT_FAILED
    assert "hf-vlp caption: error: " in capsys.readouterr().err
