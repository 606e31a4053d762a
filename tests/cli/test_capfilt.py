"""`hf-vlp capfilt` and `training_scripts/capfilt.py`: the same options, the same job, errors in a line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from hf_vlp.bootstrapping.arguments import CapFiltArguments, unused_options
from hf_vlp.cli.errors import EXIT_FAILED, EXIT_USAGE
from hf_vlp.cli.main import main
from hf_vlp.data import load_pairs
from hf_vlp.resources import resource_folder
from tests.bootstrapping.jobs import contents
from tests.bootstrapping.scripts import script
from tests.hub import tiny

_DATA = (
    "--data shapes --shapes size=7 preset=simple caption_noise=0.4 --human_data shapes --human_split validation[:2]"
)
_OPTIONS = "--max_new_tokens 5 --unit_size 3 --batch_size 2 --workers 0 --itm_threshold 0.2 --gallery 4"
DATA, OPTIONS = _DATA.split(), _OPTIONS.split()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    captioner = tiny.save(tiny.blip2(), folder / "captioner")
    judge = tiny.save(tiny.blip2_retrieval(), folder / "filter")
    return ["--captioner", str(captioner), "--filter", str(judge)]


@pytest.fixture(scope="module")
def whole(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cli") / "set"
    assert main(["capfilt", *DATA, *models, *OPTIONS, "--output", str(output)]) == 0
    return output


def test_the_set_is_there(whole: Path) -> None:
    rows = load_pairs(whole)
    assert {origin for row in rows for origin in row["origin"]} == {"web", "synthetic", "human"}
    assert (whole / "gallery.html").is_file()
    assert "train-*.parquet" in (whole / "README.md").read_text()


def test_again_there_is_nothing_to_do(whole: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capfilt", *DATA, *models, *OPTIONS, "--output", str(whole)]) == 0
    assert "nothing to do: the set is ready" in capsys.readouterr().out


def test_another_threshold_is_refused(whole: Path, models: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    changed = [*OPTIONS, "--itm_threshold", "0.7"]
    assert main(["capfilt", *DATA, *models, *changed, "--output", str(whole)]) == EXIT_FAILED
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-vlp capfilt: error: ")
    assert "filter.itm_threshold was 0.2, now 0.7" in error


def test_the_script_does_the_same(whole: Path, models: list[str], tmp_path: Path) -> None:
    summary = script("capfilt").main([*DATA, *models, *OPTIONS, "--output", str(tmp_path / "set")])
    assert contents(tmp_path / "set") == contents(whole)
    assert summary["images"] == len(load_pairs(whole))


@pytest.mark.slow
def test_accelerate_launch_on_two_processes(whole: Path, models: list[str], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2", "--cpu"]
    path = str(resource_folder("training_scripts") / "capfilt.py")
    done = subprocess.run(
        [*launcher, path, *DATA, *models, *OPTIONS, "--output", str(tmp_path / "set")],
        check=True,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert "starting all of them" in done.stdout
    assert contents(tmp_path / "set") == contents(whole)


def test_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["capfilt", "--help"]) == 0
    text = capsys.readouterr().out
    for entry in dataclasses.fields(CapFiltArguments):
        assert f"--{entry.name}" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--filter f", "--data is missing"),
        ("--data shapes", "give --captioner, --filter, or both"),
        ("--data shapes --filter f --shapes size", "--shapes takes NAME=VALUE"),
        ("--data shapes --captioner c --top_p 1.5", "top_p=1.5"),
        ("--data shapes --filter f --itm_threshold -1", "no threshold"),
        ("--data shapes --filter f --max_length 0", "max_length=0"),
        ("--data shapes --filter f --text_batch_size 0", "text_batch_size=0"),
        ("--data shapes --filter f --workers -1", "workers=-1"),
        ("--data shapes --human_data shapes --filter f --human_columns text", "--human_columns takes NAME=VALUE"),
        ("--data no/such/folder --filter f", "no/such/folder"),
        ("--data shapes --filter f --shapes colour=red", "colour"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*line.split(), "--output", str(tmp_path / "set")]
    assert main(["capfilt", *arguments]) == EXIT_FAILED
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match=words):
        script("capfilt").main(arguments)
    assert not (tmp_path / "set").exists()


def test_options_that_nothing_looks_at_are_named() -> None:
    assert unused_options(CapFiltArguments(data=["shapes"], captioner="c", filter="f", shapes=["size=3"])) == []
    arguments = CapFiltArguments(
        data=["web"],
        captioner="c",
        method="beam",
        top_p=0.5,
        max_length=9,
        human_columns=["text=a"],
        shapes=["size=3"],
    )
    assert unused_options(arguments) == [
        "not used: --max_length (there is no --filter)",
        "not used: --human_columns (there is no --human_data)",
        "not used: --shapes (no data is Shapes)",
        "not used: --top_p (beams are not sampled)",
    ]
    filtered = CapFiltArguments(data=["web"], filter="f", top_k=50, num_beams=5)
    assert unused_options(filtered) == ["not used: --top_k, --num_beams (there is no --captioner)"]
    sampled = CapFiltArguments(data=["web"], captioner="c", num_beams=5)
    assert unused_options(sampled) == ["not used: --num_beams (samples have no beams)"]


def test_a_model_without_the_role_is_named(
    models: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save(tiny.clip(), tmp_path / "clip")
    line = ["capfilt", "--data", "shapes", "--shapes", "size=2", "--output", str(tmp_path / "set")]
    assert main([*line, "--captioner", str(folder), "--max_length", "9"]) == EXIT_FAILED
    printed = capsys.readouterr()
    assert "has no 'captioning' class" in printed.err
    assert "not used: --max_length (there is no --filter)" in printed.out
    assert main([*line, "--filter", str(folder)]) == EXIT_FAILED
    assert "no matching head" in capsys.readouterr().err


def test_wrong_usage() -> None:
    assert main(["capfilt", "--data", "shapes"]) == EXIT_USAGE
    assert main(["capfilt", "--output", "x", "--method", "greedy"]) == EXIT_USAGE
